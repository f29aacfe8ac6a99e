"""Metrics and health as values: what they show of which events, and how many series there are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from hyper2kvmd.daemon.metrics import NO_JOB, RESULTS, Metrics
from hyper2kvmd.errors import Code, SettingsError
from hyper2kvmd.job.events import STAGES, Event
from hyper2kvmd.queue.progress import Progress
from hyper2kvmd.queue.state import Facts, State
from hyper2kvmd.settings.load import load_settings

SERIES_LIMIT = 300


def scraped(metrics: Metrics, accept: str = "") -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every series as Prometheus would read it: by name and labels, its value."""
    answer = metrics.page("", accept)
    parse: Callable[[str], Any] = parse_openmetrics if "openmetrics" in answer.kind else parse_text
    samples = [sample for family in parse(answer.body.decode()) for sample in family.samples]
    found = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}
    assert len(samples) == len(found), "two series with the same name and labels"
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """The value of one series."""
    return scraped(metrics)[(f"hyper2kvmd_{name}", tuple(sorted(labels.items())))]


def info(metrics: Metrics) -> list[dict[str, str]]:
    """The labels of the jobs that are shown."""
    return [dict(labels) for name, labels in scraped(metrics) if name == "hyper2kvmd_job_info"]


def job(vm: str = "web01", tags: dict[str, str] | None = None, *, ago: float = 20.0, done: int = 250) -> Progress:
    """A job that began `ago` seconds ago and has converted `done` of 1000 bytes just now."""
    now = time.monotonic()
    progress = Progress("export")
    for when, kind, data in (
        (now - ago, "claimed", {"job": "export-01234567", "vm": "export", "attempt": 2}),
        (now - ago, "manifest", {"vm": vm, "tags": tags or {}}),
        (now - ago, "stage", {"stage": "convert", "status": "started", "seconds": 0.0, "total": 1000}),
        (now - ago, "stage", {"stage": "fix", "status": "started", "seconds": 0.0, "total": 0}),
        (now, "progress", {"stage": "convert", "item": "disk-0", "ratio": done / 1000, "bytes": done}),
    ):
        progress.apply(kind, data, when)
    return progress


def report(status: str = "succeeded", seconds: float = 30.0) -> dict[str, Any]:
    """The last event of a job that left a report."""
    disks = [{"target_format": "qcow2", "target_bytes": 700}, {"target_format": "raw", "target_bytes": None}]
    code = {} if status == "succeeded" else {"code": "no_space"}
    return {"status": status, **code, "seconds": seconds, "report": {"seconds": seconds, "disks": disks}}


# Series -----------------------------------------------------------------------------------------------------


def test_a_host_with_eight_busy_workers_has_at_most_three_hundred_series() -> None:
    metrics = Metrics()
    metrics.show({slot: job() for slot in range(8)}, 8)
    series = scraped(metrics)
    assert 8 == sum(name == "hyper2kvmd_job_info" for name, _ in series)
    assert len(series) <= SERIES_LIMIT, f"{len(series)} series: take some away before you add more"


def test_every_counter_is_there_from_the_start_at_0() -> None:
    series = scraped(Metrics())
    counters = {key: value for key, value in series.items() if key[0].endswith(("_total", "_count", "_bucket"))}
    assert {0.0} == {*counters.values()}
    for name, label, values in (
        ("jobs_completed_total", "result", RESULTS),
        ("job_failures_total", "reason", {*Code} - NO_JOB),
        ("stage_duration_seconds_count", "stage", STAGES),
        ("jobs", "state", State),
        (
            "last_job_completion_timestamp_seconds",
            "result",
            ("succeeded", "failed", "rejected", "blocked", "cancelled"),
        ),
    ):
        assert [] == [value for value in values if (f"hyper2kvmd_{name}", ((label, value),)) not in series]


def test_a_thousand_jobs_leave_no_series_behind() -> None:
    metrics = Metrics()
    metrics.show({}, 2)
    before = {*scraped(metrics)}
    for number in range(1000):
        running = {number % 2: job(f"vm{number}", {"number": str(number)})}
        metrics.job_started(1.0)
        for kind, data in (
            ("claimed", {"job": f"vm{number}", "vm": f"vm{number}", "attempt": 1}),
            ("progress", {"stage": "convert", "item": f"disk-{number}", "ratio": 1.0, "bytes": 10}),
            ("stage", {"stage": "convert", "status": "done", "seconds": 1.0}),
        ):
            metrics.event(Event(kind, data))
        metrics.show(running, 2)
        metrics.job_ended(report())
        metrics.show({}, 2)
    assert before == {*scraped(metrics)}
    assert (1000, 1000) == (value(metrics, "claims_total", outcome="won"), value(metrics, "jobs_started_total"))
    assert 10_000 == value(metrics, "bytes_read_total", stage="convert")


