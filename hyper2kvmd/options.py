"""What the two programs' command lines have in common, and the exit statuses."""

from __future__ import annotations

import argparse
from pathlib import Path

DEFAULT_PATH = Path("/etc/hyper2kvmd/hyper2kvmd.yaml")
EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_PERMISSION, EXIT_BUSY = 0, 1, 2, 3, 4, 5
EXIT_MANIFEST, EXIT_UNAVAILABLE, EXIT_TEMPORARY, EXIT_CONFIG = 65, 69, 75, 78

# In the words of the manual and the README.
EXIT_MEANING = {
    EXIT_DONE: "done",
    EXIT_FAILED: "a migration or check failed",
    EXIT_USAGE: "usage",
    EXIT_NOT_FOUND: "not found",
    EXIT_PERMISSION: "permission",
    EXIT_BUSY: "busy or conflict",
    EXIT_MANIFEST: "bad manifest",
    EXIT_UNAVAILABLE: "libvirt or a tool unavailable",
    EXIT_TEMPORARY: "temporary",
    EXIT_CONFIG: "bad configuration",
}


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
