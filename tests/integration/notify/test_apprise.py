"""Mail and chats by the library apprise, with a real mail server and a real HTTP server."""

from __future__ import annotations

import email
import email.policy
import html
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import AsyncMessage

from hyper2kvmd.errors import SettingsError
from hyper2kvmd.notify import apprise, outbox
from hyper2kvmd.notify.channels import SERVICE
from hyper2kvmd.notify.delivery import Undelivered
from hyper2kvmd.queue.names import REPORT
from hyper2kvmd.settings.load import load_settings
from hyper2kvmd.settings.model import Apprise, Settings
from tests.conftest import Ctl, MakeExport, report_of, run_job
from tests.integration.daemon.test_daemon import free_port
from tests.integration.notify.test_notify import Receiver, hang, notify, one_of_each, put_hook, receiver, status


class Mailbox(AsyncMessage):
    """Keeps the mails that came."""

    def __init__(self) -> None:
        super().__init__()
        self.mails: list[EmailMessage] = []

    async def handle_message(self, message: Any) -> None:
        mail = email.message_from_bytes(message.as_bytes(), policy=email.policy.default)
        assert isinstance(mail, EmailMessage)
        self.mails.append(mail)


@contextmanager
def mail_server() -> Iterator[tuple[Mailbox, str]]:
    """A real SMTP server, and the URL by which apprise sends mails to it, as HTML."""
    box, port = Mailbox(), free_port()
    server = Controller(box, hostname="127.0.0.1", port=port)
    server.start()
    try:
        yield box, f"mailto://127.0.0.1:{port}/?from=kvm1@example.com&to=ops@example.com&format=html"
    finally:
        server.stop()


def chat(server: Receiver, token: str = "sekrit-token") -> str:
    """The URL of a service of apprise that has a secret."""
    return f"json://ann:sekrit-password@127.0.0.1:{server.port}/{token}"


def with_urls(scratch: Settings, *urls: str, **more: Any) -> Settings:
    """The settings with a file of URLs."""
    path = scratch.work_dir.parent / "urls"
    path.write_text("".join(f"{url}\n" for url in urls))
    path.chmod(0o600)
    shape = scratch.model_dump(by_alias=True)
    shape["notify"] = {"apprise": {"urls_credential": str(path), "timeout_seconds": 10, **more}}
    shape["retry"] = {"delay_seconds": 0, "max_delay_seconds": 0}
    shape["hooks"] = {"directory": scratch.work_dir.parent / "hooks.d"}
    return Settings.model_validate(shape)


def no_secrets(config: Settings, *said: str) -> None:
    """Nothing that anybody may read has a secret in it."""
    texts = [*said, (config.work_dir / outbox.STATE).read_bytes().decode(errors="replace")]
    assert [] == [text for text in texts if "sekrit" in text]


def test_a_mail_and_a_chat_get_every_end_once(scratch: Settings, make_export: MakeExport) -> None:
    with receiver() as server, mail_server() as (box, mailto):
        config = with_urls(scratch, "# people", mailto, "", chat(server))
        outbox.begin(config)
        made = one_of_each(make_export, config)
        done = notify(config)
        assert (0, "10 delivered, 0 failed; 0 pending, 0 given up so far\n") == (done.returncode, done.stdout), (
            done.stderr
        )
        assert 0 == notify(config).returncode
        titles = sorted(f"{name}: {name}" for name in made)
        assert titles == sorted(str(mail["Subject"]) for mail in box.mails)
        assert titles == sorted(body["title"] for body in server.bodies)
        kinds = {body["title"].split(":")[0]: body["type"] for body in server.bodies}
        expected = {"succeeded": "success", "blocked": "warning", "cancelled": "info"}
        assert {**dict.fromkeys(made, "failure"), **expected} == kinds
        no_secrets(config, done.stdout, done.stderr)