def test_both_formats_of_prometheus_can_be_read_and_a_senseless_wish_gets_one_of_them() -> None:
    metrics = Metrics()
    metrics.show({0: job()}, 1)
    assert {*scraped(metrics)} == {*scraped(metrics, "application/openmetrics-text;version=1.0.0")}
    assert {*scraped(metrics)} == {*scraped(metrics, "application/openmetrics-text;version=senseless")}


# Slots ------------------------------------------------------------------------------------------------------


def test_a_job_that_runs_has_its_progress_its_rate_and_its_end_in_its_slot() -> None:
    metrics = Metrics()
    metrics.show({1: job()}, 2)
    assert pytest.approx(0.25) == value(metrics, "slot_progress_ratio", slot="1")
    assert pytest.approx(12.5, rel=0.01) == value(metrics, "slot_bytes_per_second", slot="1")
    assert pytest.approx(60, abs=1) == value(metrics, "slot_stage_remaining_seconds", slot="1")
    assert pytest.approx(time.time() - 20, abs=1) == value(metrics, "slot_stage_start_timestamp_seconds", slot="1")
    assert pytest.approx(time.time(), abs=1) == value(metrics, "slot_last_progress_timestamp_seconds", slot="1")
    assert (2, 1) == (value(metrics, "workers"), value(metrics, "workers_busy"))


def test_a_slot_without_a_job_has_no_progress_and_no_rate() -> None:
    metrics = Metrics()
    metrics.show({1: job()}, 2)
    metrics.show({}, 2)
    for slot in ("0", "1"):
        assert math.isnan(value(metrics, "slot_progress_ratio", slot=slot))
        assert math.isnan(value(metrics, "slot_stage_remaining_seconds", slot=slot))
        assert math.isnan(value(metrics, "slot_last_progress_timestamp_seconds", slot=slot))
        assert 0 == value(metrics, "slot_bytes_per_second", slot=slot)
    assert [] == info(metrics)


def test_the_slowest_stage_that_counts_is_the_one_that_is_shown() -> None:
    progress = job(done=900)
    now = time.monotonic()
    for when, kind, data in (
        (now - 10, "stage", {"stage": "verify", "status": "started", "seconds": 0.0, "total": 1000}),
        (now, "progress", {"stage": "verify", "item": "disk-0", "ratio": 0.1, "bytes": 100}),
    ):
        progress.apply(kind, data, when)
    metrics = Metrics()
    metrics.show({0: progress}, 1)
    assert pytest.approx(0.1) == value(metrics, "slot_progress_ratio", slot="0")
    assert pytest.approx(90, abs=1) == value(metrics, "slot_stage_remaining_seconds", slot="0")


def test_a_stage_that_hangs_is_seen_although_another_one_moves() -> None:
    progress, now = job(), time.monotonic()
    progress.apply("stage", {"stage": "verify", "status": "started", "seconds": 0.0, "total": 1000}, now - 10)
    progress.stages["convert"].moved = now - 2000
    progress.apply("progress", {"stage": "verify", "item": "disk-0", "ratio": 0.1, "bytes": 100}, now)
    metrics = Metrics()
    metrics.show({0: progress}, 1)
    assert pytest.approx(time.time() - 2000, abs=1) == value(metrics, "slot_last_progress_timestamp_seconds", slot="0")


def test_only_what_is_read_of_the_sources_counts_as_read() -> None:
    metrics = Metrics()
    for stage in ("validate", "commit"):
        metrics.event(Event("progress", {"stage": stage, "item": "disk-0", "ratio": 0.1, "bytes": 100}))
    assert 100 == value(metrics, "bytes_read_total", stage="validate")
    assert not any(dict(labels).get("stage") == "commit" for name, labels in scraped(metrics) if "bytes_read" in name)


def test_what_runs_is_named_and_its_tags_are_one_label() -> None:
    metrics = Metrics()
    metrics.show({0: job(tags={"env": "production", "team": "db", "urgent": ""})}, 1)
    (labels,) = info(metrics)
    assert {
        "slot": "0",
        "job": "export-01234567",
        "vm": "web01",
        "attempt": "2",
        "tags": "env=production,team=db,urgent",
    } == labels


