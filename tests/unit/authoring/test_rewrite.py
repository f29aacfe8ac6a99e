"""Manifests changed as documents: what is meant changes, and nothing else does."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hyper2kvmd.authoring.rewrite import Dialect, Measured, Rewritten, dump, rehash, relocate, upgrade
from hyper2kvmd.manifest import Manifest, ManifestError, document, parse
from tests import DATA

MANIFESTS = DATA / "manifests"
NAMES = ("seed.json", "go-vsphere.json", "go-everything.json", "go-everything.yaml")
DIALECTS: tuple[Dialect, ...] = ("seed", "go")


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = document.load((MANIFESTS / name).read_bytes(), name)
    return content


def read(content: dict[str, Any]) -> Manifest:
    return parse(dump(content, "manifest.json"), "manifest.json")


def meaning(manifest: Manifest) -> dict[str, Any]:
    """What a manifest asks for, without how it says it."""
    said = manifest.model_dump(exclude={"sha256", "dialect", "warnings"})
    said["format"] = said["stages"]["convert"].pop("format") or said["output"].pop("format")
    said["directory"] = said["stages"]["convert"].pop("output_dir") or said["output"].pop("directory")
    said["output"] = said["output"]["filename"]
    if not said["stages"]["fix"]["fstab"]:
        del said["stages"]["fix"]["fstab_mode"]
    for disk in said["disks"]:
        del disk["boot_order"]
    said["order"] = [disk.id for disk in manifest.ordered()]
    return said


# dump -----------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT | st.from_regex(r"[-+.0-9eE:_xo]{1,12}", fullmatch=True)
CONTENT = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=12)


@given(st.dictionaries(TEXT, CONTENT))
def test_what_is_dumped_is_loaded_as_the_same(content: dict[str, Any]) -> None:
    for name in ("manifest.json", "manifest.yaml"):
        loaded = document.load(dump(content, name), name)
        assert content == loaded
        assert repr(content) == repr(loaded)  # also the types, and the order of the keys


def test_yaml_has_neither_aliases_nor_quotes_without_need() -> None:
    same = {"enabled": True}
    assert b"a:\n  enabled: true\nb:\n  enabled: true\nc: plain words\nd: \"1e3\"\ne: 'no'\n" == dump(
        {"a": same, "b": same, "c": "plain words", "d": "1e3", "e": "no"}, "manifest.yaml"
    )


@pytest.mark.parametrize("name", ["manifest.json", "manifest.yaml"])
def test_half_a_character_is_an_error_with_its_reader_and_not_before(name: str) -> None:
    with pytest.raises(ManifestError):
        document.load(dump({"notes": ["\ud800"]}, name), name)


# rehash ---------------------------------------------------------------------------------------------------


def test_rehash_changes_what_is_wrong_and_nothing_else() -> None:
    before = {**load("seed.json"), "x-ours": {"b": 1, "a": [None, 2.5]}}
    kept = copy.deepcopy(before)
    old = before["disks"][0]["checksum"]
    after, changes = rehash(before, [Measured("1" * 64, None), Measured(old.removeprefix("sha256:"), 77)])
    assert kept == before
    assert (
        Rewritten("disks[0].checksum", old, "sha256:" + "1" * 64),
        Rewritten("disks[1].bytes", 1073741824, 77),
    ) == changes
    kept["disks"][0]["checksum"] = "sha256:" + "1" * 64
    kept["disks"][1]["bytes"] = 77
    assert json.dumps(kept) == json.dumps(after)  # the order of the keys, too


def test_rehash_gives_a_checksum_to_a_disk_that_has_none() -> None:
    before = load("go-everything.json")
    first = before["disks"][0]["checksum"].removeprefix("sha256:")
    after, changes = rehash(before, [Measured(first, None), Measured("2" * 64, None)])
    assert (Rewritten("disks[1].checksum", None, "sha256:" + "2" * 64),) == changes
    assert ("2" * 64) == read(after).disks[1].sha256


def test_a_checksum_in_capitals_is_right() -> None:
    before = load("go-vsphere.json")
    digest = before["disks"][0]["checksum"].removeprefix("sha256:")
    before["disks"][0]["checksum"] = f"sha256:{digest.upper()}"
    assert (before, ()) == rehash(before, [Measured(digest, None)])


# relocate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("/var/lib/hypersdk/exports/shop-01", "/mnt/new", "/mnt/new/shop-01-disk-0.vmdk"),
        ("/var/lib/hypersdk/", "/mnt/new/", "/mnt/new/exports/shop-01/shop-01-disk-0.vmdk"),
        ("/var/lib/hypersdk/exports/shop-01", "", "shop-01-disk-0.vmdk"),
        ("/var/lib/hypersdk/exports/shop-01", "disks", "disks/shop-01-disk-0.vmdk"),
        ("/", "/srv", "/srv/var/lib/hypersdk/exports/shop-01/shop-01-disk-0.vmdk"),
    ],
)
def test_relocate_replaces_whole_directories(old: str, new: str, expected: str) -> None:
    after, changes = relocate(load("go-vsphere.json"), old, new)
    assert expected == after["disks"][0]["local_path"]
    assert "disks[0].local_path" == changes[0].field


@pytest.mark.parametrize("old", ["/var/lib/hypersdk/exports/shop", "var/lib", "/mnt", "exports"])
def test_relocate_leaves_other_paths_alone(old: str) -> None:
    before = load("go-vsphere.json")
    assert (before, ()) == relocate(before, old, "/mnt/new")


def test_the_export_as_its_own_output_directory_moves_along() -> None:
    after, _ = relocate(load("go-vsphere.json"), "/var/lib/hypersdk/exports/shop-01", "/mnt/new")
    assert "/mnt/new" == after["output"]["directory"]
    before = load("go-everything.json")
    after, _ = relocate(before, "/var/lib", "/mnt/new")  # where it goes is no place where a disk was
    assert before["output"] == after["output"]


# upgrade --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format", ["manifest.json", "manifest.yaml"])
def test_every_manifest_is_written_as_it_was_read(name: str, format: str) -> None:
    before = load(name)
    after = document.load(dump(before, format), format)
    assert json.dumps(before) == json.dumps(after)


def test_a_seed_manifest_becomes_what_the_go_exporter_writes() -> None:
    after, warnings = upgrade(load("seed.json"), "go")
    manifest = read(after)
    assert "go" == manifest.dialect
    assert {"production": "", "mail": ""} == after["metadata"]["tags"]
    assert {
        "inspect": {"enabled": True, "collect_guest_info": True},
        "fix": {
            "enabled": True,
            "backup": False,
            "print_fstab": False,
            "update_grub": True,
            "regen_initramfs": True,
            "fstab_mode": "stabilize-all",
            "remove_vmware_tools": False,
        },
        "convert": {"enabled": True, "compress": False},
        "validate": {"enabled": True, "check_image_integrity": True},
    } == after["pipeline"]
    assert {"directory": "/srv/images", "format": "qcow2"} == after["output"]
    assert ["vm.secure_boot", "pipeline.validate.test_boot"] == [finding.field for finding in warnings]
    assert "the Go exporter's dialect cannot say false here" == warnings[0].message


def test_a_go_manifest_becomes_what_the_guide_shows() -> None:
    after, warnings = upgrade(load("go-everything.json"), "seed")
    manifest = read(after)
    assert "seed" == manifest.dialect
    assert ["env"] == after["metadata"]["tags"]
    assert {
        "inspect": {"enabled": True, "detect_os": True, "detect_kernel": True},
        "fix": {
            "enabled": True,
            "inject_drivers": True,
            "fix_fstab": True,
            "fix_grub": True,
            "regenerate_initramfs": True,
        },
        "convert": {
            "enabled": True,
            "target_format": "raw",
            "compression": True,
            "output_dir": "/var/lib/libvirt/images",
        },
        "validate": {"enabled": False, "verify_checksum": True},
    } == after["pipeline"]
    assert [
        "pipeline.fix.backup",
        "pipeline.fix.remove_vmware_tools",
        "pipeline.convert.compress_level",
        "metadata.tags",
    ] == [finding.field for finding in warnings]


def test_upgrade_keeps_what_both_dialects_have_and_what_nobody_knows() -> None:
    before = {**load("go-everything.json"), "x-ours": [1, {"two": None}]}
    after, _ = upgrade(before, "seed")
    for key in (
        "manifest_version",
        "source",
        "nics",
        "notes",
        "warnings",
        "configuration",
        "output",
        "options",
        "x-ours",
    ):
        assert before[key] == after[key]


def test_a_missing_boot_order_means_the_same_afterwards() -> None:
    def kinds(content: dict[str, Any], hints: tuple[int | None, ...]) -> dict[str, Any]:
        disk = content["disks"][0]
        content["disks"] = [
            {**disk, "id": f"d{number}", "local_path": f"{number}.vmdk", "disk_type": "data", "boot_order_hint": hint}
            for number, hint in enumerate(hints)
        ]
        return content

    for name, dialect in (("seed.json", "go"), ("go-vsphere.json", "seed")):
        for hints in ((None, None, 1), (5, None, 1), (1, None), (2, 1, None)):
            before = kinds(load(name), hints)
            after, _ = upgrade(before, dialect)  # type: ignore[arg-type]  # a tuple's words are text for mypy
            assert read(before).ordered()[0].id == read(after).ordered()[0].id
            assert [disk.id for disk in read(before).ordered()] == [disk.id for disk in read(after).ordered()]


def test_go_has_whole_gib_of_memory() -> None:
    before = load("seed.json")
    for given_gib, expected in ((8.0, 8), (1.5, 1), (0.5, None)):
        before["vm"]["mem_gb"] = given_gib
        after, warnings = upgrade(before, "go")
        assert expected == after["vm"].get("mem_gb")
        assert isinstance(after["vm"].get("mem_gb"), int | None)
        assert (given_gib != expected) == ("vm.mem_gb" in {finding.field for finding in warnings})


def test_upgrade_of_what_is_no_manifest_says_all_that_is_wrong() -> None:
    with pytest.raises(ManifestError) as caught:
        upgrade({**load("seed.json"), "disks": [], "source": {}}, "go")
    assert {"disks", "source.vm_name"} == {problem.field for problem in caught.value.problems}


FLAG = st.sampled_from([None, True, False])


def tables(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Tables that have some of the fields."""
    return st.fixed_dictionaries({}, optional=fields)


