"""The settings and their defaults: the only place a default is written."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from hyper2kvmd.domain import attachment
from hyper2kvmd.errors import SettingsError
from hyper2kvmd.manifest import wire
from hyper2kvmd.options import DEFAULT_PATH

Model = TypeVar("Model", bound=BaseModel)
Lines = dict[tuple[str, ...], int]  # by the path of a key

Seconds = Annotated[float, Field(ge=0)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


def _checked(target: str) -> str:
    attachment(target)
    return target


Network = Annotated[str, AfterValidator(_checked)]


_PORT = r"(\d{1,4}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d{2}|655[0-2]\d|6553[0-5])"


class Section(BaseModel):
    """A group of settings: immutable, and strict about its keys.

    What describes a section and a key here is also what the shipped file and the manual say of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


class Watch(Section):
    """How new exports are noticed before the next scan, which finds everything in any case."""

    mode: Literal["auto", "inotify", "poll", "off"] = Field(
        default="auto",
        description="auto: inotify, but poll on network file systems, where other hosts write too. inotify: the kernel"
        " tells at once. poll: a look every ten seconds. off: only the scans.",
    )


class Output(Section):
    """The disks that are written. A manifest may ask for something else; `pipeline` goes before both."""

    format: Literal["qcow2", "raw"] = Field(default="qcow2", description="Image format of the disks: qcow2 or raw.")
    compress: bool = Field(
        default=False, description="Whether qcow2 disks are compressed: smaller, but slower to write and to read."
    )
    allowed_dirs: tuple[Path, ...] = Field(
        default=(),
        description="Directories, besides output_dir, that a manifest may ask for. The unit has to allow them too"
        " (ReadWritePaths=).",
        examples=[["/srv/fast", "/srv/big"]],
    )


class Libvirt(Section):
    """Where and how the domain is defined."""

    uri: str = Field(default="qemu:///system", description="The libvirt that domains are defined and booted in.")
    import_: bool = Field(
        default=True,
        alias="import",
        description="Whether the VM is defined in libvirt at all. If not, there are only its disks.",
    )
    network_map: dict[str, Network] = Field(
        default_factory=dict,
        description="What a network of the source becomes: the name of a libvirt network, bridge:NAME, or ovs:NAME"
        " (Open vSwitch), each with @VLAN if it is to be tagged; or user (QEMU's own NAT, which needs no network of the"
        " host).",
        examples=[{"VM Network": "bridge:br0", "DMZ": "ovs:br1@20"}],
    )
    default_network: Network = Field(
        default="default", description="What all the other networks become, in the same form."
    )
    pool: str | None = Field(
        default=None,
        description="The storage pool that output_dir belongs to; it must exist and be active, and is refreshed when a"
        " disk is there. null: any pool of that directory is refreshed.",
    )
    autostart: bool = Field(
        default=False,
        description="Whether the domain starts with the host. Off, because the source VM has the same addresses.",
    )
    start: bool = Field(
        default=False, description="Whether the domain is started once it is defined. Off for the same reason."
    )

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Guest(Section):
    """The libguestfs appliance: a small VM in which guests are inspected and fixed."""

    accel: Literal["auto", "kvm", "tcg"] = Field(
        default="auto",
        description="auto: KVM if it works, else emulation. kvm: only KVM; a job that finds none is tried again later."
        " tcg: always emulation, several times slower.",
    )
    memory_mb: int = Field(
        default=1280, ge=512, description="Memory of the appliance, in MiB. More of it, if luks_keys are given."
    )


class Fix(Section):
    """How guests are fixed, and what happens to those that cannot be."""

    allow_unsupported: bool = Field(
        default=False,
        description="Whether a guest that cannot be fixed is converted all the same, with SATA and e1000e instead of"
        " virtio. If not, its job ends blocked.",
    )
    luks_keys: dict[str, Path] = Field(
        default_factory=dict,
        description="Passphrases of encrypted guests: from the VM's name, or the UUID of a LUKS container, to a file"
        " that the service's user can read and others cannot.",
        examples=[{"web01": "/etc/hyper2kvmd/keys/web01"}],
    )
    serial_console: bool = Field(
        default=False,
        description="Whether the guest's kernel is to write to the first serial port as well, for `virsh console`.",
    )


class Validate(Section):
    """How the result is checked, beyond `qemu-img check`."""

    require_checksums: bool = Field(
        default=False,
        description="Whether every disk must have a checksum in the manifest. One without it ends its job blocked.",
    )
    compare: bool = Field(
        default=False,
        description="Whether every byte of the result is compared with the source and the fix; reads both once more.",
    )
    test_boot: bool = Field(
        default=False,
        description="Whether the result is booted before success is reported: on a throw-away copy, without a network."
        " A manifest can ask for it too.",
    )
    boot_seconds: float = Field(
        default=300,
        ge=1,
        le=7200,
        description="How long a guest may take to boot on KVM, in seconds; four times that under emulation.",
    )
    boot_memory_mb: int = Field(
        default=2048, ge=128, description="The most memory that a guest gets in the boot test, in MiB."
    )
    boot_failure: Literal["fail", "warn"] = Field(
        default="fail",
        description="fail: a guest that is seen not to boot fails its job. warn: it is published with a warning.",
    )


