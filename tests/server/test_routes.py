"""The other routes, and what every response has."""

import io
import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server import __version__
from tests.server.conftest import Serve, Served
from tests.server.fakes import ready_event, save_tokenizer, until
from tests.server.test_bad_input import check_error


async def test_models(serve: Serve) -> None:
    async with serve(served_model_name=["first", "second"]) as served:
        body = (await served.client.get("/v1/models")).json()
        assert body["object"] == "list"
        shown = [
            (model["id"], model["root"], model["role"], model["max_model_len"]) for model in body["data"]
        ]
        assert shown == [
            ("first", "tiny", "target", 64),
            ("second", "tiny", "target", 64),
            ("tiny-draft", "tiny-draft", "draft", 64),
        ]
        for model in body["data"]:
            assert (await served.client.get(f"/v1/models/{model['id']}")).json() == model
            assert (await served.complete(model=model["id"])).json()["model"] == model["id"]


async def test_target_alone_has_no_draft_listed(serve: Serve) -> None:
    async with serve(has_draft=False, model="org/name") as served:
        body = (await served.client.get("/v1/models")).json()
        assert [model["id"] for model in body["data"]] == ["org/name"]
        assert (await served.client.get("/v1/models/org/name")).status_code == 200


async def test_unknown_model_id(served: Served) -> None:
    check_error(await served.client.get("/v1/models/nope"), 404, "model_not_found", "model")


async def test_probes_when_ready(served: Served) -> None:
    assert (await served.client.get("/health")).status_code == 200
    assert (await served.client.get("/ready")).status_code == 200
    assert (await served.client.get("/version")).json() == {"version": __version__}


async def test_while_loading(serve: Serve, tmp_path: Path) -> None:
    async with serve(ready=False) as served:
        assert (await served.client.get("/health")).status_code == 200
        assert (await served.client.get("/v1/models")).status_code == 200
        for response in (await served.client.get("/ready"), await served.complete()):
            check_error(response, 503, "model_loading", None)
            assert int(response.headers["retry-after"]) >= 1
        served.worker.say_ready(ready_event(save_tokenizer(tmp_path)))
        await until(lambda: served.pool.refusal is None)
        assert (await served.client.get("/ready")).status_code == 200
        assert (await served.complete()).status_code == 200
        assert served.metric("mmtad_requests_rejected_total", reason="model_loading") == 1


async def test_while_draining(served: Served) -> None:
    await served.pool.drain(1)
    check_error(await served.client.get("/ready"), 503, "draining", None)
    check_error(await served.complete(), 503, "draining", None)
    assert (await served.client.get("/health")).status_code == 200


async def test_after_a_death(served: Served, tmp_path: Path) -> None:
    served.worker.die()
    check_error(await served.client.get("/ready"), 503, "no_worker", None)
    assert served.metric("mmtad_worker_up", worker="0") == 0
    served.worker.say_ready(ready_event(save_tokenizer(tmp_path)))
    await until(lambda: served.pool.refusal is None)
    assert served.metric("mmtad_worker_up", worker="0") == 1
    assert served.metric("mmtad_worker_restarts_total", worker="0") == 1
    assert (await served.complete()).status_code == 200


@pytest.mark.parametrize("path", ["/v1", "/v1/completions/", "/%0d%0ax", "/../etc/passwd", "/" + "x" * 8000])
async def test_unknown_paths(served: Served, path: str) -> None:
    check_error(await served.client.get(path), 404, None, None)
    assert served.metric("mmtad_http_requests_total", route="other", status="404") == 1


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "TRACE"])
async def test_wrong_method(served: Served, method: str) -> None:
    response = await served.client.request(method, "/v1/completions")
    check_error(response, 405, None, None)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1._Z", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("é", False)],
)
async def test_request_id(served: Served, given: str, kept: bool) -> None:
    for path in ("/health", "/nope", "/ready"):
        headers = {"x-request-id": given.encode()}
        answer = (await served.client.get(path, headers=headers)).headers["x-request-id"]
        assert (answer == given) == kept
        assert len(answer) <= 128