STAGES = tables(
    inspect=tables(enabled=FLAG, detect_os=FLAG, detect_kernel=FLAG, collect_guest_info=FLAG),
    fix=tables(
        enabled=FLAG,
        inject_drivers=FLAG,
        fix_fstab=FLAG,
        fix_grub=FLAG,
        regenerate_initramfs=FLAG,
        backup=FLAG,
        print_fstab=FLAG,
        update_grub=FLAG,
        regen_initramfs=FLAG,
        fstab_mode=st.sampled_from([None, "", "stabilize-all", "bypath-only", "noop"]),
        remove_vmware_tools=FLAG,
    ),
    convert=tables(
        enabled=FLAG,
        target_format=st.sampled_from([None, "raw", "qcow2"]),
        compression=FLAG,
        output_dir=st.sampled_from([None, "/srv/one", "/srv/two"]),
        compress=FLAG,
        compress_level=st.sampled_from([None, 0, 6]),
    ),
    validate=tables(enabled=FLAG, verify_checksum=FLAG, test_boot=FLAG, check_image_integrity=FLAG),
)
DOCUMENTS = st.fixed_dictionaries(
    {
        "manifest_version": st.just("1.0"),
        "source": st.just({"vm_name": "web"}),
        "disks": st.lists(
            tables(
                boot_order_hint=st.sampled_from([None, 0, 1, 3]),
                disk_type=st.sampled_from([None, "", "boot", "data"]),
            ),
            min_size=1,
            max_size=4,
        ).map(
            lambda disks: [
                {"id": f"d{number}", "source_format": "raw", "bytes": 1, "local_path": f"{number}.raw", **disk}
                for number, disk in enumerate(disks)
            ]
        ),
    },
    optional={
        "vm": tables(
            firmware=st.sampled_from(["bios", "efi", "uefi"]),
            secure_boot=FLAG,
            secureboot=FLAG,
            mem_gb=st.sampled_from([0.5, 1, 2.25]),
        ),
        "metadata": tables(tags=st.sampled_from([None, [], ["a"], {}, {"a": ""}, {"a": "1", "b": ""}])),
        "pipeline": st.none() | STAGES,
        "output": st.none()
        | tables(
            directory=st.sampled_from([None, "/srv/one"]),
            format=st.sampled_from([None, "raw", "qcow2"]),
            filename=st.just("web.img"),
        ),
    },
)

