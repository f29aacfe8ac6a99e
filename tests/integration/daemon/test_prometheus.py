"""A real Prometheus scrapes a real daemon that works off a mixed batch; it answers whatever the dashboards ask."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.daemon.metrics import Metrics
from hyper2kvmd.job.events import STAGES
from hyper2kvmd.settings.model import Settings
from tests import ROOT, dashboards
from tests.conftest import disk_entry, report_of, write_manifest
from tests.integration.daemon.test_daemon import daemon, done, free_port, wait_until
from tests.monitoring import Json, Prometheus, panels, prometheus, substituted, variables
from tests.preview import Frames, Series, page

PROMETHEUS = ROOT / "packaging/prometheus"
BOTH = pytest.mark.parametrize("dashboard", [dashboards.fleet(), dashboards.host()], ids=lambda d: d["uid"])

pytestmark = pytest.mark.timeout(1800)

LONG = ("slow", "slow2", "unwanted")
# These are converted slowly, and the tool of another is killed once.
QEMU_IMG = """#!/bin/sh
if [ "$1" = convert ]; then
    shift
    case "$*" in
    *slow*|*unwanted*) exec /usr/bin/qemu-img convert -r 512K "$@" ;;
    *unlucky*) mkdir {once} 2>/dev/null && kill -9 $$ ;;
    esac
    set -- convert "$@"
