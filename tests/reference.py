"""The reference pages and the shipped settings, made from the code that they describe: `python -m tests.reference`.

With `--man DIRECTORY`, the manual pages, made from the same pages by lowdown(1).
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from hyper2kvmd import __main__ as daemon
from hyper2kvmd import __version__, api, ctl, messages
from hyper2kvmd.daemon.metrics import Metrics
from hyper2kvmd.errors import MEANING, Outcome
from hyper2kvmd.exits import EXIT_MEANING
from hyper2kvmd.options import DEFAULT_PATH
from hyper2kvmd.queue.names import CUTOVER, REPORT
from hyper2kvmd.report.cutover import CutoverReport
from hyper2kvmd.report.model import report_schema
from hyper2kvmd.settings.model import Section, Settings
from hyper2kvmd.settings.plan import VmPlan
from tests import ROOT, completions, dashboards
from tests.pages import WIDTH, below, split, wrapped

DATE = "2026-11-28"  # of this version, for the manual pages: that of the build would make each one different

OUTCOMES = {
    Outcome.RETRY: "The cause passes by itself. The daemon retries the job with growing delays.",
    Outcome.BLOCKED: "You must change something, then run `hyper2kvmctl retry`.",
    Outcome.REJECTED: "The export has no valid Artifact Manifest, or it is hostile.",
    Outcome.FAILED: "A retry would end the same way.",
    Outcome.CANCELLED: "Somebody cancelled the job.",
}

# What hyper2kvmd/api.py offers to other programs, in the order of the page.
LIBRARY = {
    "Migrating an export": ("MigrationPipeline", "MigrationFailed"),
    "Settings": ("load_settings", "Settings"),
    "While it runs": ("Event", "Progress", "Stage"),
    "The report": (
        *("Report", "ErrorRecord", "FindingRecord", "StageRecord", "DiskRecord", "ChangeRecord", "DomainRecord"),
        *("ManifestRecord", "HostRecord"),
    ),
    "Reading and writing manifests": ("ManifestBuilder", "ArtifactManifest", "parse", "ManifestError"),
    "What a manifest holds": ("Manifest", "VMSpec", "Disk", "Nic", "Configuration", "User", "Services", "Interface"),
    "What a manifest asks for": ("Stages", "Inspect", "Fix", "Convert", "Validate", "Output", "Options"),
    "Errors": ("MigrationError", "Finding", "Code"),
}

EXAMPLE = """\
from pathlib import Path

from hyper2kvmd.api import Event, ManifestBuilder, MigrationFailed, MigrationPipeline, Progress, load_settings

export = Path("/var/lib/hypersdk/exports/web01")
builder = ManifestBuilder(export).with_source("web01").with_vm(cpu=1, mem_gb=1, firmware="bios")
manifest = builder.add_disk("web01.qcow2").write()
print(manifest.boot_disk().format, manifest.boot_disk().path)


def show(event: Event, progress: Progress) -> None:
    if event.kind == "stage" and event.data["status"] == "done":
        print(event.data["stage"], "is done")


settings = load_settings(Path("/etc/hyper2kvmd/hyper2kvmd.yaml"), overrides=("output.format=raw",))
try:
    report = MigrationPipeline(export, settings, stages=("convert", "validate"), on_event=show).run()
except MigrationFailed as failed:
    print(f"{failed.code}: {failed.message}. {failed.hint}")
else:
    print(report.status, report.disks[0].target)
