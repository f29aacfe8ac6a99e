"""SSH keys for tests of signed reports."""

from __future__ import annotations

import subprocess
from pathlib import Path

from hyper2kvmd.settings.model import Settings


def keygen(*arguments: str | Path, stdin: bytes = b"", check: bool = True) -> subprocess.CompletedProcess[bytes]:
    """Run ssh-keygen."""
    return subprocess.run(["ssh-keygen", *arguments], input=stdin, capture_output=True, check=check)


def make_key(path: Path, *options: str, passphrase: str = "") -> Path:
    """A new key; its public one is beside it."""
    keygen("-q", *(options or ("-t", "ed25519")), "-N", passphrase, "-C", path.name, "-f", path)
    return path


def signing(settings: Settings, key: Path) -> Settings:
    """The settings with a key that signs reports."""
    return Settings.model_validate({**settings.model_dump(by_alias=True), "report": {"sign_key": key}})


def is_signed(report: Path, key: Path) -> bool:
    """Whether a report has a good signature by a key, by what ssh-keygen says and nothing of ours."""
    namespace = "hyper2kvmd-report"
    signers = key.with_name(f"{key.name}.signers")
    signers.write_text(f"me {key.with_name(f'{key.name}.pub').read_text()}")
    options = ("-n", namespace, "-f", signers, "-I", "me", "-s", f"{report}.sig")
    return keygen("-Y", "verify", *options, stdin=report.read_bytes(), check=False).returncode == 0
