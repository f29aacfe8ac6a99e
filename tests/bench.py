"""`make bench`: the figures the project promises, as ratios and counts measured in one run. Nothing here is a test."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hyper2kvmd import accel, journal
from hyper2kvmd.daemon.daemon import Daemon
from hyper2kvmd.daemon.metrics import Metrics
from hyper2kvmd.errors import Code
from hyper2kvmd.files import fsync_file
from hyper2kvmd.guest.session import open_guest
from hyper2kvmd.job.events import STAGES, Event
from hyper2kvmd.queue.names import LOCK, REPORT
from hyper2kvmd.queue.progress import Progress
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings
from tests.cache import cached
from tests.conftest import disk_entry, report_of, run_job, write_manifest
from tests.fleet import HEAD, write_script
from tests.fleet.migrations import Campaign
from tests.guests.build import build, export
from tests.integration.daemon.test_daemon import daemon


def main() -> int:
    """Run the benchmarks that are named, or all of them, and print one line for each figure."""
    functions = (
        *(conversion, data, migration, fix, latency, overhead, burst, fleet, endurance, scan, idle, events),
        estimates,
    )
    benchmarks = {function.__name__: function for function in functions}
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *benchmarks], help="which (default: all)")
    journal.configure("warning")
    for name in parser.parse_args().names or benchmarks:
        with tempfile.TemporaryDirectory(prefix="hyper2kvmd-bench-", dir="/var/tmp") as scratch:
            benchmarks[name](Path(scratch))
    return 0


def figure(what: str, value: float, unit: str, goal: str) -> None:
    """Print one figure beside its goal."""
    print(f"{what:<58} {value:>9.2f} {unit:<7} (goal {goal})", flush=True)


def settings_in(scratch: Path, **changes: Any) -> Settings:
    """Settings on a scratch directory, without libvirt."""
    for name in ("exports", "images", "work"):
        (scratch / name).mkdir()
    shape = {
        "exports_dir": scratch / "exports",
        "output_dir": scratch / "images",
        "work_dir": scratch / "work",
        "settle_seconds": 0,
        "libvirt": {"import": False},
        "metrics": {"listen": ""},
        **changes,
    }
    return Settings.model_validate(shape)


# A process that converts as the product's does, without libdeflate.
_WITH_ZLIB = (
    "import sys\n"
    "from hyper2kvmd.image.stream import __main__, pipeline\n"
    "pipeline.libdeflate = lambda: None\n"
    "sys.exit(__main__.main(*sys.argv[1:]))"
)
_HASH = "import hashlib, sys; hashlib.file_digest(open(sys.argv[1], 'rb'), 'sha256')"
_FILLED_BYTES = 4 << 30  # of a disk of three times as many


def conversion(scratch: Path) -> None:
    """Our own reader beside qemu-img, on the disk of vSphere's kind: how long, with how much processor and memory."""
    source, target = _filled() / "disk.vmdk", scratch / "target"
    options = ("-T", "writeback", "-t", "none")
    qemu: list[str | Path] = ["qemu-img", "convert", "-O", "qcow2", *options, source, target]
    packed: list[str | Path] = [*qemu[:-2], "-c", "-W", "-o", "compression_type=zstd", source, target]
    reader = [sys.executable, "-P", "-m", "hyper2kvmd.image.stream"]
    plain = [sys.executable, "-P", "-c", _WITH_ZLIB]

    def ours(program: list[str], format: str, threads: int) -> list[str | Path]:
        return [*program, source, str(source.stat().st_size), source.name, target, format, str(threads)]

    variants: dict[str, list[list[str | Path]]] = {
        "qemu-img": [qemu],
        "qemu-img and hashlib at once": [qemu, [sys.executable, "-c", _HASH, source]],
        "own reader, 2 threads": [ours(reader, "qcow2", 2)],
        "own reader, 1 thread": [ours(reader, "qcow2", 1)],
        "own reader, zlib, 2 threads": [ours(plain, "qcow2", 2)],
        "own reader to raw, 2 threads": [ours(reader, "raw", 2)],
        "qemu-img, zstd": [packed],
        "own reader, zstd, 2 threads": [ours(reader, "qcow2-zstd", 2)],
    }
    for state in ("warm", "cold"):
        took: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(3):
            for name, commands in variants.items():
                target.unlink(missing_ok=True)
                target.touch()
                _cache_of(source, state)
                seconds, cpu, megabytes = _run_together(commands, target)
                took[name].append(seconds)
                print(f"{state}: {name:<30} {seconds:6.1f} s, {cpu:6.1f} s of CPU, {megabytes:5.0f} MiB", flush=True)
        median = {name: sorted(seconds)[1] for name, seconds in took.items()}
        for name, beside, goal in (
            ("own reader, 2 threads", "qemu-img", "≤ 0.40"),
            ("own reader, zlib, 2 threads", "qemu-img", "≤ 0.60"),
            ("own reader, 2 threads", "qemu-img and hashlib at once", "≤ 0.35"),
            ("own reader, 1 thread", "qemu-img", "none set"),
            ("own reader to raw, 2 threads", "qemu-img", "none set"),
            ("own reader, zstd, 2 threads", "qemu-img, zstd", "none set"),
        ):
            figure(f"{state}: {name} / {beside}", median[name] / median[beside], "", goal)


