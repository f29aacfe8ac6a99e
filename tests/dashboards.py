"""The Grafana dashboards: every panel with its queries, and the JSON that Grafana reads; `make docs` writes it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hyper2kvmd.job.events import STAGES

Json = dict[str, Any]

SCHEMA = 39  # Grafana 10.4; later ones read it as well
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
FLEET, HOST = "hyper2kvmd-fleet", "hyper2kvmd-host"
GREEN, BLUE, YELLOW, ORANGE, RED, PURPLE, GREY = (
    *("#56a64b", "#3274d9", "#e0b400", "#ff780a", "#e02f44", "#a352cc", "#8e8e8e"),
)
COLORS = {
    "incomplete": "#c7c7c7",
    "waiting": "#b7a26a",
    "queued": YELLOW,
    "running": BLUE,
    "retrying": "#ffb357",
    "interrupted": "#c0d8ff",
    "blocked": ORANGE,
    "succeeded": GREEN,
    "failed": RED,
    "crashed": "#8f1d2b",
    "rejected": PURPLE,
    "cancelled": GREY,
    "unclaimed": "#d683ce",
    "unreported": "#705da0",
}
CHOSEN = 'job=~"$job", instance=~"$instance"'
JOBS_COUNTED = "succeeded|failed|blocked|rejected"
# What is counted is shown in bars, one for each interval, and few jobs end in less than this.
BAR_INTERVAL = "5m"


def of(metric: str, **labels: str) -> str:
    """The series of a metric of the hosts that are chosen, with these labels; `a|b` is either of two values."""
    name = metric if metric == "up" else f"hyper2kvmd_{metric}"
    matchers = [f'{label}{"=~" if "|" in value else "="}"{value}"' for label, value in labels.items()]
    return f"{name}{{{', '.join([CHOSEN, *matchers])}}}"


def rate(metric: str, **labels: str) -> str:
    """How fast a counter grows."""
    return f"rate({of(metric, **labels)}[$__rate_interval])"


def increase(metric: str, interval: str = "$__range", **labels: str) -> str:
    """How much a counter has grown: in all of the time that is shown, or in one interval of it."""
    return f"increase({of(metric, **labels)}[{interval}])"


def in_slot(value: str) -> str:
    """What is measured of a slot, with the labels of the job in it; nothing for a slot without a job."""
    job = of("job_info")
    # Prometheus has a label `job` of its own, and calls the one that we export by another name.
    return f"{value} * on (job, instance, slot) group_left (vm, attempt, tags, exported_job) {job}"


# Panels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a table: the label or query (`Value #A`) that it shows, its title, its unit, its width in pixels."""

    field: str
    title: str
    unit: str = "string"
    width: int | None = None


def _panel(
    kind: str, title: str, about: str, unit: str, queries: Sequence[tuple[str, str]], size: tuple[int, int], **more: Any
) -> Json:
    """A panel of `size` columns and rows of the grid; `queries` are expressions with the legends of their series."""
    targets = [
        {
            "datasource": DATASOURCE,
            "refId": chr(ord("A") + number),
            "expr": expression,
            "legendFormat": legend,
            **({"instant": True, "range": False, "format": "table"} if kind == "table" else {}),
            **({"instant": True, "range": False} if kind in ("stat", "bargauge") else {}),
        }
        for number, (expression, legend) in enumerate(queries)
    ]
    defaults: Json = {"unit": unit, "noValue": "–", **more.pop("defaults", {})}
    width, height = size
    return {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": DATASOURCE,
        "gridPos": {"w": width, "h": height},
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": more.pop("overrides", [])},
        **more,
    }


def _steps(*steps: tuple[float | None, str]) -> Json:
    """Thresholds: from which value on there is which colour."""
    return {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in steps]}


def _words(**words: tuple[str, str]) -> list[Json]:
    """What stands for the values 0 and 1, in which colour, and a dash for what is not known."""
    values = {"no": "0", "yes": "1"}
    options = {values[name]: {"text": text, "color": color} for name, (text, color) in words.items()}
    return [
        {"type": "value", "options": options},
        {"type": "special", "options": {"match": "nan", "result": {"text": "–", "color": GREY}}},
    ]


