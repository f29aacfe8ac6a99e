"""Puts a manifest together step by step, looking at the disks for it, and writes it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from hyper2kvmd.authoring.rewrite import Dialect, dump, upgrade
from hyper2kvmd.errors import Code, Collected, Finding, MigrationError
from hyper2kvmd.files import open_directory, write_durably
from hyper2kvmd.image.extents import check_whole, look_beside
from hyper2kvmd.image.header import examine
from hyper2kvmd.image.source import OpenDisk, Source, check_unchanged, open_disk, open_sources, sha256
from hyper2kvmd.manifest import wire
from hyper2kvmd.manifest.model import Configuration, Disk, Manifest, Part
from hyper2kvmd.manifest.problems import ManifestError, invalid
from hyper2kvmd.manifest.reader import parse
from hyper2kvmd.manifest.wire import Format
from hyper2kvmd.text import show

SUFFIXES: dict[str, Format] = {
    ".vmdk": "vmdk",
    ".qcow2": "qcow2",
    ".raw": "raw",
    ".vhd": "vhd",
    ".vhdx": "vhdx",
    ".vdi": "vdi",
}
# Raw takes what has no mark, a VHD without its footer too: so it comes before that, and names are looked at.
_FORMATS: tuple[Format, ...] = ("vmdk", "qcow2", "vhdx", "vdi", "raw", "vhd")


class ManifestBuilder:
    """A manifest that is being put together; every method returns the builder.

    `directory` is where the manifest will lie. The paths of disks are relative to it, or inside it; that is what the
    manifest will say. What is wrong is kept until build() or write(), which tell all of it at once.
    """

    def __init__(self, directory: str | os.PathLike[str] = ".") -> None:
        self.directory = Path(directory)
        self._document: dict[str, Any] = {"manifest_version": wire.VERSION, "source": {}, "disks": []}
        self._problems: list[Finding] = []
        self._files: dict[tuple[int, int, int], str] = {}

    def with_source(
        self,
        vm_name: str,
        *,
        provider: str | None = None,
        vm_id: str | None = None,
        datacenter: str | None = None,
        export_timestamp: str | None = None,
        export_method: str | None = None,
    ) -> ManifestBuilder:
        """Where the VM comes from."""
        self._document["source"] = _given(
            provider=provider,
            vm_id=vm_id,
            vm_name=vm_name,
            datacenter=datacenter,
            export_timestamp=export_timestamp,
            export_method=export_method,
        )
        return self

    def with_vm(
        self,
        *,
        cpu: int | None = None,
        mem_gb: float | None = None,
        firmware: Literal["bios", "uefi", "unknown"] = "unknown",
        secure_boot: bool | None = None,
        os_hint: str | None = None,
        os_version: str | None = None,
    ) -> ManifestBuilder:
        """The virtual hardware; None is what is not known. mem_gb: in GiB."""
        self._document["vm"] = _given(
            cpu=cpu,
            mem_gb=mem_gb,
            firmware=firmware,
            secure_boot=secure_boot,
            os_hint=os_hint,
            os_version=os_version,
        )
        return self

    def add_disk(
        self,
        path: str | os.PathLike[str],
        *,
        id: str | None = None,
        format: Format | None = None,
        kind: Literal["boot", "data", "unknown"] | None = None,
        boot_order: int | None = None,
        label: str | None = None,
        checksum: bool | str = True,
        on_progress: Callable[[float], None] = lambda ratio: None,
    ) -> ManifestBuilder:
        """A disk file; it is opened and examined now.

        id: disk-0, disk-1 and so on if it is None. format: found by looking if it is None. kind, boot_order: the first
        disk is the boot disk, and they are booted as they come, if these are None. checksum: whether to compute it,
        or its SHA-256 in hexadecimal where that is known already. on_progress: gets the ratio done, from 0 to 1.
        """
        number = len(self._document["disks"])
        id = id or f"disk-{number}"
        field = f"disks[{number}]"
        size, digest = 1, checksum if isinstance(checksum, str) else None
        try:
            with opened(self.directory, os.fspath(path), id, format) as source:
                format, size = source.disk.format, source.size
                for file in source.files:
                    other = self._files.setdefault((file.device, file.inode, file.start), id)
                    if other != id:
                        what = f"{source.name} is the file of the disk {other} already"
                        self._problems.append(invalid(what, "Give each disk its own file.", f"{field}.local_path"))
                if checksum is True:
                    digest = sha256(source, threading.Event(), on_progress)
                    check_unchanged(source)
        except MigrationError as error:
            found = error.problems or (error.finding(),)
            self._problems += [replace(finding, field=_moved(finding.field, field)) for finding in found]
        except OSError as error:
            message = f"{os.fspath(path)} cannot be read: {error.strerror}"
            hint = "Check its permissions and its file system."
            self._problems.append(Finding(Code.IO_ERROR, message, hint, f"{field}.local_path"))
        # For a disk with a problem this stands in for what is not known, and is never written.
        self._document["disks"].append(
            _given(
                id=id,
                source_format=format or "raw",
                bytes=size,
                local_path=os.fspath(path),
                checksum=f"sha256:{digest}" if digest else None,
                boot_order_hint=number if boot_order is None else boot_order,
                label=label,
                disk_type=kind or ("data" if number else "boot"),
            )
        )
        return self

    def add_nic(self, mac: str | None = None, network: str | None = None, *, id: str | None = None) -> ManifestBuilder:
        """A network card: its MAC address, and the source's name of its network."""
        nics = self._document.setdefault("nics", [])
        nics.append(_given(id=id or f"nic-{len(nics)}", mac=mac, network=network))
        return self

    def with_pipeline(
        self,
        *,
        inspect: bool = True,
        fix: bool = True,
        convert: bool = True,
        validate: bool = True,
        inject_drivers: bool = True,
        fstab_mode: Literal["stabilize-all", "bypath-only", "noop"] = "stabilize-all",
        fix_grub: bool = True,
        regenerate_initramfs: bool = True,
        backup: bool = False,
        print_fstab: bool = False,
        remove_vmware_tools: bool = False,
        compression: bool | None = None,
        compress_level: int | None = None,
        verify_checksum: bool = True,
        check_image_integrity: bool = True,
        test_boot: bool | None = None,
    ) -> ManifestBuilder:
        """The stages that are wanted, and their parts; None is what the settings decide."""
        self._document["pipeline"] = {
            "inspect": {"enabled": inspect, "detect_os": True, "detect_kernel": True},
            "fix": {
                "enabled": fix,
                "inject_drivers": inject_drivers,
                "fix_grub": fix_grub,
                "regenerate_initramfs": regenerate_initramfs,
                "fstab_mode": fstab_mode,
                "backup": backup,
                "print_fstab": print_fstab,
                "remove_vmware_tools": remove_vmware_tools,
            },
            "convert": _given(enabled=convert, compression=compression, compress_level=compress_level),
            "validate": _given(
                enabled=validate,
                verify_checksum=verify_checksum,
                check_image_integrity=check_image_integrity,
                test_boot=test_boot,
            ),
        }
        return self

    def with_configuration(self, configuration: Configuration) -> ManifestBuilder:
        """What is to be changed in the guest."""
        host = _given(
            hostname=configuration.hostname,
            domain=configuration.domain,
            hosts={address: list(names) for address, names in configuration.hosts.items()} or None,
        )
        users = [
            {**_stated(user), "password_hash": user.password_hash.get_secret_value()}
            if user.password_hash
            else _stated(user)
            for user in configuration.users
        ]
        tables = {
            "hostname": host,
            "users": _given(users=users or None, disable_users=list(configuration.disable_users) or None),
            "services": _stated(configuration.services),
            "network": _given(interfaces=[_stated(row) for row in configuration.interfaces] or None),
        }
        self._document["configuration"] = {key: table for key, table in tables.items() if table}
        return self

    def with_metadata(
        self,
        *,
        hypersdk_version: str | None = None,
        job_id: str | None = None,
        created_at: str | None = None,
        tags: Mapping[str, str] | Iterable[str] = (),
    ) -> ManifestBuilder:
        """About the export. tags: words, or words and their values."""
        table = dict(tags) if isinstance(tags, Mapping) else dict.fromkeys(tags, "")
        self._document["metadata"] = _given(
            hypersdk_version=hypersdk_version, job_id=job_id, created_at=created_at, tags=table or None
        )
        return self

    def with_output(
        self,
        directory: str | os.PathLike[str] | None = None,
        format: Literal["qcow2", "raw"] | None = None,
        filename: str | None = None,
    ) -> ManifestBuilder:
        """Where the disks are to be written, and how."""
        where = None if directory is None else os.fspath(directory)
        self._document["output"] = _given(directory=where, format=format, filename=filename)
        return self

    def with_options(
        self, *, dry_run: bool = False, verbose: int = 1, report_path: str | None = None
    ) -> ManifestBuilder:
        """How the job is to be run. report_path: the name of a copy of the report."""
        report = None if report_path is None else {"enabled": True, "path": report_path}
        self._document["options"] = _given(dry_run=dry_run, verbose=verbose, report=report)
        return self

    def add_note(self, text: str) -> ManifestBuilder:
        """A text for people."""
        self._document.setdefault("notes", []).append(text)
        return self

    def add_warning(self, message: str, *, stage: str | None = None, timestamp: str | None = None) -> ManifestBuilder:
        """Something that people should know of the export."""
        self._document.setdefault("warnings", []).append(_given(stage=stage, message=message, timestamp=timestamp))
        return self

    def build(self, dialect: Dialect = "seed") -> Manifest:
        """The manifest, as it is read from JSON.

        Raise ManifestError, with all that is wrong, and all that the dialect has no words for, as its problems.
        """
        return parse(dump(self.document(dialect), _NAME), _NAME)

    def write(self, path: str | os.PathLike[str] = "manifest.json", dialect: Dialect = "seed") -> Manifest:
        """Write the manifest, whole or not at all, over an older one; return it as it is read from there.

        `path` is relative to the builder's directory, or inside it: JSON if it ends in .json, YAML if in .yaml or
        .yml. Raise ManifestError as build() does, or OSError.
        """
        file = self.directory / path
        if file.suffix.lower() not in (".json", ".yaml", ".yml"):
            self._refuse(f"{show(str(file))} is not the name of a manifest", "It must end in .json, .yaml or .yml.")
        if file.parent.resolve() != self.directory.resolve():
            self._refuse(
                f"{show(str(file))} is not in {self.directory}, where the disks are",
                "Write it there, beside the disks.",
            )
        data = dump(self.document(dialect), file.name)
        manifest = parse(data, file.name)
        fd = open_directory(file.parent.resolve())
        try:
            write_durably(fd, file.name, data, os.getpid())
        finally:
            os.close(fd)
        return manifest

    def document(self, dialect: Dialect = "seed") -> dict[str, Any]:
        """What the manifest says, as plain data. Raise ManifestError as build() does."""
        problems = list(self._problems)
        document: dict[str, Any] = {}
        try:
            document, lost = upgrade(self._document, dialect)
            problems += [invalid(finding.message, finding.hint, finding.field) for finding in lost]
        except ManifestError as error:
            problems += error.problems
        if problems:
            raise ManifestError(Code.MANIFEST_INVALID, "the manifest to be written", problems)
        return {key: document[key] for key in wire.Document.model_fields if key in document}

    def _refuse(self, message: str, hint: str) -> None:
        raise ManifestError(Code.MANIFEST_INVALID, "the manifest to be written", [invalid(message, hint)])


