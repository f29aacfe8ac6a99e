"""What a manifest file may hold, key by key, in either dialect; also the source of its JSON schema.

Each description completes the sentence "it must be ...": it is what a person reads who got the value wrong.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from hyper2kvmd.manifest.problems import show

VERSION = "1.0"
CHECKSUM = re.compile(r"sha256:[0-9a-fA-F]{64}")
IDENTIFIER = re.compile(r"[a-zA-Z0-9_-]{1,64}")
MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
ENTRY_LIMIT = 64  # disks, and network interfaces


def refuse(message: str, hint: str) -> PydanticCustomError:
    """A problem with its own words; reader.py turns it into a finding."""
    return PydanticCustomError("manifest", "{message}", {"message": message, "hint": hint})


def _printable(text: str) -> str:
    if not text.isprintable():
        raise refuse(f"{show(text)} holds characters that do not print", "Remove them.")
    if len(text) > 4096:
        raise refuse(f"{show(text)} is longer than 4096 characters", "Shorten it.")
    return text


def _vm_name(text: str) -> str:
    if not text or len(text.encode()) > 255 or "/" in text or text in (".", ".."):
        raise refuse(
            f"{show(text)} cannot be the name of a VM",
            "Write a name of 1 to 255 bytes without '/', other than '.' and '..': files are named after it.",
        )
    return text


def _file_name(text: str) -> str:
    if not text or len(text.encode()) > 255 or "/" in text or text.startswith((".", "-")):
        raise refuse(
            f"{show(text)} is not a plain file name",
            "Write the name of a file without a directory; it must not start with '.' or '-'.",
        )
    return text


def _directory(text: str) -> str:
    if not text.startswith("/") or ".." in text.split("/"):
        raise refuse(f"{show(text)} is not an absolute path", "Write the directory in full, without '..'.")
    return text


def _path(text: str) -> str:
    if not text or text.endswith("/"):
        raise refuse(f"{show(text)} does not name a file", "Write the path of the disk file.")
    return text


def _identifier(text: str) -> str:
    if not IDENTIFIER.fullmatch(text):
        raise refuse(
            f"{show(text)} is not an identifier",
            "Use 1 to 64 letters, digits, '_' and '-', for example disk-0.",
        )
    return text


def _checksum(text: str) -> str:
    if not CHECKSUM.fullmatch(text):
        raise refuse(
            f"{show(text)} is not a checksum",
            "Write sha256: and the 64 hexadecimal digits that `sha256sum` prints, or leave the checksum out.",
        )
    return text.removeprefix("sha256:").lower()


def _mac(text: str) -> str | None:
    if not text:
        return None
    mac = text.lower().replace("-", ":")
    if not MAC.fullmatch(mac) or int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise refuse(
            f"{show(text)} is not the MAC address of a network interface",
            "Write six pairs of hexadecimal digits such as 00:50:56:aa:bb:01; the first is even.",
        )
    return mac


def _output_format(value: object) -> object:
    if value == "vdi":
        raise refuse("vdi is VirtualBox's format, not one that KVM runs well", "Write qcow2 or raw.")
    return value


def _tags(value: object) -> object:
    """The seed's list of words is a map without values."""
    if isinstance(value, list) and all(isinstance(tag, str) for tag in value):
        return dict.fromkeys(value, "")
    return value


def _verbosity(value: object) -> object:
    return int(value) if isinstance(value, bool) else value


def _version(value: object) -> object:
    return VERSION if isinstance(value, float) and value == 1.0 else value  # unquoted in YAML


Printable = Annotated[str, AfterValidator(_printable)]
Identifier = Annotated[str, AfterValidator(_identifier)]
FileName = Annotated[str, AfterValidator(_file_name), AfterValidator(_printable)]
Directory = Annotated[str, AfterValidator(_directory), AfterValidator(_printable)]
OutputFormat = Annotated[Literal["qcow2", "raw"], BeforeValidator(_output_format)]
Flag = Annotated[bool | None, Field(description="true or false")]


class Table(BaseModel):
    """What the exporter owns: unknown keys are let through, and reported."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class Wish(BaseModel):
    """What tells us what to do: an unknown key could be an order that we would not follow, so it is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Source(Table):
    """Where the VM comes from."""

    provider: Printable | None = Field(None, description="the name of the platform, such as vsphere")
    vm_id: Printable | None = Field(None, description="the platform's identifier of the VM, as text")
    vm_name: Annotated[str, AfterValidator(_vm_name), AfterValidator(_printable)] = Field(
        description="the VM's name, as text"
    )
    datacenter: Printable | None = Field(None, description="the name of the datacenter, as text")
    export_timestamp: Printable | None = Field(None, description="a time such as 2026-01-22T10:30:00Z")
    export_method: Printable | None = Field(None, description="how the VM was exported, as text")


class VM(Table):
    """The virtual hardware."""

    cpu: int | None = Field(None, ge=0, le=4096, description="the number of virtual CPUs, up to 4096")
    mem_gb: float | None = Field(None, ge=0, le=65536, description="the memory in GiB, up to 65536")
    firmware: Literal["bios", "uefi", "efi", "unknown", ""] | None = Field(None, description="bios, uefi or unknown")
    secure_boot: Flag = None
    secureboot: Flag = None
    os_hint: Printable | None = Field(None, description="a word such as linux, as text")
    os_version: Printable | None = Field(None, description="the operating system's version, as text")


