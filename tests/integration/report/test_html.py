"""The report's page, as a real browser shows it, and the command that writes it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from selenium import webdriver

from hyper2kvmd.report.html import render
from hyper2kvmd.settings.model import Settings
from tests import ROOT
from tests.conftest import Ctl, MakeExport, disk_entry, report_of, run_job, write_manifest
from tests.integration.report.conftest import AA, Open, contrast, emulate, overflowing, texts_and_colours

# Each would do something if it were not shown as text, or would change how the text around it is read.
HOSTILE = (
    "<script>document.title='owned'</script>",
    "\"><img src=x onerror=document.title='owned'>",
    "]]></style></pre></details>",
    "{{ 7 * 7 }} {% raw %}",
    "right\u202eto left",
    "nul\x00 escape\x1b[2J",
    "javascript:document.title='owned'",
    "half\ud800pair",
)
SHOWN = (*HOSTILE[:4], r"right\u202eto left", r"nul\x00 escape\x1b[2J", HOSTILE[6], r"half\ud800pair")
LONG = "unbroken" * 60


def png(width: int = 64, height: int = 40) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress((b"\0" + b"\x20" * width) * height)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def finding(code: str, message: str, hint: str, field: str | None) -> dict[str, Any]:
    return {"code": code, "message": message, "hint": hint, "field": field}


def rich() -> dict[str, Any]:
    """A report of a failure in which everything that a report can hold is there."""
    diff = "\n".join(
        (
            "--- a/etc/fstab",
            "+++ b/etc/fstab",
            "@@ -1,3 +1,3 @@",
            " # <file system>\t<mount point>",
            "-/dev/sda2 / ext4 defaults 0 1",
            "+UUID=fe88be10-3d47-5461-84bc-95f4936c6760 / ext4 defaults 0 1",
            "+# " + LONG,
            "--- not a header: the line was `-- not a header`",
        )
    )
    stages = [
        ("inspect", "done", "2026-11-23T08:00:00.000Z", 19.5),
        ("plan", "done", "2026-11-24T17:13:15.900Z", 7.6),
        ("verify", "done", "2026-11-24T17:13:23.500Z", 61.0),
        ("convert", "cancelled", "2026-11-24T17:13:23.500Z", 200.0),
        ("fix", "done", "2026-11-24T17:13:45.000Z", 90.0),
        ("boot", "failed", "2026-11-24T17:16:00.000Z", 57.8),
        ("import", "skipped", None, None),
    ]
    disk = {
        "id": "disk-0",
        "source": "web01.vmdk",
        "source_format": "vmdk",
        "source_bytes": 173155328,
        "source_sha256": "4d6433762ffda3c1480e341dc9b303837a927b4191d2e13561d03238e5c676bb",
        "virtual_size": 2 << 30,
        "target": "/var/lib/libvirt/images/web01-disk-0.qcow2",
        "target_format": "qcow2",
        "target_bytes": 237932544,
        "boot": True,
    }
    data = {**disk, "id": "data", "source": f"{LONG}.vmdk", "source_sha256": None, "target": None, "boot": False}
    proof = {"subject": "/boot/initrd.img", "claim": "it has virtio_blk", "evidence": "the initramfs holds virtio_blk"}
    return {
        "status": "failed",
        "job": "web01-6722f6e2",
        "vm_name": "web01 " + LONG,
        "manifest": {"name": "manifest.json", "sha256": "0004" * 16, "dialect": "seed"},
        "attempts": 2,
        "started_at": "2026-11-24T17:13:15.891Z",
        "finished_at": "2026-11-24T17:18:23.760Z",
        "seconds": 307.869,
        "next_attempt_at": "2026-11-24T18:00:00.000Z",
        "error": {
            **finding("boot_failed", "the boot test failed", "See boot-test.log.", "validate.test_boot"),
            "stage": "boot",
            "tail": "ALERT!  /dev/sda2 does not exist.\n(initramfs)",
            "problems": [
                finding("boot_failed", "it ended in its initramfs", "See boot-test.log.", "validate.test_boot"),
                finding("no_space", "the disk is full", "Free some space.", None),
            ],
        },
        "warnings": [
            finding("path_stale", "a path is outside of the export", "Nothing to do.", "disks[0].local_path"),
            finding("no_virtio", "no kernel has virtio drivers", "Install one.", None),
        ],
        "stages": [
            {"name": name, "status": status, "started_at": began, "seconds": seconds}
            for name, status, began, seconds in stages
        ],
        "results": {
            "inspect": {
                "product_name": "Debian GNU/Linux 12 (bookworm)",
                "kernel_version": "6.1.0-56-amd64",
                "firmware": "uefi",
                "kernels": [{"version": "6.1.0-56-amd64", "chosen_by_bootloader": True}, {"version": "5.10-old"}],
                "mounts": {"/": "/dev/sda2", "/boot/efi": "/dev/sda1"},
                "locked": ["/dev/sdb1"],
            },
            "fix": {
                "drivers_injected": ["virtio_blk", "virtio_net"],
                "proofs": [{**proof, "ok": True}, {**proof, "claim": "it has cryptsetup", "ok": False}],
                "fstab": {"before": "/dev/sda2 / ext4", "after": "UUID=fe88be10 / ext4"},
                "names": [
                    {
                        "path": "/etc/fstab",
                        "line": 1,
                        "use": "/",
                        "before": "/dev/sda2",
                        "after": "UUID=fe88be10",
                        "device": "disk-0, partition 2",
                        "proof": "found by looking",
                    },
                    {
                        "path": "/etc/fstab",
                        "line": 2,
                        "use": "/backup",
                        "before": "/dev/sdz1",
                        "after": "/dev/sdz1",
                        "device": "",
                        "proof": "no disk of this export has that device",
                    },
                ],
            },
            "validate": {"all_valid": True, "disks": {"disk-0": {"checked": True, "compared": False}}},
            "boot": {
                "outcome": "failed",
                "reason": "it ended in the shell of its initramfs",
                "seconds": 55.7,
                "serial_log": "boot-test.log",
                "screenshot": "boot-test.png",
            },
        },
        "disks": [disk, data],
        "changes": [
            {"fixer": "fstab", "path": "/etc/fstab", "summary": "UUIDs instead of /dev/sda2", "diff": diff},
            {
                "fixer": "initramfs",
                "path": "/boot/initrd.img-6.1.0-56-amd64",
                "summary": "rebuilt with the virtio drivers",
                "command": "update-initramfs -u -k 6.1.0-56-amd64",
                "evidence": "update-initramfs: Generating\nand a second line",
            },
            {"fixer": "efi", "path": "/EFI/BOOT", "summary": "a copy", "evidence": "an EFI program"},
        ],
        "domain": {"name": "web01", "uuid": "2b1a4d56-4d3c-6f5e-7081-92a3b4c5d6e7", "uri": "qemu:///system"},
        "overrides": {"fix": {"update_grub": False}, "vm_name": "web01"},
        "tags": {"owner": "platform team", LONG: LONG},
        "tools": {"qemu-img": "7.2.22", "libguestfs": "1.48.6"},
        "host": {"name": "kvm3", "pid": 24670, "user": "hyper2kvmd", "login_user": "alice", "started_by": "command"},
    }


def rejected() -> dict[str, Any]:
    """The report of a manifest that could not be read, from before the user was recorded."""
    return {
        "status": "rejected",
        "job": "half-1a2b3c4d",
        "manifest": {"name": "", "sha256": None},
        "attempts": 1,
        "started_at": "2026-11-24T17:13:15.891Z",
        "finished_at": "2026-11-24T17:13:15.990Z",
        "seconds": 0.099,
        "error": finding("manifest_unreadable", "not complete JSON", "Look at line 1.", None),
        "host": {"name": "kvm3", "pid": 1},
    }


def with_text(shape: Any, text: str) -> Any:
    """The same shape with `text` behind every text that a stranger may have written."""
    if isinstance(shape, dict):
        kept = {"status", "started_at", "finished_at", "next_attempt_at", "started_by", "sha256", "source_sha256"}
        return {key: value if key in kept else with_text(value, text) for key, value in shape.items()}
    if isinstance(shape, list):
        return [with_text(item, text) for item in shape]
    return f"{shape} {text}" if isinstance(shape, str) else shape


def texts(shape: Any) -> Iterator[str]:
    """All texts of a report that a person should see."""
    if isinstance(shape, dict):
        for value in shape.values():
            yield from texts(value)
    elif isinstance(shape, list):
        for item in shape:
            yield from texts(item)
    elif isinstance(shape, str):
        yield from (line for line in shape.split("\n") if line.strip())


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().casefold()


def visible(browser: webdriver.Chrome) -> str:
    return squeezed(str(browser.execute_script("return document.body.innerText")))


def asked_for(browser: webdriver.Chrome) -> list[str]:
    """What the browser asked for since the page was opened, but the page itself and what is in it."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]  # type: ignore[no-untyped-call]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert browser.current_url in urls, "the log works"
    return [url for url in urls if url != browser.current_url and not url.startswith("data:")]


