"""Draw what `benchmarks.sweep` measured: quality against block efficiency and against speed.

python -m benchmarks.plots build/sweep-T.jsonl build/sweep-E.jsonl --out docs/images
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, Any]
COLORS = {"target": "#0072b2", "draft": "#d55e00", "max": "#009e73", "own": "#cc79a7"}
NAMES = {
    "target": "mmtad, reference target",
    "draft": "mmtad, reference draft",
    "max": "mmtad, draft's maximum (not served)",
    "own": "mmtad, node's own (not served)",
}
LEVELS = {"greedy": ":", "beam search": "--", "exact mtjd": "-."}
QUALITIES = {"right": "right answers", "difference": "log-probability over sampling, nats per token"}
SPEEDS = {"BE": "block efficiency, tokens per target step", "S": "speed over plain decoding"}
INK = "#333333"


def frontier(rows: Iterable[Row], speed: str, quality: str) -> list[Row]:
    """The rows that no other row beats in both, by rising speed."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda each: (-each[speed], -each[quality])):
        if not kept or row[quality] > kept[-1][quality]:
            kept.append(row)
    return kept[::-1]


def draw(axes: Axes, rows: list[Row], speed: str, quality: str) -> None:
    """One panel: all configurations faintly, each reference's frontier as a line, the others labelled."""
    for reference, color in COLORS.items():
        own = [row for row in rows if row.get("reference") == reference and speed in row]
        if not own:
            continue
        axes.scatter([r[speed] for r in own], [r[quality] for r in own], s=9, color=color, alpha=0.25, lw=0)
        best = frontier(own, speed, quality)
        axes.plot(
            [row[speed] for row in best],
            [row[quality] for row in best],
            color=color,
            lw=1.8,
            marker="o",
            ms=3.5,
            label=NAMES[reference],
        )
    _draw_lossless(axes, rows, speed, quality)
    for method, style in LEVELS.items():
        for row in (each for each in rows if each["method"] == method):
            axes.axhline(row[quality], color=INK, lw=1, ls=style, alpha=0.8, label=method)
    axes.set_xlabel(SPEEDS[speed])
    axes.set_ylabel(QUALITIES[quality])
    axes.grid(alpha=0.2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_lossless(axes: Axes, rows: list[Row], speed: str, quality: str) -> None:
    """Plain decoding and speculative chains and trees, which follow the target's law exactly."""
    marks = {
        "target": ("s", "target (sampling)"),
        "spec": ("^", "speculative, block"),
        "multi": ("D", "multi_candidate"),
    }
    for start, (mark, label) in marks.items():
        own = [row for row in rows if row["method"].startswith(start) and speed in row]
        places = [row[speed] for row in own], [row[quality] for row in own]
        axes.scatter(*places, marker=mark, s=34, color=INK, zorder=3, label=label)


def picture(rows: list[Row], quality: str, title: str, path: Path) -> None:
    """A panel per measure of speed that the rows have, with one legend below."""
    speeds = [name for name in SPEEDS if any(name in row and row["method"] == "mmtad" for row in rows)]
    figure, grid = plt.subplots(
        1, len(speeds), figsize=(5.5 * len(speeds), 5), sharey=True, squeeze=False, layout="constrained"
    )
    panels = grid[0]
    for axes, speed in zip(panels, speeds, strict=True):
        draw(axes, rows, speed, quality)
    for axes in panels[1:]:
        axes.set_ylabel("")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2 * len(speeds), frameon=False, fontsize=9
    )
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def shape(row: Row) -> tuple[Any, ...]:
    """What decides the cost of a row's step."""
    return tuple(row.get(name) for name in ("pair", "T", "method", "depth", "width"))


def read(path: Path) -> list[Row]:
    """The judged lines of a sweep; S is block efficiency over the step's cost, where that was timed.

    `target` is timed against itself too: what its place in a round makes it faster is taken off the others.
    """
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    costs = {shape(row): row["step_cost"] for row in lines if row.get("timed")}
    rows = [row for row in lines if not row.get("timed")]
    for row in rows:
        plain = costs.get((row["pair"], row["T"], "target", None, None))
        if plain is not None and shape(row) in costs:
            row["S"] = row["BE"] * plain / costs[shape(row)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plots", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("sweeps", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    written = [path for sweep in arguments.sweeps for path in _pictures(sweep, arguments.out)]
    print(json.dumps({"images": [str(path) for path in written]}))


def _pictures(sweep: Path, folder: Path) -> Iterator[Path]:
    """Write a picture per temperature and quality of one sweep."""
    rows = read(sweep)
    for temperature in sorted({row["T"] for row in rows}):
        own = [row for row in rows if row["T"] == temperature]
        for quality in (name for name in QUALITIES if name in own[0]):
            path = folder / f"{sweep.stem}-temperature-{temperature:g}-{quality}.png"
            title = f"Pair {own[0]['pair']}, temperature {temperature:g}, {own[0]['prompts']} prompts"
            picture(own, quality, title, path)
            print(path, flush=True)
            yield path


if __name__ == "__main__":
    main()
