"""Which devices of an OVF descriptor are said not to be in the new VM, and how the files of its disks are packed."""

from __future__ import annotations

import pytest

from hyper2kvmd.manifest import ovf
from hyper2kvmd.manifest.ovf import OvfDisk, Packing
from tests import DATA
from tests.unit.manifest.test_ovf import item, system

FILES = '<References><File id="file1" href="iso/rescue.iso"/></References>'
# What writes such a device, and what is said of it.
LEFT_OUT = {
    "vSphere, PCI passthrough": (
        item(1, ElementName="PCI device 0", ResourceSubType="vmware.pcipassthrough"),
        "PCI passthrough 'PCI device 0'",
    ),
    "vSphere, SR-IOV": (
        item(10, ElementName="Network adapter 2", ResourceSubType="vmware.sriov", Connection="VM Network"),
        "SR-IOV 'Network adapter 2' (it becomes an ordinary card)",
    ),
    "vCenter, SR-IOV": (item(10, ResourceSubType="VirtualSriovEthernetCard"), "SR-IOV (it becomes an ordinary card)"),
    "an ISO that is in the export": (
        item(15, ElementName="CD/DVD drive 1", HostResource="ovf:/file/file1", ResourceSubType="vmware.cdrom.iso"),
        "ISO 'rescue.iso' in the drive 'CD/DVD drive 1'",
    ),
    "an ISO that is not": (item(15, ElementName="CD 1", ResourceSubType="vmware.cdrom.iso"), "ISO in the drive 'CD 1'"),
    "VirtualBox, an ISO": (item(15, Caption="cd0", HostResource="/file/file1"), "ISO 'rescue.iso' in the drive 'cd0'"),
    "a DVD": (item(16, HostResource="ovf:/file/file1"), "ISO 'rescue.iso' in the drive"),
    "a floppy image": (item(14, ResourceSubType="vmware.floppy.image"), "floppy image in the drive"),
    "vSphere, serial port": (
        item(21, ElementName="Serial port 1", ResourceSubType="vmware.serialport.uri"),
        "serial port 'Serial port 1'",
    ),
    "parallel port": (item(22, ElementName="Parallel port 1"), "parallel port 'Parallel port 1'"),
    "vSphere, sound": (item(1, ResourceSubType="vmware.soundcard.hdaudio"), "sound card"),
    "VirtualBox, sound": (item(35, ElementName="sound"), "sound card 'sound'"),
    "vSphere, NVDIMM": (item(1, ElementName="NVDIMM 1", ResourceSubType="vmware.nvdimm"), "NVDIMM 'NVDIMM 1'"),
    "what nobody knows": (item(1, ElementName="X", ResourceSubType="vmware.flux"), "'vmware.flux' 'X'"),
    "Fibre Channel": (item(7, ElementName="HBA"), "Fibre Channel adapter 'HBA'"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_device_that_the_new_vm_does_not_get_is_named(case: str) -> None:
    hardware, words = LEFT_OUT[case]
    (finding,) = system(hardware, root=FILES).warnings
    assert "devices_left_out" == finding.code
    assert f"the OVF descriptor 'web01.ovf' has devices that the new VM does not get: {words}" == finding.message
    assert finding.hint


def test_all_of_them_are_in_one_warning_in_their_order() -> None:
    (finding,) = system("".join(hardware for hardware, _ in LEFT_OUT.values()), root=FILES).warnings
    assert finding.message.endswith(": " + ", ".join(words for _, words in LEFT_OUT.values()))


def test_a_descriptor_full_of_them_makes_no_endless_message() -> None:
    (finding,) = system(item(21, ElementName="x" * 500) * 1000).warnings
    assert finding.message.endswith(", and 980 more")
    assert len(finding.message) < 3000


@pytest.mark.parametrize(
    "hardware",
    [
        item(15, ElementName="CD/DVD drive 1", ResourceSubType="vmware.cdrom.remotepassthrough"),
        item(15, ElementName="CD/DVD drive 1", ResourceSubType="vmware.cdrom.atapi"),
        item(14, ElementName="Floppy drive 1", ResourceSubType="vmware.floppy.remotedevice"),
        item(1, ElementName="VMCI device", ResourceSubType="vmware.vmci"),
        item(1, ElementName="TPM", ResourceSubType="vmware.vtpm"),
        item(23, ElementName="USB Controller", ResourceSubType="vmware.usb.xhci"),
        item(24, ElementName="VirtualVideoCard"),
        item(10, ElementName="Network adapter 1", ResourceSubType="VmxNet3"),
        item(20, ElementName="SATA Controller", ResourceSubType="vmware.sata.ahci"),
        item(5, ElementName="IDE"),
    ],
)
def test_what_the_new_vm_has_or_nobody_misses_is_not_mentioned(hardware: str) -> None:
    assert () == system(hardware).warnings


@pytest.mark.parametrize("name", ["ovftool", "vsphere", "virtualbox-2"])
def test_an_ordinary_export_has_nothing_of_the_kind(name: str) -> None:
    data = (DATA / f"ovf/{name}.ovf").read_bytes()
    assert "devices_left_out" not in [finding.code for finding in ovf.parse(data, f"{name}.ovf").warnings]


# How the files of disks are packed ------------------------------------------------------------------------


def one_disk(**attributes: str) -> tuple[OvfDisk, list[str]]:
    """The disk whose file has these attributes, and the codes of the warnings."""
    written = "".join(f' {key}="{value}"' for key, value in attributes.items())
    files = f'<References><File id="f" {written}/></References>'
    found = system(
        item(17, HostResource="ovf:/disk/d"), root=f'{files}<DiskSection><Disk diskId="d" fileRef="f"/></DiskSection>'
    )
    return found.disks[0], [finding.code for finding in found.warnings]


def test_chunks_and_compression_of_a_file_are_read() -> None:
    disk, warnings = one_disk(href="a.vmdk.gz", size="3000", chunkSize="2048", compression="gzip")
    assert (Packing(3000, 2048, "gzip"), []) == (disk.packing, warnings)
    assert ("a.vmdk.gz", "a.vmdk") == disk.names
    assert Packing(None, None, "gzip") == one_disk(href="a", compression="gzip")[0].packing


def test_a_file_that_is_whole_has_no_packing() -> None:
    for attributes in ({}, {"compression": "identity"}, {"compression": ""}, {"size": "5"}):
        assert one_disk(href="a%20b.vmdk", **attributes)[0].packing is None
    assert ("a%20b.vmdk", "a b.vmdk") == one_disk(href="a%20b.vmdk")[0].names


@pytest.mark.parametrize("size", ["0", "-1", "2 GB", ""])
def test_a_size_of_chunks_that_means_nothing_is_a_warning(size: str) -> None:
    disk, warnings = one_disk(href="a", chunkSize=size)
    assert (Packing(None, None, None), ["ovf_value"]) == (disk.packing, warnings)