def test_a_message_has_the_reason_the_remedy_and_where_the_report_is(
    scratch: Settings, make_export: MakeExport
) -> None:
    with receiver() as server, mail_server() as (box, mailto):
        config = with_urls(scratch, mailto, chat(server), events=["failed"])
        outbox.begin(config)
        export = one_of_each(make_export, config)["failed"]
        assert 0 == notify(config).returncode
        (body,), (mail,) = server.bodies, box.mails
        error = report_of(export)["error"]
        lines = body["message"].splitlines()
        assert f"{error['message']} ({error['code']} in {error['stage']})" == lines[0]
        assert f"What to do: {error['hint']}" == lines[1]
        assert lines[2].startswith(f"Report: {export / REPORT} on ")
        part = mail.get_body(("html",))
        assert part is not None
        assert error["message"] in html.unescape(part.get_content()).replace("\xa0", " ")


def test_no_name_is_markup_in_a_mail_and_none_calls_everybody(scratch: Settings, make_export: MakeExport) -> None:
    name = "x<script>alert(1)</script> @all <!channel>\r\nBcc: all@example.com"
    with receiver() as server, mail_server() as (box, mailto):
        config = with_urls(scratch, mailto, chat(server))
        outbox.begin(config)
        export = make_export("evil", source={"provider": name, "vm_id": name, "vm_name": name})
        run_job(export, config)
        done = notify(config)
        assert 0 == done.returncode, done.stderr
        (mail,), (body,) = box.mails, server.bodies
        assert "Bcc" not in mail
        assert "ops@example.com" in mail["To"]
        part = mail.get_body(("html",))
        assert part is not None
        assert "<script" not in part.get_content()
        for text in (body["title"], body["message"], part.get_content()):
            assert not {"@all", "!channel"} & {word for word in ("@all", "!channel") if word in text}


def test_a_service_that_fails_repeats_nothing_to_the_others(scratch: Settings, make_export: MakeExport) -> None:
    with receiver() as broken, receiver() as server:
        broken.answers = [status(500)] * 2
        config = with_urls(scratch, chat(broken), chat(server))
        outbox.begin(config)
        assert 0 == run_job(make_export(), config).returncode
        first = notify(config)
        assert (1, 1, 1) == (first.returncode, len(broken.bodies), len(server.bodies))
        assert "line 1 of notify.apprise.urls_credential (json): it answered 500" in first.stderr
        assert [1, 0, 0] == [notify(config).returncode for _ in range(3)]
        assert (3, 1) == (len(broken.bodies), len(server.bodies))
        no_secrets(config, first.stdout, first.stderr)


def test_the_order_of_the_lines_does_not_matter_to_what_waits(scratch: Settings, make_export: MakeExport) -> None:
    with receiver() as broken, receiver() as server:
        broken.answers = [status(503)]
        config = with_urls(scratch, chat(broken), chat(server))
        outbox.begin(config)
        assert 0 == run_job(make_export(), config).returncode
        assert 1 == notify(config).returncode
        config = with_urls(scratch, chat(server), chat(broken), chat(server, "sekrit-other"))
        assert (0, 0) == (notify(config).returncode, notify(config).returncode)
        assert (2, 1) == (len(broken.bodies), len(server.bodies)), "a line that is new gets what ends from now on"


def test_a_service_that_nobody_reaches_or_that_hangs_holds_up_no_other(
    scratch: Settings, make_export: MakeExport
) -> None:
    with receiver() as slow, receiver() as server:
        slow.answers = [hang] * 9
        gone = f"json://127.0.0.1:{free_port()}/sekrit"
        config = with_urls(scratch, f"{chat(slow)}?rto=60&cto=60", gone, chat(server), timeout_seconds=1)
        put_hook(config, "post-job", "10-list", "exit 0")
        outbox.begin(config)
        for name in ("first", "second"):
            assert 0 == run_job(make_export(name), config).returncode
        started = time.monotonic()
        done = notify(config)
        assert time.monotonic() - started < 20, "as long as it hangs"
        assert "line 1 of notify.apprise.urls_credential (json): it did not take the message within 1 s" in done.stderr
        assert "line 2 of notify.apprise.urls_credential (json): it cannot be reached" in done.stderr
        assert ["first: succeeded", "second: succeeded"] == [body["title"] for body in server.bodies]
        no_secrets(config, done.stdout, done.stderr)


