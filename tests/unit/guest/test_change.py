"""What became of a file, as the report shows it."""

from __future__ import annotations

import pytest

from hyper2kvmd.guest.change import DIFF_BYTES, Edit, unified_diff
from tests.pace import work_of_at_most

LINES = [f"line {number}" for number in range(5000)]


def test_diff_of_a_file_of_usual_size_has_a_line_of_context() -> None:
    assert "--- a/f\n+++ b/f\n@@ -1,3 +1,3 @@\n a\n-b\n+c\n d" == unified_diff("/f", "a\nb\nd\ne", "a\nc\nd\ne")


def test_diff_of_a_long_file_names_every_place() -> None:
    new = ["x" if number in (7, 4000) else line for number, line in enumerate(LINES)]
    assert "--- a/f\n+++ b/f\n@@ -8,1 +8,1 @@\n-line 7\n+x\n@@ -4001,1 +4001,1 @@\n-line 4000\n+x" == unified_diff(
        "/f", "\n".join(LINES), "\n".join(new)
    )


@pytest.mark.parametrize(
    ("new", "hunk"),
    [
        ([*LINES[:10], "x", *LINES[10:]], "@@ -11,0 +11,1 @@\n+x"),
        ([*LINES[:10], *LINES[11:]], "@@ -11,1 +11,0 @@\n-line 10"),
        ([*LINES, "x", "y"], "@@ -5001,0 +5001,2 @@\n+x\n+y"),
        (["x", *LINES[2:]], "@@ -1,2 +1,1 @@\n-line 0\n-line 1\n+x"),
    ],
)
def test_diff_of_a_long_file_that_grew_or_shrank_has_one_place(new: list[str], hunk: str) -> None:
    assert f"--- a/f\n+++ b/f\n{hunk}" == unified_diff("/f", "\n".join(LINES), "\n".join(new))


@pytest.mark.parametrize("line", ["a{0}\nlinux root={{}} {1}\n", "{{}} /m{0} ext4 x 0 0\n\n# {1}\n", "\n{{}} {0}\n"])
def test_a_file_made_to_keep_us_busy_does_not_when_it_is_compared(line: str) -> None:
    text = "".join(line.format(number % 120, number % 130) for number in range(20_000))
    with work_of_at_most(5):
        change = Edit("fstab", "/f", text.replace("{}", "/dev/sdb1"), text.replace("{}", "UUID=x"), "").done()
    assert len(change.diff) <= DIFF_BYTES + len("\n[cut]")
