"""What the two programs' command lines have in common, and the exit statuses."""

from __future__ import annotations

import argparse
from pathlib import Path

DEFAULT_PATH = Path("/etc/hyper2kvmd/hyper2kvmd.yaml")


def add_settings_options(parser: argparse.ArgumentParser) -> None:
    """The two options that every command has."""
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"settings file (default: {DEFAULT_PATH})")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a setting, for example --set workers=4 or --set libvirt.import=false",
    )
