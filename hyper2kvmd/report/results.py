"""The results of stages as readers of a report see them: of any version, and perhaps planted."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class _Seen(BaseModel):
    """What is shown of a stage's results; the report itself leaves their shape open."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Kernel(_Seen):
    version: str
    initrd: str | None = None
    chosen_by_bootloader: bool = False


class _Inspect(_Seen):
    os_type: str = ""
    product_name: str
    arch: str = ""
    hostname: str = ""
    kernel_version: str | None
    kernels: tuple[_Kernel, ...] = ()
    initramfs: str = ""
    bootloader: str = ""
    firmware: str
    firmware_evidence: str = ""
    mounts: dict[str, str] = {}
    locked: tuple[str, ...] = ()
    build: int | None = None

    @property
    def title(self) -> str:
        """What the system calls itself, and the build, by which one Windows is told from another."""
        return self.product_name if self.build is None else f"{self.product_name} (build {self.build})"


class _Proof(_Seen):
    subject: str
    claim: str
    ok: bool
    evidence: str


class _Named(_Seen):
    path: str
    line: int = 0
    use: str
    before: str
    after: str
    device: str = ""
    proof: str = ""


class _Machine(_Seen):
    disks: str = ""
    cards: str = ""

    @property
    def title(self) -> str:
        """The devices, in words for people."""
        bus = {"virtio": "virtio", "scsi": "virtio SCSI", "sata": "SATA", "ide": "IDE"}.get(self.disks, "other")
        return f"{bus} disks, {self.cards or 'Intel'} network cards"


class _Fix(_Seen):
    drivers_injected: tuple[str, ...] = ()
    proofs: tuple[_Proof, ...] = ()
    compatible: bool = False
    machine: _Machine | None = None
    fstab: dict[str, str] = {}
    names: tuple[_Named, ...] = ()


class _Checked(_Seen):
    checked: bool = False
    compared: bool = False


class _Validate(_Seen):
    disks: dict[str, _Checked] = {}


class _Boot(_Seen):
    outcome: str
    reason: str
    seconds: float = Field(strict=True)
    serial_log: str | None = None
    screenshot: str | None = None


class Results(_Seen):
    """The results of the stages that are shown; None for a stage that put nothing on the record."""

    inspect: _Inspect | None = None
    fix: _Fix | None = None
    validate_: _Validate | None = Field(default=None, alias="validate")
    boot: _Boot | None = None
