"""When a long prompt may have its next chunk."""

from decoding.prefill_share import PrefillShare


def test_alone_it_never_waits() -> None:
    share = PrefillShare()
    share.note(1.0, 0.0)
    assert share.allows(others=False)


def test_others_have_as_long_as_a_chunk_took() -> None:
    share = PrefillShare()
    assert share.allows(others=True)
    share.note(0.4, 0.1)
    for _ in range(2):
        assert not share.allows(others=True)
        share.note(0.0, 0.1)
    assert not share.allows(others=True)
    share.note(0.0, 0.11)
    assert share.allows(others=True)


def test_a_chunk_that_takes_less_than_the_step_is_prefilled_in_every_one() -> None:
    share = PrefillShare()
    for _ in range(3):
        assert share.allows(others=True)
        share.note(0.1, 0.3)


def test_what_was_prefilled_while_nobody_else_was_there_is_not_owed() -> None:
    share = PrefillShare()
    for _ in range(10):
        share.note(0.4, 0.0)
    share.note(0.0, 0.41)
    assert share.allows(others=True)
