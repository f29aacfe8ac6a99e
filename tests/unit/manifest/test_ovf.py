"""What is read from the OVF descriptor beside the disks, and how a broken or hostile one is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper2kvmd.errors import Finding
from hyper2kvmd.manifest import ovf
from hyper2kvmd.manifest.ovf import Ovf, OvfDisk, OvfError, OvfFile, OvfNic
from tests import DATA
from tests.pace import work_of_at_most

OVF = DATA / "ovf"
VSPHERE = (OVF / "vsphere.ovf").read_bytes()
OVFTOOL = (OVF / "ovftool.ovf").read_bytes()
GIB = 1 << 30


def problem(data: bytes) -> str:
    with pytest.raises(OvfError) as caught:
        ovf.parse(data, "web01.ovf")
    assert caught.value.finding.code == "ovf_unreadable"
    assert caught.value.finding.hint != ""
    return caught.value.finding.message


def system(hardware: str = "", *, sections: str = "", root: str = "") -> Ovf:
    """What is read from a descriptor without namespaces that has this hardware, and these other sections."""
    section = f"<VirtualHardwareSection>{hardware}</VirtualHardwareSection>"
    data = f"<Envelope>{root}<VirtualSystem>{sections}{section}</VirtualSystem></Envelope>"
    return ovf.parse(data.encode(), "web01.ovf")


def item(resource_type: int, **properties: object) -> str:
    """A device with the properties of these names."""
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in properties.items())
    return f"<Item><ResourceType>{resource_type}</ResourceType>{inner}</Item>"


def config(key: str, value: str) -> str:
    return f'<Config key="{key}" value="{value}"/>'


def envelope(*items: str) -> bytes:
    """A descriptor without namespaces whose network adapters have these properties."""
    devices = "".join(f"<Item><ResourceType>10</ResourceType>{item}</Item>" for item in items)
    section = f"<VirtualHardwareSection>{devices}</VirtualHardwareSection>"
    return f"<Envelope><VirtualSystem>{section}</VirtualSystem></Envelope>".encode()


def warning(found: Ovf) -> Finding:
    """The only warning of a descriptor."""
    (finding,) = found.warnings
    assert finding.code == "ovf_value"
    assert finding.hint != ""
    assert "'web01.ovf'" in finding.message
    return finding


def test_descriptor_of_ovftool_is_read_in_full() -> None:
    assert Ovf(
        name="db01.ovf",
        cpus=4,
        cores_per_socket=2,
        memory_mib=6144,
        firmware="uefi",
        secure_boot=True,
        tpm=True,
        nics=(OvfNic("00:50:56:82:3a:0c", "VM Network", "VmxNet3", 192),),
        disks=(
            OvfDisk("db01-disk1.vmdk", 16 * GIB, "VirtualSCSI", bus=0, unit=0),
            OvfDisk("db01-disk2.vmdk", GIB // 2, "VirtualSCSI", bus=0, unit=10),
            OvfDisk("db01-disk3.vmdk", GIB, "lsilogic", bus=1, unit=0),
            OvfDisk(None, 8 * GIB, "vmware.nvme.controller", bus=0, unit=0),
        ),
        uuid="d2a64d56-0617-4363-dc2d-9959b533a7b3",
        annotation="Orders & stock\nOwner: Jürgen",
        os="debian12_64Guest",
        vm_name="db01",
        files=(
            OvfFile("db01-disk1.vmdk", 1421344256, None),
            OvfFile("db01-disk2.vmdk", 70144, None),
            OvfFile("db01-disk3.vmdk", 70144, None),
            OvfFile("db01-file1.nvram", 270840, None),
        ),
    ) == ovf.parse(OVFTOOL, "db01.ovf")


def test_descriptor_that_says_nothing_leaves_everything_open() -> None:
    assert Ovf(name="web01.ovf") == system()


@pytest.mark.parametrize(
    ("quantity", "units", "mib"),
    [
        (4096, "byte * 2^20", 4096),
        (4096, "byte*2^20", 4096),
        (3, "byte * 2^30", 3072),
        (65536, "byte * 2^10", 64),
        (2048, "MegaBytes", 2048),
        (2, "GigaBytes", 2048),
        (512, "byte*1024*1024", 512),
        (1073741824, "byte", 1024),
        (1, "byte * 10^9", 953),
    ],
)
def test_memory_is_read_in_its_units(quantity: int, units: str, mib: int) -> None:
    found = system(item(4, VirtualQuantity=quantity, AllocationUnits=units))
    assert (mib, ()) == (found.memory_mib, found.warnings)


@pytest.mark.parametrize(
    ("quantity", "units", "says"),
    [
        ("4096", "parsec", "'4096' in 'parsec' as the memory"),
        ("4096", "", "'4096' without units as the memory"),
        ("4096", "byte * 2^-20", "'byte * 2^-20'"),
        ("4096", "byte * 2^999999999", "'byte * 2^999999999'"),
        ("4096", "byte * 9999^99 * 9999^99", "'4096'"),
        ("4096", "byte" + " * 2" * 9, "'4096'"),
        ("-1", "byte * 2^20", "'-1'"),
        ("9" * 5000, "byte * 2^20", "'99999"),
        ("many", "byte * 2^20", "'many'"),
    ],
)
def test_memory_that_is_not_understood_is_left_open(quantity: str, units: str, says: str) -> None:
    found = system(item(4, VirtualQuantity=quantity, AllocationUnits=units))
    assert found.memory_mib is None
    assert says in warning(found).message
    assert len(warning(found).message) < 300
    assert warning(found).field == "vm.mem_gb"


def test_cpus_that_are_not_a_number_are_left_open_and_the_rest_is_read() -> None:
    found = system(item(3, VirtualQuantity="four", CoresPerSocket=2) + config("firmware", "bios"))
    assert (None, 2, "bios") == (found.cpus, found.cores_per_socket, found.firmware)
    assert ("vm.cpu", True) == (warning(found).field, "'four'" in warning(found).message)


def test_cores_per_socket_of_zero_mean_that_vsphere_chooses() -> None:
    found = system(item(3, VirtualQuantity=4, CoresPerSocket=0))
    assert (None, ()) == (found.cores_per_socket, found.warnings)


def test_cores_per_socket_that_are_not_a_number_are_left_open() -> None:
    found = system(item(3, VirtualQuantity=4, CoresPerSocket="two"))
    assert (4, None) == (found.cpus, found.cores_per_socket)
    assert "'two' as the cores per socket" in warning(found).message


@pytest.mark.parametrize(("value", "firmware"), [("bios", "bios"), ("efi", "uefi"), ("EFI", "uefi"), ("", None)])
def test_firmware_is_bios_or_uefi(value: str, firmware: str | None) -> None:
    found = system(config("firmware", value))
    assert (firmware, ()) == (found.firmware, found.warnings)


@pytest.mark.parametrize(("value", "on"), [("true", True), ("TRUE", True), ("false", False), ("", None)])
def test_secure_boot_is_on_or_off_or_open(value: str, on: bool | None) -> None:
    found = system(config("bootOptions.efiSecureBootEnabled", value))
    assert (on, ()) == (found.secure_boot, found.warnings)


@pytest.mark.parametrize(
    ("key", "field"), [("firmware", "vm.firmware"), ("bootOptions.efiSecureBootEnabled", "vm.secure_boot")]
)
def test_setting_that_is_not_understood_is_left_open(key: str, field: str) -> None:
    found = system(config(key, "coreboot"))
    assert (None, None) == (found.firmware, found.secure_boot)
    assert (field, True) == (warning(found).field, "'coreboot'" in warning(found).message)


def test_setting_of_a_device_is_not_one_of_the_vm() -> None:
    found = system(f"<Item><ResourceType>6</ResourceType>{config('firmware', 'efi')}</Item>")
    assert found.firmware is None


@pytest.mark.parametrize(
    "text",
    [
        "564da6d2-1706-6343-dc2d-9959b533a7b3",
        "564DA6D2-1706-6343-DC2D-9959B533A7B3",
        "56 4d a6 d2 17 06 63 43-dc 2d 99 59 b5 33 a7 b3",
    ],
)
@pytest.mark.parametrize("tag", ["Config", "ExtraConfig"])
@pytest.mark.parametrize("key", ["uuid", "uuid.bios"])
def test_every_spelling_of_the_bios_uuid_comes_as_libvirt_spells_it(tag: str, key: str, text: str) -> None:
    found = system(f'<{tag} key="{key}" value="{text}"/>')
    assert ("d2a64d56-0617-4363-dc2d-9959b533a7b3", ()) == (found.uuid, found.warnings)


@pytest.mark.parametrize("text", ["7", "0" * 32, "F" * 32, "g" * 32, "564da6d2-1706-6343-dc2d-9959b533a7b3-00"])
def test_bios_uuid_that_is_none_is_left_open(text: str) -> None:
    found = system(config("uuid", text))
    assert found.uuid is None
    assert "the BIOS UUID" in warning(found).message


def test_annotation_keeps_its_lines_and_loses_control_characters() -> None:
    text = "one&#13;\n\ttwo\x7f\x9b31m"
    found = system(sections=f"<AnnotationSection><Annotation>{text}</Annotation></AnnotationSection>")
    assert found.annotation == "one\n\ttwo31m"


def test_long_annotation_is_cut() -> None:
    section = f"<AnnotationSection><Annotation>{'x' * 10_000}</Annotation></AnnotationSection>"
    assert "x" * 4096 == system(sections=section).annotation


@pytest.mark.parametrize(
    ("section", "os"),
    [
        ('<OperatingSystemSection id="96" osType="debian12_64Guest"/>', "debian12_64Guest"),
        ('<OperatingSystemSection id="96"><Description>Debian</Description></OperatingSystemSection>', "Debian"),
        ('<OperatingSystemSection id="96"/>', "96"),
        ("<OperatingSystemSection/>", None),
        ('<OperatingSystemSection osType="&#10;\x9b31m"/>', "\\n\\x9b31m"),
    ],
)
def test_operating_system_is_the_most_exact_word_for_it(section: str, os: str | None) -> None:
    assert os == system(sections=section).os


def controller(number: int, resource_type: int, address: object, model: str) -> str:
    subtype = {"ResourceSubType": model} if model else {}
    return item(resource_type, InstanceID=number, Address=address, **subtype)


def disk(name: str, parent: int, unit: object) -> str:
    return item(17, HostResource=f"ovf:/file/{name}", Parent=parent, AddressOnParent=unit)


def references(*names: str) -> str:
    return "<References>" + "".join(f'<File id="{name}" href="{name}.vmdk"/>' for name in names) + "</References>"


def test_disks_come_by_kind_and_number_of_the_controller_and_then_by_their_own() -> None:
    hardware = [
        *(controller(1, 5, 1, ""), controller(2, 5, 0, "")),
        *(controller(3, 20, 0, "vmware.nvme.controller"), controller(4, 20, 0, "AHCI")),
        *(controller(5, 6, 10, "lsilogicsas"), controller(6, 6, 9, "VirtualSCSI")),
        *(disk("i", 1, 0), disk("h", 2, 1), disk("g", 2, 0), disk("f", 3, 0), disk("e", 4, 0)),
        *(disk("d", 5, 0), disk("c", 6, "x"), disk("b", 6, 10), disk("a", 6, 9), disk("j", 7, 0)),
    ]
    found = system("".join(hardware), root=references(*"abcdefghij"))
    assert [f"{name}.vmdk" for name in "abcdefghij"] == [disk.file for disk in found.disks]
    assert (*["VirtualSCSI"] * 3, "lsilogicsas", "AHCI", "vmware.nvme.controller", *["ide"] * 3, None) == tuple(
        disk.controller for disk in found.disks
    )
    assert found.warnings == ()


def test_disks_whose_places_are_not_given_come_as_listed() -> None:
    found = system(disk("b", 1, "") + disk("a", 1, ""), root=references("a", "b"))
    assert ["b.vmdk", "a.vmdk"] == [disk.file for disk in found.disks]


def test_disk_of_an_entry_without_a_file_is_empty_and_has_its_capacity() -> None:
    root = '<DiskSection><Disk diskId="vmdisk1" capacity="8" capacityAllocationUnits="byte * 2^30"/></DiskSection>'
    found = system(item(17, HostResource="ovf:/disk/vmdisk1"), root=root)
    assert ((OvfDisk(None, 8 * GIB, None, None, None),), ()) == (found.disks, found.warnings)


def test_disk_without_an_entry_has_the_capacity_of_its_device() -> None:
    found = system(item(17, AllocationUnits="byte*1024*1024", VirtualQuantity=10240))
    assert (OvfDisk(None, 10 * GIB, None, None, None),) == found.disks


def test_only_the_base_name_of_a_file_is_taken() -> None:
    root = '<References><File id="f" href="../../etc/shadow"/></References>'
    assert ["shadow"] == [disk.file for disk in system(disk("f", 1, 0), root=root).disks]


@pytest.mark.parametrize("resource", ["ovf:/disk/vmdisk9", "ovf:/disk/vmdisk1", "ovf:/file/file9", "", "x"])
def test_disk_whose_file_is_not_listed_is_there_without_it(resource: str) -> None:
    root = '<DiskSection><Disk diskId="vmdisk1" fileRef="file9"/></DiskSection>'
    found = system(item(17, HostResource=resource), root=root)
    assert (None, None) == (found.disks[0].file, found.disks[0].capacity_bytes)
    assert bool(resource) == (found.disks[0].lost is not None)
    assert bool(resource) == ("the content of a disk" in "".join(finding.message for finding in found.warnings))


def test_capacity_that_is_not_understood_is_left_open() -> None:
    root = '<DiskSection><Disk diskId="d" capacity="${size}" capacityAllocationUnits="byte * 2^30"/></DiskSection>'
    found = system(item(17, HostResource="ovf:/disk/d"), root=root)
    assert [None] == [disk.capacity_bytes for disk in found.disks]
    assert "'${size}' in 'byte * 2^30'" in warning(found).message


def test_warnings_have_an_end() -> None:
    found = system(item(17, HostResource="x") * 10_000)
    assert (10_000, 100) == (len(found.disks), len(found.warnings))


def test_vsphere_descriptor_gives_the_nics_in_order() -> None:
    assert ovf.parse(VSPHERE, "web01.ovf").nics == (
        OvfNic("00:50:56:aa:bb:01", "DMZ", "VmxNet3", 192),
        OvfNic(None, "Backup & Storage", "E1000", None),
    )


def test_ovf_2_descriptor_of_virtualbox_gives_its_nic() -> None:
    data = (OVF / "virtualbox-2.ovf").read_bytes()
    assert ovf.parse(data, "web01.ovf").nics == (OvfNic(None, "NAT", "E1000", None),)


def test_namespaces_and_prefixes_do_not_matter() -> None:
    other = OVFTOOL.replace(b"rasd:", b"r:").replace(b"xmlns:rasd", b"xmlns:r")
    other = other.replace(b"ovf/envelope/1", b"ovf/envelope/9").replace(b"www.vmware.com/schema", b"example.com")
    assert other.count(b"rasd:") == 0
    assert ovf.parse(other, "web01.ovf") == ovf.parse(OVFTOOL, "web01.ovf")


def test_descriptor_without_any_namespace_is_read_alike() -> None:
    bare = re.sub(rb' xmlns(:\w+)?="[^"]*"', b"", OVFTOOL)
    bare = re.sub(rb"\b(ovf|vmw|rasd|vssd):(?=\w+[ =>])", b"", bare)
    assert b"xmlns" not in bare
    assert ovf.parse(bare, "web01.ovf") == ovf.parse(OVFTOOL, "web01.ovf")


def test_nics_come_in_the_order_of_their_numbers_on_the_parent() -> None:
    data = envelope(
        "<AddressOnParent>10</AddressOnParent><Connection>second</Connection>",
        "<AddressOnParent>9</AddressOnParent><Connection>first</Connection>",
    )
    assert [nic.network for nic in ovf.parse(data, "web01.ovf").nics] == ["first", "second"]


@pytest.mark.parametrize("number", ["", "<AddressOnParent>7</AddressOnParent>", "<AddressOnParent>x</AddressOnParent>"])
def test_nics_without_numbers_of_their_own_come_as_listed(number: str) -> None:
    data = envelope(f"{number}<Connection>b</Connection>", f"{number}<Connection>a</Connection>")
    assert [nic.network for nic in ovf.parse(data, "web01.ovf").nics] == ["b", "a"]


def test_mac_address_with_dashes_is_normalised() -> None:
    (nic,) = ovf.parse(envelope("<Address>00-50-56-AA-BB-CC</Address>"), "web01.ovf").nics
    assert nic.mac == "00:50:56:aa:bb:cc"


@pytest.mark.parametrize("address", ["7", "01:00:5e:00:00:01", "00:00:00:00:00:00", "&#155;31m"])
def test_nic_whose_mac_address_is_none_has_none(address: str) -> None:
    found = ovf.parse(envelope(f"<Address>{address}</Address><Connection>LAN</Connection>"), "web01.ovf")
    assert (OvfNic(None, "LAN", None, None),) == found.nics
    assert "the MAC address of a network adapter" in warning(found).message
    assert warning(found).message.isprintable()


def test_vm_without_network_adapters_has_no_nics() -> None:
    assert ovf.parse(envelope(), "web01.ovf").nics == ()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no complete XML at line 1"),
        (VSPHERE[:1500], "no complete XML at line"),
        (b"<?xml version='1.0' encoding='klingon'?><Envelope/>", "no complete XML"),
        (b"<html/>", "its root element is 'html'"),
        (b"<Envelope/>", "describes 0 virtual machines"),
        (b"<Envelope><VirtualSystem/><VirtualSystem/></Envelope>", "describes 2 virtual machines"),
        (b"<!DOCTYPE a [<!ENTITY b 'c'>]><Envelope>&b;</Envelope>", "it has a DTD"),
        (b"<!DOCTYPE a SYSTEM 'file:///etc/passwd'><Envelope/>", "it has a DTD"),
        (b"<Envelope>" + b" " * ovf.SIZE_LIMIT, "more than the 1048576 that are read"),
        (b"<Envelope><VirtualSystem/></Envelope>", "has no VirtualHardwareSection"),
        (envelope(*["<Address>00:50:56:00:00:01</Address>"] * 2), "two network adapters have the MAC address"),
        (envelope("<Address>00:50:56:00:00:aa</Address>", "<Address>00-50-56-00-00-AA</Address>"), "two network"),
        (envelope(*[""] * 65), "65 network adapters"),
        (envelope(*[""] * 100), "100 network adapters"),
    ],
)
def test_descriptor_that_cannot_be_used_says_why_and_names_the_file(data: bytes, says: str) -> None:
    message = problem(data)
    assert says in message
    assert "'web01.ovf'" in message


def test_deeply_nested_descriptor_is_refused_without_harm() -> None:
    assert "virtual machines" in problem(b"<Envelope>" + b"<a>" * 100_000 + b"</a>" * 100_000 + b"</Envelope>")


def test_billion_laughs_are_refused_soon() -> None:
    entities = "".join(f"<!ENTITY e{n} '{f'&e{n - 1};' * 10 if n else 'lol'}'>" for n in range(10))
    data = f"<?xml version='1.0'?><!DOCTYPE lolz [{entities}]><Envelope>&e9;</Envelope>".encode()
    with work_of_at_most(3):
        assert "it has a DTD" in problem(data)


def test_largest_descriptor_is_read_soon() -> None:
    devices = item(17, InstanceID=1, Parent=1, HostResource="x")
    with work_of_at_most(5):
        assert len(system(devices * ((ovf.SIZE_LIMIT - 200) // len(devices))).disks) > 5000


def _replaced(number: int, text: str) -> bytes:
    """The descriptor of ovftool with one of its values replaced."""
    places = list(re.finditer(rb'(?<=value=")[^"]*|(?<=>)[^<]+(?=<)|(?<=capacity=")[^"]*', OVFTOOL))
    start, end = places[number % len(places)].span()
    escaped = text.translate({ord("<"): "&lt;", ord("&"): "&amp;", ord('"'): "&quot;"})
    return OVFTOOL[:start] + escaped.encode() + OVFTOOL[end:]


@given(
    st.binary(max_size=200)
    | st.builds(lambda cut, byte: OVFTOOL[:cut] + byte, st.integers(0, len(OVFTOOL)), st.binary())
    | st.builds(_replaced, st.integers(0, 500), st.text(st.characters(codec="utf-8"), max_size=20))
)
def test_parse_raises_nothing_but_ovf_errors(data: bytes) -> None:
    try:
        found = ovf.parse(data, "web01.ovf")
    except OvfError as error:
        assert error.finding.code == "ovf_unreadable"
    else:
        assert all(finding.message.isprintable() for finding in found.warnings)


def test_the_only_descriptor_is_chosen_whatever_its_name() -> None:
    assert ovf.choose(["a.vmdk", "export.OVF", "a.mf"], "web01") == "export.OVF"


def test_export_without_a_descriptor_has_none() -> None:
    assert ovf.choose(["manifest.json", "disk-0.vmdk"], "web01") is None


def test_of_several_descriptors_the_one_named_like_the_vm_is_chosen() -> None:
    assert ovf.choose(["web02.ovf", "web01.ovf", "web01-old.ovf"], "web01") == "web01.ovf"


def test_several_descriptors_without_one_named_like_the_vm_are_refused() -> None:
    with pytest.raises(OvfError) as caught:
        ovf.choose(["b.ovf", "a.ovf"], "web01")
    finding = caught.value.finding
    assert (finding.code, finding.hint) == (
        "ovf_ambiguous",
        "Remove those of other VMs, or name this one web01.ovf.",
    )
    assert "('a.ovf', 'b.ovf')" in finding.message
