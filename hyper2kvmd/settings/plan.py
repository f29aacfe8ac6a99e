"""The plan of one VM: what it gets, and when its turn is, where that differs from the settings; docs/plan.md."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import Field, IPvAnyAddress

from hyper2kvmd.settings.load import writing_to
from hyper2kvmd.settings.model import Network, Settings, Vm, Wave, Word

# The settings that its keys stand for. A manifest that asks for the boot test does not go before the plan either.
_SETTINGS: dict[str, tuple[str, ...]] = {
    "cpus": ("vm.cpus",),
    "memory_mb": ("vm.memory_mb",),
    "networks": ("vm.networks",),
    "mac": ("vm.mac",),
    "format": ("pipeline.convert.target_format",),
    "compress": ("pipeline.convert.compression",),
    "start": ("libvirt.start",),
    "test_boot": ("validate.test_boot", "pipeline.validate.test_boot"),
}


class VmPlan(Vm, Wave):
    """What is planned for one VM. For what it leaves out, the settings and the manifest count."""

    name: str | None = Field(default=None, description="The new name of the VM.")
    wave: str | None = Field(default=None, description="Its wave. `waves` in the settings says when that may run.")
    hold: bool = Field(default=False, description="Whether to leave the VM out until you remove this.")
    priority: int | None = Field(
        default=None, ge=-1000, le=1000, description="VMs with a higher number go first; without one, it is 0."
    )
    network_map: dict[str, Network] = Field(
        default_factory=dict, description="From networks of the source to new ones; overrides `libvirt.network_map`."
    )
    output_dir: Path | None = Field(default=None, description="The directory for its disks.")
    format: Literal["qcow2", "raw"] | None = Field(default=None, description="Image format of its disks.")
    compress: bool | None = Field(default=None, description="Whether to compress its qcow2 disks.")
    start: bool | None = Field(default=None, description="Whether to start the domain after it is defined.")
    test_boot: bool | None = Field(default=None, description="Whether to boot the result before the job succeeds.")
    libvirt_uri: str | None = Field(default=None, description="The libvirt for its domain.")
    features: tuple[Word, ...] = Field(
        default=(), description="Features that its host must have (`dispatch.slurm.features`)."
    )
    licenses: tuple[Word, ...] = Field(
        default=(), description="Licences that its job takes (`dispatch.slurm.licenses`)."
    )
    addresses: tuple[IPvAnyAddress, ...] = Field(
        default=(), description="IP addresses that the VM has, and is to have again after `hyper2kvmctl cutover`."
    )
    notes: str = Field(default="", max_length=1000, description="Notes for people; the report has them, too.")

    def overrides(self, settings: Settings) -> list[str]:
        """What this VM gets instead of what the settings say, as `key.path=value`."""
        found = writing_to(self.output_dir) if self.output_dir is not None else []
        if self.network_map:
            found.append(f"libvirt.network_map={json.dumps({**settings.libvirt.network_map, **self.network_map})}")
        values = self.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        return [
            *found,
            *(f"{key}={json.dumps(values[own])}" for own, keys in _SETTINGS.items() if own in values for key in keys),
        ]

    @property
    def digest(self) -> str:
        """The same for plans that say the same."""
        return hashlib.sha256(self.model_dump_json(exclude_unset=True).encode()).hexdigest()[:16]

    def window(self, settings: Settings) -> Wave:
        """When it may be migrated: what it says itself, or else what its wave says."""
        return self if self.has_window else settings.waves.get(self.wave or "", Wave())

    @property
    def has_window(self) -> bool:
        """Whether it says itself when the VM may be migrated."""
        return self.not_before is not None or self.not_after is not None


NO_PLAN = VmPlan()
