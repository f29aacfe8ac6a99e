"""The reader of `.inf` files: the shapes of real ones, Windows's choice between sections, and whatever is no `.inf`."""

from __future__ import annotations

import random
from datetime import date

import pytest

from hyper2kvmd.guest.windows.inf import (
    FIELD_LIMIT,
    LINE_LIMIT,
    REG_BINARY,
    REG_DWORD,
    REG_EXPAND_SZ,
    REG_MULTI_SZ,
    REG_QWORD,
    REG_SZ,
    SIZE_LIMIT,
    Inf,
    InfError,
    RegistryValue,
    Service,
    parse,
)
from tests import virtiowin
from tests.pace import work_of_at_most

SERVER_2022 = ("x86_64", 20348, 3)
VERSION = (
    '[Version]\nSignature="$Windows NT$"\nClass=Net\nClassGUID={4d36e972-e325-11ce-bfc1-08002be10318}\n'
    "Provider=Nobody\nDriverVer=07/01/2024,1.2.3.4\n"
)


def inf(text: str) -> Inf:
    return parse((VERSION + text).encode())


def everything(data: bytes, arch: str = "x86_64", build: int = 20348) -> object:
    """All that can be asked of a `.inf`."""
    read = parse(data)
    models = read.models(arch, build, 3)
    installs = sorted(set(models.values()))
    services = [(read.service(install), read.copied(install)) for install in installs]
    return read.version, read.catalog(arch), read.sources(arch), models, services


# What real ones say -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("driver", "bus"), [("viostor", 1), ("vioscsi", 10)])
def test_storage_driver_is_read_with_the_bus_of_its_own(driver: str, bus: int) -> None:
    read = parse(virtiowin.inf(driver))
    (install,) = set(read.models(*SERVER_2022).values())
    assert read.service(install) == Service(
        name=driver,
        type=1,
        start=0,
        error_control=1,
        load_order_group="SCSI miniport",
        binary=f"%13%\\{driver}.sys",
        parameters=(
            RegistryValue("Parameters\\PnpInterface", "5", REG_DWORD, b"\x01\0\0\0"),
            RegistryValue("Parameters", "BusType", REG_DWORD, bytes([bus, 0, 0, 0])),
        ),
    )
    assert (f"{driver}.sys",) == read.copied(install) == read.sources("x86_64")
    assert f"{driver}.cat" == read.catalog("x86_64")


def test_version_has_the_date_and_the_number_of_the_driver() -> None:
    version = parse(virtiowin.inf("viostor", release=271)).version
    assert (date(2024, 7, 1), (100, 100, 104, 27100)) == (version.date, version.number)
    assert ("SCSIAdapter", "{4D36E97B-E325-11CE-BFC1-08002BE10318}") == (version.setup_class, version.class_guid)
    assert "Nobody, Inc." == version.provider


