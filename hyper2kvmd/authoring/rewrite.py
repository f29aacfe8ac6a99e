"""Changes manifests as documents: new checksums, other paths, the other dialect; what is not meant stays as it is."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import yaml

from hyper2kvmd.errors import Finding
from hyper2kvmd.manifest import model
from hyper2kvmd.manifest.reader import parse
from hyper2kvmd.text import show

Dialect = Literal["seed", "go"]
Document = dict[str, Any]

CALLED: dict[Dialect, str] = {"seed": "the guide's", "go": "the Go exporter's"}
_NUMBERLIKE = re.compile(r"[-+.eE]*[0-9][-+.0-9eE]*")


@dataclass(frozen=True)
class Measured:
    """What a disk file is now: its SHA-256 in hexadecimal, and its size if the manifest's number is wrong."""

    sha256: str
    bytes: int | None


@dataclass(frozen=True)
class Rewritten:
    """A field of a document that gets another value; None: it was not there."""

    field: str
    old: str | int | None
    new: str | int


def dump(document: Mapping[str, Any], name: str) -> bytes:
    """The bytes of a document that are read as the same: JSON if the file's `name` ends in .json, YAML otherwise."""
    if name.lower().endswith(".json"):
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        # Half of a character becomes an escape here, of which the reader can say where it is.
        return text.encode("utf-8", "backslashreplace")
    text = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)
    return text.encode("utf-8", "backslashreplace")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # the reader takes no aliases


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML reads 1e3 as text, and YAML 1.2 and our reader as a number; and it folds rare line ends into blanks.
    style = '"' if _NUMBERLIKE.fullmatch(text) or not text.isprintable() else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def rehash(document: Document, measured: Sequence[Measured]) -> tuple[Document, tuple[Rewritten, ...]]:
    """Give every disk its checksum, and its size where that is wrong; `measured` has one entry for each disk."""
    document, changes = copy.deepcopy(document), list[Rewritten]()
    for index, (disk, now) in enumerate(zip(document["disks"], measured, strict=True)):
        checksum = f"sha256:{now.sha256}"
        if (disk.get("checksum") or "").lower() != checksum:
            changes.append(Rewritten(f"disks[{index}].checksum", disk.get("checksum"), checksum))
            disk["checksum"] = checksum
        if now.bytes is not None:
            changes.append(Rewritten(f"disks[{index}].bytes", disk["bytes"], now.bytes))
            disk["bytes"] = now.bytes
    return document, tuple(changes)


def relocate(document: Document, old: str, new: str) -> tuple[Document, tuple[Rewritten, ...]]:
    """Put the directory `new` in the place of `old` where the paths of disks start with it.

    An output directory in which such a disk was lies in the export, and moves with it.
    """
    document, changes = copy.deepcopy(document), list[Rewritten]()
    left, went = PurePosixPath(old), PurePosixPath(new)

    def move(table: Document, key: str, field: str) -> None:
        path = PurePosixPath(table[key])
        if path.is_relative_to(left):
            changes.append(Rewritten(field, table[key], str(went / path.relative_to(left))))
            table[key] = changes[-1].new

    parents = {PurePosixPath(disk["local_path"]).parent for disk in document["disks"]}
    for index, disk in enumerate(document["disks"]):
        move(disk, "local_path", f"disks[{index}].local_path")
    convert = (document.get("pipeline") or {}).get("convert") or {}
    for table, key, field in (
        (document.get("output") or {}, "directory", "output.directory"),
        (convert, "output_dir", "pipeline.convert.output_dir"),
    ):
        if table.get(key) is not None and PurePosixPath(table[key]) in parents:
            move(table, key, field)
    return document, tuple(changes)


def upgrade(document: Document, dialect: Dialect) -> tuple[Document, tuple[Finding, ...]]:
    """Say the same in one dialect only, and what it has no words for.

    Keys that are in both dialects, or unknown, stay as they are. Raise ManifestError if the document is no manifest.
    """
    manifest = _read(document)
    document = copy.deepcopy(document)
    lost = list(_lost(manifest, dialect))
    if isinstance(vm := document.get("vm"), dict):
        _put(vm, secure_boot=manifest.vm.secure_boot if dialect == "seed" else None)
        _put(vm, secureboot=manifest.vm.secure_boot or None if dialect == "go" else None)
        if dialect == "go" and isinstance(vm.get("mem_gb"), float):
            _put(vm, mem_gb=int(vm["mem_gb"]) or None)
    metadata = document.get("metadata")
    if isinstance(metadata, dict) and metadata.get("tags") is not None:
        metadata["tags"] = dict(manifest.tags) if dialect == "go" else list(manifest.tags)
    format = manifest.stages.convert.format or manifest.output.format
    directory = manifest.stages.convert.output_dir or manifest.output.directory
    if document.get("pipeline") is not None:
        inspect = document["pipeline"].get("inspect") or {}
        looks = {inspect.get(key) for key in ("detect_os", "detect_kernel", "collect_guest_info")} - {None}
        stages = manifest.stages
        if dialect == "seed":
            document["pipeline"] = _seed_pipeline(stages, inspect, format, directory)
        else:
            document["pipeline"] = _go_pipeline(stages, any(looks) if looks else None)
    if dialect == "go" and (format or directory):
        document["output"] = document.get("output") or {}
        _put(document["output"], directory=directory, format=format)
    # The dialects differ in what a missing hint means: the first disk in the one, the position in the other. And a
    # document with few keys is read as the guide's, whoever wrote it.
    if manifest.dialect != _read(document).dialect:
        for index, disk in enumerate(document["disks"]):
            if disk.get("boot_order_hint") is None and index > 0:
                disk["boot_order_hint"] = 0 if manifest.dialect == "go" else index
    return document, tuple(_left_out(dialect, *loss) for loss in lost)


