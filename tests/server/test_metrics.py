"""The metrics: names and labels as documented, bounded series, the views for other tools."""

import itertools
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Message

from decoding import DecodingConfig
from decoding.config import METHODS
from server.config import ServerConfig
from server.messages import (
    EnergyEvent,
    EnergyUsage,
    ForwardStats,
    GenerationStats,
    SpeculationStep,
    StepStatsEvent,
)
from server.metrics import MAX_PRESETS, Metrics
from server.metrics_compat import make_metrics
from tests.server.conftest import Serve
from tests.server.fakes import ready_event

DRAFTING = ("speculative", "multi_candidate", "mtad", "mmtad")
ROOT = Path(__file__).parent.parent.parent
DOCUMENT = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
MAX_SERIES = 2000
ROUTES = 16
STATUSES = (200, 400, 401, 404, 405, 408, 413, 415, 429, 431, 499, 500, 503)


def step_event(method: str = "mmtad", preset: str | None = "mmtad-4x4", **fields: object) -> StepStatsEvent:
    values = {
        "method": method,
        "preset": preset,
        "num_sequences": 2,
        "num_tree_nodes": 16,
        "prefill_tokens": 0,
        "prompt_tokens": 5,
        "cached_prompt_tokens": 3,
        "prefill_seconds": 0.0,
        "decode_seconds": 0.01,
        "num_running": 2,
        "num_waiting": 0,
        "cache_usage": {"target": 0.5, "draft": 0.25},
        **fields,
    }
    return StepStatsEvent(**values)  # type: ignore[arg-type]


def stats(depth: int = 16) -> GenerationStats:
    return GenerationStats(
        prompt_tokens=5,
        completion_tokens=20,
        num_steps=4,
        log_prob_sum=-10.0,
        queue_seconds=0.01,
        speculation=[SpeculationStep(depth, depth, depth), SpeculationStep(depth, 0, depth)] if depth else [],
        energy=EnergyUsage(
            source="rapl",
            devices=["cpu:0", "dram:0"],
            prefill_microjoules=500_000,
            decode_microjoules=1_500_000,
            resolution_limited=False,
        ),
    )


def energy_event(**raw: int) -> EnergyEvent:
    attributed = [(method, phase, 1) for method in METHODS for phase in ("prefill", "decode")]
    return EnergyEvent(source="rapl", available=True, seconds=0.5, raw=raw, idle=raw, attributed=attributed)


def use_everything(metrics: Metrics) -> None:
    """Every label value that can occur, with every method in use."""
    metrics.record_ready(ready_event("none"), "0")
    for method in METHODS:
        for role, phase in itertools.product(("target", "draft"), ("prefill", "decode")):
            metrics.record_step(
                step_event(method, forward=[ForwardStats(role, phase, method, 1, 0.1)]), "0", "tiny"
            )
        models = ("tiny", "tiny-draft") if method == "draft" else ("tiny",)
        for model, reason in itertools.product(models, ("stop", "length", "abort", "error")):
            metrics.record_end(stats(16 if method in DRAFTING else 0), reason, model, method)
        for histogram in (
            metrics.first_token_seconds,
            metrics.per_token_seconds,
            metrics.inter_token_seconds,
            metrics.request_seconds,
        ):
            histogram.labels(method).observe(0.1)
    metrics.record_energy(energy_event(**{"cpu:0": 2_000_000, "dram:0": 500_000}), "0", "tiny")
    metrics.loop_lag_seconds.observe(0.01)
    metrics.worker_restarts.labels("0").inc()
    for number in range(100):
        metrics.record_step(step_event(preset=f"mmtad-{number}x1"), "0", "tiny")
    for route, status in itertools.product(range(ROUTES), STATUSES):
        metrics.http_requests.labels(str(route), str(status)).inc()
    for reason in ("queue_full", "model_loading", "draining", "rate_limit_exceeded", "no_worker"):
        metrics.rejected.labels(reason).inc()
    for gauge in (metrics.requests_running, metrics.requests_waiting, metrics.reserved_tokens):
        gauge.labels("tiny").set(1)


def series(metrics: Metrics) -> list[str]:
    lines = metrics.exposition().decode().splitlines()
    return [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]


