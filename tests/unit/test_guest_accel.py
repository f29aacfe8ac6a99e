"""KVM is what a machine really started with, not what /dev promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hyper2kvmd import accel
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.run import Tools

Fake = Callable[[str, str], None]
BROKEN = "echo 'qemu-system-x86_64: error: failed to set MSR 0x10a to 0x69' >&2; kill -ABRT $$"


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kvm"
    path.touch()
    monkeypatch.setattr(accel, "DEVICE", path)
    return path


def test_kvm_that_starts_a_machine_is_used(device: Path, fake: Fake) -> None:
    fake("qemu-system-x86_64", "exit 0")
    assert accel.resolve("auto", Tools()) == accel.Accel("kvm")
    assert accel.resolve("kvm", Tools()) == accel.Accel("kvm")


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