def missing(document: dict[str, Any], text: str) -> list[str]:
    return [line for line in texts(document) if squeezed(line) not in text]


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Settings]:
    """An export that was migrated for real, and the settings it was migrated with."""
    top = tmp_path_factory.mktemp("page")
    for name in ("exports/web01", "images", "work"):
        (top / name).mkdir(parents=True)
    settings = Settings.model_validate(
        {
            "exports_dir": top / "exports",
            "output_dir": top / "images",
            "work_dir": top / "work",
            "libvirt": {"import": False},
        }
    )
    export = top / "exports/web01"
    (export / "d.raw").write_bytes(os.urandom(1 << 20))
    vm = {"cpu": 3, "mem_gb": 7, "firmware": "uefi", "os_hint": "linux", "unknown_key": "makes a warning"}
    write_manifest(export, [disk_entry(export / "d.raw")], vm=vm, metadata={"tags": ["production"]})
    done = run_job(export, settings)
    assert 0 == done.returncode, done.stderr
    return export, settings


def command(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `hyper2kvmctl report` with the settings that the migration was run with."""
    config = settings.work_dir.parent / "settings.json"
    return subprocess.run(
        [sys.executable, "-m", "hyper2kvmd.ctl", "report", *arguments, "--config", str(config)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_page_of_a_real_migration_shows_all_of_its_report_and_of_what_the_vm_was(
    migrated: tuple[Path, Settings], show: Open, tmp_path: Path
) -> None:
    export, settings = migrated
    done = command(settings, "web01", "--html", str(tmp_path / "web01.html"))
    assert 0 == done.returncode, done.stderr
    browser = show((tmp_path / "web01.html").read_text())
    document, text = report_of(export), visible(browser)
    assert document["warnings"]
    for part in ("warnings", "disks", "tags", "tools"):
        assert [] == missing(document[part], text)
    stages = (
        f"{stage['name']} {'+' if stage['status'] == 'done' else stage['status']}" for stage in document["stages"]
    )
    assert [] == [stage for stage in stages if stage not in text]
    assert [] == [key for key in document["tags"] if key not in text]
    for said in ("cpus 3", "memory 7 gib", "firmware uefi", "platform vsphere", "vm-web01", "no domain was defined"):
        assert said in text
    assert f"with the rights of {document['host']['user']}" in text
    assert document["manifest"]["sha256"] in text
    assert squeezed((export / ".hyper2kvmd.log").read_text().splitlines()[-1]) in text
    assert ([], []) == (asked_for(browser), browser.get_log("browser"))  # type: ignore[no-untyped-call]


def test_everything_in_a_report_is_in_the_visible_text(show: Open) -> None:
    document = rich()
    browser = show(render(document, "the last line\n", png()))
    text = visible(browser)
    left_out = {"boot-test.png"}  # which is shown instead
    left_out |= {stage["started_at"] for stage in document["stages"]}
    left_out |= {document[key] for key in ("started_at", "finished_at", "next_attempt_at")}
    # The error sums its problems up, each of which is shown.
    assert ["the boot test failed"] == [line for line in missing(document, text) if line not in left_out]
    for said in ("2026-11-24 17:18:23 utc", "5 min 08 s", "earlier attempt", "import skipped", "the last line"):
        assert said in text
    assert "fix.update_grub false" in text
    assert "a command of alice, with the rights of hyper2kvmd" in text
    assert "1 of 2 hold" in text
    assert "not so" in text
    assert (64, 40) == tuple(
        browser.execute_script("const i = document.images[0]; return [i.naturalWidth, i.naturalHeight]")
    )
    assert ([], []) == (asked_for(browser), browser.get_log("browser"))  # type: ignore[no-untyped-call]


def test_stages_that_run_side_by_side_lie_side_by_side_on_the_timeline(show: Open) -> None:
    browser = show(render(rich(), "", None))
    bars = browser.execute_script(
        """return Object.fromEntries([...document.querySelectorAll('.time tbody tr')].map(row => {
        const [bar, track] = [row.querySelector('.bar'), row.querySelector('.track')].map(
            box => box && box.getBoundingClientRect());
        return [row.cells[0].innerText, bar && [(bar.left - track.left) / track.width, bar.width / track.width]]}))"""
    )
    assert bars["verify"][0] == pytest.approx(bars["convert"][0], abs=0.001)
    assert 200 / 307.869 == pytest.approx(bars["convert"][1], abs=0.005)
    assert (90 + 29.109) / 307.869 == pytest.approx(sum(bars["fix"]), abs=0.005)
    assert (None, None) == (bars["inspect"], bars["import"])


def test_hostile_text_is_shown_as_text_and_runs_nothing(show: Open) -> None:
    clean = show(render(rich(), "logged", None)).execute_script("return document.querySelectorAll('*').length")
    for hostile, shown in zip(HOSTILE, SHOWN, strict=True):
        browser = show(render(with_text(rich(), hostile), f"logged {hostile}", None))
        text = visible(browser)
        for said in (
            "UUIDs instead of /dev/sda2",
            "it ended in its initramfs",
            "Install one.",
            "logged",
            "platform team",
        ):
            assert squeezed(f"{said} {shown}") in text
        counts = browser.execute_script(
            "return [document.querySelectorAll('*').length, document.querySelectorAll('script, img, iframe').length]"
        )
        assert [clean, 0] == counts
        assert "owned" != browser.title
        assert ([], []) == (asked_for(browser), browser.get_log("browser"))  # type: ignore[no-untyped-call]


def test_hostile_bytes_in_the_place_of_the_screenshot_are_left_out() -> None:
    planted = (b"<svg onload=alert(1)>", png()[:20], png(1 << 20, 1), b"")
    assert [False] * 4 == ["<img" in render(rich(), "", screen) for screen in planted]
    assert "<img" in render(rich(), "", png())


def test_the_page_forbids_itself_all_but_its_own_styles_and_pictures() -> None:
    html = render(rich(), "", png())
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in html
    assert "<script" not in html
    assert [] == [url for url in re.findall(r'(?:src|href)="([^"]*)"', html) if not url.startswith(("#", "data:"))]


def test_nothing_overflows_on_a_screen_of_400_pixels(show: Open) -> None:
    browser = show(render(rich(), f"{LONG}{LONG}\n", png(1280, 800)))
    assert [] == overflowing(browser, 400)
    assert [] == [line for line in ("web01.vmdk", "2 GiB", "disk-0") if squeezed(line) not in visible(browser)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_that_people_need(show: Open, scheme: str) -> None:
    browser = show(render(rich(), "the last line\n", None))
    found = texts_and_colours(browser, scheme)
    classes = {name for name, _, _ in found}
    assert {"added", "removed", "place", "file", "same", "mark ok", "mark failed", "label", "quiet"} <= classes
    assert [] == [item for item in found if contrast(item[1], item[2]) < AA]


def test_print_shows_every_line_of_every_difference_on_white(show: Open) -> None:
    document = rich()
    browser = show(render(document, "", None))
    browser.execute_script("document.querySelectorAll('details').forEach(box => box.open = false)")
    seen = """return [...document.querySelectorAll('.diff span')].filter(line =>
        line.checkVisibility({contentVisibilityAuto: true}) && line.getBoundingClientRect().height > 8).length"""
    lines = len(document["changes"][0]["diff"].split("\n"))
    assert 0 == browser.execute_script(seen)
    emulate(browser, "dark", "print", width=680)
    assert lines == browser.execute_script(seen)
    cut = "return [...document.querySelectorAll('pre')].filter(box => box.scrollHeight > box.clientHeight + 1).length"
    assert 0 == browser.execute_script(cut)
    assert "rgb(255, 255, 255)" == browser.execute_script("return getComputedStyle(document.body).backgroundColor")


def test_headings_and_tables_have_an_order_that_can_be_heard(show: Open) -> None:
    browser = show(render(rich(), "the last line\n", None))
    levels = browser.execute_script("return [...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])")
    assert (1, 1) == (levels[0], levels.count(1))
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert 0 == browser.execute_script("return document.querySelectorAll('th:not([scope])').length")
    assert "en" == browser.execute_script("return document.documentElement.lang")
    links = "return [...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.hash)).length"
    assert 0 == browser.execute_script(links)


def test_a_rejected_report_without_vm_disks_and_stages_is_shown(show: Open) -> None:
    browser = show(render(rejected(), "", None))
    text = visible(browser)
    for said in ("rejected", "not complete json", "look at line 1.", "no warnings", "not recorded", "half-1a2b3c4d"):
        assert said in text
    assert [] == [heading for heading in ("timeline", "changes in the guest", "checks and proofs") if heading in text]
    assert [] == browser.get_log("browser")  # type: ignore[no-untyped-call]


def test_an_old_report_does_not_say_who_ran_it() -> None:
    document = rich()
    document["host"] = {"name": "kvm3", "pid": 1}
    del document["overrides"]
    html = render(document, "", None)
    assert "not recorded" in html
    assert "the daemon" not in html


def test_changes_of_windows_are_shown_as_a_windows_administrator_reads_them() -> None:
    key = "HKLM\\SYSTEM\\ControlSet001\\Services\\viostor"
    change = {
        "fixer": "windows.disks",
        "path": key,
        "summary": "viostor starts",
        "diff": "Type: (none) → 1\n- a: 3 → 0",
    }
    found = {"product_name": "Windows Server 2022 Standard", "build": 20348, "kernel_version": None, "firmware": "uefi"}
    found |= {"bootloader": "none", "initramfs": "none"}
    machine = {"type": "q35", "disks": "virtio", "cards": "e1000e"}
    results = {"inspect": found, "fix": {"compatible": True, "machine": machine}}
    html = render({**rich(), "changes": [change], "results": results}, "", None)
    assert "<span>Type: (none) → 1</span><span>- a: 3 → 0</span>" in html
    assert "In the registry" in html and "lines added" not in html
    assert "Windows Server 2022 Standard (build 20348)" in html
    assert "virtio disks, e1000e network cards" in html
    assert "boot loader none" not in html and "initramfs by" not in html


@pytest.mark.parametrize(
    ("status", "changes", "said"),
    [
        ("succeeded", {}, "is defined in libvirt"),
        ("succeeded", {"domain": None}, "No domain was defined"),
        ("succeeded", {"disks": [], "domain": None}, "not asked to write any disk"),
        ("succeeded", {"dry_run": True}, "Nothing was written"),
        ("retrying", {}, "The next attempt is due at 2026-11-24 18:00:00 UTC"),
        ("blocked", {}, "until a person changes something"),
        ("cancelled", {}, "The migration was cancelled"),
    ],
)
def test_the_outcome_is_said_in_words(status: str, changes: dict[str, Any], said: str) -> None:
    assert said in render({**rich(), "status": status, **changes}, "", None)


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": float("inf")},
        {"attempts": 10**4000},
        {"results": {"boot": {"outcome": "passed", "reason": "", "seconds": "5"}}},
        {"results": {"fix": {"proofs": 1}}},
        {"stages": [1]},
        {"status": "splendid"},
    ],
)
def test_what_is_no_report_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        render({**rich(), **changes}, "", None)


@pytest.mark.parametrize(
    ("began", "seconds"),
    [("yesterday", 1.0), ("0001-01-01T00:00:00+14:00", 1e17), ("2026-11-24T17:13:15", -1.0), ("", 0)],
)
def test_strange_times_are_shown_as_they_are(began: str, seconds: float) -> None:
    stages = [{"name": "plan", "status": "done", "started_at": began, "seconds": seconds}]
    html = render({**rich(), "started_at": began, "seconds": seconds, "stages": stages}, "", None)
    assert "plan" in html


def test_what_is_deep_inside_of_hostile_results_ends_somewhere() -> None:
    deep: dict[str, Any] = {}
    for _ in range(900):
        deep = {"a": deep}
    assert "…" in render({**rich(), "overrides": deep}, "", None)


def test_only_the_end_of_a_long_log_is_shown() -> None:
    html = render(rich(), "".join(f"line {number}.\n" for number in range(1000)), None)
    assert (False, True, True) == ("line 799." in html, "line 800." in html, "line 999." in html)


def test_the_template_is_package_data_and_in_the_wheel(tmp_path: Path) -> None:
    template = resources.files("hyper2kvmd.report").joinpath("page.html.j2")
    assert template.is_file()
    # A build writes beside the sources.
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "hyper2kvmd", tmp_path / "hyper2kvmd", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-index", "--no-build-isolation", "-w", "dist"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert template.read_bytes() == zipfile.ZipFile(wheel).read("hyper2kvmd/report/page.html.j2")
    assert {"campaign.html.j2", "style.css"} <= {Path(name).name for name in zipfile.ZipFile(wheel).namelist()}


def test_report_prints_what_show_prints_of_it(migrated: tuple[Path, Settings]) -> None:
    _, settings = migrated
    printed = command(settings, "web01").stdout
    config = settings.work_dir.parent / "settings.json"
    show = [sys.executable, "-m", "hyper2kvmd.ctl", "show", "web01", "--config", str(config)]
    shown = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("status     succeeded\n")
    assert shown.endswith(printed)


def test_report_prints_json_and_nothing_else(migrated: tuple[Path, Settings], tmp_path: Path) -> None:
    export, settings = migrated
    for more in ((), ("--html", str(tmp_path / "web01.html"))):
        assert report_of(export) == json.loads(command(settings, "web01", "--json", *more).stdout)
    assert (tmp_path / "web01.html").exists()


def test_the_page_replaces_an_old_one_and_goes_to_standard_output(
    migrated: tuple[Path, Settings], tmp_path: Path
) -> None:
    _, settings = migrated
    path = tmp_path / "web01.html"
    path.write_text("old")
    done = command(settings, "web01", "--html", str(path))
    assert (0, f"wrote {path}\n") == (done.returncode, done.stdout)
    assert path.read_text() == command(settings, "web01", "--html", "-").stdout
    assert [path] == list(tmp_path.iterdir())
    assert 0o640 == path.stat().st_mode & 0o777


def test_two_things_on_standard_output_are_a_usage_error(migrated: tuple[Path, Settings]) -> None:
    done = command(migrated[1], "web01", "--json", "--html", "-")
    assert (2, "") == (done.returncode, done.stdout)
    assert "give --html a file" in done.stderr


@pytest.mark.parametrize(
    ("path", "why"), [("none/web01.html", "No such file"), ("", "not a plain file"), ("file/x", "Not a directory")]
)
def test_a_page_that_cannot_be_written_is_said_so(
    migrated: tuple[Path, Settings], tmp_path: Path, path: str, why: str
) -> None:
    (tmp_path / "file").touch()
    done = command(migrated[1], "web01", "--html", str(tmp_path / path))
    assert 4 == done.returncode
    assert str(tmp_path / path) in done.stderr
    assert why in done.stderr
    assert [tmp_path / "file"] == list(tmp_path.iterdir())


def test_an_unknown_export_is_not_found(ctl: Ctl) -> None:
    done = ctl("report", "nobody")
    assert 3 == done.returncode
    assert "nobody: no export of this name" in done.stderr


@pytest.mark.parametrize(
    ("wish", "said"),
    [(None, "it is queued; the daemon migrates it, or `hyper2kvmctl migrate"), ("hold", "`hyper2kvmctl release`")],
)
def test_an_export_without_a_report_says_its_state_and_the_remedy(
    ctl: Ctl, make_export: MakeExport, wish: str | None, said: str
) -> None:
    export = make_export()
    if wish is not None:
        (export / f".hyper2kvmd.{wish}").touch()
    done = ctl("report", "web01", "--html", "-")
    assert (3, "") == (done.returncode, done.stdout)
    assert f"{export} has no report yet" in done.stderr
    assert said in done.stderr


@pytest.mark.parametrize("content", ["{", "[]", '{"status": "succeeded"}'])
def test_a_file_that_is_no_report_is_said_to_be_none(ctl: Ctl, make_export: MakeExport, content: str) -> None:
    (make_export() / "migration-report.json").write_text(content)
    done = ctl("report", "web01")
    assert 3 == done.returncode
    assert "web01/migration-report.json is not a report of this program" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hostile_report_goes_to_the_terminal_without_control_characters(ctl: Ctl, make_export: MakeExport) -> None:
    export = make_export()
    (export / "migration-report.json").write_text(json.dumps(with_text(rich(), HOSTILE[5] + HOSTILE[7])))
    done = ctl("report", "web01")
    assert 0 == done.returncode, done.stderr
    assert SHOWN[5] in done.stdout
    assert "\x1b" not in done.stdout
    assert 0 == ctl("report", "web01", "--json").returncode


def test_what_lies_beside_the_report_is_read_only_if_it_is_the_reports_own(
    ctl: Ctl, make_export: MakeExport, tmp_path: Path
) -> None:
    export = make_export()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "second").write_text("secret")
    (export / "migration-report.json").write_text(json.dumps(rich()))
    (export / ".hyper2kvmd.log").symlink_to(tmp_path / "secret")
    html = ctl("report", "web01", "--html", "-").stdout
    assert "secret" not in html
    # The manifest in the export is another one, so nothing is said of it.
    assert "the hardware at the source is not shown" in html
    (export / ".hyper2kvmd.log").unlink()
    (export / ".hyper2kvmd.log").hardlink_to(tmp_path / "second")
    assert "secret" not in ctl("report", "web01", "--html", "-").stdout


def test_a_screenshot_of_an_earlier_attempt_is_not_shown(ctl: Ctl, make_export: MakeExport) -> None:
    export = make_export()
    (export / "boot-test.png").write_bytes(png())
    document = rich()
    for named, shown in (("boot-test.png", True), (None, False)):
        document["results"]["boot"]["screenshot"] = named
        (export / "migration-report.json").write_text(json.dumps(document))
        assert shown is ("<img" in ctl("report", "web01", "--html", "-").stdout)
