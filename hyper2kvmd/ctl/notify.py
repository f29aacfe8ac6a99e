"""`hyper2kvmctl notify`: sends the notifications of finished jobs; the daemon starts it by itself."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any

from hyper2kvmd import journal
from hyper2kvmd.ctl.output import print_json, refuse, refused
from hyper2kvmd.exits import EXIT_BUSY, EXIT_DONE, EXIT_FAILED
from hyper2kvmd.notify import outbox
from hyper2kvmd.queue.access import forgo_capabilities
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "notify", help="notify webhook, mail, chats and hooks of finished jobs; the daemon does this by itself"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the notifications that are pending")
    parser.set_defaults(run=notify)
    return [parser]


def notify(options: argparse.Namespace, config: Settings) -> int:
    """Send what is due; the exit status is 1 if a receiver did not take something."""
    try:
        if options.dry_run:
            return _pending(options, config)
        forgo_capabilities()
        journal.configure(config.log.level)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a hook that runs is ended with its group
        result = outbox.send(config, Tools())
    except BlockingIOError:
        print("hyper2kvmctl: another process sends them now", file=sys.stderr)
        return EXIT_BUSY
    except OSError as error:
        return refuse(*refused(error, config.work_dir))
    stands = result.standing
    if options.json:
        print_json(
            {
                "delivered": result.delivered,
                "failed": result.failed,
                "pending": stands.pending,
                "given_up": stands.given_up,
            }
        )
    elif sys.stdout.isatty() or result.delivered or result.failed:
        print(
            f"{result.delivered} delivered, {result.failed} failed;"
            f" {stands.pending} pending, {stands.given_up} given up so far"
        )
    return EXIT_FAILED if result.failed else EXIT_DONE


def _pending(options: argparse.Namespace, config: Settings) -> int:
    found = outbox.pending(config)
    if options.json:
        print_json([{"id": id, "receiver": receiver} for id, receiver in found])
    else:
        for id, receiver in found:
            print(f"{id}: {receiver}")
    return EXIT_DONE
