"""What a manifest file may hold, key by key, in either dialect; also the source of its JSON schema.

It is long because it is that one document: whoever looks for a key finds it here, and nowhere else. Each description
completes the sentence "it must be ...": it is what a person reads who got the value wrong.
"""

from __future__ import annotations

import ipaddress
import re
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator
from pydantic_core import PydanticCustomError

from hyper2kvmd.text import is_card_mac, mac_address, show

VERSION = "1.0"
Format = Literal["vmdk", "qcow2", "raw", "vhd", "vhdx", "vdi"]  # what a disk of an export can be
CHECKSUM = re.compile(r"sha256:[0-9a-fA-F]{64}")
IDENTIFIER = re.compile(r"[a-zA-Z0-9_-]{1,64}")
ENTRY_LIMIT = 64  # disks, network interfaces, and every list in `configuration`

# What ends up in commands and in files of the guest is matched in full, so that it needs no escaping there.
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
HOSTNAME = re.compile(rf"{_LABEL}(?:\.{_LABEL}){{0,31}}")
USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
GUEST_PATH = re.compile(r"(?:/[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,63}){1,16}")
UNIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9:_.@\\-]{0,199}")
UNIT_TYPES = (".service", ".socket", ".timer", ".target", ".path", ".mount", ".automount", ".swap")
# As Linux has them, and as Windows calls its connections: "Ethernet 2", "LAN-Verbindung (alt)".
INTERFACE = re.compile(r"\w(?:[\w ().#-]{0,62}[\w).])?")
PASSWORD_HASH = re.compile(r"\$[a-z0-9-]{1,16}\$[A-Za-z0-9./$=,+*-]{8,500}")
SSH_KEY = re.compile(
    r"(?:ssh-(?:ed25519|rsa|dss)|ecdsa-sha2-nistp(?:256|384|521)|sk-(?:ssh-ed25519|ecdsa-sha2-nistp256)@openssh\.com)"
    r" AAAA[A-Za-z0-9+/]{16,8000}={0,3}(?: .{0,256})?"
)
SUDO = re.compile(r"(?:ALL ?= ?)?(?:\(ALL(?: ?: ?ALL)?\) ?)?(?P<tag>NOPASSWD: ?|PASSWD: ?)?ALL")


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
    mac = mac_address(text)
    if mac is None or not is_card_mac(mac):
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


def _hostname(text: str) -> str:
    if not HOSTNAME.fullmatch(text) or len(text) > 253:
        raise refuse(
            f"{show(text)} is not a host name",
            "Use letters, digits and '-' in parts of at most 63 characters with '.' between them.",
        )
    return text


def _own_hostname(text: str) -> str:
    if len(text) > 64:
        raise refuse(f"{show(text)} has {len(text)} characters", "Linux takes host names of at most 64.")
    return text


def _names(value: object) -> object:
    """Several names in one text, as they stand in /etc/hosts."""
    return value.split() if isinstance(value, str) else value


def _user(text: str) -> str:
    if not USER.fullmatch(text):
        raise refuse(
            f"{show(text)} is not the name of a user or a group",
            "Use 1 to 32 small letters, digits, '_' and '-'; the first is a letter or '_'.",
        )
    return text


def _comment(text: str) -> str:
    if ":" in text:
        raise refuse(f"{show(text)} holds a ':', which separates the fields of /etc/passwd", "Remove it.")
    return text


def _guest_path(text: str) -> str:
    if not GUEST_PATH.fullmatch(text):
        raise refuse(
            f"{show(text)} is not a path in the guest",
            "Write it in full, with letters, digits, '_', '.', '+' and '-', such as /bin/bash.",
        )
    return text


def _ssh_key(text: str) -> str:
    # The text is not shown: it could be the private key.
    if not SSH_KEY.fullmatch(text):
        raise refuse(
            "this is not a public key of OpenSSH", "Write the one line of the .pub file, such as ssh-ed25519 AAAA…"
        )
    return text


def _password_hash(value: object) -> object:
    # The text is not shown: it could be the password.
    if not isinstance(value, str) or not PASSWORD_HASH.fullmatch(value):
        raise refuse("this is not the hash of a password", "Write what `openssl passwd -6` prints, starting with $6$.")
    return value


def _sudo(text: str) -> str:
    found = SUDO.fullmatch(text)
    if found is None:
        # A line that sudo cannot read stops it from working for everybody.
        raise refuse(f"{show(text)} is not a rule that is known here", "Write ALL=(ALL) ALL or ALL=(ALL) NOPASSWD:ALL.")
    return "NOPASSWD: ALL" if (found["tag"] or "").startswith("NOPASSWD") else "ALL"


