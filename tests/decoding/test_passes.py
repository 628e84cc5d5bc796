"""A row that belongs to nobody, and what is copied over it."""

from dataclasses import astuple, fields

import torch

from decoding.passes import Pass
from tests.decoding.tiny import CPU


def test_padding_sees_one_column_and_writes_to_trash() -> None:
    blank = Pass.blank(3, 2, 8, CPU)
    blank.pad(63)
    assert (blank.columns == 63).all()
    assert not blank.token_ids.any()
    assert not blank.positions.any()
    assert not blank.key_positions.any()
    assert blank.mask[:, :, 0].all()
    assert not blank.mask[:, :, 1:].any()


def test_a_taken_pass_lies_in_its_rows_alone() -> None:
    whole, part = Pass.blank(4, 2, 8, CPU), Pass.blank(2, 2, 8, CPU)
    whole.pad(63)
    for tensor in (getattr(part, each.name) for each in fields(part)):
        tensor.fill_(1)
    whole.take(slice(1, 3), part)
    for found, expected in zip(astuple(whole), astuple(part), strict=True):
        assert torch.equal(found[1:3], expected)
    assert (whole.columns[[0, 3]] == 63).all()
    assert not whole.mask[[0, 3], :, 1:].any()
