"""`hyper2kvmctl report --all`: every VM of a campaign at a glance, as a page with a page for each, and as a table."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hyper2kvmd.ctl.listing import STYLE, known_hosts, row_of
from hyper2kvmd.ctl.output import print_json, refuse, say
from hyper2kvmd.ctl.pages import page_of, write_page
from hyper2kvmd.ctl.spreadsheet import as_csv
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.exits import EXIT_DONE, EXIT_USAGE
from hyper2kvmd.manifest.model import slug
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.campaign import campaign_of, vm_of
from hyper2kvmd.queue.hosts import all_hosts
from hyper2kvmd.report.campaign import ATTENTION, Campaign, render_campaign
from hyper2kvmd.report.html import checked
from hyper2kvmd.settings.model import Settings

MARKER = ".hyper2kvmd-report"  # in a directory of pages, so that no other is ever replaced


def report_all(options: argparse.Namespace, config: Settings) -> int:
    """Show the campaign, or write its page or its table."""
    if [options.json, options.html == "-", options.csv == "-"].count(True) > 1:
        return refuse(EXIT_USAGE, "only one of --json, --html - and --csv - can have standard output; name a file")
    with_pages = options.html is not None and options.html != "-"
    directory = Path(f"{options.html}.vms" if with_pages else "")
    campaign, pages = gather(config, directory.name if with_pages else "")
    if with_pages:
        _write_pages(directory, pages)
        write_page(Path(options.html), render_campaign(campaign).encode())
    elif options.html == "-":
        sys.stdout.write(render_campaign(campaign))
    if options.csv == "-":
        sys.stdout.write(as_csv(campaign.rows()))
    elif options.csv is not None:
        write_page(Path(options.csv), as_csv(campaign.rows()).encode())
    if options.json:
        print_json(campaign.as_json())
    elif "-" not in (options.html, options.csv):
        written = [file for file in (options.html, options.csv) if file is not None]
        _print(campaign) if not written else say(f"wrote {', '.join(written)}: {len(campaign.vms)} VMs")
    return EXIT_DONE


def gather(config: Settings, pages_directory: str = "") -> tuple[Campaign, dict[str, str]]:
    """The campaign as of now, and the page of each VM that has a report, by its file's name.

    pages_directory: where these pages will be, relative to the campaign's; "" for no pages.
    """
    now = time.time()
    hosts = known_hosts(config)
    vms, pages = [], {}
    for export in facts.exports(config)[0]:
        row = row_of(export, config, hosts)
        if row is None:
            continue
        page = ""
        if pages_directory and row.look is not None and row.look.report_status is not None:
            file = f"{slug(export.name)}.html"
            if text := _page(export):
                pages[file], page = text, f"{pages_directory}/{file}"
        vms.append(vm_of(export, row.state, row.finding, row.look, page=page))
    return campaign_of(config.exports_dir, vms, all_hosts(config, now), now), pages


def _page(export: Path) -> str:
    """The page of one VM; "" if its report is none, which its state says."""
    if (document := facts.read_report(export)) is None:
        return ""
    try:
        return page_of(export, document, *checked(document))
    except ValidationError:
        return ""


def _write_pages(directory: Path, pages: dict[str, str]) -> None:
    """Write the pages so that the directory has all of them, or what it had before. Raise OSError, MigrationError."""
    if os.path.lexists(directory) and not (directory / MARKER).is_file():
        hint = "Move it away, or give --html another name."
        raise MigrationError(Code.OUTPUT_EXISTS, f"{directory} already exists, and this program did not make it", hint)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        (fresh / MARKER).touch()
        for name, page in pages.items():
            write_page(fresh / name, page.encode())
        fresh.chmod(0o750)  # not for everybody, like the logs that they quote
        if directory.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
            directory.rename(old / "old")
            fresh.rename(directory)
            shutil.rmtree(old)
        else:
            fresh.rename(directory)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _print(campaign: Campaign) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("WAVE", "VMS", "DONE", "NEED A PERSON", "UNDER WAY", "TO COME"):
        table.add_column(heading, overflow="fold")
    for wave, vms in campaign.waves:
        states = Counter(vm.state for vm in vms)
        person = sum(states[state] for state in ATTENTION)
        moving = states["running"] + states["retrying"]
        come = states["queued"] + states["waiting"] + states["incomplete"]
        table.add_row(Text(wave or "none"), *map(str, (len(vms), states["succeeded"], person, moving, come)))
    console = Console()
    console.print(table)
    for vm in campaign.vms:
        if vm.state in ATTENTION:
            text = f"{vm.name}: {vm.state}: {vm.reason}. {vm.remedy}"
            console.print(text, style=STYLE.get(vm.state), markup=False, highlight=False, soft_wrap=True)  # type: ignore[call-overload]
