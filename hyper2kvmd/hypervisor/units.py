"""What systemd calls the libvirt of this host."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_UNITS = ("etc/systemd/system", "usr/lib/systemd/system", "lib/systemd/system")


def unit(part: Literal["qemu", "network", "storage", "interface"] = "qemu", root: Path = Path("/")) -> str:
    """The unit to start for a part of libvirt, without a suffix.

    On Fedora, and RHEL since 9, every part is a daemon of its own, such as virtqemud; elsewhere libvirtd is all of it.
    Where both are installed, that one counts whose socket is enabled.
    """
    enabled = root / "etc/systemd/system/sockets.target.wants"
    modular = f"virt{part}d"
    if (enabled / "virtqemud.socket").is_symlink():
        return modular
    one, many = (any((root / place / f"{name}.service").exists() for place in _UNITS) for name in ("libvirtd", modular))
    return modular if many and not one else "libvirtd"