def _read(document: Document) -> model.Manifest:
    return parse(dump(document, "manifest.json"), "manifest.json")


def _seed_pipeline(
    stages: model.Stages, inspect: Mapping[str, bool | None], format: str | None, directory: str | None
) -> Document:
    looks = inspect.get("collect_guest_info")
    return _given(
        inspect=_given(
            enabled=stages.inspect.enabled,
            detect_os=inspect.get("detect_os", looks),
            detect_kernel=inspect.get("detect_kernel", looks),
        ),
        fix={
            "enabled": stages.fix.enabled,
            "inject_drivers": stages.fix.drivers,
            "fix_fstab": stages.fix.fstab,
            "fix_grub": stages.fix.bootloader,
            "regenerate_initramfs": stages.fix.initramfs,
        },
        convert=_given(
            enabled=stages.convert.enabled,
            target_format=format,
            compression=stages.convert.compress,
            output_dir=directory,
        ),
        validate=_given(
            enabled=stages.validate_.enabled,
            verify_checksum=stages.validate_.verify_checksum,
            test_boot=stages.validate_.test_boot,
        ),
    )


def _go_pipeline(stages: model.Stages, looks: bool | None) -> Document:
    return _given(
        inspect=_given(enabled=stages.inspect.enabled, collect_guest_info=looks),
        # All of it, also what is false: by these keys the reader knows who wrote the stage.
        fix={
            "enabled": stages.fix.enabled,
            "backup": stages.fix.backup,
            "print_fstab": stages.fix.print_fstab,
            "update_grub": stages.fix.bootloader,
            "regen_initramfs": stages.fix.initramfs,
            "fstab_mode": stages.fix.fstab_mode if stages.fix.fstab else "noop",
            "remove_vmware_tools": stages.fix.remove_vmware_tools,
        },
        convert=_given(
            enabled=stages.convert.enabled,
            compress=stages.convert.compress,
            compress_level=stages.convert.compress_level,
        ),
        validate={"enabled": stages.validate_.enabled, "check_image_integrity": stages.validate_.check},
    )


def _lost(manifest: model.Manifest, dialect: Dialect) -> Iterator[tuple[str, object, str]]:
    """What a dialect cannot say: the field, its value, and what a reader takes in its place."""
    stages = manifest.stages
    if dialect == "go":
        memory = manifest.vm.memory_mib or 0
        if memory % 1024:
            yield "vm.mem_gb", memory / 1024, f"{memory // 1024} GiB" if memory >= 1024 else "that it is not given"
        if manifest.vm.secure_boot is False:
            yield "vm.secure_boot", False, "that it is not known"
        if not stages.fix.drivers:
            yield "pipeline.fix.inject_drivers", False, "true"
        if not stages.validate_.verify_checksum:
            yield "pipeline.validate.verify_checksum", False, "true"
        if stages.validate_.test_boot is not None:
            yield "pipeline.validate.test_boot", stages.validate_.test_boot, "what the settings say"
        return
    for key in ("backup", "print_fstab", "remove_vmware_tools"):
        if getattr(stages.fix, key):
            yield f"pipeline.fix.{key}", True, "false"
    if stages.fix.fstab and stages.fix.fstab_mode == "bypath-only":
        yield "pipeline.fix.fstab_mode", stages.fix.fstab_mode, "stabilize-all"
    if stages.convert.compress_level:
        yield "pipeline.convert.compress_level", stages.convert.compress_level, "the usual one"
    if not stages.validate_.check:
        yield "pipeline.validate.check_image_integrity", False, "true"
    for tag, value in manifest.tags.items():
        if value:
            yield "metadata.tags", f"{tag}={value}", f"{show(tag)} alone"


def _left_out(dialect: Dialect, field: str, value: object, instead: str) -> Finding:
    return Finding(
        "not_in_dialect",
        f"{CALLED[dialect]} dialect cannot say {show(value)} here",
        f"Who reads it takes {instead}. Keep the other dialect if that matters.",
        field,
    )


def _put(table: Document, **values: object) -> None:
    """Set the keys, and take those out whose value is None."""
    for key, value in values.items():
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value


def _given(**values: object) -> Document:
    """A table without what is None."""
    return {key: value for key, value in values.items() if value is not None}
