"""hyper2kvmctl batch: order, wishes per VM, what is shown, how it ends, and that Ctrl-C costs nothing."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.queue.claim import claim_export
from hyper2kvmd.queue.names import REPORT
from hyper2kvmd.settings.model import Settings
from tests.conftest import Ctl, MakeExport, report_of
from tests.libvirtd import session

Fake = Callable[[str, str], None]
# The real program, with a limit on how fast it copies.
THROTTLED = '[ "$1" = convert ] && shift && exec /usr/bin/qemu-img convert -r 8M "$@"\nexec /usr/bin/qemu-img "$@"\n'


def test_every_export_is_migrated_and_the_summary_says_so(ctl: Ctl, scratch: Settings, make_export: MakeExport) -> None:
    names = [f"web0{number}" for number in range(4)]
    for name in names:
        make_export(name)
    done = ctl("batch", scratch.exports_dir, "--workers", "3")
    assert 0 == done.returncode, done.stdout + done.stderr
    assert ["succeeded"] * 4 == [report_of(scratch.exports_dir / name)["status"] for name in names]
    assert "4 succeeded" == done.stdout.splitlines()[-1]


def test_a_second_run_does_nothing_again(ctl: Ctl, scratch: Settings, make_export: MakeExport) -> None:
    make_export()
    ctl("batch", scratch.exports_dir)
    before = report_of(scratch.exports_dir / "web01")
    (row,) = json.loads(ctl("batch", scratch.exports_dir, "--json").stdout)
    assert ("succeeded", 0) == (row["state"], row["attempts"])
    assert before == report_of(scratch.exports_dir / "web01")


def test_those_that_fail_stop_no_other_and_decide_the_exit_status(
    ctl: Ctl, scratch: Settings, make_export: MakeExport
) -> None:
    make_export("good")
    (make_export("bad") / "bad-disk-0.raw").write_bytes(b"x" * (1 << 20))
    (make_export("half") / "half-disk-0.raw").unlink()
    done = ctl("batch", scratch.exports_dir)
    assert 1 == done.returncode
    assert "1 incomplete, 1 succeeded, 1 failed" == done.stdout.splitlines()[-1]
    assert "bad-disk-0.raw has sha256" in done.stdout
    rows = {Path(row["export"]).name: row for row in json.loads(ctl("batch", scratch.exports_dir, "--json").stdout)}
    assert ("failed", "checksum_mismatch") == (rows["bad"]["state"], rows["bad"]["reason"]["code"])


def test_a_plan_gives_the_order_and_the_wishes_of_each_vm(
    ctl: Ctl, scratch: Settings, make_export: MakeExport, tmp_path: Path
) -> None:
    for name in ("a", "b", "c", "d"):
        make_export(name)
    (tmp_path / "fast").mkdir()
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "vms:\n"
        "  c: {priority: 10, name: database}\n"
        f"  b: {{priority: 5, output_dir: {tmp_path}/fast}}\n"
        "  d: {hold: true}\n"
    )
    done = ctl("batch", scratch.exports_dir, "--plan", plan, "--workers", "1")
    assert 0 == done.returncode, done.stdout + done.stderr
    started = [line.split(":")[0] for line in done.stdout.splitlines() if line.endswith(": running")]
    assert ["c", "b", "a"] == started
    assert ("database", scratch.output_dir / "database-disk-0.qcow2") == (
        report_of(scratch.exports_dir / "c")["vm_name"],
        Path(report_of(scratch.exports_dir / "c")["disks"][0]["target"]),
    )
    assert (tmp_path / "fast/b-disk-0.qcow2").exists()
    assert not (scratch.exports_dir / "d" / REPORT).exists()


def test_a_plan_connects_a_vm_to_its_own_networks_and_starts_it(
    ctl: Ctl, scratch: Settings, make_export: MakeExport, tmp_path: Path
) -> None:
    nics = [{"id": "nic-0", "mac": "00:50:56:aa:bb:01", "network": "DMZ"}]
    make_export("web01", nics=nics)
    make_export("web02", nics=[{**nics[0], "mac": "00:50:56:aa:bb:02"}])
    plan = tmp_path / "plan.yaml"
    plan.write_text("vms: {web01: {network_map: {DMZ: user}, start: true}}\n")
    with session(tmp_path) as uri:
        settings = (
            "--set",
            f"libvirt.uri={uri}",
            "--set",
            "libvirt.import=true",
            "--set",
            "libvirt.default_network=user",
        )
        done = ctl("batch", scratch.exports_dir, "--plan", plan, *settings)
        assert 0 == done.returncode, done.stdout + done.stderr
        states = {
            name: subprocess.run(
                ["virsh", "-c", uri, "domstate", name], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in ("web01", "web02")
        }
        xml = subprocess.run(
            ["virsh", "-c", uri, "dumpxml", "web01"], capture_output=True, text=True, check=True
        ).stdout
        subprocess.run(["virsh", "-c", uri, "destroy", "web01"], check=True, capture_output=True)
    assert {"web01": "running", "web02": "shut off"} == states
    assert "<interface type='user'>" in xml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vms: {web1: {priority: 1}}", "vms.web1: no such export in"),
        ("vms: {web01: {prio: 1}}", ":1: vms.web01.prio: unknown setting; did you mean priority?"),
        ("vms: {web01: {priority: high}}", "vms.web01.priority: Input should be a valid integer"),
        ("vms: {web01: {start: 3}}", "vms.web01.start"),
        ("vms: {web01: {network_map: {DMZ: 'bridge:'}}}", "vms.web01.network_map.DMZ"),
        ("vms: {web01: {start: true}, web01: {start: false}}", "vms.web01 is set twice"),
        ("vms: [web01]", "vms: Input should be a valid dictionary"),
        ("vms: {web01: &x {start: true}, web02: *x}", ":1: *x: YAML aliases are not allowed"),
        ("vms: !!python/object:os.system {}", "could not determine a constructor"),
        ("vms: {", "not valid YAML"),
    ],
)
def test_a_bad_plan_is_refused_before_anything_is_started(
    ctl: Ctl, scratch: Settings, make_export: MakeExport, tmp_path: Path, text: str, message: str
) -> None:
    make_export()
    (tmp_path / "plan.yaml").write_text(text)
    done = ctl("batch", scratch.exports_dir, "--plan", tmp_path / "plan.yaml")
    assert 78 == done.returncode
    assert message in done.stderr
    assert str(tmp_path / "plan.yaml") in done.stderr
    assert not (scratch.exports_dir / "web01" / REPORT).exists()


def test_wrong_arguments_say_what_is_right(ctl: Ctl, scratch: Settings, tmp_path: Path) -> None:
    missing = ctl("batch", tmp_path / "nowhere")
    assert (3, True) == (missing.returncode, "nowhere: No such file" in missing.stderr)
    empty = ctl("batch", scratch.exports_dir)
    assert (3, True) == (empty.returncode, "no export in it" in empty.stderr)
    none = ctl("batch", scratch.exports_dir, "--workers", "0")
    assert (2, True) == (none.returncode, "0: expected a number from 1 to 256" in none.stderr)


def test_a_dry_run_says_what_would_become_of_each(ctl: Ctl, scratch: Settings, make_export: MakeExport) -> None:
    make_export("good")
    (make_export("bad") / "bad-disk-0.raw").write_bytes(b"x" * (1 << 20))
    done = ctl("batch", scratch.exports_dir, "--dry-run")
    assert (1, "1 succeeded, 1 failed") == (done.returncode, done.stdout.splitlines()[-1])
    assert [] == os.listdir(scratch.output_dir)
    assert [] == list(scratch.exports_dir.glob(f"*/{REPORT}"))


def test_what_fails_for_a_passing_cause_is_tried_again(
    ctl: Ctl, scratch: Settings, make_export: MakeExport, fake: Fake, tmp_path: Path
) -> None:
    # The first conversion is killed from outside, as the kernel does when memory is short.
    once = f'[ "$1" = convert ] && [ ! -e {tmp_path}/once ] && touch {tmp_path}/once && kill -9 $$\n'
    fake("qemu-img", once + 'exec /usr/bin/qemu-img "$@"\n')
    make_export()
    done = ctl("batch", scratch.exports_dir, "--set", "retry.delay_seconds=0.1")
    assert 0 == done.returncode, done.stdout + done.stderr
    assert re.search(r"web01: retrying after .*: qemu-img.* killed", done.stdout), done.stdout
    assert 2 == report_of(scratch.exports_dir / "web01")["attempts"]


def test_what_never_passes_ends_the_batch_all_the_same(
    ctl: Ctl, scratch: Settings, make_export: MakeExport, fake: Fake
) -> None:
    fake(
        "qemu-img", '[ "$1" = convert ] && echo "No space left on device" >&2 && exit 1\nexec /usr/bin/qemu-img "$@"\n'
    )
    make_export()
    done = ctl("batch", scratch.exports_dir, "--set", "retry.delay_seconds=0.1", "--set", "retry.max_attempts=2")
    assert (75, "1 retrying") == (done.returncode, done.stdout.splitlines()[-1])
    assert 2 == report_of(scratch.exports_dir / "web01")["attempts"]


class Terminal:
    """A batch on a terminal of `rows` lines; `text` is all that it has written so far."""

    def __init__(self, scratch: Settings, *options: str, rows: int = 24) -> None:
        config = scratch.work_dir.parent / "terminal.json"
        config.write_text(scratch.model_dump_json(by_alias=True))
        self._fd, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 120, 0, 0))
        # SIGINT as at a terminal: to what is started in the background, pytest too, a shell leaves that it is ignored.
        program = ["env", "--default-signal=INT", sys.executable, "-m", "hyper2kvmd.ctl"]
        command = [*program, "batch", str(scratch.exports_dir), *options]
        self.process = subprocess.Popen(
            [*command, "--config", str(config)],
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            # Of another terminal: those that pytest itself may have been given.
            env={**{name: os.environ[name] for name in os.environ.keys() - {"LINES", "COLUMNS"}}, "TERM": "xterm"},
        )
        os.close(child)
        self.text = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # nobody has the other end any more
                return
            self.text += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data.decode(errors="replace"))

    def wait_for(self, pattern: str) -> None:
        deadline = time.monotonic() + 120
        while not re.search(pattern, self.text):
            assert time.monotonic() < deadline, self.text[-3000:]
            time.sleep(0.05)

    def end(self) -> int:
        status = self.process.wait(timeout=90)
        self._reader.join(10)
        os.close(self._fd)
        return status


def test_a_terminal_shows_stage_progress_rate_and_time_left(
    scratch: Settings, make_export: MakeExport, fake: Fake
) -> None:
    fake("qemu-img", THROTTLED)
    make_export("web01", size=32 << 20)
    make_export("web02", size=32 << 20)
    terminal = Terminal(scratch, "--workers", "1")
    terminal.wait_for(r"web01\s+running\s+convert\s+━+.*\d MB/s\s+\d+ s\s+\d+ s")
    terminal.wait_for(r"web02\s+queued")
    assert 0 == terminal.end(), terminal.text[-2000:]
    assert "2 succeeded" in terminal.text.splitlines()[-1]


def test_more_exports_than_the_terminal_has_lines_do_not_hide_those_that_run(
    scratch: Settings, make_export: MakeExport, fake: Fake
) -> None:
    fake("qemu-img", THROTTLED)
    for number in range(30):
        make_export(f"a{number:02}", size=1 << 20)
    make_export("zz", size=96 << 20)
    (scratch.work_dir.parent / "plan.yaml").write_text("vms: {zz: {priority: 1}}")
    terminal = Terminal(scratch, "--workers", "2", "--plan", str(scratch.work_dir.parent / "plan.yaml"), rows=12)
    terminal.wait_for(r"zz\s+running\s+convert([^\n]*\n){1,8}and \d+ more")
    terminal.process.send_signal(signal.SIGINT)
    assert 130 == terminal.end()


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(
    ctl: Ctl, scratch: Settings, make_export: MakeExport, fake: Fake
) -> None:
    fake("qemu-img", THROTTLED)
    for name in ("web01", "web02", "web03"):
        make_export(name, size=64 << 20)
    terminal = Terminal(scratch, "--workers", "2")
    terminal.wait_for(r"web02\s+running\s+convert")
    terminal.process.send_signal(signal.SIGINT)
    assert 130 == terminal.end()
    assert "the same command resumes the jobs" in terminal.text
    assert [] == [path for path in scratch.output_dir.iterdir() if not path.name.endswith(".partial")]
    assert [] == list(scratch.exports_dir.glob(f"*/{REPORT}"))
    left = subprocess.run(["pgrep", "-f", str(scratch.exports_dir)], capture_output=True, text=True, check=False)
    assert "" == left.stdout
    fake("qemu-img", 'exec /usr/bin/qemu-img "$@"\n')
    done = ctl("batch", scratch.exports_dir)
    assert 0 == done.returncode, done.stdout + done.stderr
    reports: list[dict[str, Any]] = [report_of(export) for export in sorted(scratch.exports_dir.iterdir())]
    assert ["succeeded"] * 3 == [report["status"] for report in reports]
    assert 2 == reports[0]["attempts"]


def test_beside_a_runner_of_somebody_else_nothing_is_done_twice(
    ctl: Ctl, scratch: Settings, make_export: MakeExport
) -> None:
    claim = claim_export(make_export())
    try:
        done = ctl("batch", scratch.exports_dir)
    finally:
        claim.close()
    assert (75, "1 running") == (done.returncode, done.stdout.splitlines()[-1])
    assert not (scratch.exports_dir / "web01" / REPORT).exists()