def test_a_receiver_that_is_left_alone_after_three_failures_leaves_the_others_alone(
    scratch: Settings, make_export: MakeExport
) -> None:
    names = [f"vm{number}" for number in range(5)]
    with receiver() as broken, receiver() as server:
        broken.answers = [status(500)] * 3
        config = with_urls(scratch, chat(broken), chat(server))
        outbox.begin(config)
        for name in names:
            assert 0 == run_job(make_export(name), config).returncode
        assert "5 delivered, 3 failed; 5 pending" in notify(config).stdout
        assert (3, 5) == (len(broken.bodies), len(server.bodies))
        assert 0 == notify(config).returncode
        assert 0 == notify(config).returncode
        assert {f"{name}: succeeded" for name in names} == {body["title"] for body in broken.bodies[3:]}
        assert (8, 5) == (len(broken.bodies), len(server.bodies))


def test_a_file_that_cannot_be_read_loses_nothing(scratch: Settings, make_export: MakeExport) -> None:
    """Neither of what waited before, nor of what ended meanwhile; and the hooks are run all the same."""
    with receiver() as server:
        server.answers = [status(500)]
        config = with_urls(scratch, chat(server))
        file = Path(str(config.notify.apprise.urls_credential))
        put_hook(config, "post-job", "10-list", f"echo $H2K_VM >> {file.parent}/hooked")
        outbox.begin(config)
        assert 0 == run_job(make_export("before"), config).returncode
        assert 1 == notify(config).returncode
        file.rename(file.with_suffix(".away"))
        assert 0 == run_job(make_export("meanwhile"), config).returncode
        for _ in range(2):
            done = notify(config)
            assert 1 == done.returncode
            assert f"notify.apprise.urls_credential: {file} cannot be read: No such file" in done.stderr
        assert "before\nmeanwhile\n" == (file.parent / "hooked").read_text()
        file.with_suffix(".away").rename(file)
        assert (0, 0) == (notify(config).returncode, notify(config).returncode)
        titles = [body["title"] for body in server.bodies]
        assert ["before: succeeded", "before: succeeded", "meanwhile: succeeded"] == sorted(titles)


def test_a_message_that_no_service_takes_is_given_up(scratch: Settings, make_export: MakeExport) -> None:
    config = with_urls(scratch, "nonsense://sekrit", "sekrit", max_attempts=2)
    outbox.begin(config)
    assert 0 == run_job(make_export(), config).returncode
    first, second, third = (notify(config) for _ in range(3))
    assert (1, 1, 0) == (first.returncode, second.returncode, third.returncode)
    assert "line 1 of notify.apprise.urls_credential (nonsense): apprise does not understand the URL" in first.stderr
    assert "line 2 of notify.apprise.urls_credential: apprise does not understand the URL" in first.stderr
    assert "given up" in second.stderr
    assert outbox.Standing(None, 0, 2) == outbox.standing(config)
    no_secrets(config, *(done.stdout + done.stderr for done in (first, second, third)))


def test_a_line_that_is_taken_away_takes_what_waits_for_it_along(scratch: Settings, make_export: MakeExport) -> None:
    with receiver() as server:
        server.answers = [status(500)]
        config = with_urls(scratch, chat(server))
        outbox.begin(config)
        assert 0 == run_job(make_export(), config).returncode
        assert 1 == notify(config).returncode
        config = with_urls(scratch, chat(server, "sekrit-new"))
        assert (0, 1) == (notify(config).returncode, len(server.bodies))
        assert outbox.Standing() == outbox.standing(config)


def test_nothing_is_left_on_the_disk_and_a_dry_run_names_the_services_by_their_marks(
    scratch: Settings, make_export: MakeExport, tmp_path: Path
) -> None:
    with receiver() as server:
        config = with_urls(scratch, chat(server), chat(server, "sekrit-other"))
        outbox.begin(config)
        assert 0 == run_job(make_export(), config).returncode
        done = notify(config, "--dry-run")
        marks = [line.split(": ")[1] for line in done.stdout.splitlines()]
        assert [SERVICE + one.mark for one in apprise.services(config.notify.apprise)] == marks
        assert all(re.fullmatch(r"apprise/[0-9a-f]{12}", mark) for mark in marks)
        home = tmp_path / "home"
        home.mkdir()
        assert 0 == notify(config, HOME=str(home), XDG_DATA_HOME=str(home)).returncode
        assert (2, []) == (len(server.bodies), os.listdir(home))
        no_secrets(config, done.stdout)
    with sqlite3.connect(config.work_dir / outbox.STATE) as db:
        assert [] == db.execute("SELECT * FROM todo").fetchall()