def _colors(names: dict[str, str]) -> list[Json]:
    return [
        {
            "matcher": {"id": "byName", "options": name},
            "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": color}}],
        }
        for name, color in names.items()
    ]


def stat(
    title: str, about: str, unit: str, *queries: tuple[str, str], steps: Json | None = None, width: int = 4, **more: Any
) -> Json:
    """Numbers as they are now."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "textMode": "value_and_name" if len(queries) > 1 else "value",
        "orientation": "auto",
    }
    height = more.pop("height", 4)
    defaults = {"thresholds": steps or _steps((None, BLUE)), "decimals": 0, **more.pop("defaults", {})}
    return _panel("stat", title, about, unit, queries, (width, height), options=options, defaults=defaults, **more)


def lines(title: str, about: str, unit: str, *queries: tuple[str, str], width: int = 12, **more: Any) -> Json:
    """Values over time."""
    return _over_time(title, about, unit, queries, width, {"fillOpacity": 0}, more)


def areas(title: str, about: str, unit: str, *queries: tuple[str, str], width: int = 12, **more: Any) -> Json:
    """Values over time, one on top of the other."""
    custom = {"fillOpacity": 60, "stacking": {"mode": "normal", "group": "A"}}
    return _over_time(title, about, unit, queries, width, custom, more)


def bars(title: str, about: str, unit: str, *queries: tuple[str, str], width: int = 12, **more: Any) -> Json:
    """What happened in each interval."""
    custom = {"drawStyle": "bars", "fillOpacity": 80, "stacking": {"mode": "normal", "group": "A"}}
    return _over_time(title, about, unit, queries, width, custom, {"interval": BAR_INTERVAL, **more})


def _over_time(
    title: str, about: str, unit: str, queries: Sequence[tuple[str, str]], width: int, custom: Json, more: Json
) -> Json:
    style = {"drawStyle": "line", "lineWidth": 1, "showPoints": "never", "spanNulls": False, **custom}
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    defaults = {"custom": style, "min": 0, **more.pop("defaults", {})}
    return _panel("timeseries", title, about, unit, queries, (width, 8), options=options, defaults=defaults, **more)


def gauges(title: str, about: str, unit: str, *queries: tuple[str, str], width: int = 8) -> Json:
    """Numbers as bars beside each other, to be compared."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "orientation": "horizontal",
        "displayMode": "basic",
        "showUnfilled": True,
    }
    defaults = {"thresholds": _steps((None, BLUE)), "min": 0}
    return _panel("bargauge", title, about, unit, queries, (width, 8), options=options, defaults=defaults)


def timeline(title: str, about: str, *queries: tuple[str, str], no: str, yes: str, width: int = 12) -> Json:
    """What held when: 0 and 1 over time, in words."""
    options = {
        "showValue": "never",
        "rowHeight": 0.8,
        "mergeValues": True,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
    }
    defaults = {"mappings": _words(no=(no, RED), yes=(yes, GREEN)), "custom": {"fillOpacity": 80, "lineWidth": 0}}
    return _panel("state-timeline", title, about, "none", queries, (width, 8), options=options, defaults=defaults)


