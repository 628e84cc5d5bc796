"""The public names."""

import pytest

import decoding


@pytest.mark.parametrize("name", decoding.__all__)
def test_public_name_exists(name: str) -> None:
    assert getattr(decoding, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'engine_room'"):
        _ = decoding.engine_room
