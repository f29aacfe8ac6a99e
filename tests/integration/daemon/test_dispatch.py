"""The daemon where an engine places jobs: programs of the administrator's, which run them on this host, one by one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.exits import EXIT_CONFIG
from hyper2kvmd.queue.hosts import this_host
from hyper2kvmd.queue.names import LOG
from hyper2kvmd.settings.model import Settings
from tests.conftest import Ctl, MakeExport, report_of, run_job
from tests.integration.daemon.test_daemon import change, daemon, done, free_port, look_again, wait_until

# A queue in a directory. `full` holds back what comes, `closed` refuses it, `down` has nothing answered.
ENGINE = """#!/bin/sh
set -eu
cd {queue}
echo "$1" >>calls
if [ -e down ]; then echo "the controller is away" >&2; exit 1; fi
start() {{
    touch "run/$1"
    setsid -f sh -c 'log=$1 name=$2; shift 2; "$@" >>"$log" 2>&1; rm -f "run/$name"' sh "$2" "$1" $(cat "words/$1")
}}
case $1 in
submit)
    name=$2 log=$3; shift 3
    if [ -e closed ]; then echo "no partition for $name" >&2; exit 2; fi
    echo "$@" >"words/$name"
    if [ -e full ]; then touch "wait/$name"; else start "$name" "$log"; fi
    echo "$name" ;;
