"""cluster/monitoring: the pod monitor, the alerts and the dashboard, against what the code
exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import promql_parser
import pytest
import yaml
from promql_parser import AggModifierType, AggregateExpr, VectorSelector

MONITORING = Path(__file__).resolve().parents[2] / "cluster" / "monitoring"
BASE = MONITORING.parent / "kuberay" / "base" / "cluster.yaml"
TEXT = {"type": "string", "minLength": 1}


def strict(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


def kind(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = strict({"name": TEXT})
    version = {"const": "monitoring.coreos.com/v1"}
    return strict(
        {"apiVersion": version, "kind": {"const": name}, "metadata": metadata, "spec": spec}
    )


RULE = strict(
    {
        "alert": {"type": "string", "pattern": "^Tsq[A-Za-z]+$"},
        "expr": TEXT,
        "labels": strict({"severity": {"enum": ["critical", "warning"]}}),
        "annotations": strict({"summary": TEXT, "action": TEXT}),
    },
    **{"for": {"type": "string", "pattern": "^[1-9][0-9]*[smh]$"}},
)
GROUP = strict({"name": TEXT, "rules": {"type": "array", "items": RULE, "minItems": 1}})
RELABELING = strict({"sourceLabels": {"type": "array", "items": TEXT}, "targetLabel": TEXT})
ENDPOINT = strict({"port": TEXT, "relabelings": {"type": "array", "items": RELABELING}})
SCHEMAS = {
    "alerts": kind("PrometheusRule", strict({"groups": {"type": "array", "items": GROUP}})),
    "podmonitor": kind(
        "PodMonitor",
        strict(
            {
                "selector": strict({"matchLabels": {"type": "object"}}),
                "podMetricsEndpoints": {"type": "array", "items": ENDPOINT, "minItems": 1},
            }
        ),
    ),
}
"""The fields of the Prometheus operator that the files use; any other is an error."""


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((MONITORING / f"{name}.yaml").read_text())
    return found


def alerts() -> list[dict[str, Any]]:
    return [rule for group in load("alerts")["spec"]["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((MONITORING / "grafana.json").read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    for rule in alerts():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_field_is_one_of_the_operator(name: str) -> None:
    document = load(name)
    jsonschema.validate(document, SCHEMAS[name])
    document["spec"]["selectr"] = {}
    with pytest.raises(jsonschema.ValidationError, match="selectr"):
        jsonschema.validate(document, SCHEMAS[name])


def test_the_pod_monitor_finds_the_pods_and_their_port() -> None:
    spec, cluster = load("podmonitor")["spec"], yaml.safe_load(BASE.read_text())["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        labels, pod = group["template"]["metadata"]["labels"], group["template"]["spec"]
        assert spec["selector"]["matchLabels"].items() <= labels.items()
        ports = {port["name"] for port in pod["containers"][0]["ports"]}
        assert {one["port"] for one in spec["podMetricsEndpoints"]} <= ports


def exported() -> dict[str, set[str]]:
    """Labels of each exported series, by its name without `ray_`."""
    from ray.util.metrics import Counter, Histogram, Metric

    from tsq_ray.runtime.metrics import RunMetrics
    from tsq_ray.serving.metrics import BatchMetrics, DecoderMetrics, IngressMetrics

    model = {"id": "0", "task": "single", "mode": "both", "budget": 2}
    made = (RunMetrics("r", "s", "h"), BatchMetrics(), DecoderMetrics(), IngressMetrics(model))
    series: dict[str, set[str]] = {}
    for metric in (one for each in made for one in vars(each).values() if isinstance(one, Metric)):
        info, labels = metric.info, set(metric.info["tag_keys"])
        if isinstance(metric, Histogram):
            series[f"{info['name']}_bucket"] = labels | {"le"}
        else:
            series[info["name"] + "_total" * isinstance(metric, Counter)] = labels
    return series


def nodes(expression: str) -> list[promql_parser.Expr]:
    """The syntax tree of a query, depth first; ValueError if it is no PromQL."""
    found: list[promql_parser.Expr] = []
    tree = promql_parser.parse(expression.replace("$__rate_interval", "5m"))  # Grafana's variable
    promql_parser.walk(tree, found.append)
    return found


def kept_labels(expression: str) -> set[str]:
    """Labels that the result of a query has: those that its aggregations keep."""
    aggregations = (one for one in nodes(expression) if isinstance(one, AggregateExpr))
    modifiers = [one.modifier for one in aggregations if one.modifier is not None]
    assert all(one.type == AggModifierType.By for one in modifiers), expression
    return {label for one in modifiers for label in one.labels}


def test_queries_use_series_and_labels_that_are_exported() -> None:
    series, asked = exported(), list(expressions())
    assert len(asked) > 20
    for title, expression in asked:
        selectors = [one for one in nodes(expression) if isinstance(one, VectorSelector)]
        assert selectors, title
        names = [str(one.name).removeprefix("ray_") for one in selectors]
        assert kept_labels(expression) <= set.union(*(series[name] for name in names)), title
        for name, selector in zip(names, selectors, strict=True):
            assert {one.name for one in selector.matchers.matchers} <= series[name], title


def test_texts_show_labels_that_their_query_keeps() -> None:
    for rule in alerts():
        shown = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert shown <= kept_labels(rule["expr"]), rule["alert"]
    for panel in panels():
        for target in panel["targets"]:
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert shown <= kept_labels(target["expr"]), panel["title"]
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
