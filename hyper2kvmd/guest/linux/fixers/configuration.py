"""What the manifest's `configuration` asks for in the guest: its name, users, services and addresses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Command, Edit
from hyper2kvmd.guest.linux.fixers import FixPlan, View, addresses
from hyper2kvmd.manifest.model import Configuration, Services, User
from hyper2kvmd.text import printable

FIXER = "configuration"
HOSTNAME = "/etc/hostname"
HOSTS = "/etc/hosts"
SYSCONFIG_NETWORK = "/etc/sysconfig/network"
SUDOERS_D = "/etc/sudoers.d"
UNITS = "/etc/systemd/system"
_HOME = re.compile(r"/[!-~]{0,200}")  # what a path is that libguestfs and a shell can be given


def plan(view: View, configuration: Configuration) -> FixPlan:
    """Plan what is asked for and is not so yet."""
    plans = [
        _hostname(view, configuration),
        _users(view, configuration),
        _services(view, configuration.services),
        addresses.plan(view, configuration.interfaces),
    ]
    return FixPlan.joined(plans)


# The name -------------------------------------------------------------------------------------------------


def _hostname(view: View, configuration: Configuration) -> FixPlan:
    new, edits = configuration.hostname, []
    if new is not None:
        text = view.read(HOSTNAME)
        if text is None or text.strip() != new:
            edits.append(_edit(HOSTNAME, text, f"{new}\n", f"the host name is {new}"))
        if (text := view.read(SYSCONFIG_NETWORK)) is not None:
            # That of Red Hat's systems before systemd; elsewhere the line is not there.
            edits.append(_edit(SYSCONFIG_NETWORK, text, rewrite_sysconfig(text, new), f"the host name is {new}"))
    text = view.read(HOSTS)
    after = text or ""
    if new is not None:
        after = rename_host(after, view.inspection.hostname, full_name(new, configuration.domain))
    after = add_hosts(after, configuration.hosts)
    if after:
        edits.append(_edit(HOSTS, text, after, "the host names of the manifest"))
    return FixPlan(tuple(edit for edit in edits if edit is not None))


def _edit(path: str, before: str | None, after: str, summary: str, *, mode: int = 0o644) -> Edit | None:
    return None if before == after else Edit(FIXER, path, before, after, summary, mode=mode)


def full_name(hostname: str, domain: str | None) -> str:
    """The host name with the domain, if there is one."""
    return f"{hostname}.{domain}" if domain else hostname


def rewrite_sysconfig(text: str, hostname: str) -> str:
    """/etc/sysconfig/network with the value of HOSTNAME replaced, if it is there, and every other byte as it was."""
    return re.sub(r"(?m)^([ \t]*HOSTNAME=)[^\r\n]*", rf"\g<1>{hostname}", text)


def rename_host(text: str, old: str, new: str) -> str:
    """/etc/hosts with the host's old name replaced wherever it stands, and the new one added where it is missing.

    `old` and `new` may have a domain; the new name without one takes that of the old. Every other byte stays.
    """
    old_label, new_label = old.partition(".")[0], new.partition(".")[0]

    def renamed(found: re.Match[str]) -> str:
        label, dot, domain = found[0].partition(".")
        if label.lower() != old_label.lower():
            return found[0]
        return (new if "." in new else f"{new_label}.{domain}") if dot else new_label

    lines = text.split("\n")
    for number, line in enumerate(lines):
        content, hash_, comment = line.partition("#")
        # What is called localhost, or cannot be told, has no name of its own that could be replaced.
        if old_label.lower() in ("", "localhost", "unknown", new_label.lower()) or not content.strip():
            continue
        address, *names = content.split()
        # Another host may have the same label in another domain.
        if address.startswith("127.") or address == "::1" or {old, old_label} & set(names):
            at = content.index(address) + len(address)
            lines[number] = content[:at] + re.sub(r"\S+", renamed, content[at:]) + hash_ + comment
    if any(new in names for _, names in _entries("\n".join(lines))):
        return "\n".join(lines)
    at = next((n for n, line in enumerate(lines) if line.split()[:1] == ["127.0.0.1"]), -1) + 1
    both = f"{new} {new_label}" if new != new_label else new
    return "\n".join([*lines[:at], f"127.0.1.1\t{both}", *lines[at:]])


def add_hosts(text: str, hosts: Mapping[str, Sequence[str]]) -> str:
    """/etc/hosts with the names of each address that it does not have yet, one line for each address, at the end."""
    present = {(address, name) for address, names in _entries(text) for name in names}
    lines = []
    for address, names in hosts.items():
        if missing := [name for name in names if (address, name) not in present]:
            lines.append(f"{address}\t{' '.join(missing)}\n")
    if not lines:
        return text
    return text + ("\n" if text and not text.endswith("\n") else "") + "".join(lines)


def _entries(text: str) -> Iterable[tuple[str, list[str]]]:
    """The lines of /etc/hosts: an address, and its names."""
    for line in text.split("\n"):
        if words := line.partition("#")[0].split():
            yield words[0], words[1:]


# Users ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """A user as /etc/passwd, /etc/shadow and /etc/group have it. `password` is the field of /etc/shadow."""

    name: str
    uid: str
    comment: str
    home: str
    shell: str
    password: str
    expires: str
    groups: frozenset[str]


@dataclass(frozen=True)
class Accounts:
    """All users by name, and the names of all groups. A user's groups include the primary one."""

    users: Mapping[str, Account]
    groups: frozenset[str]