list)
    for job in run/*; do [ -e "$job" ] && echo "${{job#run/}} ${{job#run/}} running $(hostname)"; done
    for job in wait/*; do [ -e "$job" ] && echo "${{job#wait/}} ${{job#wait/}} waiting the host is full"; done
    true ;;
cancel) rm -f "wait/$2" ;;
esac
"""


class Queue:
    """The engine, as a test sees it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("run", "wait", "words"):
            (directory / name).mkdir(parents=True)
        self.program = directory / "engine"
        self.program.write_text(ENGINE.format(queue=directory))
        self.program.chmod(0o755)

    def calls(self, which: str) -> int:
        """How often one of its three was called."""
        return (self.directory / "calls").read_text().split().count(which)

    def waiting(self) -> int:
        return len([*(self.directory / "wait").iterdir()])

    def set(self, what: str) -> None:
        (self.directory / what).touch()

    def unset(self, what: str) -> None:
        (self.directory / what).unlink()

    def settings(self, scratch: Settings, **more: Any) -> Settings:
        """Settings whose jobs it gets; their own are in a file, as on the nodes of a cluster."""
        own = self.directory / "node.json"
        own.write_text(scratch.model_dump_json(by_alias=True))
        launcher = self.directory / "hyper2kvmd"
        launcher.write_text(f'#!/bin/sh\nexec {sys.executable} -m hyper2kvmd "$@" --config {own}\n')
        launcher.chmod(0o755)
        words = {
            "submit": [str(self.program), "submit", "{name}", "{log}", "{words}"],
            "list": [str(self.program), "list"],
            "cancel": [str(self.program), "cancel", "{id}"],
        }
        dispatch = {"engine": "command", "command": words, "program": [str(launcher)], **more}
        return change(scratch, dispatch=dispatch)


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    made = Queue(tmp_path / "queue")
    yield made
    wait_until(lambda: not [*(made.directory / "run").iterdir()], 60)


@pytest.fixture
def listed(ctl: Ctl) -> Callable[[str], tuple[str, str, str]]:
    """State, code and message of an export, as `list` has them."""

    def look(name: str) -> tuple[str, str, str]:
        rows = {Path(row["export"]).name: row for row in json.loads(ctl("list", "--json").stdout)}
        reason = rows[name]["reason"] or {"code": "", "message": ""}
        return rows[name]["state"], reason["code"], reason["message"]

    return look


def test_every_export_is_done_once_by_the_engine_and_its_log_has_each_line_once(
    scratch: Settings, make_export: MakeExport, queue: Queue
) -> None:
    exports = [make_export(f"vm{n}") for n in range(4)]
    with daemon(queue.settings(scratch), "--once") as process:
        output, _ = process.communicate(timeout=240)
    assert 0 == process.returncode, output
    for export in exports:
        report = report_of(export)
        assert ("succeeded", 1, "daemon") == (report["status"], report["attempts"], report["host"]["started_by"])
        assert report["host"]["submitted_by"] == this_host(), "who tells the webhook of it"
        lines = (export / LOG).read_text().splitlines()
        assert 1 == sum(" claimed " in line for line in lines), lines
    assert 4 == queue.calls("submit")
    assert "4 done" in output


def test_two_daemons_and_one_engine_do_nothing_twice(scratch: Settings, make_export: MakeExport, queue: Queue) -> None:
    exports = [make_export(f"vm{n}") for n in range(6)]
    settings = queue.settings(scratch)
    with daemon(settings), daemon(settings):
        wait_until(lambda: done(*exports), 240)
    assert [("succeeded", 1)] * 6 == [(r["status"], r["attempts"]) for r in map(report_of, exports)]


def test_what_waits_there_says_why_and_is_taken_back_when_it_is_held_or_all_is_drained(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, queue: Queue, listed: Callable[[str], tuple[str, str, str]]
) -> None:
    queue.set("full")
    export = make_export()
    with daemon(queue.settings(scratch)):
        wait_until(lambda: listed("web01")[2].endswith(": the host is full"), 120)
        assert ("queued", "placed_later") == listed("web01")[:2]
        assert 0 == ctl("hold", "web01").returncode
        wait_until(lambda: not queue.waiting(), 60)
        assert 0 == ctl("release", "web01").returncode
        wait_until(lambda: 1 == queue.waiting(), 60)
        assert 0 == ctl("drain").returncode
        wait_until(lambda: not queue.waiting(), 60)
        assert "queued" == listed("web01")[0], "it was taken back, and did not fail"
        queue.unset("full")
        assert 0 == ctl("resume").returncode
        wait_until(lambda: done(export), 120)
    assert ("succeeded", 1) == (report_of(export)["status"], report_of(export)["attempts"])


def test_a_plan_that_changes_while_its_job_waits_has_the_job_handed_over_anew(
    scratch: Settings, make_export: MakeExport, queue: Queue
) -> None:
    queue.set("full")
    export = make_export()
    scratch.plan_dir.mkdir()
    with daemon(queue.settings(scratch)):
        wait_until(lambda: 1 == queue.waiting(), 120)
        (scratch.plan_dir / "web01.yaml").write_text("name: shop\npriority: 5\n")
        wait_until(lambda: 2 == queue.calls("submit") and 1 == queue.waiting(), 120)
        queue.unset("full")
        (scratch.plan_dir / "web01.yaml").write_text("name: shop\npriority: 6\n")
        wait_until(lambda: done(export), 120)
    assert ("succeeded", "shop", 6) == (
        *(report_of(export)[key] for key in ("status", "vm_name")),
        report_of(export)["plan"]["priority"],
    )


def test_a_refusal_blocks_in_the_engines_words_until_the_settings_are_read_again(
    scratch: Settings, make_export: MakeExport, queue: Queue, listed: Callable[[str], tuple[str, str, str]]
) -> None:
    queue.set("closed")
    export = make_export()
    with daemon(queue.settings(scratch)) as process:
        wait_until(lambda: ("blocked", "engine_refused") == listed("web01")[:2], 120)
        assert "no partition for h2k-web01-" in listed("web01")[2]
        queue.unset("closed")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: done(export), 120)


def test_while_the_engine_is_down_nothing_is_lost_and_everybody_is_told_why_it_waits(
    scratch: Settings, make_export: MakeExport, queue: Queue, listed: Callable[[str], tuple[str, str, str]]
) -> None:
    port = free_port()
    queue.set("down")
    export = make_export()
    with daemon(change(queue.settings(scratch), metrics={"listen": f"127.0.0.1:{port}"})) as process:
        wait_until(lambda: "the controller is away" in listed("web01")[2], 120)
        look_again(port)
        assert not done(export)
        queue.unset("down")
        wait_until(lambda: done(export), 120)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert 1 == output.count("the controller is away"), "it is said once, not at every look"
    assert "jobs are handed over again" in output


def test_a_job_that_leaves_nothing_is_not_handed_over_again_at_once(
    scratch: Settings, make_export: MakeExport, queue: Queue, listed: Callable[[str], tuple[str, str, str]]
) -> None:
    """As on a node that does not have hyper2kvmd."""
    make_export()
    port = free_port()
    settings = queue.settings(scratch, program=["/nowhere/hyper2kvmd"])
    with daemon(change(settings, metrics={"listen": f"127.0.0.1:{port}"})):
        wait_until(lambda: ("retrying", "runner_crashed") == listed("web01")[:2], 120)
        look_again(port)
    assert 1 == queue.calls("submit")
    assert "/nowhere/hyper2kvmd" in (scratch.exports_dir / "web01" / LOG).read_text()


def test_no_more_than_so_many_are_handed_over_and_the_first_by_the_rules_go_first(
    scratch: Settings, make_export: MakeExport, queue: Queue
) -> None:
    queue.set("full")
    for name in ("a", "b", "c", "urgent"):
        make_export(name)
        time.sleep(0.01)
    settings = change(queue.settings(scratch, max_submitted=2), rules=[{"vm": ["urgent"], "priority": 5}])
    port = free_port()
    with daemon(change(settings, metrics={"listen": f"127.0.0.1:{port}"})):
        wait_until(lambda: 2 == queue.waiting(), 120)
        look_again(port, 10)
        there = sorted(path.name.rpartition("-")[0] for path in (queue.directory / "wait").iterdir())
    assert ["h2k-a", "h2k-urgent"] == there


def test_a_host_with_another_release_takes_no_job_and_says_so(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export()
    done = run_job(export, scratch, "--if-ready", "--submitted-by", "9.9.1", "head")
    assert EXIT_CONFIG == done.returncode
    assert "takes no job from 9.9.1 on head" in done.stderr
    assert sorted(path.name for path in export.iterdir()) == ["manifest.json", "web01-disk-0.raw"]


def test_doctor_sends_a_job_and_says_what_came_back(scratch: Settings, tmp_path: Path, queue: Queue) -> None:
    def doctor(settings: Settings) -> list[dict[str, Any]]:
        config = tmp_path / "doctor.json"
        config.write_text(settings.model_dump_json(by_alias=True))
        words = ("-m", "hyper2kvmd.ctl", "doctor", "dispatch", "--json", "--config", str(config))
        said = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=120)
        rows: list[dict[str, Any]] = json.loads(said.stdout)
        return rows

    (row,) = doctor(queue.settings(scratch))
    assert "ok" == row["result"], row
    (row,) = doctor(queue.settings(scratch, program=["/nowhere/hyper2kvmd"]))
    assert "failed" == row["result"]
    assert "/nowhere/hyper2kvmd" in row["detail"]
    elsewhere = change(scratch, exports_dir=tmp_path / "other")
    (tmp_path / "other").mkdir()
    settings = queue.settings(elsewhere)
    (row,) = doctor(change(scratch, dispatch=settings.dispatch.model_dump(by_alias=True)))
    assert "does not see this host's" in row["detail"]
    assert [] == [path for path in (scratch.exports_dir / ".hyper2kvmd.hosts").iterdir() if "doctor" in path.name]
    queue.set("down")
    (row,) = doctor(queue.settings(scratch))
    assert ("failed", "engine_unavailable") == (row["result"], row["finding"]["code"])
