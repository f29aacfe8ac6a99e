"""Breaks a fleet that migrates, again and again at random: python -m tests.fleet.soak [--experiments N] [--seed S]

Nodes lose their power or hang, controllers die or forget, daemons are killed, munge stops, cables are pulled, mounts
go: at the end each export has exactly one report, its disk is there once and is the source's, and no process is left.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.conftest import report_of
from tests.fleet import HEAD
from tests.fleet.migrations import Campaign

ROUND = 10  # experiments, after which everything must have come right
ROUND_SECONDS = 300.0
SLURMD_TIMEOUT = 5


class Soak:
    """A campaign under way, and what is done to it."""

    def __init__(self, campaign: Campaign, chance: random.Random) -> None:
        self.campaign = campaign
        self.fleet = campaign.fleet
        self.chance = chance
        self.daemon = ExitStack()
        self.daemon.enter_context(campaign.daemon())
        self.faults: dict[str, Callable[[], None]] = {
            "node killed": self.node_killed,
            "node paused for longer than SlurmdTimeout": self.node_paused,
            "controller killed": self.controller_killed,
            "controller's state lost": self.state_lost,
            "daemon killed": self.daemon_killed,
            "munge stopped": self.munge_stopped,
            "exports gone from a node for a while": self.unmounted,
            "network of a node cut": self.network_cut,
            "slurmd killed": self.slurmd_killed,
        }

    def node(self) -> str:
        """A node at random."""
        return self.chance.choice(self.fleet.node_names)

    def a_moment(self, longest: float) -> None:
        """Let a random time go by."""
        time.sleep(self.chance.uniform(0, longest))

    def node_killed(self) -> None:
        """It loses its power, and comes back."""
        name = self.node()
        self.fleet.kill(name)
        self.a_moment(20)
        self.fleet.boot(name)

    def node_paused(self) -> None:
        """It hangs until Slurm has given its jobs to others, and goes on with them."""
        name = self.node()
        self.fleet.pause(name)
        time.sleep(2 * SLURMD_TIMEOUT + self.chance.uniform(0, 15))
        self.fleet.go_on(name)

    def controller_killed(self) -> None:
        """And started again."""
        self.fleet.stop_daemon(HEAD, "slurmctld")
        self.a_moment(5)
        self.fleet.start_daemon(HEAD, "slurmctld")

    def state_lost(self) -> None:
        """It starts again and knows of no job."""
        self.fleet.stop_daemon(HEAD, "slurmctld")
        self.fleet.forget()
        self.fleet.start_daemon(HEAD, "slurmctld")

    def daemon_killed(self) -> None:
        """And started again, as systemd does."""
        self.campaign.kill_daemon()
        self.daemon.close()
        self.a_moment(3)
        self.daemon.enter_context(self.campaign.daemon())

    def munge_stopped(self) -> None:
        """On one host."""
        name = self.chance.choice((HEAD, *self.fleet.node_names))
        self.fleet.stop_daemon(name, "munged")
        self.a_moment(8)
        self.fleet.start_daemon(name, "munged")

    def unmounted(self) -> None:
        """Something else lies over the exports for a while, as when a share is mounted again."""
        name = self.node()
        self.fleet.shell(name, f"mount -t tmpfs tmpfs {self.fleet.exports}")
        self.a_moment(8)
        self.fleet.shell(name, f"umount -l {self.fleet.exports}")

    def network_cut(self) -> None:
        """Between a node and the controller."""
        name = self.node()
        self.fleet.cut(name)
        self.a_moment(20)
        self.fleet.cut(name, whole=True)

    def slurmd_killed(self) -> None:
        """Its jobs go on."""
        name = self.node()
        self.fleet.stop_daemon(name, "slurmd", signal.SIGKILL)
        self.a_moment(5)
        self.fleet.start_daemon(name, "slurmd")

    def do_what_is_said(self) -> None:
        """Resume the nodes that Slurm has drained, as `hosts` says: nobody but its administrator may."""
        for finding in self.campaign.ctl("hosts")["findings"]:
            if "host_drained" == finding["code"]:
                (words,) = re.findall(r"`(scontrol update nodename=\S+ state=resume)`", finding["hint"])
                self.fleet.shell(HEAD, words)

    def check(self, exports: list[Path]) -> None:
        """Wait until all is well again, and raise AssertionError if anything is not as it must be."""
        self.do_what_is_said()
        self.campaign.watch(exports, ROUND_SECONDS, pause=5.0)
        for export in exports:
            report = report_of(export)
            assert "succeeded" == report["status"], (export.name, report["error"])
        idle = dict.fromkeys(self.fleet.node_names, "idle")
        self.do_what_is_said()
        self.fleet.wait(lambda: idle == self.fleet.states(), f"all nodes are idle: {self.fleet.states()}", 120)
        for name in self.fleet.node_names:
            left = self.campaign.jobs_on(name)
            assert not left, f"processes are left on {name}: {left}"
            self.fleet.run(name, "hyper2kvmctl", "prune")
        for export in exports:
            self.campaign.check_disk(export)


def main() -> int:
    """Run the experiments; the exit status is 1 when something was lost, doubled or left."""
    parser = argparse.ArgumentParser(prog="python -m tests.fleet.soak", description=__doc__)
    parser.add_argument("--experiments", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    chance = random.Random(options.seed)
    print(f"seed {options.seed}", flush=True)
    done: Counter[str] = Counter()
    attempts: Counter[int] = Counter()
    numbers = itertools.count()
    began = time.monotonic()
    with Campaign(nodes=3, slurmd_timeout=SLURMD_TIMEOUT) as campaign:
        soak = Soak(campaign, chance)
        with soak.daemon:
            exports: list[Path] = []
            for experiment in range(1, options.experiments + 1):
                campaign.slow(chance.uniform(0, 6))
                exports += [campaign.drop(f"vm{next(numbers)}", 1 << 20) for _ in range(chance.randint(1, 3))]
                soak.a_moment(4)
                name = chance.choice([*soak.faults])
                print(f"{time.monotonic() - began:6.0f} s  {experiment:3}  {name}", flush=True)
                soak.faults[name]()
                done[name] += 1
                if experiment % ROUND == 0 or experiment == options.experiments:
                    soak.check(exports)
                    attempts.update(report_of(export)["attempts"] for export in exports)
                    campaign.clear(exports)
                    exports = []
    print(
        f"{sum(done.values())} experiments in {(time.monotonic() - began) / 60:.0f} min; nothing lost, doubled or left"
    )
    for name, count in sorted(done.items()):
        print(f"  {count:4} {name}")
    print("  attempts that an export took: " + ", ".join(f"{n}: {count}" for n, count in sorted(attempts.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