"""

EXAMPLE_PRINTS = """\
qcow2 web01.qcow2
plan is done
verify is done
convert is done
validate is done
publish is done
succeeded /var/lib/libvirt/images/web01-disk-0.raw
"""


@dataclass(frozen=True)
class Part:
    """A page that has some sections of a long one: its title, a sentence about it, the headings of its sections."""

    title: str
    about: str
    headings: tuple[str, ...]


# What stands in no part stays on the page itself.
SETTINGS_PARTS = {
    "migration": Part(
        "Settings: guests, disks and domains",
        "What a migration does to the guest and its disks, and how libvirt gets the VM.",
        ("## output", "## convert", "## libvirt", "## guest", "## fix", "## validate", "## vm"),
    ),
    "queue": Part(
        "Settings: the queue",
        "When exports start, how often jobs are retried, what they may take, and what is kept.",
        ("## watch", "## retry", "## limits", "## limits.stage_seconds", "## retention", "## hypersdk", "## ovf"),
    ),
    "monitoring": Part(
        "Settings: metrics, notifications, reports and logs",
        "What the daemon shows, and what it sends to other programs.",
        (
            *("## metrics", "## metrics.tls_server_config", "## notify", "## notify.webhook", "## notify.apprise"),
            *("## notify.heartbeat", "## hooks", "## log", "## report"),
        ),
    ),
    "hosts": Part(
        "Settings: several hosts",
        "Which host takes which job.",
        ("## accept", "## dispatch", "## dispatch.slurm", "## dispatch.command"),
    ),
}


def _of_ctl(*names: str) -> tuple[str, ...]:
    return tuple(f"### hyper2kvmctl {name}" for name in names)


CTL_PARTS = {
    "migrate": Part(
        "hyper2kvmctl: migrate by hand",
        "These commands migrate exports at once, or change a migrated VM.",
        _of_ctl("migrate", "batch", "cutover", "switch-bus"),
    ),
    "plan": Part(
        "hyper2kvmctl: plans",
        "These commands check, import, export and estimate plans.",
        (*_of_ctl("plan check", "plan import", "plan export", "plan estimate"), "## The plan of a batch"),
    ),
    "manifest": Part(
        "hyper2kvmctl: manifests",
        "These commands check, make and change manifests.",
        _of_ctl("validate", *(f"manifest {name}" for name in ("create", "rehash", "relocate", "schema", "upgrade"))),
    ),
    "queue": Part(
        "hyper2kvmctl: the queue",
        "These commands show the exports and control their jobs.",
        _of_ctl("list", "show", "report", "logs", "retry", "cancel", "hold", "release", "drain", "resume"),
    ),
    "host": Part(
        "hyper2kvmctl: the host",
        "These commands check the host, clean it up, and collect what explains an error.",
        _of_ctl("doctor", "hosts", "notify", "bundle", "prune"),
    ),
}
LIBRARY_PARTS = {
    "running": Part(
        "The library: settings and events",
        "What a program can set, and what it sees while a migration runs.",
        ("## Settings", "## While it runs"),
    ),
    "report": Part("The library: the report", "What a migration returns.", ("## The report",)),
    "builder": Part(
        "The library: reading and writing manifests",
        "How a program reads and writes manifests.",
        ("## Reading and writing manifests",),
    ),
    "manifest": Part(
        "The library: what a manifest holds",
        "The parts of a manifest that was read.",
        ("## What a manifest holds",),
    ),
    "pipeline": Part(
        "The library: what a manifest asks for",
        "The stages and options of a manifest that was read.",
        ("## What a manifest asks for",),
    ),
}


# What pages are made of ---------------------------------------------------------------------------------------


def item(term: str, text: str, note: str = "") -> str:
    """One entry of a list of definitions: what GitHub shows as a bullet is a tagged paragraph in a manual page."""
    return f"- **`{term}`**{f' ({note})' if note else ''}: {' '.join(text.split())}\n"


def exit_statuses() -> str:
    """The section on exit statuses, the same for both programs."""
    rows = "".join(item(str(status), meaning) for status, meaning in EXIT_MEANING.items())
    return f"## Exit status\n\n{rows}"


def files() -> str:
    """The section on files: the settings, and what the page on operations says is on disk."""
    operations = (ROOT / "docs/operations.md").read_text()
    section = operations.split("## What is on disk\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (`.*`) \| (.*) \|$", section, flags=re.MULTILINE)
    return "".join(
        [
            "## Files\n\n",
            item(str(DEFAULT_PATH), "the settings; without the file, the defaults apply"),
            *(f"- **{name}**: {text}\n" for name, text in rows),
        ]
    )


def divided(
    name: str, text: str, parts: Mapping[str, Part], depth: int, marker: str, sentences: Mapping[str, str] | None = None
) -> dict[str, str]:
    """A long page as several: docs/NAME.md, with a list of the others at the marker, and docs/NAME/PART.md for each.

    sentences: about each section, by its heading; without them, the list has only the names.
    """
    index, taken = split(text, {part: of.headings for part, of in parts.items()}, depth)
    pages, listing = {}, "\n"
    for part, of in parts.items():
        assert len(taken[part]) == len(of.headings), f"{name}/{part}: a heading that is not there"
        sections = re.sub(rf"(?m)^#{{{depth}}} ", "## ", "\n".join(f"{section.strip()}\n" for section in taken[part]))
        about = f"{of.about} This page is a part of [{name}](../{name}.md).\n"
        pages[f"docs/{name}/{part}.md"] = wrapped(f"# {of.title}\n\n{about}\n{below(sections)}")
        link = f"[{of.title.split(': ')[1].capitalize()}]({name}/{part}.md)"
        if sentences is None:
            listing += f"- {link}: {', '.join(_name(heading) for heading in of.headings)}\n"
        else:
            listing += f"- {link}\n"
            listing += "".join(f"  - {_name(heading)}: {sentences[heading]}\n" for heading in of.headings)
    assert index.count(marker) == 1, f"{name}: {marker}"
    return {f"docs/{name}.md": wrapped(index.replace(marker, f"{marker}{listing}")), **pages}


def _name(heading: str) -> str:
    """What a heading is about: a section of the settings or a command, as literal text, or something in words."""
    name = heading.lstrip("# ").removeprefix("hyper2kvmctl ")
    return name if name[0].isupper() else f"`{name}`"


def see_also(*pages: str) -> str:
    """The section on other pages; each is the name of a manual page."""
    return f"## See also\n\n{', '.join(f'[{page}]({PAGE_OF[page]})' for page in pages)}\n"


PAGE_OF = {
    "hyper2kvmd(8)": "hyper2kvmd.md",
    "hyper2kvmctl(1)": "hyper2kvmctl.md",
    "hyper2kvmd.yaml(5)": "settings.md",
    "migration-report(5)": "report-format.md",
}


# Settings -----------------------------------------------------------------------------------------------------


def sections() -> Iterator[tuple[tuple[str, ...], type[Section]]]:
    """Every section of the settings with its path, from the top, in order."""

    def below(path: tuple[str, ...], model: type[Section]) -> Iterator[tuple[tuple[str, ...], type[Section]]]:
        yield path, model
        for name, inner in _keys(model):
            if _is_section(inner):
                yield from below((*path, name), inner)

    return below((), Settings)


def _keys(model: type[BaseModel]) -> list[tuple[str, Any]]:
    return [(field.alias or name, field.annotation) for name, field in model.model_fields.items()]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def shipped_settings() -> str:
    """etc/hyper2kvmd.yaml: every key at its default, with what it does above it."""
    header = (
        f"{DEFAULT_PATH}: the settings of hyper2kvmd, each at its default; the manual page is hyper2kvmd.yaml(5)."
        " A missing key has its default, so this file needs only what you change.",
        "Files named *.yaml in conf.d beside it override it, key by key.",
        "After an edit, check the file with `hyper2kvmd check-config`, then load it with `systemctl reload hyper2kvmd`."
        " It applies to new jobs.",
        "A command takes any setting as an option: --set workers=4, --set libvirt.import=false",
    )
    text = "".join(_comment(line, "") for line in header)
    return text + _yaml(Settings, Settings().model_dump(mode="json", by_alias=True), "")


def _yaml(model: type[BaseModel], values: dict[str, Any], indent: str) -> str:
    text = ""
    for (name, annotation), field in zip(_keys(model), model.model_fields.values(), strict=True):
        text += "" if indent else "\n"
        if _is_section(annotation):
            text += f"{_comment(_about(annotation), indent)}{indent}{name}:\n"
            text += _yaml(annotation, values[name], f"{indent}  ")
        else:
            text += _comment(field.description or "", indent)
            text += "".join(f"{indent}# For example: {_flow(example)}\n" for example in field.examples or ())
            text += f"{indent}{name}: {_flow(values[name])}\n"
    return text


def _comment(text: str, indent: str) -> str:
    mark = f"{indent}# "
    return textwrap.fill(text, WIDTH, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False) + "\n"


def _flow(value: object) -> str:
    """A value as YAML on one line."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as people write it
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).removesuffix("...\n").strip()


