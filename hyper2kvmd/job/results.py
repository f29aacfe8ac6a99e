"""What the stages hand on: values while the job runs, plain data in the report and in the journal of steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hyper2kvmd.domain.model import GuestSystem, Machine
from hyper2kvmd.guest.change import Named, Proof
from hyper2kvmd.guest.inspect import Found, Inspection


class Result(BaseModel):
    """What one stage found or did. Read from plain data, it raises pydantic.ValidationError for what is none."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def as_json(self) -> dict[str, Any]:
        """The result as it stands in the report."""
        return self.model_dump(mode="json")


@dataclass(frozen=True, kw_only=True)
class Inspected(Found):
    """What INSPECT found. boot_disk: the id of the one that it boots from. kernel_version: of the first on the menu."""

    boot_disk: str
    kernel_version: str | None

    @classmethod
    def of(cls, inspection: Inspection, boot_disk: str) -> Inspected:
        """The inspection, with the id of the boot disk in place of its number."""
        kernels = sorted(inspection.kernels, key=lambda kernel: not kernel.chosen_by_bootloader)
        found = {field.name: getattr(inspection, field.name) for field in fields(Found)}
        return cls(**found, boot_disk=boot_disk, kernel_version=kernels[0].version if kernels else None)

    @property
    def guest(self) -> GuestSystem:
        """The operating system as a domain knows it."""
        return self.system(self.kernel_version)

    def as_json(self) -> dict[str, Any]:
        """The result as it stands in the report."""
        return asdict(self)


class Fixed(Result):
    """What FIX did, and the machine that it proved the guest for.

    fstab: before and after, if it is to be shown. names: every device that the guest names, each with what it is.
    """

    drivers_injected: tuple[str, ...]
    boot_updated: bool
    proofs: tuple[Proof, ...]
    machine: Machine
    fstab: dict[Literal["before", "after"], str] | None = None
    names: tuple[Named, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The result as it stands in the report."""
        shape = {**self.model_dump(mode="json"), "compatible": not self.machine.virtio}
        return {key: value for key, value in shape.items() if key != "fstab" or value is not None}


class Checked(Result):
    """How one disk was checked: by its format's own check, and by comparison with the source and the fix."""

    checked: bool
    compared: bool


class Validated(Result):
    """What VALIDATE found. all_valid: None if it was not asked to look."""

    all_valid: bool | None
    disks: dict[str, Checked]


class Booted(Result):
    """How the boot test ended, and the names of the files beside the report that have what was seen."""

    outcome: Literal["passed", "failed", "inconclusive"]
    reason: str
    seconds: float
    serial_log: str | None = None
    screenshot: str | None = None


class Converted(Result):
    """The published disks, by their ids."""

    disks: dict[str, str]
    format: str
    compressed: bool


class Imported(Result):
    """The domain that was defined, and the machine that it has."""

    domain: str
    uuid: str
    machine: Machine


class Results(BaseModel):
    """The results so far; None for a stage that has none."""

    inspect: Inspected | None = None
    fix: Fixed | None = None
    validate_: Validated | None = Field(default=None, alias="validate")
    boot: Booted | None = None
    convert: Converted | None = None
    import_: Imported | None = Field(default=None, alias="import")

    model_config = ConfigDict(extra="ignore")

    def as_json(self) -> dict[str, dict[str, Any]]:
        """The results as they stand in the report, by the names of the stages."""
        found = ((field.alias or name, getattr(self, name)) for name, field in type(self).model_fields.items())
        return {name: result.as_json() for name, result in found if result is not None}

    def fill(self, earlier: Results) -> None:
        """Take over the results of an earlier attempt for the stages that have none."""
        for name in type(self).model_fields:
            if getattr(self, name) is None:
                setattr(self, name, getattr(earlier, name))
