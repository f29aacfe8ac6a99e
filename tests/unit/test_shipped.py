"""What is shipped says what the code says."""

from __future__ import annotations

import argparse
import inspect
import re
import subprocess
from pathlib import Path

import pytest

import hyper2kvmd
from hyper2kvmd import __main__ as daemon
from hyper2kvmd import api, ctl
from hyper2kvmd.daemon.metrics import Metrics
from hyper2kvmd.errors import MEANING, Code
from hyper2kvmd.queue.names import DRAIN, HOLD, LOCK, LOG, REPORT
from tests import ROOT, reference
from tests.guests.recipe import GUESTS


@pytest.mark.parametrize("name", reference.PAGES)
def test_the_generated_file_is_what_the_code_says_now(name: str, request: pytest.FixtureRequest) -> None:
    page = reference.PAGES[name]()
    if request.config.getoption("--regenerate"):
        (ROOT / name).write_text(page)
    assert (ROOT / name).read_text() == page


def test_every_code_has_a_meaning() -> None:
    assert set(Code) == set(MEANING)


def test_every_code_is_used_somewhere() -> None:
    source = "".join(
        path.read_text() for path in Path(hyper2kvmd.__file__).parent.rglob("*.py") if path.name != "errors.py"
    )
    assert [] == [code.name for code in Code if f"Code.{code.name}" not in source]


def test_every_metric_is_there_from_the_start_but_those_of_jobs_hosts_and_engines() -> None:
    families = [*Metrics().registry.collect()]
    assert families
    later = [family.name for family in families if not family.samples]
    of_others = [name for name in later if re.match("hyper2kvmd_(elsewhere|host|engine)_", name)]
    assert ["hyper2kvmd_job", *of_others] == later
    assert 8 == len(of_others)


def test_every_section_and_every_setting_is_described() -> None:
    sections = dict(reference.sections())
    assert {(), ("watch",), ("limits", "stage_seconds")} <= set(sections)
    assert [] == [path for path, model in sections.items() if not model.__dict__["__doc__"]]
    settings = [(*path, key) for path, model in sections.items() for key in model.model_fields]
    described = [
        (*path, key)
        for path, model in sections.items()
        for key, field in model.model_fields.items()
        if field.description or (*path, field.alias or key) in sections
    ]
    assert settings == described


@pytest.mark.parametrize("parser", [daemon.build_parser(), ctl.build_parser()], ids=lambda parser: parser.prog)
def test_every_command_and_every_option_has_a_help_text(parser: argparse.ArgumentParser) -> None:
    commands = [*reference.commands(parser)]
    assert len(commands) >= 3
    assert [] == [command.prog for command, help in commands if not help]
    options = [(command.prog, option) for command, _ in commands for option in reference.options(command)]
    assert [] == [(name, option.dest) for name, option in options if option.option_strings and not option.help]


def test_every_public_name_has_a_docstring() -> None:
    names = dict(reference.public())
    assert {"MigrationPipeline.run", "parse", "Stage.ratio"} <= set(names)
    # What dataclasses make up themselves begins with the name of the class.
    assert [] == [n for n, thing in names.items() if not thing.__doc__ or thing.__doc__.startswith(f"{n}(")]
    assert [] == [n for n, thing in names.items() if inspect.isclass(thing) and "__doc__" not in vars(thing)]


def test_the_table_of_files_names_each_that_is_put_into_an_export() -> None:
    section = reference.files()
    names = (LOCK, REPORT, LOG, HOLD, DRAIN)
    assert [] == [name for name in names if f"/{name}`" not in section]


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
        ["systemd-analyze", "security", "--offline=yes", "--threshold=20", ROOT / "systemd/hyper2kvmd.service"],
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


def test_the_documentation_shows_every_guest_of_the_matrix_as_it_is() -> None:
    readme, page = ((ROOT / name).read_text() for name in ("README.md", "docs/guests.md"))
    for guest in GUESTS.values():
        cells = (guest.name, guest.firmware.upper(), guest.storage, guest.initramfs)
        assert f"\n| {' | '.join(cells)} |" in readme
        assert f"\n- **{guest.name}** ({guest.network})." in page


def test_the_page_of_the_library_has_all_that_is_offered() -> None:
    assert sorted(api.__all__) == sorted(name for names in reference.LIBRARY.values() for name in names)


def test_the_map_of_the_source_names_what_is_there_and_all_of_it() -> None:
    page = (ROOT / "docs/source.md").read_text()
    named = set(re.findall(r"`((?:hyper2kvmd|tests|packaging|docs)/[^`]*)`", page))
    assert [] == [path for path in named if not (ROOT / path).exists()]
    package = ROOT / "hyper2kvmd"
    rooms = {f"hyper2kvmd/{path.name}{'/' * path.is_dir()}" for path in package.iterdir() if path.name[:2] != "__"}
    assert rooms <= named


def test_the_package_has_few_entries_beside_its_rooms() -> None:
    assert 14 >= len([path for path in (ROOT / "hyper2kvmd").iterdir() if path.is_file()])


def test_a_long_file_says_why_it_is_long() -> None:
    long = [path for path in (ROOT / "hyper2kvmd").rglob("*.py") if path.read_text().count("\n") > 500]
    assert [] == [path for path in long if "It is long because" not in path.read_text().split('"""')[1]]