def _about(thing: object) -> str:
    """A docstring as one paragraph."""
    return " ".join((inspect.getdoc(thing) or "").split())


def settings_page() -> str:
    """hyper2kvmd.yaml(5), and docs/settings.md with the pages below it."""
    schema = Settings.model_json_schema()
    values = Settings().model_dump(mode="json", by_alias=True)
    text = f"""\
# hyper2kvmd.yaml - the settings of hyper2kvmd

## Description

The settings are in a YAML file, `{DEFAULT_PATH}`, or in the one that `--config FILE` names. A missing key has its
default, and you can do without the file. An unknown key is an error.

Files named `*.yaml` in `conf.d` beside it (drop-ins) are read after it, in the order of their names. A later file
overrides an earlier one, key by key. So you can keep the shipped file unchanged, and use one drop-in for each thing
that is special on a host. A file is refused if other users can write to it, or if it belongs to another user than root
or the service's.

`hyper2kvmd check-config` checks the file and prints all settings, with the defaults. It reports each error with its
line. `systemctl reload hyper2kvmd` loads the file: new jobs use the new settings, running jobs keep theirs. If the new
file is wrong, the reload fails, and the daemon keeps the old settings.

`--set KEY=VALUE` changes one setting for one command, and overrides the file: `--set libvirt.import=false`. The value
is YAML, so a list is `--set 'output.allowed_dirs=[/srv/fast]'`. You can use it several times.

Below, a dot stands between a section and its key: `libvirt.pool` is the key `pool` in the section `libvirt`.

## Example

    workers: 4
    output_dir: /srv/images
    libvirt:
      network_map:
        VM Network: bridge:br0
        DMZ: ovs:br1@20
    validate:
      test_boot: true
"""
    for path, model in sections():
        name = ".".join(path)
        text += f"\n## {name or 'Top level'}\n\n" + (f"{_about(model)}\n\n" if path else "")
        table, inner = _resolve(schema, path), values
        for part in path:
            inner = inner[part]
        for (key, annotation), field in zip(_keys(model), model.model_fields.values(), strict=True):
            if not _is_section(annotation):
                kind = value_kind(table["properties"][key])
                note = f"{kind}; default: `{_flow(inner[key])}`"
                examples = "".join(f" For example: `{_flow(example)}`" for example in field.examples or ())
                text += item(".".join((*path, key)), f"{field.description}{examples}", note)
        if not path:
            text += "\nThe keys of `pipeline` are those of the manifest: `hyper2kvmctl manifest schema` prints them.\n"
    return text + "\n" + see_also("hyper2kvmd(8)", "hyper2kvmctl(1)")


