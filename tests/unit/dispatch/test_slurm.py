"""Slurm's commands, played by scripts: what they are given, and all that can be wrong with what they say."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.dispatch.command import Command
from hyper2kvmd.dispatch.engine import Handed, Submission
from hyper2kvmd.dispatch.engines import engine_of
from hyper2kvmd.dispatch.slurm import OUTPUT_LIMIT, Node, Slurm, escaped
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.settings.model import Settings
from tests import DATA

Fake = Callable[[str, str], None]
UID = 990  # of those whose jobs are in the files
OURS = {"submit": ["x", "{words}"], "list": ["x"], "cancel": ["x", "{id}"]}


def slurm(timeout_seconds: float = 10, **changes: Any) -> Slurm:
    dispatch = {"engine": "slurm", "timeout_seconds": timeout_seconds, "slurm": changes}
    return Slurm(Settings.model_validate({"dispatch": dispatch}).dispatch, uid=UID)


def job(**changes: Any) -> Submission:
    words = ("hyper2kvmd", "run-job", "/exports/it's", "--if-ready")
    shape = {"name": "h2k-web01-0a1b2c3d", "words": words, "log": Path("/exports/web01/log"), "cpus": 2}
    return Submission(**{**shape, "memory_mb": 2304, **changes})


def failed(what: Callable[[], object]) -> MigrationError:
    with pytest.raises(MigrationError) as caught:
        what()
    return caught.value


def test_the_settings_say_which_engine_there_is() -> None:
    assert engine_of(Settings()) is None
    assert isinstance(engine_of(Settings.model_validate({"dispatch": {"engine": "slurm"}})), Slurm)
    assert isinstance(engine_of(Settings.model_validate({"dispatch": {"engine": "command", "command": OURS}})), Command)


def test_a_job_is_asked_for_with_all_it_needs_and_nothing_of_this_host(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBGUESTFS_BACKEND", "direct")
    fake("sbatch", f'printf "%s\\n" "$@" > {tmp_path}/words; cat > {tmp_path}/script; env > {tmp_path}/env; echo "7;c"')
    asked = job(
        scratch_mb=5000, features=("kvm", "site-a"), licenses=("f1:1", "f2:2"), priority=300, exclude=("a", "b")
    )
    assert "7" == slurm(partition="migrations", account="infra", qos="high").submit(asked)
    assert [
        "--parsable",
        "--job-name=h2k-web01-0a1b2c3d",
        "--requeue",
        "--ntasks=1",
        "--cpus-per-task=2",
        "--mem=2304M",
        "--nice=700",
        "--output=/exports/web01/log",
        "--open-mode=append",
        "--dependency=singleton",
        "--export=ALL",
        "--propagate=NONE",
        "--chdir=/",
        "--partition=migrations",
        "--account=infra",
        "--qos=high",
        "--tmp=5000M",
        "--constraint=kvm&site-a",
        "--licenses=f1:1,f2:2",
        "--exclude=a,b",
    ] == (tmp_path / "words").read_text().splitlines()
    assert "#!/bin/sh\nexec hyper2kvmd run-job '/exports/it'\"'\"'s' --if-ready\n" == (tmp_path / "script").read_text()
    lines = (tmp_path / "env").read_text().splitlines()
    assert "LIBGUESTFS_BACKEND=direct" in lines
    names = {line.partition("=")[0] for line in lines if not line.startswith("LIBGUESTFS_")}
    assert names <= {"PATH", "LC_ALL", "PWD", "OLDPWD", "SHLVL", "_"}


def test_what_is_not_asked_for_is_not_named(fake: Fake, tmp_path: Path) -> None:
    fake("sbatch", f'echo "$@" > {tmp_path}/words; echo 7')
    slurm().submit(job())
    assert not re.search("tmp|constraint|licenses|exclude|partition|account|qos", (tmp_path / "words").read_text())


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/exports/web01/log", "/exports/web01/log"),
        ("/exports/%s [x] */log", "/exports/%%s [x] */log"),
        ("/exports/50%j\\x/log", "/exports/50%j\\\\x/log"),
    ],
)
def test_a_path_of_a_log_has_no_patterns(path: str, expected: str) -> None:
    assert expected == escaped(Path(path))


@pytest.mark.parametrize("file", ["squeue-22.05.json", "squeue-24.11.json"])
def test_jobs_of_both_shapes_of_json_are_read(fake: Fake, file: str) -> None:
    fake("squeue", f"cat {DATA}/slurm/{file}")
    jobs = slurm().jobs()
    states = {job.name: (job.state, job.host) for job in jobs}
    assert ("running", "kvm1") == states["h2k-web01-0a1b2c3d"]
    assert "h2k-over-0a1b2c3d" not in states, "it is over"
    assert "h2k-web09-55667788" not in states, "it is somebody else's"
    (waiting,) = [job for job in jobs if job.state == "waiting"]
    assert waiting.name == "h2k-db02-11223344"
    assert waiting.reason.startswith(("Licenses: ", "BeginTime: "))
    assert waiting.id.isdecimal()


def test_a_job_that_a_node_could_not_start_is_stuck_and_one_that_somebody_holds_is_not(
    fake: Fake, tmp_path: Path
) -> None:
    held = {"job_state": "PENDING", "state_reason": "JobHeldUser", "nodes": ""}
    failed = told(**held, name="h2k-a", state_description="launch failed requeued held")
    jobs = listed(fake, tmp_path, failed, told(**held, name="h2k-b"))
    assert {"h2k-a": True, "h2k-b": False} == {job.name: job.stuck for job in jobs}


def told(**changes: Any) -> dict[str, Any]:
    shape = {"job_id": 7, "name": "h2k-a", "user_id": UID, "job_state": "RUNNING", "nodes": "kvm1"}
    return {**shape, "state_reason": "None", "state_description": "", **changes}


def say(fake: Fake, tmp_path: Path, *jobs: dict[str, Any]) -> None:
    (tmp_path / "told").write_text(json.dumps({"jobs": jobs, "errors": []}))
    fake("squeue", f"cat {tmp_path}/told")


def listed(fake: Fake, tmp_path: Path, *jobs: dict[str, Any]) -> list[Handed]:
    say(fake, tmp_path, *jobs)
    return slurm().jobs()


@pytest.mark.parametrize(
    ("words", "state"),
    [
        *((word, "running") for word in ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "OF_A_LATER_VERSION")),
        *((word, "waiting") for word in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")),
        *((word, None) for word in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")),
        (["NODE_FAIL"], None),
        (["PENDING", "REQUEUED"], "waiting"),
        (["FAILED", "COMPLETING"], "running"),
    ],
)
def test_states(fake: Fake, tmp_path: Path, words: object, state: str | None) -> None:
    assert ([state] if state else []) == [job.state for job in listed(fake, tmp_path, told(job_state=words))]


@pytest.mark.parametrize(
    ("word", "more", "reason"),
    [
        ("None", "", ""),
        ("Priority", "", "Priority: others go first"),
        ("JobHeldUser", "launch failed requeued held", "JobHeldUser: launch failed requeued held"),
        ("OfALaterVersion", "", "OfALaterVersion"),
        (None, None, ""),
    ],
)
def test_why_a_job_waits(fake: Fake, tmp_path: Path, word: str | None, more: str | None, reason: str) -> None:
    waiting = told(job_state="PENDING", nodes="", state_reason=word, state_description=more)
    assert [reason] == [job.reason for job in listed(fake, tmp_path, waiting)]


def test_other_peoples_jobs_may_be_called_anything(fake: Fake, tmp_path: Path) -> None:
    others = [{**told(user_id=1), "name": name} for name in ("h2k-a", "%s [x] *", "a\n{}", "", "\ud83d")]
    odd: tuple[object, ...] = ("mine", "", None, 7, [])
    mine = [told(name=name) for name in odd]
    assert ["9"] == [job.id for job in listed(fake, tmp_path, *others, *mine, told(job_id=9))]


def test_ten_thousand_jobs_are_read_in_a_moment(fake: Fake, tmp_path: Path) -> None:
    one = json.loads((DATA / "slurm/squeue-22.05.json").read_text())["jobs"][0]
    jobs = [{**one, "job_id": number, "name": f"h2k-{number}"} for number in range(1, 10001)]
    say(fake, tmp_path, *jobs)
    began = time.process_time()
    assert 10000 == len(slurm().jobs())
    assert time.process_time() - began < 2, "of a processor's seconds"
    assert (tmp_path / "told").stat().st_size < OUTPUT_LIMIT


DOWN = '{"errors": [{"description": "Failed while looking for jobs", "source": "slurm_load_jobs"}], "jobs": []}'


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", "Unable to contact"),
        (f"echo '{DOWN}'", "slurm_load_jobs: Failed while looking for jobs"),
        ('echo \'{"jobs": [{"name": "h2k-a"\'', "not its JSON"),
        ('echo \'{"jobs": [{"name": "h2k-a"}]}\'', "not its JSON"),
        ('echo \'{"jobs": [{"name": "h2k-a", "user_id": 990, "job_state": [{}]}]}\'', "not its JSON"),
        ('echo \'{"jobs": {"a": 1}}\'', "not its JSON"),
        ("echo '{\"errors\": 7}'", "not its JSON"),
        ("echo []", "not its JSON"),
        ("echo 7", "not its JSON"),
        ("echo '{}'", "not its JSON"),
        ("head -c 100000 /dev/zero | tr '\\0' '['", "not its JSON"),
        ("head -c 1000 /dev/urandom", "not its JSON"),
        ("true", "not its JSON"),
        (f"head -c {OUTPUT_LIMIT + 1} /dev/zero", "more than 64 MiB"),
        ("echo \"squeue: unrecognized option '--json'\" >&2; exit 1", "cannot print JSON"),
        ("kill -9 $$", "was ended"),
    ],
)
def test_rubbish_of_squeue_is_no_empty_list(fake: Fake, script: str, expected: str) -> None:
    fake("sinfo", "true")
    fake("squeue", script)
    error = failed(slurm().jobs)
    assert Code.ENGINE_UNAVAILABLE == error.code
    assert expected in error.message
    assert error.hint


@pytest.mark.parametrize("program", ["sbatch", "squeue", "scancel", "sinfo"])
def test_a_command_that_hangs_is_given_up(fake: Fake, program: str) -> None:
    fake(program, "sleep 600")
    calls: dict[str, Callable[[], object]] = {
        "sbatch": lambda: slurm(1).submit(job()),
        "squeue": slurm(1).jobs,
        "scancel": lambda: slurm(1).cancel(["1"]),
        "sinfo": slurm(1).nodes,
    }
    error = failed(calls[program])
    assert (Code.ENGINE_UNAVAILABLE, f"{program} did not answer within 1 s") == (error.code, error.message)


def test_without_slurm_its_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = failed(slurm().jobs)
    assert Code.TOOL_MISSING == error.code
    assert "slurm-client" in error.hint


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("invalid partition specified: x\\nsbatch: error: X: Invalid partition name specified", "slurm.partition"),
        ("Batch job submission failed: User's group not permitted to use this partition", "slurm.partition"),
        ("Batch job submission failed: Invalid account or account/partition combination specified", "slurm.account"),
        ("Batch job submission failed: Invalid qos specification", "slurm.qos"),
        ("Batch job submission failed: Invalid feature specification", "slurm.features"),
        ("Batch job submission failed: Invalid license specification", "slurm.licenses"),
        ("Memory specification can not be satisfied", "memory_mb"),
        ("Temporary disk specification can not be satisfied", "scratch_mb"),
        ("Batch job submission failed: More processors requested than permitted", "cpus"),
    ],
)
def test_a_refusal_names_the_setting_and_has_slurms_words(fake: Fake, said: str, name: str) -> None:
    fake("sbatch", f'printf "sbatch: error: {said}\\n" >&2; exit 1')
    error = failed(lambda: slurm().submit(job()))
    assert (Code.ENGINE_REFUSED, f"dispatch.{name}") == (error.code, error.field)
    assert said.rpartition(": ")[2] in error.message
    assert f"dispatch.{name}" in error.hint


def test_a_refusal_that_nobody_knows_is_for_a_person(fake: Fake) -> None:
    fake("sbatch", "echo 'sbatch: error: Batch job submission failed: Moon in the wrong phase' >&2; exit 1")
    error = failed(lambda: slurm().submit(job()))
    assert (Code.ENGINE_REFUSED, None) == (error.code, error.field)
    assert "Moon in the wrong phase" in error.message


@pytest.mark.parametrize(
    "said",
    [
        "Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "Batch job submission failed: Socket timed out on send/recv operation",
        "Batch job submission failed: Protocol authentication error",
        "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or ...)",
    ],
)
def test_what_passes_by_itself_is_tried_again(fake: Fake, said: str) -> None:
    fake("sbatch", f'echo "sbatch: error: {said}" >&2; exit 1')
    assert Code.ENGINE_UNAVAILABLE == failed(lambda: slurm().submit(job())).code


def test_that_only_excluded_hosts_would_do_passes_by_itself(fake: Fake) -> None:
    fake("sbatch", "echo 'sbatch: error: X: Requested node configuration is not available' >&2; exit 1")
    error = failed(lambda: slurm().submit(job(exclude=("kvm1",))))
    assert Code.ENGINE_UNAVAILABLE == error.code
    assert "kvm1" in error.message
    assert "hyper2kvmctl resume --host" in error.hint
    assert Code.ENGINE_REFUSED == failed(lambda: slurm().submit(job())).code


def test_an_excluded_host_that_is_no_node_is_left_out(fake: Fake, tmp_path: Path) -> None:
    fake("sinfo", "echo 'all*|kvm1|idle|4|8000|1|(null)|none'")
    unknown = 'case "$*" in *desk*) echo Invalid node name specified >&2; exit 1;; esac'
    fake("sbatch", f'echo "$@" >> {tmp_path}/words; {unknown}; echo 7')
    assert "7" == slurm().submit(job(exclude=("kvm1", "desk")))
    assert (tmp_path / "words").read_text().splitlines()[1].endswith("--exclude=kvm1")


@pytest.mark.parametrize("said", ["", "Submitted batch job", "-1", "7 8", "7\n8", "\u0660"])
def test_what_is_no_number_of_a_job_is_not_taken_for_one(fake: Fake, said: str) -> None:
    fake("sbatch", f"printf '%s' '{said}'")
    assert Code.ENGINE_UNAVAILABLE == failed(lambda: slurm().submit(job())).code


def test_many_jobs_are_cancelled_by_few_calls_and_only_those_that_wait(fake: Fake, tmp_path: Path) -> None:
    fake("scancel", f'echo "$#" "$1" >> {tmp_path}/calls')
    slurm().cancel([str(number) for number in range(2500)])
    calls = ["1002 --state=PENDING", "1002 --state=PENDING", "502 --state=PENDING"]
    assert calls == (tmp_path / "calls").read_text().splitlines()
    slurm().cancel([])
    assert 3 == len((tmp_path / "calls").read_text().splitlines())


def test_a_job_that_is_gone_needs_no_cancelling(fake: Fake) -> None:
    fake("scancel", "echo 'scancel: error: Kill job error on job id 7: Invalid job id specified' >&2; exit 1")
    slurm().cancel(["7"])
    fake("scancel", "echo 'scancel: error: Kill job error on job id 7: Access/permission denied' >&2; exit 1")
    assert "permission denied" in failed(lambda: slurm().cancel(["7"])).message


def test_nodes_are_told_once_each(fake: Fake) -> None:
    lines = [
        "migrations|kvm1|mixed|4|8000|3597|kvm,site-a|none",
        "more|kvm1|mixed|4|8000|3597|kvm,site-a|none",
        "more|kvm2|down*|64|512000|N/A|(null)|Not responding | since noon",
    ]
    fake("sinfo", "\n".join(f"echo '{line}'" for line in lines))
    assert [
        Node("kvm1", "mixed", True, "", 4, 8000, 3597, ("kvm", "site-a")),
        Node("kvm2", "down", False, "Not responding | since noon", 64, 512000, None, ()),
    ] == slurm().nodes()


def test_nodes_of_other_partitions_are_left_out(fake: Fake, tmp_path: Path) -> None:
    lines = ["other|gpu1|idle|4|8000|1|(null)|none", "migrations*|kvm1|idle|4|8000|1|(null)|none"]
    lines.append("other|kvm1|idle|4|8000|1|(null)|none")
    fake("sinfo", f'echo "$@" >{tmp_path}/words\n' + "\n".join(f"echo '{line}'" for line in lines))
    assert ["kvm1"] == [node.name for node in slurm().nodes()], "those of the default partition"
    assert "--partition" not in (tmp_path / "words").read_text()
    slurm(partition="other").nodes()
    assert "--partition=other" in (tmp_path / "words").read_text()


@pytest.mark.parametrize(
    ("states", "code"),
    [
        ("idle mixed allocated completing", ""),
        ("drained draining drained*", "host_drained"),
        ("down unknown idle*", "host_down"),
    ],
)
def test_a_node_that_gets_no_job_says_why_and_what_to_do(fake: Fake, states: str, code: str) -> None:
    for state in states.split():
        fake("sinfo", f"echo 'all*|kvm1|{state}|4|8000|1|(null)|a new disk'")
        (node,) = slurm().nodes()
        assert code == ("" if node.trouble is None else node.trouble.code)
        if node.trouble is not None:
            assert "a new disk" in node.trouble.message
            assert "scontrol update nodename=kvm1 state=resume" in node.trouble.hint


def test_what_squeue_cannot_say_sinfo_does(fake: Fake) -> None:
    """With 22.05, squeue --json has no other words for a controller that is down."""
    fake("squeue", """echo '{"errors": [{"description": "Failed", "error": "Unspecified error"}], "jobs": []}'""")
    fake("sinfo", "echo 'slurm_load_partitions: Unable to contact slurm controller (connect failure)' >&2; exit 1")
    assert "Unable to contact slurm controller" in failed(slurm().jobs).message


@pytest.mark.parametrize("line", ["kvm1", "p|kvm1|idle|x|1|1|f|none", "a|b|c|d|e|f|g|h"])
def test_rubbish_of_sinfo_is_shown(fake: Fake, line: str) -> None:
    fake("sinfo", f"echo '{line}'")
    error = failed(slurm().nodes)
    assert Code.ENGINE_UNAVAILABLE == error.code
    assert line in error.message
