"""The documentation has its shape: pages that are short, found from the index, linked right, and in plain words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT, pages

EVERY = pages.every()
INDEX = "docs/guide.md"
# How the project once wrote; the field has words for each: resume, retry, fix, notify, send, verify, again.
QUAINT = (
    *(r"\bmend(s|ed|ing)?\b", r"\btold\b", r"\banew\b", r"goes on behind", r"held against", r"done again"),
    *(r"\b(came|comes?|became|becomes?) of\b", r"\binto use\b", r"\bof one's own\b", r"\bthose that are over\b"),
)


@pytest.mark.parametrize("name", EVERY)
def test_a_page_is_short_and_so_are_its_lines(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    assert len(lines) <= pages.LINES
    assert [] == [number for number, line in enumerate(lines, start=1) if len(line) > pages.COLUMNS]


def links(name: str) -> Iterator[tuple[str, str]]:
    """Every link of a page into the tree: the page that it leads to, as a path in the tree, and the anchor there."""
    text = "".join(f"{line}\n" for line, _ in pages.lines((ROOT / name).read_text()))
    for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        path = (ROOT / name).parent / target if target else ROOT / name
        yield str(path.resolve().relative_to(ROOT)), anchor


def anchors(path: Path) -> set[str]:
    """What one can link to in a page, as GitHub names its headings."""
    found = set()
    for line, _ in pages.lines(path.read_text()):
        if heading := re.match(r"#+ (.*)", line):
            words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower())
            found.add(words.replace(" ", "-"))
    return found


@pytest.mark.parametrize("name", EVERY)
def test_every_link_of_a_page_leads_to_a_file_and_to_a_heading(name: str) -> None:
    broken = [f"{path}#{anchor}" for path, anchor in links(name) if not (ROOT / path).exists()]
    assert [] == broken
    inside = [(path, anchor) for path, anchor in links(name) if anchor and path.endswith(".md")]
    assert [] == [f"{path}#{anchor}" for path, anchor in inside if anchor not in anchors(ROOT / path)]


def test_every_page_of_docs_is_two_clicks_from_the_index_or_nearer() -> None:
    near = {path for path, _ in links(INDEX)}
    near |= {path for name in near if name.endswith(".md") for path, _ in links(name)}
    assert [] == [name for name in EVERY if name.startswith("docs/") and name not in near | {INDEX}]


def test_every_page_right_in_docs_is_on_the_index_with_a_sentence() -> None:
    text = (ROOT / INDEX).read_text()
    listed = re.findall(r"^- \[[^\]]+\]\(([a-z0-9-]+\.md)\): \S.*\.$", pages.joined(text), flags=re.MULTILINE)
    assert sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "guide.md") == sorted(listed)


def test_the_index_has_its_groups() -> None:
    groups = re.findall(r"^## (.*)$", (ROOT / INDEX).read_text(), flags=re.MULTILINE)
    assert ["Tutorial", "How-to", "Reference", "Explanation", "Development"] == groups


def test_every_page_can_be_found_from_the_readme() -> None:
    seen, todo = set[str](), ["README.md"]
    while todo:
        name = todo.pop()
        if name not in seen and name.endswith(".md"):
            seen.add(name)
            todo += [path for path, _ in links(name)]
    assert [] == [name for name in EVERY if name not in seen and not name.startswith("packaging/")]


@pytest.mark.parametrize("name", [*EVERY, "etc/hyper2kvmd.yaml"])
def test_a_page_has_the_words_of_the_field(name: str) -> None:
    text = (ROOT / name).read_text()
    prose = " ".join(line.lstrip(" #") for line in text.splitlines())
    # Names of tests and files are not prose.
    prose = re.sub(r"`[^`]*`", "", prose)
    assert [] == [found[0] for words in QUAINT for found in re.finditer(words, prose, re.IGNORECASE)]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "hyper2kvmd").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_message_has_the_words_of_the_field(path: Path) -> None:
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]
    assert [] == [text for text in texts for words in QUAINT if re.search(words, text, re.IGNORECASE)]