def table(
    title: str,
    about: str,
    columns: Sequence[Column],
    *queries: str,
    sort: str = "",
    overrides: Sequence[Json] = (),
    **more: Any,
) -> Json:
    """A row for each set of labels; the labels that are no column are left out."""
    order = {column.field: number for number, column in enumerate(columns)}
    hidden = (
        "Time",
        "job",
        "instance",
        "slot",
        *(f"Value #{chr(ord('A') + number)}" for number in range(len(queries))),
    )
    transformations = [
        {"id": "merge", "options": {}},
        {
            "id": "organize",
            "options": {
                "excludeByName": {name: True for name in hidden if name not in order},
                "indexByName": order,
                "renameByName": {column.field: column.title for column in columns},
            },
        },
    ]
    units = [
        {
            "matcher": {"id": "byName", "options": column.title},
            "properties": [
                {"id": "unit", "value": column.unit},
                *([{"id": "custom.width", "value": column.width}] if column.width else []),
            ],
        }
        for column in columns
    ]
    options = {"showHeader": True, "sortBy": [{"displayName": sort, "desc": True}] if sort else []}
    nothing = {"type": "special", "options": {"match": "nan", "result": {"text": "–"}}}
    return _panel(
        *("table", title, about, "none", [(query, "") for query in queries]),
        (more["width"], more["height"]),
        options=options,
        defaults={"decimals": more.get("decimals", 0), "mappings": [nothing]},
        overrides=[*units, *overrides],
        transformations=transformations,
    )


def _column(title: str, *properties: tuple[str, Any]) -> Json:
    return {
        "matcher": {"id": "byName", "options": title},
        "properties": [{"id": name, "value": value} for name, value in properties],
    }


# What both dashboards show ------------------------------------------------------------------------------------


def _now() -> list[Json]:
    waiting = f"time() - {of('oldest_waiting_job_timestamp_seconds')}"
    return [
        stat(
            "Jobs that run",
            "How many VMs are being migrated at this moment. The workers setting is the most that can be.",
            "none",
            (f"sum({of('workers_busy')})", ""),
        ),
        stat(
            "Queued",
            "Exports that could be started if there were a worker for them.",
            "none",
            (f"sum({of('jobs', state='queued')})", ""),
        ),
        stat(
            "Need a person",
            "Exports that are blocked, failed or rejected. `hyper2kvmctl list` says which, and why.",
            "none",
            (f"sum({of('jobs', state='blocked|failed|rejected')})", ""),
            steps=_steps((None, GREEN), (1, ORANGE)),
        ),
        stat(
            "Longest wait",
            "For how long the export has been queued that has waited longest.",
            "s",
            # NaN, if nothing waits, is not greater than anything.
            (f"max(({waiting}) > 0) or vector(0)", ""),
            steps=_steps((None, GREEN), (3600, YELLOW), (4 * 3600, RED)),
        ),
        stat(
            "Time left",
            "How long all jobs that have not begun will take with these workers, by the estimates of one host.",
            "s",
            (f"max({of('estimated_seconds')}) / sum({of('workers')})", ""),
        ),
        stat(
            "Success rate",
            "Of the jobs that ended in the time that is shown, how many succeeded. What was cancelled, stopped, or is"
            " tried again does not count.",
            "percentunit",
            (
                f"sum({increase('jobs_completed_total', result='succeeded')})"
                f" / sum({increase('jobs_completed_total', result=JOBS_COUNTED)})",
                "",
            ),
            steps=_steps((None, RED), (0.5, ORANGE), (0.9, GREEN)),
            defaults={"mappings": _words()[1:]},
        ),
    ]


def _work() -> list[Json]:
    return [
        areas(
            "Exports by state",
            "Is the batch getting done? What ends as succeeded stays there for as long as its directory does.",
            "none",
            (f"sum by (state) ({of('jobs')}) > 0", "{{state}}"),
            overrides=_colors(COLORS),
        ),
        bars(
            "Jobs that ended",
            "How many jobs ended in each interval, by how. One that is tried again ends several times.",
            "none",
            (f"sum by (result) ({increase('jobs_completed_total', interval='$__interval')}) > 0", "{{result}}"),
            overrides=_colors(COLORS),
        ),
        table(
            "Failures by reason",
            "Why jobs ended with an error, in the time that is shown; each reason is in the list of error codes.",
            (Column("reason", "Reason"), Column("Value", "Jobs", "none", 90)),
            f"round(sum by (reason) ({increase('job_failures_total')})) > 0",
            sort="Jobs",
            width=8,
            height=8,
        ),
    ]


# The two of them ----------------------------------------------------------------------------------------------