async def test_metrics_parse_and_are_ours(served: Served) -> None:
    await served.complete(max_tokens=5, n=2)
    response = await served.client.get("/metrics")
    families = list(text_string_to_metric_families(response.text))
    assert all(family.name.startswith("mmtad_") for family in families)
    assert not any("joules" in sample.name for family in families for sample in family.samples)
    assert not any(sample.name.endswith("_created") for family in families for sample in family.samples)
    assert served.metric("mmtad_build_info", version="test") == 1
    assert served.metric("mmtad_requests_total", model="tiny", method="mmtad", finish_reason="length") == 1
    assert served.metric("mmtad_accepted_length_count", method="mmtad") == 4
    assert served.metric("mmtad_step_sequences_sum", method="mmtad") == 4
    assert served.metric("mmtad_time_to_first_token_seconds_count", method="mmtad") == 1
    assert served.metric("mmtad_time_per_output_token_seconds_count", method="mmtad") == 2
    assert served.metric("mmtad_inter_token_latency_seconds_count", method="mmtad") == 2
    assert served.metric("mmtad_model_load_seconds", worker="0", role="target") == 0.2
    await until(lambda: served.metric("mmtad_requests_running", model="tiny") == 0)
    assert served.metric("mmtad_kv_cache_usage_ratio", worker="0", role="target") == 0


async def test_series_do_not_grow_with_traffic(served: Served) -> None:
    await served.complete()
    await served.client.get("/nope")
    await served.complete(model="unknown")
    before = served.pool.metrics.exposition().count(b"\n")
    for number in range(200):
        await served.client.get(f"/random/{number}")
        await served.complete(model=f"random-{number}")
    assert served.pool.metrics.exposition().count(b"\n") == before


async def test_documents(serve: Serve) -> None:
    async with serve() as served:
        document = (await served.client.get("/openapi.json")).json()
        assert (await served.client.get("/docs")).status_code == 200
        properties = document["components"]["schemas"]["CompletionRequest"]["properties"]
        assert {"prompt", "speculative", "stop"} <= set(properties)
        assert "SpeculativeOptions" in document["components"]["schemas"]
    async with serve(disable_fastapi_docs=True) as served:
        check_error(await served.client.get("/openapi.json"), 404, None, None)
        check_error(await served.client.get("/docs"), 404, None, None)


async def test_requests_are_logged_without_what_they_ask(served: Served, logs: io.StringIO) -> None:
    await served.complete(prompt="never in a log", user="nor this")
    await served.client.get("/scanner/%0d%0apath")
    await served.client.get("/health")
    text = logs.getvalue()
    lines = [json.loads(line) for line in text.splitlines()]
    shown = [(line["route"], line["status"]) for line in lines if line["event"] == "request"]
    assert shown == [("/v1/completions", 200), ("other", 404)]
    assert all(line["request_id"] for line in lines if line["event"] == "request")
    assert not any(word in text for word in ("never in a log", "nor this", "scanner"))


async def test_a_tokenizer_that_cannot_be_read_is_fatal(serve: Serve, tmp_path: Path) -> None:
    async with serve(ready=False) as served:
        broken = tmp_path / "broken.json"
        broken.write_text("{}")
        served.worker.say_ready(ready_event(str(broken)))
        event = await served.pool.wait_fatal()
        assert event.exit_code == 2
        assert str(broken) in event.message


async def test_a_worker_that_dies_while_its_tokenizer_is_read_is_not_ready(
    serve: Serve, tmp_path: Path
) -> None:
    async with serve(ready=False) as served:
        served.worker.say_ready(ready_event(save_tokenizer(tmp_path)))
        served.worker.die()
        await until(lambda: served.pool.codec is not None)
        assert served.pool.refusal == "model_loading"


async def test_unforeseen_failure_is_a_clean_500(
    served: Served, logs: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret details")

    monkeypatch.setattr("server.routes.completions.parse_completion", broken)
    response = await served.complete()
    message = check_error(response, 500, None, None)
    assert "secret" not in response.text
    assert "secret details" in logs.getvalue()
    assert response.headers["x-request-id"] in logs.getvalue()
    assert response.headers["x-request-id"] in message
    assert served.metric("mmtad_http_requests_total", route="/v1/completions", status="500") == 1
