"""Checks of the unit, its sandbox, and the address of the metrics."""

from __future__ import annotations

import errno
import grp
import http.client
import os
import pwd
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

from hyper2kvmd.ctl.as_service import service_of
from hyper2kvmd.ctl.doctor.diagnosis import Diagnosis, Host, handover_dirs, output_dirs
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.report.sign import SETTING, check_key
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings


def check_service(host: Host, diagnosis: Diagnosis) -> str:
    """Whether systemd will start it, and lets it get to its directories."""
    unit = host.unit
    if not unit:
        return "systemd does not run here, or does not answer"
    service = unit["Id"]
    if unit["LoadState"] != "loaded":
        diagnosis.warn(
            "service_missing",
            f"systemd cannot use {service}: {unit['LoadState']}",
            f"Copy it from systemd/ to /etc/systemd/system (masked: `systemctl unmask {service}`), run"
            f" `systemctl daemon-reload`, then `systemctl enable --now {service}`.",
        )
        return ""
    diagnosis.errors += [*_unknown_accounts(unit), *_confined(unit, host.settings)]
    if unit.get("NeedDaemonReload") == "yes":
        diagnosis.warn(
            "service_changed",
            f"{service} or one of its drop-ins was changed, and systemd has the old one",
            "Run `systemctl daemon-reload`.",
        )
    enabled, active = unit.get("UnitFileState", ""), unit.get("ActiveState", "")
    if enabled in ("disabled", "linked", "indirect"):
        diagnosis.warn(
            "service_disabled",
            f"{service} is {enabled}: after the next boot of the host nothing is migrated",
            f"Run `systemctl enable {service}`.",
        )
    if active == "failed":
        status = unit.get("ExecMainStatus")
        raise MigrationError(
            Code.TOOL_FAILED,
            f"{service} has failed ({unit.get('Result')}, exit status {status})",
            ("Fix what `hyper2kvmd check-config` reports" if status == "78" else f"See `journalctl -u {service} -n 50`")
            + f", then run `systemctl restart {service}`.",
        )
    if active != "active":
        diagnosis.warn("service_inactive", f"{service} does not run ({active})", f"Run `systemctl start {service}`.")
    return f"{service} is {enabled or 'loaded'} and {active}"


def check_signing(host: Host, diagnosis: Diagnosis) -> str:
    """Sign something, with the key that signs reports."""
    key, unit = host.settings.report.sign_key, host.unit
    if key is None:
        return "reports are not signed (report.sign_key is null)"
    home = unit.get("ProtectHome") in ("yes", "tmpfs") and is_below(key, "/home", "/root", "/run/user")
    if home or (unit.get("PrivateTmp") == "yes" and is_below(key, "/tmp", "/var/tmp")):
        raise MigrationError(
            Code.SIGN_KEY_UNUSABLE,
            f"the sandbox of {unit['Id']} hides the key {key}",
            "Move it to /etc/hyper2kvmd, and correct report.sign_key.",
            field=SETTING,
        )
    check_key(Tools(), key)
    return f"{key} signs reports"


def _unknown_accounts(unit: dict[str, str]) -> Iterator[MigrationError]:
    """The user and groups of the unit that the host does not have."""
    service = unit["Id"]
    hint = f"Create it with systemd-sysusers or by hand, or name another one in `systemctl edit {service}`."
    user = unit.get("User", "")
    groups = [unit.get("Group", ""), *unit.get("SupplementaryGroups", "").split()]
    try:
        if user and not user.isdigit():
            pwd.getpwnam(user)
    except KeyError:
        yield MigrationError(Code.TOOL_FAILED, f"{service} cannot start: there is no user {user}", hint)
    for group in groups:
        try:
            if group and not group.isdigit():
                grp.getgrnam(group)
        except KeyError:
            yield MigrationError(Code.TOOL_FAILED, f"{service} cannot start: there is no group {group}", hint)