def test_what_runs_keeps_its_labels_from_the_first_to_the_last_moment_that_it_is_shown() -> None:
    metrics, seen = Metrics(), set[str]()
    progress = Progress("export")
    events: list[tuple[str, dict[str, Any]]] = [
        ("claimed", {"job": "export-01234567", "vm": "export", "attempt": 2}),
        ("manifest", {"vm": "web01", "tags": {"env": "test"}}),
        *(("stage", {"stage": stage, "status": "started", "seconds": 0.0, "total": 0}) for stage in STAGES),
        *(("stage", {"stage": stage, "status": "done", "seconds": 0.0}) for stage in STAGES),
    ]
    for kind, data in events:
        progress.apply(kind, data, time.monotonic())
        metrics.show({0: progress}, 1)
        seen |= {str(labels) for labels in info(metrics)}
    assert 1 == len(seen), seen


def test_the_stage_that_is_shown_is_told_by_its_place_among_the_stages() -> None:
    metrics = Metrics()
    metrics.show({0: job()}, 2)
    assert 1 + STAGES.index("convert") == value(metrics, "slot_stage", slot="0")
    assert math.isnan(value(metrics, "slot_stage", slot="1"))
    assert "5 convert, 6 commit" in metrics.page("", "").body.decode()


def test_messages_that_were_given_up_are_counted_from_when_the_daemon_began() -> None:
    metrics = Metrics()
    shown = []
    for given_up in (3, 3, 5, 0, 1):  # the database was removed before the last but one
        metrics.notified(7, given_up)
        shown.append(value(metrics, "notifications_given_up_total"))
    assert [0, 0, 2, 2, 3] == shown
    assert 7 == value(metrics, "notifications_pending")


@pytest.mark.parametrize("name", ['a"b\\c\nhyper2kvmd_workers 99', "\ud800", "日本", "x" * 10_000], ids=ascii)
def test_a_hostile_name_harms_nothing(name: str) -> None:
    metrics = Metrics()
    metrics.show({0: job(name, {name: name, **{str(n): name for n in range(1000)}})}, 1)
    (labels,) = info(metrics)
    assert all(len(labels[key]) <= 1000 and labels[key].isprintable() for key in ("vm", "tags"))
    assert 1 == value(metrics, "workers")
    assert len(metrics.page("", "").body) < 100_000


def test_a_job_that_outlives_a_smaller_number_of_workers_keeps_its_slot_until_it_ends() -> None:
    metrics = Metrics()

    def slots() -> list[str]:
        return sorted(dict(labels)["slot"] for name, labels in scraped(metrics) if name.endswith("_ratio"))

    metrics.show({3: job()}, 4)
    metrics.show({3: job()}, 1)
    assert ["0", "3"] == slots()
    metrics.show({}, 1)
    assert ["0"] == slots()


# Ends -------------------------------------------------------------------------------------------------------


def test_each_end_of_a_job_is_counted_as_what_it_is() -> None:
    metrics = Metrics()
    for finished in (
        report(),
        report("retrying"),
        None,
        {"status": "busy", "code": "busy"},
        {"status": "nothing"},
        {"status": "unclaimed", "code": "export_unwritable"},
        {"status": "unreported", "code": "claim_lost"},
        {"status": "interrupted", "code": "interrupted"},
    ):
        metrics.job_ended(finished)
    completed = {
        dict(labels)["result"]: count for (name, labels), count in scraped(metrics).items() if "jobs_completed" in name
    }
    counted = ("succeeded", "retrying", "crashed", "unclaimed", "unreported", "interrupted")
    assert {result: float(result in counted) for result in RESULTS} == completed
    for reason in ("no_space", "runner_crashed", "export_unwritable", "claim_lost", "interrupted"):
        assert 1 == value(metrics, "job_failures_total", reason=reason)
    assert 0 == value(metrics, "job_failures_total", reason="busy")
    for outcome in ("busy", "failed", "lost"):
        assert 1 == value(metrics, "claims_total", outcome=outcome)
    assert 1 == value(metrics, "report_write_errors_total")
    assert 1 == value(metrics, "job_duration_seconds_count", result="succeeded")
    assert 1 == value(metrics, "job_duration_seconds_count", result="other")
    assert (700, 0) == tuple(value(metrics, "bytes_written_total", format=format) for format in ("qcow2", "raw"))


def test_bytes_are_counted_by_what_converted_a_disk() -> None:
    metrics = Metrics()
    moved = {"item": "disk-0", "read": 10, "written": 30}
    for engine, inflated in (("stream", 20), ("qemu-img", None), ("reflink", None)):
        metrics.event(Event("converted", {**moved, "engine": engine, "inflated": inflated}))
    counted = {
        (dict(labels)["engine"], dict(labels)["kind"]): count
        for (name, labels), count in scraped(metrics).items()
        if name == "hyper2kvmd_convert_bytes_total"
    }
    assert {
        ("stream", "read"): 10,
        ("stream", "inflated"): 20,
        ("stream", "written"): 30,
        ("qemu-img", "read"): 10,
        ("qemu-img", "written"): 30,
    } == counted