# What a dialect has no words for, where meaning() has it.
LOST = {
    "vm.mem_gb": ("vm", "memory_mib"),
    "vm.secure_boot": ("vm", "secure_boot"),
    "pipeline.fix.inject_drivers": ("stages", "fix", "drivers"),
    "pipeline.validate.verify_checksum": ("stages", "validate_", "verify_checksum"),
    "pipeline.validate.test_boot": ("stages", "validate_", "test_boot"),
    "pipeline.fix.backup": ("stages", "fix", "backup"),
    "pipeline.fix.print_fstab": ("stages", "fix", "print_fstab"),
    "pipeline.fix.remove_vmware_tools": ("stages", "fix", "remove_vmware_tools"),
    "pipeline.fix.fstab_mode": ("stages", "fix", "fstab_mode"),
    "pipeline.convert.compress_level": ("stages", "convert", "compress_level"),
    "pipeline.validate.check_image_integrity": ("stages", "validate_", "check"),
    "metadata.tags": ("tags",),
}


@settings(max_examples=200)
@given(DOCUMENTS, st.sampled_from(DIALECTS))
def test_whatever_changes_its_meaning_is_warned_of(before: dict[str, Any], dialect: Dialect) -> None:
    try:
        was = meaning(read(before))
    except ManifestError:  # the keys contradict each other
        return
    after, warnings = upgrade(before, dialect)
    now = meaning(read(after))
    for finding in warnings:
        path = LOST[finding.field or ""]
        one, other = was, now
        for key in path[:-1]:
            one, other = one[key], other[key]
        assert one.pop(path[-1], None) != other.pop(path[-1], None) or finding.field == "metadata.tags"
    assert was == now


@settings(max_examples=100)
@given(DOCUMENTS, st.sampled_from(DIALECTS))
def test_what_was_upgraded_is_in_its_dialect_and_stays_as_it_is(before: dict[str, Any], dialect: Dialect) -> None:
    try:
        after, _ = upgrade(before, dialect)
    except ManifestError:
        return
    if dialect == "seed" or (before.get("pipeline") or {}):
        assert dialect == read(after).dialect
    again, warnings = upgrade(after, dialect)
    assert (after, ()) == (again, warnings)


def test_dumped_yaml_is_what_other_programs_read_too() -> None:
    before = load("go-everything.json")
    assert before == yaml.safe_load(dump(before, "manifest.yaml"))
