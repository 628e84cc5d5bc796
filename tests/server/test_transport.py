"""What the transports share: events out of a stream of bytes, however it is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import transport
from server.messages import BadFrameError, Command, LoadCommand
from server.transport import FrameSplitter, WorkerTransport
from tests.server.fakes import until


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.lists(st.integers(1, 60), max_size=12))
def test_frames_are_the_same_however_their_bytes_arrive(bodies: list[bytes], sizes: list[int]) -> None:
    stream, splitter, found = b"".join(map(framed, bodies)), FrameSplitter(), []
    for size in [*sizes, len(stream) + 1]:
        found += splitter.push(stream[:size])
        stream = stream[size:]
    assert found == bodies


@pytest.mark.parametrize("length", [0, 2**24 + 1, 2**32 - 1])
def test_a_length_that_no_frame_has_ends_the_stream(length: int) -> None:
    splitter = FrameSplitter()
    assert list(splitter.push(framed(b"first") + length.to_bytes(4, "big")[:3])) == [b"first"]
    with pytest.raises(BadFrameError):
        list(splitter.push(length.to_bytes(4, "big")[3:]))


class Breaks(WorkerTransport):
    """A life that fails before or after its death was told."""

    num_lives = 0

    def send(self, command: Command) -> None:
        pass

    def kill(self) -> None:
        self._stopping = True

    async def _live(self) -> None:
        self.num_lives += 1
        if self.num_lives % 2:
            await self._converse(self._nothing)
        raise RuntimeError("unforeseen")

    async def _nothing(self) -> bytes:
        return b""


async def test_every_life_is_told_lost_once_whatever_it_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "FIRST_BACKOFF_SECONDS", 0.001)
    lost = []
    load = LoadCommand(target="", draft=None, device="cpu", dtype="auto", max_model_len=None, max_num_seqs=2)
    worker = Breaks(load, lambda event: None, lambda: lost.append(worker.num_lives))
    worker.start()
    await until(lambda: worker.num_lives == 4)
    await worker.stop()
    assert lost == [1, 2, 3, 4]
