"""What a manifest says, in one form for both dialects."""

from __future__ import annotations

import hashlib
import re
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SecretStr

from hyper2kvmd.errors import Finding
from hyper2kvmd.manifest.ovf import Ovf
from hyper2kvmd.manifest.wire import Format

SLUG_LENGTH = 64


class Part(BaseModel):
    """A part of a manifest: a value that never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class VMSpec(Part):
    """The virtual hardware, as far as the manifest says: None and "unknown" are what it leaves out or cannot tell."""

    cpu: int | None
    memory_mib: int | None
    firmware: Literal["bios", "uefi", "unknown"]
    secure_boot: bool | None
    os_hint: str | None
    os_version: str | None


class Disk(Part):
    """A disk of the export. `path` is as written by the exporter, not checked in any way.

    `format` is vmdk, qcow2, raw, vhd, vhdx or vdi. `bytes` is the size of the file or the capacity, whichever the
    exporter chose; `sha256` is in hexadecimal.
    """

    id: str
    format: Format
    bytes: int
    path: str
    sha256: str | None
    boot_order: int | None
    kind: Literal["boot", "data", "unknown"]
    label: str | None


class Nic(Part):
    """A network interface: `mac` in lower case with colons, `network` as the source named it."""

    id: str
    mac: str | None
    network: str | None


class Inspect(Part):
    """The INSPECT stage."""

    enabled: bool


class Fix(Part):
    """The FIX stage and which of its parts are wanted."""

    enabled: bool
    drivers: bool
    fstab: bool
    bootloader: bool
    initramfs: bool
    backup: bool
    print_fstab: bool
    fstab_mode: Literal["stabilize-all", "bypath-only", "noop"]
    remove_vmware_tools: bool
    enable_rdp: bool


class Convert(Part):
    """The CONVERT stage. None means that the manifest does not say."""

    enabled: bool
    format: Literal["qcow2", "raw"] | None
    compress: bool | None
    compress_level: int | None
    output_dir: str | None


class Validate(Part):
    """The VALIDATE stage. `test_boot` is None where the manifest does not say."""

    enabled: bool
    verify_checksum: bool
    check: bool
    test_boot: bool | None


class Stages(Part):
    """The pipeline as the manifest wants it."""

    inspect: Inspect
    fix: Fix
    convert: Convert
    validate_: Validate


class User(Part):
    """A user of the guest, made if there is none of that name; None and empty mean that nothing is asked for.

    `sudo` is what a rule ends in: ALL, or NOPASSWD: ALL. `lock` takes the password away, not other ways to log in.
    """

    name: str
    uid: int | None = None
    groups: tuple[str, ...] = ()
    comment: str | None = None
    shell: str | None = None
    home: str | None = None
    ssh_keys: tuple[str, ...] = ()
    password_hash: SecretStr | None = None
    sudo: str | None = None
    lock: bool = False


class Services(Part):
    """systemd units to enable, disable and mask, with their suffix; each in one list at most."""

    enable: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()


class Interface(Part):
    """A network interface, by the guest's name: with DHCP, or else with `addresses` such as 192.0.2.10/24."""

    name: str
    dhcp: bool = False
    addresses: tuple[str, ...] = ()
    gateway4: str | None = None
    gateway6: str | None = None
    dns: tuple[str, ...] = ()
    search: tuple[str, ...] = ()


class Configuration(Part):
    """What is to be changed in the guest besides what it needs to boot. `hosts`: names by IP address."""

    hostname: str | None = None
    domain: str | None = None
    hosts: dict[str, tuple[str, ...]] = {}
    users: tuple[User, ...] = ()
    disable_users: tuple[str, ...] = ()
    services: Services = Services()
    interfaces: tuple[Interface, ...] = ()


class Output(Part):
    """Where and how the disks are to be written, as far as the manifest says. `filename` has no directory."""

    directory: str | None
    format: Literal["qcow2", "raw"] | None
    filename: str | None


class Options(Part):
    """How the job is to be run. `report_path` is the name of a copy of the report, without a directory."""

    dry_run: bool
    verbose: int
    report_path: str | None


class Made(Part):
    """How a manifest was made where none came with the disks. `document` is what it says.

    `descriptor` is what `file` says of the VM: the .ovf, or the .ova that has it in it.
    """

    file: str
    descriptor: Ovf
    document: dict[str, Any]


class Manifest(Part):
    """An Artifact Manifest. `sha256` is that of its bytes; `warnings` is what was noticed while reading.

    `made`: set if no file holds it, as it was made of an OVF descriptor; then `sha256` is that of the descriptor.
    """

    version: str
    dialect: Literal["seed", "go"]
    sha256: str
    provider: str | None
    vm_id: str | None
    vm_name: str
    datacenter: str | None
    export_timestamp: str | None
    vm: VMSpec
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...]
    stages: Stages
    output: Output
    options: Options
    configuration: Configuration
    tags: dict[str, str]
    job_id: str | None
    hypersdk_version: str | None
    notes: tuple[str, ...]
    exporter_warnings: tuple[str, ...]
    warnings: tuple[Finding, ...]
    made: Made | None = None

    @cached_property
    def slug(self) -> str:
        """The VM's name for files and the domain: `[A-Za-z0-9._-]{1,64}`, different for different VMs."""
        return slug(self.vm_name)

    def ordered(self) -> tuple[Disk, ...]:
        """The disks in boot order: those marked as boot disks first, then by hint, then as listed."""

        def rank(item: tuple[int, Disk]) -> tuple[bool, int, int]:
            position, disk = item
            # The Go exporter drops a hint of 0 as empty; elsewhere a disk without one keeps its position.
            missing = 0 if self.dialect == "go" else position
            return disk.kind != "boot", missing if disk.boot_order is None else disk.boot_order, position

        return tuple(disk for _, disk in sorted(enumerate(self.disks), key=rank))

    def boot_disk(self) -> Disk:
        """The disk that the manifest has the VM boot from, as far as it says."""
        return self.ordered()[0]


def slug(name: str) -> str:
    """A name that is safe as a file and domain name; one that had to be changed ends in a hash of the original.

    The hash keeps apart what would otherwise fall together, such as `db 1` and `db-1`.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("-.")
    if plain == name and len(plain) <= SLUG_LENGTH:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain[: SLUG_LENGTH - 9].rstrip('-') or 'vm'}-{digest}"
