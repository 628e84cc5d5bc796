"""A load test as one HTML file: conditions, every figure, and plots as SVG inside it."""

import html
import io
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

Point = dict[str, Any]
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#333333")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
COSTS = {
    "joules_per_token": "joules per token",
    "cpu_seconds_per_token": "CPU seconds per token (a proxy for energy)",
}
LATENCIES = {
    "ttft": "time to first token, s",
    "tpot": "time per output token, s",
    "e2e": "whole request, s",
}
STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 84rem; margin: 0 auto; padding: 1.5rem; background: #fff; color: #1b1f24; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .78rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .4rem; text-align: right; border-bottom: 1px solid #d0d7de; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tbody tr.first td { border-top: 2px solid #8c959f; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: .1rem 1.5rem; }
dl div { display: flex; gap: .6rem; font-size: .85rem; }
dt { color: #57606a; } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; background: #fff; border-radius: .4rem; } figure svg { max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) {
  body { background: #0d1117; color: #e6edf3; } dt { color: #9aa5b1; }
  th, td { border-color: #30363d; } tbody tr.first td { border-top-color: #6e7681; }
}
"""
NOTES = (
    "Tokens are counted by the server's usage. Latencies count from when a request was due; time per output "
    "token is (end - first token) / (tokens - 1). Goodput is requests per second within the objective. "
    "Percentiles are over all served requests of a point."
)


def report(result: dict[str, Any]) -> str:
    """The whole document; `result` is what `benchmarks.serve` prints as JSON."""
    points: list[Point] = result["points"]
    conditions = {**result["conditions"], "objective": describe_objective(result["objective"])}
    told = {name.replace("_", " "): value for name, value in conditions.items() if value is not None}
    listed = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(each)}</dd></div>" for name, each in told.items()
    )
    parts = [
        f"<h1>Load test of {_text(result['conditions']['model'])}</h1><dl>{listed}</dl><p>{NOTES}</p>",
        _figure("Load and cost", _load_plots(points)),
        *(_figure(f"Latencies, {name}", figure) for name, figure in _latency_plots(points)),
        _figure("Acceptance by depth", _acceptance_plot(points)),
        f'<h2>Every point</h2><div class="wide">{_table(points)}</div>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Load test</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def write_load_plots(points: list[Point], path: Path) -> None:
    """The plots of the closed loop as an image; raises ValueError when there is none in `points`."""
    figure = _load_plots(points)
    if figure is None:
        raise ValueError("nothing to plot: no number of clients was measured; give --concurrency")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def describe_objective(objective: dict[str, float]) -> str:
    return f"first token within {objective['ttft']:g} s, then at most {objective['tpot']:g} s per token"


def describe_load(point: Point) -> str:
    if point["mode"] == "closed":
        return f"concurrency {point['concurrency']}"
    return f"{point['share_of_capacity']:g} of capacity"


def _by_method(points: Iterable[Point]) -> dict[str, list[Point]]:
    methods: dict[str, list[Point]] = {}
    for point in points:
        methods.setdefault(point["method"], []).append(point)
    return methods


def _panel(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _load_plots(points: list[Point]) -> Figure | None:
    closed = [point for point in points if point["mode"] == "closed"]
    costs = [name for name in COSTS if any(name in point for point in closed)]
    shown: list[tuple[str, Callable[[Point], float | None]]] = [
        ("tokens per second", lambda point: point["tokens_per_second"]),
        ("goodput, requests per second", lambda point: point["goodput"]),
        *((COSTS[name], lambda point, name=name: point.get(name)) for name in costs),
    ]
    if not closed:
        return None
    figure, grid = plt.subplots(1, len(shown), figsize=(4.6 * len(shown), 3.6), squeeze=False)
    looks = _looks(points)
    for axes, (title, take) in zip(grid[0], shown, strict=True):
        _panel(axes, title, "concurrent clients")
        for method, own in _by_method(closed).items():
            known = [(point["concurrency"], value) for point in own if (value := take(point)) is not None]
            axes.plot(*zip(*known, strict=True), **looks[method], label=method) if known else None
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({point["concurrency"] for point in closed}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_ylim(bottom=0)
    for point in (each for each in closed if "tokens_per_second_range" in each):
        color = looks[point["method"]]["color"]
        grid[0][0].vlines(point["concurrency"], *point["tokens_per_second_range"], color=color, lw=1)
    return _with_legend(figure, grid[0][0])


def _latency_plots(points: list[Point]) -> Iterable[tuple[str, Figure | None]]:
    """Distributions at the least and the most clients, and at each arrival rate."""
    looks = _looks(points)
    loads = list(dict.fromkeys((point["mode"], describe_load(point)) for point in points))
    closed = [load for load in loads if load[0] == "closed"]
    for mode, load in dict.fromkeys(
        [*closed[:1], *closed[-1:], *(each for each in loads if each[0] == "open")]
    ):
        own = [point for point in points if (point["mode"], describe_load(point)) == (mode, load)]
        figure, grid = plt.subplots(1, 3, figsize=(13.8, 3.2), squeeze=False)
        for axes, (name, title) in zip(grid[0], LATENCIES.items(), strict=True):
            _panel(axes, title, "")
            for point in own:
                values = np.sort(point["samples"][name])
                if len(values):
                    shares = np.arange(1, len(values) + 1) / len(values)
                    axes.step(
                        values,
                        shares,
                        where="post",
                        color=looks[point["method"]]["color"],
                        label=point["method"],
                    )
            axes.set_xlim(left=0)
            axes.set_ylim(0, 1.02)
        grid[0][0].set_ylabel("share of requests", fontsize=9)
        yield load, _with_legend(figure, grid[0][0])


def _acceptance_plot(points: list[Point]) -> Figure | None:
    """At the least load, where nothing adapts to it."""
    first = {method: own[0] for method, own in _by_method(points).items() if "accepted_by_depth" in own[0]}
    if not first:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    _panel(axes, "steps that accepted at least this many draft tokens", "depth")
    looks = _looks(points)
    for method, point in first.items():
        shares = point["accepted_by_depth"]
        axes.plot(range(1, len(shares) + 1), shares, **looks[method], label=method)
    axes.set_xticks(range(1, 1 + max(len(point["accepted_by_depth"]) for point in first.values())))
    axes.set_ylim(0, 1)
    return _with_legend(figure, axes)


def _looks(points: Iterable[Point]) -> dict[str, dict[str, Any]]:
    """One colour and mark per method, the same in every plot."""
    marks = itertools.cycle(zip(COLORS, MARKS, strict=True))
    return {
        method: {"color": color, "marker": mark, "ms": 5, "lw": 1.6}
        for method, (color, mark) in zip(_by_method(points), marks, strict=False)
    }


def _with_legend(figure: Figure, axes: Axes) -> Figure:
    handles, labels = axes.get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    if handles:
        figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


def _figure(title: str, figure: Figure | None) -> str:
    if figure is None:
        return ""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    plt.close(figure)
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{_text(title)}" ', 1)
    return f"<h2>{_text(title)}</h2><figure>{svg}</figure>"


def _table(points: Sequence[Point]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in columns(points[0]))
    body, before = "", None
    for point in points:
        cells = "".join(f"<td>{_text(value)}</td>" for value in columns(point).values())
        body += f'<tr class="{"first" if describe_load(point) != before else ""}">{cells}</tr>'
        before = describe_load(point)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def columns(point: Point) -> dict[str, str]:
    """One row of the table, also for a terminal; what a point does not have is a dash."""
    row = {"load": describe_load(point), "method": point["method"]}
    row |= {
        "tokens/s": _number(point["tokens_per_second"], 1),
        "range": _range(point.get("tokens_per_second_range")),
        "requests/s": _number(point["requests_per_second"], 2),
    }
    row |= {"goodput": _number(point["goodput"], 2)}
    for name in LATENCIES:
        for percentile in ("p50", "p90", "p99"):
            row[f"{name} {percentile}"] = _number(point.get(name, {}).get(percentile), 3)
    row["J/token"] = _number(point.get("joules_per_token"), 3)
    row["CPU s/token"] = _number(point.get("cpu_seconds_per_token"), 4)
    row["accepted length"] = _number(point.get("mean_acceptance_length"), 2)
    row["log-prob"] = _number(point.get("target_logprob_mean"), 3)
    row["errors"] = ", ".join(f"{count} x {kind}" for kind, count in point["errors"].items()) or "0"
    return row


def _range(bounds: Sequence[float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.1f} to {bounds[1]:.1f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _text(value: Any) -> str:
    return html.escape(str(value))
