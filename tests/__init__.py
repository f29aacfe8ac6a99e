"""The tests, and the programs that make what the repository holds ready-made."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/data"
