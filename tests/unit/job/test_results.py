"""The results of stages: values in the program, the same plain data as ever in the report and the journal of steps."""

from __future__ import annotations

import dataclasses
import json

import pytest
from pydantic import ValidationError

from hyper2kvmd.domain.model import Machine
from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Named, Proof
from hyper2kvmd.guest.linux.devices import Device
from hyper2kvmd.job.context import Record
from hyper2kvmd.job.results import Booted, Checked, Converted, Fixed, Imported, Inspected, Results, Validated
from hyper2kvmd.report.model import ChangeRecord, DiskRecord, StageRecord
from hyper2kvmd.report.results import Results as Shown
from tests.unit.guest.linux.test_fix import VIRTIO, image, inspection

FOUND = inspection(image("6.1.0", *VIRTIO), image("5.10.0", *VIRTIO, entry=1))
DEVICES = (Device("/dev/sda1", "ext4", "0123", "root"), Device("/dev/sda2", "swap"))
MACHINE = Machine("q35", "virtio", "virtio")
PROOFS = (Proof("/boot/initrd", "6.1.0 has virtio_blk", True, "the initramfs holds virtio_blk"),)
NAMES = (Named("/etc/fstab", 1, "/", "/dev/sda2", "UUID=fe88be10", "disk-0, partition 2", "found by looking"),)


def results() -> Results:
    return Results(
        inspect=Inspected.of(dataclasses.replace(FOUND, filesystems=DEVICES), "disk-0"),
        fix=Fixed(drivers_injected=("virtio_blk",), boot_updated=True, proofs=PROOFS, machine=MACHINE, names=NAMES),
        validate=Validated(all_valid=True, disks={"disk-0": Checked(checked=True, compared=False)}),
        boot=Booted(outcome="passed", reason="login prompt", seconds=31.5, serial_log="boot-test.log"),
        convert=Converted(disks={"disk-0": "/images/a.qcow2"}, format="qcow2", compressed=False),
        **{"import": Imported(domain="a", uuid="b", machine=MACHINE)},
    )


def test_the_report_has_what_was_inspected_with_the_boot_disk_and_the_first_kernel() -> None:
    shape = json.loads(json.dumps(results().as_json()["inspect"]))
    plain = dataclasses.asdict(dataclasses.replace(FOUND, menu=None, filesystems=DEVICES))
    del plain["menu"], plain["warnings"], plain["names"], plain["windows"]
    assert {**json.loads(json.dumps(plain)), "boot_disk": "disk-0", "kernel_version": "6.1.0"} == shape


def test_the_report_has_what_was_fixed_and_the_machine_that_was_proved() -> None:
    shape = results().as_json()["fix"]
    assert {
        "drivers_injected": ["virtio_blk"],
        "boot_updated": True,
        "proofs": [dataclasses.asdict(PROOFS[0])],
        "compatible": False,
        "machine": {"type": "q35", "disks": "virtio", "cards": "virtio"},
        "names": [dataclasses.asdict(NAMES[0])],
    } == shape
    assert shape["machine"] == results().as_json()["import"]["machine"]


def test_what_no_stage_found_is_not_in_the_report() -> None:
    assert {} == Results().as_json()
    assert ["validate"] == [*Results(validate=Validated(all_valid=None, disks={})).as_json()]


def test_the_fstab_is_there_only_if_it_was_asked_for() -> None:
    fixed = Fixed(drivers_injected=(), boot_updated=False, proofs=(), machine=MACHINE)
    assert "fstab" not in fixed.as_json()
    asked = fixed.model_copy(update={"fstab": {"before": "a", "after": "b"}})
    assert {"before": "a", "after": "b"} == asked.as_json()["fstab"]


def test_a_record_comes_back_from_the_journal_as_it_was() -> None:
    record = Record(
        warnings=[Finding("a", "b", "c", "d"), Finding("a", "b", "c")],
        stages=[StageRecord(name="inspect", status="done", started_at="x", seconds=1.0)],
        results=results(),
        disks=[DiskRecord(id="a", source="b", source_format="raw", source_bytes=1, virtual_size=1)],
        changes=[ChangeRecord(fixer="a", path="b", summary="c")],
        tools={"qemu-img": "7.2"},
    )
    assert record == Record.load(json.loads(json.dumps(record.dump())))


@pytest.mark.parametrize("key", ["os_type", "boot_disk", "kernels"])
def test_a_journal_that_lacks_something_is_none(key: str) -> None:
    content = Record(results=results()).dump()
    del content["results"]["inspect"][key]
    with pytest.raises(ValidationError):
        Record.load(content)


def test_an_earlier_attempt_fills_in_what_this_one_has_not_done() -> None:
    now = Record(results=Results(boot=Booted(outcome="failed", reason="", seconds=1.0)), tools={"libvirt": "9"})
    now.take_over(Record(results=results(), tools={"libvirt": "8", "qemu-img": "7.2"}))
    assert now.results.boot is not None and now.results.inspect is not None
    assert ("failed", "linux") == (now.results.boot.outcome, now.results.inspect.os_type)
    assert {"libvirt": "9", "qemu-img": "7.2"} == now.tools


def test_whoever_shows_a_report_understands_these_results() -> None:
    shown = Shown.model_validate(json.loads(json.dumps(results().as_json())))
    assert shown.inspect is not None and shown.fix is not None and shown.boot is not None
    assert ("RHEL", "virtio_blk", 31.5) == (
        shown.inspect.product_name, shown.fix.drivers_injected[0], shown.boot.seconds
    )  # fmt: skip
