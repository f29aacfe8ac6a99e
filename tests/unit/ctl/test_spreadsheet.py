"""Spreadsheets: what is read from cells, every way to get one wrong, and that what is written can be read again."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper2kvmd.ctl.spreadsheet import COLUMNS, CSV_LIMIT, as_csv, read_csv, shown
from hyper2kvmd.settings.plan import VmPlan


def read(text: str) -> dict[str, VmPlan]:
    plans, problems = read_csv(text.encode(), "plan.csv")
    assert [] == problems
    return plans


def test_a_row_becomes_a_plan_and_empty_cells_plan_nothing() -> None:
    found = read(
        "vm,wave,networks,network_map,cpus,hold,start,notes,not_before\n"
        'web01,1,"bridge:br0; -; user","VM Network=bridge:br1; a=b=user",4,yes,No," first, then ",2026-12-05 20:00Z\n'
        "\n"
        "db01,,,,,,,,\n"
    )
    web01 = found["web01"]
    assert ("1", ("bridge:br0", None, "user"), 4, True, False) == (
        *(web01.wave, web01.networks, web01.cpus, web01.hold, web01.start),
    )
    assert {"VM Network": "bridge:br1", "a=b": "user"} == web01.network_map
    assert "first, then" == web01.notes
    assert VmPlan() == found["db01"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_spreadsheets_save_as_csv_is_read(separator: str, end: str) -> None:
    text = end.join(separator.join(row) for row in (("VM", " Wave ", "memory_mb"), ("web01", "1", "512"))) + end
    plans, problems = read_csv(b"\xef\xbb\xbf" + text.encode(), "plan.csv")
    assert ([], {"web01": VmPlan(wave="1", memory_mb=512)}) == (problems, plans)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "plan.csv:1: there is no column vm"),
        ("name,wave\nx,1\n", "plan.csv:1: there is no column vm"),
        ("vm,wav\nx,1\n", "plan.csv:1: no column is called wav; did you mean wave?"),
        ("vm,wave,wave\nx,1,2\n", "two columns are called wave"),
        ("vm,cpus\nweb01,many\n", "plan.csv:2: cpus: Input should be a valid integer"),
        ("vm,cpus\nweb01,0\n", "plan.csv:2: cpus: Input should be greater than or equal to 1"),
        ("vm,hold\nweb01,maybe\n", "plan.csv:2: hold: Input should be a valid boolean"),
        ("vm,networks\nweb01,bridge:\n", "plan.csv:2: networks: 'bridge:' is not the name of a network"),
        ("vm,not_before\nweb01,soon\n", "plan.csv:2: not_before: expected a time such as 2026-12-05 20:00"),
        ("vm,not_before,not_after\nweb01,2026-12-05,2026-12-04\n", "plan.csv:2: not_after: not_after must be later"),
        ("vm,wave\nweb01,1\nweb01,2\n", "plan.csv:3: web01 has two rows"),
        ("vm,wave\n../etc,1\n", "plan.csv:2: vm: '../etc' is not the name of an export's directory"),
        ("vm,wave\n,1\n", "plan.csv:2: vm: '' is not the name"),
        ("vm,wave\nweb01,1,2\n", "plan.csv:2: 3 cells for 2 columns"),
        ('vm,wave\n"web01,1\n', "it is not valid CSV"),
    ],
)
def test_every_mistake_names_its_line_and_its_column(text: str, expected: str) -> None:
    problems = read_csv(text.encode(), "plan.csv")[1]
    assert any(problem.message.startswith(expected) or expected in problem.message for problem in problems), problems
    assert all(problem.hint for problem in problems)


def test_all_mistakes_are_said_at_once() -> None:
    problems = read_csv(b"vm,cpus,memory_mb\na,x,y\nb,1,z\n", "plan.csv")[1]
    assert ["plan.csv:2: cpus", "plan.csv:2: memory_mb", "plan.csv:3: memory_mb"] == [
        ": ".join(problem.message.split(": ")[:2]) for problem in problems
    ]


def test_other_encodings_and_huge_files_are_refused() -> None:
    assert (
        "plan.csv:2: it is not in UTF-8"
        in read_csv("vm,notes\nweb01,für\n".encode("latin-1"), "plan.csv")[1][0].message
    )
    assert "larger than 16 MiB" in read_csv(b"x" * (CSV_LIMIT + 1), "plan.csv")[1][0].message


@pytest.mark.parametrize(
    "text", ["=cmd|'/c calc'!A0", "+1", "-1+1", "@SUM(A1)", "\t=1", "'=1", "plain", "'quoted", "-"]
)
def test_no_cell_is_a_formula_and_each_is_read_as_it_was(text: str) -> None:
    written = as_csv([("vm", "notes"), ("web01", text)])
    (_, (_, cell)) = csv.reader(io.StringIO(written, newline=""))
    assert "-" == cell or not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert VmPlan(notes=text.strip()) == read(written)["web01"]


_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20).map(str.strip)
_NETWORK = st.sampled_from(["default", "bridge:br0", "ovs:br1@20", "user", None])
_PLANS = st.fixed_dictionaries(
    {},
    optional={
        "wave": st.from_regex(r"[a-z0-9]{1,5}", fullmatch=True),
        "hold": st.booleans(),
        "priority": st.integers(-1000, 1000),
        "cpus": st.integers(1, 64),
        "networks": st.lists(_NETWORK, min_size=1, max_size=3),
        "mac": st.sampled_from(["keep", "new"]),
        "network_map": st.dictionaries(st.sampled_from(["VM Network", "a=b"]), st.just("user"), min_size=1),
        "not_before": st.datetimes().map(lambda time: time.isoformat() + "Z"),
        "notes": _TEXT.filter(bool),
        "start": st.booleans(),
    },
)


@given(_PLANS)
def test_every_plan_that_is_written_is_read_again(shape: dict[str, object]) -> None:
    plan = VmPlan.model_validate(shape)
    values = plan.model_dump(mode="json", exclude_unset=True)
    cells = [shown(values.get(key)) for key in VmPlan.model_fields]
    assert plan == read(as_csv([COLUMNS, ("web01", *cells)]))["web01"]
