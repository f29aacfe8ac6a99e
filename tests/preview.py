"""Pictures of the dashboards for the documentation: `python -m tests.preview`.

The three hosts on them are made up, a day of them, with the daemon's own metrics. They are put into a Prometheus; what
the panels of the dashboards ask it is drawn as a page, of which Chromium takes a picture. Grafana draws nicer ones.
"""

from __future__ import annotations

import itertools
import math
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from tests import ROOT, dashboards
from tests.integration.daemon.test_daemon import free_port
from tests.monitoring import Json, Prometheus, panels, prometheus, substituted, variables
from tests.sample import HOSTS, STEP, history

IMAGES = ROOT / "docs/images"
POINTS = 240  # of a line


# What Grafana does with answers -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One line: its name in the legend, its labels, and its points as seconds since the epoch and value."""

    name: str
    labels: dict[str, str]
    points: list[tuple[float, float]]

    @property
    def last(self) -> float:
        """Its newest value."""
        return self.points[-1][1]


Frames = list[list[Series]]  # one list for each query
Size = tuple[int, int]  # width and height, in pixels
Span = tuple[float, float]  # the first and the last second


def ask(server: Prometheus, panel: Json, chosen: dict[str, str], start: float, end: float) -> Frames:
    """What the queries of a panel answer for the time from `start` to `end`."""
    step = _step(panel, (start, end))
    times = {"__interval": f"{step:.0f}s", "__rate_interval": f"{max(step, 4 * STEP):.0f}s"}
    values = {**chosen, **times, "__range": f"{end - start:.0f}s"}
    frames = []
    for target in panel["targets"]:
        expression = substituted(target["expr"], values)
        if target.get("instant"):
            found = [{**one, "values": [one["value"]]} for one in server.at(expression, end)]
        else:
            found = server.over_time(expression, start, end, step)
        frames.append(
            [
                Series(
                    _legend(target["legendFormat"], one["metric"]),
                    one["metric"],
                    [(float(when), float(value)) for when, value in one["values"]],
                )
                for one in found
            ]
        )
    return frames


def _step(panel: Json, span: Span) -> float:
    """Seconds between two points of a panel."""
    return max((span[1] - span[0]) / POINTS, STEP, 300 if "interval" in panel else 0)


