"""A Prometheus of one's own, and what the dashboards ask it: for the tests and for the preview."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class Refused(Exception):
    """Prometheus answered with an error: its words."""


class Prometheus:
    """Asks one Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        """The data that /api/v1/`path` answers with. Raise Refused, or OSError if nobody answers."""
        query = urllib.parse.urlencode({name.replace("match", "match[]"): value for name, value in parameters.items()})
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise Refused(json.load(error)["error"]) from None

    def over_time(self, expression: str, start: float, end: float, step: float) -> list[Json]:
        """Every series of an expression from `start` to `end` (seconds since the epoch)."""
        times = {"start": f"{start}", "end": f"{end}", "step": f"{step}"}
        found: list[Json] = self.get("query_range", query=expression, **times)["result"]
        return found

    def at(self, expression: str, when: float) -> list[Json]:
        """Every series of an expression at one time (seconds since the epoch)."""
        answer = self.get("query", query=expression, time=f"{when}")
        found: list[Json] = answer["result"] if answer["resultType"] == "vector" else []
        return found

    def values(self, variable: Json, chosen: Mapping[str, str]) -> list[str]:
        """What can be chosen for a variable of a dashboard, as Grafana finds it out for `label_values(…)`."""
        found = re.fullmatch(r"label_values\((.*), (\w+)\)", substituted(variable["query"]["query"], chosen))
        assert found is not None, variable
        values: list[str] = self.get(f"label/{found[2]}/values", match=found[1])
        return values


@contextmanager
def prometheus(
    directory: Path, port: int, *targets: int, rules: Path | None = None, lookback: str = "5m"
) -> Iterator[Prometheus]:
    """A Prometheus on the loopback that keeps its data in `directory`, and scrapes the ports `targets` every second.

    A value counts for the time of `lookback`, unless the next scrape says that its series is gone.
    """
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)] if rules else [],
        "scrape_configs": [
            {
                "job_name": "hyper2kvmd",
                "static_configs": [{"targets": [f"127.0.0.1:{target}" for target in targets]}],
            }
        ],
    }
    directory.mkdir(exist_ok=True)
    (directory / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={directory}/prometheus.yml",
                f"--storage.tsdb.path={directory}/data",
                f"--web.listen-address=127.0.0.1:{port}",
                f"--query.lookback-delta={lookback}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"Prometheus did not start:\n{(directory / 'log').read_text()}")
            time.sleep(0.1)
        yield Prometheus(url)
    finally:
        process.terminate()
        try:
            process.wait(timeout=120)
        finally:
            process.kill()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=5):
            return True
    except OSError:
        return False


def substituted(text: str, values: Mapping[str, str]) -> str:
    """A query with the values of the variables in their places. Raise KeyError for one that nobody set."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: values[found[1] or found[2]], text)


def panels(dashboard: Json) -> list[Json]:
    """The panels of a dashboard that ask for something."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def variables(dashboard: Json) -> dict[str, Json]:
    """The variables of a dashboard, by name."""
    return {variable["name"]: variable for variable in dashboard["templating"]["list"]}