def everything(**settings: object) -> Metrics:
    config = ServerConfig(**{"model": "tiny", "metrics_compat": "vllm,dcgm", **settings})  # type: ignore[arg-type]
    metrics = make_metrics(config)
    use_everything(metrics)
    return metrics


def test_series_are_few_with_every_method_in_use() -> None:
    found = series(everything())
    assert len(set(found)) == len(found)
    assert len(found) <= MAX_SERIES


def test_presets_have_a_bounded_number_of_names() -> None:
    metrics = everything()
    found = {each for each in series(metrics) if each.startswith("mmtad_preset_steps_total")}
    assert len(found) == MAX_PRESETS + 1
    counts = [
        metrics.registry.get_sample_value("mmtad_preset_steps_total", {"preset": preset})
        for preset in ("mmtad-4x4", "other")
    ]
    assert counts == [4 * len(METHODS), 100 - (MAX_PRESETS - 1)]


def test_preset_names_differ() -> None:
    configs = [
        DecodingConfig(method="target"),
        DecodingConfig(method="draft"),
        DecodingConfig(method="speculative"),
        DecodingConfig(method="speculative", acceptance="block"),
        DecodingConfig(method="multi_candidate"),
        DecodingConfig(method="multi_candidate", replacement=True),
        DecodingConfig(method="multi_candidate", candidates_per_level=(4, 2)),
        DecodingConfig(method="mmtad"),
        DecodingConfig(method="mmtad", beam_width=2),
        DecodingConfig(method="mtad"),
    ]
    names = [config.preset.name for config in configs]
    assert len(set(names)) == len(names)
    assert names[4] == "multi_candidate-4.2.2"


def test_names_follow_the_rules() -> None:
    metrics = everything(metrics_compat="none")
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        assert re.fullmatch(r"mmtad_[a-z_]+", family.name)
        assert family.documentation
        for sample in family.samples:
            assert not sample.name.endswith("_created")
            assert family.type != "histogram" or "model" not in sample.labels
            assert family.type != "counter" or sample.name.endswith("_total")


def documented() -> dict[str, tuple[str, set[str]]]:
    """Type and labels by name, as the tables of docs/metrics.md have them."""
    rows = re.findall(r"^\| (`mmtad_.*?) \| (\w+) \| ([\w, -]*) \|", DOCUMENT, re.MULTILINE)
    return {
        name: (kind, set(filter(None, labels.strip(" -").replace(" ", "").split(","))))
        for names, kind, labels in rows
        for name in re.findall(r"`(\w+)`", names)
    }


def test_every_metric_is_documented_with_its_type_and_labels() -> None:
    exported: dict[str, tuple[str, set[str]]] = {}
    for family in everything(metrics_compat="none").registry.collect():
        labels = set().union(*(sample.labels for sample in family.samples)) - {"le"}
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        exported[family.name + suffix] = ("gauge" if family.type == "info" else family.type, labels)
    assert documented() == exported


def test_everything_else_the_document_names_exists() -> None:
    text = everything().exposition().decode()
    for name in re.findall(r"`((?:vllm:|DCGM_)\w+)`", DOCUMENT):
        assert f"\n{name}{{" in text
    rules = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "deploy/prometheus/rules").glob("*"))
    found = re.findall(r"`((?:method:|instance:|Mmtad)[\w:]+)`", DOCUMENT)
    assert set(found) == set(re.findall(r"(?:record|alert): (\S+)", rules))


async def ask(app: ASGIApp, path: str, body: bytes = b"") -> int:
    """One request without a client, of which 20,000 would take a minute."""
    statuses = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST" if body else "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "server": ("test", 80),
        "scheme": "http",
        "root_path": "",
    }
    await app(scope, receive, send)
    return int(statuses[0])


