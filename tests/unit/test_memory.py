"""How much memory there is: the host's, or what the limits of control groups leave of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyper2kvmd import memory
from hyper2kvmd.memory import available

GIB = 1 << 30


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with 16 GiB available, and no limit; the directory of its control groups."""
    meminfo, own, groups = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "groups"
    meminfo.write_text(f"MemTotal: {32 << 20} kB\nMemAvailable:   {16 << 20} kB\n")
    own.write_text("4:memory:/old\n0::/system.slice/hyper2kvmd.service\n")
    groups.mkdir()
    for name, path in (("_MEMINFO", meminfo), ("_OWN_GROUP", own), ("_GROUPS", groups)):
        monkeypatch.setattr(memory, name, path)
    return groups


def group(directory: Path, limit: int | str, used: int = 0, cached: int = 0) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{used}\n")
    stat = f"anon {used - cached}\nfile {cached}\ninactive_file {cached // 2}\nactive_file {cached // 2}\nslab 4096\n"
    (directory / "memory.stat").write_text(stat)


def test_without_limits_it_is_the_hosts(host: Path) -> None:
    group(host / "system.slice/hyper2kvmd.service", "max", GIB)
    memory = available()
    assert memory and (16384, "the host") == (memory.mb, memory.holder)


def test_the_limit_of_the_unit_counts_without_its_caches(host: Path) -> None:
    group(host / "system.slice/hyper2kvmd.service", 8 * GIB, used=5 * GIB, cached=2 * GIB)
    memory = available()
    assert memory and 5120 == memory.mb
    assert "the control group /system.slice/hyper2kvmd.service, with a limit of 8192 MiB," == memory.holder
    assert "MemoryMax" in memory.remedy


def test_the_tightest_limit_around_it_counts(host: Path) -> None:
    group(host / "system.slice", 4 * GIB, used=3 * GIB)
    group(host / "system.slice/hyper2kvmd.service", 8 * GIB, used=GIB)
    memory = available()
    assert memory and (1024, True) == (memory.mb, memory.holder.startswith("the control group /system.slice, "))


def test_a_limit_that_the_host_does_not_have_is_no_memory(host: Path) -> None:
    group(host / "system.slice/hyper2kvmd.service", 64 * GIB)
    memory = available()
    assert memory and (16384, "the host") == (memory.mb, memory.holder)


def test_a_group_over_its_limit_has_none(host: Path) -> None:
    group(host / "system.slice/hyper2kvmd.service", GIB, used=GIB + 4096)
    memory = available()
    assert memory and 0 == memory.mb


@pytest.mark.parametrize("path", ["/", "/../../kubepods/pod1"])
def test_a_container_finds_its_own_limit_at_the_root(host: Path, path: str) -> None:
    (host.parent / "cgroup").write_text(f"0::{path}\n")
    group(host, 5 * GIB, used=GIB)
    memory = available()
    assert memory and 4096 == memory.mb


def test_of_another_group_its_own_limit_counts(host: Path) -> None:
    group(host / "system.slice/hyper2kvmd@lab.service", 2 * GIB)
    memory = available("/system.slice/hyper2kvmd@lab.service")
    assert memory and 2048 == memory.mb


def test_groups_that_cannot_be_read_limit_nothing(host: Path) -> None:
    (host.parent / "cgroup").unlink()
    memory = available()
    assert memory and "the host" == memory.holder
    (host.parent / "meminfo").write_text("")
    assert available() is None
