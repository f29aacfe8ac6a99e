"""Programs that stand in for an engine: what they are given, and all that can be wrong with what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from hyper2kvmd.dispatch.command import OUTPUT_LIMIT, Command
from hyper2kvmd.dispatch.engine import Handed
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.settings.model import DispatchCommand, Settings
from tests import ROOT
from tests.unit.dispatch.test_slurm import failed, job

Fake = Callable[[str, str], None]
WORDS: dict[str, list[str]] = {"submit": ["submit", "{words}"], "list": ["list"], "cancel": ["cancel", "{id}"]}


def command(timeout_seconds: float = 10, **changes: Any) -> Command:
    dispatch = {"engine": "command", "timeout_seconds": timeout_seconds, "command": {**WORDS, **changes}}
    return Command(Settings.model_validate({"dispatch": dispatch}).dispatch)


def test_the_words_are_filled_in_without_a_shell(fake: Fake, tmp_path: Path) -> None:
    fake("submit", f'for word; do printf "<%s>" "$word"; done > {tmp_path}/words; echo talk; echo id-7')
    template = [
        *("submit", "--name={name}", "{log}", "{cpus}/{memory_mb}/{scratch_mb}/{priority}", "{features}", "{licenses}"),
        *("{exclude}", '{"json": {}}', "$HOME;", "--", "{words}"),
    ]
    asked = job(
        words=("run", "{name}", "a b", "it's"), log=Path("/x/%s {id}"), features=("kvm", "a"), exclude=("h1", "h2")
    )
    assert "id-7" == command(submit=template).submit(asked)
    assert (
        "<--name=h2k-web01-0a1b2c3d></x/%s {id}><2/2304/0/0><kvm,a><><h1,h2>"
        '<{"json": {}}><$HOME;><--><run><{name}><a b><it\'s>'
    ) == (tmp_path / "words").read_text()


def test_jobs_are_listed_a_line_each(fake: Fake) -> None:
    lines = ["17 h2k-a running kvm1", "", "x/y:z h2k-b waiting no room on kvm1", "18 h2k-c running", "9 other waiting"]
    fake("list", "\n".join(f"echo '{line}'" for line in lines))
    assert [
        Handed("17", "h2k-a", "running", "kvm1"),
        Handed("x/y:z", "h2k-b", "waiting", reason="no room on kvm1"),
        Handed("18", "h2k-c", "running"),
    ] == command().jobs()


@pytest.mark.parametrize(
    "line",
    ["x", "17 h2k-a", "17 h2k-a done", "17 h2k-a running kvm1 kvm2", "-17 h2k-a running", "17 h2k-\x1ba running"],
)
def test_a_line_that_means_nothing_is_shown(fake: Fake, line: str) -> None:
    fake("list", f"echo 17 h2k-b running; printf '%s\\n' '{line}'")
    error = failed(command().jobs)
    assert (Code.ENGINE_UNAVAILABLE, "dispatch.command.list") == (error.code, error.field)
    assert line.replace("\x1b", "\\\\x1b") in error.message


@pytest.mark.parametrize("script", ["true", "echo two words", "echo --option", "printf '\\033[1m'"])
def test_what_is_no_identifier_is_not_taken_for_one(fake: Fake, script: str) -> None:
    fake("submit", script)
    assert Code.ENGINE_UNAVAILABLE == failed(lambda: command().submit(job())).code


def test_jobs_are_dropped_one_by_one(fake: Fake, tmp_path: Path) -> None:
    fake("cancel", f'echo "$@" >> {tmp_path}/calls')
    command().cancel(["1", "2"])
    assert "1\n2\n" == (tmp_path / "calls").read_text()


def test_status_2_of_submit_is_for_a_person_and_others_are_tried_again(fake: Fake) -> None:
    fake("submit", "echo working; echo 'no host has 99 CPUs' >&2; exit 2")
    error = failed(lambda: command().submit(job()))
    assert (Code.ENGINE_REFUSED, "dispatch.command.submit") == (error.code, error.field)
    assert "no host has 99 CPUs" in error.message
    fake("submit", "echo 'no route to host' >&2; exit 1")
    error = failed(lambda: command().submit(job()))
    assert (Code.ENGINE_UNAVAILABLE, "submit exited 1: no route to host") == (error.code, error.message)
    fake("list", "exit 2")
    assert Code.ENGINE_UNAVAILABLE == failed(command().jobs).code


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("sleep 600", "list did not end within 1 s"),
        ("kill -9 $$", "list was ended"),
        (f"head -c {OUTPUT_LIMIT + 1} /dev/zero", "more than 64 MiB"),
        ("head -c 1000 /dev/urandom", "printed"),
    ],
)
def test_a_program_that_does_not_behave_is_told_of(fake: Fake, script: str, expected: str) -> None:
    fake("list", script)
    error = failed(command(1).jobs)
    assert Code.ENGINE_UNAVAILABLE == error.code
    assert expected in error.message


def test_a_program_that_is_not_there_or_cannot_be_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    for path, reason in (("/no/such", "No such file or directory"), (f"{tmp_path}/plain", "Permission denied")):
        error = failed(command(list=[path]).jobs)
        assert (Code.TOOL_MISSING, "dispatch.command.list") == (error.code, error.field)
        assert f"{path} cannot be run: {reason}" in error.message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"submit": ["x", "{export}", "{words}"]}, r"\{export\} in '\{export\}' is not known; known are: \{name\}, "),
        ({"list": ["x", "{id}"]}, "known are: none"),
        ({"cancel": ["x"]}, r"without \{id\} it cannot know id; add it"),
        ({"submit": ["x"]}, r"without \{words\}"),
        ({"submit": ["sh", "-c", "exec {words}"]}, "has to be one by itself"),
        ({"list": ["x\0"]}, "null character"),
    ],
)
def test_a_template_that_cannot_work_is_refused_with_the_settings(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        DispatchCommand.model_validate({**WORDS, **changes})


def test_every_placeholder_of_the_settings_is_filled_in(fake: Fake) -> None:
    fake("submit", 'echo "$#"')
    known = "name", "log", "cpus", "memory_mb", "scratch_mb", "priority", "features", "licenses", "exclude"
    assert "10" == command(submit=["submit", *(f"{{{name}}}" for name in known), "{words}"]).submit(job(words=("a",)))
    with pytest.raises(MigrationError):
        command(submit=["true", "{words}"]).submit(job())


KUBERNETES = ROOT / "packaging/dispatch/kubernetes/h2k-kubernetes"


def kubernetes() -> Command:
    lines = [line.removeprefix("#") for line in KUBERNETES.read_text().splitlines() if line.startswith("#     ")]
    shape: dict[str, Any] = yaml.safe_load("\n".join(lines))
    for words in shape["dispatch"]["command"].values():
        words[0] = str(KUBERNETES)
    return Command(Settings.model_validate(shape).dispatch)


def test_the_example_for_kubernetes_makes_a_job_of_a_job(fake: Fake, tmp_path: Path) -> None:
    fake("kubectl", f"cat > {tmp_path}/made; echo h2k-abcde")
    assert "h2k-abcde" == kubernetes().submit(job(log=Path("/exports/it's/log")))
    made = json.loads((tmp_path / "made").read_text())
    container = made["spec"]["template"]["spec"]["containers"][0]
    assert ["/exports/it's/log", "hyper2kvmd", "run-job", "/exports/it's", "--if-ready"] == container["command"][3:]
    assert {"requests": {"cpu": "2", "memory": "2304Mi"}} == container["resources"]
    assert "h2k-web01-0a1b2c3d" == made["metadata"]["annotations"]["hyper2kvmd/name"]
    assert "Never" == made["spec"]["template"]["spec"]["restartPolicy"]


def test_the_example_for_kubernetes_lists_jobs_with_the_nodes_of_their_pods(fake: Fake, tmp_path: Path) -> None:
    def of(kind: str, name: str, **more: Any) -> dict[str, Any]:
        labels = {"job-name": name.partition("/")[0]}
        note = {"hyper2kvmd/name": f"h2k-{name}"}
        return {"kind": kind, "metadata": {"name": name, "labels": labels, "annotations": note}, **more}

    items = [
        *(of("Job", name, status={"active": 1}) for name in ("a", "b")),
        of("Job", "c", status={"succeeded": 1}),
        of("Job", "d", status={"failed": 1}),
        of("Pod", "a/1", spec={"nodeName": "n1"}, status={"phase": "Running"}),
        of("Pod", "b/1", spec={}, status={"phase": "Pending"}),
    ]
    (tmp_path / "told").write_text(json.dumps({"items": items}))
    fake("kubectl", f"cat {tmp_path}/told")
    assert [Handed("a", "h2k-a", "running", "n1"), Handed("b", "h2k-b", "waiting")] == kubernetes().jobs()
