"""A real Prometheus scrapes a real server under load and answers what the dashboard asks."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deploy.prometheus import ROOT, Prometheus, running_prometheus
from tests.e2e.conftest import RunningServer, Start, until

pytestmark = pytest.mark.slow

METHODS = ("target", "draft", "speculative", "multi_candidate", "mtjd", "mtad", "mmtad")
MOST_REQUESTS = 3000
WATTS = 40
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/dashboards/mmtad.json").read_text("utf-8"))
QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
}
# What Grafana puts in, for a scrape interval of 5 s.
VARIABLES = {"$__rate_interval": "20s", "$__range": "5m", "$method": ".*"}


def load(server: RunningServer, stop: threading.Event) -> None:
    """Requests of every method, good ones and bad ones, until told to stop."""
    with server.client() as client:
        for number in range(MOST_REQUESTS):
            if stop.is_set():
                return
            method = METHODS[number % len(METHODS)]
            body = {"model": "tiny", "prompt": "The quick brown", "max_tokens": 12, "stream": True}
            answer = client.post("/v1/completions", json={**body, "speculative": {"method": method}})
            assert answer.status_code in (200, 503), answer.text
            client.post("/v1/completions", json={**body, "max_tokens": -1})


@pytest.fixture(scope="module")
def prometheus(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus beside a server with a short queue that four clients keep full, on a replayed counter."""
    stop = threading.Event()
    recording = tmp_path_factory.mktemp("energy") / "counter.jsonl"
    rows = [{"seconds": n / 10, "microjoules": {"cpu:0": n * WATTS * 100_000}} for n in range(301)]
    recording.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = ["--max-num-seqs", "2", "--max-num-queued-reqs", "1", "--energy-source", f"replay:{recording}"]
    with start(*flags) as server:
        clients = [threading.Thread(target=load, args=(server, stop)) for _ in range(4)]
        folder = tmp_path_factory.mktemp("prometheus")
        with running_prometheus(folder, f"127.0.0.1:{server.port}") as running:
            for client in clients:
                client.start()
            yield running
        stop.set()
        for client in clients:
            client.join(60)


def test_the_target_is_up(prometheus: Prometheus) -> None:
    until(lambda: [target["health"] for target in prometheus.targets()] == ["up"])


@pytest.mark.parametrize("query", QUERIES)
def test_the_panel_has_data(query: str, prometheus: Prometheus) -> None:
    expression = QUERIES[query]
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression
    until(lambda: bool(prometheus.values(expression)), 60)


def test_joules_become_the_watts_of_the_counter(prometheus: Prometheus) -> None:
    """And what requests and idleness are told adds up to them."""
    power = "sum(rate(mmtad_energy_joules_total[20s]))"
    parts = (
        "sum(rate(mmtad_request_energy_joules_total[20s])) + sum(rate(mmtad_idle_energy_joules_total[20s]))"
    )
    for query in (power, parts):
        until(lambda query=query: prometheus.values(query) == [pytest.approx(WATTS, rel=0.1)], 60)


def test_the_methods_can_be_chosen(prometheus: Prometheus) -> None:
    (variable,) = DASHBOARD["templating"]["list"]
    assert variable["query"]["query"] == "label_values(mmtad_decode_steps_total, method)"

    def methods() -> set[str]:
        series = prometheus.get("series", **{"match[]": "mmtad_decode_steps_total"})
        return {each["method"] for each in series}

    until(lambda: methods() == set(METHODS), 60)


def test_the_rules_are_healthy_and_recorded(prometheus: Prometheus) -> None:
    recorded = [rule["name"] for rule in prometheus.rules() if rule["type"] == "recording"]
    assert len(recorded) >= 6
    for name in recorded:
        until(lambda name=name: bool(prometheus.values(name)), 60)
    assert {rule["health"] for rule in prometheus.rules()} == {"ok"}