def settings_pages() -> dict[str, str]:
    """docs/settings.md and the pages below it."""
    return divided("settings", settings_page(), SETTINGS_PARTS, 2, "in the section `libvirt`.\n")


def _resolve(schema: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The table at a path of a JSON Schema."""
    table = schema
    for part in path:
        table = schema["$defs"][_reference(table["properties"][part])]
    return table


def _reference(schema: dict[str, Any]) -> str:
    """The name of the definition that a property refers to, directly or as its items; "" if it does not."""
    for inner in (schema, schema.get("items", {}), *schema.get("anyOf", ()), *schema.get("allOf", ())):
        if "$ref" in inner:
            return str(inner["$ref"].removeprefix("#/$defs/"))
    return ""


def value_kind(schema: dict[str, Any]) -> str:
    """What a value of a JSON Schema is, in words."""
    kinds = [kind for choice in schema.get("anyOf", [schema]) for kind in _kinds(choice)]
    return " or ".join(part for part in (", ".join(kinds[:-1]), kinds[-1]) if part)


def _kinds(schema: dict[str, Any]) -> list[str]:
    if "enum" in schema:
        return [f"`{choice}`" for choice in schema["enum"]]
    if schema.get("type") == "boolean":
        return ["`true`", "`false`"]
    return [_kind(schema)]


def _kind(schema: dict[str, Any]) -> str:
    if "const" in schema:
        return f"always `{schema['const']}`"
    if "$ref" in schema or "allOf" in schema:
        return "table"
    kind = schema["type"]
    if kind == "array":
        return f"list of {_several(value_kind(schema['items']))}"
    if kind == "object":
        values = schema.get("additionalProperties", {})
        return f"table of {_several(value_kind(values))}" if isinstance(values, dict) and "type" in values else "table"
    if kind in ("integer", "number"):
        low, high = schema.get("minimum"), schema.get("maximum")
        word = "whole number" if kind == "integer" else "number"
        if low is None:
            return word
        return f"{word}, {low:g} {'or more' if high is None else f'to {high:g}'}"
    if schema.get("format") == "path":
        return "path"
    return {"string": "text", "null": "`null`"}[kind]


def _several(kind: str) -> str:
    return f"{kind}s" if kind in ("path", "table") else kind


# The report ---------------------------------------------------------------------------------------------------


def report_page() -> str:
    """docs/report-format.md."""
    schema = report_schema()
    text = f"""\
# migration-report - what a migration did and how it ended

## Description

A finished job leaves its report beside the manifest, as `{REPORT}`. While the report exists, the daemon
does not start the job again, unless the status is `retrying`. `hyper2kvmctl show` prints the report for people.
`hyper2kvmctl retry` renames it, and starts the job again.

The report is one JSON object in UTF-8. It is written completely or not at all, and always has all fields. Its schema is
[migration-report.schema.json](migration-report.schema.json). If the settings name a key, `{REPORT}.sig`
is its [signature](evidence.md).

## Status

- **`succeeded`**: The VM was migrated.
"""
    text += "".join(item(outcome, meaning) for outcome, meaning in OUTCOMES.items())
    text += f"\n## Fields\n\n{' '.join(schema['description'].split())}\n\n{_fields(schema)}"
    # By definition, the places where it stands: a person looks for the place.
    places: dict[str, list[str]] = {}
    waiting = [("", schema)]
    while waiting:
        path, table = waiting.pop(0)
        for name, field in table["properties"].items():
            if definition := _reference(field):
                place = f"{path}{name}{'[]' if 'items' in field else ''}"
                places.setdefault(definition, []).append(place)
                waiting.append((f"{place}.", schema["$defs"][definition]))
    for definition, names in places.items():
        table = schema["$defs"][definition]
        text += f"\n### {', '.join(f'`{name}`' for name in names)}\n\n{' '.join(table['description'].split())}\n\n"
        text += _fields(table)
    cutover = CutoverReport.model_json_schema()
    text += f"""
## The cutover report

`hyper2kvmctl cutover` writes `{CUTOVER}` beside the report. It is JSON in UTF-8, too, and written completely or not at
all. While the VM starts, the status is `running` and there is no end.

{_fields(cutover, "above").replace("`steps[]` above", "`steps[]` below")}
### `steps[]`

{" ".join(cutover["$defs"]["StepRecord"]["description"].split())}

{_fields(cutover["$defs"]["StepRecord"])}"""
    return text + "\n" + see_also("hyper2kvmctl(1)", "hyper2kvmd(8)")


def _fields(table: dict[str, Any], there: str = "below") -> str:
    text = ""
    for name, field in table["properties"].items():
        definition = _reference(field)
        where = f"see `{name}{'[]' if 'items' in field else ''}` {there}" if definition else ""
        kind = value_kind(field)
        about = "; ".join(part for part in (field.get("description", ""), where) if part)
        text += item(name, about, kind) if about else f"- **`{name}`** ({kind})\n"
    return text


def errors_page() -> str:
    """docs/errors.md, and a section of migration-report(5)."""
    text = "# Error codes\n\nThe code of an error decides how its job ends.\n"
    for outcome, meaning in OUTCOMES.items():
        text += f"\n## {outcome}\n\n{meaning}\n\n"
        text += "".join(item(code, of.summary) for code, of in MEANING.items() if of.outcome == outcome)
    return text


def report_schema_file() -> str:
    """docs/migration-report.schema.json."""
    return json.dumps(report_schema(), indent=2) + "\n"


JOURNAL = """\
# The journal

The daemon and its jobs log to systemd's journal, with fields that you can search. Text from outside is in fields of its
own, so that it cannot pass for another record. The output of a failed tool is below the message, and in `H2K_TAIL`.

    journalctl -u hyper2kvmd -f                     follow the daemon
    journalctl H2K_VM=web01                         one VM
    journalctl -u hyper2kvmd -p err -x              errors, with the remedies
    journalctl H2K_ERROR=no_space                   one error code
    journalctl MESSAGE_ID={failed}
    hyper2kvmctl logs --journal web01               one export, with the daemon's messages
    hyper2kvmctl logs web01                         the log beside the export; works without systemd too

## Fields

| field | what |
|---|---|
| `H2K_JOB_ID` | the job: the same for every attempt at one manifest |
| `H2K_VM`, `H2K_EXPORT` | the VM's name; the directory of its export |
| `H2K_ATTEMPT` | counted from 1 |
| `H2K_STAGE`, `H2K_STATUS`, `H2K_SECONDS` | a stage, how it ended, how long it took |
| `H2K_ERROR`, `H2K_HINT`, `H2K_TAIL` | the [code](errors.md) of an error, what to do, the end of a tool's output |
| `H2K_WARNING` | the code of a warning |
| `H2K_OUTCOME` | how a job ended that did not succeed |
| `H2K_KIND`, `MESSAGE_ID` | the kind of the record, as below |

## Kinds

Each kind has a `MESSAGE_ID`, and a text that `journalctl -x` shows.

"""


def journal_page() -> str:
    """docs/journal.md."""
    rows = (item(kind, f"{e.subject}. {e.text}", f"`{e.id}`") for kind, e in messages.CATALOG.items())
    return JOURNAL.format(failed=messages.CATALOG[messages.Kind.FAILED].id) + "".join(rows)


METRICS = """\
# Metrics

The daemon shows these metrics on 127.0.0.1:9878 (`metrics.listen` in the [settings](settings/monitoring.md)).
[Monitoring](monitoring.md) says how to collect them.

"""


def metrics_page() -> str:
    """docs/metrics.md."""
    rows = []
    for family in sorted(Metrics().registry.collect(), key=lambda family: family.name):
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        rows.append(item(f"{family.name}{suffix}", family.documentation, family.type))
    return METRICS + "".join(rows)


# The programs -------------------------------------------------------------------------------------------------


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """Every command of a program, and of its groups of commands, with its help text."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                inner = action.choices[choice.dest]
                if any(isinstance(deeper, argparse._SubParsersAction) for deeper in inner._actions):
                    yield from commands(inner)
                else:
                    yield inner, choice.help or ""


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a command, without --help."""
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def _usage(parser: argparse.ArgumentParser, shared: set[str]) -> str:
    words = [parser.prog]
    for action in options(parser):
        if not action.option_strings:
            words.append(_argument(action))
        elif action.option_strings[-1] not in shared:
            names = action.option_strings if action.nargs == 0 else action.option_strings[:1]
            words.append(f"[{' | '.join(_option(action, name) for name in names)}]")
    lines = textwrap.wrap(
        " ".join(word.replace(" ", "\0") for word in words),
        76,
        initial_indent="    ",
        subsequent_indent=" " * (5 + len(parser.prog)),
        break_on_hyphens=False,
    )
    return "\n".join(lines).replace("\0", " ") + "\n"


def _option(action: argparse.Action, name: str) -> str:
    return name if action.nargs == 0 else f"{name} {_argument(action)}"


def _argument(action: argparse.Action) -> str:
    name = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    return {"+": f"{name}...", "*": f"[{name}...]", "?": f"[{name}]"}.get(str(action.nargs), str(name))


def _program(parser: argparse.ArgumentParser, description: str) -> str:
    """The part of a program's page that its parser knows."""
    every = list(commands(parser))
    shared = set.intersection(
        *({name for action in options(command) for name in action.option_strings} for command, _ in every)
    )
    about = parser.description or ""
    text = f"# {parser.prog} - {about[0].lower()}{about[1:].rstrip('.')}\n\n## Synopsis\n\n"
    text += f"    {parser.prog} COMMAND [OPTION...] [ARGUMENT...]\n    {parser.prog} --version\n\n"
    text += f"## Description\n\n{description}\n## Commands\n"
    for command, help in every:
        text += f"\n### {command.prog}\n\n{_usage(command, shared)}\n{help[0].upper()}{help[1:]}.\n"
        own = [action for action in options(command) if action.help and not shared & {*action.option_strings}]
        text += "\n" * bool(own) + "".join(map(_option_item, own))
    text += "\n## Options of every command\n\n"
    text += "".join(_option_item(action) for action in options(every[0][0]) if shared & {*action.option_strings})
    return text + item("-h, --help", "say what the command takes") + "\n" + exit_statuses()


def _option_item(action: argparse.Action) -> str:
    names = [_option(action, name) for name in action.option_strings] or [_argument(action)]
    return item(", ".join(names), (action.help or "").replace("%%", "%"))


def ctl_page() -> str:
    """hyper2kvmctl(1), and docs/hyper2kvmctl.md with the pages below it."""
    text = _program(
        ctl.build_parser(),
        """\
hyper2kvmctl works on the directory of the exports. It needs no daemon, but works beside one too: each job locks its
export, so no VM is migrated twice.

An *EXPORT* is the directory of an export, its name in `exports_dir` (a setting), or the name of its VM.
""",
    )
    return f"""\
{text}
After Ctrl-C, the exit status is 130. If signal *N* killed the migration, it is 128 + *N*.

{plan_file()}
{files()}
## Examples

List the exports, and show one of them:

    hyper2kvmctl list
    hyper2kvmctl show web01

Show every change that a migration would make in a guest:

    hyper2kvmctl migrate --dry-run /var/lib/hypersdk/exports/web01

Migrate by hand, without a domain:

    hyper2kvmctl migrate --no-import --output-dir /srv/images /mnt/usb/web01/manifest.json

{see_also("hyper2kvmd(8)", "hyper2kvmd.yaml(5)", "migration-report(5)")}"""


def ctl_pages() -> dict[str, str]:
    """docs/hyper2kvmctl.md and the pages below it."""
    sentences = {f"### {command.prog}": help for command, help in commands(ctl.build_parser())}
    sentences["## The plan of a batch"] = "the keys of a plan"
    return divided("hyper2kvmctl", ctl_page(), CTL_PARTS, 3, "## Commands\n", sentences)


def plan_file() -> str:
    """The section on the file that --plan names."""
    wishes = VmPlan.model_json_schema()
    rows = (item(f"vms.NAME.{name}", key["description"], value_kind(key)) for name, key in wishes["properties"].items())
    return f"""\
## The plan of a batch

The file of `hyper2kvmctl batch --plan` is YAML. It has one key, `vms`. Below it stands each export, by the *NAME* of
its directory, with the keys of a plan. An export that is missing there has its plan in `plan_dir`.

    vms:
      db01: {{priority: 10, network_map: {{"VM Network": bridge:br1}}}}
      test07: {{hold: true}}

{"".join(rows)}"""


def daemon_page() -> str:
    """hyper2kvmd(8), and docs/hyper2kvmd.md."""
    text = _program(
        daemon.build_parser(),
        """\
hyper2kvmd watches the directory of the exports (`exports_dir`, a setting). It migrates each export in a process of its
own, a few at the same time. The job checks the export, fixes the guest on an overlay, converts and checks the disks,
and defines a domain in libvirt. The report beside the manifest says how the job ended.

`systemctl start hyper2kvmd` starts `hyper2kvmd run`, which starts a `hyper2kvmd run-job` for each export. To migrate by
hand, use `hyper2kvmctl migrate`.
""",
    )
    return f"""\
{text}
After 78, systemd does not restart the daemon: fix the settings first.

## Signals

{item("SIGTERM", "Stops the running jobs, then ends. The next start resumes each job after its last finished step.")}\
{item("SIGINT", "The same.")}\
{item("SIGQUIT", "Starts no more jobs, and ends with 75 after the running ones; systemd restarts it.")}\
{item("SIGHUP", "Reads the settings again, for new jobs. Logs wrong settings, and keeps the old ones.")}\

## Environment

Jobs, and the programs that they run, get only these variables: those below, `PATH`, `HOME`, `TMPDIR`,
`XDG_RUNTIME_DIR`, `XDG_CONFIG_HOME`, `XDG_CACHE_HOME`, and all that begin with `LIBGUESTFS_`.

{item("LIBGUESTFS_CACHEDIR", "Where libguestfs keeps its appliance. The unit sets /var/cache/hyper2kvmd.")}\
{item("LIBGUESTFS_BACKEND", "How libguestfs starts its appliance. The unit sets `direct`: without libvirt.")}\
{item("CREDENTIALS_DIRECTORY", "Set by systemd. The directory of the credentials (LoadCredential=).")}\
{item("JOURNAL_STREAM", "Set by systemd. With it, log records have fields in the journal, such as `H2K_VM`.")}\

systemd also sets `NOTIFY_SOCKET` and `WATCHDOG_USEC`, for `hyper2kvmd run` alone: it reports its start, every scan,
and the number of jobs to systemd.

{files()}
{see_also("hyper2kvmctl(1)", "hyper2kvmd.yaml(5)", "migration-report(5)")}"""


# The library --------------------------------------------------------------------------------------------------


def public() -> Iterator[tuple[str, Any]]:
    """Every name of the library page with its object: classes, their methods as `Class.method`, and functions."""
    for names in LIBRARY.values():
        for name in names:
            thing = getattr(api, name)
            yield name, thing
            for method in _methods(thing) if isinstance(thing, type) else ():
                yield f"{name}.{method}", inspect.getattr_static(thing, method)


def _methods(cls: type) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node.name for node in _parsed(cls)[1].body if isinstance(node, kinds) and not node.name.startswith("_")]


