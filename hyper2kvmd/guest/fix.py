"""Fixes the guest that INSPECT looked at, as its system needs it."""

from __future__ import annotations

from hyper2kvmd.guest.change import FixResult
from hyper2kvmd.guest.inspect import Inspection
from hyper2kvmd.guest.linux import fix as linux
from hyper2kvmd.guest.options import FixOptions
from hyper2kvmd.guest.session import Session
from hyper2kvmd.guest.windows import fix as windows


def fix(session: Session, inspection: Inspection, options: FixOptions) -> FixResult:
    """Fix the guest that `inspect` mounted, and unmount it. A guest that needs nothing is not written to.

    Raise MigrationError: os_unsupported, guest_space, guest_dirty, fix_failed, fix_unproved.
    """
    if inspection.windows is not None:
        return windows.fix(session.g, inspection, inspection.windows, options)
    return linux.fix(session, inspection, options)