fi
exec /usr/bin/qemu-img "$@"
"""


@dataclass(frozen=True)
class World:
    """A Prometheus that has scraped a daemon, what the daemon's page was in the middle of it, and when that began."""

    server: Prometheus
    page: str
    exports: Path
    began: float
    instance: str

    def now(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The series of an expression by their labels, without those that Prometheus adds."""
        return {
            tuple((k, v) for k, v in sorted(one["metric"].items()) if k not in ("__name__", "job", "instance")): float(
                one["value"][1]
            )
            for one in self.server.at(expression, time.time())
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The batch is worked off, but for one export that takes long, and one that waits for it."""
    root = tmp_path_factory.mktemp("world")
    port = free_port()
    for name in ("aside", "exports", "images", "work", "bin"):
        (root / name).mkdir()
    (root / "bin/qemu-img").write_text(QEMU_IMG.format(once=root / "once"))
    (root / "bin/qemu-img").chmod(0o755)
    settings = Settings.model_validate(
        {
            "exports_dir": root / "exports",
            "output_dir": root / "images",
            "work_dir": root / "work",
            "workers": 2,
            "settle_seconds": 0,
            "scan_interval_seconds": 1,
            "libvirt": {"import": False},
            "retry": {"delay_seconds": 1},
            "metrics": {"listen": f"127.0.0.1:{port}"},
        }
    )
    with (
        daemon(settings, PATH=f"{root / 'bin'}:{os.environ['PATH']}"),
        prometheus(root / "prometheus", free_port(), port, rules=PROMETHEUS / "hyper2kvmd.rules.yml") as server,
    ):
        world = World(server, "", root / "exports", time.time(), f"127.0.0.1:{port}")

        def seen(expression: str) -> Callable[[], bool]:
            return lambda: bool(world.now(expression))

        # Prometheus must have seen the counters at 0: what appears at 1 has not increased.
        wait_until(seen('hyper2kvmd_jobs_completed_total{result="succeeded"} == 0'), 30)
        _arrive(*_batch(root))
        wait_until(seen("hyper2kvmd_job_info{vm='unwanted'}"), 30)
        config = ["--config", str(root / "daemon.json")]
        subprocess.run(
            [sys.executable, "-m", "hyper2kvmd.ctl", "cancel", "unwanted", *config], check=True, capture_output=True
        )
        ended = ("good", "good2", "unlucky", "damaged", "denied", "senseless", "unwanted")
        wait_until(lambda: done(*(root / "exports" / name for name in ended)), 60)
        # Two that take long fill the workers, so that a third one has to wait.
        _arrive(_make(root, "slow2"), _make(root, "later"))
        converts = f"hyper2kvmd_slot_stage == {1 + STAGES.index('convert')}"
        wait_until(seen(f"{converts} and on (slot) hyper2kvmd_job_info{{vm='slow2'}}"), 30)
        wait_until(seen("count(hyper2kvmd_slot_stage_remaining_seconds >= 0) == 2"), 30)
        wait_until(seen("hyper2kvmd_oldest_waiting_job_timestamp_seconds > 0"), 30)
        wait_until(seen('hyper2kvmd_jobs_completed_total{result="cancelled"} == 1'), 30)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        time.sleep(4)  # a few more scrapes, so that what ended last has a rate
        yield World(server, text, root / "exports", world.began, world.instance)


def _make(root: Path, name: str, **changes: Any) -> Path:
    """An export that has not arrived yet."""
    export = root / "aside" / name
    export.mkdir()
    disk = export / f"{name}-disk-0.raw"
    disk.write_bytes(os.urandom((48 if name in LONG else 1) << 20))
    source = {"provider": "vsphere", "vm_id": name, "vm_name": name}
    entry = disk_entry(disk, local_path=disk.name)
    write_manifest(export, [entry], **{"source": source, "metadata": {"tags": {"env": "test"}}, **changes})
    return export


def _arrive(*exports: Path) -> None:
    for export in exports:
        export.rename(export.parents[1] / "exports" / export.name)


def _batch(root: Path) -> list[Path]:
    """One export for each way to end, and one that takes long."""
    exports = [_make(root, name) for name in ("good", "good2", "unlucky", "unwanted", "slow", "damaged", "senseless")]
    (root / "aside/damaged/damaged-disk-0.raw").write_bytes(os.urandom(1 << 20))
    (root / "aside/senseless/manifest.json").write_text('{"manifest_version": "9.9"}')
    return [*exports, _make(root, "denied", output={"directory": "/etc"})]


def _chosen(world: World, dashboard: Json, seconds: float = 120) -> dict[str, str]:
    """What stands for the variables: all hosts, or the one that there is."""
    everything = variables(dashboard)["instance"].get("includeAll")
    return {
        "job": "hyper2kvmd",
        "instance": variables(dashboard)["instance"]["allValue"] if everything else world.instance,
        "__rate_interval": "10s",
        "__interval": "10s",
        "__range": f"{seconds:.0f}s",
    }


# The world is what it is meant to be --------------------------------------------------------------------------


def test_the_batch_has_an_end_of_every_kind(world: World) -> None:
    ends = {
        name: (report["status"], (report["error"] or {}).get("code"), report["attempts"])
        for name in ("good", "good2", "unlucky", "damaged", "denied", "senseless", "unwanted")
        for report in [report_of(world.exports / name)]
    }
    assert ends == {
        "good": ("succeeded", None, 1),
        "good2": ("succeeded", None, 1),
        "unlucky": ("succeeded", None, 2),
        "damaged": ("failed", "checksum_mismatch", 1),
        "denied": ("blocked", "output_denied", 1),
        "senseless": ("rejected", "manifest_invalid", 1),
        "unwanted": ("cancelled", "cancelled", 1),
    }


def test_prometheus_has_counted_each_end_once(world: World) -> None:
    counted = {dict(k)["result"]: v for k, v in world.now("hyper2kvmd_jobs_completed_total > 0").items()}
    assert counted == {"succeeded": 3, "retrying": 1, "failed": 1, "blocked": 1, "rejected": 1, "cancelled": 1}
    reasons = {dict(k)["reason"] for k in world.now("increase(hyper2kvmd_job_failures_total[2m]) > 0")}
    assert {"tool_killed", "checksum_mismatch", "output_denied", "manifest_invalid", "cancelled"} == reasons


def test_every_metric_of_the_daemon_has_arrived(world: World) -> None:
    arrived = set(world.server.get("label/__name__/values"))
    for family in Metrics().registry.collect():
        assert {sample.name for sample in family.samples} <= arrived
    assert "hyper2kvmd_job_info" in arrived


def test_promtool_has_nothing_to_say_about_the_page_while_jobs_run(world: World) -> None:
    assert 'vm="slow"' in world.page
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=world.page, capture_output=True, text=True, check=False, timeout=60
    )
    assert (0, "", "") == (checked.returncode, checked.stdout, checked.stderr)


# The dashboards -----------------------------------------------------------------------------------------------