# Where it is not installed -------------------------------------------------------------------------------------

# Nobody finds the library, as where it is not installed.
WITHOUT = """
import importlib.abc, runpy, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "apprise":
            raise ModuleNotFoundError(name)
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "apprise" else find(name, package)
sys.meta_path.insert(0, Missing())
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def without(config: Settings, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = config.work_dir.parent / "without.json"
    path.write_text(config.model_dump_json(by_alias=True))
    argv = [sys.executable, "-c", WITHOUT, module, *arguments, "--config", str(path)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=120)


def test_without_the_library_each_command_says_how_to_install_it(scratch: Settings, make_export: MakeExport) -> None:
    with receiver() as server:
        config = with_urls(scratch, chat(server))
        outbox.begin(config)
        assert 0 == run_job(make_export(), config).returncode
        checked = without(config, "hyper2kvmd", "check-config")
        assert (78, "") == (checked.returncode, checked.stdout)
        for done in (
            checked,
            without(config, "hyper2kvmd.ctl", "doctor", "notify"),
            without(config, "hyper2kvmd.ctl", "notify"),
        ):
            assert done.returncode != 0
            assert "the library apprise is not installed" in done.stdout + done.stderr
            assert "apt install apprise" in done.stdout + done.stderr
            assert "sekrit" not in done.stdout + done.stderr
        assert (0, 1) == (notify(config).returncode, len(server.bodies)), "it was not lost"
        for arguments in (("hyper2kvmd", "check-config"), ("hyper2kvmd.ctl", "notify")):
            assert 0 == without(scratch, *arguments).returncode, "nobody needs it who has not asked for it"


def test_doctor_says_what_is_wrong_with_a_line_and_who_is_notified(scratch: Settings, ctl: Ctl) -> None:
    file = scratch.work_dir.parent / "urls"
    file.write_text("json://127.0.0.1/sekrit\nnonsense://sekrit\n")
    file.chmod(0o600)
    said = ctl("doctor", "notify", "--set", f"notify.apprise.urls_credential={file}")
    assert 1 == said.returncode
    assert "line 2 of notify.apprise.urls_credential (nonsense): apprise does not understand the URL" in said.stdout
    assert "sekrit" not in said.stdout + said.stderr
    file.write_text("json://127.0.0.1/sekrit\n")
    webhook = ("--set", "notify.webhook.url=https://example.com/", "--set", "notify.heartbeat.url_credential=beat")
    said = ctl("doctor", "notify", "--set", f"notify.apprise.urls_credential={file}", *webhook)
    expected = "webhook, heartbeat (not checked: only the service can read the credential beat), apprise"
    assert (0, f"ok      notify: {expected}\n") == (said.returncode, said.stdout)
    assert "ok      notify: nobody is notified\n" == ctl("doctor", "notify").stdout


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("json://sekrit\n", 0o644, "can be used by everybody"),
        ("# sekrit\n\n", 0o600, "holds no URL"),
        ("json://sekrité\n", 0o600, "not ASCII"),
    ],
)
def test_a_file_of_urls_that_cannot_be_used_is_refused_without_its_content(
    tmp_path: Path, text: str, mode: int, said: str
) -> None:
    path = tmp_path / "urls"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(Undelivered, match=said) as caught:
        apprise.services(Apprise(urls_credential=str(path)))
    assert "sekrit" not in caught.value.message + caught.value.hint


def test_a_url_in_the_settings_themselves_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hyper2kvmd.yaml"
    path.write_text("notify: {apprise: {urls_credential: 'slack://a/b/c'}}")
    with pytest.raises(SettingsError, match=r"notify\.apprise\.urls_credential"):
        load_settings(path)
