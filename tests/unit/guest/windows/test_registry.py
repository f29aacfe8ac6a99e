"""Hives of Windows are read and changed, and what is wrong with one is said with its file and the remedy."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.windows import registry
from hyper2kvmd.guest.windows.registry import (
    Hive,
    RegistryEdit,
    Value,
    binary,
    dword,
    expand_sz,
    multi_sz,
    open_hive,
    sz,
)
from tests.windows import (
    BASIC_DATA,
    Directory,
    Disk,
    Partition,
    cell,
    empty_hive,
    hive,
    key,
    rights,
    unclose,
    write_hive,
)

PATH = "/Windows/System32/config/SYSTEM"
NAME = "HKLM\\SYSTEM"
VIOSTOR = "ControlSet001\\Services\\viostor"
DISK = Disk("gpt", "d" * 8, (Partition(1 << 20, BASIC_DATA, "ntfs", "p"),))


@pytest.fixture
def g(tmp_path: Path) -> Directory:
    """A guest with one hive, in which a driver is that VMware never needed."""
    directory = Directory(tmp_path, [DISK])
    directory.mount("/dev/sda1", "/")
    keys = {
        VIOSTOR: {"Start": dword(3), "ImagePath": expand_sz("system32\\drivers\\viostor.sys"), "": sz("a driver")},
        f"{VIOSTOR}\\StartOverride": {"0": dword(3)},
        "ControlSet001\\Services\\disk": {"Start": dword(0)},
        "Select": {"Current": dword(1)},
    }
    write_hive(directory.host(PATH), keys)
    return directory


def put(g: Directory, data: bytes) -> None:
    g.host(PATH).write_bytes(data)


def refusal(g: Directory, at: str = "") -> MigrationError:
    """The error of a hive that cannot be opened, or whose key `at` cannot be read."""
    with pytest.raises(MigrationError) as raised, open_hive(g, PATH, NAME) as opened:
        opened.keys(at)
    return raised.value


def test_keys_and_values_are_found_in_any_case_and_keep_their_spelling(g: Directory) -> None:
    with open_hive(g, PATH, NAME) as opened:
        assert ("ControlSet001", "Select") == tuple(sorted(opened.keys("")))
        assert {"viostor", "disk"} == set(opened.keys("controlset001\\SERVICES"))
        assert {"", "Start", "ImagePath"} == opened.values(VIOSTOR.upper()).keys()
        assert dword(3) == opened.value(VIOSTOR, "START")
        assert sz("a driver") == opened.value(VIOSTOR, "")
        assert opened.exists(VIOSTOR.lower())


def test_what_is_not_there_is_nothing(g: Directory) -> None:
    with open_hive(g, PATH, NAME) as opened:
        assert not opened.exists("ControlSet002\\Services")
        assert () == opened.keys("ControlSet002")
        assert {} == opened.values("ControlSet002")
        assert opened.value("ControlSet002", "Start") is None
        assert opened.value(VIOSTOR, "Group") is None
        assert opened.value(VIOSTOR, "Start\0") is None
        assert not opened.exists("Select\0")


def test_a_value_is_set_with_the_keys_above_it(g: Directory) -> None:
    with open_hive(g, PATH, NAME, write=True) as opened:
        opened.set(VIOSTOR, "Start", dword(0))
        opened.set(f"{VIOSTOR}\\Parameters\\PnpInterface", "5", dword(1))
        assert dword(0) == opened.value(VIOSTOR, "Start")
    with open_hive(g, PATH, NAME) as opened:
        assert dword(0) == opened.value(VIOSTOR, "start")
        assert dword(1) == opened.value(f"{VIOSTOR}\\Parameters\\PnpInterface", "5")
        assert sz("a driver") == opened.value(VIOSTOR, "")


def test_a_key_is_removed_with_what_is_below_and_can_be_made_again(g: Directory) -> None:
    with open_hive(g, PATH, NAME, write=True) as opened:
        assert opened.exists(f"{VIOSTOR}\\StartOverride")
        opened.delete(VIOSTOR)
        opened.delete("not there")
        assert not opened.exists(f"{VIOSTOR}\\StartOverride")
        opened.set(VIOSTOR, "Start", dword(0))
    with open_hive(g, PATH, NAME) as opened:
        assert {"Start": dword(0)} == opened.values(VIOSTOR)
        assert () == opened.keys(VIOSTOR)
        assert dword(0) == opened.value("ControlSet001\\Services\\disk", "Start")


def test_nothing_is_written_if_the_work_fails(g: Directory) -> None:
    before = g.host(PATH).read_bytes()
    with pytest.raises(ZeroDivisionError), open_hive(g, PATH, NAME, write=True) as opened:
        opened.set(VIOSTOR, "Start", dword(1 // 0))
    assert before == g.host(PATH).read_bytes()
    with open_hive(g, PATH, NAME):
        pass  # and the hive was closed


def test_an_edit_is_made_and_shown_as_windows_people_write_it(g: Directory) -> None:
    start = RegistryEdit("drivers", NAME, VIOSTOR, "Start", dword(3), dword(0), "starts at boot")
    group = RegistryEdit("drivers", NAME, VIOSTOR, "Group", None, sz("SCSI miniport"), "")
    override = RegistryEdit("drivers", NAME, f"{VIOSTOR}\\StartOverride", None, None, None, "")
    with open_hive(g, PATH, NAME, write=True) as opened:
        for edit in (start, group, override):
            edit.apply(opened)
        assert (dword(0), sz("SCSI miniport")) == (opened.value(VIOSTOR, "Start"), opened.value(VIOSTOR, "Group"))
        assert not opened.exists(f"{VIOSTOR}\\StartOverride")
    change = start.done()
    assert ("HKLM\\SYSTEM\\ControlSet001\\Services\\viostor", "Start: 3 → 0") == (change.path, change.diff)
    assert "Group: (none) → 'SCSI miniport'" == group.done().diff
    assert "key removed" == override.done().diff


def test_an_edit_that_would_remove_one_value_is_none() -> None:
    with pytest.raises(ValueError, match="removes a whole key"):
        RegistryEdit("drivers", NAME, VIOSTOR, "Start", dword(3), None, "")


@pytest.mark.parametrize(
    ("value", "data", "shown"),
    [
        (dword(0xFEDCBA98), b"\x98\xba\xdc\xfe", "4275878552"),
        (Value(11, b"\1" + bytes(7)), b"\1" + bytes(7), "1"),
        (sz("Ä\\b"), b"\xc4\0\\\0b\0\0\0", "'Ä\\b'"),
        (expand_sz("a\x07"), b"a\0\x07\0\0\0", "'a\ufffd'"),
        (multi_sz("a", "b"), b"a\0\0\0b\0\0\0\0\0", "'a', 'b'"),
        (multi_sz(), b"\0\0", ""),
        (binary(b"\1\xff\0\0"), b"\1\xff\0\0", "01 ff 00 00"),
        (binary(bytes(33)), bytes(33), " ".join(["00"] * 32) + " …"),
    ],
)
def test_values_have_the_bytes_of_windows_and_are_shown_for_people(value: Value, data: bytes, shown: str) -> None:
    assert (data, shown) == (value.data, value.shown())


def test_values_are_read_as_what_they_are_and_nothing_else() -> None:
    assert (7, 8) == (dword(7).number, Value(11, b"\x08" + bytes(7)).number)
    assert ("a", "a") == (sz("a").text, Value(2, b"a\0\0\0z\0\0").text)
    assert ("a", "b") == multi_sz("a", "b").texts == Value(7, b"a\0\0\0b\0").texts
    for value in (binary(b"\0" * 4), Value(4, b"\0"), Value(4, b"\0" * 8), Value(11, b"\0" * 4), sz("1")):
        assert value.number is None
    assert (None, ()) == (multi_sz("a").text, sz("a").texts)
    assert "\ufffd" == Value(1, b"\x00\xd8").text


def test_a_hive_that_windows_did_not_close_is_refused_with_the_way_to_close_it(g: Directory) -> None:
    unclose(g.host(PATH))
    error = refusal(g)
    assert Code.GUEST_DIRTY == error.code
    assert NAME in error.message and PATH in error.message and "sequence numbers" in error.message
    assert "shutdown /s /t 0" in error.hint


def test_a_hive_that_was_cut_anywhere_is_refused(g: Directory) -> None:
    many = {f"ControlSet001\\Enum\\{number}": {"Data": binary(bytes(3000))} for number in range(20)}
    write_hive(g.host(PATH), many)
    whole = g.host(PATH).read_bytes()
    assert len(whole) > 15 * 4096
    for length in range(0, len(whole), 4096):
        put(g, whole[:length])
        assert Code.GUEST_DIRTY == refusal(g).code, length
    put(g, whole)
    with open_hive(g, PATH, NAME) as opened:
        assert 20 == len(opened.keys("ControlSet001\\Enum"))


def tree(children: bytes, count: int, listed: int = 0) -> bytes:
    """A hive whose root has `count` children, listed by the cells that follow; `listed` is the first one's offset."""
    root = len(key("ROOT", 0, root=True))
    security = 0x20 + root
    after = security + len(rights(security))
    return hive(key("ROOT", security, children=count, listed=after + listed, root=True) + rights(security) + children)