def _parsed(thing: Any) -> tuple[str, Any]:
    source = textwrap.dedent(inspect.getsource(thing))
    return source, ast.parse(source).body[0]


def _stub(thing: Any) -> str:
    """A class or function as it is written, without what it does: its header, its fields, its methods' headers."""
    source, node = _parsed(thing)
    lines = source.splitlines()

    def header(function: ast.FunctionDef) -> str:
        first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)]) - 1
        return "\n".join(lines[first : function.body[0].lineno - 1]) + " ..."

    if isinstance(node, ast.FunctionDef):
        return header(node)
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    fields = [
        f"    {inner.target.id}: {ast.get_source_segment(source, inner.annotation)}"
        for inner in node.body
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name)
    ]
    methods = [
        header(inner)
        for inner in node.body
        if isinstance(inner, ast.FunctionDef) and (inner.name == "__init__" or not inner.name.startswith("_"))
    ]
    body = "\n\n".join(part for part in ("\n".join(fields), "\n".join(methods)) if part)
    name = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    return f"{name}\n{body}" if body else f"{name} ..."


def library_page() -> str:
    """docs/library.md with the pages below it."""
    text = f"""\
# The library

A Python program can migrate an export. It imports all that it needs from `hyper2kvmd.api`. Each migration runs in a
process of its own, with the same lock, checks and report as a job of the daemon. This example writes the manifest of a
disk, and migrates the disk without looking into its guest:

```python
{EXAMPLE}```

It prints:

```
{EXAMPLE_PRINTS}```

A failure raises `MigrationError`, with a code of [a closed list](errors.md), what it is about, and the remedy.
"""
    for subject, names in LIBRARY.items():
        text += f"\n## {subject}\n"
        for name in names:
            thing = getattr(api, name)
            text += f"\n### {name}\n\n```python\n{_stub(thing)}\n```\n\n{inspect.getdoc(thing)}\n"
            if isinstance(thing, type) and (methods := _methods(thing)):
                rows = [(method, _about(inspect.getattr_static(thing, method))) for method in methods]
                text += "\n" + "".join(item(method, about) for method, about in rows)
    return text


