"""Reads the settings: the file, conf.d beside it, and what a command line puts in their place."""

from __future__ import annotations

import difflib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from hyper2kvmd.errors import SettingsError
from hyper2kvmd.manifest import wire
from hyper2kvmd.options import DEFAULT_PATH
from hyper2kvmd.settings.model import Settings

Model = TypeVar("Model", bound=BaseModel)
Lines = dict[tuple[str, ...], str]  # where a key stands, such as /etc/hyper2kvmd/hyper2kvmd.yaml:7, by its path
DROP_INS = "conf.d"


def load_settings(path: Path | None = None, overrides: tuple[str, ...] = ()) -> Settings:
    """Read the settings file, then those in `conf.d` beside it, and apply `key.path=value` overrides.

    Without `path`, the default file is read if it exists, and the defaults hold if it does not. Of two files, the one
    whose name sorts last goes before the other, key by key.
    Raise SettingsError, with one line per problem, for a file that cannot be read, does not hold settings, or could
    have been written by others.
    """
    source = path or DEFAULT_PATH
    files = [source] if path is not None or source.exists() else []
    files += sorted(file for file in source.parent.glob(f"{DROP_INS}/*.yaml") if not file.name.startswith("."))
    data: dict[str, Any] = {}
    lines: Lines = {}
    for file in files:
        more, more_lines = _parse(file)
        _merge(data, more)
        lines |= more_lines
    for override in overrides:
        _override(data, override)
    return _validate(Settings, source, data, lines)


def overridden(settings: Settings, overrides: Iterable[str]) -> Settings:
    """The settings with `key.path=value` overrides applied. Raise SettingsError."""
    data = json.loads(settings.model_dump_json(by_alias=True))
    for override in overrides:
        _override(data, override)
    return _validate(Settings, Path("the settings"), data, {})


def writing_to(directory: Path) -> list[str]:
    """The overrides by which disks are written to `directory`, whatever the manifests ask for."""
    return [f"{key}={json.dumps(str(directory))}" for key in ("output_dir", "pipeline.convert.output_dir")]


def load_file(model: type[Model], path: Path) -> Model:
    """Read another file that is to hold what `model` says. Raise SettingsError like `load`."""
    return _validate(model, path, *_parse(path))


def _validate(model: type[Model], source: Path, data: dict[str, Any], lines: Lines) -> Model:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_explain(model, source, problem, lines) for problem in error.errors()]
        raise SettingsError("\n".join(problems)) from None


def _parse(source: Path) -> tuple[dict[str, Any], Lines]:
    """Parse a YAML file into plain data, and note the place of each key for error messages."""
    try:
        with source.open(encoding="utf-8") as file:
            _refuse_others(source, os.fstat(file.fileno()))
            text = file.read()
    except FileNotFoundError:
        raise SettingsError(f"{source}: no such file; name an existing one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{source}: cannot be read: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{source}: not valid YAML: {error}") from None
    except RecursionError:
        raise SettingsError(f"{source}: nested too deep; settings have a few levels") from None
    except (ValueError, KeyError, AttributeError) as error:  # PyYAML's own, for a date such as 2026-02-31, or !!bool x
        raise SettingsError(f"{source}: holds a value that is none: {error}; write it in quotes") from None
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
                lines[where] = f"{source}:{key.start_mark.line + 1}"
                note(value, where)

    note(node, ())
    return data, lines


def _refuse_others(path: Path, status: os.stat_result) -> None:
    """Refuse a file that somebody else could have written: it decides what runs, and where disks go."""
    if status.st_nlink == 0:  # it has no name, so it comes from whoever started us
        return
    others = status.st_mode & 0o002 or (status.st_mode & 0o020 and status.st_gid not in (0, os.getegid()))
    if others:
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        raise SettingsError(f"{path}: others can write it (mode {mode}); read it, then run `chmod go-w {path}`")
    if status.st_uid not in (0, os.geteuid()):
        raise SettingsError(f"{path}: it belongs to user {status.st_uid}; read it, then run `chown root {path}`")


def _merge(data: dict[str, Any], more: dict[str, Any]) -> None:
    """Put `more` over `data`, table by table."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            _merge(data[key], value)
        else:
            data[key] = value


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
    where = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), f"{source} or --set")
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path[-1], _known(model, path[:-1]), n=1)
        return f"{where}: {key}: unknown setting" + (f"; did you mean {close[0]}?" if close else "")
    found = "" if problem["type"] == "secret" else f" (found {problem['input']!r})"
    return f"{where}: {key}: {problem['msg']}{found}"


def _known(model: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """The names of the settings in the section at `path`; those in a table of sections are one level deeper."""
    for part in path:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        if part in fields:
            model = wire.table(fields[part].annotation) or model
    return [field.alias or name for name, field in model.model_fields.items()]