def offset_after_rights() -> int:
    root = len(key("ROOT", 0, root=True))
    return 0x20 + root + len(rights(0))


def crowd(count: int) -> bytes:
    """A hive with so many keys below its root."""
    security = 0x20 + len(key("ROOT", 0, root=True))
    begin, cells, places = offset_after_rights(), bytearray(), []
    for number in range(count):
        places.append(begin + len(cells))
        cells += key(f"{number:06}", security)
    lists = []
    for part in (places[: count // 2], places[count // 2 :]):
        lists.append(begin + len(cells))
        cells += cell(struct.pack(f"<2sH{len(part)}I", b"li", len(part), *part))
    listed = len(cells)
    cells += cell(struct.pack("<2sHII", b"ri", 2, *lists))
    return tree(bytes(cells), count, listed)


def test_a_crowd_of_keys_is_refused_and_a_large_family_is_not(g: Directory) -> None:
    put(g, crowd(3000))
    with open_hive(g, PATH, NAME) as opened:
        assert 3000 == len(opened.keys(""))
        assert opened.exists("002999")
    put(g, crowd(registry.MAX_CHILDREN + 1))
    assert f"it has {registry.MAX_CHILDREN + 1} entries" in refusal(g).message
    put(g, crowd(100_000))
    error = refusal(g)
    assert Code.GUEST_DIRTY == error.code and NAME in error.message


def circle() -> bytes:
    """A hive whose key A has the root's own list of children, and so itself, below it."""
    security = 0x20 + len(key("ROOT", 0, root=True))
    begin = offset_after_rights()
    listed = begin + len(key("A", security))
    cells = key("A", security, children=1, listed=listed) + cell(struct.pack("<2sHI4s", b"lf", 1, begin, b"A"))
    return tree(cells, 1, listed - begin)


def test_a_key_that_is_below_itself_is_neither_followed_for_ever_nor_removed(g: Directory) -> None:
    put(g, circle())
    with open_hive(g, PATH, NAME) as opened:
        assert ("A",) == opened.keys("A\\A\\A")
        assert opened.value("A\\A", "Start") is None
        with pytest.raises(MigrationError, match="nested more than 64 deep"):
            opened.exists("\\".join("A" * 100))
    with pytest.raises(MigrationError, match="below itself") as raised, open_hive(g, PATH, NAME, write=True) as opened:
        opened.delete("A")
    assert Code.GUEST_DIRTY == raised.value.code
    assert "HKLM\\SYSTEM\\A" in raised.value.message


def test_a_list_of_keys_that_points_to_itself_is_refused(g: Directory) -> None:
    put(g, tree(cell(struct.pack("<2sHI", b"ri", 1, offset_after_rights())), 1))
    assert Code.GUEST_DIRTY == refusal(g).code


@pytest.mark.parametrize("content", [b"", b"regf", bytes(4096), b"MZ" * 4096, empty_hive()[:4096]])
def test_what_is_no_hive_is_refused(g: Directory, content: bytes) -> None:
    put(g, content)
    error = refusal(g)
    assert Code.GUEST_DIRTY == error.code
    assert PATH in error.message and "chkdsk" in error.hint


def test_a_defect_at_one_key_is_said_with_that_key_whatever_is_done_to_it(g: Directory) -> None:
    data = bytearray(g.host(PATH).read_bytes())
    values = data.index(b"viostor") - 76 + 40  # where the key's own cell says where the list of its values is
    data[values : values + 4] = b"\xff\xff\xff\x7f"
    put(g, bytes(data))
    changes: list[Callable[[Hive], object]] = [
        lambda opened: opened.values(VIOSTOR),
        lambda opened: opened.set(VIOSTOR, "Start", dword(0)),
        lambda opened: opened.delete(VIOSTOR),
    ]
    for change in changes:
        with pytest.raises(MigrationError) as raised, open_hive(g, PATH, NAME, write=True) as opened:
            change(opened)
        assert Code.GUEST_DIRTY == raised.value.code
        assert f"{NAME}\\{VIOSTOR}" in raised.value.message
    with open_hive(g, PATH, NAME) as opened:
        assert dword(0) == opened.value("ControlSet001\\Services\\disk", "Start")


def disturbed(data: bytes, chance: random.Random) -> bytes:
    """A hive with some bytes, or some of its offsets, changed behind its first 4 KiB."""
    new = bytearray(data)
    offsets = (0, 0x20, 0x7FFFFFFF, 0x80000000, chance.randrange(4096))
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(4096, len(new) - 4)
        if chance.random() < 0.5:
            new[at] = chance.randrange(256)
        else:
            at &= ~3
            new[at : at + 4] = struct.pack("<I", chance.choice(offsets))
    return bytes(new)


def read_all(g: Directory) -> None:
    """Read what is there, as deep as it goes for a while."""
    with open_hive(g, PATH, NAME) as opened:
        level = [""]
        for _ in range(6):
            for one in level[:20]:
                for name, value in opened.values(one).items():
                    opened.value(one, name)
                    assert len(value.shown()) < 500
                    assert value.number is None or value.text is None
            level = [f"{one}\\{name}".strip("\\") for one in level[:20] for name in opened.keys(one)]


def fuzz(g: Directory, inputs: int, seed: int) -> int:
    """Read so many disturbed hives; how many were refused. Whatever else is raised, is raised."""
    whole = g.host(PATH).read_bytes()
    chance = random.Random(seed)
    refused = 0
    for _ in range(inputs):
        put(g, disturbed(whole, chance))
        try:
            read_all(g)
        except MigrationError as error:
            assert error.code is Code.GUEST_DIRTY
            refused += 1
    return refused


def test_a_disturbed_hive_is_read_or_refused(g: Directory) -> None:
    assert 20 < fuzz(g, 200, seed=19) < 200


# What ends the appliance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["hivex_open", "hivex_node_children", "hivex_node_set_value", "hivex_commit"])
def test_an_appliance_that_ends_over_a_hive_is_said_with_both_remedies(
    call: str, g: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(*arguments: object, **options: object) -> None:
        for name in ("hivex_close", "hivex_root", "umount_all"):
            monkeypatch.setattr(g, name, ends)
        monkeypatch.setattr(g, "is_ready", lambda: False)
        raise RuntimeError(f"{call}: appliance closed the connection unexpectedly")

    monkeypatch.setattr(g, call, ends)
    with (
        pytest.raises(MigrationError, match="the libguestfs appliance ended") as raised,
        open_hive(g, PATH, NAME, write=True) as opened,
    ):
        opened.keys("Select")
        opened.set("Select", "Default", dword(2))
    assert Code.GUEST_DIRTY == raised.value.code and NAME in raised.value.message
    assert "guest.memory_mb" in raised.value.hint and "chkdsk" in raised.value.hint


def test_a_disk_that_is_full_is_no_damage(g: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: str | None) -> None:
        raise RuntimeError("hivex_commit: No space left on device")

    monkeypatch.setattr(g, "hivex_commit", full)
    with pytest.raises(MigrationError, match="No space left") as raised, open_hive(g, PATH, NAME, write=True) as opened:
        opened.set("Select", "Default", dword(2))
    assert Code.FIX_FAILED == raised.value.code and "space" in raised.value.hint