def library_pages() -> dict[str, str]:
    """docs/library.md and the pages below it."""
    return divided("library", library_page(), LIBRARY_PARTS, 2, "and the remedy.\n")


# Units --------------------------------------------------------------------------------------------------------


def template_unit() -> str:
    """systemd/hyper2kvmd@.service: the unit, with everything that two daemons cannot share in a place of its own."""
    unit = (ROOT / "systemd/hyper2kvmd.service").read_text()
    for line, instance in (
        ("Description=Migrates exported virtual machines to KVM", "\\g<0> (%i)"),
        ("RequiresMountsFor=.*", "RequiresMountsFor=/var/lib/libvirt/images"),
        ("/usr/bin/hyper2kvmd (run|check-config)", f"\\g<0> --config {DEFAULT_PATH.parent}/%i/{DEFAULT_PATH.name}"),
        ("StateDirectory=hyper2kvmd", "\\g<0>/instances/%i"),
        ("ConfigurationDirectory=hyper2kvmd", "\\g<0>/%i"),
        ("ReadWritePaths=/var/lib/hypersdk/exports .*", "ReadWritePaths=/var/lib/libvirt/images"),
        ("Alias=hyper2kvm", "\\g<0>@%i"),
        ("# Others by a drop-in", "# The exports, and others, by a drop-in"),
    ):
        unit, count = re.subn(f"(?m){line}", instance, unit)
        assert count, line
    note = "# One of several daemons on this host, each with its own settings, exports directory and work_dir.\n"
    return note + "# Made from hyper2kvmd.service; docs/install.md has how to set one up.\n" + unit