def test_network_driver_is_read_with_all_its_files() -> None:
    read = parse(virtiowin.inf("NetKVM"))
    models = read.models(*SERVER_2022)
    assert "kvmnet6.ndi" == models["PCI\\VEN_1AF4&DEV_1041&SUBSYS_11001AF4&REV_01"] == models["PCI\\VEN_1AF4&DEV_1000"]
    service = read.service("kvmnet6.ndi")
    assert service is not None
    assert ("netkvm", 3, "NDIS", "netkvm.sys") == (service.name, service.start, service.load_order_group, service.file)
    assert service.parameters == (
        RegistryValue("", "TextModeFlags", REG_DWORD, b"\x01\0\0\0"),
        RegistryValue("Parameters", "DisableMSI", REG_SZ, b"0\0\0\0"),
    )
    assert ("netkvm.sys", "netkvmco.exe") == read.copied("kvmnet6.ndi") == read.sources("x86_64")


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [(b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"), (b"\xef\xbb\xbf", "utf-8"), (b"", "utf-8")],
)
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_every_encoding_and_every_end_of_line_says_the_same(mark: bytes, encoding: str, ends: str) -> None:
    text = virtiowin.inf("viostor").decode().replace("\r\n", "\n").replace("Nobody", "Größe ™")
    assert everything(mark + text.replace("\n", ends).encode(encoding)) == everything(text.encode())


def test_what_is_no_utf_8_is_taken_for_cp1252() -> None:
    data = virtiowin.inf("viostor").decode().replace("Nobody", "Größe ™").encode("cp1252")
    assert "Größe ™, Inc." == parse(data).version.provider


# Windows's choice -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "windows", "chosen"),
    [
        ("NTamd64.10.0...16299", ("x86_64", 16298, 3), None),
        ("NTamd64.10.0...16299", ("x86_64", 16299, 3), "NTamd64.10.0...16299"),
        ("NTamd64.10.0...16299", ("x86_64", 9600, 3), None),
        ("NTamd64.10.0...16299", ("i386", 19045, 1), None),
        ("NTamd64.6.1", ("x86_64", 6003, 3), None),
        ("NTamd64.6.1", ("x86_64", 7601, 3), "NTamd64.6.1"),
        ("NTamd64.6.1", ("x86_64", 26100, 3), "NTamd64.6.1"),
        ("ntAMD64.6.2", ("x86_64", 9200, 3), "ntAMD64.6.2"),
        ("NTamd64.0x6.0x3", ("x86_64", 9600, 3), "NTamd64.0x6.0x3"),
        ("NTamd64.6.1, NTamd64.6.3, NTamd64.10.0", ("x86_64", 9600, 3), "NTamd64.6.3"),
        ("NTamd64.10.0...22000, NTamd64.10.0, NTamd64.10.0...14393", ("x86_64", 20348, 3), "NTamd64.10.0...14393"),
        ("NTamd64, NTamd64.6.1.1", ("x86_64", 7601, 1), "NTamd64.6.1.1"),
        ("NTamd64, NTamd64.6.1.1", ("x86_64", 7601, 3), "NTamd64"),
        ("NTamd64.6.1, NTamd64.6.1.3", ("x86_64", 7601, 3), "NTamd64.6.1.3"),
        ("NTamd64....0x80", ("x86_64", 7601, 3), None),  # a suite
        ("NTx86, NTamd64, NTarm64", ("aarch64", 22631, 1), "NTarm64"),
        ("NT.6.0", ("i386", 7601, 1), "NT.6.0"),
        ("NT.6.0", ("x86_64", 7601, 3), None),
        ("NT.6.0, NTx86.6.0", ("i386", 7601, 1), "NTx86.6.0"),
        ("", ("i386", 7601, 1), ""),
        ("", ("x86_64", 7601, 1), None),
        ("NTamd64", ("i386", 7601, 1), None),
        ("NTnonsense, NT!, amd64, NTamd64.10.O", ("x86_64", 20348, 3), None),
    ],
)
def test_section_that_windows_would_choose_is_chosen(
    targets: str, windows: tuple[str, int, int], chosen: str | None
) -> None:
    names = [name.strip() for name in targets.split(",")]
    sections = "".join(f"[Models{'.' if name else ''}{name}]\nThing = do_{name}, ID\n[do_{name}]\n" for name in names)
    read = inf(f"[Manufacturer]\nNobody = Models, {targets}\n{sections}")
    assert ({"ID": f"do_{chosen}"} if chosen is not None else {}) == read.models(*windows)


def test_undecorated_models_are_for_an_x86_that_no_decoration_is_for() -> None:
    read = inf("[Manufacturer]\nN=M,NTx86.10.0\n[M]\nold=A,ID\n[M.NTx86.10.0]\nnew=B,ID\n[A]\n[B]\n")
    assert ({"ID": "A"}, {"ID": "B"}) == (read.models("i386", 7601, 1), read.models("i386", 19045, 1))


def test_empty_models_keep_a_driver_from_a_windows() -> None:
    read = inf("[Manufacturer]\nN=M,NTamd64,NTamd64.10.0\n[M.NTamd64]\nx=A,ID\n[M.NTamd64.10.0]\n[A]\n")
    assert ({"ID": "A"}, {}) == (read.models("x86_64", 9600, 3), read.models(*SERVER_2022))


