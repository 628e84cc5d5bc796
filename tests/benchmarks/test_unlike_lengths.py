"""Which rows of a mixture are long, and that there are enough tokens for them."""

import pytest

from benchmarks.unlike_lengths import mixture, parse_arguments


@pytest.mark.parametrize(("long_rows", "places"), [(0, []), (1, [4]), (2, [2, 6]), (8, [*range(8)])])
def test_long_rows_lie_far_apart(long_rows: int, places: list[int]) -> None:
    prompts = mixture(list(range(60)), 8, long_rows, short=3, long=50)
    assert [place for place, prompt in enumerate(prompts) if len(prompt) == 50] == places
    assert all(len(prompt) in (3, 50) for prompt in prompts)
    assert len({tuple(prompt) for prompt in prompts}) == 8


def test_too_few_tokens() -> None:
    with pytest.raises(ValueError, match="no 8 prompts of up to 60 tokens"):
        mixture(list(range(60)), 8, 1, short=3, long=60)


def test_more_long_rows_than_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--rows", "4", "--long-rows", "5"])
    assert "--long-rows: there are not so many --rows" in capsys.readouterr().err