def _legend(form: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        form = form.replace("{{" + name + "}}", value)
    return form


def shown(value: float, unit: str) -> str:
    """A number in its unit, as people read it."""
    if math.isnan(value):
        return "–"
    if unit == "s":
        for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
            if abs(value) >= size:
                return f"{value / size:.3g} {name}"
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    if unit == "dateTimeFromNow":
        return shown(max(time.time() - value / 1000, 0), "s") + " ago"
    if unit == "percentunit":
        return f"{100 * value:.0f} %"
    if unit in ("bytes", "binBps"):
        suffix = "B/s" if unit == "binBps" else "B"
        for prefix in ("", "Ki", "Mi", "Gi"):
            if abs(value) < 1024:
                return f"{f'{value:.0f}' if value >= 100 else f'{value:.3g}'} {prefix}{suffix}"
            value /= 1024
        return f"{value:.3g} Ti{suffix}"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _mapped(value: float, defaults: Json) -> tuple[str, str]:
    """The text and the colour of a number, by the mappings and thresholds of its field."""
    for mapping in defaults.get("mappings", ()):
        options = mapping["options"]
        if mapping["type"] == "special" and math.isnan(value):
            return options["result"]["text"], options["result"].get("color", dashboards.GREY)
        if mapping["type"] == "value" and f"{value:g}" in options:
            found = options[f"{value:g}"]
            return found["text"], found["color"]
    color = dashboards.BLUE
    for step in defaults.get("thresholds", {}).get("steps", ()):
        if step["value"] is None or value >= step["value"]:
            color = step["color"]
    return shown(value, defaults["unit"]), color


# Drawing ------------------------------------------------------------------------------------------------------

COLUMN, ROW, GAP, TOP = 56, 33, 8, 36  # pixels
PALETTE = ("#3274d9", "#ff780a", "#56a64b", "#a352cc", "#e0b400", "#e02f44", "#5ac8c8", "#b877d9", "#8e8e8e", "#96d98d")
STYLE = """
body { margin: 0; background: #f4f5f5; font: 12px 'DejaVu Sans', sans-serif; color: #24292e; position: relative; }
.panel { position: absolute; background: white; border: 1px solid #dcdee0; border-radius: 3px; box-sizing: border-box;
  overflow: hidden; }
.panel h3 { margin: 6px 10px 2px; font-size: 12.5px; font-weight: bold; }
.row { position: absolute; font-size: 15px; font-weight: bold; padding: 8px 2px; }
.stats { display: flex; flex-wrap: wrap; justify-content: space-around; align-content: center; height: 80%; }
.stats div { text-align: center; padding: 4px 8px; } .stats b { display: block; font-size: 26px; }
.stats.many b { font-size: 19px; }
table { width: 100%; border-collapse: collapse; } th { text-align: left; color: #3274d9; font-weight: normal; }
th, td { padding: 4px 10px; border-bottom: 1px solid #eceded; white-space: nowrap; }
.legend { position: absolute; bottom: 4px; left: 10px; right: 6px; font-size: 10.5px; line-height: 14px; }
.legend span { margin-right: 12px; white-space: nowrap; } .legend i { display: inline-block; width: 12px; height: 4px;
  margin-right: 4px; vertical-align: middle; }
.bar { display: flex; align-items: center; margin: 0 10px; }
.bar span { width: 36%; text-align: right; padding-right: 8px; white-space: nowrap; overflow: hidden; }
.bar div { flex: 1; background: #eef0f1; } .bar b { display: block; height: 13px; }
.bar em { width: 64px; padding-left: 8px; font-style: normal; }
.gauge { background: #eef0f1; width: 130px; display: inline-block; vertical-align: middle; margin-right: 8px; }
.gauge b { display: block; height: 12px; background: #3274d9; }
svg text { font-size: 10px; fill: #6e7680; } rect, polygon { shape-rendering: crispEdges; }
.top { position: absolute; left: 10px; top: 8px; font-size: 17px; } .top em { font-size: 12px; margin-left: 14px; }
"""


def page(dashboard: Json, answers: Sequence[Frames], start: float, end: float, note: str = "") -> str:
    """A dashboard as an HTML page; `answers` belong to its panels, in order."""
    waiting = iter(answers)
    boxes = [f'<div class="top"><b>{escape(dashboard["title"])}</b><em>{escape(note)}</em></div>']
    bottom = 0
    for panel in dashboard["panels"]:
        grid = panel["gridPos"]
        width, height = grid["w"] * COLUMN - GAP, grid["h"] * ROW - GAP
        place = f"left:{grid['x'] * COLUMN + GAP}px;top:{grid['y'] * ROW + TOP}px;width:{width}px;height:{height}px"
        bottom = max(bottom, (grid["y"] + grid["h"]) * ROW)
        if panel["type"] == "row":
            boxes.append(f'<div class="row" style="{place}">{escape(panel["title"])}</div>')
            continue
        draw = DRAW[panel["type"]]
        inner = draw(panel, next(waiting), (width, height), (start, end))
        boxes.append(f'<div class="panel" style="{place}"><h3>{escape(panel["title"])}</h3>{inner}</div>')
    size = f"width:{24 * COLUMN + GAP}px;height:{bottom + TOP}px"
    return f'<!doctype html><meta charset="utf-8"><style>{STYLE}body {{{size}}}</style><body>{"".join(boxes)}'


def _stat(panel: Json, frames: Frames, size: Size, span: Span) -> str:
    series = [one for frame in frames for one in frame]
    defaults = panel["fieldConfig"]["defaults"]
    cells = []
    for one in series:
        text, color = _mapped(one.last, defaults)
        cells.append(f'<div><b style="color:{color}">{escape(text)}</b>{escape(one.name)}</div>')
    return f'<div class="stats{" many" * (len(series) > 2)}">{"".join(cells)}</div>'


def _bargauge(panel: Json, frames: Frames, size: Size, span: Span) -> str:
    series = [one for frame in frames for one in frame]
    top = max((one.last for one in series), default=0) or 1
    margin = max((size[1] - 40) / max(len(series), 1) - 17, 0) / 2
    bars = []
    for one in series:
        fill = f'<b style="width:{100 * one.last / top:.1f}%;background:{dashboards.BLUE}"></b>'
        text = shown(one.last, panel["fieldConfig"]["defaults"]["unit"])
        bars.append(
            f'<div class="bar" style="padding:{margin:.1f}px 0"><span>{escape(one.name)}</span><div>{fill}</div>'
            f"<em>{text}</em></div>"
        )
    return "".join(bars)


def _table(panel: Json, frames: Frames, size: Size, span: Span) -> str:
    merge, organize = panel["transformations"]
    assert ("merge", "organize") == (merge["id"], organize["id"])
    hidden, order, names = (organize["options"][key] for key in ("excludeByName", "indexByName", "renameByName"))
    overrides: dict[str, Json] = {}
    for override in panel["fieldConfig"]["overrides"]:
        found = overrides.setdefault(override["matcher"]["options"], {})
        found.update({property["id"]: property["value"] for property in override["properties"]})
    rows: list[dict[str, Any]] = []
    for letter, frame in zip("ABCDEFGHIJ", frames, strict=False):
        for one in frame:
            # Rows are merged if they say the same of what both have.
            value = {"Value" if len(frames) == 1 else f"Value #{letter}": one.last}
            row = next((row for row in rows if all(row.get(k, v) == v for k, v in one.labels.items())), None)
            if row is None:
                rows.append({**one.labels, **value})
            else:
                row.update(one.labels | value)
    columns = sorted(order, key=order.__getitem__)
    assert not set(columns) & set(hidden)
    sort = [by["displayName"] for by in panel["options"]["sortBy"]]
    for name in columns if sort else ():
        if names[name] == sort[0]:
            rows.sort(key=lambda row: -row[name])
    head = "".join(f"<th>{escape(names[name])}" for name in columns)
    body = ""
    for row in rows:
        cells = (_cell(row.get(name, math.nan), overrides.get(names[name], {})) for name in columns)
        body += f"<tr>{''.join(f'<td>{cell}' for cell in cells)}"
    return f"<table><tr>{head}{body}</table>"


def _cell(value: str | float, properties: Json) -> str:
    if isinstance(value, str):
        link = "links" in properties
        return f'<span style="color:{dashboards.BLUE}">{escape(value)}</span>' if link else escape(value)
    text, color = _mapped(value, {"unit": properties["unit"], "mappings": properties.get("mappings", [])})
    kind = properties.get("custom.cellOptions", {}).get("type")
    if kind == "gauge":
        width = 0 if math.isnan(value) else 100 * value
        return f'<span class="gauge"><b style="width:{width:.0f}%"></b></span>{text}'
    return f'<b style="color:{color}">{escape(text)}</b>' if kind == "color-text" else escape(text)


def _colors(panel: Json, series: Iterable[Series]) -> dict[str, str]:
    fixed = {
        override["matcher"]["options"]: property["value"]["fixedColor"]
        for override in panel["fieldConfig"]["overrides"]
        for property in override["properties"]
        if property["id"] == "color"
    }
    return {one.name: fixed.get(one.name, PALETTE[n % len(PALETTE)]) for n, one in enumerate(series)}


def _legend_box(colors: dict[str, str]) -> str:
    items = (f'<span><i style="background:{color}"></i>{escape(name)}</span>' for name, color in colors.items())
    return f'<div class="legend">{"".join(items)}</div>'


class _Chart:
    """The plot area of a chart over time, from places in time and value to places on the page."""

    def __init__(self, size: Size, span: Span, left: int, legend_rows: int) -> None:
        self.left, self.right, self.top = left, size[0] - 14, 8
        self.bottom = size[1] - 28 - 22 - 15 * legend_rows
        self.span = span
        self.size = size

    def x(self, when: float) -> float:
        start, end = self.span
        return self.left + (when - start) / (end - start) * (self.right - self.left)

    def y(self, value: float, top: float) -> float:
        return self.bottom - value / top * (self.bottom - self.top)

    def times(self) -> str:
        start, end = self.span
        step = next(s for s in (10, 30, 60, 300, 900, 3600, 14400) if (end - start) / s <= 8)
        marks = []
        when = math.ceil(start / step) * step
        while when <= end:
            text = time.strftime("%H:%M" if step >= 60 else "%H:%M:%S", time.gmtime(when))
            marks.append(f'<text x="{self.x(when):.0f}" y="{self.bottom + 14}" text-anchor="middle">{text}</text>')
            when += step
        return "".join(marks)

    def svg(self, inner: str) -> str:
        return f'<svg width="{self.size[0]}" height="{self.size[1] - 28}">{inner}{self.times()}</svg>'


def _legend_rows(names: Iterable[str], width: int) -> int:
    return math.ceil(sum(len(name) * 6.6 + 32 for name in names) / (width - 16)) or 1


def _timeline(panel: Json, frames: Frames, size: Size, span: Span) -> str:
    series = [one for frame in frames for one in frame]
    chart = _Chart(size, span, 150, 1)
    defaults = panel["fieldConfig"]["defaults"]
    height = (chart.bottom - chart.top) / max(len(series), 1)
    words = {w["text"]: w["color"] for w in defaults["mappings"][0]["options"].values()}
    inner = []
    for number, one in enumerate(series):
        y = chart.top + number * height
        inner.append(
            f'<text x="{chart.left - 8}" y="{y + height / 2 + 4:.0f}" text-anchor="end">{escape(one.name)}</text>'
        )
        for value, points in itertools.groupby(one.points, key=lambda point: point[1]):
            times = [when for when, _ in points]
            x, until = chart.x(times[0]), chart.x(min(times[-1] + span[1] / POINTS - span[0] / POINTS, span[1]))
            inner.append(
                f'<rect x="{x:.0f}" y="{y + 2:.0f}" width="{until - x:.0f}" height="{height - 4:.0f}"'
                f' fill="{_mapped(value, defaults)[1]}" opacity="0.8"/>'
            )
    return chart.svg("".join(inner)) + _legend_box(words)


def _timeseries(panel: Json, frames: Frames, size: Size, span: Span) -> str:
    series = [one for frame in frames for one in frame]
    defaults = panel["fieldConfig"]["defaults"]
    custom, unit = defaults["custom"], defaults["unit"]
    colors = _colors(panel, series)
    chart = _Chart(size, span, 68, _legend_rows(colors, size[0]))
    stacked = "stacking" in custom
    below: dict[float, float] = {}
    layers = []
    for one in series:
        base = {when: below.get(when, 0.0) for when, _ in one.points} if stacked else {}
        layers.append((one, base))
        for when, value in one.points if stacked else ():
            below[when] = below.get(when, 0.0) + (0 if math.isnan(value) else value)
    highest = max(
        (value + base.get(when, 0) for one, base in layers for when, value in one.points if not math.isnan(value)),
        default=0,
    )
    top = float(defaults.get("max") or _round_up(highest, unit))
    inner = []
    for tick in range(5):
        y = chart.y(top * tick / 4, top)
        inner.append(f'<line x1="{chart.left}" x2="{chart.right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eceded"/>')
        label = shown(top * tick / 4, unit)
        inner.append(f'<text x="{chart.left - 6}" y="{y + 3:.0f}" text-anchor="end">{label}</text>')
    for one, base in layers:
        inner.append(_drawn(one, base, chart, top, colors[one.name], custom, _step(panel, span)))
    return chart.svg("".join(inner)) + _legend_box(colors)


def _round_up(value: float, unit: str) -> float:
    """A highest mark of the axis that gives even quarters."""
    if value <= 0:
        return 1
    if unit == "s":
        marks: Iterable[float] = (0.02, 0.04, 0.1, 0.2, 0.4, 1, 4, 20, 60, 240, 720, 2400, 7200, 14400, 28800, 86400)
        return next((mark for mark in marks if mark >= value), value)
    if unit in ("bytes", "binBps"):
        return float(2 ** math.ceil(math.log2(value)))
    scale = 10.0 ** math.floor(math.log10(value))
    return next(scale * mark for mark in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if scale * mark >= value)


def _drawn(
    one: Series, base: dict[float, float], chart: _Chart, top: float, color: str, custom: Json, step: float
) -> str:
    """One series: bars, or a line for each stretch without a gap, with the area below it."""
    wide = step / (chart.span[1] - chart.span[0]) * (chart.right - chart.left)
    places = [
        (chart.x(when), chart.y(value + base.get(when, 0), top), chart.y(base.get(when, 0), top))
        for when, value in one.points
        if not math.isnan(value)
    ]
    if custom["drawStyle"] == "bars":
        width = max(wide - 1, 1.5)
        return "".join(
            f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{low - y:.1f}" fill="{color}"/>'
            for x, y, low in places
        )
    stretches: list[list[tuple[float, float, float]]] = []
    for place in places:
        if not stretches or place[0] - stretches[-1][-1][0] > 1.5 * wide:
            stretches.append([])
        stretches[-1].append(place)
    drawn = ""
    for stretch in stretches:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in stretch)
        under = " ".join(f"{x:.1f},{low:.1f}" for x, _, low in reversed(stretch))
        opacity = custom["fillOpacity"] / 100
        if opacity:
            drawn += f'<polygon points="{line} {under}" fill="{color}" fill-opacity="{opacity}"/>'
        drawn += f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>'
    return drawn