def fleet() -> Json:
    """All hosts: how the whole migration goes, and which host needs to be looked at."""
    not_ready = f"{of('up')} == 0 or min by (job, instance) ({of('ready')}) == 0"
    hosts = (
        Column("instance", "Host"),
        Column("Value #A", "State", "none", 110),
        Column("Value #B", "Run", "none", 80),
        Column("Value #C", "Workers", "none", 80),
        Column("Value #D", "Queued", "none", 80),
        Column("Value #E", "Need a person", "none", 120),
        Column("Value #F", "Free in output_dir", "bytes", 150),
        Column("Value #G", "Free in work_dir", "bytes", 150),
        Column("version", "Version", "string", 110),
        Column("python", "Python", "string", 90),
    )
    everywhere = (
        Column("vm", "VM"),
        Column("host", "Host"),
        Column("stage", "Stage", "string", 90),
        Column("Value #A", "Progress", "percentunit", 160),
        Column("Value #B", "Rate", "binBps", 100),
        Column("Value #C", "Left in stage", "s", 100),
    )
    to_host = {
        "title": "Look at this host",
        "url": f"/d/{HOST}?${{datasource:queryparam}}&${{job:queryparam}}&var-instance=${{__value.raw}}"
        "&${__url_time_range}",
    }
    by_host = "sum by (instance) "
    rows = {
        "Now": [
            stat(
                "Hosts not ready",
                "Hosts that do not answer, or on which a check of /readyz fails. The table below says which.",
                "none",
                (f"count({not_ready}) or vector(0)", ""),
                steps=_steps((None, GREEN), (1, RED)),
            ),
            *_now(),
        ],
        "Work": [
            *_work(),
            lines(
                "Throughput by host",
                "How fast disks are converted, in bytes of the source. A host that lags has slow storage or few jobs.",
                "binBps",
                (f"{by_host}({rate('bytes_read_total', stage='convert')})", "{{instance}}"),
                width=8,
            ),
            lines(
                "Longest wait by host",
                "Which host has a queue that is not worked off? Give it more workers, or other hosts its exports.",
                "s",
                (f"max by (instance) (time() - {of('oldest_waiting_job_timestamp_seconds')}) > 0", "{{instance}}"),
                width=8,
            ),
        ],
        "Hosts": [
            table(
                "Hosts",
                "Every host with its state, its work, its space and its version. Its name leads to its own dashboard.",
                hosts,
                f"min by (instance) ({of('ready')}) or min by (instance) ({of('up')})",
                f"{by_host}({of('workers_busy')})",
                f"{by_host}({of('workers')})",
                f"{by_host}({of('jobs', state='queued')})",
                f"{by_host}({of('jobs', state='blocked|failed|rejected')})",
                f"{by_host}({of('destination_free_bytes', pool='output')})",
                f"{by_host}({of('destination_free_bytes', pool='work')})",
                f"max by (instance, version, python) ({of('build_info')})",
                overrides=[
                    _column("Host", ("links", [to_host])),
                    _column(
                        "State",
                        ("mappings", _words(no=("not ready", RED), yes=("ready", GREEN))),
                        ("custom.cellOptions", {"type": "color-text"}),
                    ),
                ],
                width=24,
                height=7,
            ),
            timeline(
                "Readiness by host",
                "When each host was ready for work: it answered, and all checks of /readyz passed.",
                (f"min by (instance) ({of('ready')}) or min by (instance) ({of('up')})", "{{instance}}"),
                no="not ready",
                yes="ready",
            ),
            lines(
                "Free in output_dir by host",
                "How much room each host has for migrated disks. Jobs wait for space, they do not fill it up.",
                "bytes",
                (f"min by (instance) ({of('destination_free_bytes', pool='output')})", "{{instance}}"),
            ),
        ],
        "One exports directory": [
            table(
                "Jobs of all hosts",
                "Every job that runs on any host of the exports directory, also where no daemon runs, such as on a node"
                " of Slurm.",
                everywhere,
                f"max by (vm, host, stage) ({of('elsewhere_progress_ratio')})",
                f"max by (vm, host, stage) ({of('elsewhere_bytes_per_second')})",
                f"max by (vm, host, stage) ({of('elsewhere_stage_remaining_seconds')})",
                overrides=[_column("Progress", ("custom.cellOptions", {"type": "gauge", "mode": "basic"}), ("max", 1))],
                width=12,
                height=8,
            ),
            timeline(
                "Hosts that are there",
                "When each host of the exports directory said that it is there. Its silence leaves its jobs to others.",
                (f"max by (host) ({of('host_up')})", "{{host}}"),
                no="gone",
                yes="there",
            ),
            areas(
                "Jobs by host",
                "How many jobs run on each host, as they say themselves.",
                "none",
                (f"max by (host) ({of('host_jobs')})", "{{host}}"),
            ),
            areas(
                "With the engine",
                "Jobs that Slurm, or what dispatch.command names, has: waiting for a host, and running.",
                "none",
                (f"max by (state) ({of('engine_jobs')})", "{{state}}"),
            ),
        ],
    }
    about = "How the migrations of all hosts go, and which host needs to be looked at."
    return _dashboard(FLEET, "hyper2kvmd: all hosts", about, rows, hours=24, several=True)


