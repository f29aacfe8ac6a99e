"""A manifest together with the disks beside it: load it, prove its checksums, ask for its boot disk."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hyper2kvmd.errors import Collected
from hyper2kvmd.image.source import check_unchanged, open_sources, verify_checksum
from hyper2kvmd.manifest import Disk, Manifest, parse
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.export import beside


@dataclass(frozen=True)
class ArtifactManifest:
    """A manifest that was read from the file `path`; `manifest` is what it says, the same for both dialects."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ArtifactManifest:
        """Read a manifest. Raise ManifestError, with all that is wrong with it, or MigrationError if it is no file."""
        file = Path(path)
        with beside(file) as export:
            _, data = facts.read_manifest(export.fd, file.parent, (file.name,))
        return cls(file, parse(data, file.name))

    def verify_checksums(
        self, on_progress: Callable[[str, float], None] = lambda id, ratio: None, cancel: threading.Event | None = None
    ) -> dict[str, str]:
        """Hold every disk that has a checksum against it; return the checksums by the disks' ids, in hexadecimal.

        `on_progress` gets a disk's id and the ratio done, from 0 to 1; set `cancel` to have it end with Cancelled.
        Raise MigrationError for the disks that are wrong, with all of them as its problems; OSError.
        """
        digests, problems = {}, Collected()
        with contextlib.ExitStack() as stack:
            export = stack.enter_context(beside(self.path))
            for source in open_sources(export.fd, export.directory, self.manifest.disks, stack, problems):
                id = source.disk.id
                if source.disk.sha256 is None:
                    continue
                with problems:
                    digests[id] = verify_checksum(
                        source, cancel or threading.Event(), functools.partial(on_progress, id)
                    )
                    check_unchanged(source)
        problems.check()
        return digests

    def get_boot_disk(self) -> Disk:
        """The disk that the VM boots from, as far as the manifest says; there is always one."""
        return self.manifest.boot_disk()

    def get_data_disks(self) -> tuple[Disk, ...]:
        """All the others, in boot order."""
        return self.manifest.ordered()[1:]
