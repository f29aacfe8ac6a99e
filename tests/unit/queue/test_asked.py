"""What a person asked for, in the export: what is kept comes back, and what anybody else put there does not."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.files import OURS
from hyper2kvmd.queue.asked import Asked, keep, kept
from hyper2kvmd.queue.claim import claim_export
from hyper2kvmd.queue.export import Export
from hyper2kvmd.queue.names import ASKED

ASKS = Asked(frozenset({"fix", "convert"}), "a b", ("libvirt.import=false", "output.format=raw"))


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Export]:
    directory = tmp_path / "web01"
    directory.mkdir()
    fd = os.open(directory, os.O_RDONLY)
    yield Export(directory, fd)
    os.close(fd)


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_kept_comes_back_and_nothing_leaves_no_file(export: Export, tmp_path: Path) -> None:
    assert Asked() == kept(export, tmp_path)
    keep(export, ASKS, 1)
    assert ASKS == kept(export, tmp_path)
    assert "--stages convert,fix --name 'a b' --set libvirt.import=false --set output.format=raw" == str(ASKS)
    keep(export, Asked(), 2)
    assert (Asked(), []) == (kept(export, tmp_path), os.listdir(export.fd))


def test_what_belongs_to_a_daemon_or_to_one_command_is_not_kept(export: Export, tmp_path: Path) -> None:
    keep(export, Asked(overrides=("notify.webhook.url=https://a/secret", "workers=3", "fix.serial_console=true")), 1)
    assert Asked(overrides=("fix.serial_console=true",)) == kept(export, tmp_path)
    keep(export, Asked(overrides=("log.level=debug",)), 2)
    assert [] == os.listdir(export.fd)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda path: os.chown(path, 4711, 4711), "is not a file that only this service may write"),
        (lambda path: path.chmod(0o664), "is not a file that only this service may write"),
        (lambda path: path.chmod(0o646), "is not a file that only this service may write"),
        (lambda path: (path.unlink(), path.mkdir()), "is not a file that only this service may write"),
        (
            lambda path: [path.unlink(), subprocess.run(["mkfifo", path], check=True)],
            "is not a file that only this service may write",
        ),
        (lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")), "cannot be opened"),
        (lambda path: rewrite(path, export="web02"), "does not say what was asked for this export"),
        (lambda path: rewrite(path, stages="fix"), "does not say"),
        (lambda path: rewrite(path, name=1), "does not say"),
        (lambda path: rewrite(path, set=[1]), "does not say"),
        (lambda path: rewrite(path, set=None), "does not say"),
        (lambda path: path.write_text("{"), "does not say"),
        (lambda path: path.write_text("[" * 60000), "does not say"),
        (lambda path: path.write_bytes(b"\xff"), "does not say"),
    ],
    ids=range(14),
)
def test_what_somebody_else_may_have_written_is_not_done(
    export: Export, tmp_path: Path, spoil: Callable[[Path], object], what: str
) -> None:
    keep(export, ASKS, 1)
    spoil(export.directory / ASKED)
    with pytest.raises(MigrationError, match=what) as caught:
        kept(export, tmp_path)
    assert Code.ASKED_UNUSABLE is caught.value.code
    assert str(export.directory / ASKED) in caught.value.message


def test_what_a_write_that_died_left_is_ours_and_goes_with_the_next_claim(export: Export) -> None:
    left = export.directory / f".{ASKED}.7.tmp"
    left.touch()
    assert OURS.fullmatch(left.name), "it would keep the export from settling"
    claim_export(export.directory).close()
    assert not left.exists()