def host() -> Json:
    """One host and its jobs."""
    running = (
        Column("slot", "Slot", "string", 60),
        Column("vm", "VM"),
        Column("Value #F", "Stage", "none", 110),
        Column("attempt", "Attempt", "string", 80),
        Column("Value #A", "Progress", "percentunit", 220),
        Column("Value #B", "Rate", "binBps", 110),
        Column("Value #C", "Left in stage", "s", 110),
        Column("Value #D", "In stage for", "s", 110),
        Column("Value #E", "Silent for", "s", 100),
        Column("tags", "Tags"),
        Column("exported_job", "Job"),
    )
    stages = {str(number): {"text": name, "color": BLUE} for number, name in enumerate(STAGES, 1)}
    took = f"sum by (le) ({increase('job_duration_seconds_bucket', result='succeeded')})"

    def average(metric: str, by: str = "") -> str:
        return f"sum{by}({increase(f'{metric}_sum')}) / sum{by}({increase(f'{metric}_count')})"

    rows = {
        "Now": [
            stat(
                "Host",
                "Whether the daemon answers and all checks of /readyz pass. The checks are further below.",
                "none",
                (f"min({of('ready')}) or min({of('up')})", ""),
                defaults={"mappings": _words(no=("not ready", RED), yes=("ready", GREEN))},
            ),
            *_now(),
            table(
                "Running jobs",
                "What is in each slot, how far its slowest stage is, and how long that will take. Silent for: since"
                " when nothing moved.",
                running,
                in_slot(of("slot_progress_ratio")),
                in_slot(of("slot_bytes_per_second")),
                in_slot(of("slot_stage_remaining_seconds")),
                in_slot(f"(time() - {of('slot_stage_start_timestamp_seconds')})"),
                in_slot(f"(time() - {of('slot_last_progress_timestamp_seconds')})"),
                in_slot(of("slot_stage")),
                overrides=[
                    _column("Progress", ("custom.cellOptions", {"type": "gauge", "mode": "basic"}), ("max", 1)),
                    _column("Stage", ("mappings", [{"type": "value", "options": stages}])),
                ],
                width=24,
                height=7,
            ),
            lines(
                "Progress by slot",
                "Do the jobs get further? A line that stays flat is a job that stalls. There is none for stages that do"
                " not count in bytes.",
                "percentunit",
                (f"{of('slot_progress_ratio')} >= 0", "slot {{slot}}"),
                defaults={"max": 1},
            ),
            areas(
                "Rate by slot",
                "How fast the job in each slot works through its disks, on average since its stage began. All of them"
                " together are what the storage has to bear.",
                "binBps",
                (of("slot_bytes_per_second"), "slot {{slot}}"),
            ),
        ],
        "Work": [
            *_work(),
            gauges(
                "Average time of each stage",
                "Which stage costs the time, in the time that is shown.",
                "s",
                (f"{average('stage_duration_seconds', ' by (stage) ')} > 0", "{{stage}}"),
            ),
            stat(
                "How long a job takes",
                "Of the jobs that succeeded in the time that is shown: how long half of them took at most, and nine of"
                " ten. They mean something if there were a few dozen. Wait: the average before the start.",
                "s",
                (f"histogram_quantile(0.5, {took})", "half of them"),
                (f"histogram_quantile(0.9, {took})", "nine of ten"),
                (average("queue_wait_seconds"), "wait"),
                width=8,
                height=8,
                defaults={"mappings": _words()[1:]},
            ),
            lines(
                "Throughput",
                "Bytes of the sources' disks that were read, by stage, and bytes of finished disks. Is it the storage?"
                " Converted: by what did it; stream is hyper2kvmd's own reader.",
                "binBps",
                (f"sum by (stage) ({rate('bytes_read_total')})", "{{stage}}"),
                (f"sum by (engine) ({rate('convert_bytes_total', kind='written')})", "converted by {{engine}}"),
                (f"sum by (format) ({rate('bytes_written_total')})", "finished {{format}}"),
                width=8,
            ),
            stat(
                "Last time",
                "When a job last ended, by how; when the exports were last looked at, and settings accepted.",
                "dateTimeFromNow",
                (f"max by (result) ({of('last_job_completion_timestamp_seconds')} > 0) * 1000", "{{result}}"),
                (f"max({of('last_scan_timestamp_seconds')}) * 1000", "look at the exports"),
                (f"max({of('config_last_reload_success_timestamp_seconds')}) * 1000", "settings"),
                width=8,
                height=8,
            ),
            gauges(
                "Trouble",
                "What should be 0, in the time that is shown: what could not be read or written, the watch that began"
                " again, claims that were busy, failed or lost, notifications that were given up. As it stands"
                " now: notifications that are not delivered yet.",
                "none",
                (f"sum by (reason) ({increase('scan_errors_total')})", "scan error: {{reason}}"),
                (f"sum by (task) ({increase('task_failures_total')})", "failed task: {{task}}"),
                (f"sum by (reason) ({increase('watcher_restarts_total')})", "watch began again: {{reason}}"),
                (f"sum({increase('watcher_warnings_total')})", "watch warning"),
                (f"sum by (outcome) ({increase('claims_total', outcome='busy|failed|lost')})", "claim: {{outcome}}"),
                (f"sum({increase('report_write_errors_total')})", "report not written"),
                (f"sum({increase('notifications_given_up_total')})", "notification given up"),
                (f"sum({of('notifications_pending')})", "notification pending"),
            ),
        ],
        "Host": [
            timeline(
                "Checks",
                "When each check of /readyz passed, and whether changes of the exports directory are seen at once. The"
                " check of libvirt passes, too, if the settings do not need it; the last row has a gap then.",
                (of("ready"), "{{check}}"),
                (of("watcher_up"), "watch"),
                (of("libvirt_up"), "libvirt answers"),
                no="fails",
                yes="passes",
            ),
            lines(
                "Free space",
                "Will the next disks fit? Jobs reserve what they need, and wait if it is not there.",
                "bytes",
                (of("destination_free_bytes"), "{{pool}}_dir"),
            ),
            lines(
                "Time of a look at the exports",
                "How long it takes to read the exports directory. What takes seconds is a slow file server.",
                "s",
                (
                    f"sum({rate('scan_duration_seconds_sum')}) / sum({rate('scan_duration_seconds_count')})",
                    "average",
                ),
                width=8,
            ),
            bars(
                "Changes seen at once",
                "What the watch saw in each interval. If exports arrive without any, only the regular scan finds them.",
                "none",
                (f"sum({increase('events_total', interval='$__interval')})", "changes"),
                width=8,
            ),
            bars(
                "Log messages of the daemon",
                "How much the daemon itself logged, by level. `journalctl -u hyper2kvmd -p warning` has the words.",
                "none",
                (
                    f"sum by (level) ({increase('log_messages_total', interval='$__interval')}) > 0",
                    "{{level}}",
                ),
                width=8,
                overrides=_colors(
                    {"debug": GREY, "info": BLUE, "warning": ORANGE, "error": RED, "critical": COLORS["crashed"]}
                ),
            ),
        ],
    }
    about = "What one host does at this moment, how its jobs ended, and whether it has what it needs."
    return _dashboard(HOST, "hyper2kvmd: one host", about, rows, hours=6, several=False)


