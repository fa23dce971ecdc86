"""How figures look: for a talk, readable from the last row, and by those who see colours differently (Okabe-Ito)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREY, PALE = "#0072B2", "#D55E00", "#5F6670", "#C9CED6"
SIZE = (11.0, 5.8)

SETTINGS: dict[Any, Any] = {
    "font.size": 15,
    "axes.labelsize": 15,
    "axes.titlesize": 15,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#22262B",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "lines.linewidth": 2.4,
    "lines.markersize": 8,
    "legend.frameon": False,
    "svg.hashsalt": "gvpo",
    "axes.unicode_minus": False,
}


def panels(
    title: str, count: int, *, shape: tuple[int, int] | None = None, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure whose title states the finding, and its panels from left to right."""
    rows, columns = shape or (1, count)
    figure = Figure(figsize=SIZE, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.04)  # pyright: ignore
    figure.suptitle(title, x=0.012, ha="left", fontsize=18, fontweight="bold", color="#22262B")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def note(axes: Axes, text: str, x: float, y: float, color: str, **options: Any) -> None:
    """A label beside what it names, in its colour."""
    axes.annotate(text, (x, y), color=color, fontsize=options.pop("fontsize", 14), annotation_clip=False, **options)


def save(figure: Figure, folder: Path, name: str) -> None:
    """As PNG and as SVG, the same bytes each time."""
    figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def styled() -> Any:
    """The settings, for as long as figures are drawn."""
    return mpl.rc_context(SETTINGS)