class Disk(Table):
    """A disk file."""

    id: Identifier = Field(description="an identifier such as disk-0")
    source_format: Literal["vmdk", "qcow2", "raw", "vhd", "vhdx", "vdi"] = Field(
        description="one of vmdk, qcow2, raw, vhd, vhdx, vdi"
    )
    bytes: int = Field(ge=1, description="the size of the file in bytes, at least 1")
    local_path: Annotated[str, AfterValidator(_path), AfterValidator(_printable)] = Field(
        description="the path of the disk file"
    )
    checksum: Annotated[str, AfterValidator(_checksum)] | None = Field(
        None, description="sha256: and 64 hexadecimal digits"
    )
    boot_order_hint: int | None = Field(None, ge=0, le=65535, description="a number: 0 is booted first")
    disk_type: Literal["boot", "data", "unknown", ""] | None = Field(None, description="boot, data or unknown")
    label: Printable | None = Field(None, description="text for people")


class Nic(Table):
    """A network interface."""

    id: Identifier | None = Field(None, description="an identifier such as nic-0")
    mac: Annotated[str, AfterValidator(_mac)] | None = Field(
        None, description="a MAC address such as 00:50:56:aa:bb:01, in quotes"
    )
    network: Printable | None = Field(None, description="the name of the source's network, as text")


class Warned(Table):
    """Something the exporter warned of."""

    stage: Printable | None = Field(None, description="a word, as text")
    message: str = Field("", description="text")
    timestamp: Printable | None = Field(None, description="a time such as 2026-01-22T10:30:00Z")


class Metadata(Table):
    """About the export."""

    hypersdk_version: Printable | None = Field(None, description="a version, as text")
    job_id: Printable | None = Field(None, description="the export's identifier, as text")
    created_at: Printable | None = Field(None, description="a time such as 2026-01-22T10:30:00Z")
    tags: Annotated[dict[Printable, str] | None, BeforeValidator(_tags)] = Field(
        None, description="a list of words, or a table of words and their values, as text"
    )


class Inspect(Wish):
    """The INSPECT stage."""

    enabled: Flag = None
    detect_os: Flag = None
    detect_kernel: Flag = None
    collect_guest_info: Flag = None


class Fix(Wish):
    """The FIX stage."""

    enabled: Flag = None
    inject_drivers: Flag = None
    fix_fstab: Flag = None
    fix_grub: Flag = None
    regenerate_initramfs: Flag = None
    backup: Flag = None
    print_fstab: Flag = None
    update_grub: Flag = None
    regen_initramfs: Flag = None
    fstab_mode: Literal["stabilize-all", "bypath-only", "noop", ""] | None = Field(
        None, description="stabilize-all, bypath-only or noop"
    )
    remove_vmware_tools: Flag = None


class Convert(Wish):
    """The CONVERT stage."""

    enabled: Flag = None
    target_format: OutputFormat | None = Field(None, description="qcow2 or raw")
    compression: Flag = None
    output_dir: Directory | None = Field(None, description="an absolute path")
    compress: Flag = None
    compress_level: int | None = Field(None, ge=0, le=9, description="a number from 1 to 9")


class Validate(Wish):
    """The VALIDATE stage."""

    enabled: Flag = None
    verify_checksum: Flag = None
    test_boot: Flag = None
    check_image_integrity: Flag = None


class Pipeline(Wish):
    """The stages that are wanted."""

    inspect: Inspect | None = Field(None, description="a table with the key enabled")
    fix: Fix | None = Field(None, description="a table with the key enabled")
    convert: Convert | None = Field(None, description="a table with the key enabled")
    validate_: Validate | None = Field(None, alias="validate", description="a table with the key enabled")


class Output(Table):
    """Where the disks are to be written."""

    directory: Directory | None = Field(None, description="an absolute path")
    format: OutputFormat | None = Field(None, description="qcow2 or raw")
    filename: FileName | None = Field(None, description="a file name")


class Report(Table):
    """The extra copy of the report."""

    enabled: Flag = None
    path: FileName | None = Field(None, description="a file name")


class Options(Table):
    """How the job is to be run."""

    dry_run: Flag = None
    verbose: Annotated[int | None, BeforeValidator(_verbosity)] = Field(
        None, ge=0, le=9, description="a number from 0 to 3"
    )
    report: Report | None = Field(None, description="a table with the keys enabled and path")


class Document(Table):
    """A whole manifest."""

    manifest_version: Annotated[Literal["1.0"], BeforeValidator(_version)] = Field(description='"1.0"')
    source: Source = Field(description="a table with the key vm_name")
    vm: VM | None = Field(None, description="a table with keys such as cpu")
    disks: list[Disk] = Field(min_length=1, max_length=ENTRY_LIMIT, description=f"a list of 1 to {ENTRY_LIMIT} disks")
    nics: list[Nic] | None = Field(
        None, max_length=ENTRY_LIMIT, description=f"a list of at most {ENTRY_LIMIT} network interfaces"
    )
    notes: list[str] | None = Field(None, description="a list of texts")
    warnings: list[Warned] | None = Field(None, description="a list of tables with the key message")
    metadata: Metadata | None = Field(None, description="a table")
    pipeline: Pipeline | None = Field(None, description="a table of stages")
    configuration: dict[str, Any] | None = Field(None, description="a table")
    output: Output | None = Field(None, description="a table with keys such as format")
    options: Options | None = Field(None, description="a table with keys such as dry_run")
