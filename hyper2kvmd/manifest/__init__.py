"""The Artifact Manifest v1.0: reading both of its dialects into one model, and writing them."""

from typing import TYPE_CHECKING, Any

from hyper2kvmd.manifest.document import SIZE_LIMIT
from hyper2kvmd.manifest.model import Configuration, Disk, Manifest, Nic, Options, Output, Stages, VMSpec
from hyper2kvmd.manifest.problems import ManifestError
from hyper2kvmd.manifest.reader import parse

if TYPE_CHECKING:
    from hyper2kvmd.manifest.artifact import ArtifactManifest
    from hyper2kvmd.manifest.builder import ManifestBuilder

__all__ = [
    "SIZE_LIMIT",
    "ArtifactManifest",
    "Configuration",
    "Disk",
    "Manifest",
    "ManifestBuilder",
    "ManifestError",
    "Nic",
    "Options",
    "Output",
    "Stages",
    "VMSpec",
    "parse",
]


def __getattr__(name: str) -> Any:
    # What opens disks needs this package itself; and the daemon, which only reads manifests, stays small.
    if name == "ArtifactManifest":
        from hyper2kvmd.manifest.artifact import ArtifactManifest

        return ArtifactManifest
    if name == "ManifestBuilder":
        from hyper2kvmd.manifest.builder import ManifestBuilder

        return ManifestBuilder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
