"""Predicted paths as pictures: what was seen, what came, and the K futures; drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain import metrics
from toolchain.tasks import Arrays, Split

Points = NDArray[Any]
INK, LIGHT, PALE = "#1d2733", "#d9dee4", "#f5f7f9"
TRUTH, PATH, BEST, TOP = "#2f8f4e", "#0b6fa4", "#d1603d", "#8457aa"
BARS = {"m": 1, "px": 50}  # length of the scale bar
COLUMNS, SIDE = 4, 2.55  # panels in a row, inches of each
FAINTEST = 0.12
STYLE: Any = {"font.family": "DejaVu Sans", "font.size": 8, "text.color": INK, "axes.edgecolor": LIGHT}


def figures(split: Split, outputs: Mapping[str, Arrays]) -> list[tuple[str, bytes]]:
    """A title and a PNG for each half of ``split``: the student's worst, then samples drawn at random.

    ``outputs`` holds ``trajectories`` (N, K, T, 2) and ``probability`` (N, K) by who predicted; of one sample all stand
    side by side, on the same scale.
    """
    half = (len(split) + 1) // 2
    parts = (
        ("Predicted paths: the student's worst, worst first", np.arange(half)),
        ("Predicted paths: drawn at random", np.arange(half, len(split))),
    )
    return [(title, _grid(split, outputs, index)) for title, index in parts if len(index)]


def _grid(split: Split, outputs: Mapping[str, Arrays], index: NDArray[np.int64]) -> bytes:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(COLUMNS, len(outputs)) // len(outputs) * len(outputs)
    rows = -(-len(index) * len(outputs) // columns)
    unit = split.meta["unit"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(SIDE * columns, (SIDE + 0.25) * rows + 0.3), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        place = 0
        for number, sample in enumerate(index):
            observed, future = (np.asarray(split.arrays[name][sample], np.float64) for name in ("observed", "future"))
            shown = {who: np.asarray(arrays["trajectories"][sample], np.float64) for who, arrays in outputs.items()}
            limits = _limits([observed, future, *shown.values()])
            for who, paths in shown.items():
                place += 1
                axes = figure.add_subplot(rows, columns, place)
                pair = columns // len(outputs)
                axes.set_facecolor(PALE if (number + number // pair) % 2 else "white")
                draw(axes, observed, future, paths, np.asarray(outputs[who]["probability"][sample]))
                axes.set(xlim=limits[0], ylim=limits[1] if unit == "m" else limits[1][::-1])
                _scale_bar(axes, unit)
                found = metrics.displacement_errors(paths[None], future[None])
                title = f"{who}: minADE {found['minADE']:.2f}, minFDE {found['minFDE']:.2f} {unit}"
                axes.set_title(title, fontsize=7.5, loc="left")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        legend: Any = {"handles": handles[::-1], "labels": labels[::-1], "ncols": len(labels), "frameon": False}
        figure.legend(**legend, loc="outside upper left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw(axes: Any, observed: Points, future: Points | None, paths: Points, probability: Points) -> None:
    """Observed (T_o, 2), true (T, 2) and predicted (K, T, 2) positions, each line beginning where observation ends.

    The likelier of ``probability`` (K,), the darker; with a ``future`` the path nearest to it on average is marked.
    """
    start = observed[-1:]
    order = np.argsort(probability, kind="stable")
    top = int(order[-1])
    share = np.asarray(probability, np.float64) / max(float(probability[top]), 1e-12)
    for k in order:
        alpha = FAINTEST + (0.75 - FAINTEST) * share[k]
        line = np.concatenate([start, paths[k]])
        axes.plot(
            *line.T, color=PATH, alpha=alpha, linewidth=0.9, label="predicted, darker: likelier" if k == top else ""
        )
        axes.plot(*paths[k, -1], "o", color=PATH, alpha=alpha, markersize=2)
    if future is not None:
        axes.plot(*np.concatenate([start, future]).T, ".-", color=TRUTH, linewidth=2, markersize=4, label="true future")
        best = int(np.linalg.norm(paths - future, axis=-1).mean(-1).argmin())
        axes.plot(*np.concatenate([start, paths[best]]).T, color=BEST, linewidth=1.6, label="nearest of the predicted")
    axes.plot(*np.concatenate([start, paths[top]]).T, "--", color=TOP, linewidth=1.4, label="most probable")
    axes.plot(*paths[top, -1], "D", color=TOP, markersize=4)
    axes.plot(*observed.T, ".-", color=INK, linewidth=1, markersize=5, label="observed")
    axes.set(aspect="equal", xticks=[], yticks=[])


def _limits(tracks: list[Points]) -> tuple[tuple[float, float], tuple[float, float]]:
    """A square around all ``tracks`` (..., 2), with a margin."""
    points = np.concatenate([track.reshape(-1, 2) for track in tracks])
    low, high = points.min(0), points.max(0)
    centre, half = (low + high) / 2, 0.54 * max(float((high - low).max()), 1e-3)
    (x0, y0), (x1, y1) = centre - half, centre + half
    return (float(x0), float(x1)), (float(y0), float(y1))


def _scale_bar(axes: Any, unit: str) -> None:
    length = BARS.get(unit, 1)
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    x, y = x0 + 0.04 * (x1 - x0), y0 + 0.04 * (y1 - y0)
    axes.plot([x, x + length], [y, y], color=INK, linewidth=2, solid_capstyle="butt")
    axes.annotate(f"{length} {unit}", (x, y), (0, 3), textcoords="offset points", fontsize=7, va="bottom")
