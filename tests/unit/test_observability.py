"""containers/observability: rules and panels ask only for figures that nodes have, and promtool likes them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.http_rig import serving

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "containers" / "observability"
DOCUMENTED = set(re.findall(r"^\| `(meshnode_\w+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.M))
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
PANELS = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
QUERIES = [rule["expr"] for rule in RULES] + [one["expr"] for panel in PANELS for one in panel["targets"]]
CHAT = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}


async def exposition() -> str:
    """What a node says that has answered, and refused."""
    async with serving() as http:
        await http.post("/v1/chat/completions", CHAT)
        await http.get("/unknown")
        return (await http.get("/metrics")).text


def promtool(*arguments: str, given: str = "") -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("needs promtool (Debian: prometheus)")
    done = subprocess.run([found, *arguments], input=given, capture_output=True, text=True, timeout=60, cwd=FOLDER)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


async def test_every_query_asks_for_series_that_there_are() -> None:
    series: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(await exposition()):
        for sample in family.samples:
            series.setdefault(sample.name, set()).update(sample.labels)
    for query in QUERIES:
        names = re.findall(r"meshnode_\w+", query)
        assert names, query
        for name in names:
            assert name in series, f"{name} of {query}"
            assert name in DOCUMENTED or re.sub(r"_(bucket|sum|count)$", "", name) in DOCUMENTED, name
        labels = {label for group in re.findall(r"by \((.*?)\)", query) for label in re.split(r",\s*", group)}
        known = set().union(*(series[name] for name in names)) | {"instance", "job"}
        assert labels <= known, query


def test_every_figure_is_on_the_dashboard() -> None:
    shown = {
        re.sub(r"_(bucket|sum|count)$", "", name) for query in QUERIES for name in re.findall(r"meshnode_\w+", query)
    }
    assert DOCUMENTED - shown == {"meshnode_prefix_cache_queries_total"}


def test_every_alert_says_what_to_do_and_fires_in_a_test() -> None:
    test = (FOLDER / "alerts_test.yml").read_text()
    for rule in RULES:
        assert rule["annotations"]["summary"] and rule["annotations"]["remedy"]
        assert f'alertname="{rule["alert"]}"' in test


def test_prometheus_takes_the_rules() -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "rules", "alerts.yml")
    promtool("check", "config", "prometheus.yml")
    promtool("test", "rules", "alerts_test.yml")


async def test_prometheus_takes_the_figures() -> None:
    promtool("check", "metrics", given=await exposition())


def test_compose_mounts_what_there_is() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (FOLDER / source).exists(), source
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"])
