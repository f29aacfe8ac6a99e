"""What the rules say of a VM, and which exports a host takes."""

from __future__ import annotations

from typing import Any

import pytest

from hyper2kvmd.queue.placement import GIB, Placement, declined, placement
from hyper2kvmd.queue.state import Facts
from hyper2kvmd.settings.model import Settings


def facts(**changes: Any) -> Facts:
    shape: dict[str, Any] = {"vm_name": "Web 01", "tags": {"site": "berlin", "env": "test"}, **changes}
    return Facts("manifest.json", sizes=(("a.vmdk", 3 * GIB), ("b.vmdk", 2 * GIB)), **shape)


def settings(**shape: Any) -> Settings:
    return Settings.model_validate(shape)


def by_rules(*rules: dict[str, Any], **changes: Any) -> Placement:
    return placement(settings(rules=[*rules]), "web01", facts(**changes))


@pytest.mark.parametrize(
    ("rule", "meant"),
    [
        ({}, True),
        ({"vm": ["web*"]}, True),
        ({"vm": ["db*", "Web ??"]}, True),
        ({"vm": ["db*"]}, False),
        ({"vm": ["WEB01"]}, False),
        ({"tags": {"site": "berlin"}}, True),
        ({"tags": {"site": "b*", "env": "*"}}, True),
        ({"tags": {"site": "berlin", "env": "production"}}, False),
        ({"tags": {"owner": "*"}}, False),
        ({"vm": ["web01"], "tags": {"site": "bonn"}}, False),
    ],
)
def test_a_rule_is_for_the_vms_that_it_names_by_name_and_by_tags(rule: dict[str, Any], meant: bool) -> None:
    assert (7 if meant else 0) == by_rules({**rule, "priority": 7}).priority


def test_the_last_rule_counts_and_features_and_licences_add_up() -> None:
    found = by_rules(
        {"features": ["kvm", "fast"], "licenses": ["filer1:1"], "priority": 5, "libvirt_uri": "qemu+ssh://a/system"},
        {"vm": ["web01"], "features": ["fast", "berlin"], "priority": -3},
        {"vm": ["other"], "libvirt_uri": "qemu+ssh://b/system"},
    )
    assert Placement("qemu+ssh://a/system", ("kvm", "fast", "berlin"), ("filer1:1",), -3) == found


def test_an_export_whose_manifest_cannot_be_read_has_its_directorys_name_and_no_tags() -> None:
    assert 1 == by_rules({"vm": ["web01"], "priority": 1}, vm_name=None, tags={}).priority
    assert 0 == by_rules({"tags": {"site": "*"}, "priority": 1}, vm_name=None, tags={}).priority


def why(accept: dict[str, Any], *, free: int | None = 100 * GIB, kvm: bool | None = True) -> str:
    return declined(facts(), settings(accept=accept), output_free=free, kvm=kvm)


def test_a_host_takes_everything_by_default() -> None:
    assert "" == why({}, free=0, kvm=False)
    assert "" == why({}, free=None, kvm=None)


def test_a_host_says_what_it_does_not_take_with_the_value_and_the_setting() -> None:
    assert "its largest file has 3 GiB (accept.largest_disk_gib is 2.5)" == why({"largest_disk_gib": 2.5})
    assert "" == why({"largest_disk_gib": 3})
    assert "the tags of its manifest are not site=bonn (accept.tags)" == why({"tags": {"site": "bonn", "env": "t*"}})
    assert "KVM does not work here (accept.kvm)" == why({"kvm": True}, kvm=False)
    assert "" == why({"kvm": True})


def test_space_counts_as_it_will_be_after_the_job() -> None:
    assert "" == why({"free_gib": 4}, free=9 * GIB)
    text = why({"free_gib": 4}, free=8 * GIB)
    assert text.startswith("3 GiB would stay free in ")
    assert text.endswith("(accept.free_gib is 4)")


def test_what_is_not_known_is_waited_for_and_not_guessed() -> None:
    assert "whether KVM works here is not known yet" == why({"kvm": True}, kvm=None)
    assert "" == why({"free_gib": 4}, free=None), "the job itself finds out, and waits for space"
