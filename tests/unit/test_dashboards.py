"""Dashboards, alerts and runbook say the same as the metrics; the rules of Grafana's dashboard linter hold."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import yaml

from hyper2kvmd.ctl import doctor
from hyper2kvmd.daemon.metrics import CHECKS, CONVERTED, POOLS, READ, RESULTS, Metrics
from hyper2kvmd.errors import MEANING, Code, Outcome
from tests import ROOT, dashboards, reference
from tests.monitoring import Json, panels, variables

RULES = ROOT / "packaging/prometheus/hyper2kvmd.rules.yml"
RULES_TEST = ROOT / "packaging/prometheus/hyper2kvmd.rules.test.yml"
GRAFANA = ROOT / "packaging/grafana"
BOTH = pytest.mark.parametrize("dashboard", [dashboards.fleet(), dashboards.host()], ids=lambda d: d["uid"])
# Of all that Grafana knows, those that are used; a typing error shows the bare number.
UNITS = {"none", "string", "s", "bytes", "binBps", "percentunit", "dateTimeFromNow"}


def alerts() -> dict[str, Json]:
    """Every alert by its name."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def recorded() -> dict[str, str]:
    """The expression of every recording rule by the name of what it records."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["record"]: rule["expr"] for group in groups for rule in group["rules"] if "record" in rule}


def targets(dashboard: Json) -> list[tuple[str, str]]:
    """Every query with the title of its panel."""
    return [(panel["title"], target["expr"]) for panel in panels(dashboard) for target in panel["targets"]]


def exported() -> dict[str, str]:
    """The type of every series that the daemon exports, by the name that queries have to use."""
    endings = {"counter": ("_total",), "info": ("_info",), "histogram": ("_bucket", "_sum", "_count")}
    return {
        f"{family.name}{ending}": family.type
        for family in Metrics().registry.collect()
        for ending in endings.get(family.type, ("",))
    }


def metrics_in(text: str) -> set[str]:
    """The metrics of the daemon that an expression names."""
    return set(re.findall(r"(?<![:\w])hyper2kvmd_\w+", text))


# The linter's rules -------------------------------------------------------------------------------------------


@BOTH
def test_the_data_source_is_a_variable_that_everything_uses(dashboard: Json) -> None:
    found = variables(dashboard)["datasource"]
    assert ("datasource", "prometheus", "Data source") == (found["type"], found["query"], found["label"])
    asking = [*panels(dashboard), *(v for v in variables(dashboard).values() if v["type"] == "query")]
    asking += [target for panel in panels(dashboard) for target in panel["targets"]]
    assert [dashboards.DATASOURCE] * len(asking) == [one["datasource"] for one in asking]


@BOTH
def test_job_and_instance_are_variables_that_are_looked_up_whenever_the_time_changes(dashboard: Json) -> None:
    found = variables(dashboard)
    assert ["datasource", "job", "instance", "docs"] == [*found]
    for name in ("job", "instance"):
        expected = ("query", name.title(), ".+", 2)
        assert expected == tuple(found[name][key] for key in ("type", "label", "allValue", "refresh"))
        assert re.fullmatch(r"label_values\(\w+(\{.*\})?, \w+\)", found[name]["query"]["query"])
    assert found["job"]["multi"]
    # Several hosts on the dashboard of one host would be mixed up; packaging/grafana/dashboards/.lint says so.
    assert (dashboard["uid"] == dashboards.FLEET) == found["instance"]["multi"]
    assert "includeAll" not in found["job"], "`up` is there for the jobs of everybody"


def test_the_exception_from_the_linters_rules_is_declared() -> None:
    declared = yaml.safe_load((GRAFANA / "dashboards/.lint").read_text())["exclusions"]
    assert [{"dashboard": dashboards.host()["title"]}] == declared.pop("template-instance-rule")["entries"]
    assert {} == declared


@BOTH
def test_every_panel_has_a_title_a_description_a_unit_and_queries(dashboard: Json) -> None:
    for panel in panels(dashboard):
        assert panel["title"], panel
        assert panel["description"].endswith((".", "?")), panel["title"]
        assert panel["targets"], panel["title"]
        fields = panel["fieldConfig"]
        units = [fields["defaults"]["unit"]]
        units += [p["value"] for o in fields["overrides"] for p in o["properties"] if p["id"] == "unit"]
        assert [] == [unit for unit in units if unit not in UNITS], panel["title"]
        assert len(panel["targets"]) == len({target["refId"] for target in panel["targets"]})
    titles = [panel["title"] for panel in panels(dashboard)]
    assert len(titles) == len(set(titles))


@BOTH
def test_every_selector_is_of_the_chosen_job_and_instance(dashboard: Json) -> None:
    for title, expression in targets(dashboard):
        selectors = re.findall(r"(?<![:\w])(?:hyper2kvmd_\w+|up\b)(\{[^}]*\})?", expression)
        assert selectors, title
        assert [] == [s for s in selectors if not s.startswith(f"{{{dashboards.CHOSEN}")], f"{title}: {expression}"


@BOTH
def test_counters_are_only_seen_through_rate_or_increase_over_an_interval_that_fits(dashboard: Json) -> None:
    kinds = exported()
    for title, expression in targets(dashboard):
        counted = [name for name in metrics_in(expression) if kinds[name] in ("counter", "histogram")]
        for name in counted:
            for before in re.findall(rf"(\w+\(){name}\b", expression):
                assert before in ("rate(", "increase("), f"{title}: {expression}"
            assert re.search(rf"\({name}\{{", expression), f"{title}: {expression}"
        ranges = re.findall(r"(\w+)\([^()]*\[([^\]]*)\]", expression)
        assert expression.count("[") == len(ranges), f"{title}: {expression}"
        for function, interval in ranges:
            allowed = {"rate": {"$__rate_interval"}, "increase": {"$__interval", "$__range"}}[function]
            assert interval in allowed, f"{title}: {expression}"


@BOTH
def test_what_is_counted_in_each_interval_has_a_shortest_one(dashboard: Json) -> None:
    for panel in panels(dashboard):
        counts = any("[$__interval]" in target["expr"] for target in panel["targets"])
        assert counts == ("interval" in panel), panel["title"]


@BOTH
def test_every_legend_is_made_of_labels_that_the_query_keeps(dashboard: Json) -> None:
    for panel in panels(dashboard):
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                kept = re.search(rf"by \([^)]*\b{label}\b[^)]*\)", target["expr"])
                assert kept or " by " not in target["expr"], f"{panel['title']}: {target['legendFormat']}"


@BOTH
def test_a_dashboard_is_not_editable_and_the_same_in_every_grafana(dashboard: Json) -> None:
    assert (False, None, dashboards.SCHEMA) == (dashboard["editable"], dashboard["id"], dashboard["schemaVersion"])
    assert re.fullmatch(r"[a-z0-9-]{1,40}", dashboard["uid"])
    assert "{DS_" not in str(dashboard), "a data source of somebody's own"


# Layout and links ---------------------------------------------------------------------------------------------


@BOTH
def test_no_two_panels_overlap_and_none_leaves_the_grid(dashboard: Json) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard["panels"]:
        x, y, width, height = (panel["gridPos"][key] for key in "xywh")
        assert 0 <= x < x + width <= 24, panel["title"]
        for cell in itertools.product(range(x, x + width), range(y, y + height)):
            assert cell not in taken, f"{panel['title']} lies on {taken[cell]}"
            taken[cell] = panel["title"]
    bottom = max(y for _, y in taken) + 1
    assert [] == [y for y in range(bottom) if (0, y) not in taken], "rows that are empty"
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(numbers) == len(set(numbers))


@BOTH
def test_a_dashboard_leads_to_the_other_one_and_to_the_runbook(dashboard: Json) -> None:
    others, runbook = dashboard["links"]
    assert ("dashboards", dashboard["tags"]) == (others["type"], others["tags"])
    base = runbook["url"].removesuffix("/runbook.md")
    assert "${docs}" == base
    assert (ROOT / "docs/runbook.md").exists()
    assert f"docs:/usr/share/grafana{variables(dashboard)['docs']['query']}:ro" in monitoring_page()


def test_the_name_of_a_host_leads_to_its_dashboard() -> None:
    (table,) = [panel for panel in panels(dashboards.fleet()) if panel["title"] == "Hosts"]
    overrides = table["fieldConfig"]["overrides"]
    (links,) = [p["value"] for o in overrides for p in o["properties"] if p["id"] == "links"]
    assert links[0]["url"].startswith(f"/d/{dashboards.host()['uid']}?")
    assert "var-instance=${__value.raw}" in links[0]["url"]


@BOTH
def test_every_column_of_a_table_is_a_query_or_a_label_that_it_keeps(dashboard: Json) -> None:
    tables = [panel for panel in panels(dashboard) if panel["type"] == "table"]
    assert tables
    for panel in tables:
        organized = panel["transformations"][1]["options"]
        several = len(panel["targets"]) > 1
        queries = {f"Value #{target['refId']}" if several else "Value" for target in panel["targets"]}
        for name in organized["indexByName"]:
            kept = all(re.search(rf"\([^)]*\b{name}\b[^)]*\)", target["expr"]) for target in panel["targets"][-1:])
            assert name in queries or kept, f"{panel['title']}: {name}"
        unseen = queries - {*organized["indexByName"]}
        assert unseen <= {*organized["excludeByName"]}, panel["title"]


# Dashboards, alerts and metrics -------------------------------------------------------------------------------


def test_every_metric_in_a_query_exists_and_every_one_that_exists_is_used_or_left_out_on_purpose() -> None:
    queries = [
        expression for dashboard in (dashboards.fleet(), dashboards.host()) for _, expression in targets(dashboard)
    ]
    queries += [variables(dashboards.fleet())[name]["query"]["query"] for name in ("job", "instance")]
    queries += [*recorded().values(), *(alert["expr"] for alert in alerts().values())]
    named = set[str]().union(*map(metrics_in, queries))
    there = exported()
    assert set() == named - {*there}
    # Of a histogram, one of its three is enough.
    used = {re.sub(r"_(bucket|sum|count)$", "", name) for name in named}
    unused = {re.sub(r"_(bucket|sum|count)$", "", name) for name in there} - used
    assert {*dashboards.UNUSED} == unused


def test_what_is_recorded_is_used() -> None:
    used = " ".join(alert["expr"] for alert in alerts().values())
    assert [] == [name for name in recorded() if name not in used]
    assert recorded()


def test_every_value_of_a_label_in_a_query_exists() -> None:
    values = {
        "result": {*RESULTS},
        "reason": {str(code) for code in Code} | {"died", "replaced", "settings"},
        "state": {*dashboards.COLORS},
        "check": {*CHECKS},
        "outcome": {"won", "busy", "failed", "lost"},
        "stage": {*READ},
        "kind": {kind for kinds in CONVERTED.values() for kind in kinds},
        "pool": {*POOLS},
        "le": set(),
        "job": {"hyper2kvmd", "$job"},
        "instance": {"$instance"},
    }
    queries = [
        expression for dashboard in (dashboards.fleet(), dashboards.host()) for _, expression in targets(dashboard)
    ]
    queries += [*recorded().values(), *(alert["expr"] for alert in alerts().values())]
    seen = 0
    for query in queries:
        for label, value in re.findall(r'(\w+)(?:=|!=|=~|!~)"([^"]*)"', query):
            assert {*value.split("|")} <= values[label], query
            seen += 1
    assert seen > 100


def test_every_state_and_every_result_has_a_colour() -> None:
    states = {
        sample.labels["state"]
        for family in Metrics().registry.collect()
        for sample in family.samples
        if family.name == "hyper2kvmd_jobs"
    }
    assert states
    assert states | {*RESULTS} == {*dashboards.COLORS}


def test_a_failed_job_is_told_for_every_reason_but_those_of_rejections_and_of_what_people_wanted() -> None:
    (left_out,) = re.findall(r'reason!~"([^"]*)"', alerts()["Hyper2kvmdJobFailed"]["expr"])
    others = {Code.BUSY, Code.INTERRUPTED, Code.HELD, Code.CANCELLED}
    expected = {code for code, meaning in MEANING.items() if meaning.outcome == Outcome.REJECTED} | others
    assert {str(code) for code in expected} == {*left_out.split("|")}


# Alerts and runbook -------------------------------------------------------------------------------------------


def runbook() -> dict[str, str]:
    """The sections of the runbook by their titles."""
    _, *sections = (ROOT / "docs/runbook.md").read_text().split("\n## ")
    return dict(section.split("\n", 1) for section in sections)


def monitoring_page() -> str:
    return (ROOT / "docs/monitoring.md").read_text()


def test_every_alert_has_one_section_in_the_runbook_and_there_is_no_other() -> None:
    assert [*alerts()] == re.findall(r"^## (.*)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", alerts())
def test_an_alert_says_who_should_act_and_where_to_read_on(name: str) -> None:
    alert, section = alerts()[name], runbook()[name]
    assert {"summary", "description", "runbook_url"} == {*alert["annotations"]}
    assert f"docs/runbook.md#{name.lower()}" == alert["annotations"]["runbook_url"]
    assert re.search(r"\{\{ \$labels\.(instance|host) }}", alert["annotations"]["summary"])
    (severity,) = alert["labels"].values()
    assert section.strip().startswith(f"**{severity}.**")
    assert ["See more", "Do", "Silence"] == re.findall(r"^- (.*?):", section, re.MULTILINE)


def test_the_checks_of_doctor_that_the_runbook_names_exist() -> None:
    text = " ".join((ROOT / "docs/runbook.md").read_text().split())
    named = " ".join(re.findall(r"`hyper2kvmctl doctor ([a-z ]+)`", text)).split()
    assert named
    assert set() == {*named} - {*doctor.CHECKS}


def test_whoever_is_woken_was_not_woken_for_a_moment() -> None:
    pages = {name: alert for name, alert in alerts().items() if alert["labels"]["severity"] == "page"}
    # That two runners worked on one export is no state that passes.
    assert ["Hyper2kvmdClaimLost"] == [name for name, alert in pages.items() if "for" not in alert]
    assert len(pages) < len(alerts()) / 2


def test_every_alert_fires_in_one_test_of_the_rules_and_is_the_only_one_there() -> None:
    tests: dict[str, Any] = {
        test["name"].split(",")[0]: test for test in yaml.safe_load(RULES_TEST.read_text())["tests"]
    }
    (busy, fresh) = [name for name in tests if name not in alerts()]
    for quiet in (busy, fresh):
        silent = tests.pop(quiet)["promql_expr_test"]
        assert [] == [one for one in silent if "ALERTS" in one["expr"] and one["exp_samples"]]
    assert [*alerts()] == [*tests]
    for name, test in tests.items():
        assert [name] == [one["alertname"] for one in test["alert_rule_test"]]
        assert all(one["exp_alerts"] for one in test["alert_rule_test"])
        only = [{"labels": f'{{alertname="{name}"}}', "value": 1}]
        assert only == test["promql_expr_test"][-1]["exp_samples"]
        assert 'count by (alertname) (ALERTS{alertstate="firing"})' == test["promql_expr_test"][-1]["expr"]


def test_the_busy_and_the_idle_host_have_what_the_rules_look_at() -> None:
    named = set[str]().union(*map(metrics_in, [*recorded().values(), *(a["expr"] for a in alerts().values())]))
    for test in yaml.safe_load(RULES_TEST.read_text())["tests"][:2]:
        there = set[str]().union(*(metrics_in(series["series"]) for series in test["input_series"]))
        assert set() == named - there, test["name"]


# Provisioning -------------------------------------------------------------------------------------------------


def test_the_provider_looks_where_the_page_says_that_the_dashboards_go() -> None:
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/hyper2kvmd.yml").read_text())["providers"]
    path = provider["options"]["path"]
    assert f"`{path}/`" in monitoring_page()
    assert f"packaging/grafana/dashboards:{path}:ro" in monitoring_page()
    assert not provider["allowUiUpdates"]


def test_the_data_source_knows_the_interval_of_the_scrapes() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/hyper2kvmd.yml").read_text())["datasources"]
    (scrape,) = yaml.safe_load((ROOT / "packaging/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert scrape["scrape_interval"] == source["jsonData"]["timeInterval"]
    assert "prometheus" == source["type"]


def test_every_file_that_the_page_names_is_shipped_and_every_one_shipped_is_named() -> None:
    named = set(re.findall(r"`(packaging/\S+)`", monitoring_page()))
    shipped = {
        str(path.relative_to(ROOT))
        for directory in ("prometheus", "grafana")
        for path in (ROOT / "packaging" / directory).rglob("*.[yj][ms]*")
    }
    dashboards_named = "packaging/grafana/dashboards/*.json"
    assert dashboards_named in named
    assert shipped == (named - {dashboards_named}) | {name for name in reference.PAGES if "/grafana/" in name}


def test_a_newcomer_needs_five_commands() -> None:
    block = monitoring_page().split("as root:\n\n", 1)[1].split("\n\n", 1)[0]
    assert 5 == len(block.replace("\\\n", "").splitlines())
    for path in re.findall(r"(?:\$PWD/)?((?:packaging|docs)(?:/[\w./-]+)?)(?=[: ])", block):
        assert (ROOT / path).exists(), path


def test_the_pictures_of_the_dashboards_are_small() -> None:
    for name in ("fleet", "host"):
        picture = ROOT / f"docs/images/dashboard-{name}.png"
        assert f"(images/{picture.name})" in monitoring_page()
        assert picture.stat().st_size < 150_000
