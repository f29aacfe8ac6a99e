"""What is taken out of text before it is sent to others, and what stays."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper2kvmd.ctl.redact import REDACTED, redacted

SECRET = "geh3im"
PEM = f"-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1r{SECRET}\nAAAA\n-----END OPENSSH PRIVATE KEY-----"


@pytest.mark.parametrize(
    "text",
    [
        f"password: {SECRET}",
        f'"password": "{SECRET} and more"',
        f"admin_password = '{SECRET}'",
        f"passphrase={SECRET}",
        f"PASSWD={SECRET};DB=x",
        f"api-key: {SECRET}",
        f"X-Auth-Token: {SECRET}",
        f"client_secret: {SECRET}",
        f"$6$salt${SECRET}/abc.",
        f"root:$y$j9T$abc${SECRET}:19000:0:99999:7:::",
        f"$2b$12${SECRET}",
        PEM,
        PEM.partition("-----END")[0],
        json.dumps({"key": PEM})[1:-1],
        f"https://{SECRET}@example.com/x",
        f"https://user:{SECRET}@example.com/x",
        f"qemu+ssh://root:{SECRET}@kvm1/system",
        f"https://example.com/?a=1&access_token={SECRET}&b=2",
        f"https://x.blob.core.windows.net/c/d.vhd?sv=2020&sig={SECRET}%2B&se=2030",
        f"https://s3.example.com/b/d?X-Amz-Signature={SECRET}",
        f"Authorization: Bearer {SECRET}xxxxxxxx",
        f'"authorization": "Basic {SECRET}xxxxxxxx"',
        f"curl -H 'Authorization: token {SECRET}'",
        f"sent bearer {SECRET}xxxxxxxx to it",
        f"Set-Cookie: session={SECRET}; Path=/",
        f"<graphics type='vnc' passwd='{SECRET}'/>",
        f"<tag name='api_token'>{SECRET}</tag>",
        f'<x:password kind="a">{SECRET}</x:password>',
        f'<Property ovf:key="admin_password" ovf:value="{SECRET}"/>',
        f"https://hooks.slack.com/services/T0/B0/{SECRET}",
        f"https://discord.com/api/webhooks/1/{SECRET}",
        f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIx{SECRET}.abc",
        f"ghp_{SECRET}abcdefghijklmnopqrstuvwxyz",
        f"xoxb-1234567890-{SECRET}",
    ],
)
def test_what_looks_like_a_secret_goes(text: str) -> None:
    for shape in (text, f"line before\n{text}\nline after", json.dumps({"message": text}), json.dumps([{"a": [text]}])):
        found = redacted(shape)
        assert SECRET not in found, found
        assert REDACTED in found


@pytest.mark.parametrize(
    "text",
    [
        "web01: succeeded after 12 min; sha256 3f786850e387550fdab836ed7e6dc881de23001b9a1b2c3d4e5f60718293a4b5",
        "qemu+ssh://root@kvm1.example.com/system",
        "luks_keys: {web01: /etc/hyper2kvmd/keys/web01}",
        "key_file: /etc/hyper2kvmd/tls/key.pem",
        'password: null, "token": "", "secret": null',
        "https://example.com/docs?page=2#keys",
        "UUID=564d1a2b-3c4d-5e6f-7081-92a3b4c5d6e7 / ext4 defaults 0 1",
        "00:50:56:aa:bb:01 is ens192, 10.0.2.15/24",
        "costs $5 or $6 for each",
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIG ann@example.com",
    ],
)
def test_what_is_none_stays(text: str) -> None:
    assert text == redacted(text)


def test_json_loses_whole_values_by_the_names_of_their_keys_and_stays_json() -> None:
    shape = {
        "passwords": [SECRET],
        "inner": {"Api_Key": 5, "x": f"\u0024y\u0024a${SECRET}"},
        "token": {"a": SECRET},
        "n": 1,
    }
    found = redacted(json.dumps(shape).replace("$", "\\u0024"))
    assert SECRET not in found
    assert {"passwords": REDACTED, "token": REDACTED, "n": 1} == {
        key: json.loads(found)[key] for key in ("passwords", "token", "n")
    }
    assert json.loads(redacted('{"a": {"password": null, "b": [true, 1.5]}}')) == {
        "a": {"password": None, "b": [True, 1.5]}
    }


def test_what_this_host_knows_to_be_secret_goes_wherever_it_is() -> None:
    found = redacted(
        "opened with 'correct horse' and 'correct horse battery'", ["correct horse", "correct horse battery", ""]
    )
    assert f"opened with '{REDACTED}' and '{REDACTED}'" == found


@given(st.text(max_size=200), st.text(st.characters(categories=["Ll", "Nd"]), min_size=8, max_size=20))
def test_a_known_secret_never_stays(text: str, secret: str) -> None:
    assert secret not in redacted(f"{text} {secret} {text}", [secret]).replace(REDACTED, "")
