"""The plans of single VMs: where they count, that a mistake blocks one VM only, and windows of time."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.errors import Code, Finding
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.estimate import Estimate
from hyper2kvmd.queue.placement import Placement, placement
from hyper2kvmd.queue.plans import planned
from hyper2kvmd.queue.state import Facts, State, state_of
from hyper2kvmd.settings.load import overridden
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.settings.plan import VmPlan
from tests.conftest import MakeExport

NOW = datetime(2026, 12, 5, 22, 0, tzinfo=UTC).timestamp()
WAVES = {
    "1": {"not_before": "2026-12-05 20:00Z", "not_after": "2026-12-06 06:00Z"},
    "2": {"not_before": "2027-01-01 00:00Z"},
}
SETTINGS = Settings.model_validate({"waves": WAVES, "settle_seconds": 0})


def took(seconds: float) -> Estimate:
    return Estimate(seconds, seconds, seconds, {}, 0, 1)


def look(plan: dict[str, Any], **found: Any) -> Facts:
    shape = {"manifest": "manifest.json", "manifest_sha256": "a", "settled_since": NOW - 60, **found}
    return Facts(**shape, plan=VmPlan.model_validate(plan))


def state(plan: dict[str, Any], **found: Any) -> tuple[State, str]:
    decided, finding = state_of(look(plan, **found), SETTINGS, NOW)
    return decided, "" if finding is None else finding.message


@pytest.mark.parametrize(
    ("plan", "estimate", "expected"),
    [
        ({}, 1e9, ""),
        ({"wave": "1"}, 8 * 3600, ""),
        (
            {"wave": "1"},
            8 * 3600 + 1,
            "the job would take 8.0 h by the estimate, and the window of wave 1 ends in 8.0 h",
        ),
        ({"wave": "2"}, 1, "the window of wave 2 begins at 2027-01-01"),
        ({"wave": "2", "not_before": "2026-12-05 21:00Z"}, 1, ""),
        ({"not_before": "2026-12-05 22:00:01Z"}, 1, "its window begins at 2026-12-05"),
        ({"not_before": "2026-12-05 22:00:00Z"}, 1, ""),
        ({"not_after": "2026-12-05 22:00:00Z"}, 1, "its window ended at 2026-12-05"),
        ({"not_after": "2026-12-05 22:01Z"}, 61, "its window ends in 60 s"),
        ({"not_after": "2026-12-05 22:01Z"}, 60, ""),
    ],
)
def test_a_job_starts_inside_its_window_if_it_ends_there_by_the_estimate(
    plan: dict[str, Any], estimate: float, expected: str
) -> None:
    decided, message = state(plan, estimate=took(estimate))
    early = State.WAITING if " begins at " in expected else State.BLOCKED
    assert (early if expected else State.QUEUED) == decided
    assert expected in message


def test_a_retry_keeps_to_the_window_too_and_a_job_that_runs_is_left_alone() -> None:
    retrying = {"report_status": "retrying", "report_sha256": "a", "next_attempt_at": NOW - 1}
    assert State.WAITING == state({"wave": "2"}, **retrying)[0]
    assert State.QUEUED == state({"wave": "1"}, **retrying)[0]
    assert State.RUNNING == state({"wave": "2"}, held=True)[0]


def test_a_person_starts_it_at_any_time_but_not_what_is_on_hold() -> None:
    assert State.QUEUED == state_of(look({"wave": "2"}), SETTINGS, NOW, any_time=True)[0]
    assert State.BLOCKED == state_of(look({"hold": True}), SETTINGS, NOW, any_time=True)[0]


def test_what_waits_for_its_window_is_due_when_that_begins() -> None:
    begins = datetime(2027, 1, 1, tzinfo=UTC).timestamp()
    assert (begins, NOW - 60) == (look({"wave": "2"}).due(SETTINGS), look({}).due(SETTINGS))


def test_what_is_planned_delays_no_cancellation_and_changes_nothing_that_is_over() -> None:
    assert State.QUEUED == state({"hold": True}, request="cancel")[0]
    assert State.SUCCEEDED == state({"hold": True}, report_status="succeeded", report_sha256="a")[0]
    assert State.FAILED == state({"wave": "2"}, report_status="failed", report_sha256="a")[0]


def test_the_plan_goes_before_rules_and_adds_to_what_they_ask_for() -> None:
    rule = {"priority": 1, "features": ["kvm"], "licenses": ["filer1:1"], "libvirt_uri": "qemu+ssh://a/system"}
    settings = SETTINGS.model_copy(update=dict(Settings.model_validate({"rules": [rule]}).model_copy()))
    plan = {"priority": 5, "features": ["fast", "kvm"], "libvirt_uri": "qemu+ssh://b/system"}
    expected = Placement("qemu+ssh://b/system", ("kvm", "fast"), ("filer1:1",), 5)
    assert expected == placement(settings, "web01", look(plan))


def test_what_a_plan_says_becomes_settings_and_what_it_leaves_out_stays() -> None:
    settings = Settings.model_validate({"libvirt": {"network_map": {"A": "bridge:a", "B": "bridge:b"}, "start": True}})
    plan = VmPlan.model_validate(
        {
            "cpus": 4,
            "memory_mb": 8192,
            "networks": ["bridge:br0@20", None],
            "mac": "new",
            "network_map": {"B": "user"},
            "output_dir": "/srv/fast",
            "format": "raw",
            "compress": False,
            "start": False,
            "test_boot": True,
        }
    )
    found = overridden(settings, plan.overrides(settings))
    assert (4, 8192, ("bridge:br0@20", None), "new") == (*dict(found.vm).values(),)
    assert {"A": "bridge:a", "B": "user"} == found.libvirt.network_map
    assert (Path("/srv/fast"), "/srv/fast") == (
        found.output_dir,
        found.pipeline.convert and found.pipeline.convert.output_dir,
    )
    convert, check = found.pipeline.convert, found.pipeline.validate_
    assert convert and ("raw", False) == (convert.target_format, convert.compression)
    assert check and (False, True, True) == (found.libvirt.start, found.validate_.test_boot, check.test_boot)
    assert settings == overridden(settings, VmPlan(notes="x", wave="1", hold=True, priority=3).overrides(settings))


def test_plans_that_say_the_same_have_the_same_digest() -> None:
    assert VmPlan(wave="1").digest == VmPlan.model_validate({"wave": "1"}).digest
    assert len({VmPlan().digest, VmPlan(wave="1").digest, VmPlan(mac="keep").digest}) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\nwav: 1\n", "web01.yaml:2: wav: unknown setting; did you mean wave?"),
        ("cpus: many\n", "web01.yaml:1: cpus: Input should be a valid integer"),
        ("not_before: tomorrow\n", "web01.yaml:1: not_before: Value error, expected a time such as 2026-12-05 20:00"),
        ("not_before: 2026-12-05 20:00\nnot_after: 2026-12-05 19:00\n", "not_after must be later than not_before"),
        ("wave: '3'\n", "wave: there is no wave '3'; `waves` in the settings has 1, 2"),
        ("networks: ['bridge:']\n", "web01.yaml:1: networks.0"),
        ("hold: [", "not valid YAML"),
        ("- hold\n", "expected settings"),
    ],
)
def test_a_mistake_in_a_plan_blocks_its_vm_and_no_other(
    scratch: Settings, make_export: MakeExport, text: str, expected: str
) -> None:
    settings = scratch.model_copy(update={"waves": SETTINGS.waves})
    settings.plan_dir.mkdir()
    (settings.plan_dir / "web01.yaml").write_text(text)
    (settings.plan_dir / "web02.yaml").write_text("wave: '1'\n")
    found = {name: facts.look(make_export(name), settings) for name in ("web01", "web02", "web03")}
    states = {name: state_of(one, settings, NOW, any_time=True) for name, one in found.items()}
    assert (State.BLOCKED, State.QUEUED, State.QUEUED) == tuple(state for state, _ in states.values())
    finding = states["web01"][1]
    assert finding is not None and Code.PLAN_INVALID == finding.code
    assert expected in finding.message


def test_a_plan_that_others_can_write_or_nobody_can_read_is_a_mistake(scratch: Settings) -> None:
    scratch.plan_dir.mkdir()
    path = scratch.plan_dir / "web01.yaml"
    path.write_text("hold: true\n")
    path.chmod(0o666)
    open_to_all = planned(scratch, "web01")
    path.unlink()
    path.symlink_to("web01.yaml")
    loop = planned(scratch, "web01")
    assert isinstance(open_to_all, Finding) and "others can write it" in open_to_all.message
    assert isinstance(loop, Finding) and "web01.yaml" in loop.message


def test_a_plan_counts_as_soon_as_its_file_has_changed(scratch: Settings) -> None:
    scratch.plan_dir.mkdir()
    path = scratch.plan_dir / "web01.yaml"
    assert VmPlan() == planned(scratch, "web01")
    for priority in (1, 2, 3):
        path.write_text(f"priority: {priority}\n")
        assert VmPlan(priority=priority) == planned(scratch, "web01")
    path.unlink()
    assert VmPlan() == planned(scratch, "web01")
