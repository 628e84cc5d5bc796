"""What passes between ranks: lines, and tensors in one piece."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from decoding.ranks import Order, Share, join, receive, send

CPU = torch.device("cpu")


@pytest.fixture
def group() -> Iterator[Share]:
    """A group of this process alone."""
    share = Share(0, 1, os.memfd_create("ranks"), "target", "float32", "cpu")
    join(share)
    yield share
    dist.destroy_process_group()
    os.close(share.store)


def test_a_line_says_what_a_rank_is_for() -> None:
    share = Share(1, 2, 5, "some/model", "auto", "cuda")
    assert share.to_line().endswith("}\n")
    assert Share.from_line(share.to_line()) == share


def test_tensors_arrive_by_their_layouts(group: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.arange(12).view(3, 4)[:, 1:3], torch.tensor([[True, False, True]]), torch.ones(0).bool()]
    order = Order.from_line(Order.of("run", [0, 3, 1], tensors).to_line())
    assert order.layouts == [["int64", [3, 2]], ["bool", [1, 3]], ["bool", [0]]]
    pieces: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "broadcast", lambda piece, src: pieces.append(piece))
    send(tensors)
    monkeypatch.setattr(dist, "broadcast", lambda piece, src: piece.copy_(pieces[0]))
    assert all(map(torch.equal, receive(order, CPU), tensors))
    assert receive(Order("copy_row", [0, 1, 2]), CPU) == []


def test_a_wide_tensor_behind_a_narrow_one_would_lie_askew() -> None:
    with pytest.raises(AssertionError):
        send([torch.zeros(3, dtype=torch.bool), torch.zeros(2, dtype=torch.long)])


def test_ranks_meet_on_the_loopback_interface_in_a_file_without_a_name(group: Share) -> None:
    assert dist.get_backend() == "gloo"
    assert dist.get_world_size() == 1
    assert "deleted" in os.readlink(f"/proc/self/fd/{group.store}")
