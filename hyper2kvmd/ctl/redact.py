"""Takes secrets out of text that is going to be sent to others: what looks like one, and what is known to be one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

REDACTED = "[redacted]"
_NAME = (
    r"(?:[\w.-]*(?:passw(?:or)?d|passphrase|secret|token|api[-_]?key|access[-_]?key|account[-_]?key|private[-_]?key|credentials?)"
    r"[\w-]*|x-[\w-]*(?:auth|key)[\w-]*|pwd|sas)"
)
# What is in place of a value that holds nothing, so that a file keeps its form.
_NOTHING = r"(?!null\b|true\b|false\b|none\b|\[|\{|[,}\]]|$)"
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL | re.MULTILINE), replacement)
    for pattern, replacement in (
        # PEM, also with its line ends as JSON and YAML write them.
        (
            r"(-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----).*?(-----END (?:[A-Z0-9]+ )*PRIVATE KEY-----|\Z)",
            rf"\1{REDACTED}\2",
        ),
        # crypt(5): yescrypt, SHA, bcrypt, MD5 and others.
        (r"\$(1|2[abxy]?|5|6|7|y|gy|md5|sha1|argon2\w*|scrypt|pbkdf2[\w-]*)\$[^\s\"'<>:\\]+", rf"$\1${REDACTED}"),
        # user:password@ in any URL; a name alone is a token where the scheme is one of the web's.
        (r"(\b[a-z][a-z0-9+.-]*://[^\s/@:\"'<>]*):[^\s/@\"'<>]+@", rf"\1:{REDACTED}@"),
        (r"(\b(?:https?|ftps?|[a-z]+s)://)(?!\[redacted)[^\s/@:\"'<>]+@", rf"\1{REDACTED}@"),
        # ?token=... and its kin.
        (
            r"([?&;][\w.-]*(?:token|key|secret|sig|signature|passw(?:or)?d|pass|pwd|auth|credential|code|sas)[\w-]*=)"
            r"[^&;\s\"'<>\\]+",
            rf"\1{REDACTED}",
        ),
        (
            r"\b((?:proxy-)?authorization|(?:set-)?cookie)(\\?[\"']?\s*[:=]\s*\\?[\"']?)[^\r\n\"'\\]+",
            rf"\1\2{REDACTED}",
        ),
        (r"\b(bearer|basic)(\s+)[\w.~+/=-]{8,}", rf"\1\2{REDACTED}"),
        # KEY: VALUE and KEY=VALUE by the name of the key; first with quotes, which stay.
        (rf"({_NAME}\\?[\"']?\s*[:=]\s*)(\\?[\"'])(?!\2)(?:(?!\2|\\?\2).)+(\2)", rf"\1\2{REDACTED}\3"),
        (rf"({_NAME}\\?[\"']?[ \t]*[:=][ \t]*){_NOTHING}[^\s\"'<>,;&\\]+", rf"\1{REDACTED}"),
        # XML: <password>...</password>, and name="password" with a value or a text.
        (rf"(<(?:\w+:)?{_NAME}\b[^<>]*>)[^<]+", rf"\1{REDACTED}"),
        (rf"([\"']{_NAME}[\"'][^<>]*\bvalue=[\"'])[^\"'<>]+", rf"\1{REDACTED}"),
        (rf"([\"']{_NAME}[\"'][^<>:=]*>)[^<]+", rf"\1{REDACTED}"),
        # By their form: JSON web tokens, keys of AWS, tokens of GitHub, GitLab and Slack, and its hooks.
        (r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*", REDACTED),
        (r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", REDACTED),
        (r"\b(?:gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{10,})", REDACTED),
        (r"(hooks\.slack\.com/services/|discord(?:app)?\.com/api/webhooks/)[^\s\"'<>\\]+", rf"\1{REDACTED}"),
    )
)


_SECRET_KEY = re.compile(_NAME, re.IGNORECASE)


def redacted(text: str, known: Iterable[str] = ()) -> str:
    """The text without its secrets. known: secrets of this host, whatever they look like.

    JSON is read, and a value goes as a whole by the name of its key; other text stays as it was, line by line.
    """
    secrets = sorted((secret for secret in known if secret), key=len, reverse=True)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return _plain(text, secrets)
    if not isinstance(content, dict | list):
        return _plain(text, secrets)
    return json.dumps(_walk(content, secrets), indent=2, ensure_ascii=False) + "\n"


def _walk(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, dict):
        return {
            _plain(key, secrets): REDACTED if one and _SECRET_KEY.fullmatch(key) else _walk(one, secrets)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [_walk(one, secrets) for one in value]
    return _plain(value, secrets) if isinstance(value, str) else value


def _plain(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
