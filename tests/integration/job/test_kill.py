"""A runner killed at any moment: nothing half-written shows, and the next run finishes the job, once."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hyper2kvmd.job.context import job_id
from hyper2kvmd.settings.model import Settings
from tests.conftest import MakeExport, left_in, report_of, run_job
from tests.guests.build import export as export_guest


def start(export: Path, settings: Settings, *before: str) -> subprocess.Popen[bytes]:
    config = settings.work_dir.parent / "settings.json"
    config.write_text(settings.model_dump_json(by_alias=True))
    return subprocess.Popen(
        [*before, sys.executable, "-m", "hyper2kvmd", "run-job", str(export), "--config", str(config)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def killed_before(call: str, nth: int, export: Path, settings: Settings) -> int:
    """The status of a job that is killed before its nth call of one kind, in any process; 0 if there were fewer."""
    runner = start(
        export, settings, "strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}",
        "-e", f"inject={call}:signal=KILL:when={nth}",
    )  # fmt: skip
    return runner.wait(timeout=120)


def is_whole(export: Path, target: Path) -> bool:
    source = next(export.glob("*.raw"))
    done = subprocess.run(
        ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, target], capture_output=True, check=False
    )
    return done.returncode == 0


def is_alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def check_nothing_half_done(export: Path, settings: Settings) -> None:
    final = settings.output_dir / f"{export.name}-disk-0.qcow2"
    if final.exists():
        assert is_whole(export, final)
    if (export / "migration-report.json").exists():
        assert (report_of(export)["status"] == "succeeded") == final.exists()


def check_finished_once(export: Path, settings: Settings) -> None:
    done = run_job(export, settings)
    assert 0 == done.returncode, done.stderr
    assert "succeeded" == report_of(export)["status"]
    final = settings.output_dir / f"{export.name}-disk-0.qcow2"
    assert [final] == list(settings.output_dir.iterdir()), "something was left behind, or done twice"
    assert is_whole(export, final)
    assert [] == left_in(settings.work_dir)
    assert [] == [path.name for path in export.iterdir() if path.name.endswith(".tmp")]


# What changes something on disk: a kill before each of them is a kill at every moment that matters.
@pytest.mark.parametrize("call", ["fsync", "link,linkat", "rename,renameat,renameat2", "unlink,unlinkat", "pwrite64"])
def test_a_kill_before_any_step_is_harmless(scratch: Settings, make_export: MakeExport, call: str) -> None:
    for nth in range(1, 40):
        export = make_export(f"vm{nth}")
        status = killed_before(call, nth, export, scratch)
        # strace counts in each process by itself, so a tool may be what dies; then the job is to be tried again.
        if status == 0:
            assert nth > 1, f"{call} was never called: this test tests nothing"
            check_nothing_half_done(export, scratch)
            return
        check_nothing_half_done(export, scratch)
        check_finished_once(export, scratch)
        for path in scratch.output_dir.iterdir():
            path.unlink()
    pytest.fail(f"more than 40 calls of {call}")


@pytest.mark.parametrize("stage", ["measure", "convert", "check"])
def test_a_kill_takes_the_tools_along_and_frees_the_claim(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None], tmp_path: Path, stage: str
) -> None:
    export = make_export()
    pids = tmp_path / "pids"
    fake(
        "qemu-img",
        f'[ "$1" = {stage} ] && echo $$ > {pids} && exec sleep 120\nexec /usr/bin/qemu-img "$@"\n',
    )
    runner = start(export, scratch)
    deadline = time.monotonic() + 120
    while not (pids.exists() and pids.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tool = int(pids.read_text())
    busy = run_job(export, scratch)
    assert 5 == busy.returncode, "the claim must be held"
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    deadline = time.monotonic() + 120
    while is_alive(tool):
        assert time.monotonic() < deadline, "the tool outlived its job"
        time.sleep(0.05)
    check_nothing_half_done(export, scratch)
    fake("qemu-img", 'exec /usr/bin/qemu-img "$@"\n')
    check_finished_once(export, scratch)
    assert 2 == report_of(export)["attempts"]


def test_what_a_kill_in_the_middle_of_fix_left_is_removed(scratch: Settings, make_export: MakeExport) -> None:
    """FIX reads initramfs images in a directory of its own beside the overlays."""
    export = make_export()
    digest = hashlib.sha256((export / "manifest.json").read_bytes()).hexdigest()
    left = scratch.work_dir / job_id(export, digest) / "initramfs-x1y2"
    left.mkdir(parents=True)
    (left / "initrd-6.1.0").write_bytes(b"half")
    (left.parent / "overlay-disk-0.1.qcow2").write_bytes(b"half")
    check_finished_once(export, scratch)


def test_a_job_that_is_told_to_stop_leaves_nothing_and_is_no_failure(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None], tmp_path: Path
) -> None:
    export = make_export()
    fake("qemu-img", f'[ "$1" = convert ] && touch {tmp_path}/converts && sleep 120\nexec /usr/bin/qemu-img "$@"\n')
    runner = start(export, scratch)
    deadline = time.monotonic() + 120
    while not (tmp_path / "converts").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    runner.send_signal(signal.SIGTERM)
    assert 75 == runner.wait(timeout=120)
    assert not (export / "migration-report.json").exists()
    assert [] == list(scratch.output_dir.iterdir())
    fake("qemu-img", 'exec /usr/bin/qemu-img "$@"\n')
    check_finished_once(export, scratch)


def test_of_two_runners_that_race_one_works_and_the_other_says_so(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export(size=8 << 20)
    racers = [start(export, scratch) for _ in range(4)]
    statuses = sorted(racer.wait(timeout=120) for racer in racers)
    # One that comes after the end finds nothing to do, which is no error.
    assert set(statuses) <= {0, 5}
    assert 0 in statuses
    assert ("succeeded", 1) == (report_of(export)["status"], len(list(scratch.output_dir.iterdir())))


def test_a_runner_that_dies_again_and_again_is_given_up(scratch: Settings, make_export: MakeExport) -> None:
    settings = Settings.model_validate({**scratch.model_dump(by_alias=True), "retry": {"max_attempts": 2}})
    export = make_export()
    for _ in range(2):
        runner = start(
            export, settings, "strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=linkat",
            "-e", "inject=linkat:signal=KILL:when=1",
        )  # fmt: skip
        assert 0 != runner.wait(timeout=120)
    assert 1 == run_job(export, settings).returncode
    error = report_of(export)["error"]
    assert "runner_crashed" == error["code"]
    assert "2 times" in error["message"]


def test_a_conversion_outlives_a_boot_that_numbers_the_devices_anew(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None], tmp_path: Path
) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], check=True)
    first, second = (
        subprocess.run(
            ["losetup", "--find", "--show", image], check=True, capture_output=True, text=True
        ).stdout.strip()
        for _ in range(2)
    )
    try:
        subprocess.run(["mount", first, scratch.exports_dir], check=True)
        export = make_export()
        device = export.stat().st_dev
        fake("qemu-img", 'case "$*" in "check "*" -f qcow2 "*) kill -KILL $PPID ;; esac\nexec /usr/bin/qemu-img "$@"')
        runner = start(export, scratch)
        assert -signal.SIGKILL == runner.wait(timeout=120)
        (partial,) = scratch.output_dir.iterdir()
        subprocess.run(["umount", scratch.exports_dir], check=True)
        subprocess.run(["mount", second, scratch.exports_dir], check=True)
        assert device != export.stat().st_dev
        fake("qemu-img", 'exec /usr/bin/qemu-img "$@"')
        converted = partial.stat()
        check_finished_once(export, scratch)
        (final,) = scratch.output_dir.iterdir()
        assert (converted.st_ino, converted.st_mtime_ns) == (final.stat().st_ino, final.stat().st_mtime_ns)
    finally:
        subprocess.run(["umount", scratch.exports_dir], check=False)
        subprocess.run(["losetup", "--detach", first, second], check=True)


def test_a_kill_takes_the_appliance_along(scratch: Settings, make_export: MakeExport) -> None:
    """libguestfs starts QEMU by itself, not through our door; it must not outlive its job either."""
    stages = {"inspect": {"enabled": True}, "fix": {"enabled": True}, "convert": {"enabled": True}}
    export = make_export(pipeline=stages)
    runner = start(export, scratch)

    def appliances() -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if str(scratch.work_dir) in (entry / "cmdline").read_text() and is_alive(int(entry.name)):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def qemu_runs() -> bool:
        return any("qemu-system" in Path(f"/proc/{pid}/cmdline").read_text() for pid in appliances())

    deadline = time.monotonic() + 120
    while not qemu_runs():
        assert time.monotonic() < deadline and runner.poll() is None
        time.sleep(0.1)
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    deadline = time.monotonic() + 120
    while appliances():
        assert time.monotonic() < deadline, "the appliance outlived its job"
        time.sleep(0.1)
    assert 1 == run_job(export, scratch).returncode
    document = report_of(export)
    assert ("blocked", "os_unknown", 2) == (document["status"], document["error"]["code"], document["attempts"])
    assert [] == list(scratch.output_dir.iterdir())
    assert [] == left_in(scratch.work_dir)


# `info` is run with a limit that lets it write no file at all.
# `check` looks at the source first, and at the result only after the conversion.
CHECKS_RESULT = '[ "$1" = check ] && grep -q ^convert "$0.log"'
LOGGED = '[ "$1" = info ] || echo "$*" >> "$0.log"\n'


def commands(fake_directory: Path) -> list[str]:
    return [line.split()[0] for line in (fake_directory / "qemu-img.log").read_text().splitlines()]


def test_a_disk_that_was_converted_is_not_converted_again(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None], tmp_path: Path
) -> None:
    export = make_export()
    bin_directory = tmp_path / "bin"
    # The check of the result comes after the conversion; the runner dies there, once.
    fake(
        "qemu-img",
        LOGGED
        + f'{CHECKS_RESULT} && mkdir {tmp_path}/once 2>/dev/null && kill -9 $PPID\nexec /usr/bin/qemu-img "$@"\n',
    )
    runner = start(export, scratch)
    assert -9 == runner.wait(timeout=120)
    assert 1 == commands(bin_directory).count("convert")
    check_finished_once(export, scratch)
    assert 1 == commands(bin_directory).count("convert"), "it was converted twice"
    assert 2 == report_of(export)["attempts"]


def test_a_disk_that_was_converted_from_another_source_is_converted_again(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None], tmp_path: Path
) -> None:
    export = make_export()
    fake(
        "qemu-img",
        LOGGED
        + f'{CHECKS_RESULT} && mkdir {tmp_path}/once 2>/dev/null && kill -9 $PPID\nexec /usr/bin/qemu-img "$@"\n',
    )
    assert -9 == start(export, scratch).wait(timeout=120)
    (source,) = export.glob("*.raw")
    os.utime(source)  # written to: it may be another one
    check_finished_once(export, scratch)
    assert 2 == commands(tmp_path / "bin").count("convert")


def test_a_job_that_was_stopped_goes_on_behind_its_last_finished_step(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None], tmp_path: Path
) -> None:
    export = make_export()
    fake("qemu-img", LOGGED + f'{CHECKS_RESULT} && sleep 120\nexec /usr/bin/qemu-img "$@"\n')
    runner = start(export, scratch)
    deadline = time.monotonic() + 120
    while not (tmp_path / "bin/qemu-img.log").exists() or "convert check" not in " ".join(commands(tmp_path / "bin")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    runner.send_signal(signal.SIGTERM)
    assert 75 == runner.wait(timeout=120)
    fake("qemu-img", LOGGED + 'exec /usr/bin/qemu-img "$@"\n')
    check_finished_once(export, scratch)
    assert 1 == commands(tmp_path / "bin").count("convert")


@pytest.mark.timeout(1800)
def test_a_fix_that_was_proved_is_not_done_again_and_half_a_commit_is_completed(
    scratch: Settings, fake: Callable[[str, str], None], tmp_path: Path
) -> None:
    settings = Settings.model_validate({**scratch.model_dump(by_alias=True), "validate": {"compare": True}})
    export = export_guest("debian12-bios", settings.exports_dir, vm_name="web01")
    # Killed right after the fix was laid onto the disk, before anybody noted it.
    fake(
        "qemu-img",
        LOGGED
        + f'/usr/bin/qemu-img "$@" || exit\n[ "$1" = commit ] && mkdir {tmp_path}/once && kill -9 $PPID\nexit 0\n',
    )
    assert -9 == start(export, settings).wait(timeout=600)
    assert "commit" in commands(tmp_path / "bin")
    (converted,) = settings.output_dir.glob(".*.partial")
    inode = converted.stat().st_ino
    fake("qemu-img", LOGGED + 'exec /usr/bin/qemu-img "$@"\n')
    (tmp_path / "bin/qemu-img.log").unlink()
    done = run_job(export, settings)
    assert 0 == done.returncode, done.stderr
    # A fix has an overlay made for it.
    assert "create" not in commands(tmp_path / "bin"), "the fix was made twice"
    report = report_of(export)
    (disk,) = report["disks"]
    assert ("stream", inode) == (disk["engine"], Path(disk["target"]).stat().st_ino), "it was converted twice"
    assert report["results"]["fix"]["proofs"] and report["changes"], "the record of the fix is lost"
    assert ["inspect", "fix", "plan"] == [stage["name"] for stage in report["stages"]][:3]
    assert [] == left_in(settings.work_dir)


def test_a_burst_of_signals_stops_a_job_as_one_does(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None], tmp_path: Path
) -> None:
    fake("qemu-img", f'[ "$1" = convert ] && touch {tmp_path}/converts && exec sleep 60\nexec /usr/bin/qemu-img "$@"')
    for attempt in range(5):
        (tmp_path / "converts").unlink(missing_ok=True)
        runner = start(make_export(f"web{attempt}"), scratch)
        try:
            while not (tmp_path / "converts").exists():
                time.sleep(0.01)
            for _ in range(300):
                runner.send_signal(signal.SIGTERM)
            assert 75 == runner.wait(timeout=120)
        finally:
            runner.kill()
