"""A campaign at a glance: its numbers, its page in a real browser, its table, and the command that writes them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.ctl.spreadsheet import as_csv
from hyper2kvmd.exits import EXIT_FAILED, EXIT_USAGE
from hyper2kvmd.queue.names import REPORT
from hyper2kvmd.report.campaign import Campaign, CampaignHost, CampaignVm, render_campaign
from hyper2kvmd.settings.model import Settings
from tests.conftest import Ctl, MakeExport
from tests.integration.report.conftest import AA, Open, contrast, emulate, overflowing, texts_and_colours

LONG = "unbroken" * 40
HOSTILE = ("<script>document.title='owned'</script>", "\"><img src=x onerror=document.title='owned'>", "{{ 7 * 7 }}")


def vm(name: str, state: str = "queued", **changes: Any) -> CampaignVm:
    shape: dict[str, Any] = {
        **dict.fromkeys(("vm", "wave", "reason", "remedy", "code", "since", "doing", "host", "notes"), ""),
        **dict.fromkeys(("attempts", "seconds", "estimated", "source_bytes", "target_bytes")),
        **changes,
    }
    return CampaignVm(name, state=state, **shape)


def campaign(*vms: CampaignVm) -> Campaign:
    host = CampaignHost("kvm1", "running", 1, "3 s ago")
    return Campaign("/var/lib/hypersdk/exports", "2026-12-05T22:00:00.000Z", vms, (host,))


EVERY = campaign(
    vm(
        "done1",
        "succeeded",
        wave="2",
        seconds=600.0,
        estimated=500.0,
        source_bytes=1 << 30,
        target_bytes=2 << 30,
        host="kvm1",
    ),
    vm(
        "done2",
        "succeeded",
        wave="10",
        seconds=7200.0,
        source_bytes=3 << 30,
        target_bytes=4 << 30,
        page="x.vms/done2.html",
    ),
    vm("stuck", "blocked", wave="2", reason="no network DMZ", remedy="Create it.", since="2026-12-05T19:00:00.000Z"),
    vm("bad", "failed", reason=LONG, remedy=LONG, notes="ask Ann"),
    vm("busy", "running", wave="2", doing="convert 63 %, 12 min left", host="kvm1"),
    vm("later", estimated=900.0, source_bytes=5 << 30),
    vm("half", "incomplete", reason="half-disk.vmdk is not there yet"),
    vm("away", "unreadable", reason="it cannot be read"),
    *(
        vm(f"hostile{number}", "failed", wave=text, vm=text, reason=text, notes=text)
        for number, text in enumerate(HOSTILE)
    ),
)


def test_its_numbers_add_up_and_waves_are_in_the_order_of_people() -> None:
    totals = EVERY.totals
    assert (11, 2, 4 << 30, 6 << 30, 7800) == (
        *(totals[key] for key in ("vms", "done", "source_bytes", "target_bytes", "seconds")),
    )
    assert 900 == totals["estimated_left"]
    assert ["2", "10"] == [wave for wave, _ in EVERY.waves][:2]
    assert "" == EVERY.waves[-1][0]
    assert ["done2", "done1"] == [one.name for one in EVERY.slowest]
    assert sum(EVERY.states.values()) == len(EVERY.vms)
    assert "unreadable" == next(iter(EVERY.states))


def test_the_page_says_who_needs_somebody_why_and_since_when(show: Open) -> None:
    browser = show(render_campaign(EVERY))
    text = str(browser.execute_script("return document.body.innerText"))
    for part in (
        "2 of 11 VMs are done",
        "no network DMZ",
        "Create it.",
        "3.0 h",
        "convert 63 %, 12 min left",
        "kvm1",
        "15 min",
    ):
        assert part in text, text
    assert "Wave 2: 1 of 3 done" in text
    assert "x.vms/done2.html" in browser.page_source
    assert "owned" != browser.title
    for part in HOSTILE:
        assert part in text
    assert 0 == browser.execute_script("return document.querySelectorAll('script, img').length")


def test_nothing_overflows_on_a_screen_of_400_pixels(show: Open) -> None:
    browser = show(render_campaign(EVERY))
    browser.execute_script("document.querySelectorAll('details').forEach(box => box.open = true)")
    assert [] == overflowing(browser, 400)
    assert [] == overflowing(browser, 1100)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_that_people_need(show: Open, scheme: str) -> None:
    browser = show(render_campaign(EVERY))
    browser.execute_script("document.querySelectorAll('details').forEach(box => box.open = true)")
    found = texts_and_colours(browser, scheme)
    assert {"mark ok", "mark failed", "mark doubt", "quiet"} <= {name for name, _, _ in found}
    assert [] == [item for item in found if contrast(item[1], item[2]) < AA]


def test_print_shows_what_is_folded_on_white(show: Open) -> None:
    browser = show(render_campaign(EVERY))
    emulate(browser, "dark", "print", width=680)
    seen = """return [...document.querySelectorAll('tbody tr')].filter(row =>
        !row.checkVisibility({contentVisibilityAuto: true}) || row.getBoundingClientRect().height < 8).length"""
    assert 0 == browser.execute_script(seen)
    assert "rgb(255, 255, 255)" == browser.execute_script("return getComputedStyle(document.body).backgroundColor")


def test_two_thousand_vms_are_folded_away_and_an_empty_campaign_is_one() -> None:
    page = render_campaign(campaign(*(vm(f"vm{number}", "succeeded", seconds=1.0) for number in range(2000))))
    assert "2000 of 2000 VMs are done" in page
    assert 2010 == page.count('<th scope="row">') - 1, "each once, the ten slowest again, and the host"
    assert "0 of 0 VMs are done" in render_campaign(campaign())


def test_the_table_has_a_row_for_each_and_no_formula() -> None:
    text = as_csv(campaign(vm("=cmd()", "failed", reason="a, b\nc", seconds=1.6), vm("web01")).rows())
    rows = [*csv.DictReader(io.StringIO(text, newline=""))]
    assert [("'=cmd()", "failed", "a, b\nc", "2"), ("web01", "queued", "", "")] == [
        (row["name"], row["state"], row["reason"], row["seconds"]) for row in rows
    ]


def test_the_command_writes_a_page_with_a_page_for_each_and_a_table(
    ctl: Ctl, scratch: Settings, make_export: MakeExport, tmp_path: Path
) -> None:
    make_export("web01")
    make_export("web 02")
    (make_export("bad") / "bad-disk-0.raw").write_bytes(b"x" * (1 << 20))
    ctl("batch", scratch.exports_dir)
    make_export("later")
    (make_export("planted") / REPORT).write_text('{"status": "succeeded", "finished_at": "2026-01-01T00:00:00"}')
    scratch.plan_dir.mkdir()
    (scratch.plan_dir / "later.yaml").write_text("wave: '7'\nhold: true\nnotes: ask Ann\n")
    page, table = tmp_path / "campaign.html", tmp_path / "campaign.csv"
    for _ in range(2):  # the second time, over the first
        done = ctl("report", "--all", "--html", page, "--csv", table)
        assert 0 == done.returncode, done.stderr
    text = page.read_text()
    for part in ("Wave 7", "ask Ann", "its plan puts it on hold", "bad-disk-0.raw has sha256"):
        assert part in text
    pages = tmp_path / "campaign.html.vms"
    linked = {part.partition('"')[0] for part in text.split('href="campaign.html.vms/')[1:]}
    assert {"bad.html", "web01.html"} < linked
    assert linked == {path.name for path in pages.iterdir() if path.suffix == ".html"}
    assert "web 02" in (pages / next(name for name in linked if name.startswith("web-02"))).read_text()
    rows = {row["name"]: row for row in csv.DictReader(table.open(newline=""))}
    assert ("succeeded", "failed", "blocked", "7") == (
        *(rows[name]["state"] for name in ("web01", "bad", "later")),
        rows["later"]["wave"],
    )
    assert [] == [path.name for path in tmp_path.iterdir() if path.name.startswith(".campaign")]
    shape = json.loads(ctl("report", "--all", "--json").stdout)
    assert {*rows} == {one["name"] for one in shape["vms"]}
    said = ctl("report", "--all").stdout
    assert "later: blocked: its plan puts it on hold" in said
    assert EXIT_USAGE == ctl("report").returncode == ctl("report", "web01", "--all").returncode
    assert EXIT_USAGE == ctl("report", "web01", "--csv", table).returncode


def test_a_directory_of_somebody_elses_is_not_replaced(ctl: Ctl, make_export: MakeExport, tmp_path: Path) -> None:
    make_export()
    mine = tmp_path / "x.html.vms/mine"
    mine.parent.mkdir()
    mine.write_text("mine")
    done = ctl("report", "--all", "--html", tmp_path / "x.html")
    assert EXIT_FAILED == done.returncode
    assert "this program did not make it" in done.stderr
    assert "mine" == mine.read_text()
    assert not (tmp_path / "x.html").exists()
