"""The manifest reader: both dialects come out as one model, and all that is wrong is said, with its place."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr

import hyper2kvmd
from hyper2kvmd.errors import Code
from hyper2kvmd.manifest import Manifest, ManifestError, parse, wire
from hyper2kvmd.manifest.model import Configuration, Interface, Options, Output, Services, Stages, User, slug
from tests import DATA
from tests.pace import work_of_at_most

MANIFESTS = DATA / "manifests"
SEED = json.loads((MANIFESTS / "seed.json").read_bytes())
GO = json.loads((MANIFESTS / "go-vsphere.json").read_bytes())


def load(name: str) -> Manifest:
    return parse((MANIFESTS / name).read_bytes(), name)


def read(content: Any) -> Manifest:
    return parse(json.dumps(content).encode(), "manifest.json")


def changed(path: str, value: Any, base: dict[str, Any] = SEED) -> dict[str, Any]:
    """A copy of a manifest with one field set (`disks.0.id`); `...` removes it."""
    content = copy.deepcopy(base)
    place: Any = content
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        place = place[part] if isinstance(part, int) else place.setdefault(part, {})
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


def failure(data: bytes, name: str = "manifest.json") -> ManifestError:
    with pytest.raises(ManifestError) as caught:
        parse(data, name)
    assert caught.value.problems
    for problem in caught.value.problems:
        assert problem.message
        assert problem.hint
    assert str(caught.value).replace("\n  ", "").isprintable()
    return caught.value


# Both dialects --------------------------------------------------------------------------------------------


def test_seed_manifest_is_read_in_full() -> None:
    manifest = load("seed.json")
    assert (manifest.version, manifest.dialect, manifest.vm_name, manifest.slug) == (
        "1.0",
        "seed",
        "mail-server",
        "mail-server",
    )
    assert manifest.sha256 == hashlib.sha256((MANIFESTS / "seed.json").read_bytes()).hexdigest()
    assert (manifest.vm.cpu, manifest.vm.memory_mib, manifest.vm.firmware) == (4, 8192, "uefi")
    assert manifest.vm.secure_boot is False
    assert [disk.format for disk in manifest.disks] == ["vmdk", "vhdx"]
    assert manifest.disks[0].sha256 == hashlib.sha256(b"").hexdigest()
    assert (manifest.disks[0].boot_order, manifest.disks[1].boot_order) == (0, None)
    stages = manifest.stages
    assert stages.inspect.enabled and stages.fix.enabled and stages.convert.enabled and stages.validate_.enabled
    assert (stages.convert.format, stages.convert.compress, stages.convert.output_dir) == (
        "qcow2",
        False,
        "/srv/images",
    )
    assert (stages.validate_.verify_checksum, stages.validate_.test_boot) == (True, False)
    assert manifest.tags == {"production": "", "mail": ""}
    assert (manifest.job_id, manifest.hypersdk_version) == ("job-123", "0.0.1")
    assert manifest.notes == ("Grüße aus Köln",)
    assert manifest.warnings == ()


def test_manifest_of_the_vsphere_exporter_is_read() -> None:
    manifest = load("go-vsphere.json")
    assert (manifest.dialect, manifest.vm.firmware, manifest.vm.secure_boot) == ("go", "uefi", None)
    assert manifest.boot_disk().id == "disk-1"
    assert manifest.nics == ()
    assert (manifest.stages.convert.format, manifest.output.format) == (None, "qcow2")
    assert (manifest.stages.convert.compress, manifest.stages.fix.remove_vmware_tools) == (True, True)
    assert manifest.stages.fix.drivers
    assert manifest.tags["export_format"] == "ovf"
    assert manifest.warnings == ()


def test_everything_that_the_go_library_writes_is_read() -> None:
    manifest = load("go-everything.yaml")
    assert manifest.vm.secure_boot is True
    assert [disk.id for disk in manifest.ordered()] == ["disk-0", "data_1"]
    assert [(nic.mac, nic.network) for nic in manifest.nics] == [
        ("00:50:56:aa:bb:01", "VM Network"),
        ("52:54:00:12:34:56", "Storage VLAN 20"),
    ]
    assert manifest.output.filename == "shop.img"
    assert (manifest.options.dry_run, manifest.options.verbose) == (True, 2)
    assert "report.json" == manifest.options.report_path
    assert manifest.exporter_warnings == ("export: CBT was disabled",)
    assert manifest.configuration == Configuration(hostname="shop")
    assert not manifest.stages.validate_.enabled
    assert manifest.export_timestamp == "2026-11-23T22:26:38.470792675Z"
    assert {warning.field for warning in manifest.warnings} == {
        "disks[1].checksum",
        "pipeline.convert",
        "pipeline.convert.compress_level",
        "options.verbose",
    }


@pytest.mark.parametrize("name", ["seed.json", "go-vsphere.json", "go-everything.json"])
def test_json_and_yaml_say_the_same(name: str) -> None:
    content = json.loads((MANIFESTS / name).read_bytes())
    one = read(content).model_dump(exclude={"sha256"})
    for style in (None, '"', "'"):
        text = (
            yaml.safe_dump(content, allow_unicode=True, default_style=style)
            if style is None
            else yaml.safe_dump(content)
        )
        assert parse(text.encode(), "manifest.yaml").model_dump(exclude={"sha256"}) == one
    assert parse((MANIFESTS / name).read_bytes(), "manifest.yml").model_dump(exclude={"sha256"}) == one
    if name == "go-everything.json":
        assert load("go-everything.yaml").model_dump(exclude={"sha256"}) == one


def test_unquoted_yaml_keeps_what_was_written() -> None:
    text = (MANIFESTS / "go-everything.yaml").read_text()
    text = text.replace("00:50:56:AA:BB:01", "52:54:00:12:34:55").replace('"1.0"', "1.0")
    text = text.replace("vm_name: shop-01", "vm_name: 0123_no").replace("vm_id: vm-4711", "vm_id: no")
    manifest = parse(text.encode(), "manifest.yaml")
    assert (manifest.nics[0].mac, manifest.vm_name, manifest.vm_id) == ("52:54:00:12:34:55", "0123_no", "no")


# What is left out -----------------------------------------------------------------------------------------


def disks(*rows: tuple[str, int | None, str | None]) -> list[dict[str, Any]]:
    return [
        {
            "id": id,
            "source_format": "raw",
            "bytes": 1,
            "local_path": f"{id}.raw",
            **({} if hint is None else {"boot_order_hint": hint}),
            **({} if kind is None else {"disk_type": kind}),
        }
        for id, hint, kind in rows
    ]


@pytest.mark.parametrize(
    ("dialect", "rows", "order"),
    [
        ("seed", [("a", None, None), ("b", None, None)], "ab"),
        ("seed", [("a", 1, "data"), ("b", 0, "boot")], "ba"),
        ("seed", [("a", 0, "data"), ("b", 5, "boot")], "ba"),
        ("seed", [("a", 2, "boot"), ("b", 1, "boot")], "ba"),
        ("seed", [("a", None, "boot"), ("b", 1, "boot"), ("c", None, None)], "abc"),
        ("seed", [("a", 1, None), ("b", None, None), ("c", 0, None)], "cab"),
        ("go", [("a", 1, None), ("b", None, None)], "ba"),
        ("go", [("a", 1, "boot"), ("b", None, "boot")], "ba"),
        ("go", [("a", None, None), ("b", 1, None), ("c", 2, "unknown")], "abc"),
    ],
)
def test_boot_order(dialect: str, rows: list[tuple[str, int | None, str | None]], order: str) -> None:
    manifest = read(changed("disks", disks(*rows), SEED if dialect == "seed" else GO))
    assert manifest.dialect == dialect
    assert "".join(disk.id for disk in manifest.ordered()) == order
    assert manifest.boot_disk().id == order[0]


def test_go_library_leaves_out_what_is_false() -> None:
    content = changed("pipeline.fix", {"enabled": True, "fstab_mode": "noop"}, GO)
    fix = read(content).stages.fix
    assert (fix.fstab, fix.bootloader, fix.initramfs, fix.drivers) == (False, False, False, True)
    fix = read(changed("pipeline.fix", {"enabled": True}, GO)).stages.fix
    assert (fix.fstab, fix.bootloader, fix.initramfs) == (True, True, True)
    fix = read(changed("pipeline.fix", {"enabled": True, "fix_grub": False})).stages.fix
    assert (fix.fstab, fix.bootloader, fix.initramfs) == (True, False, True)


def test_manifest_without_pipeline_wants_every_stage() -> None:
    manifest = read(changed("pipeline", ...))
    stages = manifest.stages
    assert stages.inspect.enabled and stages.fix.enabled and stages.convert.enabled and stages.validate_.enabled
    assert [warning.field for warning in manifest.warnings] == ["pipeline"]


@pytest.mark.parametrize("base", [SEED, GO], ids=["seed", "go"])
@pytest.mark.parametrize(
    ("wish", "stage", "part", "expected"),
    [
        ({"convert": {"compression": True}}, "convert", "compress", True),
        ({"convert": {"compress": False}}, "convert", "compress", False),
        ({"convert": {"target_format": "raw"}}, "convert", "format", "raw"),
        ({"fix": {"update_grub": False}}, "fix", "bootloader", False),
        ({"fix": {"fix_grub": False}}, "fix", "bootloader", False),
        ({"fix": {"regen_initramfs": False}}, "fix", "initramfs", False),
        ({"fix": {"enabled": False}}, "fix", "enabled", False),
        ({"validate": {"test_boot": True}}, "validate_", "test_boot", True),
    ],
)
def test_a_wish_goes_before_what_the_manifest_says_and_changes_nothing_else(
    base: dict[str, Any], wish: dict[str, Any], stage: str, part: str, expected: Any
) -> None:
    data = json.dumps(base).encode()
    plain, wished = parse(data, "m.json"), parse(data, "m.json", wire.Pipeline.model_validate(wish))
    section = getattr(plain.stages, stage).model_copy(update={part: expected})
    stages = plain.stages.model_copy(update={stage: section})
    assert plain.model_copy(update={"stages": stages, "warnings": ()}) == wished.model_copy(update={"warnings": ()})


def test_a_vm_can_be_given_another_name_by_the_same_rules() -> None:
    data = json.dumps(SEED).encode()
    assert "web-02" == parse(data, "m.json", vm_name="web-02").vm_name
    with pytest.raises(ManifestError, match=r"'\.\./x' cannot be the name of a VM"):
        parse(data, "m.json", vm_name="../x")


def test_stage_that_is_not_enabled_is_off_and_said_to_be() -> None:
    manifest = read(changed("pipeline.fix", ...))
    assert not manifest.stages.fix.enabled
    assert [warning.field for warning in manifest.warnings] == ["pipeline.fix.enabled"]
    manifest = read(changed("pipeline.fix.enabled", False))
    assert not manifest.stages.fix.enabled
    assert manifest.warnings == ()


def test_least_manifest_leaves_the_hardware_open_and_gets_warnings() -> None:
    manifest = read({"manifest_version": "1.0", "source": {"vm_name": "x"}, "disks": disks(("a", None, None))})
    assert (manifest.vm.cpu, manifest.vm.memory_mib, manifest.vm.firmware) == (None, None, "unknown")
    assert {warning.field for warning in manifest.warnings} == {"disks[0].checksum", "pipeline"}


@pytest.mark.parametrize(
    ("path", "value", "attribute", "expected"),
    [
        ("vm.firmware", "efi", "vm.firmware", "uefi"),
        ("vm.firmware", "unknown", "vm.firmware", "unknown"),
        ("vm.firmware", "", "vm.firmware", "unknown"),
        ("vm.mem_gb", 0.5, "vm.memory_mib", 512),
        ("vm.mem_gb", 0, "vm.memory_mib", None),
        ("vm.cpu", 0, "vm.cpu", None),
        ("vm.secure_boot", True, "vm.secure_boot", True),
        ("vm.secure_boot", ..., "vm.secure_boot", None),
        ("disks.0.checksum", "sha256:" + "A" * 64, "disks.0.sha256", "a" * 64),
        ("disks.0.disk_type", "", "disks.0.kind", "unknown"),
        ("nics", [{"network": "LAN"}], "nics.0.id", "nic-0"),
        ("nics", [{"mac": ""}], "nics.0.mac", None),
        ("nics", None, "nics", ()),
        ("metadata", None, "tags", {}),
        ("metadata.tags", {"a": "b"}, "tags", {"a": "b"}),
        ("options.verbose", True, "options.verbose", 1),
        ("pipeline.convert.target_format", "raw", "stages.convert.format", "raw"),
        ("pipeline.validate.verify_checksum", False, "stages.validate_.verify_checksum", False),
        ("manifest_version", 1.0, "version", "1.0"),
    ],
)
def test_value_is_normalised(path: str, value: Any, attribute: str, expected: Any) -> None:
    content = changed(path, value)
    if path == "pipeline.convert.target_format":
        del content["output"]
    found: Any = read(content)
    for part in attribute.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    assert found == expected


# The guest's configuration --------------------------------------------------------------------------------

HASH = "$6$rounds=5000$abc$" + "x" * 86
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBGj ann@example.com"


def test_configuration_is_read_in_full() -> None:
    written = {
        "hostname": {
            "hostname": "shop",
            "domain": "example.com",
            "hosts": {"192.0.2.7": "db db.x", "2001:DB8::7": ["c"]},
        },
        "users": {
            "users": [
                {
                    "name": "ann",
                    "uid": 2000,
                    "groups": ["wheel"],
                    "ssh_keys": [KEY],
                    "password_hash": HASH,
                    "lock": None,
                },
                {"name": "bob", "sudo": "NOPASSWD:ALL"},
                {"name": "eve", "sudo": "ALL=(ALL:ALL) ALL"},
            ],
            "disable_users": ["ubuntu"],
        },
        "services": {"enable": ["sshd", "x.timer"], "mask": ["getty@tty1"]},
        "network": {
            "interfaces": [
                {"name": "ens192", "addresses": ["192.0.2.10/24"], "gateway4": "192.0.2.1", "dns": ["192.0.2.53"]},
                {"name": "ens224", "dhcp": True},
                {"name": "LAN-Verbindung (früher) #2", "dhcp": True},
            ]
        },
    }
    assert read(changed("configuration", written)).configuration == Configuration(
        hostname="shop",
        domain="example.com",
        hosts={"192.0.2.7": ("db", "db.x"), "2001:db8::7": ("c",)},
        users=(
            User(name="ann", uid=2000, groups=("wheel",), ssh_keys=(KEY,), password_hash=SecretStr(HASH)),
            User(name="bob", sudo="NOPASSWD: ALL"),
            User(name="eve", sudo="ALL"),
        ),
        disable_users=("ubuntu",),
        services=Services(enable=("sshd.service", "x.timer"), mask=("getty@tty1.service",)),
        interfaces=(
            Interface(name="ens192", addresses=("192.0.2.10/24",), gateway4="192.0.2.1", dns=("192.0.2.53",)),
            Interface(name="ens224", dhcp=True),
            Interface(name="LAN-Verbindung (früher) #2", dhcp=True),
        ),
    )


def test_configuration_without_fix_is_said_to_have_no_effect() -> None:
    content = changed("configuration", {"hostname": {"hostname": "x"}}, changed("pipeline.fix.enabled", False))
    assert [warning.field for warning in read(content).warnings] == ["configuration"]
    assert read(changed("configuration", {}, changed("pipeline.fix.enabled", False))).warnings == ()


@pytest.mark.parametrize(
    "user",
    [
        {"name": "ann", "password_hash": "hunter2hunter2"},
        {"name": "ann", "password_hash": 2222222},
        {"name": "ann", "password_hash": ["hunter2hunter2"]},
        {"name": "ann", "ssh_keys": ["-----BEGIN OPENSSH PRIVATE KEY-----hunter2"]},
    ],
)
def test_no_secret_of_a_user_is_repeated(user: dict[str, Any]) -> None:
    error = failure(json.dumps(changed("configuration", {"users": {"users": [user]}})).encode())
    said = str([problem.as_json() for problem in error.problems]) + str(error)
    assert "hunter2" not in said
    assert "2222222" not in said
    assert "configuration.users.users[0]." in said


# Names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["web-01", "A.b_c", "0", "x" * 64])
def test_slug_of_a_plain_name_is_the_name(name: str) -> None:
    assert slug(name) == name


def test_slugs_of_different_names_differ() -> None:
    names = [
        "db 1",
        "db-1",
        "db/1",
        "Köln",
        "Koln",
        "K-ln",
        "-x",
        "x",
        ".x",
        "x" * 65,
        "x" * 66,
        "日本",
        "中国",
        "..",
        "-",
    ]
    assert len({slug(name) for name in names}) == len(names)


@given(st.text(min_size=1))
def test_slug_is_always_safe(name: str) -> None:
    import re

    try:
        name.encode()
    except UnicodeEncodeError:
        return
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", slug(name))


@pytest.mark.parametrize("name", ["Web Server (old)", "Köln", "日本", "a,b=c", "-n", "x:y"])
def test_names_that_vmware_allows_are_read(name: str) -> None:
    assert read(changed("source.vm_name", name)).vm_name == name


# What is wrong --------------------------------------------------------------------------------------------

WRONG: list[tuple[str, Any, str, str, str]] = [
    # field set, value, path in the finding, in the message, in the hint
    ("source.vm_name", "../../x", "source.vm_name", "'../../x'", "without '/'"),
    ("source.vm_name", "..", "source.vm_name", "'..'", "other than"),
    ("source.vm_name", "", "source.vm_name", "''", "1 to 255"),
    ("source.vm_name", "x" * 256, "source.vm_name", "xxx", "255"),
    ("source.vm_name", "a\nb", "source.vm_name", r"'a\nb'", "Remove"),
    ("source.vm_name", "a\u202eb", "source.vm_name", r"\u202e", "Remove"),
    ("source.vm_name", "a\x00b", "source.vm_name", r"\x00", "UTF-8"),
    ("source.vm_name", "a\ud800b", "source.vm_name", r"\ud800", "UTF-8"),
    ("source.vm_name", 12, "source.vm_name", "12", "quotes"),
    ("source.vm_name", None, "source.vm_name", "null", "text"),
    ("source.vm_name", ..., "source.vm_name", "missing", "Add it"),
    ("source", ..., "source", "missing", "vm_name"),
    ("source", [], "source", "a list", "table"),
    ("vm.cpu", -1, "vm.cpu", "-1", "CPUs"),
    ("vm.cpu", "4", "vm.cpu", "'4'", "number"),
    ("vm.cpu", True, "vm.cpu", "true", "number"),
    ("vm.cpu", 10**6, "vm.cpu", "1000000", "4096"),
    ("vm.cpu", 2.5, "vm.cpu", "2.5", "number"),
    ("vm.mem_gb", -4, "vm.mem_gb", "-4", "GiB"),
    ("vm.firmware", "UEFI", "vm.firmware", "'UEFI'", "Did you mean uefi?"),
    ("vm.secure_boot", "yes", "vm.secure_boot", "'yes'", "true or false"),
    ("vm.os_version", 22.04, "vm.os_version", "22.04", "quotes"),
    ("disks", [], "disks", "0 entries", "1 to 64"),
    ("disks", ..., "disks", "missing", "1 to 64"),
    ("disks", {}, "disks", "a table", "list"),
    ("disks", disks(*((f"d{n}", None, None) for n in range(65))), "disks", "65 entries", "1 to 64"),
    ("disks.0", "x", "disks[0]", "'x'", "disks"),
    ("disks.0.id", "a b", "disks[0].id", "'a b'", "disk-0"),
    ("disks.0.id", "", "disks[0].id", "''", "disk-0"),
    ("disks.0.id", "data-1", "disks[1].id", "already the id of disks[0]", "different"),
    ("disks.0.source_format", "vmdkk", "disks[0].source_format", "'vmdkk'", "Did you mean vmdk?"),
    ("disks.0.source_format", "ova", "disks[0].source_format", "'ova'", "vhdx"),
    ("disks.0.bytes", 0, "disks[0].bytes", "0", "at least 1"),
    ("disks.0.bytes", -5, "disks[0].bytes", "-5", "at least 1"),
    ("disks.0.bytes", "5", "disks[0].bytes", "'5'", "bytes"),
    ("disks.0.bytes", 1.5, "disks[0].bytes", "1.5", "bytes"),
    ("disks.0.local_path", "", "disks[0].local_path", "''", "path"),
    ("disks.0.local_path", "dir/", "disks[0].local_path", "'dir/'", "path"),
    ("disks.0.local_path", "a\tb", "disks[0].local_path", r"'a\tb'", "Remove"),
    ("disks.0.checksum", "a1b2", "disks[0].checksum", "'a1b2'", "sha256sum"),
    ("disks.0.checksum", "sha256:a1b2c3d4e5f6...", "disks[0].checksum", "a1b2c3d4e5f6", "64 hexadecimal"),
    ("disks.0.checksum", "md5:" + "0" * 64, "disks[0].checksum", "md5", "sha256"),
    ("disks.0.checksum", "sha256:" + "0" * 63 + "\n", "disks[0].checksum", r"\n", "sha256"),
    ("disks.0.boot_order_hint", -1, "disks[0].boot_order_hint", "-1", "first"),
    ("disks.0.disk_type", "system", "disks[0].disk_type", "'system'", "boot, data or unknown"),
    ("nics", [{"mac": "00:50:56:aa:bb"}], "nics[0].mac", "'00:50:56:aa:bb'", "six pairs"),
    ("nics", [{"mac": "01:00:5e:00:00:01"}], "nics[0].mac", "01:00:5e", "even"),
    ("nics", [{"mac": "00:50:56:aa:bb:01"}, {"mac": "00-50-56-AA-BB-01"}], "nics[1].mac", "already", "different"),
    ("nics", [{"id": "a"}, {"id": "a"}], "nics[1].id", "already the id of nics[0]", "different"),
    ("metadata.tags", [1], "metadata.tags", "a list", "words"),
    ("pipeline.fix.enabled", "true", "pipeline.fix.enabled", "'true'", "true or false"),
    ("pipeline.fix.enabled", 1, "pipeline.fix.enabled", "1", "true or false"),
    ("pipeline.fix.fstab_mode", "all", "pipeline.fix.fstab_mode", "'all'", "stabilize-all"),
    ("pipeline.convert.target_format", "vdi", "pipeline.convert.target_format", "vdi", "qcow2 or raw"),
    ("pipeline.convert.target_format", "qcow", "pipeline.convert.target_format", "'qcow'", "Did you mean qcow2?"),
    ("pipeline.convert.target_format", "raw", "pipeline.convert.target_format", "contradicts output.format", "Delete"),
    ("pipeline.convert.output_dir", "images", "pipeline.convert.output_dir", "'images'", "in full"),
    ("pipeline.convert.output_dir", "/srv/../etc", "pipeline.convert.output_dir", "..", "without '..'"),
    ("pipeline.convert.compress", True, "pipeline.convert.compression", "contradicts", "Delete"),
    ("output.format", "vdi", "output.format", "vdi", "qcow2 or raw"),
    ("output.filename", "../x.img", "output.filename", "'../x.img'", "without a directory"),
    ("output.filename", "-x", "output.filename", "'-x'", "must not start"),
    ("output.filename", "/etc/x", "output.filename", "'/etc/x'", "without a directory"),
    ("options.report.path", "a/b.json", "options.report.path", "'a/b.json'", "without a directory"),
    ("configuration.hostname", {"hostname": "a_b"}, "configuration.hostname.hostname", "'a_b'", "letters"),
    ("configuration.hostname", {"hostname": "x" * 63 + ".yy"}, "configuration.hostname.hostname", "66", "at most 64"),
    ("configuration.hostname", {"domain": "x"}, "configuration.hostname", "without a hostname", "Add"),
    ("configuration.hostname", {"hostname": "a.b", "domain": "x"}, "configuration.hostname", "'a.b'", "one of the two"),
    ("configuration.hostname", {"hosts": {"x": "y"}}, "configuration.hostname.hosts.x", "'x'", "192.0.2.10"),
    ("configuration.hostname", {"hosts": {"fe80::1%e": "y"}}, "configuration.hostname.hosts.fe80::1%e", "IP", "such"),
    ("configuration.users", [], "configuration.users", "a list", "users and disable_users"),
    ("configuration.users", {"users": [{}]}, "configuration.users.users[0].name", "missing", "Add it"),
    ("configuration.users", {"users": [{"name": "a;b"}]}, "configuration.users.users[0].name", "'a;b'", "small"),
    ("configuration.users", {"users": [{"name": "-a"}]}, "configuration.users.users[0].name", "'-a'", "small"),
    ("configuration.users", {"users": [{"name": "a\n"}]}, "configuration.users.users[0].name", r"\n", "small"),
    (
        "configuration.users",
        {"users": [{"name": "a", "uid": 0}]},
        "configuration.users.users[0].uid",
        "0",
        "at least 1",
    ),
    (
        "configuration.users",
        {"users": [{"name": "a", "sudo": "ALL=/bin/sh"}]},
        "configuration.users.users[0].sudo",
        "'ALL=/bin/sh'",
        "ALL=(ALL) ALL",
    ),
    (
        "configuration.users",
        {"users": [{"name": "a", "shell": "bash"}]},
        "configuration.users.users[0].shell",
        "'bash'",
        "/bin/bash",
    ),
    (
        "configuration.users",
        {"users": [{"name": "a", "home": "/a/../b"}]},
        "configuration.users.users[0].home",
        "..",
        "in full",
    ),
    (
        "configuration.users",
        {"users": [{"name": "a", "comment": "a:b"}]},
        "configuration.users.users[0].comment",
        "':'",
        "Remove",
    ),
    ("configuration.users", {"users": [{"name": "a"}], "disable_users": ["a"]}, "configuration.users", "'a'", "Delete"),
    ("configuration.services", {"enable": ["a b"]}, "configuration.services.enable[0]", "'a b'", "sshd"),
    ("configuration.services", {"enable": ["-x"]}, "configuration.services.enable[0]", "'-x'", "sshd"),
    ("configuration.services", {"enable": ["x"], "mask": ["x.service"]}, "configuration.services", "twice", "Delete"),
    (
        "configuration.network",
        {"interfaces": [{"name": "e/0", "dhcp": True}]},
        "configuration.network.interfaces[0].name",
        "'e/0'",
        "ens192",
    ),
    (
        "configuration.network",
        {"interfaces": [{"name": "e"}]},
        "configuration.network.interfaces[0]",
        "neither dhcp nor addresses",
        "dhcp: true",
    ),
    (
        "configuration.network",
        {"interfaces": [{"name": "e", "dhcp": True, "addresses": ["192.0.2.1/24"]}]},
        "configuration.network.interfaces[0]",
        "both dhcp and addresses",
        "dhcp: true",
    ),
    (
        "configuration.network",
        {"interfaces": [{"name": "e", "addresses": ["192.0.2.1"]}]},
        "configuration.network.interfaces[0].addresses[0]",
        "'192.0.2.1'",
        "192.0.2.10/24",
    ),
    (
        "configuration.network",
        {"interfaces": [{"name": "e", "addresses": ["192.0.2.9/24"], "gateway4": "192.0.3.1"}]},
        "configuration.network.interfaces[0]",
        "192.0.3.1",
        "Correct it",
    ),
    (
        "configuration.network",
        {"interfaces": [{"name": "e", "addresses": ["192.0.2.9/24"], "gateway4": "2001:db8::1"}]},
        "configuration.network.interfaces[0]",
        "not an IPv4",
        "gateway4",
    ),
    (
        "configuration.network",
        {"interfaces": [{"name": "e", "dhcp": True}, {"name": "e", "dhcp": True}]},
        "configuration.network",
        "'e'",
        "Delete",
    ),
    ("manifest_version", "2.0", "manifest_version", "2.0", "update hyper2kvmd"),
    ("manifest_version", 2, "manifest_version", "2", "update hyper2kvmd"),
    ("manifest_version", True, "manifest_version", "true", "1.0"),
    ("manifest_version", ..., "manifest_version", "manifest_version is missing", "-manifest option"),
]


@pytest.mark.parametrize(
    ("path", "value", "field", "message", "hint"), WRONG, ids=[f"{row[0]}={row[1]!r:.30}" for row in WRONG]
)
def test_wrong_value_is_named_with_its_place_and_remedy(
    path: str, value: Any, field: str, message: str, hint: str
) -> None:
    error = failure(json.dumps(changed(path, value)).encode())
    assert error.code == Code.MANIFEST_INVALID
    fields = {problem.field: problem for problem in error.problems}
    assert field in fields
    assert message in fields[field].message
    assert hint in fields[field].hint


def test_every_problem_is_reported_at_once() -> None:
    content = copy.deepcopy(SEED)
    content["source"]["vm_name"] = "a/b"
    content["disks"][0]["checksum"] = "x"
    content["disks"][1]["id"] = "disk-0"
    content["pipeline"]["fix"]["enabled"] = 1
    error = failure(json.dumps(content).encode())
    fields = [problem.field for problem in error.problems]
    assert fields == ["source.vm_name", "disks[0].checksum", "pipeline.fix.enabled", "disks[1].id"]
    assert str(error).startswith("source.vm_name: 'a/b' cannot be the name of a VM (in manifest.json; 3 more problems)")
    assert error.finding().field == "source.vm_name"


@pytest.mark.parametrize(
    ("path", "value", "field", "hint"),
    [
        ("pipeline", {"inspct": {}}, "pipeline.inspct", "Did you mean inspect?"),
        (
            "pipeline.fix.regenerate_initram",
            True,
            "pipeline.fix.regenerate_initram",
            "Did you mean regenerate_initramfs?",
        ),
        ("pipeline.fix.zzz", True, "pipeline.fix.zzz", "It has no effect."),
        ("configuration", {"user": {}}, "configuration.user", "Did you mean users?"),
        ("configuration.hostname", {"hostnam": "x"}, "configuration.hostname.hostnam", "Did you mean hostname?"),
        (
            "configuration.users",
            {"users": [{"name": "a", "password": "hunter2"}]},
            "configuration.users.users[0].password",
            "Did you mean password_hash?",
        ),
    ],
)
@pytest.mark.parametrize("name", ["m.json", "m.yaml"])
def test_a_key_that_no_stage_knows_stops_nobody_and_is_named(
    path: str, value: object, field: str, hint: str, name: str
) -> None:
    manifest = parse(json.dumps(changed(path, value)).encode(), name)
    (warning,) = (warning for warning in manifest.warnings if warning.code == "unknown_key")
    assert (field, hint) == (warning.field, warning.hint)
    assert "hunter2" not in str(manifest.warnings)


def test_remote_desktop_can_be_asked_for() -> None:
    for wanted in (True, False):
        assert wanted is read(changed("pipeline.fix.enable_rdp", wanted)).stages.fix.enable_rdp


WISHES: dict[str, type[BaseModel]] = {
    "pipeline.inspect": wire.Inspect,
    "pipeline.fix": wire.Fix,
    "pipeline.convert": wire.Convert,
    "pipeline.validate": wire.Validate,
    "output": wire.Output,
    "options": wire.Options,
    "options.report": wire.Report,
}
VALUES = (True, False, 3, "noop", "raw", "/elsewhere", "x.json", {"enabled": True, "path": "x.json"})


def outcome(manifest: Manifest) -> tuple[object, ...]:
    return manifest.stages, manifest.output, manifest.options


@pytest.mark.parametrize("dialect", [{}, {"backup": True}], ids=["guide", "go"])
@pytest.mark.parametrize(
    ("table", "key"), [(t, f.alias or k) for t, m in WISHES.items() for k, f in m.model_fields.items()]
)
def test_every_wish_has_an_effect_or_is_said_to_have_none(table: str, key: str, dialect: dict[str, bool]) -> None:
    stages = {"inspect": {}, "fix": dialect, "convert": {}, "validate": {}}
    base: Any = changed("pipeline", {name: {"enabled": True, **stage} for name, stage in stages.items()})
    base |= {"output": {}, "options": {"report": {"path": "y.json"}}}
    plain = read(base)
    found = []
    for value in VALUES:
        content = copy.deepcopy(base)
        place = content
        for part in table.split("."):
            place = place[part]
        place[key] = value
        with contextlib.suppress(ManifestError):  # not a value of this key
            manifest = read(content)
            warned = f"{table}.{key}" in {warning.field for warning in manifest.warnings}
            found.append(warned or outcome(manifest) != outcome(plain))
    assert any(found), f"{table}.{key} is read by nobody, whatever its value"


# What the translation between the dialects alone reads; there is a warning of each.
TRANSLATED = {"validate_.check", "convert.compress_level", "manifest.options.verbose"}


def test_every_wish_that_is_kept_is_read_by_who_fulfils_it() -> None:
    root = Path(hyper2kvmd.__file__).parent
    sources = [
        path.read_text()
        for path in root.rglob("*.py")
        if path.relative_to(root).parts[0] not in ("manifest", "authoring", "settings")
    ]
    parts: dict[str, Any] = {"manifest.output": Output, "manifest.options": Options}
    parts |= {name: field.annotation for name, field in Stages.model_fields.items()}
    for part, model in parts.items():
        for field in model.model_fields:
            read_ = re.compile(rf"\b(?:{part}|wanted)\.{field}\b")
            assert any(map(read_.search, sources)) != (f"{part}.{field}" in TRANSLATED), f"{part}.{field}"


def test_a_copy_of_the_report_that_is_switched_off_is_not_written() -> None:
    for enabled, path in ((None, "copy.json"), (True, "copy.json"), (False, None)):
        report = {"enabled": enabled, "path": "copy.json"}
        assert path == read(changed("options", {"report": report})).options.report_path


def test_unknown_keys_of_the_exporter_are_warnings() -> None:
    content = changed("disks.0.capacity_gb", 4)
    content["source"]["vm_nmae"] = "x"
    content["extra"] = {"pipeline": 1}
    content["weird\x1b[31m"] = 1
    warnings = {warning.field: warning.hint for warning in read(content).warnings}
    assert set(warnings) == {"disks[0].capacity_gb", "source.vm_nmae", "extra", r"weird\x1b[31m"}
    assert warnings["source.vm_nmae"] == "Did you mean vm_name?"


@pytest.mark.parametrize("value", ["plan9", "Solaris 11"])
def test_odd_os_hint_is_a_warning(value: str) -> None:
    assert [warning.field for warning in read(changed("vm.os_hint", value)).warnings] == ["vm.os_hint"]


@pytest.mark.parametrize(
    ("content", "looks_like"),
    [
        ((MANIFESTS / "hyperctl-workflow.yaml").read_bytes(), "hyperctl"),
        (b'{"pipeline": {"load": {"source_path": "/x"}}}', "hyperctl"),
        (b'{"resource_group": "a", "disk_name": "b"}', "Azure"),
        (b'{"project_id": "a", "image_name": "b"}', "Google"),
        (b'{"a": 1}', "manifest_version is missing"),
        (b"[]", "a list"),
        (b"12", "12"),
        (b'"text"', "'text'"),
        (b"{}", "manifest_version is missing"),
        (b"null", "null"),
    ],
)
def test_other_files_are_said_not_to_be_manifests(content: bytes, looks_like: str) -> None:
    error = failure(content, "some.yaml")
    assert error.code == Code.MANIFEST_INVALID
    assert "not an Artifact Manifest" in error.message
    assert looks_like in error.message


# Hostile and half-written files ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["seed.json", "go-everything.json"])
def test_json_cut_anywhere_is_unreadable(name: str) -> None:
    data = (MANIFESTS / name).read_bytes().rstrip()
    for length in range(len(data)):
        with pytest.raises(ManifestError) as caught:
            parse(data[:length], "manifest.json")
        assert caught.value.code == Code.MANIFEST_UNREADABLE, length
    parse(data, "manifest.json")


def test_yaml_cut_anywhere_is_refused() -> None:
    data = (MANIFESTS / "go-everything.yaml").read_bytes()
    whole = parse(data, "manifest.yaml")
    for length in range(len(data)):
        try:
            found = parse(data[:length], "manifest.yaml")
        except ManifestError:
            continue
        # YAML has no end: what is cut between two tables can only be told by its age and its checksum.
        assert found.disks[0].id == whole.disks[0].id


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


@pytest.mark.parametrize(
    ("data", "name", "code", "message"),
    [
        (b"", "m.json", Code.MANIFEST_UNREADABLE, "not complete JSON"),
        (b"", "m.yaml", Code.MANIFEST_UNREADABLE, "not complete YAML"),
        (b"{]", "m.json", Code.MANIFEST_UNREADABLE, "line 1, column 2"),
        (b"a: [", "m.yaml", Code.MANIFEST_UNREADABLE, "line"),
        (b"\xff\xfe{}", "m.json", Code.MANIFEST_UNREADABLE, "byte 0"),
        (b"\xef\xbb\xbf{}", "m.json", Code.MANIFEST_INVALID, "byte order mark"),
        (b" " * (1 << 20) + b"{}", "m.json", Code.MANIFEST_INVALID, "at most 1048576"),
        (b'{"a": 1, "a": 2}', "m.json", Code.MANIFEST_INVALID, "'a' is there twice"),
        (b'{"b": {"a": 1, "a": 2}}', "m.json", Code.MANIFEST_INVALID, "'a' is there twice"),
        (b"a: 1\na: 2", "m.yaml", Code.MANIFEST_INVALID, "'a' is there twice"),
        (b'{"a": NaN}', "m.json", Code.MANIFEST_INVALID, "NaN"),
        (b'{"a": -Infinity}', "m.json", Code.MANIFEST_INVALID, "Infinity"),
        (b'{"a": 1e400}', "m.json", Code.MANIFEST_INVALID, "too large"),
        (b"a: 1e400", "m.yaml", Code.MANIFEST_INVALID, "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "m.json", Code.MANIFEST_INVALID, "too large"),
        (b'{"a": 9223372036854775808}', "m.json", Code.MANIFEST_INVALID, "too large"),
        (b"a: " + b"9" * 5000, "m.yaml", Code.MANIFEST_INVALID, "too large"),
        (nested(40), "m.json", Code.MANIFEST_INVALID, "deeper than 32"),
        (nested(40), "m.yaml", Code.MANIFEST_INVALID, "deeper than 32"),
        (nested(100_000), "m.json", Code.MANIFEST_INVALID, "deeper than 32"),
        (nested(100_000), "m.yaml", Code.MANIFEST_INVALID, "deeper than 32"),
        (b"[" * 500_000, "m.yaml", Code.MANIFEST_INVALID, "deeper than 32"),
        (b"- " * 100_000, "m.yaml", Code.MANIFEST_INVALID, "deeper than 32"),
        (b"a: &x [1]\nb: *x", "m.yaml", Code.MANIFEST_INVALID, "anchors"),
        (b"a: *x", "m.yaml", Code.MANIFEST_INVALID, "anchors"),
        (b"a: !!python/object:os.system x", "m.yaml", Code.MANIFEST_INVALID, "tag"),
        (b"? [1]\n: 2", "m.yaml", Code.MANIFEST_INVALID, "key"),
        (b"a: 1\n---\nb: 2", "m.yaml", Code.MANIFEST_INVALID, "more than one"),
        (b'{"a": "\\ud800"}', "m.json", Code.MANIFEST_INVALID, "half of a character"),
        (b'{"\\u0000": 1}', "m.json", Code.MANIFEST_INVALID, "NUL"),
    ],
)
def test_hostile_document_is_refused(data: bytes, name: str, code: Code, message: str) -> None:
    with work_of_at_most(3):
        error = failure(data, name)
        assert (error.code, message in error.message) == (code, True), error


@pytest.mark.parametrize("value", [False, None])
def test_secure_boot_of_the_go_library_is_only_known_if_it_is_on(value: bool | None) -> None:
    assert read(changed("vm.secureboot", value, GO)).vm.secure_boot is None
    assert read(changed("vm.secureboot", True, GO)).vm.secure_boot is True


def test_one_enormous_key_is_named_soon_and_shortly() -> None:
    data = json.dumps(changed("pipeline.fix", {"x" * 900_000: 1})).encode()
    with work_of_at_most(3):
        assert len(str(parse(data, "m.json").warnings)) < 1000
        assert len(str(failure(data, "m.yaml"))) < 1000  # YAML has no keys of more than 1024 characters


@pytest.mark.parametrize("name", ["m.json", "m.yaml"])
def test_a_megabyte_of_unknown_keys_is_read_soon(name: str) -> None:
    content = changed("pipeline.fix", {f"key{n}": 1 for n in range(60_000)})
    content["disks"][0] |= {f"key{n}": 1 for n in range(10_000)}
    with work_of_at_most(5):
        manifest = parse(json.dumps(content).encode(), name)
        assert 100 == sum(warning.code == "unknown_key" for warning in manifest.warnings)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["", "..", "a/b", "raw"])
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))


def places(content: Any) -> list[tuple[Any, Any]]:
    items = (
        list(content.items())
        if isinstance(content, dict)
        else list(enumerate(content))
        if isinstance(content, list)
        else []
    )
    return [(content, key) for key, _ in items] + [place for _, value in items for place in places(value)]


@settings(max_examples=400)
@given(st.sampled_from([SEED, GO]), st.randoms(use_true_random=False), st.lists(TREES, min_size=1, max_size=3))
def test_no_content_raises_anything_else(base: dict[str, Any], chance: random.Random, values: list[Any]) -> None:
    content = copy.deepcopy(base)
    for value in values:
        table, key = chance.choice(places(content))
        table[key] = value
    try:
        read(content)
    except ManifestError as error:
        assert error.problems


@settings(max_examples=400)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    for name in ("m.json", "m.yaml"):
        with pytest.raises(ManifestError):
            parse(data, name)


@settings(max_examples=300)
@given(st.integers(0, 4000), st.integers(0, 255), st.sampled_from(["go-everything.json", "go-everything.yaml"]))
def test_no_changed_byte_raises_anything_else(offset: int, value: int, name: str) -> None:
    data = bytearray((MANIFESTS / name).read_bytes())
    data[offset % len(data)] = value
    try:
        parse(bytes(data), name)
    except ManifestError as error:
        assert error.problems
