"""Pictures of question answering for the report: the matrix of language pairs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

INK, GREY = "#1d2733", "#6b7785"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": GREY,
    "ytick.color": GREY,
}
LEAST_REACH = 5.0  # points of F1 at the ends of the scale of a difference


def matrices(languages: Sequence[str], cells: Mapping[str, NDArray[Any]]) -> list[tuple[str, bytes]]:
    """PNG of the student's mean F1 in percent by question (row) and context language (column); beside a teacher, also
    what the student has more or less than it."""
    panels = [("student", np.asarray(cells["student"]), False)] if "student" in cells else []
    if "teacher" in cells:
        panels.insert(0, ("teacher", np.asarray(cells["teacher"]), False))
    if len(panels) == 2:
        panels.append(("student − teacher", panels[1][1] - panels[0][1], True))
    if not panels or all(np.isnan(panel[1]).all() for panel in panels):
        return []
    side = 1.1 + 0.42 * len(languages)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(len(panels) * (side + 0.9), side + 0.5), layout="constrained", dpi=110)
        FigureCanvasAgg(figure)
        for number, (title, values, difference) in enumerate(panels, start=1):
            _panel(figure.add_subplot(1, len(panels), number), title, values, languages, difference)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return [("F1 of every question language and context language", buffer.getvalue())]


def _panel(axes: Any, title: str, values: NDArray[Any], languages: Sequence[str], difference: bool) -> None:
    reach = max(LEAST_REACH, float(np.nanmax(np.abs(values)))) if difference else 0.0
    low, high = (-reach, reach) if difference else (0.0, 100.0)
    axes.imshow(values, cmap="RdBu" if difference else "Blues", vmin=low, vmax=high)
    for row, column in np.argwhere(np.isfinite(values)):
        value = float(values[row, column])
        dark = abs(value) > 0.6 * high
        text = f"{value:+.0f}".replace("-", "−") if difference and round(value) else f"{abs(value):.0f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else INK)
    places = range(len(languages))
    axes.set_xticks(places, languages)
    axes.set_yticks(places, languages)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("language of the context")
    axes.set_ylabel("language of the question")
    axes.set_title(title)
