"""What the new machine will have: what it calls its disks, and every copy of a file that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from hyper2kvmd.domain.model import DiskBus
from hyper2kvmd.guest.linux.fixers import View
from hyper2kvmd.guest.linux.kernels import Image

# The kernel's name of the new disks, without the letter that tells one from another.
DISK_NAMES: dict[DiskBus, str] = {"virtio": "vd", "scsi": "sd", "sata": "sd", "ide": "sd"}


def copies(view: View, paths: Sequence[str], images: Iterable[Image]) -> Iterator[tuple[str, str]]:
    """Where each of the files is, in the guest and in each initramfs, and its text there."""
    for path in paths:
        if (text := view.read(path)) is not None:
            yield path, text
    for image in images:
        for path in paths:
            if (text := image.texts.get(path.lstrip("/"))) is not None:
                yield f"{image.kernel.initrd}: {path}", text
