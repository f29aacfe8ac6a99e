"""Spreadsheets as CSV: the plans of many VMs read from one, and tables written for one."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError

from hyper2kvmd.errors import Finding
from hyper2kvmd.queue.export import is_export_name
from hyper2kvmd.queue.plans import mistake
from hyper2kvmd.settings.plan import VmPlan
from hyper2kvmd.text import nearest

VM = "vm"  # the column with the name of the export's directory
COLUMNS = (VM, *VmPlan.model_fields)
REPORTED = ("state", "reason", "estimated", "seconds")  # what `plan export` adds, and `plan import` passes over
CSV_LIMIT = 16 << 20
_FLAGS = ("hold", "start", "test_boot", "compress")
_WORDS = {"yes": True, "true": True, "no": False, "false": False}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets compute


def as_csv(rows: Iterable[Sequence[str]]) -> str:
    """Rows as RFC 4180 has them; no cell is taken for a formula, whatever an exporter called a VM."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text.lstrip("'").startswith(_FORMULA) and text != "-" else text


def shown(value: Any) -> str:
    """A value of a plan as `read_csv` reads it."""
    if isinstance(value, dict):
        return "; ".join(f"{name}={to}" for name, to in value.items())
    if isinstance(value, list):
        return "; ".join("-" if part is None else str(part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def read_csv(data: bytes, source: str) -> tuple[dict[str, VmPlan], list[Finding]]:
    """The plans in a spreadsheet, by the names of the exports' directories, and all that is wrong with it.

    Its columns are separated by commas, semicolons or tabs; empty cells plan nothing.
    """
    if len(data) > CSV_LIMIT:
        return {}, [_at(source, 1, "it is larger than 16 MiB")]
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        return {}, [_at(source, line, "it is not in UTF-8; save it as CSV UTF-8")]
    first = text.partition("\n")[0]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
    try:
        heading = [cell.strip().lower() for cell in next(rows, [])]
        problems = _check_heading(heading, source)
        if problems:
            return {}, problems
        plans: dict[str, VmPlan] = {}
        for row in rows:
            if any(cell.strip() for cell in row):
                name, plan, wrong = _read_row(heading, row, f"{source}:{rows.line_num}")
                if name in plans:
                    wrong.append(_at(source, rows.line_num, f"{name} has two rows; delete one of them"))
                problems += wrong
                plans[name] = plan
    except csv.Error as error:
        return {}, [_at(source, rows.line_num, f"it is not valid CSV: {error}")]
    return plans, problems


def _check_heading(heading: Sequence[str], source: str) -> list[Finding]:
    found = []
    if VM not in heading:
        found.append(_at(source, 1, f"there is no column {VM}; the first row names the columns: {', '.join(COLUMNS)}"))
    for name in dict.fromkeys(heading):
        if name and name not in (*COLUMNS, *REPORTED):
            close = nearest(name, COLUMNS)
            remedy = f"did you mean {close}?" if close else "known are " + ", ".join(COLUMNS)
            found.append(_at(source, 1, f"no column is called {name}; {remedy}"))
        if name and heading.count(name) > 1:
            found.append(_at(source, 1, f"two columns are called {name}; delete one of them"))
    return found


def _read_row(heading: Sequence[str], row: Sequence[str], where: str) -> tuple[str, VmPlan, list[Finding]]:
    """The name and the plan of a row, and what is wrong with it."""
    cells = {name: _plain(cell) for name, cell in zip(heading, row, strict=False) if cell.strip()}
    name = cells.pop(VM, "")
    wrong = []
    if len(row) > len(heading):
        wrong.append(
            mistake(f"{where}: {len(row)} cells for {len(heading)} columns", "Quote cells that hold a separator.")
        )
    if not is_export_name(name):
        wrong.append(mistake(f"{where}: {VM}: {name!r} is not the name of an export's directory", "Write its name."))
    values: dict[str, Any] = {}
    for key, cell in cells.items():
        if key in VmPlan.model_fields:
            values[key] = _value(key, cell)
    try:
        return name, VmPlan.model_validate(values), wrong
    except ValidationError as error:
        for problem in error.errors():
            column = str(problem["loc"][0]) if problem["loc"] else "not_after"
            message = f"{where}: {column}: {problem['msg'].removeprefix('Value error, ')} (found {cells.get(column)!r})"
            wrong.append(mistake(message, "Correct the cell, and import the file again."))
        return name, VmPlan(), wrong


def _value(key: str, cell: str) -> Any:
    """A cell as the plan has it: lists are separated by semicolons, and a map has NAME=VALUE."""
    if key == "network_map":
        pairs = (part.rpartition("=") for part in cell.split(";") if part.strip())
        return {name.strip(): value.strip() for name, _, value in pairs}
    if key in ("networks", "features", "licenses", "addresses"):
        parts = [part.strip() for part in cell.split(";")]
        cards = [None if part in ("", "-") else part for part in parts]
        return cards if key == "networks" else [part for part in parts if part]
    return _WORDS.get(cell.lower(), cell) if key in _FLAGS else cell


def _plain(cell: str) -> str:
    """A cell without the apostrophe by which `as_csv` keeps spreadsheets from computing it."""
    cell = cell.strip()
    return cell[1:].strip() if cell[:1] == "'" and cell.lstrip("'").startswith(_FORMULA) else cell


def _at(source: str, line: int, what: str) -> Finding:
    return mistake(f"{source}:{line}: {what}", "Correct it, and import the file again; nothing was written.")
