"""Markdown pages of the documentation: how long they may be, how a long one is split, how long lines are broken."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from tests import ROOT

LINES = 199  # of a page
COLUMNS = 139  # of a line
WIDTH = 118  # of a line that is made


def every() -> list[str]:
    """The pages that a user of the project may read, as paths in the tree."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "hyper2kvmd/guest/linux/fixers/README.md"]
    paths += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "packaging").rglob("*.md")]
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def joined(text: str) -> str:
    """The same page with each paragraph, and each item of a list, on one line."""
    return re.sub(r"\n(?=[^\s#|-])|\n +(?=[^\s*-])", " ", text)


def wrapped(text: str) -> str:
    """The same page with no long line in its paragraphs and lists; tables and literal blocks stay as they are."""
    made, block = "", list[str]()
    for line, prose in [*lines(text), ("", False)]:
        if block and (not prose or not line.strip() or _MARK.match(line)):
            made += _filled(block)
            block = []
        if prose and line.strip():
            block.append(line)
        else:
            made += f"{line}\n"
    return made.removesuffix("\n")


def lines(text: str) -> Iterator[tuple[str, bool]]:
    """Every line of a page, and whether it is prose, which may be broken and searched for words."""
    fenced = False
    for line in text.splitlines():
        fence = line.lstrip().startswith("```")
        fenced ^= fence
        yield line, not (fenced or fence or line.startswith(("|", "    ", "#")))


_MARK = re.compile(r" *(?:[-*]|[0-9]+\.) ")


def _filled(block: list[str]) -> str:
    """A paragraph, or one item of a list."""
    if len(max(block, key=len)) <= WIDTH:
        return "".join(f"{line}\n" for line in block)
    text = " ".join([block[0], *(line.strip() for line in block[1:])])
    # Commands stay on one line. So does, with the one before it, a word that Markdown takes for a list or a heading.
    text = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0" if len(code[0]) < 60 else " "), text)
    text = re.sub(r"(?<=\S) (?=(?:[-+*#>=]+|[0-9]+[.)])(?: |$))", "\0", text)
    mark = _MARK.match(text)
    indent = " " * (mark.end() if mark else 0)
    text = textwrap.fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
    return text.replace("\0", " ") + "\n"


def split(text: str, groups: Mapping[str, Sequence[str]], depth: int) -> tuple[str, dict[str, list[str]]]:
    """Take the sections out of a page whose headings are in a group: what stays, and the sections by group, in order.

    A section goes from its heading to the next one of this depth (2 is "##") or above.
    """
    group_of = {heading: name for name, headings in groups.items() for heading in headings}
    stays, taken = "", {name: list[str]() for name in groups}
    for part in re.split(rf"(?m)^(?=#{{1,{depth}}} )", text):
        if name := group_of.get(part.split("\n", 1)[0]):
            taken[name].append(part)
        else:
            stays += part
    return stays, taken


def below(text: str) -> str:
    """The same text with its links, which were relative to docs/, in a page of a directory below it."""
    return re.sub(r"\]\((?![a-z]+:|#|/)", "](../", text)
