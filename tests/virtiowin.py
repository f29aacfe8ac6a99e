"""A phony virtio-win: the layout of its ISO and of its RPM, `.inf` files in the shapes of real ones, and no driver."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path

MACHINES = {"amd64": 0x8664, "x86": 0x014C, "ARM64": 0xAA64}

# What each family's `.inf` is decorated with, but for the architecture, and where Windows puts the driver.
FAMILIES = {
    "2k8": (".6.0", "12"),
    "w7": (".6.1", "12"),
    "2k8R2": (".6.1", "12"),
    "w8": (".6.2", "12"),
    "2k12": (".6.2", "12"),
    "w8.1": (".6.3", "12"),
    "2k12R2": (".6.3", "12"),
    "w10": (".10.0", "12"),
    "2k16": (".10.0", "12"),
    "2k19": (".10.0...16299", "13"),
    "2k22": (".10.0...16299", "13"),
    "w11": (".10.0...16299", "13"),
    "2k25": (".10.0...16299", "13"),
}
# The architectures of families that have more than one.
ARCHS = dict.fromkeys(("2k8", "w7", "w8", "w8.1", "w10"), ("amd64", "x86")) | {"w11": ("amd64", "ARM64")}
FILES = {
    "viostor": ("viostor.cat", "viostor.inf", "viostor.pdb", "viostor.sys"),
    "vioscsi": ("vioscsi.cat", "vioscsi.inf", "vioscsi.pdb", "vioscsi.sys"),
    "vioserial": ("vioser.cat", "vioser.inf", "vioser.pdb", "vioser.sys"),
    "NetKVM": ("netkvm.cat", "netkvm.inf", "netkvm.pdb", "netkvm.sys", "netkvmco.exe", "vioprot.inf"),
}

_STORAGE = """\
;/*++
; {name}.inf, of nobody: this driver does nothing
;--*/

[Version]
Signature="$Windows NT$"
Class=SCSIAdapter
ClassGUID={{4D36E97B-E325-11CE-BFC1-08002BE10318}}
Provider=%VENDOR%
DriverVer = 07/01/2024,{number} ; put in by a program
CatalogFile={name}.cat
DriverPackageType = PlugAndPlay
PnpLockdown=1

[SourceDisksNames]
1 = %DiskId1%,,,""

[SourceDisksFiles]
{name}.sys = 1,,

[ControlFlags]
;ExcludeFromSelect = *

[DestinationDirs]
{name}_Files = {place}

[Manufacturer]
%VENDOR%   = Models,NT{arch}{target}

[Models.NT{arch}{target}]
%Phony.DeviceDesc% = scsi_inst, PCI\\VEN_1AF4&DEV_{old}&SUBSYS_{subsystem}1AF4&REV_00, PCI\\VEN_1AF4&DEV_{old}
%Phony.DeviceDesc% = scsi_inst, PCI\\VEN_1AF4&DEV_{new}&SUBSYS_11001AF4&REV_01, PCI\\VEN_1AF4&DEV_{new}

[{name}_Files]
{name}.sys,,,2

[scsi_inst]
CopyFiles={name}_Files

[scsi_inst.Services]
AddService = {name}, 0x00000002 , scsi_Service, scsi_EventLog

[scsi_Service]
ServiceType    = %SERVICE_KERNEL_DRIVER%
StartType      = %SERVICE_BOOT_START%
ErrorControl   = %SERVICE_ERROR_NORMAL%
ServiceBinary  = %{place}%\\{name}.sys
LoadOrderGroup = SCSI miniport
AddReg         = pnpsafe

[scsi_EventLog]
AddReg = scsi_EventLog_AddReg

[scsi_EventLog_AddReg]
HKR,,EventMessageFile,%REG_EXPAND_SZ%,"%%SystemRoot%%\\System32\\IoLogMsg.dll"
HKR,,TypesSupported,%REG_DWORD%,7

[pnpsafe]
HKR, "Parameters\\PnpInterface", "5", %REG_DWORD%, 0x00000001
HKR, "Parameters", "BusType", %REG_DWORD%, {bus}

[Strings]
VENDOR = "Nobody, Inc."
diskId1 = "Phony Installation Disk"
Phony.DeviceDesc = "Phony controller"
REG_EXPAND_SZ  = 0x00020000
REG_DWORD      = 0x00010001
SERVICE_KERNEL_DRIVER  = 1
SERVICE_BOOT_START     = 0
SERVICE_ERROR_NORMAL   = 1
"""

_NETWORK = """\
[version]\x20
Signature   = "$Windows NT$"\x20
Class       = Net\x20
CatalogFile = netkvm.cat\x20
ClassGUID   = {{4d36e972-e325-11ce-bfc1-08002be10318}}\x20
Provider    = %VENDOR%
DriverVer   = 07/01/2024,{number}

[Manufacturer]\x20
%VENDOR% = NetKVM, NT{arch}{target}

[NetKVM.NT{arch}{target}]
%kvmnet6.DeviceDesc%    = kvmnet6.ndi, PCI\\VEN_1AF4&DEV_1000&SUBSYS_00011AF4&REV_00, PCI\\VEN_1AF4&DEV_1000
%kvmnet6.DeviceDesc%    = kvmnet6.ndi, PCI\\VEN_1AF4&DEV_1041&SUBSYS_11001AF4&REV_01, PCI\\VEN_1AF4&DEV_1041