def _filled() -> Path:
    """A directory with a streamOptimized disk of 12 GiB, of which 4 are what this system's own files hold."""

    def make(into: Path) -> None:
        raw = into / "disk.raw"
        with raw.open("wb") as disk:
            disk.truncate(3 * _FILLED_BYTES)
            files = sorted(path for path in Path("/usr").rglob("*") if path.is_file() and not path.is_symlink())
            written = 0
            for path in itertools.cycle(files):
                content = path.read_bytes()
                disk.seek(-disk.tell() % 4096, os.SEEK_CUR)  # as a file system would lay them down
                disk.write(content)
                written += len(content)
                if written % 97 == 0:  # and not all in one place
                    disk.seek(min(len(content), 8 << 20), os.SEEK_CUR)
                if written >= _FILLED_BYTES:
                    break
        options = ("-O", "vmdk", "-o", "subformat=streamOptimized")
        subprocess.run(["qemu-img", "convert", "-f", "raw", *options, raw, into / "disk.vmdk"], check=True)
        raw.unlink()

    return cached("bench", "filled", "1", make)


def _cache_of(source: Path, state: str) -> None:
    """Have a file in the page cache (warm), or nothing (cold)."""
    if state == "cold":
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    else:
        with source.open("rb") as file:
            while file.read(1 << 24):
                pass


def _run_together(commands: list[list[str | Path]], target: Path) -> tuple[float, float, float]:
    """Run processes at the same time, until what they wrote is on disk: seconds, those of CPU, MiB of the largest."""
    started = time.monotonic()
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    cpu, largest = 0.0, 0.0
    for process in processes:
        # Not ru_maxrss, which counts what this process had when it forked.
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            largest = max(largest, _resident_mb(process.pid, "VmHWM"))
            time.sleep(0.05)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, process.args
        cpu += usage.ru_utime + usage.ru_stime
    fsync_file(target)
    return time.monotonic() - started, cpu, largest


def data(scratch: Path) -> None:
    """A whole migration of a guest with 4 GB of data beside virt-v2v, and how much of its disks is read."""
    # On a file system of its own, whose device counts what is read of it.
    image, mount = scratch / "exports.img", scratch / "exports"
    settings = settings_in(scratch)
    with image.open("wb") as file:
        file.truncate(8 << 30)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    try:
        device = Path(subprocess.check_output(["findmnt", "-no", "SOURCE", mount], text=True).strip()).name
        dropped = export("debian12-bios", mount, vm_name="web01")
        shutil.copy(_filled() / "disk.vmdk", dropped / "data.vmdk")
        disks = sorted(dropped.glob("*.vmdk"), key=lambda path: path.name == "data.vmdk")
        manifest = json.loads((dropped / "manifest.json").read_text())
        manifest["disks"].append(disk_entry(disks[1], id="data", format="vmdk", boot_order_hint=1, disk_type="data"))
        (dropped / "manifest.json").write_text(json.dumps(manifest))
        _cache_of(image, "cold")
        counter = Path(f"/sys/block/{device}/stat")
        before, started = int(counter.read_text().split()[2]), time.monotonic()
        done = run_job(dropped, settings)
        whole = time.monotonic() - started
        assert done.returncode == 0, done.stderr
        stages = {stage["name"]: stage["seconds"] for stage in report_of(dropped)["stages"]}
        print(f"whole {whole:.1f} s ({json.dumps(stages)})")
        read = 512 * (int(counter.read_text().split()[2]) - before)
        figure(
            "bytes read of the sources / their size", read / sum(disk.stat().st_size for disk in disks), "", "≤ 1.02"
        )
        _cache_of(image, "cold")
        v2v = _virt_v2v(disks, scratch / "images")
        figure("whole migration with 4 GB of data / virt-v2v", whole / v2v, "", "≤ 0.5")
    finally:
        subprocess.run(["umount", mount], check=True)


