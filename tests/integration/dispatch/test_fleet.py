"""The daemon, a real Slurm and real jobs on several hosts: who does what, who sees it, and what a dead host leaves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import report_of
from tests.fleet import HEAD
from tests.fleet.migrations import Campaign


@pytest.fixture
def campaign() -> Iterator[Campaign]:
    with Campaign(nodes=2) as campaign:
        yield campaign


def test_three_exports_on_two_nodes_are_done_once_and_every_host_sees_them(campaign: Campaign) -> None:
    exports = [campaign.drop(f"vm{n}", 1 << 20) for n in range(3)]
    campaign.slow(3)
    with campaign.daemon():
        seen = campaign.watch(exports, 120)
    for export in exports:
        report = report_of(export)
        assert ("succeeded", 1, "daemon") == (report["status"], report["attempts"], report["host"]["started_by"])
        assert HEAD == report["host"]["submitted_by"], "who tells the webhook of it"
        campaign.check_disk(export)
    workers = {report_of(export)["host"]["name"] for export in exports}
    assert {"kvm1", "kvm2"} == workers, "Slurm spreads what does not fit on one"
    assert workers == {host for hosts in seen.values() for host in hosts}, "list on the head showed who works on what"
    rows = campaign.hosts()
    assert {HEAD: "stopped", "kvm1": "runner", "kvm2": "runner"} == {name: row["state"] for name, row in rows.items()}
    assert ["idle", "idle"] == [rows[name]["slurm"] for name in ("kvm1", "kvm2")]


def test_doctor_hears_of_every_node_and_names_the_one_that_cannot(campaign: Campaign) -> None:
    (row,) = campaign.ctl("doctor", "dispatch")
    assert ("ok", "slurm: kvm1, kvm2 can do jobs") == (row["result"], row["detail"])
    campaign.fleet.shell("kvm2", f"mount -t tmpfs -o ro tmpfs {campaign.fleet.images}")
    (row,) = campaign.ctl("doctor", "dispatch")
    assert "failed" == row["result"]
    assert row["detail"].startswith(f"kvm2 cannot write to {campaign.fleet.images} (output_dir)")
    campaign.fleet.shell("kvm2", f"umount {campaign.fleet.images}; rm -f /usr/local/bin/nothing")
    campaign.fleet.shell("kvm1", "mount -t tmpfs tmpfs /usr/local/bin")
    (row,) = campaign.ctl("doctor", "dispatch")
    assert "failed" == row["result"]
    assert row["detail"].startswith("kvm1: its job ended and said")
    fleet, name = campaign.fleet, campaign.fleet.account
    fleet.shell("kvm1", f"umount /usr/local/bin; sed s/^{name}:/other:/ /etc/passwd >/run/passwd")
    fleet.shell("kvm1", "mount --bind /run/passwd /etc/passwd")
    (row,) = campaign.ctl("doctor", "dispatch")
    assert f"kvm1 runs jobs as user {fleet.uid}, which is {name} here, but calls that user other" == row["detail"]
    fleet.shell("kvm1", "umount /etc/passwd")
    fleet.stop_daemon("kvm2", "slurmd")
    fleet.wait(lambda: fleet.states()["kvm2"] not in ("idle", "unknown"), "kvm2 is missed")
    (row,) = campaign.ctl("doctor", "dispatch")
    assert ("failed", True) == (row["result"], row["detail"].startswith("Slurm gives kvm2 no job: it is "))
    assert {"host_down"} == {finding["code"] for finding in campaign.ctl("hosts")["findings"]}
    fleet.run(HEAD, "scontrol", "update", "nodename=kvm1", "state=drain", "reason=disk", account="root")
    fleet.start_daemon("kvm2", "slurmd")
    fleet.wait(lambda: fleet.states()["kvm2"] == "idle", "kvm2 is back")
    good, drained = campaign.ctl("doctor", "dispatch")
    assert ("ok", "slurm: kvm2 can do jobs") == (good["result"], good["detail"])
    assert ("warning", "Slurm gives kvm1 no job: it is drained (disk)") == (drained["result"], drained["detail"])
    fleet.run(HEAD, "scontrol", "update", "nodename=kvm2", "state=drain", "reason=disk", account="root")
    assert "no host has done the job that was sent" == campaign.ctl("doctor", "dispatch")[0]["detail"]
    fleet.run(HEAD, "scontrol", "update", "nodename=kvm[1-2]", "state=resume", account="root")


@pytest.mark.rest
@pytest.mark.parametrize("engine", ["slurm", "ssh"])
def test_six_exports_end_well_though_a_node_loses_its_power_in_the_middle(engine: str) -> None:
    """The other node does what the dead one had, and everybody could see it all the while."""
    with Campaign(nodes=2, ssh="ssh" == engine) as campaign:
        _lose_power(campaign)


def _lose_power(campaign: Campaign) -> None:
    fleet = campaign.fleet
    exports = [campaign.drop(f"vm{n}", 4 << 20) for n in range(6)]
    campaign.slow(8)
    with campaign.daemon():
        fleet.wait(lambda: campaign.running_on("kvm1"), "kvm1 converts", 60)
        lost, others = (campaign.running_on(name) for name in fleet.node_names)
        fleet.kill("kvm1")
        seen = campaign.watch(exports, 300)
        rows = campaign.hosts()
        # The engine is asked every ten seconds, and only what is not there any more is over.
        ended = f'hyper2kvmd_jobs_completed_total{{result="succeeded"}} {len(exports)}.0'
        fleet.wait(lambda: ended in campaign.metrics(), "the daemon has counted all of them", 60)
        page = campaign.metrics()
    reports = {export.name: report_of(export) for export in exports}
    assert ["succeeded"] * 6 == [report["status"] for report in reports.values()]
    assert {"kvm2"} == {reports[name]["host"]["name"] for name in lost}
    assert all(reports[name]["attempts"] >= 2 for name in lost), "the dead one had begun"
    # Once it is back, what it had begun goes by what its users are told to have run there every day.
    fleet.boot("kvm1")
    fleet.run("kvm1", "hyper2kvmctl", "prune")
    for export in exports:
        campaign.check_disk(export)
    assert [] == [export.name for export in exports if not seen[export.name] and export.name not in (*lost, *others)]
    if not campaign.ssh:
        assert "down" == rows["kvm1"]["slurm"].split()[0]
    assert 'hyper2kvmd_host_jobs{host="kvm2"}' in page
    assert "hyper2kvmd_engine_up 1.0" in page
