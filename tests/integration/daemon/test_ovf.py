"""The daemon takes an export that hypersdk did not make when it is whole, and once."""

from __future__ import annotations

import shutil

from hyper2kvmd.settings.model import Settings
from tests.conftest import MakeExport, report_of
from tests.integration.daemon.test_daemon import change, daemon, done, free_port, look_again, looks, wait_until
from tests.ovf import DISKS, NVRAM, accepting, export_ovf, pack


def test_export_that_is_copied_slowly_is_taken_when_it_is_whole(scratch: Settings) -> None:
    whole = export_ovf(scratch.exports_dir.parent / "whole").parent
    export = scratch.exports_dir / "db01"
    export.mkdir()
    port = free_port()
    with daemon(accepting(scratch, metrics={"listen": f"127.0.0.1:{port}"})):
        wait_until(lambda: looks(port) > 0)
        for name in ("db01.ovf", DISKS[0], NVRAM, DISKS[1], "db01.mf"):
            data = (whole / name).read_bytes()
            (export / name).write_bytes(data[: len(data) // 2])
            look_again(port, times=2)
            assert not (export / ".hyper2kvmd.lock").exists(), name
            (export / name).write_bytes(data)
            look_again(port, times=2)
            assert not (export / ".hyper2kvmd.lock").exists(), name
        data = (whole / DISKS[2]).read_bytes()
        (export / DISKS[2]).write_bytes(data[:-1])
        look_again(port, times=3)
        assert not (export / ".hyper2kvmd.lock").exists()  # a byte is missing, by what the descriptor says
        shutil.copyfile(whole / DISKS[2], export / DISKS[2])
        wait_until(lambda: done(export))
        report = (export / "migration-report.json").read_bytes()
        look_again(port)
        assert report == (export / "migration-report.json").read_bytes()
    document = report_of(export)
    assert ("succeeded", 1) == (document["status"], document["attempts"])
    assert [True] * 3 == [disk["source_verified"] for disk in document["disks"]]


def test_nothing_is_taken_unless_the_settings_say_so(scratch: Settings) -> None:
    export = export_ovf(scratch.exports_dir / "db01").parent
    before = sorted(path.name for path in export.iterdir())
    port = free_port()
    with daemon(change(scratch, metrics={"listen": f"127.0.0.1:{port}"})):
        look_again(port)
    assert before == sorted(path.name for path in export.iterdir())


def test_both_kinds_of_exports_are_migrated_side_by_side(scratch: Settings, make_export: MakeExport) -> None:
    theirs = make_export("web01")
    ours = export_ovf(scratch.exports_dir / "db01").parent
    with daemon(accepting(scratch)):
        wait_until(lambda: done(theirs, ours))
    assert ["succeeded"] * 2 == [report_of(export)["status"] for export in (theirs, ours)]
    assert ["manifest.json", "db01.ovf"] == [report_of(export)["manifest"]["name"] for export in (theirs, ours)]


def test_archive_is_taken_when_it_is_whole_and_one_beside_the_exports_is_spoken_of(scratch: Settings) -> None:
    descriptor = export_ovf(scratch.exports_dir.parent / "whole")
    data = pack(descriptor, scratch.exports_dir.parent / "packed" / "db01.ova").read_bytes()
    export, port = scratch.exports_dir / "db01", free_port()
    export.mkdir()
    (scratch.exports_dir / "web01.ova").write_bytes(data)
    with daemon(accepting(scratch, metrics={"listen": f"127.0.0.1:{port}"})) as process:
        wait_until(lambda: looks(port) > 0)
        for part in range(4):
            with (export / "db01.ova").open("ab") as file:
                file.write(data[part * len(data) // 5 : (part + 1) * len(data) // 5])
            look_again(port, times=2)
            assert not (export / ".hyper2kvmd.lock").exists()
        with (export / "db01.ova").open("ab") as file:
            file.write(data[4 * len(data) // 5 :])
        wait_until(lambda: done(export))
        process.terminate()
        said = process.communicate(timeout=60)[0]
    assert "succeeded" == report_of(export)["status"]
    assert 1 == said.count(f"{scratch.exports_dir}/web01.ova is ignored: it is a file, and an export is a directory")
    assert f"mkdir {scratch.exports_dir}/web01 && mv {scratch.exports_dir}/web01.ova" in said
