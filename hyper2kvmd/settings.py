"""The settings and their defaults: the only place a default is written."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from hyper2kvmd.domain import attachment
from hyper2kvmd.errors import SettingsError
from hyper2kvmd.options import DEFAULT_PATH

Seconds = Annotated[float, Field(ge=0)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


def _checked(target: str) -> str:
    attachment(target)
    return target


Network = Annotated[str, AfterValidator(_checked)]


_PORT = r"(\d{1,4}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d{2}|655[0-2]\d|6553[0-5])"


class Section(BaseModel):
    """A group of settings: immutable, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Watch(Section):
    """How the exports directory is watched; the scan finds everything in every mode."""

    mode: Literal["auto", "inotify", "poll", "off"] = "auto"


class Output(Section):
    """The disks that are written, where the manifest is silent."""

    format: Literal["qcow2", "raw"] = "qcow2"
    compress: bool = False
    allowed_dirs: tuple[Path, ...] = ()


class Libvirt(Section):
    """Where and how the domain is defined."""

    uri: str = "qemu:///system"
    import_: bool = Field(default=True, alias="import")
    network_map: dict[str, Network] = Field(default_factory=dict)
    default_network: Network = "default"
    pool: str | None = None
    autostart: bool = False
    start: bool = False

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Guest(Section):
    """The libguestfs appliance in which guests are inspected and fixed."""

    accel: Literal["auto", "kvm", "tcg"] = "auto"
    memory_mb: int = Field(default=1280, ge=512)


class Fix(Section):
    """How guests are fixed, and what happens to those that cannot be.

    luks_keys: from a VM's name or the UUID of a LUKS container to a file with the passphrase.
    """

    allow_unsupported: bool = False
    luks_keys: dict[str, Path] = Field(default_factory=dict)
    serial_console: bool = False


class Validate(Section):
    """How the result is checked beyond `qemu-img check`.

    boot_seconds: how long a guest may take to boot, on KVM; four times that under emulation. boot_memory_mb: of the
    test, at most. boot_failure: whether a guest that is seen not to boot fails its job, or gives a warning.
    """

    compare: bool = False
    test_boot: bool = False
    boot_seconds: float = Field(default=300, ge=1, le=7200)
    boot_memory_mb: int = Field(default=2048, ge=128)
    boot_failure: Literal["fail", "warn"] = "fail"


class Retry(Section):
    """How often, and after which delays, a job that failed for a passing reason is tried again."""

    max_attempts: int = Field(default=5, ge=1)
    delay_seconds: Seconds = 60
    max_delay_seconds: Seconds = 3600

    def delay(self, attempt: int) -> float:
        """Seconds to wait after attempt number `attempt` (counted from 1): doubles, up to the maximum."""
        return min(self.delay_seconds * 2.0 ** min(attempt - 1, 32), self.max_delay_seconds)


class StageSeconds(Section):
    """How long each stage may take. Nothing that is alive comes near these; what hangs must not hang for ever."""

    plan: Seconds = 1800
    verify: Seconds = 172800
    inspect: Seconds = 3600
    fix: Seconds = 14400
    convert: Seconds = 172800
    commit: Seconds = 14400
    validate_: Seconds = Field(default=172800, alias="validate")
    boot: Seconds = 36000
    publish: Seconds = 3600
    import_: Seconds = Field(default=1800, alias="import")

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Limits(Section):
    """What one job may take of time and of the host."""

    stage_seconds: StageSeconds = StageSeconds()
    no_progress_seconds: Seconds = 7200
    nice: int = Field(default=10, ge=0, le=19)
    io_class: Literal["none", "best-effort", "idle"] = "best-effort"


class Retention(Section):
    """How long what nobody needs any more is kept; `hyper2kvmctl prune` and the daemon, every hour, remove the rest."""

    work_days: int = Field(default=7, ge=0)
    log_days: int = Field(default=30, ge=0)
    old_reports: int = Field(default=10, ge=0)


class Metrics(Section):
    """The Prometheus endpoint; an empty address turns it off."""

    listen: str = Field(default="127.0.0.1:9878", pattern=rf"^(|[^:]+:{_PORT}|\[[0-9a-fA-F:]+\]:{_PORT})$")


class Log(Section):
    """What is logged."""

    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(Section):
    """Everything that can be configured; see etc/hyper2kvmd.yaml for what each key does."""

    exports_dir: Path = Path("/var/lib/hypersdk/exports")
    output_dir: Path = Path("/var/lib/libvirt/images")
    work_dir: Path = Path("/var/lib/hyper2kvmd/work")
    manifest_names: tuple[FileName, ...] = (
        "manifest.json",
        "artifact-manifest.json",
        "manifest.yaml",
        "manifest.yml",
    )
    workers: int = Field(default=2, ge=1, le=256)
    settle_seconds: Seconds = 5
    incomplete_grace_seconds: Seconds = 600
    scan_interval_seconds: float = Field(default=30, ge=0.1, le=3600)
    watch: Watch = Watch()
    output: Output = Output()
    libvirt: Libvirt = Libvirt()
    guest: Guest = Guest()
    fix: Fix = Fix()
    validate_: Validate = Field(default=Validate(), alias="validate")
    retry: Retry = Retry()
    limits: Limits = Limits()
    retention: Retention = Retention()
    cleanup_source: bool = False
    metrics: Metrics = Metrics()
    log: Log = Log()

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


def load(path: Path | None = None, overrides: tuple[str, ...] = ()) -> Settings:
    """Read the settings file and apply `key.path=value` overrides to it.

    Without `path`, the default file is read if it exists, and the defaults hold if it does not.
    Raise SettingsError, with one line per problem, for a file that cannot be read or does not hold settings.
    """
    source = path or DEFAULT_PATH
    lines: dict[tuple[str, ...], int] = {}
    data: dict[str, Any] = {}
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path is not None:
            raise SettingsError(f"{path}: no such file; name an existing one with --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{source}: cannot be read: {error}") from None
    else:
        data, lines = _parse(source, text)
    for override in overrides:
        _override(data, override)
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        problems = [_explain(source, problem, lines) for problem in error.errors()]
        raise SettingsError("\n".join(problems)) from None


def _parse(source: Path, text: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Parse YAML into plain data, and note the line of each key for error messages."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{source}: not valid YAML: {error}") from None
    if data is None:
        return {}, {}
    if not isinstance(data, dict):
        raise SettingsError(f"{source}: expected settings such as 'workers: 2', found {type(data).__name__}")
    lines: dict[tuple[str, ...], int] = {}

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
        step = data.setdefault(parent, {})
        if not isinstance(step, dict):
            raise SettingsError(f"--set {override}: {parent} is not a section")
        data = step
    try:
        data[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {override}: the value is not valid YAML: {error}") from None


def _explain(source: Path, problem: Any, lines: dict[tuple[str, ...], int]) -> str:
    """One problem as `file:line: key: what (hint)`."""
    path = tuple(str(part) for part in problem["loc"])
    line = lines.get(path) or next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    where = f"{source}:{line}" if line else f"{source} or --set"
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path[-1], _known(path[:-1]), n=1)
        return f"{where}: {key}: unknown setting" + (f"; did you mean {close[0]}?" if close else "")
    return f"{where}: {key}: {problem['msg']} (found {problem['input']!r})"


def _known(path: tuple[str, ...]) -> list[str]:
    """The names of the settings in the section at `path`."""
    model: Any = Settings
    for part in path:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        model = fields[part].annotation
    return [field.alias or name for name, field in model.model_fields.items()]
