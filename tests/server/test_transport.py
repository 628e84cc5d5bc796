"""What the transports share: events out of a stream of bytes, however it is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.messages import BadFrameError
from server.transport import FrameSplitter


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