def read_accounts(passwd: str, shadow: str, group: str) -> Accounts:
    """The accounts in the three files; lines that are broken are passed over."""
    rows = [row for line in group.split("\n") if len(row := line.rstrip("\r").split(":")) == 4]
    secrets = {row[0]: row for line in shadow.split("\n") if len(row := line.rstrip("\r").split(":")) == 9}
    users: dict[str, Account] = {}
    for line in passwd.split("\n"):
        fields = line.rstrip("\r").split(":")
        if len(fields) != 7 or not fields[0]:
            continue
        name, password, uid, gid, comment, home, shell = fields
        secret = secrets.get(name, [name, password, "", "", "", "", "", "", ""])
        groups = frozenset(title for title, _, number, names in rows if number == gid or name in names.split(","))
        users.setdefault(name, Account(name, uid, comment, home, shell, secret[1], secret[7], groups))
    return Accounts(users, frozenset(row[0] for row in rows))


def _users(view: View, configuration: Configuration) -> FixPlan:
    if not configuration.users and not configuration.disable_users:
        return FixPlan()
    accounts = read_accounts(*(view.read(path) or "" for path in ("/etc/passwd", "/etc/shadow", "/etc/group")))
    edits: list[Edit] = []
    commands: list[Command] = []
    warnings: list[Finding] = []
    for user in configuration.users:
        account = accounts.users.get(user.name)
        made = change_user(user, account) if account else make_user(user, accounts)
        home = account.home if account else user.home or f"/home/{user.name}"
        commands += [*made, *_ssh_keys(view, user, home, is_new=account is None, warnings=warnings)]
        warnings += differences(user, accounts)
        if user.sudo and not view.g.is_dir(SUDOERS_D):
            message = f"the guest has no {SUDOERS_D}, so {user.name} gets no right to use sudo"
            warnings.append(_warning("sudo_missing", message, "Install sudo in the guest.", "users"))
        elif user.sudo:
            path = f"{SUDOERS_D}/hyper2kvm-{user.name}"
            rule = f"{user.name} ALL=(ALL) {user.sudo}\n"
            edit = _edit(path, view.read(path), rule, f"{user.name} may use sudo", mode=0o440)
            edits += [edit] if edit else []
    for name in configuration.disable_users:
        account = accounts.users.get(name)
        if account is None:
            message = f"{name} is to be disabled, and the guest has no such user"
            warnings.append(_warning("user_unknown", message, "Correct the name, or delete it.", "users.disable_users"))
        elif account.expires != "1" or not account.password.startswith("!"):
            # A lock alone would still let in whoever has a key.
            command = f"usermod --lock --expiredate 1 {quote(name)}"
            commands.append(Command(FIXER, "/etc/shadow", command, f"the user {name} is disabled"))
    return FixPlan(tuple(edits), commands=tuple(commands), warnings=tuple(warnings))


