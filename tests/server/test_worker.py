"""What a worker does between loading a pair and being ready."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

import decoding
from decoding import DecodingConfig
from server.messages import LoadCommand, LoadingEvent
from server.worker import record_graphs


class Told:
    """An outbox that keeps what it was given."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def put(self, event: Any) -> None:
        self.events.append(event)

    def flush(self, *, wait: bool) -> None:
        assert wait


@pytest.mark.parametrize(
    ("device", "enforce_eager", "recorded"),
    [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)],
)
def test_graphs_are_recorded_on_a_gpu_unless_refused(
    device: str, enforce_eager: bool, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        decoding, "record_graphs", lambda pair, config: calls.append(config) or 7, raising=False
    )
    config = DecodingConfig(method="mtad", beam_width=2)
    command = LoadCommand(
        target=None,
        draft=None,
        device=device,
        dtype="auto",
        max_model_len=None,
        max_num_seqs=2,
        enforce_eager=enforce_eager,
        decoding=config,
    )
    outbox, pair = Told(), SimpleNamespace(device=torch.device(device))
    with capture_logs() as lines:
        record_graphs(command, pair, outbox)  # type: ignore[arg-type]
    assert calls == [config] * recorded
    assert outbox.events == [LoadingEvent(stage="graphs")] * recorded
    assert [(line["event"], line["graphs"]) for line in lines] == [("graphs_recorded", 7)] * recorded
