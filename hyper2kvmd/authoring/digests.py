"""Reads the file of an OVF export that has the digests of the others (.mf), however the tools in use spell them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.text import plain, show

SIZE_LIMIT = 1 << 20  # bytes of a .mf

# `SHA256(disk.vmdk)= ...` by ovftool and OpenSSL 1, `SHA2-256(disk.vmdk)= ...` by OpenSSL 3, `SHA1 (disk.vmdk)= ...` by
# VirtualBox, `SHA256 (disk.vmdk) = ...` by the BSDs and `sha256sum --tag`.
_NAMED = re.compile(
    r"(?P<algorithm>[A-Za-z0-9][A-Za-z0-9/_.-]{0,29})\s*\((?P<file>.+)\)\s*=\s*(?P<digest>[0-9a-fA-F]+)"
)
# `... *disk.vmdk` by `openssl -r`, `...  disk.vmdk` by sha256sum: the length tells which it is.
_BARE = re.compile(r"(?P<digest>[0-9a-fA-F]{32,128})\s+\*?(?P<file>.+)")
_ALGORITHM = re.compile(r"(?P<md5>md-?5)|sha-?1|sha(?P<three>3-)?(?:2-|-)?(?P<bits>224|256|384|512)")
_BY_LENGTH = {32: "md5", 40: "sha1", 56: "sha224", 64: "sha256", 96: "sha384", 128: "sha512"}


@dataclass(frozen=True)
class Digests:
    """For each file, by its name without directories, the digests in hexadecimal by hashlib's names of algorithms."""

    of: Mapping[str, Mapping[str, str]]
    warnings: tuple[Finding, ...] = ()

    def algorithms(self, name: str) -> frozenset[str]:
        """Which digests of a file are known."""
        return frozenset(self.of.get(name, ()))

    def check(self, name: str, found: Mapping[str, str], where: str) -> None:
        """Hold the digests that were computed of a file against those that are known. Raise MigrationError."""
        for algorithm, digest in self.of.get(name, {}).items():
            if found.get(algorithm, digest) != digest:
                raise MigrationError(
                    Code.CHECKSUM_MISMATCH,
                    f"{where} has {algorithm} {found[algorithm]}, its .mf says {digest}",
                    "Copy it again, or export the VM again.",
                )

    def joined(self, other: Digests) -> Digests:
        """These and those of another .mf."""
        both = {name: {**self.of.get(name, {}), **other.of.get(name, {})} for name in {**self.of, **other.of}}
        return Digests(both, (*self.warnings, *other.warnings))

    def unproved(self, names: Mapping[str, object], where: str) -> Iterator[Finding]:
        """A finding for each file of which no digest is known, or one if none is known of any."""
        if not self.of and not self.warnings:
            hint = "A damaged copy would not be noticed: export with a manifest file (`ovftool --shaAlgorithm=SHA256`)."
            yield Finding("no_digests", f"{where} holds no digests (.mf) of its files", hint)
            return
        for name in names:
            if name not in self.of and not name.lower().endswith((".mf", ".cert")):
                hint = "A damaged copy of it would not be noticed."
                yield Finding("no_digests", f"{where} holds no digest of {show(name)}", hint)


NONE = Digests({})


def parse(data: bytes, name: str) -> Digests:
    """What the .mf called `name` says. Raise MigrationError (image_corrupt) for a line that says nothing."""
    found: dict[str, dict[str, str]] = {}
    unknown: dict[str, str] = {}
    for number, line in enumerate(_text(data).split("\n"), 1):
        if not line.strip():
            continue
        match = _NAMED.fullmatch(line.strip()) or _BARE.fullmatch(line.strip())
        if match is None:
            raise _no_digest(name, number, line)
        written = match.groupdict().get("algorithm")
        digest = match["digest"].lower()
        algorithm = _BY_LENGTH.get(len(digest)) if written is None else _known(written)
        # Whatever directory it was in when it was written; macOS's own files are left out of what is unpacked.
        file = re.split(r"[/\\]", match["file"])[-1]
        if file.lower().endswith(".mf") or file.startswith("._"):
            continue  # of the .mf itself: it cannot have its own, and nothing depends on it
        if algorithm is None and written is not None:
            unknown.setdefault(written, file)
            continue
        if algorithm is None or len(digest) != hashlib.new(algorithm, usedforsecurity=False).digest_size * 2:
            raise _no_digest(name, number, line)
        if found.setdefault(file, {}).setdefault(algorithm, digest) != digest:
            message = f"{plain(name)} has two different {algorithm} of {show(file)}"
            raise MigrationError(Code.IMAGE_CORRUPT, message, "Delete the line that is wrong, or export the VM again.")
    warnings = tuple(
        Finding(
            "digest_unknown",
            f"{plain(name)} has digests by {show(written)}, such as that of {show(file)}, which is not known here: they"
            " were not checked",
            "A damaged copy would not be noticed by them: export the VM with SHA256.",
        )
        for written, file in unknown.items()
    )
    return Digests(found, warnings)


def _text(data: bytes) -> str:
    """The text of a file that a Windows program may have written."""
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "replace")


def _known(written: str) -> str | None:
    """hashlib's name of an algorithm; None for one that is not known."""
    found = _ALGORITHM.fullmatch(written.lower().replace("_", "-"))
    if found is None:
        return None
    if found["md5"]:
        return "md5"
    if not found["bits"]:
        return "sha1"
    return f"sha3_{found['bits']}" if found["three"] else f"sha{found['bits']}"


def _no_digest(name: str, number: int, line: str) -> MigrationError:
    return MigrationError(
        Code.IMAGE_CORRUPT,
        f"line {number} of {plain(name)} is no digest: {show(line)}",
        "Each line must be like `SHA256(disk.vmdk)= ` and the digest. Export the VM again.",
    )