def make_user(user: User, accounts: Accounts) -> tuple[Command, ...]:
    """The command that makes a user."""
    uid_is_free = str(user.uid) not in {account.uid for account in accounts.users.values()}
    home = user.home or f"/home/{user.name}"
    options = [
        *["--create-home", "--home-dir", home, "--shell", user.shell or "/bin/bash"],
        *(["--uid", str(user.uid)] if user.uid is not None and uid_is_free else []),
        *(["--comment", user.comment] if user.comment else []),
        *(["--gid", user.name] if user.name in (*accounts.groups, *user.groups) else []),
        *(["--groups", ",".join(user.groups)] if user.groups else []),
    ]
    missing = [group for group in user.groups if group not in accounts.groups]
    password = _desired_password(user, "!")
    summary = f"the user {user.name} is made"
    return (
        _account_command("useradd", options, password if password != "!" else None, user.name, missing, home, summary),
    )


def change_user(user: User, account: Account) -> tuple[Command, ...]:
    """The command that gives a user what is asked for and is not so yet, if there is any such thing."""
    password = _desired_password(user, account.password)
    missing = [group for group in user.groups if group not in account.groups]
    options = [
        *(["--comment", user.comment] if user.comment is not None and user.comment != account.comment else []),
        *(["--shell", user.shell] if user.shell is not None and user.shell != account.shell else []),
        *(["--append", "--groups", ",".join(missing)] if missing else []),
    ]
    changed = password if password != account.password else None
    if not options and changed is None:
        return ()
    summary = f"the user {user.name} is changed"
    return (_account_command("usermod", options, changed, user.name, missing, "/etc/passwd", summary),)


def _account_command(
    program: str,
    options: Sequence[str],
    password: str | None,
    name: str,
    groups: Sequence[str],
    path: str,
    summary: str,
) -> Command:
    """useradd or usermod, after the groups that may be missing; the report does not show the password's hash."""
    before = "".join(f"groupadd --force {quote(group)} && " for group in groups)
    words = " ".join([program, *map(quote, options)])
    secret, hidden = (f" --password {quote(password)}", " --password [hidden]") if password is not None else ("", "")
    command, shown = (f"{before}{words}{part} {quote(name)}" for part in (secret, hidden))
    return Command(FIXER, path, command, summary, shown=shown if password is not None else "")


def _desired_password(user: User, current: str) -> str:
    """What /etc/shadow is to hold. A lock is a '!' before the hash, as usermod makes it."""
    password = user.password_hash.get_secret_value() if user.password_hash else current
    return f"!{password}" if user.lock and not password.startswith("!") else password


def differences(user: User, accounts: Accounts) -> tuple[Finding, ...]:
    """What is asked for and is not done: a number or a home that files elsewhere depend on is never changed."""
    account = accounts.users.get(user.name)
    if account is None:
        owner = next((other.name for other in accounts.users.values() if other.uid == str(user.uid)), None)
        if owner is None:
            return ()
        message = f"the number {user.uid} is that of {printable(owner)}, so {user.name} gets another one"
        return (_warning("user_differs", message, "Choose a free uid, or leave it out.", "users"),)
    return tuple(
        _warning(
            "user_differs",
            f"the guest's user {user.name} keeps {what} {printable(found)}, the manifest asks for {asked}",
            "Change it in the guest, where its files can be moved or given to it, or leave it out.",
            "users",
        )
        for what, found, asked in (("the number", account.uid, user.uid), ("the home", account.home, user.home))
        if asked is not None and str(asked) != found
    )


