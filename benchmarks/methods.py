"""The configurations that one run compares: every method, at equal depth and at equal verified nodes."""

from collections.abc import Iterator
from typing import Any

from decoding import DecodingConfig

JOINT = ("mtad", "mmtad")
REFERENCES = ("draft", "target")


def configurations(depths: list[int], widths: list[int], thresholds: list[float]) -> Iterator[DecodingConfig]:
    """All methods, `target` first. `multi_candidate` verifies as many nodes as `mmtad` at the same depth."""
    yield DecodingConfig(method="target")
    yield DecodingConfig(method="draft")
    for depth in depths:
        yield DecodingConfig(method="speculative", num_speculative_tokens=depth)
        yield DecodingConfig(method="speculative", num_speculative_tokens=depth, acceptance="block")
        for width in widths:
            yield from _with_beams(depth, width, thresholds)


def _with_beams(depth: int, width: int, thresholds: list[float]) -> Iterator[DecodingConfig]:
    for candidates in equal_trees(depth, width):
        yield DecodingConfig(method="multi_candidate", candidates_per_level=candidates)
    shared: dict[str, Any] = {"num_speculative_tokens": depth, "beam_width": width}
    yield DecodingConfig(method="mtjd", **shared)
    for method in JOINT:
        for reference in REFERENCES:
            for threshold in thresholds:
                yield DecodingConfig(
                    method=method,  # type: ignore[arg-type]
                    acceptance_reference=reference,  # type: ignore[arg-type]
                    acceptance_threshold=threshold,
                    **shared,
                )


def equal_trees(depth: int, width: int) -> list[tuple[int, ...]]:
    """Children per level of the trees with exactly, and of the bushiest with at most, depth * width nodes."""
    chains = (width, *(1,) * (depth - 1))
    bushy = max(_splits(depth, depth * width), key=lambda each: (each.count(2), nodes(each)))
    return [chains] if bushy == chains or bushy.count(2) < 2 else [chains, bushy]


def _splits(depth: int, most: int) -> Iterator[tuple[int, ...]]:
    """Trees of twos and ones from the root on that have at most `most` nodes."""
    for twos in range(depth + 1):
        candidates = (2,) * twos + (1,) * (depth - twos)
        if nodes(candidates) <= most:
            yield candidates


def nodes(candidates: tuple[int, ...]) -> int:
    """Nodes of a tree with so many children per level, its root apart."""
    total, level = 0, 1
    for children in candidates:
        level *= children
        total += level
    return total