def test_install_section_of_the_architecture_goes_before_the_common_one() -> None:
    text = "[Manufacturer]\nN=M,NTamd64,NTx86\n[M.NTamd64]\nx=A,ID\n[M.NTx86]\nx=A,ID\n[A]\n[A.NT]\n[a.ntamd64]\n"
    models = [inf(text).models(arch, 10240, 1)["ID"].lower() for arch in ("x86_64", "i386")]
    assert ["a.ntamd64", "a.nt"] == models


def test_every_maker_and_every_id_counts_and_the_first_of_two_that_are_the_same() -> None:
    read = inf(
        "[Manufacturer]\nN=M,NTamd64\nO=O,NTamd64\n[M.NTamd64]\nx=A,id1,id2\n[O.NTamd64]\ny=B,ID2,ID3\n[A]\n[B]\n"
    )
    assert {"ID1": "A", "ID2": "A", "ID3": "B"} == read.models(*SERVER_2022)


# The syntax -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("CopyFiles = @a.sys, @b.sys", ("a.sys", "b.sys")),
        ("copyfiles=@a.sys;, @b.sys", ("a.sys",)),
        ('CopyFiles = "@a;b.sys" ; and no more', ("a;b.sys",)),
        ('CopyFiles = "@a ""b"".sys"', ('a "b".sys',)),
        ('CopyFiles = @a" b "c.sys', ("a b c.sys",)),
        ("CopyFiles = @a.sys, \\\n @b.sys", ("a.sys", "b.sys")),
        ("CopyFiles = @a.sys, \\ ; goes on\n @b.sys", ("a.sys", "b.sys")),
        ("CopyFiles = @a\\b.sys", ("a\\b.sys",)),
        ('CopyFiles = "@a\\"\\\n , @b.sys', ("a\\", "b.sys")),
        ("CopyFiles = @%NAME%.sys, @%%NAME%%", ("put in.sys", "%NAME%")),
        ("CopyFiles = @%12%\\a.sys, @100%", ("%12%\\a.sys", "100%")),
        ("CopyFiles = @a=b.sys", ("a=b.sys",)),
        ('"CopyFiles" = @a.sys', ("a.sys",)),
        ("CopyFiles = @a.sys\n; CopyFiles = @b.sys\n\t \nCopyFiles = ,@c.sys", ("a.sys", "c.sys")),
        ("CopyFiles = @a.sys\n[other]\nCopyFiles = @b.sys\n[ONE]\nCopyFiles = @a.sys, @c.sys", ("a.sys", "c.sys")),
        ("CopyFiles = list\n[List]\nto.sys, from.sys\nboth.sys,,,2", ("from.sys", "both.sys")),
    ],
)
def test_lines_are_read_as_windows_reads_them(line: str, names: tuple[str, ...]) -> None:
    assert names == inf(f"[one]\n{line}\n[Strings]\nname = put in\nNAME = second").copied("one")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ('HKR,,A,,"text"', RegistryValue("", "A", REG_SZ, "text\0".encode("utf-16-le"))),
        ("HKR,K,A,0x20000,%%S%%", RegistryValue("K", "A", REG_EXPAND_SZ, "%S%\0".encode("utf-16-le"))),
        ("HKR,,A,0x10000,a,b", RegistryValue("", "A", REG_MULTI_SZ, "a\0b\0\0".encode("utf-16-le"))),
        ("HKR,,A,0x10001,0x102", RegistryValue("", "A", REG_DWORD, b"\x02\x01\0\0")),
        ("HKR,,A,65537,258", RegistryValue("", "A", REG_DWORD, b"\x02\x01\0\0")),
        ("HKR,,A,0x10001,02,01,00,00", RegistryValue("", "A", REG_DWORD, b"\x02\x01\0\0")),
        ("HKR,,A,0x10003,1", RegistryValue("", "A", REG_DWORD, b"\x01\0\0\0")),  # unless it is there
        ("HKR,,A,0xB0001,1", RegistryValue("", "A", REG_QWORD, b"\x01" + bytes(7))),
        ("HKR,,A,1,01,ff", RegistryValue("", "A", REG_BINARY, b"\x01\xff")),
        ("hkr", RegistryValue("", "", REG_SZ, b"\0\0")),
        ("HKR,K,,0x10", RegistryValue("K", "", None, None)),
    ],
)
def test_registry_values_are_as_the_registry_has_them(line: str, value: RegistryValue) -> None:
    assert (value,) == _service(f"AddReg = regs\n[regs]\n{line}").parameters


