"""Rules, dashboard and metrics fit each other, and promtool finds nothing to object to."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.programs import program
from tests.server.test_metrics import everything

ROOT = Path(__file__).parent.parent.parent
RULES = sorted((ROOT / "deploy/prometheus/rules").glob("*.yml"))
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/mmtad.json").read_text("utf-8"))


def rules() -> Iterator[dict[str, Any]]:
    for path in RULES:
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
            yield from group["rules"]


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    yield from (target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"])
    yield from (each["query"]["query"] for each in DASHBOARD["templating"]["list"])


def test_every_name_in_rules_and_dashboard_exists() -> None:
    exposition = everything(metrics_compat="none").exposition().decode()
    families = text_string_to_metric_families(exposition)
    exported = {sample.name for family in families for sample in family.samples}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for each in expressions() for name in re.findall(r"[a-z:]*mmtad_[a-z0-9_:]+", each)}
    assert len(used) > 20
    assert used - exported - recorded == set()


def test_every_rule_is_recorded_by_level_and_operation_or_says_what_is_wrong() -> None:
    for rule in rules():
        if "record" in rule:
            assert re.fullmatch(r"(method|instance):mmtad_[a-z_]+:[a-z_]+5m", rule["record"])
        else:
            assert rule["annotations"]["summary"]
            assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_promtool_accepts_the_rules() -> None:
    run(program("promtool"), "check", "rules", "--lint-fatal", *map(str, RULES))


def test_the_rules_give_the_right_values(tmp_path: Path) -> None:
    """And every alert is raised when it should be, none before."""
    for path in (*RULES, ROOT / "tests/deploy/rules.yml"):
        shutil.copy(path, tmp_path)
    run(program("promtool"), "test", "rules", str(tmp_path / "rules.yml"))
    tested = (ROOT / "tests/deploy/rules.yml").read_text(encoding="utf-8")
    names = [rule.get("alert") or rule["record"] for rule in rules()]
    assert [name for name in names if name not in tested] == []


def test_promtool_accepts_the_exposition() -> None:
    run(program("promtool"), "check", "metrics", text=everything(metrics_compat="none").exposition())


def test_promtool_would_object_to_foreign_names() -> None:
    """Why there is `--metrics-compat none`, and that the check above can fail."""
    with pytest.raises(AssertionError, match="vllm"):
        run(program("promtool"), "check", "metrics", text=everything(metrics_compat="vllm").exposition())


def run(*command: str, text: bytes = b"") -> None:
    result = subprocess.run(command, input=text, capture_output=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr).decode()