# Writing it all -----------------------------------------------------------------------------------------------


def several(make: Callable[[], dict[str, str]]) -> dict[str, Callable[[], str]]:
    """Files that are made together, by path."""
    return {name: partial(lambda name: make()[name], name) for name in make()}


def broken(make: Callable[[], str]) -> Callable[[], str]:
    """A page whose long lines are broken."""
    return lambda: wrapped(make())


def completion_scripts() -> dict[str, str]:
    """packaging/completions/, by path."""
    made = {**completions.scripts(daemon.build_parser()), **completions.scripts(ctl.build_parser())}
    return {f"packaging/completions/{name}": text for name, text in made.items()}


PAGES = {
    "etc/hyper2kvmd.yaml": shipped_settings,
    **several(settings_pages),
    **several(ctl_pages),
    "docs/hyper2kvmd.md": broken(daemon_page),
    "docs/report-format.md": broken(report_page),
    "docs/errors.md": broken(errors_page),
    "docs/metrics.md": broken(metrics_page),
    "docs/journal.md": broken(journal_page),
    "packaging/hyper2kvmd.catalog": messages.catalog,
    "systemd/hyper2kvmd@.service": template_unit,
    **several(library_pages),
    "docs/migration-report.schema.json": report_schema_file,
    "packaging/grafana/dashboards/hyper2kvmd-fleet.json": dashboards.fleet_page,
    "packaging/grafana/dashboards/hyper2kvmd-host.json": dashboards.host_page,
    **several(completion_scripts),
}


