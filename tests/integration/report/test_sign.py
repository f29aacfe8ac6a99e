"""Signatures by the real ssh-keygen: what it takes to make one, and what one has to be."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hyper2kvmd.errors import Finding, MigrationError
from hyper2kvmd.report.sign import NAMESPACE, check_key, sign, signers_of, verify
from hyper2kvmd.run import Tools
from tests.keys import keygen, make_key

DATA = b'{\n  "a": "report"\n}\n'
NOW = datetime.now(UTC)


def public(key: Path) -> bytes:
    return key.with_name(f"{key.name}.pub").read_bytes()


def why(data: bytes, signature: bytes, signers: bytes, at: datetime = NOW) -> str:
    found = verify(Tools(), data, signature, signers, at)
    assert isinstance(found, Finding), found
    assert found.hint
    return f"{found.code}: {found.message}"


@pytest.mark.parametrize("options", [("-t", "ed25519"), ("-t", "ecdsa"), ("-t", "rsa"), ("-t", "rsa", "-m", "PEM")])
def test_what_is_signed_is_verified(tmp_path: Path, options: tuple[str, ...]) -> None:
    key = make_key(tmp_path / "key", *options)
    signature = sign(Tools(), key, DATA)
    found = verify(Tools(), DATA, signature, signers_of(public(key)), NOW)
    assert isinstance(found, str) and found.startswith(f'Good "{NAMESPACE}" signature'), found
    (tmp_path / "signature").write_bytes(signature)
    done = keygen("-Y", "check-novalidate", "-n", NAMESPACE, "-s", tmp_path / "signature", stdin=DATA)
    assert b"Good" in done.stdout


def test_the_private_key_alone_is_enough(tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    signers = signers_of(public(key))
    key.with_name("key.pub").unlink()
    assert isinstance(verify(Tools(), DATA, sign(Tools(), key, DATA), signers, NOW), str)


def test_no_flipped_bit_goes_unseen(tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    signature, signers = sign(Tools(), key, DATA), signers_of(public(key))
    for position in range(len(DATA)):
        changed = bytearray(DATA)
        changed[position] ^= 1
        assert "signature_wrong" in why(bytes(changed), signature, signers), position
    # Of the armour, some bits mean nothing: line ends, and what lies behind it.
    for position in range(40, len(signature) - 40, 7):
        changed = bytearray(signature)
        changed[position] ^= 2
        if changed[position] != ord("\n") != signature[position]:
            assert why(DATA, bytes(changed), signers).startswith(("signature_wrong", "signer_unknown")), position


@pytest.mark.parametrize("signature", [b"", b"\0" * 100, b"-----BEGIN SSH SIGNATURE-----\nAAAA\n"])
def test_what_is_no_signature_is_wrong(tmp_path: Path, signature: bytes) -> None:
    assert "signature_wrong" in why(DATA, signature, signers_of(public(make_key(tmp_path / "key"))))


def test_a_signature_for_another_purpose_is_none(tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    signature = keygen("-Y", "sign", "-n", "file", "-f", key, stdin=DATA).stdout
    assert "namespace" in why(DATA, signature, signers_of(public(key)))


def test_only_those_count_who_may_sign(tmp_path: Path) -> None:
    mine, other = make_key(tmp_path / "mine"), make_key(tmp_path / "other")
    signature = sign(Tools(), mine, DATA)
    fingerprint = keygen("-l", "-f", mine).stdout.split()[1].decode()
    assert fingerprint in why(DATA, signature, signers_of(public(other)))
    assert "signer_unknown" in why(DATA, signature, b"")
    both = b"other " + public(other) + b'kvm*,kvm1 namespaces="hyper2kvmd-report" ' + public(mine)
    found = verify(Tools(), DATA, signature, both, NOW)
    assert isinstance(found, str) and f"for kvm* with ED25519 key {fingerprint}" in found
    for line in (b'kvm1 namespaces="file" ', b"!kvm1 "):
        assert "signer_unknown" in why(DATA, signature, line + public(mine))


def test_a_key_with_dates_must_be_valid_when_the_report_was_written(tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    signature = sign(Tools(), key, DATA)
    signers = b'kvm1 valid-before="20271231000000Z" ' + public(key)
    before, after = (datetime(2027, 12, 30, 23, 59, 59, tzinfo=UTC), datetime(2027, 12, 31, 0, 0, 1, tzinfo=UTC))
    assert isinstance(verify(Tools(), DATA, signature, signers, before), str)
    assert "key has expired" in why(DATA, signature, signers, after)


@pytest.mark.parametrize("content", [b"", b"a b c\n", b"-----BEGIN OPENSSH PRIVATE KEY-----\n", b"%s%s"])
def test_what_is_not_one_public_key_is_refused(tmp_path: Path, content: bytes) -> None:
    key = public(make_key(tmp_path / "key"))
    with pytest.raises(ValueError, match="not one public key"):
        signers_of(content.replace(b"%s", key))


# Keys that cannot sign ------------------------------------------------------------------------------------


def fault(key: Path) -> str:
    with pytest.raises(MigrationError) as caught:
        check_key(Tools(), key)
    error = caught.value
    assert ("report.sign_key", "blocked") == (error.field, error.outcome)
    assert str(key) in error.message and error.hint
    return f"{error.code}: {error.message}"


@pytest.mark.parametrize("options", [("-t", "ed25519"), ("-t", "rsa", "-m", "PEM")])
def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked(
    tmp_path: Path, fake: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    fake("askpass", f"touch {tmp_path}/asked\necho secret\n")
    for name, value in {"SSH_ASKPASS": "askpass", "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":0"}.items():
        monkeypatch.setenv(name, value)
    # Were the standard input asked, this would be the answer, and the rest of it would be signed.
    assert "has a passphrase" in fault(make_key(tmp_path / "key", *options, passphrase="a trial"))
    assert not (tmp_path / "asked").exists()


def test_a_public_key_is_refused_and_the_private_one_named(tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    with pytest.raises(MigrationError, match="is a public key") as caught:
        check_key(Tools(), key.with_name("key.pub"))
    assert f"Name its private key: {key}." == caught.value.hint


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    for mode in (0o640, 0o604, 0o660):
        key = make_key(tmp_path / f"key{mode}")
        key.chmod(mode)
        assert f"can be read by others (mode {mode:04o}" in fault(key)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_key_of_another_user_is_refused_only_if_everybody_can_read_it(tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    os.chown(key, 65534, 0)
    key.chmod(0o640)
    check_key(Tools(), key)
    key.chmod(0o644)
    assert "can be read by others" in fault(key)


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in fault(tmp_path / "none")
    assert "cannot be read: Is a directory" in fault(tmp_path)
    junk = tmp_path / "junk"
    junk.write_text("junk\n")
    assert "is not a private key" in fault(junk)
    junk.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\njunk\n")
    junk.chmod(0o600)
    assert "sign_key_unusable" in fault(junk)


def test_a_pipe_in_place_of_a_key_holds_up_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is not a private key" in fault(tmp_path / "pipe")


def test_a_key_beside_another_ones_public_key_is_refused(tmp_path: Path) -> None:
    key, other = make_key(tmp_path / "key", "-t", "rsa", "-m", "PEM"), make_key(tmp_path / "other")
    key.with_name("key.pub").write_bytes(public(other))
    assert "has no public key of its own beside it" in fault(key)
    key.with_name("key.pub").unlink()
    assert "has no public key of its own beside it" in fault(key)


def test_a_host_without_ssh_keygen_says_what_to_install(
    tmp_path: Path, fake: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = make_key(tmp_path / "key")
    (tmp_path / "bin/setpriv").symlink_to("/usr/bin/setpriv")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(MigrationError, match="ssh-keygen is not installed") as caught:
        check_key(Tools(), key)
    assert "openssh-client" in caught.value.hint and "tool_missing" == caught.value.code


def test_a_signature_that_is_not_good_is_not_handed_out(tmp_path: Path, fake: Callable[[str, str], None]) -> None:
    key = make_key(tmp_path / "key")
    # As if the first line had been taken for an answer.
    fake("ssh-keygen", '[ "$2" = sign ] && read -r line\nexec /usr/bin/ssh-keygen "$@"\n')
    assert "makes signatures that are not good" in fault(key)


def test_a_key_that_waits_for_somebody_is_given_up(
    tmp_path: Path, fake: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = make_key(tmp_path / "key")
    fake("ssh-keygen", "exec sleep 60\n")
    monkeypatch.setattr("hyper2kvmd.report.sign.SECONDS", 0.5)
    started = time.monotonic()
    assert "did not end within 0.5 s" in fault(key)
    assert time.monotonic() - started < 30
