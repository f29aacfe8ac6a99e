"""hyper2kvmctl plan: from a spreadsheet to machines in libvirt, and what stays where the plan says so."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from pathlib import Path
from xml.etree import ElementTree

from hyper2kvmd.exits import EXIT_CONFIG
from hyper2kvmd.queue.names import REPORT
from hyper2kvmd.settings.model import Settings
from tests.conftest import Ctl, MakeExport, report_of, run_job
from tests.libvirtd import session
from tests.ovf import ENVELOPE

CSV = """vm;wave;name;networks;cpus;memory_mb;mac;notes;hold;not_before
web01;1;shop;user;3;768;new;the shop;;
web02;2;;;;;;;;2099-01-01 20:00
web03;1;;;;;;;yes;
later;2;;;;;;;;
"""


def test_a_spreadsheet_decides_what_each_vm_becomes_and_when(
    ctl: Ctl, scratch: Settings, make_export: MakeExport, tmp_path: Path
) -> None:
    for number in (1, 2, 3):
        mac = f"00:50:56:aa:bb:{number:02}"
        make_export(f"web0{number}", nics=[{"id": "nic-0", "mac": mac, "network": "DMZ"}])
    (tmp_path / "plan.csv").write_text(CSV)
    dry = ctl("plan", "import", tmp_path / "plan.csv", "--dry-run")
    assert (0, False) == (dry.returncode, scratch.plan_dir.exists()), dry.stderr
    done = ctl("plan", "import", tmp_path / "plan.csv", "--json")
    expected = dict.fromkeys(("web01", "web02", "web03", "later"), "new")
    assert expected == json.loads(done.stdout)["plans"]
    again = ctl("plan", "import", tmp_path / "plan.csv")
    assert "0 new, 0 changed, 4 unchanged" in again.stdout

    check = ctl("plan", "check")
    assert 0 == check.returncode
    assert f"{scratch.plan_dir}/later.yaml: no export later in" in check.stderr
    rows = {Path(row["export"]).name: row for row in json.loads(ctl("list", "--json").stdout)}
    assert ["queued", "waiting", "blocked"] == [rows[name]["state"] for name in ("web01", "web02", "web03")]
    assert ("window", "held") == tuple(rows[name]["reason"]["code"] for name in ("web02", "web03"))

    with session(tmp_path) as uri:
        libvirt = {"uri": uri, "import": True, "default_network": "no-such-network"}
        settings = Settings.model_validate({**json.loads(scratch.model_dump_json(by_alias=True)), "libvirt": libvirt})
        ran = {name: run_job(scratch.exports_dir / name, settings, "--if-ready") for name in rows}
        xml = subprocess.run(["virsh", "-c", uri, "dumpxml", "shop"], capture_output=True, text=True, check=True).stdout
    assert 0 == ran["web01"].returncode, ran["web01"].stderr
    assert [] == [name for name in ("web02", "web03") if (scratch.exports_dir / name / REPORT).exists()]
    for part in (">3</vcpu>", "<memory unit='KiB'>786432</memory>", "<interface type='user'>"):
        assert part in xml
    assert "00:50:56:aa:bb:01" not in xml
    report = report_of(scratch.exports_dir / "web01")
    assert ("shop", "1", "the shop") == (report["vm_name"], report["plan"]["wave"], report["plan"]["notes"])
    assert ("none", 0) == (report["estimate"]["confidence"], report["estimate"]["samples"])

    out = ctl("plan", "export").stdout
    table = {row["vm"]: row for row in csv.DictReader(io.StringIO(out, newline=""))}
    assert ["no export", "succeeded", "waiting", "blocked"] == [row["state"] for _, row in sorted(table.items())]
    assert ("user", "yes", "2099-01-01T20:00:00") == (
        *(table["web01"]["networks"], table["web03"]["hold"], table["web02"]["not_before"][:19]),
    )
    (tmp_path / "again.csv").write_text(out)
    assert "0 new, 0 changed, 4 unchanged" in ctl("plan", "import", tmp_path / "again.csv").stdout


# VMware's fifth adapter is beside the first one, so that a kernel that counts its cards finds it second.
SLOTS = (160, 192, 224, 256, 1184)
CARD = (
    "<Item><ResourceType>10</ResourceType><ResourceSubType>VmxNet3</ResourceSubType><Address>{}</Address>"
    '<Config key="slotInfo.pciSlotNumber" value="{}"/></Item>'
)


def test_cards_are_in_the_order_in_which_the_guest_found_them_each_with_its_own_network(
    scratch: Settings, make_export: MakeExport, tmp_path: Path
) -> None:
    macs = [f"00:50:56:aa:bb:{number:02}" for number in range(5)]
    export = make_export("fw01", nics=[{"mac": mac, "network": "DMZ"} for mac in macs])
    cards = "".join(CARD.format(mac, slot) for mac, slot in zip(macs, SLOTS, strict=True))
    (export / "fw01.ovf").write_text(ENVELOPE.format(cards))
    scratch.plan_dir.mkdir()
    (scratch.plan_dir / "fw01.yaml").write_text("networks: [null, null, null, null, lan5]\n")
    (tmp_path / "lan5.xml").write_text(
        "<network><name>lan5</name><forward mode='bridge'/><bridge name='br5'/></network>"
    )
    with session(tmp_path) as uri:
        subprocess.run(["virsh", "-q", "-c", uri, "net-create", tmp_path / "lan5.xml"], check=True, capture_output=True)
        libvirt = {"uri": uri, "import": True, "default_network": "user"}
        settings = Settings.model_validate({**json.loads(scratch.model_dump_json(by_alias=True)), "libvirt": libvirt})
        done = run_job(export, settings)
        assert 0 == done.returncode, done.stderr
        xml = subprocess.run(["virsh", "-c", uri, "dumpxml", "fw01"], capture_output=True, text=True, check=True).stdout
    found = ElementTree.fromstring(xml).findall("devices/interface")
    assert [macs[number] for number in (0, 4, 1, 2, 3)] == [
        mac.get("address") for one in found if (mac := one.find("mac")) is not None
    ]
    assert ["user", "network", "user", "user", "user"] == [one.get("type") for one in found]
    # And a kernel finds them in that order: it goes along the buses.
    at = [address for one in found for address in one.findall("address")]
    places = [tuple(int(address.get(key, "0"), 16) for key in ("bus", "slot")) for address in at]
    assert 5 == len(places)
    assert sorted(places) == places


def test_a_bad_spreadsheet_changes_no_plan(ctl: Ctl, scratch: Settings, tmp_path: Path) -> None:
    (tmp_path / "plan.csv").write_text("vm,cpus,wave\nweb01,2,1\nweb02,two,1\n")
    done = ctl("plan", "import", tmp_path / "plan.csv", "--set", 'waves={"2": {}}')
    assert EXIT_CONFIG == done.returncode
    assert "plan.csv:3: cpus" in done.stderr
    assert "web01: wave: there is no wave '1'" in done.stderr
    assert not scratch.plan_dir.exists()
    assert 3 == ctl("plan", "import", tmp_path / "missing.csv").returncode


def test_check_finds_what_is_wrong_with_any_plan(ctl: Ctl, scratch: Settings, make_export: MakeExport) -> None:
    make_export("web01")
    make_export("web02")
    scratch.plan_dir.mkdir()
    for name, text in (
        ("web01.yaml", "name: shop\nnot_after: 2020-01-01 00:00\n"),
        ("web02.yaml", "name: shop\n"),
        ("web1.yaml", "hold: true\n"),
        ("web03.yml", "hold: true\n"),
        ("bad.yaml", "hold: perhaps\n"),
    ):
        (scratch.plan_dir / name).write_text(text)
    done = ctl("plan", "check", "--json")
    assert EXIT_CONFIG == done.returncode
    shape = json.loads(done.stdout)
    problems, warnings = ([one["message"] for one in shape[key]] for key in ("problems", "warnings"))
    assert [f"{scratch.plan_dir}/bad.yaml:1: hold", "web02.yaml: name: shop is the name of web01"] == [
        problems[0].partition(": Input")[0],
        problems[1].partition("plan.d/")[2].partition(", too")[0],
    ]
    assert ["bad.yaml: no export", "web01.yaml: the window", "web03.yml is not", "web1.yaml: no export"] == sorted(
        " ".join(text.partition("plan.d/")[2].split()[:3]) for text in warnings
    )
    assert any(one["hint"] == "Did you mean web01?" for one in shape["warnings"])


def test_networks_for_more_cards_than_the_vm_has_block_it(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export(nics=[{"id": "nic-0", "mac": "00:50:56:aa:bb:01", "network": "DMZ"}])
    scratch.plan_dir.mkdir()
    (scratch.plan_dir / "web01.yaml").write_text("networks: [user, user]\n")
    run_job(export, scratch)
    error = report_of(export)["error"]
    assert ("plan_invalid", "vm.networks") == (error["code"], error["field"])
    assert "for 2 network cards, and the VM has 1" in error["message"]


def test_a_mistake_is_found_by_a_dry_run_too_and_a_word_of_a_person_goes_before_the_plan(
    ctl: Ctl, scratch: Settings, make_export: MakeExport, tmp_path: Path
) -> None:
    export = make_export()
    scratch.plan_dir.mkdir()
    plan = scratch.plan_dir / "web01.yaml"
    plan.write_text("nam: shop\n")
    done = ctl("migrate", export, "--dry-run")
    assert 1 == done.returncode
    assert f"{plan}:1: nam: unknown setting; did you mean name?" in done.stdout + done.stderr
    plan.write_text(f"name: shop\noutput_dir: {tmp_path}/nowhere\nnot_before: 2099-01-01 00:00\n")
    done = ctl("migrate", export, "--name", "mine", "--output-dir", scratch.output_dir)
    assert 0 == done.returncode, done.stdout + done.stderr
    assert "mine" == report_of(export)["vm_name"]
    assert (scratch.output_dir / "mine-disk-0.qcow2").exists()


def test_a_host_that_sees_another_plan_takes_no_job(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export()
    done = run_job(export, scratch, "--if-ready", "--as-before", "--submitted-by", "0", "head", "--planned", "0123")
    assert EXIT_CONFIG == done.returncode
    assert not (export / REPORT).exists()


def test_estimates_learn_from_what_was_migrated(ctl: Ctl, scratch: Settings, make_export: MakeExport) -> None:
    make_export("first")
    before = json.loads(ctl("plan", "estimate", "--json").stdout)
    assert ("none", 0) == (before["total"]["confidence"], before["total"]["samples"])
    assert 0 == ctl("batch", scratch.exports_dir).returncode
    make_export("second")
    (scratch.plan_dir).mkdir()
    (scratch.plan_dir / "second.yaml").write_text("wave: '1'\n")
    after = json.loads(ctl("plan", "estimate", "--json").stdout)
    assert ["second"] == [vm["vm"] for vm in after["vms"]]
    assert 1 == after["vms"][0]["estimate"]["samples"]
    assert after["total"]["seconds"] < before["total"]["seconds"]
    assert after["waves"]["1"] == after["total"]
    text = ctl("plan", "estimate").stdout
    assert "second" in text and "low" in text
    assert "about" in ctl("list").stdout


def test_a_batch_does_not_wait_for_windows(ctl: Ctl, scratch: Settings, make_export: MakeExport) -> None:
    make_export("now")
    make_export("later")
    scratch.plan_dir.mkdir()
    (scratch.plan_dir / "later.yaml").write_text("not_before: 2099-01-01 00:00\n")
    done = ctl("batch", scratch.exports_dir)
    assert 75 == done.returncode
    assert "1 waiting, 1 succeeded" == done.stdout.splitlines()[-1]
    assert "its window begins at 2099-01-01" in done.stdout
