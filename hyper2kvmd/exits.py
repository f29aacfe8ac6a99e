"""The exit statuses of both programs, and what they mean."""

from __future__ import annotations

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