@BOTH
def test_every_query_of_a_dashboard_has_an_answer(world: World, dashboard: Json) -> None:
    end = time.time()
    answers: list[Frames] = []
    for panel in panels(dashboard):
        frames: Frames = []
        for target in panel["targets"]:
            expression = substituted(target["expr"], _chosen(world, dashboard))
            found = world.server.over_time(expression, world.began, end, 2)
            values = {value for one in found for _, value in one["values"]}
            # Without libvirt, an engine and other hosts, there is nothing that could be said of them.
            none = (values and "libvirt_up" in expression) or re.search("hyper2kvmd_(elsewhere|engine)_", expression)
            assert values - {"NaN"} or none, f"{panel['title']}: {expression}"
            if target.get("instant") and not none:
                assert world.server.at(expression, end), f"{panel['title']}: {expression}"
            frames.append(
                [
                    Series(str(one["metric"]), one["metric"], [(float(t), float(v)) for t, v in one["values"]])
                    for one in found
                ]
            )
        answers.append(frames)
    # The script that draws the pictures knows every kind of panel.
    drawn = page(dashboard, answers, world.began, end)
    assert [] == [panel["title"] for panel in dashboard["panels"] if panel["title"] not in drawn]


@BOTH
def test_every_variable_of_a_dashboard_offers_what_there_is(world: World, dashboard: Json) -> None:
    found = variables(dashboard)
    assert ["hyper2kvmd"] == world.server.values(found["job"], {})
    assert [world.instance] == world.server.values(found["instance"], {"job": "hyper2kvmd"})
    assert [] == world.server.values(found["instance"], {"job": "another"})


def test_the_table_of_running_jobs_has_one_row_for_each_with_its_name_and_its_numbers(world: World) -> None:
    dashboard = dashboards.host()
    (table,) = [
        panel for panel in panels(dashboard) if panel["type"] == "table" and "slot" in panel["targets"][0]["expr"]
    ]
    for target in table["targets"]:
        rows = world.now(substituted(target["expr"], _chosen(world, dashboard)))
        labels = [dict(key) for key in rows]
        assert ["slow", "slow2"] == sorted(row["vm"] for row in labels), target["expr"]
        assert {"0", "1"} == {row["slot"] for row in labels}
        assert {"env=test"} == {row["tags"] for row in labels}
        assert all(row["exported_job"].startswith(row["vm"]) for row in labels)
        assert all(value >= 0 for value in rows.values())


def test_a_host_that_is_down_counts_as_not_ready_and_can_still_be_chosen(world: World, tmp_path: Path) -> None:
    silent = free_port()
    with prometheus(tmp_path / "prometheus", free_port(), silent) as server:
        wait_until(lambda: bool(server.at("up == 0", time.time())), 30)
        dashboard = dashboards.fleet()
        chosen = _chosen(world, dashboard)
        assert [f"127.0.0.1:{silent}"] == server.values(variables(dashboard)["instance"], chosen)
        by_title = {panel["title"]: panel for panel in panels(dashboard)}
        for title, value in (("Hosts not ready", "1"), ("Readiness by host", "0")):
            expression = substituted(by_title[title]["targets"][0]["expr"], chosen)
            assert [value] == [one["value"][1] for one in server.at(expression, time.time())]


# The rules ----------------------------------------------------------------------------------------------------


def test_the_rules_are_evaluated_without_an_error(world: World) -> None:
    groups = world.server.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 15
    assert [] == [(rule["name"], rule["lastError"]) for rule in rules if rule.get("lastError")]
    assert {"ok"} == {rule["health"] for rule in rules}


def test_of_a_real_batch_only_the_failure_and_the_rejection_are_told(world: World) -> None:
    firing = {
        (one["labels"]["alertname"], one["labels"].get("reason"))
        for one in world.server.get("alerts")["alerts"]
        if one["state"] == "firing"
    }
    # That a job is tried again comes with them, as some did fail in the same hour.
    assert firing == {
        ("Hyper2kvmdJobFailed", "checksum_mismatch"),
        ("Hyper2kvmdJobFailed", "output_denied"),
        ("Hyper2kvmdJobFailed", "tool_killed"),
        ("Hyper2kvmdManifestRejected", None),
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "hyper2kvmd.rules.yml"),
        ("test", "rules", "hyper2kvmd.rules.test.yml"),
        ("check", "config", "prometheus.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts_what_is_shipped(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False, timeout=60
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_promtool_accepts_the_example_with_tls_as_well(tmp_path: Path) -> None:
    text = (PROMETHEUS / "prometheus.yml").read_text()
    plain, tls = text.split("# Hosts elsewhere:")
    head = plain[: plain.index("  # The rules and the dashboards")]
    lines = [line.removeprefix("#") for line in tls.splitlines()[2:]]
    (tmp_path / "prometheus.yml").write_text(head + "\n".join(lines) + "\n")
    command = ["promtool", "check", "config", "--syntax-only", "prometheus.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert 0 == done.returncode, done.stderr
    assert "scheme: https" in (tmp_path / "prometheus.yml").read_text()