def _virt_v2v(disks: list[Path], into: Path) -> float:
    """Seconds that virt-v2v takes for a guest with these disks."""
    started = time.monotonic()
    subprocess.run(
        ["virt-v2v", "-i", "disk", *disks, "-o", "local", "-os", into, "-of", "qcow2", "-on", "v2v"],
        env={**os.environ, "LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    seconds = time.monotonic() - started
    print(f"virt-v2v {seconds:.1f} s")
    return seconds


def migration(scratch: Path) -> None:
    """A whole migration beside its slowest branch alone, and beside virt-v2v, on the same guest."""
    settings = settings_in(scratch)
    dropped = export("debian12-bios", scratch / "exports", dialect="seed", vm_name="web01")
    (disk,) = dropped.glob("*.vmdk")

    def timed(*options: str) -> float:
        started = time.monotonic()
        done = run_job(dropped, settings, *options)
        assert done.returncode == 0, done.stderr
        return time.monotonic() - started

    timed("--stages", "inspect")  # warms the page cache and libguestfs's appliance, for all three alike
    branch = timed("--stages", "inspect,fix")
    whole = timed()
    stages = {stage["name"]: stage["seconds"] for stage in report_of(dropped)["stages"]}
    print(f"whole {whole:.1f} s ({json.dumps(stages)}), INSPECT and FIX alone {branch:.1f} s")
    figure("whole migration / slowest branch alone", whole / branch, "", "≤ 1.15")
    v2v = _virt_v2v([disk], scratch / "images")
    figure("whole migration / virt-v2v -i disk", whole / v2v, "", "≤ 0.6")


def fix(scratch: Path) -> None:
    """INSPECT and FIX beside what cannot be avoided: one appliance and one rebuild, with nothing around them."""
    settings = settings_in(scratch)
    disk = build("debian12-bios")
    accelerator = accel.resolve("auto", Tools()).name

    def bare() -> float:
        overlay = scratch / "bare.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "raw", overlay], check=True)
        started = time.monotonic()
        disks = [(overlay, "qcow2")]
        with open_guest(disks, accel=accelerator, memory_mb=settings.guest.memory_mb, tools=Tools()) as session:
            session.g.mount("/dev/sda2", "/")
            session.g.sh("update-initramfs -u -k all")
        return time.monotonic() - started

    bare()  # warms the page cache and libguestfs's appliance
    ratios = []
    for round_number in range(3):
        needed = bare()
        dropped = export("debian12-bios", scratch / "exports", dialect="seed", vm_name=f"web{round_number}")
        done = run_job(dropped, settings)
        assert done.returncode == 0, done.stderr
        stages = {stage["name"]: stage["seconds"] for stage in report_of(dropped)["stages"]}
        ratios.append((stages["inspect"] + stages["fix"]) / needed)
        print(f"INSPECT {stages['inspect']:.1f} s, FIX {stages['fix']:.1f} s, bare launch and rebuild {needed:.1f} s")
    figure("INSPECT and FIX / bare launch and rebuild, median of 3", sorted(ratios)[1], "", "≤ 1.15")


def latency(scratch: Path) -> None:
    """From the drop of an export to its claim, one at a time, by a daemon that was told at once."""
    for mode, count in (("auto", 200), ("off", 20)):
        interval = {} if mode == "auto" else {"scan_interval_seconds": 2}
        (scratch / mode).mkdir()
        settings = settings_in(scratch / mode, watch={"mode": mode}, log={"level": "error"}, **interval)
        seconds = sorted(_drops(scratch, settings, count))
        figure(f"drop to claim, watch.mode {mode}, median of {count}", 1000 * seconds[count // 2], "ms", "none set")
        goal = "≤ 100" if mode == "auto" else "≤ scan_interval_seconds + 1 s = 3000"
        figure("  p99", 1000 * seconds[count * 99 // 100], "ms", goal)


def _drops(scratch: Path, settings: Settings, count: int) -> list[float]:
    """Seconds from the drop of each of `count` exports, one after the other, to its claim."""
    seconds = []
    with daemon(settings):
        time.sleep(3)
        for number in range(count):
            ready = scratch / f"vm{number:03}"
            ready.mkdir()
            disk = ready / "disk.raw"
            disk.write_bytes(os.urandom(1 << 20))
            write_manifest(ready, [disk_entry(disk)])
            export = settings.exports_dir / ready.name
            if settings.watch.mode == "off":  # at any moment between two looks
                time.sleep(random.uniform(0, settings.scan_interval_seconds))
            started = time.monotonic()
            ready.rename(export)
            while not (export / LOCK).exists():
                time.sleep(0.001)
            seconds.append(time.monotonic() - started)
            while not (export / REPORT).exists():
                time.sleep(0.01)
    return seconds


def overhead(scratch: Path) -> None:
    """What a tiny job costs beside the start of a Python process that imports the same libraries."""
    settings = settings_in(scratch)
    imports = "import hyper2kvmd.__main__, hyper2kvmd.job.main"
    bare, jobs = [], []
    for number in range(20):
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", imports], check=True)
        bare.append(time.monotonic() - started)
        export = scratch / "exports" / f"vm{number:02}"
        export.mkdir()
        disk = export / "disk.raw"
        disk.write_bytes(os.urandom(1 << 20))
        write_manifest(export, [disk_entry(disk)])
        started = time.monotonic()
        assert run_job(export, settings).returncode == 0
        jobs.append(time.monotonic() - started)
    bare.sort()
    jobs.sort()
    print(f"a tiny job {jobs[10]:.2f} s, Python with the libraries alone {bare[10]:.2f} s (medians of 20)")
    figure("a tiny job / the start of Python with its libraries", jobs[10] / bare[10], "", "≤ 2")


def estimates(scratch: Path) -> None:
    """How near the estimates come: twelve migrations to learn from, and six of other sizes up to twice as large."""
    settings = settings_in(scratch)

    def ratio(number: int, mib: int) -> float:
        """Estimated seconds for each second that a disk of random bytes took."""
        export = scratch / "exports" / f"vm{number:02}"
        export.mkdir()
        disk = export / "disk.raw"
        with disk.open("wb") as file:
            for _ in range(mib):
                file.write(os.urandom(1 << 20))
        write_manifest(export, [disk_entry(disk)])
        assert 0 == run_job(export, settings).returncode
        report = report_of(export)
        for path in (disk, *settings.output_dir.iterdir()):
            path.unlink()
        return float(report["estimate"]["seconds"]) / float(report["seconds"])

    sizes = (32, 64, 128, 256, 512, 1024)
    for number, mib in enumerate((*sizes, *sizes)):
        ratio(number, mib)
    found = sorted(ratio(number, mib) for number, mib in enumerate((48, 96, 384, 768, 1536, 2048), start=50))
    figure("estimated / actual, median of six", (found[2] + found[3]) / 2, "", "0.8 to 1.25")
    figure("  the lowest", found[0], "", "≥ 0.5")
    figure("  the highest", found[-1], "", "≤ 2")


def burst(scratch: Path) -> None:
    """A thousand exports dropped at once: all done, none twice."""
    count = 1000
    settings = settings_in(scratch)
    for number in range(count):
        directory = scratch / "exports" / f"vm{number:04}"
        directory.mkdir()
        disk = directory / "disk.raw"
        disk.write_bytes(os.urandom(1 << 20))
        write_manifest(directory, [disk_entry(disk)])
    started = time.monotonic()
    with daemon(settings, "--once") as process:
        process.communicate()
    seconds = time.monotonic() - started
    reports = [report_of(directory) for directory in (scratch / "exports").glob("vm*")]
    good = sum(document["status"] == "succeeded" for document in reports)
    twice = sum(document["attempts"] != 1 for document in reports)
    outputs = len(list((scratch / "images").iterdir()))
    figure("1,000 tiny exports at once: succeeded", good, "jobs", "1000")
    figure("  done more than once", twice, "jobs", "0")
    figure("  disks published", outputs, "disks", "1000")
    figure("  time", seconds, "s", "none set")


def fleet(scratch: Path) -> None:
    """Two thousand exports, three nodes of two slots, and a real Slurm: how fast they are handed over, and done."""
    count = 2000
    with Campaign(nodes=3, dispatch={"max_submitted": count}) as campaign:
        # Nothing may start: what is measured is the daemon, sbatch and slurmctld.
        campaign.fleet.shell(HEAD, "scontrol update nodename=kvm[1-3] state=drain reason=bench")
        for number in range(count):
            campaign.drop(f"vm{number:04}", 4096)
        began = time.monotonic()
        with campaign.daemon():
            listed = ["squeue", "--noheader", "--format=%i"]
            while len(campaign.fleet.run(HEAD, *listed).stdout.split()) < count:
                time.sleep(0.5)
        figure("2,000 jobs handed over to Slurm", count / (time.monotonic() - began), "a second", "≥ 20")
        campaign.fleet.run(HEAD, "scancel", f"--user={campaign.fleet.account}")
    with Campaign(nodes=3) as campaign:
        calls = campaign.fleet.hosts[HEAD].directory / "home" / "squeue"
        write_script(
            campaign.fleet.directory / "local" / "squeue",
            f'echo >>{campaign.fleet.directory}/here/home/squeue; exec /usr/bin/squeue "$@"',
        )
        exports = [campaign.drop(f"vm{number:04}", 4096) for number in range(count)]
        began = time.monotonic()
        with campaign.daemon():
            while not all((export / REPORT).exists() for export in exports):
                time.sleep(2)
            seconds = time.monotonic() - began
            page = campaign.metrics()
        reports = [report_of(export) for export in exports]
        figure("2,000 tiny exports, 3 nodes of 2 slots: succeeded", _counted(reports, "succeeded"), "jobs", "2000")
        figure("  done more than once", sum(document["attempts"] != 1 for document in reports), "jobs", "0")
        figure("  disks published", sum(len([*h.images.iterdir()]) for h in campaign.fleet.hosts.values()), "", "2000")
        figure("  time", seconds, "s", "none set")
        looks, took = (_sample(page, f"hyper2kvmd_scan_duration_seconds_{what}") for what in ("count", "sum"))
        figure("  one look of the daemon, on average", took / looks, "s", "≤ 2")
        figure("  looks that took longer than 1 s", looks - _sample(page, _WITHIN_A_SECOND), "", "none set")
        figure("  calls of squeue for a look", len(calls.read_text().splitlines()) / looks, "", "≤ 1")


_WITHIN_A_SECOND = 'hyper2kvmd_scan_duration_seconds_bucket{le="1.0"}'


def _counted(reports: list[dict[str, Any]], status: str) -> int:
    return sum(document["status"] == status for document in reports)


def _sample(page: str, name: str) -> float:
    """The value of a series of the page that Prometheus reads."""
    return next(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"{name} "))


def endurance(scratch: Path) -> None:
    """The daemon's memory over ten thousand tiny jobs; what is done is taken away after each thousand."""
    settings = settings_in(scratch, log={"level": "error"}, metrics={"listen": "127.0.0.1:9879"}, workers=4)
    sizes = []
    with daemon(settings) as process:
        for turn in range(10):
            exports = [scratch / "exports" / f"vm{turn}-{number:03}" for number in range(1000)]
            for export in exports:
                export.mkdir()
                disk = export / "disk.raw"
                disk.write_bytes(os.urandom(4096))
                write_manifest(export, [disk_entry(disk)])
            while not all((export / REPORT).exists() for export in exports):
                time.sleep(1)
            for export in exports:
                assert report_of(export)["status"] == "succeeded", export
                shutil.rmtree(export)
            for image in (scratch / "images").iterdir():
                image.unlink()
            sizes.append(_resident_mb(process.pid))
            print(f"after {1000 * (turn + 1):,} jobs: {sizes[-1]:.1f} MiB", flush=True)
    figure("memory of the daemon, growth from 2,000 to 10,000 jobs", sizes[-1] - sizes[1], "MiB", "0")


def scan(scratch: Path) -> None:
    """A scan of ten thousand finished exports."""
    settings = settings_in(scratch, watch={"mode": "off"})
    first = scratch / "exports" / "vm00000"
    first.mkdir()
    disk = first / "disk.raw"
    disk.write_bytes(os.urandom(1 << 20))
    write_manifest(first, [disk_entry(disk)])
    assert run_job(first, settings).returncode == 0
    disk.unlink()
    report = first / "migration-report.json"
    padded = json.loads(report.read_text())
    # A report of a real guest carries its changes as diffs.
    change = {"fixer": "fstab", "path": "/etc/fstab", "summary": "x" * 80, "diff": "x" * 600}
    padded["changes"] = [{**change, "command": None, "evidence": "x" * 80}] * 12
    report.write_text(json.dumps(padded, indent=2))
    for number in range(1, 10_000):
        shutil.copytree(first, scratch / "exports" / f"vm{number:05}")
    watcher = Daemon(settings, lambda: settings, Metrics())
    for what in ("first", "second"):
        started = time.monotonic()
        watcher.tick(time.time())
        figure(f"scan of 10,000 finished exports, {what}", time.monotonic() - started, "s", "≤ 1")
    assert len(watcher.table) == 10_000 and not watcher.runners, watcher.status()
    watching = settings.model_copy(update={"watch": settings.watch.model_copy(update={"mode": "auto"})})
    with daemon(watching) as process:
        time.sleep(30)
        before, watched = _cpu_seconds(process.pid), 180
        time.sleep(watched)
        figure("CPU at rest with them", 100 * (_cpu_seconds(process.pid) - before) / watched, "%", "≤ 1")


def idle(scratch: Path) -> None:
    """The daemon with nothing to do, at the default scan interval."""
    settings = settings_in(scratch, metrics={"listen": "127.0.0.1:9879"})
    with daemon(settings) as process:
        time.sleep(5)
        before, watched = _cpu_seconds(process.pid), 90
        time.sleep(watched)
        cpu = 100 * (_cpu_seconds(process.pid) - before) / watched
        resident = _resident_mb(process.pid)
    figure("resident memory of the idle daemon", resident, "MiB", "≤ 60")
    figure("CPU of the idle daemon", cpu, "%", "≤ 0.2")


def events(scratch: Path) -> None:
    """The events of 100,000 jobs, as a daemon with eight workers counts them, and what Prometheus then reads."""
    metrics = Metrics()
    began, sizes, times = time.monotonic(), [], []
    for number in range(1, 100_001):
        progress = Progress(f"web{number}")
        for event in _job_events(number):
            progress.apply(event.kind, event.data, time.monotonic())
            metrics.event(event)
        metrics.show({number % 8: progress}, 8)
        metrics.job_ended(progress.finished)
        if number % 20_000 == 0:
            sizes.append(_resident_mb(os.getpid()))
            for _ in range(20):
                started = time.monotonic()
                page = metrics.page("", "").body
                times.append(time.monotonic() - started)
    series = sum(not line.startswith(b"#") for line in page.splitlines())
    figure("events of 100,000 jobs, counted", time.monotonic() - began, "s", "-")
    figure("memory after the last 80,000 of them, more than before", sizes[-1] - sizes[0], "MiB", "0")
    figure("slowest of 100 scrapes", 1000 * max(times), "ms", "≤ 50")
    figure("series", series, "", "≤ 300")


def _job_events(number: int) -> Iterator[Event]:
    """What a job tells: one of fifty fails, each time for another reason."""
    name = f"web{number}"
    yield Event("claimed", {"job": f"{name}-01234567", "vm": name, "attempt": 1})
    yield Event("manifest", {"vm": name, "tags": {"number": str(number)}})
    for stage in STAGES:
        yield Event("stage", {"stage": stage, "status": "started", "seconds": 0.0, "total": 1 << 30})
        if stage in ("verify", "convert"):
            for item in range(10):
                yield Event("progress", {"stage": stage, "item": "disk-0", "ratio": item / 10, "bytes": 100 << 20})
        yield Event("stage", {"stage": stage, "status": "done", "seconds": random.expovariate(0.01)})
    code = list(Code)[number // 50 % len(Code)] if number % 50 == 0 else None
    failed = {} if code is None else {"code": str(code)}
    disk = {"target_format": "qcow2", "target_bytes": 1 << 30}
    report = {"seconds": random.expovariate(0.001), "disks": [disk]}
    yield Event("finished", {"status": "failed" if code else "succeeded", **failed, "report": report})


def _resident_mb(pid: int, field: str = "VmRSS") -> float:
    """MiB of memory of a process: now, or at most so far ("VmHWM"); 0 if it has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith(field)), 0) / 1024


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