DRAW: dict[str, Callable[[Json, Frames, Size, Span], str]] = {
    "stat": _stat,
    "bargauge": _bargauge,
    "table": _table,
    "timeseries": _timeseries,
    "state-timeline": _timeline,
}


# The pictures -------------------------------------------------------------------------------------------------


def picture(html: Path, image: Path, height: int) -> None:
    """Have Chromium take a picture of a page."""
    subprocess.run(
        [
            "chromium",
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-lcd-text", "--hide-scrollbars"),
            *(f"--window-size={24 * COLUMN + GAP},{height}", f"--screenshot={image}", html.as_uri()),
        ],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
    )
    image.write_bytes(_few_colors(image.read_bytes()))


def _few_colors(png: bytes) -> bytes:
    """A picture of 8 bits for each of red, green and blue as one of 256 colours, which is half as large."""
    width, height, kind = *struct.unpack(">II", png[16:24]), png[24:26]
    assert kind == b"\x08\x02", "not a picture as Chromium makes them"
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        data += png[at + 8 : at + 8 + length] if png[at + 4 : at + 8] == b"IDAT" else b""
        at += 12 + length
    rows = _unfiltered(zlib.decompress(data), 3 * width)
    pixels = [[row[i : i + 3] for i in range(0, 3 * width, 3)] for row in rows]
    counted = Counter(itertools.chain.from_iterable(pixels))
    palette = [color for color, _ in counted.most_common(256)]
    # A colour that few pixels have is one of the frequent ones that is close.
    index = {c: min(range(len(palette)), key=lambda n: math.dist(palette[n], c)) for c in counted}
    packed = zlib.compress(b"".join(b"\0" + bytes(index[pixel] for pixel in row) for row in pixels), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"PLTE", b"".join(palette)), (b"IDAT", packed), (b"IEND", b""))
    return png[:8] + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def _unfiltered(data: bytes, width: int) -> Iterator[bytes]:
    """The rows of a PNG of three bytes for each pixel; each byte is stored as what it differs from a guess."""
    above = bytes(width + 3)
    for start in range(0, len(data), width + 1):
        row = bytearray(3)  # so that there is something left of the first pixel
        guess = _GUESSES[data[start]]
        for i, byte in enumerate(data[start + 1 : start + 1 + width]):
            row.append((byte + guess(row[i], above[i + 3], above[i])) & 255)
        above = bytes(row)
        yield above[3:]