async def test_twenty_thousand_random_paths_and_models_add_nothing(serve: Serve) -> None:
    async with serve() as served:
        await served.complete()

        async def ask_at_random(number: int) -> None:
            name = f"{number * 2654435761 % 2**32:x}"
            body = b'{"model": "%s", "prompt": "x"}' % name.encode()
            assert await ask(served.app, f"/{name}") == 404
            assert await ask(served.app, f"/v1/models/{name}") == 404
            assert await ask(served.app, "/v1/completions", body) == 404
            assert await ask(served.app, f"/v1/{name}/completions", body) == 404

        await ask_at_random(0)
        before = series(served.pool.metrics)
        for number in range(1, 5001):
            await ask_at_random(number)
        assert series(served.pool.metrics) == before
        counted = sum(
            served.metric("mmtad_http_requests_total", route=route, status="404") or 0
            for route in ("other", "/v1/models/{model_id:path}", "/v1/completions")
        )
        assert counted == 4 * 5001


def test_vllm_names_show_our_numbers() -> None:
    metrics = everything()
    text = metrics.exposition().decode()
    shown = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("vllm:")
    }
    engine = (("engine", "0"), ("model_name", "tiny"))

    def ours(name: str, **labels: str) -> float:
        return sum(
            sample.value
            for family in metrics.registry.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    assert shown["vllm:num_requests_running", *engine] == 1
    assert shown["vllm:num_requests_waiting", *engine] == 1
    assert shown["vllm:kv_cache_usage_perc", *engine] == 0.5
    for name in ("prompt_tokens", "generation_tokens"):
        assert shown[f"vllm:{name}_total", *engine] == ours(f"mmtad_{name}_total", model="tiny") > 0
    for name in ("draft_tokens", "accepted_tokens"):
        value = shown[f"vllm:spec_decode_num_{name}_total", *engine]
        assert value == ours(f"mmtad_{name}_total", model="tiny") > 0
    for name, own in (("queries", "query"), ("hits", "hit")):
        value = shown[f"vllm:prefix_cache_{name}_total", *engine]
        assert value == ours(f"mmtad_prefix_cache_{own}_tokens_total", model="tiny") > 0
    assert shown["vllm:spec_decode_num_drafts_total", *engine] == ours("mmtad_accepted_length_count") > 0
    for position in ("0", "15"):
        key = ("vllm:spec_decode_num_accepted_tokens_per_pos_total", *engine, ("position", position))
        assert shown[key] == ours("mmtad_accepted_tokens_by_position_total", model="tiny", position=position)


def test_dcgm_names_show_our_joules_and_nothing_unmeasured() -> None:
    def shown(metrics: Metrics) -> dict[tuple[str, str, str], float]:
        return {
            (sample.name, sample.labels["gpu"], sample.labels["UUID"]): sample.value
            for family in text_string_to_metric_families(metrics.exposition().decode())
            for sample in family.samples
            # aiperf reads the name of the host from this label, and hangs without it.
            if sample.name.startswith("DCGM_") and sample.labels["Hostname"]
        }

    assert shown(make_metrics(ServerConfig(model="tiny", metrics_compat="dcgm"))) == {}
    assert shown(everything(metrics_compat="dcgm")) == {
        ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "0", "cpu:0"): 2000,
        ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "1", "dram:0"): 500,
        ("DCGM_FI_DEV_POWER_USAGE", "0", "cpu:0"): 4,
        ("DCGM_FI_DEV_POWER_USAGE", "1", "dram:0"): 1,
    }


def test_no_other_names_where_none_are_wanted() -> None:
    assert b"vllm:" in everything(metrics_compat="vllm").exposition()
    assert b"vllm:" not in everything(metrics_compat="none").exposition()
    assert b"DCGM" not in everything(metrics_compat="vllm").exposition()


async def test_what_steps_tell(serve: Serve) -> None:
    async with serve() as served:
        await served.complete(max_tokens=6)
        passes = served.metric(
            "mmtad_forward_passes_total", model="tiny", method="mmtad", role="target", phase="decode"
        )
        seconds = served.metric(
            "mmtad_forward_seconds_total", model="tiny", method="mmtad", role="target", phase="decode"
        )
        assert passes == served.engine.num_steps
        assert seconds == pytest.approx(0.001 * served.engine.num_steps)
        assert served.metric("mmtad_preset_steps_total", preset="mmtad-4x4") == served.engine.num_steps
        assert served.metric("mmtad_model_load_seconds", worker="0", role="draft") == 0.05


async def test_a_port_of_its_own_leaves_none_on_the_other(serve: Serve) -> None:
    async with serve(metrics_port=9) as served:
        assert (await served.client.get("/metrics")).status_code == 404