def _confined(unit: dict[str, str], settings: Settings) -> Iterator[MigrationError]:
    """The directories of the settings that the sandbox keeps the service from, and paths that keep it from starting."""
    service, paths = unit["Id"], unit.get("ReadWritePaths", "").split()
    for path in paths:
        if path.startswith("/") and not os.path.lexists(path):
            yield MigrationError(
                Code.IO_ERROR,
                f"{service} cannot start: ReadWritePaths= names {path}, which does not exist",
                f"Create or mount it, or run `systemctl edit {service}` and write ReadWritePaths=-{path}.",
            )
    writable = [*(path.lstrip("-+") for path in paths), *made_by_systemd(unit)]
    wanted = [
        (settings.exports_dir, "exports_dir", Code.EXPORT_UNWRITABLE),
        (settings.work_dir, "work_dir", Code.IO_ERROR),
        *((directory, field, Code.OUTPUT_DENIED) for directory, field in output_dirs(settings)),
        *((directory, field, Code.IO_ERROR) for directory, field in handover_dirs(settings)),
    ]
    for directory, field, code in wanted:
        lines = []
        if unit.get("PrivateTmp") == "yes" and is_below(directory, "/tmp", "/var/tmp"):
            lines.append("PrivateTmp=no")
        if unit.get("ProtectHome") in ("yes", "tmpfs") and is_below(directory, "/home", "/root", "/run/user"):
            lines.append("ProtectHome=no")
        if unit.get("ProtectSystem") == "strict" and not is_below(directory, *writable):
            lines.append(f"ReadWritePaths={directory}")
        if lines:
            yield MigrationError(
                code,
                f"the sandbox of {service} keeps it from writing to {directory} ({field})",
                f"Run `systemctl edit {service}`, write the lines {', '.join(['[Service]', *lines])}, then"
                f" `systemctl restart {service}`.",
                field=field,
            )


def made_by_systemd(unit: dict[str, str]) -> list[str]:
    """The directories that systemd makes for the service when it starts."""
    bases = {
        "StateDirectory": "/var/lib",
        "CacheDirectory": "/var/cache",
        "RuntimeDirectory": "/run",
        "LogsDirectory": "/var/log",
    }
    return [f"{base}/{name}" for option, base in bases.items() for name in unit.get(option, "").split()]


def is_below(path: Path, *directories: str | Path) -> bool:
    """Whether a path is one of the directories or in one of them."""
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(directory)) for directory in directories)


def check_metrics(host: Host, diagnosis: Diagnosis) -> str:
    """Whether the address is free, or it is the daemon that has it."""
    listen = host.settings.metrics.listen
    if not listen:
        return "off"
    name, _, port = listen.rpartition(":")
    name = name.strip("[]")
    try:
        family, kind, _, _, address = socket.getaddrinfo(name, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
    except OSError as error:
        tls = host.settings.metrics.tls_server_config.cert_file
        kept = Path("/run/credentials", service_of(host.settings_file))  # by systemd, what it hands over
        taken = error.errno == errno.EADDRINUSE
        if taken and (_has(name, int(port), kept / tls) if tls else _is_ours(name, int(port))):
            return f"{listen}, served by hyper2kvmd"
        raise MigrationError(
            Code.IO_ERROR,
            f"metrics.listen: {listen} cannot be used: {error.strerror or error}",
            f"`ss -ltnp` shows who has port {port}. Set metrics.listen to another address, or to an empty one.",
            field="metrics.listen",
        ) from None
    return f"{listen} is free"


def _is_ours(host: str, port: int) -> bool:
    """Whether it is hyper2kvmd that serves metrics there."""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", "/metrics")
        return b"hyper2kvmd_build_info" in connection.getresponse().read(65536)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _has(host: str, port: int, certificate: Path) -> bool:
    """Whether it is who has our certificate that serves there; what it serves may be for those that have one, too."""
    try:
        ours = re.search("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", certificate.read_text(), re.DOTALL)
        return ours is not None and ssl.PEM_cert_to_DER_cert(ours[0]) == ssl.PEM_cert_to_DER_cert(
            ssl.get_server_certificate((host, port), timeout=2)
        )
    except (OSError, ValueError):
        return False
