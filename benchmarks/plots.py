"""Draw what `benchmarks.sweep` measured: quality against block efficiency and against speed.

python -m benchmarks.plots build/sweep-T.jsonl --out docs/images
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, Any]
COLORS = {"target": "#0072b2", "best": "#d55e00", "max": "#009e73", "own": "#cc79a7"}
NAMES = {
    "target": "mmtad, reference target",
    "best": "mmtad, reference draft (best)",
    "max": "mmtad, draft's maximum",
    "own": "mmtad, node's own",
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
        own = [row for row in rows if row["method"] == "mmtad" and row.get("reference") == reference]
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
    """Two panels side by side with one legend below."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for axes, speed in zip(panels, SPEEDS, strict=True):
        draw(axes, rows, speed, quality)
    panels[1].set_ylabel("")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def read(path: Path) -> list[Row]:
    """The lines of a sweep."""
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plots", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = read(arguments.sweep)
    written = []
    for temperature in sorted({row["T"] for row in rows}):
        own = [row for row in rows if row["T"] == temperature]
        for quality in (name for name in QUALITIES if name in own[0]):
            path = arguments.out / f"{arguments.sweep.stem}-temperature-{temperature:g}-{quality}.png"
            title = f"Pair {own[0]['pair']}, temperature {temperature:g}, {own[0]['prompts']} prompts"
            picture(own, quality, title, path)
            written.append(str(path))
            print(path, flush=True)
    print(json.dumps({"images": written}))


if __name__ == "__main__":
    main()