def test_what_ended_before_the_daemon_began_is_known_from_the_reports() -> None:
    now = time.time()
    looks = [
        Facts(None, report_status="succeeded", finished_at=1000.0),
        Facts(None, report_status="succeeded", finished_at=3000.0),
        Facts(None, report_status="failed", finished_at=2000.0),
        Facts(None, report_status="rejected", finished_at=now + 86400 * 365),
        Facts(None, report_status="blocked"),
        Facts(None, report_status="retrying", finished_at=1000.0),
    ]
    metrics = Metrics()

    def last() -> dict[str, float]:
        results = ("succeeded", "failed", "rejected", "blocked", "cancelled")
        return {r: value(metrics, "last_job_completion_timestamp_seconds", result=r) for r in results}

    metrics.looked(looks, {}, None, now)
    assert {"succeeded": 3000, "failed": 2000, "rejected": 0, "blocked": 0, "cancelled": 0} == last()
    metrics.looked([], {}, None, now)
    assert 3000 == last()["succeeded"], "its export was taken away, it was migrated nevertheless"
    metrics.job_ended(report())
    assert pytest.approx(now, abs=5) == last()["succeeded"]
    metrics.looked(looks, {}, 1234.0, now)
    assert pytest.approx(now, abs=5) == last()["succeeded"]
    assert 1234 == value(metrics, "oldest_waiting_job_timestamp_seconds")


# The address ------------------------------------------------------------------------------------------------

PAIR = "cert_file: /c, key_file: /k"


@pytest.mark.parametrize(
    "metrics",
    [
        "{listen: '127.0.0.1:1'}",
        "{listen: '127.9.9.9:1'}",
        "{listen: 'localhost:1'}",
        "{listen: '[::1]:1'}",
        "{listen: ''}",
        "{listen: '0.0.0.0:1', allow_insecure: true}",
        f"{{listen: '0.0.0.0:1', tls_server_config: {{{PAIR}}}}}",
        f"{{tls_server_config: {{{PAIR}, client_ca_file: /a, client_auth_type: RequireAndVerifyClientCert}}}}",
        f"{{tls_server_config: {{{PAIR}, client_ca_file: /a, client_auth_type: VerifyClientCertIfGiven}}}}",
        f"{{tls_server_config: {{{PAIR}, min_version: TLS13}}}}",
    ],
)
def test_an_address_for_this_host_or_with_tls_is_good(metrics: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"metrics: {metrics}\n")
    assert load_settings(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("metrics", "problem"),
    [
        ("{listen: '0.0.0.0:1'}", "metrics.listen is 0.0.0.0:1, which other hosts can reach, and there is no TLS: set"),
        ("{listen: '[::]:1'}", "metrics.listen is [::]:1, which other hosts can reach"),
        ("{listen: 'kvm1.example:1'}", "or set metrics.allow_insecure to true"),
        ("{tls_server_config: {cert_file: /c}}", "tls_server_config: Value error, cert_file and key_file belong"),
        (f"{{tls_server_config: {{{PAIR}, client_ca_file: /a}}}}", "client_auth_type that verifies"),
        (
            f"{{tls_server_config: {{{PAIR}, client_auth_type: RequireAndVerifyClientCert}}}}",
            "set client_ca_file and RequireAndVerifyClientCert",
        ),
        (
            "{tls_server_config: {client_ca_file: /a, client_auth_type: RequireAndVerifyClientCert}}",
            "client_ca_file needs TLS",
        ),
        *(
            (f"{{tls_server_config: {{{PAIR}, client_auth_type: {kind}}}}}", f"{kind} asks clients for certificates")
            for kind in ("RequestClientCert", "RequireAnyClientCert")
        ),
        (f"{{tls_server_config: {{{PAIR}, client_auth_type: Some}}}}", "Input should be 'NoClientCert'"),
        (f"{{tls_server_config: {{{PAIR}, min_version: TLS10}}}}", "Input should be 'TLS12' or 'TLS13'"),
    ],
)
def test_an_address_that_others_can_reach_and_half_of_tls_are_refused(
    metrics: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(f"metrics: {metrics}\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path / "c.yaml")
    assert problem in str(caught.value)
    assert "c.yaml:1: metrics" in str(caught.value)
