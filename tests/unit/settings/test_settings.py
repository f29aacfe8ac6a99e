"""Settings: one file, one place for defaults, and errors that name the line."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from hyper2kvmd.errors import SettingsError
from hyper2kvmd.settings.load import _refuse_others, load_settings
from hyper2kvmd.settings.model import Settings
from tests import ROOT

SHIPPED = ROOT / "etc/hyper2kvmd.yaml"


def test_the_shipped_file_holds_every_setting_at_its_default() -> None:
    assert yaml.safe_load(SHIPPED.read_text()) == Settings().model_dump(mode="json", by_alias=True)


def test_every_setting_in_the_shipped_file_has_a_comment_that_fits_the_line() -> None:
    lines = SHIPPED.read_text().splitlines()
    keys = [n for n, line in enumerate(lines) if line and not line.lstrip().startswith("#")]
    assert len(keys) > 40
    assert [] == [lines[n] for n in keys if not lines[n - 1].lstrip().startswith("# ")]
    assert 118 >= max(map(len, lines))


def test_the_examples_are_settings(tmp_path: Path) -> None:
    text = SHIPPED.read_text()
    examples = re.findall(r"^ *# For example: (.*)\n *(\w+): ", text, flags=re.MULTILINE)
    others = {"allowed_dirs", "pipeline", "network_map", "luks_keys", "rules", "tags", "networks", "waves"}
    assert others | {"features", "licenses", "submit", "list", "cancel"} == {key for _, key in examples}
    for example, key in examples:
        its_place = rf"^( *# For example: {re.escape(example)}\n *{key}): .*"
        text = re.sub(its_place, rf"\1: {example}", text, flags=re.MULTILINE)
    path = tmp_path / "c.yaml"
    path.write_text(text)
    settings = load_settings(path)
    assert "bridge:br0" == settings.libvirt.network_map["VM Network"]
    assert [Path("/srv/fast"), Path("/srv/big")] == [*settings.output.allowed_dirs]
    assert [Path("/srv/exports")] == [*settings.hypersdk.allowed_dirs]
    assert ({"site": "berlin"}, 10) == (settings.rules[0].tags, settings.rules[0].priority)
    assert settings.dispatch.command.is_set


def test_a_file_overrides_defaults_and_set_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("workers: 3\nlibvirt: {import: false}\n")
    settings = load_settings(path, ("workers=4", "retry.max_attempts=2"))
    assert (4, False, 2) == (settings.workers, settings.libvirt.import_, settings.retry.max_attempts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("workers: 2\nworker: 3\n", "c.yaml:2: worker: unknown setting; did you mean workers?"),
        ("libvirt:\n  improt: no\n", "c.yaml:2: libvirt.improt: unknown setting; did you mean import?"),
        ("workers: 0\n", "c.yaml:1: workers: Input should be greater than or equal to 1 (found 0)"),
        ("watch: {mode: sometimes}\n", "c.yaml:1: watch.mode: Input should be"),
        ("workers: 2\nworkers: 3\n", "c.yaml:2: workers is set twice"),
        ("workers: [\n", "not valid YAML"),
        ("- a\n", "expected settings such as"),
        ("validate: {boot_failure: never}\n", "c.yaml:1: validate.boot_failure: Input should be 'fail' or 'warn'"),
        (
            "libvirt: {default_network: 'lan@5000'}\n",
            "libvirt.default_network: Value error, 'lan@5000' is not the name",
        ),
        ("metrics: {listen: nonsense}\n", "c.yaml:1: metrics.listen:"),
        ("metrics: {listen: '127.0.0.1:65536'}\n", "c.yaml:1: metrics.listen:"),
        ("workers: " + "[" * 20000, "nested too deep"),
        ("workers: 2026-02-31\n", "holds a value that is none: day is out of range for month"),
        ("workers: !!bool perhaps\n", "holds a value that is none"),
        ("workers: !!timestamp now\n", "holds a value that is none"),
        ('exports_dir: "/a\\0b"\n', "c.yaml:1: exports_dir: Value error, '/a\\x00b' holds characters"),
        ('work_dir: "/a\\ud800b"\n', "c.yaml:1: work_dir: Value error, '/a\\ud800b' holds characters"),
        ("dispatch: {engine: command}\n", "engine: command needs all of dispatch.command.submit"),
        (
            "dispatch:\n  command:\n    submit: [x, '{wrods}']\n",
            "c.yaml:3: dispatch.command.submit: Value error, {wrods} in '{wrods}' is not known; known are: {name}, ",
        ),
        ('output: {allowed_dirs: ["/a", "/\\n"]}\n', "output.allowed_dirs: Value error, '/\\n' holds characters"),
    ],
)
def test_a_bad_file_is_explained_with_line_and_remedy(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    assert expected in str(caught.value)


def test_drop_ins_go_before_the_file_key_by_key_in_the_order_of_their_names(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("workers: 3\nlibvirt: {network_map: {A: net-a}, autostart: true}\n")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/20-site.yaml").write_text("libvirt: {network_map: {B: net-b}, start: true}\nworkers: 5\n")
    (tmp_path / "conf.d/10-base.yaml").write_text("workers: 4\nlibvirt: {start: false}\n")
    for ignored in (".20-site.yaml.swp.yaml", "30-old.yaml.dpkg-old"):
        (tmp_path / "conf.d" / ignored).write_text("workers: [\n")
    found = load_settings(path, ("retry.max_attempts=2",))
    assert (5, 2) == (found.workers, found.retry.max_attempts)
    expected = ({"A": "net-a", "B": "net-b"}, True, True)
    assert expected == (found.libvirt.network_map, found.libvirt.autostart, found.libvirt.start)


def test_a_problem_in_a_drop_in_is_explained_with_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("workers: 3\n")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/site.yaml").write_text("\nworkers: 0\n")
    with pytest.raises(SettingsError, match=r"conf.d/site.yaml:2: workers: Input should be greater"):
        load_settings(path)


@pytest.mark.parametrize("name", ["c.yaml", "conf.d/site.yaml"])
def test_a_file_that_others_can_write_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "conf.d").mkdir()
    for file in ("c.yaml", "conf.d/site.yaml"):
        (tmp_path / file).write_text("workers: 3\n")
    (tmp_path / name).chmod(0o646)
    with pytest.raises(
        SettingsError, match=rf"{name}: others can write it \(mode 0646\); read it, then run `chmod go-w"
    ):
        load_settings(tmp_path / "c.yaml")


def test_a_file_of_another_user_is_refused() -> None:
    status = os.stat_result((0o100644, 1, 1, 1, os.geteuid() + 1, 0, 10, 0, 0, 0))
    with pytest.raises(SettingsError, match="read it, then run `chown root"):
        _refuse_others(Path("/etc/hyper2kvmd/hyper2kvmd.yaml"), status)


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("workers: 0\nwatc: {}\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    assert 2 == len(str(caught.value).splitlines())


def test_a_file_that_is_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        load_settings(tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["workers", "=3", "workers.x=1", "workers=["])
def test_a_bad_override_is_explained(override: str) -> None:
    with pytest.raises(SettingsError, match="--set"):
        load_settings(None, ("workers=2", override))


def test_delays_double_up_to_the_maximum() -> None:
    retry = Settings().retry
    assert [60, 120, 240, 480] == [retry.delay(n) for n in range(1, 5)]
    assert 3600 == retry.delay(1000)


def test_a_page_that_is_served_nowhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hyper2kvmd.yaml"
    path.write_text("metrics: {page: true, listen: ''}")
    with pytest.raises(SettingsError, match=r"metrics\.page is true, and metrics\.listen is empty"):
        load_settings(path)