_NAME = "manifest.json"


@contextlib.contextmanager
def opened(directory: Path, path: str, id: str, format: Format | None = None) -> Iterator[Source]:
    """A disk of a manifest in `directory`, open and examined, in the format that its content and its name agree on.

    Raise MigrationError as open_sources() does, also for a file outside of the directory.
    """
    directory = directory.resolve()
    name = Path(path)
    if name.is_absolute():
        name = name.parent.resolve() / name.name
        if not name.is_relative_to(directory):
            raise MigrationError(
                Code.EXPORT_UNSAFE,
                f"{path} is not in {directory}, where the manifest is to be",
                "Copy the disk there (`cp --reflink=auto` is quick), or write the manifest beside the disk.",
                field="disks[0].local_path",
            )
        name = name.relative_to(directory)
    with contextlib.ExitStack() as stack:
        fd = open_directory(directory)
        stack.callback(os.close, fd)
        file, _ = open_disk(fd, directory, str(name), "disks[0].local_path")
        stack.callback(os.close, file.fd)
        try:
            vmdk = format or ("vmdk" if file.name.lower().endswith(".vmdk") else "raw")
            check_whole(look_beside(fd, file.name), file.name, vmdk, str(directory / name))
            found = format or _find_format(file, directory / name)
        except MigrationError as error:
            error.field = f"disks[0].{'source_format' if error.code == Code.FORMAT_MISMATCH else 'local_path'}"
            raise
        disk = Disk(
            id=id,
            format=found,
            bytes=max(file.size, 1),
            path=str(name),
            sha256=None,
            boot_order=None,
            kind="unknown",
            label=None,
        )
        problems = Collected()
        sources = open_sources(fd, directory, [disk], stack, problems)
        problems.check()
        yield sources[0]


def _find_format(file: OpenDisk, path: Path) -> Format:
    """The format that the content has; one that the name denies is refused, as guests can write what looks like one."""
    named = SUFFIXES.get(path.suffix.lower())
    mismatch = None
    for format in _FORMATS:
        try:
            examine(file.fd, file.size, format, str(path), file.start)
        except MigrationError as error:
            if error.code == Code.FORMAT_MISMATCH:
                # That of raw says best what else the file is.
                mismatch = error if format == "raw" or mismatch is None else mismatch
                continue
            raise
        if named not in (None, format):
            raise MigrationError(
                Code.FORMAT_MISMATCH,
                f"{path} is {format} by its content, and {named} by its name",
                f"If it is whole and its content is right, rename it to {path.stem}.{format}.",
            )
        return format
    assert mismatch is not None  # _FORMATS is not empty
    raise mismatch


def _moved(field: str | None, to: str) -> str:
    return to + (field or "").removeprefix("disks[0]")


def _stated(part: Part) -> dict[str, Any]:
    """A part without its defaults, in the types of a document."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in part.model_dump(exclude_defaults=True).items()
    }


def _given(**values: Any) -> dict[str, Any]:
    """A table without what is None."""
    return {key: value for key, value in values.items() if value is not None}