def _ssh_keys(view: View, user: User, home: str, *, is_new: bool, warnings: list[Finding]) -> tuple[Command, ...]:
    """A command that adds the keys that are missing; it is run as root, so no link of the user's is followed."""
    if not user.ssh_keys:
        return ()
    directory = f"{home}/.ssh"
    path = f"{directory}/authorized_keys"
    if not _HOME.fullmatch(home) or not (is_new or view.g.is_dir(home)):
        message = f"the keys of {user.name} are not written: there is no directory {printable(home)}"
        warnings.append(_warning("ssh_keys", message, "Make the user's home in the guest.", "users"))
        return ()
    if links := [link for link in (home, directory, path) if view.g.is_symlink(link)]:
        message = f"the keys of {user.name} are not written: {printable(links[0])} is a symbolic link"
        warnings.append(_warning("ssh_keys", message, "Write them in the guest.", "users"))
        return ()
    text = view.read(path) or ""
    present = {tuple(line.split()[:2]) for line in text.split("\n")}
    missing = [key for key in user.ssh_keys if tuple(key.split()[:2]) not in present]
    if not missing:
        return ()
    lines = [*([""] if text and not text.endswith("\n") else []), *missing]
    owner = quote(f"{user.name}:")
    command = (
        f"umask 077 && mkdir -p {quote(directory)} && printf '%s\\n' {' '.join(map(quote, lines))} >> {quote(path)}"
        f" && chown {owner} {quote(directory)} {quote(path)}"
    )
    return (Command(FIXER, directory, command, f"{len(missing)} SSH keys for {user.name}"),)


# Services -------------------------------------------------------------------------------------------------


def _services(view: View, services: Services) -> FixPlan:
    wanted = [(verb, unit) for verb in ("enable", "disable", "mask") for unit in getattr(services, verb)]
    if not wanted:
        return FixPlan()
    if not any(view.g.is_file(path, followsymlinks=True) for path in ("/usr/bin/systemctl", "/bin/systemctl")):
        message = f"the guest has no systemd, so {', '.join(unit for _, unit in wanted)} are left as they are"
        hint = "Configure them in the guest."
        return FixPlan(warnings=(_warning("services_unsupported", message, hint, "services"),))
    commands: list[Command] = []
    warnings: list[Finding] = []
    for verb, unit in wanted:
        # It prints a word and fails for most of them.
        state = (
            view.g.sh(f"SYSTEMD_OFFLINE=1 systemctl is-enabled {quote(unit)} 2>/dev/null || :")
            .strip()
            .rpartition("\n")[2]
        )
        change = change_unit(verb, unit, state)
        if isinstance(change, Finding):
            warnings.append(change)
        elif verb == "mask" and change and view.g.is_file(f"{UNITS}/{unit}"):
            message = f"{unit} is not masked: the administrator's own {UNITS}/{unit} is in the place of the mask"
            warnings.append(_warning("service_kept", message, "List it under disable instead.", "services.mask"))
        elif change:
            commands.append(change)
    return FixPlan(commands=tuple(commands), warnings=tuple(warnings))


def change_unit(verb: str, unit: str, state: str) -> Command | Finding | None:
    """What makes a unit be as it should: verb is enable, disable or mask, `state` what `is-enabled` says.

    None if it is so already, a Finding if it cannot be.
    """
    if state in ("", "not-found"):
        message = f"the guest has no unit {unit} to {verb}"
        return _warning("service_unknown", message, "Correct the name, or delete it.", f"services.{verb}")
    if verb == "enable" and state in ("static", "transient", "bad"):
        message = f"the guest's unit {unit} is {state} and cannot be enabled"
        return _warning("service_kept", message, "Enable the unit that starts it.", "services.enable")
    done = {
        "enable": ("enabled", "alias", "generated", "indirect"),
        "disable": ("disabled", "static", "alias", "generated", "indirect", "masked", "transient", "bad"),
        "mask": ("masked",),
    }
    if state in done[verb]:
        return None
    words = f"systemctl {verb} {quote(unit)}"
    if verb == "enable" and state.startswith("masked"):
        words = f"systemctl unmask {quote(unit)} && {words}"
    return Command(
        FIXER, UNITS, f"export SYSTEMD_OFFLINE=1; {words}", f"{verb} {unit}", evidence=f"it was {printable(state)}"
    )


def _warning(code: str, message: str, hint: str, field: str) -> Finding:
    return Finding(code, message, hint, f"configuration.{field}")