class Retry(Section):
    """How jobs are tried again that failed for a passing reason, such as a libvirt that does not answer."""

    max_attempts: int = Field(
        default=5,
        ge=1,
        description="How many attempts there are in all. Missing space or memory is waited for without counting.",
    )
    delay_seconds: Seconds = Field(
        default=60, description="Wait before the second attempt, in seconds; doubles with each one after it."
    )
    max_delay_seconds: Seconds = Field(default=3600, description="The longest wait, in seconds.")

    def delay(self, attempt: int) -> float:
        """Seconds to wait after attempt number `attempt` (counted from 1): doubles, up to the maximum."""
        return min(self.delay_seconds * 2.0 ** min(attempt - 1, 32), self.max_delay_seconds)


class StageSeconds(Section):
    """How long each stage may take, in seconds, before its job is stopped and tried again. Nothing that is alive comes
    near these; what hangs must not hang for ever.
    """

    plan: Seconds = Field(default=1800, description="Looking at all that can be known before the copy.")
    verify: Seconds = Field(default=172800, description="Computing the checksums of the exported disks.")
    inspect: Seconds = Field(default=3600, description="Finding out what the guest is.")
    fix: Seconds = Field(default=14400, description="Changing the guest, on an overlay.")
    convert: Seconds = Field(default=172800, description="Converting the disks.")
    commit: Seconds = Field(default=14400, description="Laying the changes onto the converted disks.")
    validate_: Seconds = Field(default=172800, alias="validate", description="Checking the converted disks.")
    boot: Seconds = Field(default=36000, description="The boot test.")
    publish: Seconds = Field(default=3600, description="Flushing the disks, and giving them their names.")
    import_: Seconds = Field(default=1800, alias="import", description="Defining the domain.")

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Limits(Section):
    """What one job may take of time and of the host."""

    stage_seconds: StageSeconds = StageSeconds()
    no_progress_seconds: Seconds = Field(
        default=7200,
        description="A job in which nothing moves for so many seconds is stopped and tried again.",
    )
    nice: int = Field(
        default=10, ge=0, le=19, description="CPU priority of jobs on the host: 0 (normal) to 19 (lowest)."
    )
    io_class: Literal["none", "best-effort", "idle"] = Field(
        default="best-effort",
        description="Priority of their disk accesses. none: normal. best-effort: the lowest of the normal ones. idle:"
        " only when nobody else wants the disk.",
    )


class Retention(Section):
    """What is kept of jobs that are over. `hyper2kvmctl prune` removes the rest, and so does the daemon, every hour."""

    work_days: int = Field(
        default=7,
        ge=0,
        description="Days for which unfinished disks in output_dir, and the files in work_dir, are kept whose export is"
        " not in exports_dir.",
    )
    log_days: int = Field(default=30, ge=0, description="Days for which the log of a finished job is kept.")
    old_reports: int = Field(default=10, ge=0, description="How many reports of earlier runs are kept for each export.")


class Metrics(Section):
    """The Prometheus endpoint."""

    listen: str = Field(
        default="127.0.0.1:9878",
        pattern=rf"^(|[^:]+:{_PORT}|\[[0-9a-fA-F:]+\]:{_PORT})$",
        description='ADDRESS:PORT, or [IPV6-ADDRESS]:PORT, that metrics are served on; "" for none. A change takes a'
        " restart.",
    )


