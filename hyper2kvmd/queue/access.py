"""Who may write into an export: access control lists, capabilities, and names of users."""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import struct


def let_in(dir_fd: int) -> None:
    """Let this process's user write into a directory of somebody else's, by an entry in its access control list.

    hypersdk makes its directories with mode 0755, which a default ACL of their parent cannot widen. It takes
    CAP_FOWNER, which the service has. Raise PermissionError without it, or where the file system has no such lists.
    The format is that of linux/posix_acl_xattr.h: a version, and entries in the order of their tags.
    By hand, as it is no shorter with pylibacl, of which PyPI has no wheels, and EL no package outside of EPEL.
    """
    mode = os.fstat(dir_fd).st_mode
    try:
        entries = [*struct.iter_unpack("<HHI", os.getxattr(dir_fd, _ACL)[4:])]
    except OSError:  # none yet: the mode says it all
        entries = [(tag, mode >> shift & 7, _NO_ID) for tag, shift in ((_OWNER, 6), (_GROUP, 3), (_OTHER, 0))]
    # Nobody else gets more than they had: what the mask took from them stays away.
    mask = next((rights for tag, rights, _ in entries if tag == _MASK), 7)
    capped = (_USER, _GROUP, _NAMED_GROUP)
    kept = [(tag, rights & mask if tag in capped else rights, id) for tag, rights, id in entries if tag != _MASK]
    ours = (_USER, 7, os.geteuid())
    kept = [*(entry for entry in kept if entry[::2] != ours[::2]), ours, (_MASK, 7, _NO_ID)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in sorted(kept))
    try:
        os.setxattr(dir_fd, _ACL, acl)
    except OSError as error:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from error


def forgo_capabilities() -> None:
    """Give up the capabilities of a service's user: they are for the claim alone, and no tool is to inherit them.

    With them, this process's entries in /proc, by which tools open disks, would also be closed to tools without them.
    """
    if os.geteuid() != 0:
        header, none = struct.pack("<Ii", _CAPABILITY_VERSION, 0), bytes(24)
        if ctypes.CDLL(None, use_errno=True).capset(header, none) != 0:
            raise OSError(ctypes.get_errno(), "capset")


_CAPABILITY_VERSION = 0x20080522  # linux/capability.h
_ACL = "system.posix_acl_access"
_NO_ID = 2**32 - 1
_OWNER, _USER, _GROUP, _NAMED_GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20


def user_name(uid: int) -> str:
    """The name of a user, or the number of one who has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
