"""The manual pages build and say all; the example of the library's page does what it says."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hyper2kvmd import __main__ as daemon
from hyper2kvmd import ctl
from hyper2kvmd.errors import Code
from hyper2kvmd.exits import EXIT_MEANING
from hyper2kvmd.settings.model import Settings
from tests import ROOT, reference

PAGE = (ROOT / "docs/library.md").read_text()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the manual pages, just made."""
    directory = tmp_path_factory.mktemp("man")
    reference.write_man(directory)
    return directory


def shown(page: Path) -> str:
    """A manual page as a person sees it, on lines so long that none is broken."""
    done = subprocess.run(
        ["mandoc", "-T", "utf8", "-O", "width=1000", page], capture_output=True, text=True, check=True
    )
    return re.sub(".\b", "", done.stdout)  # bold is a letter, a backspace, the letter


def test_mandoc_has_nothing_to_say_of_the_manual_pages(pages: Path) -> None:
    made = sorted(path.name for path in pages.iterdir())
    assert ["hyper2kvmctl.1", "hyper2kvmd.8", "hyper2kvmd.yaml.5", "migration-report.5"] == made
    lint = ["mandoc", "-T", "lint", "-W", "warning"]
    done = subprocess.run([*lint, *pages.iterdir()], capture_output=True, text=True, check=False)
    assert (0, "", "") == (done.returncode, done.stdout, done.stderr)


def test_two_builds_of_the_manual_pages_are_the_same(pages: Path, tmp_path: Path) -> None:
    reference.write_man(tmp_path)
    assert [path.read_bytes() for path in sorted(pages.iterdir())] == [
        path.read_bytes() for path in sorted(tmp_path.iterdir())
    ]


@pytest.mark.parametrize(
    ("page", "parser"), [("hyper2kvmd.8", daemon.build_parser()), ("hyper2kvmctl.1", ctl.build_parser())]
)
def test_the_manual_page_of_a_program_has_all_that_its_command_line_takes(
    pages: Path, page: str, parser: argparse.ArgumentParser
) -> None:
    text = shown(pages / page)
    lines = [line.strip() for line in text.splitlines()]
    commands = [command for command, _ in reference.commands(parser)]
    assert [] == [command.prog for command in commands if command.prog not in lines]
    options = {name for command in commands for option in reference.options(command) for name in option.option_strings}
    assert {"--config", "--set"} < options
    assert [] == [name for name in options if not re.search(rf"^ +(.*, )?{name}\b", text, flags=re.MULTILINE)]
    assert [] == [status for status in EXIT_MEANING if not re.search(rf"^ +{status}\b", text, flags=re.MULTILINE)]


def test_the_manual_page_of_the_settings_has_every_setting(pages: Path) -> None:
    text = shown(pages / "hyper2kvmd.yaml.5")

    settings = []
    waiting: list[tuple[str, object]] = [*Settings().model_dump(by_alias=True).items()]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict) and value and name != "pipeline":
            waiting += [(f"{name}.{key}", inner) for key, inner in value.items()]
        else:
            settings.append(name)
    assert {"workers", "libvirt.network_map", "limits.stage_seconds.boot", "pipeline"} < {*settings}
    assert [] == [name for name in settings if not re.search(rf"^ +{name} \(", text, flags=re.MULTILINE)]


def test_the_manual_page_of_the_report_has_every_error_code(pages: Path) -> None:
    text = shown(pages / "migration-report.5")
    assert [] == [code for code in Code if not re.search(rf"^ +{code}\b", text, flags=re.MULTILINE)]


def test_the_example_of_the_library_prints_what_the_page_says(tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```\n\nIt prints:\n\n```\n(.*?)```", PAGE, flags=re.DOTALL)
    assert example is not None
    places = {
        "/var/lib/hypersdk/exports": tmp_path / "exports",
        "/var/lib/libvirt/images": tmp_path / "images",
        "/etc/hyper2kvmd/hyper2kvmd.yaml": tmp_path / "settings.yaml",
    }
    program, prints = example.groups()
    for place, ours in places.items():
        program, prints = program.replace(place, str(ours)), prints.replace(place, str(ours))
    (tmp_path / "exports/web01").mkdir(parents=True)
    (tmp_path / "images").mkdir()
    (tmp_path / "settings.yaml").write_text(
        f"output_dir: {tmp_path}/images\nwork_dir: {tmp_path}/work\nlibvirt: {{import: false}}\n"
    )
    disk = tmp_path / "exports/web01/web01.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "16M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 7 1M 1M", disk], check=True, stdout=subprocess.DEVNULL)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert (0, prints) == (done.returncode, done.stdout), done.stderr
    subprocess.run(["qemu-img", "compare", disk, tmp_path / "images/web01-disk-0.raw"], check=True)