def _paeth(left: int, above: int, corner: int) -> int:
    return min((left, above, corner), key=lambda value: abs(left + above - corner - value))


# By the number of the filter: the guess from the bytes to the left, above, and above to the left.
_GUESSES: tuple[Callable[[int, int, int], int], ...] = (
    lambda left, above, corner: 0,
    lambda left, above, corner: left,
    lambda left, above, corner: above,
    lambda left, above, corner: (left + above) // 2,
    _paeth,
)


def main() -> int:
    """Write docs/images/dashboard-fleet.png and docs/images/dashboard-host.png."""
    with tempfile.TemporaryDirectory(prefix="hyper2kvmd-preview-", dir="/var/tmp") as scratch:
        directory = Path(scratch)
        end = float(int(time.time()) // STEP * STEP)
        with (directory / "history").open("w") as file:
            file.writelines(history(end - 24 * 3600, end))
        command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", "history", "server/data"]
        (directory / "server/data").mkdir(parents=True)
        subprocess.run(command, cwd=directory, check=True, capture_output=True)
        # What is put in from a file never says that a series is gone: no value may count beyond the next scrape.
        with prometheus(directory / "server", free_port(), lookback=f"{STEP - 1}s") as server:
            for name, dashboard, chosen in (
                ("fleet", dashboards.fleet(), ".+"),
                ("host", dashboards.host(), HOSTS[0].name),
            ):
                assert HOSTS[0].name in server.values(variables(dashboard)["instance"], {"job": "hyper2kvmd"})
                values = {"job": "hyper2kvmd", "instance": chosen}
                hours = int(dashboard["time"]["from"].removeprefix("now-").removesuffix("h"))
                start = end - hours * 3600
                answers = [ask(server, panel, values, start, end) for panel in panels(dashboard)]
                html = directory / f"{name}.html"
                note = f"{'All' if chosen == '.+' else chosen}, the last {hours} hours; sample data"
                html.write_text(page(dashboard, answers, start, end, note))
                last = dashboard["panels"][-1]["gridPos"]
                IMAGES.mkdir(exist_ok=True)
                picture(html, IMAGES / f"dashboard-{name}.png", (last["y"] + last["h"]) * ROW + TOP)
                print(IMAGES / f"dashboard-{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