def _unit(text: str) -> str:
    if not UNIT.fullmatch(text):
        raise refuse(f"{show(text)} is not the name of a systemd unit", "Write a name such as sshd or chronyd.service.")
    return text if text.endswith(UNIT_TYPES) else f"{text}.service"


def _interface(text: str) -> str:
    if not INTERFACE.fullmatch(text):
        raise refuse(
            f"{show(text)} is not the name of a network interface",
            "Write the guest's own name for it, such as ens192, or in Windows Ethernet0.",
        )
    return text


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address("" if "%" in text else text))
    except ValueError:
        raise refuse(f"{show(text)} is not an IP address", "Write one such as 192.0.2.10 or 2001:db8::10.") from None


def _address_with_prefix(text: str) -> str:
    try:
        return str(ipaddress.ip_interface("" if "%" in text or "/" not in text else text))
    except ValueError:
        raise refuse(
            f"{show(text)} is not an IP address with the length of its prefix",
            "Write one such as 192.0.2.10/24 or 2001:db8::10/64.",
        ) from None


def _refuse_repeated(words: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for word in words:
        if word in seen:
            raise refuse(f"{what} {show(word)} is there twice", "Delete one of the two.")
        seen.add(word)


Printable = Annotated[str, AfterValidator(_printable)]
Identifier = Annotated[str, AfterValidator(_identifier)]
FileName = Annotated[str, AfterValidator(_file_name), AfterValidator(_printable)]
Directory = Annotated[str, AfterValidator(_directory), AfterValidator(_printable)]
OutputFormat = Annotated[Literal["qcow2", "raw"], BeforeValidator(_output_format)]
HostName = Annotated[str, AfterValidator(_hostname)]
UserName = Annotated[str, AfterValidator(_user)]
GuestPath = Annotated[str, AfterValidator(_guest_path)]
UnitName = Annotated[str, AfterValidator(_unit)]
Address = Annotated[str, AfterValidator(_address)]
Flag = Annotated[bool | None, Field(description="true or false")]


class Table(BaseModel):
    """What the exporter owns: unknown keys are let through, and reported."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class Wish(BaseModel):
    """What tells us what to do. An unknown key is an error in the settings; of a manifest, reader.py takes it out."""

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
    source_format: Format = Field(description=f"one of {', '.join(get_args(Format))}")
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
        None,
        description="a list of words, or a table of words and their values, as text",
        json_schema_extra={
            "anyOf": [
                {"type": "array", "items": {"type": "string"}},
                {"type": "object", "additionalProperties": {"type": "string"}},
                {"type": "null"},
            ]
        },
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
    enable_rdp: Flag = None


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


class Hostname(Wish):
    """What the guest is called."""

    hostname: Annotated[HostName, AfterValidator(_own_hostname)] | None = Field(None, description="a host name")
    domain: HostName | None = Field(None, description="a domain, such as example.com")
    hosts: dict[Address, Annotated[list[HostName], BeforeValidator(_names)]] | None = Field(
        None, max_length=ENTRY_LIMIT, description="a table of IP addresses and the host names of each, for /etc/hosts"
    )

    @model_validator(mode="after")
    def _one_domain(self) -> Hostname:
        if self.domain and not self.hostname:
            raise refuse("a domain without a hostname", "Add the hostname.")
        if self.domain and self.hostname and "." in self.hostname:
            raise refuse(
                f"{show(self.hostname)} has a domain of its own beside {show(self.domain)}", "Delete one of the two."
            )
        return self


class User(Wish):
    """A user, who is made if there is none of that name. Passwords are taken as hashes only."""

    name: UserName = Field(description="the user's name")
    uid: int | None = Field(None, ge=1, le=2**32 - 2, description="a number of at least 1")
    groups: list[UserName] | None = Field(None, max_length=ENTRY_LIMIT, description="a list of groups")
    comment: Annotated[Printable, AfterValidator(_comment)] | None = Field(None, description="text for people")
    shell: GuestPath | None = Field(None, description="the path of a shell, such as /bin/bash")
    home: GuestPath | None = Field(None, description="the path of a directory, such as /home/ann")
    ssh_keys: list[Annotated[Printable, AfterValidator(_ssh_key)]] | None = Field(
        None, max_length=ENTRY_LIMIT, description="a list of public keys"
    )
    password_hash: Annotated[SecretStr, BeforeValidator(_password_hash)] | None = Field(
        None, description="the hash of a password, as `openssl passwd -6` prints it"
    )
    sudo: Annotated[str, AfterValidator(_sudo)] | None = Field(
        None, description="ALL=(ALL) ALL, or ALL=(ALL) NOPASSWD:ALL to be asked for no password"
    )
    lock: Flag = None


class Users(Wish):
    """The guest's users."""

    users: list[User] | None = Field(
        None, max_length=ENTRY_LIMIT, description=f"a list of at most {ENTRY_LIMIT} users with the key name"
    )
    disable_users: list[UserName] | None = Field(
        None, max_length=ENTRY_LIMIT, description=f"a list of at most {ENTRY_LIMIT} names of users"
    )

    @model_validator(mode="after")
    def _each_once(self) -> Users:
        _refuse_repeated([*(user.name for user in self.users or ()), *(self.disable_users or ())], "the user")
        return self


class Services(Wish):
    """The guest's systemd units."""

    enable: list[UnitName] | None = Field(None, max_length=ENTRY_LIMIT, description="a list of units")
    disable: list[UnitName] | None = Field(None, max_length=ENTRY_LIMIT, description="a list of units")
    mask: list[UnitName] | None = Field(None, max_length=ENTRY_LIMIT, description="a list of units")

    @model_validator(mode="after")
    def _each_once(self) -> Services:
        _refuse_repeated([*(self.enable or ()), *(self.disable or ()), *(self.mask or ())], "the unit")
        return self


class Interface(Wish):
    """How one network interface gets its addresses."""

    name: Annotated[str, AfterValidator(_interface)] = Field(
        description="the guest's name of it, such as ens192, or in Windows Ethernet0"
    )
    dhcp: Flag = None
    addresses: list[Annotated[str, AfterValidator(_address_with_prefix)]] | None = Field(
        None, max_length=ENTRY_LIMIT, description="a list of addresses such as 192.0.2.10/24"
    )
    gateway4: Address | None = Field(None, description="an IPv4 address")
    gateway6: Address | None = Field(None, description="an IPv6 address")
    dns: list[Address] | None = Field(None, max_length=ENTRY_LIMIT, description="a list of IP addresses")
    search: list[HostName] | None = Field(None, max_length=ENTRY_LIMIT, description="a list of domains")

    @model_validator(mode="after")
    def _reachable(self) -> Interface:
        if bool(self.dhcp) == bool(self.addresses):
            raise refuse(
                f"{self.name} has {'both dhcp and addresses' if self.dhcp else 'neither dhcp nor addresses'}",
                "Write dhcp: true, or a list of addresses.",
            )
        networks = [ipaddress.ip_interface(address).network for address in self.addresses or ()]
        for version, gateway in ((4, self.gateway4), (6, self.gateway6)):
            if gateway is None:
                continue
            address = ipaddress.ip_address(gateway)
            if address.version != version:
                raise refuse(f"{gateway} is not an IPv{version} address", f"gateway{version} takes one.")
            if not address.is_link_local and not any(address in network for network in networks):
                raise refuse(
                    f"the gateway {gateway} is in no network of the addresses of {self.name}",
                    "Correct it, or the length of the prefix.",
                )
        return self


class Network(Wish):
    """The guest's network interfaces."""

    interfaces: list[Interface] | None = Field(
        None, max_length=ENTRY_LIMIT, description=f"a list of at most {ENTRY_LIMIT} tables with the key name"
    )

    @model_validator(mode="after")
    def _each_once(self) -> Network:
        _refuse_repeated((interface.name for interface in self.interfaces or ()), "the interface")
        return self


class Configuration(Wish):
    """What is to be changed in the guest besides what it needs to boot."""

    hostname: Hostname | None = Field(None, description="a table with the key hostname")
    users: Users | None = Field(None, description="a table with the keys users and disable_users")
    services: Services | None = Field(None, description="a table with the keys enable, disable and mask")
    network: Network | None = Field(None, description="a table with the key interfaces")


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
    configuration: Configuration | None = Field(
        None, description="a table with the keys hostname, users, services and network"
    )
    output: Output | None = Field(None, description="a table with keys such as format")
    options: Options | None = Field(None, description="a table with keys such as dry_run")


def table(annotation: Any) -> type[BaseModel] | None:
    """The model in a field's annotation, such as `Model | None`, `list[Model]` and `dict[str, Model]`, if any."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, dict, types.UnionType, typing.Union):
        return next((found for inner in typing.get_args(annotation) if (found := table(inner))), None)
    return None
