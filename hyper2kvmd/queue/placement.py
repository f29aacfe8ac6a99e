"""Where an export may be migrated: what rules and its plan say of it, and whether this host takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from hyper2kvmd.queue.state import Facts
from hyper2kvmd.settings.model import Rule, Settings
from hyper2kvmd.settings.plan import VmPlan
from hyper2kvmd.text import size

GIB = 1 << 30


@dataclass(frozen=True)
class Placement:
    """What settings, rules and the plan say of one VM, together."""

    libvirt_uri: str
    features: tuple[str, ...] = ()
    licenses: tuple[str, ...] = ()
    priority: int = 0


def placement(settings: Settings, export: str, look: Facts) -> Placement:
    """What the rules say of the VM of an export, and then its plan.

    export: the name of its directory. look: what was found there.
    """
    found = Placement(settings.libvirt.uri)
    wanted: list[Rule | VmPlan] = [rule for rule in settings.rules if _matches(rule, export, look)]
    for rule in (*wanted, look.plan):
        found = Placement(
            rule.libvirt_uri or found.libvirt_uri,
            (*found.features, *(word for word in rule.features if word not in found.features)),
            (*found.licenses, *(word for word in rule.licenses if word not in found.licenses)),
            found.priority if rule.priority is None else rule.priority,
        )
    return found


def _matches(rule: Rule, export: str, look: Facts) -> bool:
    named = any(fnmatchcase(name, pattern) for pattern in rule.vm for name in (export, look.vm_name or export))
    return (named or not rule.vm) and not _missing(rule.tags, look.tags)


def _missing(wanted: Mapping[str, str], tags: Mapping[str, str]) -> list[str]:
    """Those of the wanted tags, as `key=pattern`, that are not there."""
    return [f"{key}={value}" for key, value in wanted.items() if key not in tags or not fnmatchcase(tags[key], value)]


def declined(look: Facts, settings: Settings, *, output_free: int | None, kvm: bool | None) -> str:
    """Why this host does not take a queued export, by `accept` in its settings; "" if it does.

    output_free: the bytes that are free in output_dir. kvm: whether KVM works here. None is not known.
    """
    accept = settings.accept
    if missing := _missing(accept.tags, look.tags):
        return f"the tags of its manifest are not {', '.join(missing)} (accept.tags)"
    if accept.kvm and kvm is not True:
        return "KVM does not work here (accept.kvm)" if kvm is False else "whether KVM works here is not known yet"
    largest = max((bytes for _, bytes in look.sizes), default=0)
    if accept.largest_disk_gib is not None and largest > accept.largest_disk_gib * GIB:
        return f"its largest file has {size(largest)} (accept.largest_disk_gib is {accept.largest_disk_gib:g})"
    total = sum(bytes for _, bytes in look.sizes)
    if accept.free_gib and output_free is not None and output_free - total < accept.free_gib * GIB:
        left = size(max(output_free - total, 0))
        return f"{left} would stay free in {settings.output_dir} (accept.free_gib is {accept.free_gib:g})"
    return ""