def man_sources() -> dict[str, str]:
    """Every manual page as lowdown(1) takes it, by its file name."""
    codes = errors_page().replace("\n## ", "\n### ").replace("# Error codes", "## Error codes", 1)
    body, also = report_page().split("## See also", 1)
    return {
        "hyper2kvmd.8": _man_source("hyper2kvmd(8)", daemon_page()),
        "hyper2kvmctl.1": _man_source("hyper2kvmctl(1)", ctl_page()),
        "hyper2kvmd.yaml.5": _man_source("hyper2kvmd.yaml(5)", settings_page()),
        "migration-report.5": _man_source("migration-report(5)", f"{body}{codes}\n## See also{also}"),
    }


def _man_source(page: str, text: str) -> str:
    name, section = page.removesuffix(")").split("(")
    text = re.sub(r"^# (.*)", r"## Name\n\n\1", text, count=1)
    text = re.sub(r"^## (.*)", lambda found: f"# {found[1].upper()}", text, flags=re.MULTILINE)
    text = re.sub(r"^### ", "## ", text, flags=re.MULTILINE)
    # The definitions, which GitHub does not know, and lowdown does.
    text = re.sub(r"^- (\*\*.+?\*\*(?: \(.*?\))?)(?:: (.*))?$", r"\1\n\n:   \2\n", text, flags=re.MULTILINE)
    # Literal text is bold in a manual page.
    text = re.sub(r"(?:\*\*)?`([^`]+)`(?:\*\*)?", lambda found: f"**{_escaped(found[1])}**", text)
    head = f"title: {name}\nsection: {section}\ndate: {DATE}\nsource: hyper2kvmd {__version__}\n"
    return f"{head}volume: hyper2kvmd manual\n\n{text}"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)


def write_man(directory: Path) -> None:
    """Write the manual pages; lowdown must be installed."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, source in man_sources().items():
        command = ["lowdown", "-s", "-Tman", "--nroff-no-groff", "--nroff-nolinks", "--out-no-smarty"]
        made = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
        (directory / name).write_text(_tidied(made))


def _tidied(page: str) -> str:
    """What lowdown writes, as man(7) would have it, and the same whichever version wrote it."""
    # So writes version 2.
    page = re.sub(r"^(\.S[HS]) (.*)", r"\1\n\2", page, flags=re.MULTILINE)
    page = re.sub(r"^\.TP \d+$", ".TP", page, flags=re.MULTILINE)
    # So writes version 1.
    dance = r"\.if n \\\n\.sp -1v\n\.if t \\\n\.sp -0\.25v\n"
    page = re.sub(rf'^\.LP\n(.*)\n{dance}\.IP "" 5n\n', r".TP\n\1\n", page, flags=re.MULTILINE)
    page = re.sub(r"^(\.S[HS]\n.*\n)\.LP\n", r"\1", page, flags=re.MULTILINE)
    # Names are to be copied: no hyphenation, and no hyphen that is shown as another character.
    page = re.sub(r"^(\.TH .*\n)", r"\1.nh\n.ad l\n", page, flags=re.MULTILINE)
    return re.sub(r"^(?!\.).*", lambda line: line[0].replace("-", r"\-"), page, flags=re.MULTILINE)


def main() -> None:
    """Write the pages, or with --man the manual pages."""
    parser = argparse.ArgumentParser(prog="python -m tests.reference", description=__doc__)
    parser.add_argument("--man", type=Path, metavar="DIRECTORY", help="write the manual pages there")
    directory = parser.parse_args().man
    if directory is None:
        for name, page in PAGES.items():
            (ROOT / name).parent.mkdir(exist_ok=True)
            (ROOT / name).write_text(page())
        return
    try:
        write_man(directory)
    except FileNotFoundError as error:
        sys.exit(f"{error.filename}: no such program; `make deps` installs it")


if __name__ == "__main__":
    main()