def _service(more: str) -> Service:
    common = "ServiceType=1\nStartType=0\nErrorControl=1\nServiceBinary=%12%\\a.sys"
    service = inf(f"[i.Services]\nAddService = a,2,s\n[s]\n{common}\n{more}").service("i")
    assert service is not None
    return service


def test_service_that_does_not_drive_the_device_is_not_taken_for_the_one_that_does() -> None:
    assert inf("[i.Services]\nAddService=filter,0,s\nAddService=,2\n").service("i") is None
    assert inf("[i]\n").service("i") is None


# What is no .inf --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no [Version]"),
        (b"[Version]\nClass=Net", "no [Version]"),
        (b'[Version]\nSignature="$Linux$"', "no [Version]"),
        (b"Signature=x\n[Version]", "line 1: this stands before any section"),
        (b"[Version\nSignature=x", "line 1: the name of a section has no end"),
        (b'[Version]\n\nSignature="$Windows NT$', "line 3: a quoted text has no end"),
        (b"[Version]\nSignature=$Windows NT$, \\", "line 2: it ends in the middle of an entry"),
        (b"[Version]\nSig\0nature=x", "line 2: it holds zero bytes"),
        (b"\xff\xfe[\0V", "the middle of a character"),
        (b"\xef\xbb\xbf\xff", "no text"),
        (b";" * (SIZE_LIMIT + 1), "larger than 1 MiB"),
        (b"\n" * LINE_LIMIT, "more than 20000 lines"),
        (b"[a]\n" + b"x" * (FIELD_LIMIT + 1), "line 2: a value has more than 4096 characters"),
    ],
)
def test_what_is_no_inf_is_refused_with_the_line(data: bytes, says: str) -> None:
    with pytest.raises(InfError) as caught:
        parse(data)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("%VENDOR%   = Models", "%OTHER%   = Models", "line 28: %other% is not in [Strings]"),
        ("= Models,", "= Others,", "line 28: there is no section [Others.NTamd64.10.0...16299]: was the file cut off?"),
        ("= Models,", "= ,", "line 28: this names no section"),
        ("= scsi_inst, PCI", "= other, PCI", "there is no section [other]"),
        (", scsi_Service,", ", other,", "there is no section [other]"),
        ("AddReg         = pnpsafe", "AddReg = other", "there is no section [other]"),
        ("StartType      = %SERVICE_BOOT_START%", "", "[scsi_Service] has no starttype"),
        ("SERVICE_BOOT_START     = 0", "SERVICE_BOOT_START = boot", "not a number: 'boot'"),
        ("ServiceBinary  =", "Other =", "[scsi_Service] has no servicebinary"),
        ('HKR, "Parameters", ', 'HKLM, "Parameters", ', "outside of its own key, to 'HKLM'"),
        ("REG_DWORD      = 0x00010001", "REG_DWORD = 0x4", "flags of a registry value are not known: '0x4'"),
        ("REG_DWORD      = 0x00010001", "REG_DWORD = 0x50001", "flags of a registry value are not known"),
        ("0x0000000A", "0x10000000A", "a number of more than 4 bytes"),
        ("0x0000000A", "1,2", "a number of 2 bytes that should have 4"),
        ("0x0000000A", "1,2,3,xy", "not bytes in hexadecimal"),
        ("0x0000000A", "1,2,3,100", "not bytes in hexadecimal"),
        ("{4D36E97B-E325-11CE-BFC1-08002BE10318}", "{4D36E97B}", "ClassGuid is no GUID"),
        ("07/01/2024,100", "13/01/2024,100", "a date that is none"),
        ("07/01/2024,100", "07/01/2024;100", "DriverVer is not a date and a version"),
        (".104.27100", ".104.70000", "a version that is none"),
        ("CopyFiles=vioscsi_Files", "CopyFiles=other", "there is no section [other]"),
    ],
)
def test_defect_is_named_with_its_line(old: str, new: str, says: str) -> None:
    text = virtiowin.inf("vioscsi").decode()
    assert old in text
    with pytest.raises(InfError) as caught:
        everything(text.replace(old, new).encode())
    assert says in str(caught.value)


