"""Every way a migration can go wrong: one closed list of codes, and what each means for the job."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """What becomes of a job that ends with an error."""

    RETRY = "retrying"  # the cause passes by itself: tried again with growing delays
    BLOCKED = "blocked"  # a person must change something, then say `hyper2kvmctl retry`
    REJECTED = "rejected"  # the export is not an Artifact Manifest, or it is hostile
    CANCELLED = "cancelled"  # a person does not want it any more
    FAILED = "failed"  # trying again would end the same way


class Code(StrEnum):
    """The closed list of error codes: a metric's label, a report's `error.code`, a row of the manual."""

    MANIFEST_UNREADABLE = "manifest_unreadable"
    MANIFEST_INVALID = "manifest_invalid"
    MANIFEST_CHANGED = "manifest_changed"
    EXPORT_UNSAFE = "export_unsafe"
    EXPORT_UNWRITABLE = "export_unwritable"
    EXPORT_INCOMPLETE = "export_incomplete"
    ASKED_UNUSABLE = "asked_unusable"
    DISK_MISSING = "disk_missing"
    DISK_SIZE = "disk_size"
    SOURCE_CHANGED = "source_changed"
    CHECKSUM_MISMATCH = "checksum_mismatch"
    CHECKSUM_MISSING = "checksum_missing"
    FORMAT_MISMATCH = "format_mismatch"
    FORMAT_UNSUPPORTED = "format_unsupported"
    IMAGE_UNSAFE = "image_unsafe"
    IMAGE_CORRUPT = "image_corrupt"
    NO_SPACE = "no_space"
    NO_MEMORY = "no_memory"
    OUTPUT_EXISTS = "output_exists"
    OUTPUT_DENIED = "output_denied"
    OS_UNKNOWN = "os_unknown"
    OS_UNSUPPORTED = "os_unsupported"
    GUEST_ENCRYPTED = "guest_encrypted"
    GUEST_DIRTY = "guest_dirty"
    GUEST_SPACE = "guest_space"
    DEVICE_UNCERTAIN = "device_uncertain"
    DRIVERS_UNUSABLE = "drivers_unusable"
    FIX_FAILED = "fix_failed"
    FIX_UNPROVED = "fix_unproved"
    APPLIANCE_FAILED = "appliance_failed"
    APPLIANCE_TOO_OLD = "appliance_too_old"
    VALIDATION_FAILED = "validation_failed"
    BOOT_FAILED = "boot_failed"
    DOMAIN_EXISTS = "domain_exists"
    MAC_EXISTS = "mac_exists"
    NETWORK_MISSING = "network_missing"
    POOL_MISSING = "pool_missing"
    FIRMWARE_MISSING = "firmware_missing"
    HOOK_FAILED = "hook_failed"
    SIGN_KEY_UNUSABLE = "sign_key_unusable"
    QEMU_DENIED = "qemu_denied"
    DEFINE_FAILED = "define_failed"
    LIBVIRT_UNAVAILABLE = "libvirt_unavailable"
    TOOL_MISSING = "tool_missing"
    TOOL_FAILED = "tool_failed"
    TOOL_KILLED = "tool_killed"
    IO_ERROR = "io_error"
    TIMED_OUT = "timed_out"
    ENGINE_UNAVAILABLE = "engine_unavailable"
    ENGINE_REFUSED = "engine_refused"
    NOT_ACCEPTED = "not_accepted"
    BUSY = "busy"
    INTERRUPTED = "interrupted"
    HELD = "held"
    PLAN_INVALID = "plan_invalid"
    WINDOW = "window"
    CANCELLED = "cancelled"
    CLAIM_LOST = "claim_lost"
    RUNNER_CRASHED = "runner_crashed"
    INTERNAL = "internal"


@dataclass(frozen=True)
class Meaning:
    """What a code stands for: how the job ends, and one line for the manual.

    A `patient` one is waited for as long as it takes: its attempts are not counted.
    """

    outcome: Outcome
    summary: str
    patient: bool = False


MEANING: dict[Code, Meaning] = {
    Code.MANIFEST_UNREADABLE: Meaning(Outcome.REJECTED, "the manifest is not complete JSON or YAML"),
    Code.MANIFEST_INVALID: Meaning(Outcome.REJECTED, "the manifest is not a valid Artifact Manifest 1.0"),
    Code.MANIFEST_CHANGED: Meaning(Outcome.BLOCKED, "the report beside the manifest belongs to another manifest"),
    Code.EXPORT_UNSAFE: Meaning(Outcome.REJECTED, "the export names a file outside itself, or is a symbolic link"),
    Code.EXPORT_UNWRITABLE: Meaning(Outcome.RETRY, "the lock and the report cannot be written into the export"),
    Code.EXPORT_INCOMPLETE: Meaning(Outcome.RETRY, "a disk of the export is still being written", patient=True),
    Code.ASKED_UNUSABLE: Meaning(
        Outcome.BLOCKED,
        "the saved options of `hyper2kvmctl migrate` cannot be read, or are unknown to this version",
    ),
    Code.DISK_MISSING: Meaning(Outcome.FAILED, "a disk that the manifest names is not in the export"),
    Code.DISK_SIZE: Meaning(Outcome.FAILED, "a disk is shorter than the manifest or its own header says"),
    Code.SOURCE_CHANGED: Meaning(Outcome.FAILED, "a disk changed while it was being migrated"),
    Code.CHECKSUM_MISMATCH: Meaning(Outcome.FAILED, "the checksum of a disk differs from the manifest"),
    Code.CHECKSUM_MISSING: Meaning(Outcome.BLOCKED, "a disk has no checksum, and the settings require one"),
    Code.FORMAT_MISMATCH: Meaning(Outcome.REJECTED, "a disk is not in the format that the manifest says"),
    Code.FORMAT_UNSUPPORTED: Meaning(Outcome.BLOCKED, "a disk is in a variant of its format that is not supported"),
    Code.IMAGE_UNSAFE: Meaning(Outcome.REJECTED, "a disk image refers to other files"),
    Code.IMAGE_CORRUPT: Meaning(Outcome.FAILED, "a disk image is truncated or damaged"),
    Code.NO_SPACE: Meaning(Outcome.RETRY, "there is not enough free space", patient=True),
    Code.NO_MEMORY: Meaning(Outcome.RETRY, "there is not enough free memory for the appliance", patient=True),
    Code.OUTPUT_EXISTS: Meaning(Outcome.BLOCKED, "an output file already exists and belongs to something else"),
    Code.OUTPUT_DENIED: Meaning(Outcome.BLOCKED, "the output directory is not allowed, or cannot be written"),
    Code.OS_UNKNOWN: Meaning(Outcome.BLOCKED, "no operating system was found on the disks"),
    Code.OS_UNSUPPORTED: Meaning(Outcome.BLOCKED, "the guest's operating system cannot be fixed"),
    Code.GUEST_ENCRYPTED: Meaning(Outcome.BLOCKED, "the guest's disks are encrypted"),
    Code.GUEST_DIRTY: Meaning(
        Outcome.BLOCKED, "a file system or registry in the guest is damaged or in use, or it is hibernated"
    ),
    Code.GUEST_SPACE: Meaning(Outcome.BLOCKED, "the guest has too little free space for a new initramfs"),
    Code.DEVICE_UNCERTAIN: Meaning(
        Outcome.BLOCKED, "a device that the guest starts from is missing, or looks the same as another one"
    ),
    Code.DRIVERS_UNUSABLE: Meaning(
        Outcome.BLOCKED, "fix.virtio_win does not name a virtio-win, or its drivers are damaged"
    ),
    Code.FIX_FAILED: Meaning(Outcome.FAILED, "a change inside the guest failed"),
    Code.FIX_UNPROVED: Meaning(Outcome.FAILED, "the fixed guest lacks something that it needs to boot on virtio"),
    Code.APPLIANCE_FAILED: Meaning(Outcome.RETRY, "the libguestfs appliance could not be started"),
    Code.APPLIANCE_TOO_OLD: Meaning(
        Outcome.BLOCKED, "a file system of the guest is newer than the libguestfs appliance of this host"
    ),
    Code.VALIDATION_FAILED: Meaning(Outcome.FAILED, "the converted disk is damaged or differs from the source"),
    Code.BOOT_FAILED: Meaning(Outcome.FAILED, "the migrated guest did not boot in the boot test"),
    Code.DOMAIN_EXISTS: Meaning(Outcome.BLOCKED, "libvirt already has a domain of this name or UUID"),
    Code.MAC_EXISTS: Meaning(Outcome.BLOCKED, "another domain has one of the VM's MAC addresses"),
    Code.NETWORK_MISSING: Meaning(
        Outcome.BLOCKED, "a network for the VM does not exist, is not active, or has no VLANs"
    ),
    Code.POOL_MISSING: Meaning(
        Outcome.BLOCKED,
        "the storage pool in the settings does not exist, is not active, or is not for the output directory",
    ),
    Code.FIRMWARE_MISSING: Meaning(Outcome.BLOCKED, "the host has no UEFI firmware that the VM needs"),
    Code.HOOK_FAILED: Meaning(Outcome.BLOCKED, "a hook refused the import, or cannot run"),
    Code.SIGN_KEY_UNUSABLE: Meaning(Outcome.BLOCKED, "the key that is to sign the report cannot be used"),
    Code.QEMU_DENIED: Meaning(Outcome.BLOCKED, "libvirt's QEMU cannot open disks in the output directory"),
    Code.DEFINE_FAILED: Meaning(Outcome.FAILED, "libvirt refused the domain"),
    Code.LIBVIRT_UNAVAILABLE: Meaning(Outcome.RETRY, "libvirt does not answer"),
    Code.TOOL_MISSING: Meaning(Outcome.BLOCKED, "a required program or library is not installed"),
    Code.TOOL_FAILED: Meaning(Outcome.FAILED, "a program ended with an error"),
    Code.TOOL_KILLED: Meaning(Outcome.RETRY, "a program was killed from outside"),
    Code.IO_ERROR: Meaning(Outcome.RETRY, "the operating system reported an input/output error"),
    Code.TIMED_OUT: Meaning(Outcome.RETRY, "a stage took longer than its limit, or made no progress for too long"),
    Code.ENGINE_UNAVAILABLE: Meaning(
        Outcome.RETRY, "the engine that places jobs on hosts does not answer, or its answer cannot be read"
    ),
    Code.ENGINE_REFUSED: Meaning(Outcome.BLOCKED, "the engine that places jobs on hosts refused the job"),
    Code.NOT_ACCEPTED: Meaning(Outcome.RETRY, "no host accepts the export, by its settings (`accept`)"),
    Code.BUSY: Meaning(Outcome.RETRY, "another process works on the export"),
    Code.INTERRUPTED: Meaning(Outcome.RETRY, "the job was stopped from outside; the next attempt resumes it"),
    Code.HELD: Meaning(Outcome.BLOCKED, "somebody put the export on hold"),
    Code.PLAN_INVALID: Meaning(Outcome.BLOCKED, "the plan of the VM has an error, or does not fit the VM"),
    Code.WINDOW: Meaning(Outcome.BLOCKED, "the window of the VM or of its wave is over, or too short for the job"),
    Code.CANCELLED: Meaning(Outcome.CANCELLED, "somebody cancelled the job"),
    Code.CLAIM_LOST: Meaning(Outcome.RETRY, "another process took the export over"),
    Code.RUNNER_CRASHED: Meaning(Outcome.FAILED, "the process of the job died several times"),
    Code.INTERNAL: Meaning(Outcome.FAILED, "a defect in hyper2kvmd"),
}


@dataclass(frozen=True)
class Finding:
    """Something a person should know: printed, reported and logged in this one shape.

    `field` is the path of the manifest field or setting it is about (`disks[0].checksum`), if any.
    """

    code: str
    message: str
    hint: str
    field: str | None = None

    def as_json(self) -> dict[str, str]:
        """The finding as it stands in reports and `--json` output."""
        shape = {"code": str(self.code), "message": self.message, "hint": self.hint}
        return shape if self.field is None else {**shape, "field": self.field}

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        return f"{where}{self.message}" + (f"\n  {self.hint}" if self.hint else "")


class MigrationError(Exception):
    """A job cannot go on: `code` from the closed list, what failed with its value, and what to do.

    `tail` is the end of the output of the tool that failed, if there was one. `problems` is everything that is wrong,
    this included, where more than one thing can be.
    """

    problems: tuple[Finding, ...] = ()

    def __init__(self, code: Code, message: str, hint: str, *, field: str | None = None, tail: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.field = field
        self.tail = tail

    @property
    def outcome(self) -> Outcome:
        """How the job ends."""
        return MEANING[self.code].outcome

    def finding(self) -> Finding:
        """The error without its tail, for people and reports."""
        return Finding(self.code, self.message, self.hint, self.field)

    def __str__(self) -> str:
        return str(self.finding())


class Collected:
    """Keeps the errors of several checks, so that all of them can be told at once: `with noted: check()`."""

    def __init__(self) -> None:
        self.errors: list[MigrationError] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, MigrationError):
            self.errors.append(error)
        return isinstance(error, MigrationError)

    def findings(self) -> tuple[Finding, ...]:
        """All that was noted, each once."""
        return tuple(dict.fromkeys(f for error in self.errors for f in error.problems or (error.finding(),)))

    def check(self) -> None:
        """Raise the error that decides most about the job, with all the others as its problems, if there is one."""
        if self.errors:
            error = min(self.errors, key=lambda error: _FIRST.index(error.outcome))
            error.problems = self.findings() if len(self.findings()) > 1 else ()
            raise error


# What waits for a person, or can never be, is not tried again because something else passes by itself.
_FIRST = (Outcome.REJECTED, Outcome.FAILED, Outcome.BLOCKED, Outcome.CANCELLED, Outcome.RETRY)


class SettingsError(Exception):
    """The configuration cannot be used; the message names the file, the line and the remedy."""


class Cancelled(BaseException):
    """The job was told to stop. Not an Exception, so that nothing between swallows it."""
