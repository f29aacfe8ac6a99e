"""The tutorial, followed on a fresh system with the package: its files are written and its commands run, in order."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT
from tests.docs import Command, commands
from tests.e2e.container import Container

PAGE = ROOT / "docs/tutorial.md"
PATIENCE_SECONDS = 240
CSV = "/root/plan.csv"


def acts(page: Path) -> Iterator[Command | tuple[str, str]]:
    """What the page has a reader do, in order: the commands, and files with their content."""
    listed = iter(commands(page))
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        language, text = match.groups()
        if language == "console":
            yield from (next(listed) for line in text.splitlines() if line.startswith("# "))
        else:
            named = re.match(r"# (/\S+)\n", text)
            assert named or language == "csv", f"a file without a name: {text[:40]}"
            yield (named[1] if named else CSV), text


def shown(command: Command, output: str) -> list[str]:
    """The lines that the page shows, and that were not printed."""
    printed = [line.rstrip() for line in output.splitlines()]
    patterns = {line: ".*".join(map(re.escape, re.sub(r" +", " ", line).split("…"))) for line in command.prints}
    squeezed = [re.sub(r" +", " ", line) for line in printed]
    return [
        line
        for line, pattern in patterns.items()
        if line != "…" and not any(re.fullmatch(pattern, found) for found in squeezed)
    ]


@pytest.mark.timeout(1200)
def test_a_campaign_is_planned_migrated_cut_over_and_verified_as_the_tutorial_says(host: Container) -> None:
    host.run("systemctl", "stop", "hyper2kvmd")
    for act in acts(PAGE):
        if isinstance(act, tuple):
            host.write(*act)
            continue
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            text = f"cd /root && export COLUMNS=200 && {{ {act.text} ; }} 2>&1"
            output = host.run("bash", "-c", text)
            missing = shown(act, output)
            # What the page says to run again until it is so.
            if not missing or act.text != "hyper2kvmctl list" or time.monotonic() > deadline:
                break
            time.sleep(2)
        assert [] == missing, f"line {act.line}: {act.text}\n{output}"
    # That this host works there stays written down.
    ours = ("-not", "-path", "*/.hyper2kvmd.hosts*")
    assert "" == host.run("find", "/var/lib/hypersdk/exports", "/var/lib/libvirt/images", "-mindepth", "1", *ours)
