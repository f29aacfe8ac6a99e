"""The Artifact Manifest v1.0: reading both of its dialects into one model."""

from hyper2kvmd.manifest.document import SIZE_LIMIT
from hyper2kvmd.manifest.model import Configuration, Disk, Manifest, Nic, Options, Output, Stages, VMSpec
from hyper2kvmd.manifest.problems import ManifestError
from hyper2kvmd.manifest.reader import parse

__all__ = [
    "SIZE_LIMIT",
    "Configuration",
    "Disk",
    "Manifest",
    "ManifestError",
    "Nic",
    "Options",
    "Output",
    "Stages",
    "VMSpec",
    "parse",
]
