"""KVM is what a machine really started with, not what /dev promises."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hyper2kvmd import accel, run
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.run import Tools

Fake = Callable[[str, str], None]
BROKEN = "echo 'qemu-system-x86_64: error: failed to set MSR 0x10a to 0x69' >&2; kill -ABRT $$"


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kvm"
    path.touch()
    monkeypatch.setattr(accel, "DEVICE", path)
    monkeypatch.delenv("LIBGUESTFS_BACKEND_SETTINGS", raising=False)
    return path


def test_kvm_that_starts_a_machine_is_used(device: Path, fake: Fake) -> None:
    fake("qemu-system-x86_64", "exit 0")
    assert accel.resolve("auto", Tools()) == accel.Accel("kvm")
    assert accel.resolve("kvm", Tools()) == accel.Accel("kvm")


def test_the_qemu_of_rhel_is_found_where_no_path_leads(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = tmp_path / "qemu-kvm"
    qemu.write_text("#!/bin/sh\n")
    qemu.chmod(0o755)
    assert "/usr/libexec/qemu-kvm" == run.QEMU[1]
    monkeypatch.setattr(run, "QEMU", ("no-such-program", str(qemu)))
    assert accel.resolve("auto", Tools()) == accel.Accel("kvm")


def test_a_host_without_qemu_is_told_what_to_install(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "QEMU", ("no-such-program",))
    with pytest.raises(MigrationError) as caught:
        accel.resolve("auto", Tools())
    assert (Code.TOOL_MISSING, "no-such-program is not installed") == (caught.value.code, caught.value.message)
    assert "qemu-kvm-core (RHEL)" in caught.value.hint


def test_kvm_that_breaks_when_used_means_emulation_and_one_warning(device: Path, fake: Fake) -> None:
    fake("qemu-system-x86_64", BROKEN)
    found = accel.resolve("auto", Tools())
    assert found.name == "tcg"
    assert found.warning is not None
    assert found.warning.code == "kvm_unusable"
    assert "failed to set MSR 0x10a" in found.warning.message


def test_kvm_that_hangs_is_broken(device: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "PROBE_SECONDS", 0.3)
    fake("qemu-system-x86_64", "exec sleep 30")
    assert accel.resolve("auto", Tools()).name == "tcg"


def test_host_without_the_device_is_not_probed(device: Path, fake: Fake) -> None:
    device.unlink()
    fake("qemu-system-x86_64", f"touch {device.parent}/started")
    assert accel.resolve("auto", Tools()).name == "tcg"
    assert not (device.parent / "started").exists()


def test_wish_for_kvm_is_refused_if_it_is_broken(device: Path, fake: Fake) -> None:
    fake("qemu-system-x86_64", BROKEN)
    with pytest.raises(MigrationError) as caught:
        accel.resolve("kvm", Tools())
    assert caught.value.code is Code.APPLIANCE_FAILED
    assert caught.value.field == "guest.accel"


def test_wish_for_emulation_asks_nobody(device: Path, fake: Fake) -> None:
    fake("qemu-system-x86_64", BROKEN)
    assert accel.resolve("tcg", Tools()) == accel.Accel("tcg")


def test_a_host_that_is_told_to_emulate_is_not_probed(
    device: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the drop-in systemd/examples/tcg.conf."""
    fake("qemu-system-x86_64", "exit 0")
    monkeypatch.setenv("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
    assert accel.Accel("tcg") == accel.resolve("auto", Tools())
    assert accel.Accel("kvm") == accel.resolve("kvm", Tools())


def test_the_newest_kernel_is_the_one_that_is_tried(
    tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "KERNELS", tmp_path)
    fake("qemu-system-x86_64", "exit 0")
    assert "-kernel" not in accel.probe("kvm")
    for age, name in ((2, "vmlinuz-6.1"), (1, "vmlinuz-6.2"), (0, "vmlinuz-6.3.old")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    command = accel.probe("kvm")
    assert str(tmp_path / "vmlinuz-6.2") == command[command.index("-kernel") + 1]
    monkeypatch.setenv("LIBGUESTFS_PATH", str(tmp_path))
    assert [tmp_path / "kernel"] == accel.kernels()