# Metrics that neither a dashboard nor an alert has, and why.
UNUSED = {
    "hyper2kvmd_host_last_seen_timestamp_seconds": "says how old hyper2kvmd_host_up is, which is 0 by then",
    "hyper2kvmd_jobs_started_total": "says nothing that the jobs that ended and those that run do not say",
}


# The JSON -----------------------------------------------------------------------------------------------------


def _dashboard(uid: str, title: str, about: str, rows: dict[str, list[Json]], *, hours: int, several: bool) -> Json:
    """A dashboard as Grafana reads it, of the last `hours`; `several`: whether more than one host can be chosen."""
    return {
        "id": None,
        "uid": uid,
        "title": title,
        "description": about,
        "tags": ["hyper2kvmd"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,  # one crosshair for all panels
        "time": {"from": f"now-{hours}h", "to": "now"},
        "timezone": "browser",
        "refresh": "1m",
        "links": [
            {
                "type": "dashboards",
                "title": "hyper2kvmd",
                "tags": ["hyper2kvmd"],
                "asDropdown": False,
                "keepTime": True,
            },
            {"type": "link", "title": "Runbook", "url": "${docs}/runbook.md", "icon": "doc", "targetBlank": True},
        ],
        "templating": {"list": _variables(several)},
        "annotations": {"list": []},
        "panels": _laid_out(rows),
    }


def _variables(several: bool) -> list[Json]:
    everything = {"includeAll": True, "current": {"text": ["All"], "value": ["$__all"], "selected": True}}
    query: Json = {"type": "query", "datasource": DATASOURCE, "refresh": 2, "sort": 1, "allValue": ".+"}
    return [
        {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus", "refresh": 1},
        {
            **query,
            "name": "job",
            "label": "Job",
            # Without All: `up` is there for every job that Prometheus knows.
            "multi": True,
            "query": {"query": "label_values(hyper2kvmd_build_info, job)", "refId": "job"},
        },
        {
            **query,
            "name": "instance",
            "label": "Instance",
            "multi": several,
            # `up` is there for a host that is down as well.
            "query": {"query": 'label_values(up{job=~"$job"}, instance)', "refId": "instance"},
            **(everything if several else {}),
        },
        {
            "type": "constant",
            "name": "docs",
            "label": "Address of the documentation",
            "hide": 2,
            "query": "/public/hyper2kvmd",
        },
    ]


def _laid_out(rows: dict[str, list[Json]]) -> list[Json]:
    """The panels of all rows with their places in a grid of 24 columns, from left to right and down."""
    numbers = itertools.count(1)
    placed: list[Json] = []
    y = 0
    for title, panels in rows.items():
        grid = {"x": 0, "y": y, "w": 24, "h": 1}
        placed.append({"type": "row", "id": next(numbers), "title": title, "collapsed": False, "gridPos": grid})
        x, y, height = 0, y + 1, 0
        for panel in panels:
            size = panel["gridPos"]
            if x + size["w"] > 24:
                x, y, height = 0, y + height, 0
            placed.append({**panel, "id": next(numbers), "gridPos": {"x": x, "y": y, **size}})
            x, height = x + size["w"], max(height, size["h"])
        y += height
    return placed


def fleet_page() -> str:
    """packaging/grafana/dashboards/hyper2kvmd-fleet.json."""
    return _page(fleet())


def host_page() -> str:
    """packaging/grafana/dashboards/hyper2kvmd-host.json."""
    return _page(host())


def _page(dashboard: Json) -> str:
    return json.dumps(dashboard, indent=1, ensure_ascii=False) + "\n"