[kvmnet6.ndi]\x20
Characteristics = 0x84 ; NCF_PHYSICAL  | NCF_HAS_UI\x20
AddReg          = kvmnet6.Reg
CopyFiles       = kvmnet6.CopyFiles\x20
*IfType         = 6\x20

[kvmnet6.ndi.Services]\x20
AddService      = netkvm, 2, kvmnet6.Service\x20

[kvmnet6.Reg]\x20
HKR, Ndi\\params\\MTU, ParamDesc, 0, %MTU%\x20

[kvmnet6.CopyFiles]\x20
netkvm.sys,,,2\x20
netkvmco.exe,,,0x00004000

[kvmnet6.Service]\x20
DisplayName     = %kvmnet6.DeviceDesc%
ServiceType     = 1 ;%SERVICE_KERNEL_DRIVER%\x20
StartType       = 3 ;%SERVICE_DEMAND_START%\x20
ErrorControl    = 1 ;%SERVICE_ERROR_NORMAL%\x20
ServiceBinary   = %{place}%\\netkvm.sys\x20
LoadOrderGroup  = NDIS\x20
AddReg          = TextModeFlags.Reg\x20

[TextModeFlags.Reg]\x20
HKR,,TextModeFlags,0x00010001, 0x0001\x20
HKR,Parameters,DisableMSI,,"0"\x20

[SourceDisksNames]\x20
1 = %DiskId1%,,,""\x20

[SourceDisksFiles]\x20
netkvm.sys  = 1,,\x20
netkvmco.exe = 1,,

[DestinationDirs]\x20
kvmnet6.CopyFiles = {place}\x20

[Strings]\x20
VENDOR = "Nobody, Inc."
kvmnet6.DeviceDesc = "Phony Ethernet Adapter"
DiskId1 = "Phony Driver Disk"
MTU = "Init.MTUSize"\x20
Tx = "Tx Enabled";\x20
Enable* = "Enabled*"\x20
10M = "10M"\x20
"""


def inf(driver: str, family: str = "2k22", arch: str = "amd64", release: int = 271) -> bytes:
    """The `.inf` of a driver, as virtio-win 0.1.`release` has it."""
    target, place = FAMILIES[family]
    number = f"{100 if family not in ('w7', '2k8R2') else 61}.100.104.{release * 100}"
    shape = {"number": number, "arch": arch, "target": target, "place": place}
    if driver == "NetKVM":
        text = _NETWORK.format(**shape)
    else:
        name, old, subsystem, new, bus = {
            "viostor": ("viostor", "1001", "0002", "1042", "0x00000001"),
            "vioscsi": ("vioscsi", "1004", "0008", "1048", "0x0000000A"),
            "vioserial": ("vioser", "1003", "0003", "1043", "0x00000001"),
        }[driver]
        text = _STORAGE.format(name=name, old=old, subsystem=subsystem, new=new, bus=bus, **shape)
    return text.replace("\n", "\r\n").encode()


def program(arch: str, content: bytes = b"") -> bytes:
    """The head of a program of Windows, for this architecture, and anything behind it."""
    head = b"MZ" + bytes(58) + struct.pack("<I", 0x80)
    return head.ljust(0x80, b"\0") + b"PE\0\0" + struct.pack("<H", MACHINES[arch]) + bytes(18) + content


def tree(release: int = 271) -> dict[str, bytes]:
    """The files of a whole virtio-win by their paths."""
    files = {"virtio-win_license.txt": b"as is", "guest-agent/qemu-ga-x86_64.msi": b"msi"}
    for driver, names in FILES.items():
        for family in FAMILIES:
            for arch in ARCHS.get(family, ("amd64",)):
                for name in names:
                    path = f"{driver}/{family}/{arch}/{name}"
                    if name == names[1]:
                        files[path] = inf(driver, family, arch, release)
                    else:
                        files[path] = program(arch, path.encode())
    return files


def write(directory: Path, files: dict[str, bytes]) -> Path:
    """Put files below a directory, and return it."""
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return directory


def iso(path: Path, files: dict[str, bytes], *, rock_ridge: bool = True, joliet: bool = True) -> Path:
    """Make an ISO of files, with long names of one kind, both or neither, and return its path."""
    import pycdlib

    image = pycdlib.PyCdlib()
    image.new(interchange_level=3, joliet=3 if joliet else None, rock_ridge="1.09" if rock_ridge else None)
    short = {"": ""}  # the names that every ISO has, by the long ones

    def names(long: str) -> dict[str, str]:
        above, _, last = long.rpartition("/")
        stem, dot, suffix = last.upper().replace("-", "_").rpartition(".")
        short[long] = f"{short[above]}/{stem.replace('.', '_')}{dot}{suffix}"
        return ({"rr_name": last} if rock_ridge else {}) | ({"joliet_path": long} if joliet else {})

    for name in sorted({f"/{parent}" for file in files for parent in [*Path(file).parents][:-1]}):
        long_names = names(name)
        short[name] = short[name].replace(".", "_")
        image.add_directory(short[name], **long_names)
    for name, data in files.items():
        long_names = names(f"/{name}")
        image.add_fp(BytesIO(data), len(data), f"{short[f'/{name}']};1", **long_names)
    image.write(str(path))
    image.close()
    return path
