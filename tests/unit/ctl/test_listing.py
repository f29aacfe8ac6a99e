"""Which export a person means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hyper2kvmd.ctl.listing import find
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.settings.model import Settings
from tests import ROOT


@pytest.fixture
def here(scratch: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with directories of the names of an export, of a VM, and of nothing else."""
    (scratch.exports_dir / "export-7").mkdir()
    (scratch.exports_dir / "export-7/migration-report.json").write_text(json.dumps({"vm_name": "web01"}))
    here = tmp_path / "here"
    for name in ("export-7", "web01", "other"):
        (here / name).mkdir(parents=True)
    monkeypatch.chdir(here)
    return here


@pytest.mark.parametrize("name", ["export-7", "web01"])
def test_an_export_and_a_vm_go_before_a_directory_of_that_name_here(scratch: Settings, here: Path, name: str) -> None:
    assert scratch.exports_dir / "export-7" == find(name, scratch)
    assert here / name == find(f"./{name}", scratch)


def test_a_vm_that_two_exports_claim_is_nobodys(scratch: Settings, here: Path) -> None:
    (scratch.exports_dir / "evil").mkdir()
    (scratch.exports_dir / "evil/migration-report.json").write_text(json.dumps({"vm_name": "web01"}))
    with pytest.raises(MigrationError, match="2 exports are of the VM web01: evil, export-7") as refused:
        find("web01", scratch)
    assert Code.BUSY == refused.value.code
    assert scratch.exports_dir / "evil" == find("evil", scratch)


def test_a_directory_is_meant_where_no_export_has_its_name(scratch: Settings, here: Path) -> None:
    assert (here / "other", None) == (find("other", scratch), find("nothing", scratch))


def test_every_command_that_takes_an_export_finds_it_this_way() -> None:
    """Those that take a path say so: migrate, validate, batch, manifest."""
    commands = ROOT / "hyper2kvmd/ctl"
    source = {str(path.relative_to(commands)): path.read_text() for path in commands.rglob("*.py")}
    taking = {name for name, text in source.items() if "or its name" in text or "its name, or the VM" in text}
    assert {"bundle.py", "control.py", "cutover/__init__.py", "listing.py", "logs.py", "report.py"} == taking
    assert [] == [name for name in taking if "find(" not in source[name]]
