"""What the guest calls its devices: the names that hardware gave, which device each one is, and the names that stay."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

# What names a device by what is on it, and which property of a Device that is.
BY_CONTENT = {
    "UUID=": "uuid",
    "/dev/disk/by-uuid/": "uuid",
    "LABEL=": "label",
    "/dev/disk/by-label/": "label",
    "PARTUUID=": "part_uuid",
    "/dev/disk/by-partuuid/": "part_uuid",
    "PARTLABEL=": "part_label",
    "/dev/disk/by-partlabel/": "part_label",
}
# These by-id names come from the content (LVM, RAID, device mapper), so they do not change. A multipath device's come
# from its disk.
_ID_OF_CONTENT = re.compile(r"(?!dm-(?:name-mpath|uuid-(?:part\d+-)?mpath-))(?:dm|md|lvm-pv)-(?:name|uuid)-")
# What systems call drives with removable media, which the new machine has none of.
_REMOVABLE = re.compile(r"/dev/(?:sr\d+|scd\d+|cdrom\d*|cdrw\d*|dvd\w{0,4}|fd\d\w{0,8}|floppy\d*)")
_ESCAPE = re.compile(r"\\x([0-9a-fA-F]{2})")
# Types that one driver mounts.
_SAME_TYPES = {
    "ext2": "ext",
    "ext3": "ext",
    "ext4": "ext",
    "ext4dev": "ext",
    "msdos": "vfat",
    "fat": "vfat",
    "ntfs-3g": "ntfs",
    "ntfs3": "ntfs",
    "lowntfs-3g": "ntfs",
}

# What a device is that holds no file system.
NO_FILE_SYSTEM = ("", "swap", "LVM2_member", "crypto_LUKS", "linux_raid_member")

_Key = tuple[str, tuple[int | str, ...]]  # of a disk: the family of its name, and what tells it from the others


@dataclass(frozen=True)
class HardwareName:
    """A device name that hardware gave. Names of one family are given in one order.

    disk: what tells its disk from the others of the family. Where `ordered`, it is the disk's position, from 0;
    of an address, it is the numbers in it. part: the number of the partition, "" for the whole disk.
    """

    family: str
    disk: tuple[int | str, ...]
    part: str
    ordered: bool = False


def _letters(found: re.Match[str]) -> tuple[int | str, ...]:
    """The position that `a`, `b`, ... `z`, `aa` stand for."""
    value = 0
    for letter in found["disk"]:
        value = value * 26 + ord(letter) - ord("a") + 1
    return (value - 1,)


def _number(found: re.Match[str]) -> tuple[int | str, ...]:
    return (int(found["disk"]),)


def _nvme(found: re.Match[str]) -> tuple[int | str, ...]:
    return (int(found["disk"]), int(found["space"]))


def _address(found: re.Match[str]) -> tuple[int | str, ...]:
    """The words of an address, with their numbers as such, so that a tenth target comes after the second."""
    words = re.split(r"[-:.]", found["disk"])
    return tuple(int(word) if word.isascii() and word.isdigit() and len(word) < 10 else word for word in words)


def _identity(found: re.Match[str]) -> tuple[int | str, ...]:
    """The identity of a disk, without the words before it: the same disk is scsi-3600… and wwn-0x600…."""
    wwn = re.fullmatch(r"(?:scsi-3|wwn-0x|dm-uuid-mpath-3|dm-name-mpath)?([0-9a-f]{16,32})", found["disk"])
    return (wwn[1] if wwn else found["disk"],)


@dataclass(frozen=True)
class _Kind:
    """One kind of names. pattern: with the groups `disk` and perhaps `part`."""

    family: str
    pattern: re.Pattern[str]
    disk: Callable[[re.Match[str]], tuple[int | str, ...]]
    ordered: bool = False


_NEVER_EXPORTED = {("azure", ("resource",))}
_PART = r"(?P<part>\d{1,3})"
# Every name that Linux gave disks by the order in which it found them, or by the place or the identity of the hardware.
_KINDS = (
    # SCSI and SATA, IDE before libata, virtio, Xen
    *(
        _Kind(family, re.compile(rf"/dev/{family}(?P<disk>[a-z]{{1,3}}){_PART}?"), _letters, ordered=True)
        for family in ("sd", "hd", "vd", "xvd")
    ),
    _Kind("nvme", re.compile(rf"/dev/nvme(?P<disk>\d{{1,3}})n(?P<space>\d{{1,3}})(?:p{_PART})?"), _nvme, ordered=True),
    _Kind("mmcblk", re.compile(rf"/dev/mmcblk(?P<disk>\d{{1,3}})(?:p{_PART})?"), _number, ordered=True),
    # HP's and Compaq's RAID controllers
    _Kind("cciss", re.compile(rf"/dev/(?:cciss|ida)/c\d+d(?P<disk>\d{{1,3}})(?:p{_PART})?"), _number, ordered=True),
    # multipath, by its own names and by the identity of the disk
    _Kind("mpath", re.compile(rf"/dev/mapper/mpath(?P<disk>[a-z]{{1,3}}?)(?:(?:p|-part|_part)?{_PART})?"), _letters),
    _Kind("mpath", re.compile(rf"/dev/mapper/mpath(?P<disk>\d{{1,3}})(?:(?:p|-part|_part){_PART})?"), _number),
    _Kind(
        "id", re.compile(rf"/dev/mapper/3(?P<disk>[0-9a-f]{{16}}(?:[0-9a-f]{{16}})?)(?:(?:p|-part|_part){_PART})?"),
        _identity,
    ),
    _Kind("path", re.compile(rf"/dev/disk/by-path/(?P<disk>\S+?)(?:-part{_PART})?"), _address),
    _Kind("id", re.compile(rf"/dev/disk/by-id/(?P<disk>\S+?)(?:-part{_PART})?"), _identity),
    # what Azure's agent and its cloud-init name
    _Kind("azure", re.compile(rf"/dev/disk/(?:azure|cloud)/(?:azure_)?(?P<disk>\S+?)(?:-part{_PART})?"), _address),
    _Kind("seq", re.compile(rf"/dev/disk/by-diskseq/(?P<disk>\d{{1,9}})(?:-part{_PART})?"), _number),
)  # fmt: skip


def hardware_name(spec: str) -> HardwareName | None:
    """The parts of a device name that hardware gave; None for any other name."""
    for kind in _KINDS:
        if found := kind.pattern.fullmatch(spec):
            if kind.family == "id" and _ID_OF_CONTENT.match(found["disk"]):
                return None
            part = (found.groupdict().get("part") or "").lstrip("0")
            return HardwareName(kind.family, kind.disk(found), part, kind.ordered)
    return None


def changes_with_hardware(spec: str) -> bool:
    """Whether `spec` is a device name that other hardware changes."""
    return hardware_name(spec) is not None


def as_path(name: str) -> str:
    """`UUID=...` as a path, for what takes nothing else."""
    key, _, value = name.partition("=")
    return f"/dev/disk/by-{key.lower()}/{value}" if value else name


def is_removable(spec: str) -> bool:
    """Whether `spec` is a drive for removable media."""
    return bool(_REMOVABLE.fullmatch(spec))


@dataclass(frozen=True)
class Device:
    """A partition, a volume or a whole disk: `name` as libguestfs says it, what is on it, and its identifiers.

    `part_type` is the partition's type: a GUID in lower case, or 0x83 and the like. `member` tells the devices of one
    file system or array from one another, which have their UUID in common. aliases: other names that the guest has for
    it, on any hardware. disk: the disk that a partition is on, and a disk itself; "" for what may span several.
    """

    name: str
    type: str = ""
    uuid: str = ""
    label: str = ""
    part_uuid: str = ""
    part_type: str = ""
    part_label: str = ""
    member: str = ""
    aliases: tuple[str, ...] = ()
    disk: str = ""


@dataclass(frozen=True)
class Became:
    """What a device name has to be: `device` is what it means, `name` what to write.

    why: how that is known, or for a name that is None, why nobody can know it.
    """

    device: Device | None
    name: str | None
    why: str

    @property
    def place(self) -> str:
        """The device as the appliance has it, "" if nobody knows it."""
        return self.device.name if self.device else ""


@dataclass(frozen=True)
class Names:
    """Which device each of the guest's names is. known: from a family and a disk in it to the disk here.

    absent: those that are certainly on no disk of the export. evidence: how a disk is known.
    """

    devices: Mapping[str, Device]
    known: Mapping[_Key, str]
    absent: frozenset[_Key] = frozenset()
    evidence: Mapping[_Key, str] = field(default_factory=dict)

    def all(self, spec: str) -> tuple[Device, ...]:
        """Every device that `spec` means: more than one where an identifier is there more than once."""
        if name := hardware_name(spec):
            disk = self.known.get((name.family, name.disk))
            device = self.devices.get(disk + name.part) if disk else None
            return (device,) if device else ()
        for start, key in BY_CONTENT.items():
            if spec.startswith(start):
                value = _unescaped(spec.removeprefix(start).strip("\"'"))
                return self._with(key, value)
        return tuple(device for device in self.devices.values() if spec in (device.name, *device.aliases))

    def find(self, spec: str) -> Device | None:
        """The one device that the guest means by `spec`, or None if nobody can know."""
        found = self.all(spec)
        return found[0] if len(found) == 1 else None

    def lacks(self, spec: str) -> bool:
        """Whether `spec` is by its name a device that is certainly on no disk of the export."""
        name = hardware_name(spec)
        return name is not None and (name.family, name.disk) in self.absent

    def _with(self, key: str, value: str) -> tuple[Device, ...]:
        """The devices with an identifier; of those that make up one file system or array, the first stands for all."""
        found: list[Device] = []
        for device in self.devices.values():
            # Labels are as they are written, UUIDs are numbers.
            said = getattr(device, key)
            same = said == value if "label" in key else said.lower() == value.lower()
            if value and same and not any(_belong_together(device, other) for other in found):
                found.append(device)
        return tuple(found)

    def twins(self, device: Device) -> tuple[Device, ...]:
        """The other devices with the UUID of this one that are no part of the same file system."""
        if not device.uuid:
            return ()
        same = (other for other in self.devices.values() if other.uuid.lower() == device.uuid.lower())
        return tuple(other for other in same if other != device and not _belong_together(other, device))

    def becomes(self, spec: str, *, type: str = "auto", by_partition: bool = False) -> Became:
        """What a name has to be on the new machine.

        type: what is said to be on the device. by_partition: only the partition's own identifier will do, as there is
        no initramfs, or the content changes.
        """
        devices = self.all(spec)
        changes = changes_with_hardware(spec)
        if is_removable(spec):
            return Became(None, None, "the new machine has no such drive")
        if len(devices) > 1:
            twins = " and ".join(device.name for device in devices)
            return Became(None, None, f"{twins} are both that: nobody can know which of them is meant")
        if not devices:
            uncertain = changes and not self.lacks(spec)
            why = "nobody can know which disk that is" if uncertain else "no disk of this export has that device"
            return Became(None, None, why)
        device = devices[0]
        if not changes:
            return Became(device, spec, "no other device has that name")
        if not fits(device, type):
            return Became(None, None, f"by its place it would be {device.name}, which is no {type} but {device.type}")
        key = hardware_name(spec)
        how = self.evidence.get((key.family, key.disk), "") if key else ""
        return self.known_as(device, how, by_partition=by_partition)

    def stable(self, spec: str, *, by_partition: bool = False) -> str | None:
        """`UUID=...` or `PARTUUID=...` for a name that hardware gave; None if nobody knows a unique one."""
        return self.becomes(spec, by_partition=by_partition).name

    def known_as(self, device: Device, how: str, *, by_partition: bool = False) -> Became:
        """What has to be written for a device. how: it is known that it is this one."""
        name = self.name_of(device, by_partition=by_partition)
        return Became(device, name, how if name else f"{device.name} has no identifier that no other device has")

    def name_of(self, device: Device, *, by_partition: bool = False) -> str | None:
        """`UUID=...` or `PARTUUID=...` of a device; None if it has none that no other device has."""
        if not by_partition and device.uuid and not self.twins(device):
            return f"UUID={device.uuid}"
        if device.part_uuid and len(self._with("part_uuid", device.part_uuid)) == 1:
            return f"PARTUUID={device.part_uuid}"
        return None


def _belong_together(one: Device, other: Device) -> bool:
    """Whether two devices with one UUID are members of one file system or array, and no copies of each other."""
    return one.type == other.type and "" != one.member != other.member != ""


def _unescaped(name: str) -> str:
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), name)


def fits(device: Device, type: str) -> bool:
    """Whether what is on a device can be what a line of fstab says: a type, or a list of them, or `auto`."""
    has = _SAME_TYPES.get(device.type, device.type)
    return not has or type in ("auto", "none", "") or has in {_SAME_TYPES.get(one, one) for one in type.split(",")}


@dataclass(frozen=True)
class Known:
    """What is known of the guest's names of its disks. disagrees: the root's name, `root`, is not that of its place."""

    names: Names
    disagrees: bool
    root: str


def work_out(
    disks: Sequence[str],
    devices: Mapping[str, Device],
    used: Iterable[str],
    root: tuple[str, str] | None,
    types: Mapping[str, str] | None = None,
    taken: Collection[str] = (),
    needed: Iterable[str] = (),
) -> Known:
    """Find out which disk each hardware name in `used` is.

    disks: libguestfs's names, in the order in which the export has the disks. root: the name that the guest has for its
    root, and the disk that the root was found on by looking, where there are both. types: what has to be on what some
    of the names mean. taken: the devices that the guest knows by other names. needed: the names without which the guest
    does not start, so that they are on a disk of the export.

    A position counts if all names that go by position are of one family, and nothing contradicts it: the root's name,
    or a device that is not there, holds something else, or is known by another name already. An
    address counts if there are as many as disks, all on one controller. What the guest needs is on the one disk that
    has such a file system there. What then is left over on both sides, one name and one disk, belongs together, if the
    guest knows nothing there by another name. Of two names for one disk nobody knows, and nothing is guessed. Azure's
    temporary disk is on no disk of an export.
    """
    named = list(dict.fromkeys(name for spec in used if (name := hardware_name(spec))))
    keys = list(dict.fromkeys((name.family, name.disk) for name in named))
    known: dict[_Key, str] = {}
    evidence: dict[_Key, str] = {}
    absent: set[_Key] = set()
    top = hardware_name(root[0]) if root else None
    disagrees = False
    if root and top:
        known[top.family, top.disk] = root[1]
        evidence[top.family, top.disk] = "the root was found on that disk by looking"
    by_position = {name.family for name in named if name.ordered}
    if len(by_position) == 1:
        (family,) = by_position
        positions = _positions(family, keys, len(disks))
        place = positions.get((family, top.disk)) if top else None
        disagrees = root is not None and place is not None and (place >= len(disks) or disks[place] != root[1])
        by_place = {key: disks[at] for key, at in positions.items() if at < len(disks)}
        if not disagrees and not (len(disks) > 1 and _contradicted(Names(devices, by_place), types or {}, taken)):
            known |= by_place
            evidence = dict.fromkeys(by_place, "its place among the disks of the export") | evidence
            absent |= {key for key, at in positions.items() if at >= len(disks)}
    absent |= {key for key in keys if key in _NEVER_EXPORTED}
    by_address = _by_address(keys, disks, known)
    known |= by_address
    evidence = dict.fromkeys(by_address, "the order of the addresses on its controller") | evidence
    if len(disks) == 1:
        for family in {family for family, _ in keys} - by_position:
            own = [key for key in keys if key[0] == family and key not in absent]
            if len(own) == 1 and own[0] not in known:
                if _is_taken(own[0], disks[0], named, taken):
                    absent.add(own[0])
                else:
                    known[own[0]], evidence[own[0]] = disks[0], "it is the only disk"
            elif any(key in known for key in own):
                absent |= {key for key in own if key not in known}
    by_content = _by_content(
        needed, devices, [disk for disk in disks if disk not in known.values()], known, types or {}, taken
    )
    known |= by_content
    evidence |= dict.fromkeys(by_content, "it is the only disk with such a file system in that place")
    left = [key for key in keys if key not in known and key not in absent]
    given = {known.get(key, "") for key in keys}
    free = [disk for disk in disks if disk not in given]
    if len(left) == len(free) == 1 and len(disks) > 1 and not _is_taken(left[0], free[0], named, taken):
        known[left[0]] = free[0]
        evidence[left[0]] = "it is the only disk, and the only name, that is left over"
    return Known(Names(devices, known, frozenset(absent), evidence), disagrees, root[0] if root else "")


def _by_content(
    needed: Iterable[str],
    devices: Mapping[str, Device],
    free: Sequence[str],
    known: Collection[_Key],
    types: Mapping[str, str],
    taken: Collection[str],
) -> dict[_Key, str]:
    """The disks of what the guest needs, where one alone of those that are free can be it."""
    found: dict[_Key, str] = {}
    said: dict[_Key, dict[str, str]] = {}
    for spec, type in types.items():
        if name := hardware_name(spec):
            said.setdefault((name.family, name.disk), {})[spec] = type
    for name in dict.fromkeys(filter(None, map(hardware_name, needed))):
        key = (name.family, name.disk)
        could = [
            disk
            for disk in free
            if (device := devices.get(disk + name.part)) is not None
            and device.type not in NO_FILE_SYSTEM
            and not _contradicted(Names(devices, {key: disk}), said.get(key, {}), taken)
        ]
        if key not in known and len(could) == 1:
            found[key] = could[0]
    given = list(found.values())
    return {key: disk for key, disk in found.items() if given.count(disk) == 1}


def _is_taken(key: _Key, disk: str, named: Iterable[HardwareName], taken: Collection[str]) -> bool:
    """Whether a name would mean, on this disk, what the guest knows by another name."""
    return any(disk + name.part in taken for name in named if (name.family, name.disk) == key)


def _contradicted(names: Names, types: Mapping[str, str], taken: Collection[str]) -> bool:
    """Whether a name means, by its position, what it cannot mean."""
    for spec, type in types.items():
        name = hardware_name(spec)
        if name and (name.family, name.disk) in names.known:
            device = names.find(spec)
            if device is None or device.name in taken or not fits(device, type):
                return True
    return False


def _positions(family: str, keys: Sequence[_Key], disks: int) -> dict[_Key, int]:
    """The position of each disk that a family names, and of all that it could name; empty if they have none."""
    if family != "nvme":
        return {(family, (number,)): number for number in range(disks)} | {
            key: int(key[1][0]) for key in keys if key[0] == family
        }
    # One controller with a name space for each disk, as on VMware, or a controller for each, as on EC2; or a mixture.
    spaces = [key for key in keys if key[0] == family and key[1][1] != 1]
    controllers = [key for key in keys if key[0] == family and key[1][0] != 0]
    if spaces and controllers:
        return {}
    if controllers:
        return {key: int(key[1][0]) for key in keys if key[0] == family}
    return {key: int(key[1][1]) - 1 for key in keys if key[0] == family}


def _by_address(keys: Sequence[_Key], disks: Sequence[str], known: Mapping[_Key, str]) -> dict[_Key, str]:
    """The disks of addresses that are all on one controller, if there is one for each disk."""
    addresses = [key for key in keys if key[0] == "path"]
    kinds = {tuple(type(word) for word in disk) for _, disk in addresses}
    if not len(addresses) == len(disks) > 1 or len(kinds) > 1 or len({disk[:-2] for _, disk in addresses}) > 1:
        return {}
    order = dict(zip(sorted(addresses), disks, strict=True))
    return {} if any(known.get(key, disk) != disk for key, disk in order.items()) else order