class Log(Section):
    """What is logged."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least important messages that are logged: debug, info, warning or error."
    )


class Settings(Section):
    """Everything that can be configured, at its default; docs/settings.md says what each key does."""

    exports_dir: Path = Field(
        default=Path("/var/lib/hypersdk/exports"),
        description="Where hypersdk drops its exports, one directory per VM. Nothing in them is changed: a lock file, a"
        " log and the report are added.",
    )
    output_dir: Path = Field(default=Path("/var/lib/libvirt/images"), description="Where the converted disks go.")
    work_dir: Path = Field(
        default=Path("/var/lib/hyper2kvmd/work"),
        description="Where a job keeps its overlays, and the record of its finished steps, until it is over.",
    )
    manifest_names: tuple[FileName, ...] = Field(
        default=("manifest.json", "artifact-manifest.json", "manifest.yaml", "manifest.yml"),
        description="File names of manifests. The first that is there is used.",
    )
    workers: int = Field(
        default=2,
        ge=1,
        le=256,
        description="Jobs at the same time. Each needs guest.memory_mb for its appliance, and about two cores.",
    )
    settle_seconds: Seconds = Field(
        default=5, description="An export is taken when its manifest and disks have not changed for so many seconds."
    )
    incomplete_grace_seconds: Seconds = Field(
        default=600,
        description="A manifest that stays half-written, or a disk that stays missing, is an error after so many"
        " seconds.",
    )
    scan_interval_seconds: float = Field(
        default=30,
        ge=0.1,
        le=3600,
        description="Seconds between two looks at all exports, whatever `watch` says.",
    )
    watch: Watch = Watch()
    output: Output = Output()
    pipeline: wire.Pipeline = Field(
        default=wire.Pipeline(),
        description="What goes before the manifests' own wishes, in the keys of their `pipeline`; null leaves it to"
        " them.",
        examples=[{"convert": {"compression": True}, "validate": {"test_boot": True}}],
    )
    libvirt: Libvirt = Libvirt()
    guest: Guest = Guest()
    fix: Fix = Fix()
    validate_: Validate = Field(default=Validate(), alias="validate")
    retry: Retry = Retry()
    limits: Limits = Limits()
    retention: Retention = Retention()
    cleanup_source: bool = Field(
        default=False,
        description="Whether the exported disks are deleted after their VM was migrated. The manifest and the report"
        " stay.",
    )
    metrics: Metrics = Metrics()
    log: Log = Log()

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    def writing_to(self, directory: Path) -> Settings:
        """These settings, with the disks written to `directory` whatever the manifests ask for."""
        convert = (self.pipeline.convert or wire.Convert()).model_copy(update={"output_dir": str(directory)})
        return self.model_copy(
            update={"output_dir": directory, "pipeline": self.pipeline.model_copy(update={"convert": convert})}
        )


def load(path: Path | None = None, overrides: tuple[str, ...] = ()) -> Settings:
    """Read the settings file and apply `key.path=value` overrides to it.

    Without `path`, the default file is read if it exists, and the defaults hold if it does not.
    Raise SettingsError, with one line per problem, for a file that cannot be read or does not hold settings.
    """
    if path is None and not DEFAULT_PATH.exists():
        return _validate(Settings, DEFAULT_PATH, {}, {}, overrides)
    source = path or DEFAULT_PATH
    return _validate(Settings, source, *_parse(source), overrides)


def read(model: type[Model], path: Path) -> Model:
    """Read another file that is to hold what `model` says. Raise SettingsError like `load`."""
    return _validate(model, path, *_parse(path), ())


def _validate(
    model: type[Model], source: Path, data: dict[str, Any], lines: Lines, overrides: tuple[str, ...]
) -> Model:
    for override in overrides:
        _override(data, override)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_explain(model, source, problem, lines) for problem in error.errors()]
        raise SettingsError("\n".join(problems)) from None


def _parse(source: Path) -> tuple[dict[str, Any], Lines]:
    """Parse a YAML file into plain data, and note the line of each key for error messages."""
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsError(f"{source}: no such file; name an existing one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{source}: cannot be read: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{source}: not valid YAML: {error}") from None
    if data is None:
        return {}, {}
    if not isinstance(data, dict):
        raise SettingsError(f"{source}: expected settings such as 'workers: 2', found {type(data).__name__}")
    # Followed blindly, a few of them make a file of a kilobyte larger than any memory.
    if alias := next((e for e in yaml.parse(text) if isinstance(e, yaml.AliasEvent)), None):
        line = alias.start_mark.line + 1  # type: ignore[union-attr]  # what is parsed from text has one
        raise SettingsError(f"{source}:{line}: *{alias.anchor}: YAML aliases are not allowed; write it out here")
    lines: Lines = {}

    def note(node: yaml.Node | None, path: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                where = (*path, str(key.value))
                if where in lines:
                    raise SettingsError(
                        f"{source}:{key.start_mark.line + 1}: {'.'.join(where)} is set twice; delete one of them"
                    )
                lines[where] = key.start_mark.line + 1
                note(value, where)

    note(node, ())
    return data, lines


def _override(data: dict[str, Any], override: str) -> None:
    """Apply one `key.path=value`; the value is YAML, so `true`, `3` and `[a, b]` mean what they say."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise SettingsError(f"--set {override}: expected key.path=value, for example workers=4")
    *parents, last = key.split(".")
    for parent in parents:
        step = data[parent] = {} if data.get(parent) is None else data[parent]
        if not isinstance(step, dict):
            raise SettingsError(f"--set {override}: {parent} is not a section")
        data = step
    try:
        data[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {override}: the value is not valid YAML: {error}") from None


def _explain(model: type[BaseModel], source: Path, problem: Any, lines: Lines) -> str:
    """One problem as `file:line: key: what (hint)`."""
    path = tuple(str(part) for part in problem["loc"])
    line = lines.get(path) or next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    where = f"{source}:{line}" if line else f"{source} or --set"
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path[-1], _known(model, path[:-1]), n=1)
        return f"{where}: {key}: unknown setting" + (f"; did you mean {close[0]}?" if close else "")
    return f"{where}: {key}: {problem['msg']} (found {problem['input']!r})"


def _known(model: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """The names of the settings in the section at `path`; those in a table of sections are one level deeper."""
    for part in path:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        if part in fields:
            model = wire.table(fields[part].annotation) or model
    return [field.alias or name for name, field in model.model_fields.items()]
