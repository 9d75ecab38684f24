"""Bars of the quality benchmark: image AUROC and pixel AUPRO of each family by method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # the extra `bench`

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f00", "#404040")
SHOWN = {"image_AUROC": "image AUROC", "pixel_AUPRO": "pixel AUPRO"}


def plot(families: list[dict[str, Any]], path: Path) -> None:
    """Draw a row of panels a metric and share of defects, a column a number of normal images."""
    columns = list(dict.fromkeys(row["shots"] for row in families))
    shares = list(dict.fromkeys(row["contaminate"] for row in families))
    lines = [(metric, share) for metric in SHOWN for share in shares]
    names = list(dict.fromkeys(row["family"] for row in families))
    methods = list(dict.fromkeys(row["method"] for row in families))
    size = (max(4.0, 1.2 + 0.9 * len(names)) * len(columns), 2.6 * len(lines))
    figure = Figure(figsize=(min(size[0], 22), size[1]), dpi=80, layout="constrained")
    panels = figure.subplots(len(lines), len(columns), squeeze=False, sharex=True, sharey="row")
    for (metric, share), axes in zip(lines, panels, strict=True):
        for shots, one in zip(columns, axes, strict=True):
            some = [row for row in families if (row["shots"], row["contaminate"]) == (shots, share)]
            _bars(one, some, metric, names, methods)
            one.set_title(f"{shots} normal images" + (f", {share:.0%} defects among them" if share else ""), fontsize=9)
        axes[0].set_ylabel(SHOWN[metric])
        ends = [row[name] for row in families if row["contaminate"] == share for name in (metric, f"{metric}_95")
                if row.get(name) is not None]  # fmt: skip
        axes[0].set_ylim(max(0.0, float(np.min([np.min(one) for one in ends], initial=1)) - 0.05), 1.0)
    known = [dict(zip(*reversed(one.get_legend_handles_labels()), strict=True)) for one in panels[0]]
    handles = [next(one[method] for one in known if method in one) for method in methods]
    figure.legend(handles, methods, loc="outside upper center", ncols=len(methods), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _bars(axes: Axes, rows: list[dict[str, Any]], metric: str, names: list[str], every: list[str]) -> None:
    """Draw a group of bars a family, a bar a method, with the intervals that there are; `every` gives the colours."""
    methods = [method for method in every if any(row["method"] == method for row in rows)]
    width = 0.8 / max(1, len(methods))
    for number, method in enumerate(methods):
        of = {row["family"]: row for row in rows if row["method"] == method and row[metric] is not None}
        at = [names.index(family) + (number - (len(methods) - 1) / 2) * width for family in of]
        values = np.array([row[metric] for row in of.values()])
        ends = [row.get(f"{metric}_95") for row in of.values()]
        error = np.abs(np.array(ends).T - values) if values.size and all(ends) else None
        colour = COLOURS[every.index(method) % len(COLOURS)]
        axes.bar(at, values, width, yerr=error, label=method, color=colour, error_kw={"lw": 0.8})
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axes.grid(axis="y", lw=0.4, c="0.85")
    axes.set_axisbelow(True)
