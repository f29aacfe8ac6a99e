"""Where the passphrase of an encrypted guest comes from, and which files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.keys import passphrase

UUID = "0f2c1f5e-7b1d-4c39-9a53-0c1f7f5b6a11"


def key_file(directory: Path, content: bytes, mode: int = 0o600, name: str = "key") -> Path:
    path = directory / name
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_key_of_the_container_goes_before_that_of_the_vm(tmp_path: Path) -> None:
    own, other = key_file(tmp_path, b"own\n", name="own"), key_file(tmp_path, b"other", name="other")
    assert "own" == passphrase({UUID: own, "web01": other}, "web01", UUID)
    assert "other" == passphrase({"web01": other}, "web01", UUID)
    assert passphrase({"db01": other}, "web01", UUID) is None


def test_one_line_end_does_not_belong_to_the_passphrase(tmp_path: Path) -> None:
    assert "two\n" == passphrase({UUID: key_file(tmp_path, b"two\n\n")}, "vm", UUID)
    assert " dos" == passphrase({UUID: key_file(tmp_path, b" dos\r\n")}, "vm", UUID)


@pytest.mark.parametrize(
    ("content", "mode", "expected"),
    [
        (b"secret", 0o644, "has mode 0644"),
        (b"", 0o600, "is empty"),
        (b"\n", 0o600, "is empty"),
        (b"a\0b", 0o600, "not text"),
        (b"\xff\xfe", 0o600, "not UTF-8"),
        (b"x" * 9000, 0o600, "longer than 8 KiB"),
    ],
)
def test_file_that_is_no_key_is_named_with_its_setting(
    tmp_path: Path, content: bytes, mode: int, expected: str
) -> None:
    path = key_file(tmp_path, content, mode)
    with pytest.raises(MigrationError) as caught:
        passphrase({"web01": path}, "web01", UUID)
    assert (Code.GUEST_ENCRYPTED, "fix.luks_keys.web01") == (caught.value.code, caught.value.field)
    assert expected in caught.value.message and str(path) in caught.value.message
    assert "secret" not in caught.value.message


def test_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MigrationError) as caught:
        passphrase({"web01": tmp_path / "none"}, "web01", UUID)
    assert str(tmp_path / "none") in caught.value.message
