"""The digests of an export's files (.mf), as tools write them."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper2kvmd.authoring.digests import Digests, parse
from hyper2kvmd.errors import Code, MigrationError

DATA = b"the disk"
NAME = "web disk (1).vmdk"


def digest(algorithm: str) -> str:
    return hashlib.new(algorithm, DATA).hexdigest()


# What writes lines of this shape.
SPELLINGS = {
    "ovftool, OpenSSL 1": ("sha256", "SHA256(NAME)= HASH\n"),
    "OpenSSL 3": ("sha256", "SHA2-256(NAME)= HASH\n"),
    "OpenSSL 3, longer": ("sha512", "SHA2-512(NAME)= HASH\n"),
    "OpenSSL 3, newest": ("sha3_256", "SHA3-256(NAME)= HASH\n"),
    "VirtualBox": ("sha1", "SHA1 (NAME)= HASH\n"),
    "BSD, sha256sum --tag": ("sha256", "SHA256 (NAME) = HASH\n"),
    "RFC's names": ("sha384", "SHA-384(NAME)= HASH\n"),
    "lower case": ("sha1", "sha1(NAME)=HASH\n"),
    "capital digits": ("sha256", "SHA256(NAME)= HASH\n".replace("HASH", "UPPER")),
    "on Windows": ("sha1", "SHA1(NAME)= HASH\r\n\r\n"),
    "without an end": ("sha256", "SHA256(NAME)= HASH"),
    "aligned": ("sha256", "  SHA256 ( NAME)\t=\tHASH  \n".replace("( ", "(")),
    "sha256sum": ("sha256", "HASH  NAME\n"),
    "openssl -r": ("sha512", "HASH *NAME\n"),
    "sha1sum": ("sha1", "HASH  ./NAME\n"),
    "with a directory": ("sha256", "SHA256(exports/web/NAME)= HASH\n"),
    "with a directory of Windows": ("sha256", "SHA256(C:\\exports\\NAME)= HASH\n"),
    "very old": ("md5", "MD5(NAME)= HASH\n"),
}


@pytest.mark.parametrize("case", SPELLINGS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_spelling_says_the_same(case: str, encoding: str) -> None:
    algorithm, line = SPELLINGS[case]
    text = line.replace("NAME", NAME).replace("HASH", digest(algorithm)).replace("UPPER", digest(algorithm).upper())
    assert Digests({NAME: {algorithm: digest(algorithm)}}) == parse(text.encode(encoding), "web.mf")


@pytest.mark.parametrize("own", ["web.mf", "WEB.MF", "./web.mf", "other.mf", "._web.ovf"])
def test_a_digest_of_the_mf_itself_is_nothing(own: str) -> None:
    found = parse(f"SHA256({own})= {'0' * 64}\nSHA256(a)= {'1' * 64}\n".encode(), "web.mf")
    assert Digests({"a": {"sha256": "1" * 64}}) == found


@pytest.mark.parametrize("algorithm", ["RIPEMD160", "BLAKE2b512", "SHA2-512/256", "SM3", "WHIRLPOOL"])
def test_an_algorithm_that_nobody_knows_is_one_warning_and_the_others_count(algorithm: str) -> None:
    lines = [f"{algorithm}({name})= {'0' * 40}\n" for name in "abc"] + [f"SHA256(c)= {'1' * 64}\n"]
    found = parse("".join(lines).encode(), "web.mf")
    assert {"c": {"sha256": "1" * 64}} == found.of
    (warning,) = found.warnings
    assert "digest_unknown" == warning.code
    assert f"web.mf has digests by '{algorithm}', such as that of 'a', which is not known here" in warning.message
    assert ["digest_unknown"] == [finding.code for finding in found.warnings]
    codes = [finding.message for finding in found.unproved({"a": 1, "b": 1, "c": 1}, "web.ova")]
    assert ["web.ova holds no digest of 'a'", "web.ova holds no digest of 'b'"] == codes


def test_a_file_may_have_several_digests_and_all_are_checked() -> None:
    found = parse(f"SHA1(a)= {digest('sha1')}\nSHA256(a)= {'0' * 64}\n".encode(), "web.mf")
    assert {"sha1", "sha256"} == found.algorithms("a")
    with pytest.raises(MigrationError, match=r"a has sha256 .*, its \.mf says 000") as caught:
        found.check("a", {name: digest(name) for name in ("sha1", "sha256")}, "a")
    assert Code.CHECKSUM_MISMATCH == caught.value.code


def test_two_different_digests_of_a_kind_are_an_error() -> None:
    with pytest.raises(MigrationError, match="two different sha1 of 'a'"):
        parse(f"SHA1(a)= {'0' * 40}\nSHA1(a)= {'1' * 40}\n".encode(), "web.mf")
    assert {"a"} == {*parse(f"SHA1(a)= {'0' * 40}\n".encode() * 2, "web.mf").of}


@pytest.mark.parametrize("line", ["SHA256(a)= 00", f"SHA256(a)= {'0' * 63}", "0" * 33 + "  a", "hello", "SHA256()= 00"])
def test_a_line_that_is_no_digest_is_named_by_its_number(line: str) -> None:
    with pytest.raises(MigrationError, match=r"line 2 of web\.mf is no digest"):
        parse(f"\n{line}\n".encode(), "web.mf")


@given(st.binary(max_size=300) | st.text(alphabet="SHA256-()= \n0f*./", max_size=300).map(str.encode))
def test_no_bytes_do_more_than_an_error(data: bytes) -> None:
    try:
        found = parse(data, "web.mf")
    except MigrationError as error:
        assert error.message.isprintable()
    else:
        assert not any("/" in name for name in found.of)
