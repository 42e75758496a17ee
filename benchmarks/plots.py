"""Plots of what the benchmarks have measured: SVG files that are readable on a light and on a dark page.

``python -m benchmarks.plots FOLDER`` draws what there is in the folder of `python -m benchmarks`, into docs/.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
GREY = "#808890"
"""Of text and lines: in the middle between white and black."""

OURS, OURS_TOO, MUTED = "#d9730d", "#eda55d", ("#3b82c4", "#2f9e6e", "#9a6fc4", "#b8860b", "#c2557a")

STYLE: Any = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": GREY,
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "geventbatch",
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def median(turns: Iterable[Any], name: str) -> float:
    """Of one figure of all turns."""
    return statistics.median(float(turn[name]) for turn in turns)


def hot_row(lines: Any) -> Figure:
    """Operations per second over callers, near and far."""
    ways = {
        "batches, lock": ("batches, natural", OURS, "-", 2.5),
        "batches, lock, 10 ms": ("batches, 10 ms window", OURS, "--", 1.2),
        "batches, lock, 100 ms": ("batches, 100 ms window", OURS, ":", 1.2),
        "UPDATE … WHERE": ("one atomic UPDATE", MUTED[0], "-", 1.5),
        "SELECT … FOR UPDATE": ("SELECT … FOR UPDATE", MUTED[1], "-", 1.5),
        "advisory lock": ("advisory lock", MUTED[2], "-", 1.5),
        "version, retry": ("version and retry", MUTED[3], "-", 1.5),
    }
    distances = sorted({line["milliseconds_away"] for line in lines})
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.6), sharey=True, layout="constrained")
    for panel, distance in zip(panels, (distances[0], distances[-1]), strict=True):
        for way, (label, colour, style, width) in ways.items():
            some = [line for line in lines if line["way"] == way and line["milliseconds_away"] == distance]
            rates = [median(line["turns"], "rate") for line in some]
            callers = [line["callers"] for line in some]
            panel.loglog(callers, rates, style, color=colour, linewidth=width, marker="o", markersize=2.5, label=label)
        panel.set_title(f"{distance:g} ms of round trip added")
        panel.set_xlabel("callers in a closed loop")
        panel.grid(visible=True)
        panel.minorticks_off()
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:,.0f}")
    panels[0].set_ylabel("operations per second")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def grouped(panel: Axes, groups: list[str], bars: dict[str, list[float]], form: str) -> None:
    """Bars beside each other, with their figures."""
    width = 0.84 / len(bars)
    colours = iter(MUTED)
    for number, (label, heights) in enumerate(bars.items()):
        at = [group + (number - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        colour = {"geventbatch": OURS, "batched": OURS, "geventbatch, bulks": OURS_TOO}.get(label) or next(colours)
        drawn = panel.bar(at, heights, width * 0.92, color=colour, label=label)
        panel.bar_label(drawn, [f"{height:{form}}" for height in heights], color=GREY, fontsize=7, padding=1)
    panel.set_xticks(range(len(groups)), groups)
    panel.grid(visible=True, axis="y")
    panel.set_axisbelow(True)


def peers(lines: Any) -> Figure:
    """CPU time per operation, of each peer."""
    figure, panel = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
    numbers = sorted({line["keys"] for line in lines})
    bars: dict[str, list[float]] = {}
    for keys in numbers:
        for line in lines:
            if line["keys"] == keys:
                bars.setdefault(line["peer"], []).append(median(line["turns"], "nanoseconds") / 1000)
    grouped(panel, [f"{keys:,} key{'s' * (keys > 1)}" for keys in numbers], bars, ".1f")
    panel.set_yscale("log")
    panel.minorticks_off()
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.set_ylabel("µs of CPU per operation")
    figure.legend(loc="outside right center")
    return figure


def web(lines: Any) -> Figure:
    """Per cent of the throughput of an endpoint with nothing behind it."""
    figure, panel = plt.subplots(figsize=(7.2, 3.0), layout="constrained")
    numbers = sorted({line["connections"] for line in lines})
    reached: dict[str, list[float]] = {}
    for connections in numbers:
        some = [line for line in lines if line["connections"] == connections]
        nothing = next(line["turns"] for line in some if line["way"] == "nothing")
        for line in some:
            if line["way"] in {"batched", "atomic UPDATE", "row lock"}:
                parts = [turn["rate"] / most["rate"] * 100 for turn, most in zip(line["turns"], nothing, strict=True)]
                reached.setdefault(line["way"], []).append(statistics.median(parts))
    grouped(panel, [f"{connections:,} connections" for connections in numbers], reached, ".0f")
    panel.axhline(100, color=GREY, linewidth=1, linestyle="--")
    panel.set_ylabel("% of the same endpoint\nwith nothing behind it")
    figure.legend(loc="outside right center")
    return figure


PLOTS: dict[str, Callable[[Any], Figure]] = {"hot_row": hot_row, "peers": peers, "web": web}


def draw(measured: Path, into: Path) -> None:
    """Draw all that there is in *measured*."""
    for name, plot in PLOTS.items():
        found = measured / f"{name}.json"
        if not found.exists():
            print(f"{name} is not plotted: there is no {found}")
            continue
        with mpl.rc_context(STYLE):
            figure = plot(json.loads(found.read_text()))
            figure.savefig(into / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)
        print(f"plotted {into / name}.svg")


def main() -> None:
    """Draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path, metavar="FOLDER")
    parser.add_argument("--into", type=Path, default=DOCS, metavar="FOLDER")
    chosen = parser.parse_args()
    draw(chosen.measured, chosen.into)


if __name__ == "__main__":
    main()
