"""What is shipped says what the code says."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from hyper2kvmd import report
from hyper2kvmd.errors import MEANING, Code
from hyper2kvmd.metrics import Metrics
from tests.guests.recipe import GUESTS

ROOT = Path(__file__).parents[2]


def test_the_published_schema_is_that_of_the_code(request: pytest.FixtureRequest) -> None:
    path = ROOT / "docs/migration-report.schema.json"
    if request.config.getoption("--regenerate"):
        path.write_text(json.dumps(report.schema(), indent=2) + "\n")
    assert json.loads(path.read_text()) == report.schema()


def test_every_code_has_a_meaning_and_a_row_in_the_manual(request: pytest.FixtureRequest) -> None:
    assert set(Code) == set(MEANING)
    path = ROOT / "docs/errors.md"
    rows = [f"| `{code}` | {meaning.outcome} | {meaning.summary} |" for code, meaning in MEANING.items()]
    text = "\n".join(
        [
            "# Error codes",
            "",
            "`retrying`: tried again by itself. `blocked`: a person must change something. `rejected`: the export is"
            " not acceptable. `failed`: trying again would end the same way.",
            "",
            "| code | the job is then | meaning |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
    if request.config.getoption("--regenerate"):
        path.write_text(text)
    assert path.read_text() == text


def test_every_code_is_used_somewhere() -> None:
    source = "".join(path.read_text() for path in (ROOT / "hyper2kvmd").rglob("*.py") if path.name != "errors.py")
    assert [] == [code.name for code in Code if f"Code.{code.name}" not in source]


def test_every_metric_is_documented_and_there_from_the_start(request: pytest.FixtureRequest) -> None:
    families = sorted(Metrics().registry.collect(), key=lambda family: family.name)
    rows = []
    for family in families:
        suffix = "_total" if family.type == "counter" else "_info" if family.type == "info" else ""
        rows.append(f"| `{family.name}{suffix}` | {family.type} | {family.documentation} |")
        assert family.samples, f"{family.name} has no series before its first event"
    text = "\n".join(["# Metrics", "", "| name | type | what |", "|---|---|---|", *rows, ""])
    path = ROOT / "docs/metrics.md"
    if request.config.getoption("--regenerate"):
        path.write_text(text)
    assert path.read_text() == text


def test_the_unit_is_accepted_by_systemd(tmp_path: Path) -> None:
    unit = (ROOT / "systemd/hyper2kvmd.service").read_text()
    # The program is not installed here; everything else is checked as shipped.
    path = tmp_path / "hyper2kvmd.service"
    path.write_text(unit.replace("/usr/bin/hyper2kvmd", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if "hyper2kvmd.service" in line]
    assert (0, []) == (done.returncode, complaints)


def test_the_unit_is_well_confined(tmp_path: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=25", ROOT / "systemd/hyper2kvmd.service"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, done.stdout[-2000:]


def test_only_what_breaks_libguestfs_is_left_out_of_the_sandbox() -> None:
    unit = (ROOT / "systemd/hyper2kvmd.service").read_text()
    settings = re.sub(r"^#.*$", "", unit, flags=re.MULTILINE)
    assert "MemoryDenyWriteExecute" not in settings
    assert "ProtectKernelModules" not in settings
    assert "KillMode=mixed" in settings


def test_readme_shows_every_guest_of_the_matrix_as_it_is() -> None:
    readme = (ROOT / "README.md").read_text()
    for guest in GUESTS.values():
        cells = (guest.name, guest.firmware.upper(), guest.storage, guest.initramfs, guest.network)
        assert f"| {' | '.join(cells)} |" in readme