@pytest.mark.parametrize("driver", virtiowin.FILES)
def test_inf_that_is_cut_off_anywhere_is_refused_or_says_the_same(driver: str) -> None:
    whole = virtiowin.inf(driver)
    expected = everything(whole)
    refused = 0
    for length in range(len(whole)):
        try:
            assert expected == everything(whole[:length]), length
        except InfError:
            refused += 1
    assert refused > len(whole) * 0.9


def test_nothing_takes_longer_than_its_size_deserves() -> None:
    tokens = "%a%" * 1300
    strings = f"[Strings]\na = {'x' * 4000}\n"
    one_maker = "[Manufacturer]\na=M,NTamd64\n[M.NTamd64]\n"
    shapes = [
        b"[a]\n" + b"\\" * (SIZE_LIMIT - 8),
        b"[a]\n" + b'""' * (SIZE_LIMIT // 2 - 8),
        b"[a]\n" + b'"a"b' * (SIZE_LIMIT // 4 - 8),
        b"[a]\n" + b"\\ " * (SIZE_LIMIT // 2 - 8),
        b"[a]\n" + b" " * (SIZE_LIMIT - 8),
        b"[a]\n" + b"," * (SIZE_LIMIT - 8),
        b"[a]\n" + b"x\\\n" * (LINE_LIMIT - 8),
        b"[a]\n" + b"[]" * (SIZE_LIMIT // 2 - 8),
        (VERSION + "[Manufacturer]\n" + strings + "[i]\n" + f"Include = {tokens}\n" * 200).encode(),
        (VERSION + one_maker + "x=i,B\n[i]\n" + "CopyFiles = i\n" * (LINE_LIMIT - 12)).encode(),
        (VERSION + one_maker + f"x=A{',B' * 2000}\n" * 250 + "[A]\n").encode(),
        (VERSION + "[Manufacturer]\n" + "a=M,NTamd64\n" * 9000 + one_maker + "x=A,B\n" * 9000 + "[A]\n").encode(),
    ]
    for data in shapes:
        with work_of_at_most(20):
            try:
                everything(data)
            except InfError:
                continue


def test_nothing_ends_in_anything_but_an_answer_or_a_defect() -> None:
    fuzz(random.Random(19), 5000)


def fuzz(chance: random.Random, inputs: int) -> None:
    """Read so many `.inf` files that are broken at random."""
    small = VERSION.encode() + (
        b"[Manufacturer]\n%V%=M,NTamd64.10.0,NTamd64\n[M.NTamd64.10.0]\n%V%=i,PCI\\A,PCI\\B\n[i]\nCopyFiles=f,@x\n"
        b"Include=a.inf\n[f]\na,b,,2\n[i.Services]\nAddService=s,2,s\n[s]\nServiceType=1\nStartType=0\nErrorControl=1\n"
        b'ServiceBinary=%12%\\a\nAddReg=r\n[r]\nHKR,P,N,%D%,1\nHKR,,M,0x10000,a,b\n[Strings]\nV="x"\nD=0x10001\n'
    )
    assert everything(small)
    bits = [*(bytes([char]) for char in b'[]"%,=;\\\n\0\xfc.'), b"\\\n", b"\xff\xfe", b"0x", b"NT."]
    words = small.replace(b"\n", b"\n ").split(b" ")
    for number in range(inputs):
        data = bytearray(small)
        for _ in range(chance.randrange(1, 6)):
            at, until = sorted(chance.randrange(len(data) + 1) for _ in range(2))
            match chance.randrange(6):
                case 0:
                    data[at:at] = chance.choice(bits)
                case 1:
                    data[at : at + chance.randrange(8)] = b""
                case 2:
                    data[at:at] = chance.choice(words)
                case 3:
                    data[at : at + 1] = bytes([chance.randrange(256)])
                case 4:
                    data[at:at] = data[at:until][:500]
                case 5 if chance.random() < 0.2:
                    data[until:] = b""
        try:
            everything(bytes(data), chance.choice(("x86_64", "i386", "aarch64")), chance.choice((7601, 9600, 20348)))
        except InfError:
            continue
        except Exception as error:
            raise AssertionError(f"input {number}: {bytes(data)!r}") from error
