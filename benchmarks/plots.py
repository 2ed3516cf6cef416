"""The report's pictures, drawn with matplotlib (SVG) and Pillow (PNG), returned as bytes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from PIL import Image

INK, GREY, LIGHT = "#1d2733", "#6b7785", "#d9dee4"
COLOURS = ("#0b6fa4", "#d1603d", "#2f8f4e", "#8457aa", "#b8860b", "#c2457d", "#4f5d6b", "#17a2a2")
KINDS = {"teacher": ("#4f5d6b", "s"), "student": ("#8457aa", "D"), "onnx": ("#0b6fa4", "o"), "engine": ("#2f8f4e", "^")}
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LIGHT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "svg.hashsalt": "edgestill",
}
ABOVE: dict[str, Any] = {  # a legend over its panel, headed by the panel's title: inside it would cover curves
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "borderaxespad": 0.2,
    "alignment": "left",
    "title_fontproperties": {"size": 10, "weight": "bold"},
    "fontsize": 7,
    "ncols": 3,
}
FEW = 15  # points of a curve that are marked
TEST = "test, watched only"
LOSSES = {
    *("loss", "ce", "kl", "mse", "l1", "l2", "kd"),
    *(
        "distance",
        "diversity",
        "path",
        "paths",
        "destination",
        "destinations",
        "features",
        "branches",
        "truth",
        "ranking",
    ),
}
SKIPPED = ("epoch", "step", "lr", "seconds", "samples_per_second", "stage")


@dataclass(frozen=True)
class Point:
    """A model in the accuracy-latency plane; latency in ms with its interval."""

    name: str
    kind: str
    ms: float
    low_ms: float
    high_ms: float
    score: float


def pareto(points: Sequence[Point], metric: str, higher_is_better: bool, batch: str, best: str | None) -> bytes:
    """SVG: score against p50 latency (log scale); the front, intervals, and a label at every point. Up is better."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.3), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_xscale("log")
        front = pareto_front(points, higher_is_better)
        axes.step(
            [p.ms for p in front],
            [p.score for p in front],
            where="post",
            color=LIGHT,
            linewidth=3,
            zorder=1,
            label="front",
        )
        for point in points:
            colour, marker = KINDS.get(point.kind, (COLOURS[0], "o"))
            axes.plot([point.low_ms, point.high_ms], [point.score] * 2, color=colour, linewidth=1.2, zorder=2)
            axes.plot(point.ms, point.score, marker, color=colour, markersize=8, markeredgecolor="white", zorder=3)
            if point.name == best:
                ring: Any = {
                    "markersize": 15,
                    "markerfacecolor": "none",
                    "markeredgecolor": "#2f8f4e",
                    "markeredgewidth": 1.6,
                }
                axes.plot(point.ms, point.score, "o", zorder=2, **ring)
        axes.margins(0.14, 0.18)
        if len({p.score for p in points}) == 1:
            margin = abs(points[0].score) / 50 or 1.0
            axes.set_ylim(points[0].score - margin, points[0].score + margin)
        axes.yaxis.set_inverted(not higher_is_better)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(_minor))
        axes.tick_params(axis="x", which="minor", labelsize=7)
        axes.set_xlabel(f"latency, batch {batch}, p50 (ms, log scale; bars: 95 % interval)")
        axes.set_ylabel(metric)
        canvas.draw()  # type: ignore[no-untyped-call]
        _label(axes, canvas, points, best)
        return _svg(figure)


def _minor(value: float, _: int) -> str:
    digit = value / 10 ** np.floor(np.log10(value))
    return f"{value:g}" if round(digit) in (2, 5) else ""


def pareto_front(points: Iterable[Point], higher_is_better: bool) -> list[Point]:
    """The points that no other beats in both latency and score, fastest first."""
    front: list[Point] = []
    sign = 1 if higher_is_better else -1
    for point in sorted(points, key=lambda p: (p.ms, -sign * p.score)):
        if not front or sign * point.score > sign * front[-1].score:
            front.append(point)
    return front


def _label(axes: Any, canvas: Any, points: Sequence[Point], best: str | None) -> None:
    """Put each name where it covers no other name and no point, trying places ever further away."""
    renderer = canvas.get_renderer()
    places = axes.transData.transform([(p.ms, p.score) for p in points])
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in places]
    frame = axes.get_window_extent(renderer)
    for (_x, _y), point in zip(places, points, strict=True):
        for reach in range(1, 12):
            directions = [(0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0)]
            for dx, dy in directions:
                note = axes.annotate(
                    point.name,
                    (point.ms, point.score),
                    xytext=(8 * reach * dx, 8 * reach * dy),
                    textcoords="offset points",
                    ha={0: "center", 1: "left", -1: "right"}[dx],
                    va={0: "center", 1: "bottom", -1: "top"}[dy],
                    fontsize=8.5,
                    path_effects=[withStroke(linewidth=2.5, foreground="white")],
                    fontweight="bold" if point.name == best else "normal",
                    arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6} if reach > 1 else None,
                )
                box = Bbox.from_extents(*(note.get_window_extent(renderer).extents + np.array([-1, -1, 1, 1])))
                inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
                if inside and not any(box.overlaps(other) for other in taken):
                    taken.append(box)
                    break
                note.remove()
            else:
                continue
            break


# --- training


def scalars(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Stage -> scalar -> (epoch or step, value) of a train.jsonl; nested mappings become ``val accuracy``.

    The ``course`` of a scalar within a line's epoch takes the place of the epoch's mean.
    """
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in lines:
        x = line.get("epoch", line.get("step"))
        if not isinstance(x, (int, float)):
            continue
        stage = found.setdefault(str(line.get("stage", "")), {})
        flat = dict(line)
        for key, value in line.items():
            if isinstance(value, Mapping):
                flat |= {f"{key} {name}": item for name, item in value.items()}
        course = line.get("course", [])
        within = {key for part in course for key in part}
        flat = {key: value for key, value in flat.items() if key not in within}
        for at, values in [*((x * part["step"] / line["step"], part) for part in course), (x, flat)]:
            for key, value in values.items():
                if key not in SKIPPED and isinstance(value, (int, float)) and not isinstance(value, bool):
                    stage.setdefault(key, []).append((float(at), float(value)))
    return found


def groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Scalars by what they tell: validation, test, losses, training accuracies, coefficients, prototypes, the rest."""
    found: dict[str, list[str]] = {
        "validation": [],
        TEST: [],
        "losses": [],
        "training accuracy": [],
        "coefficient": [],
        "prototypes": [],
        "other": [],
    }
    for name in names:
        words = set(name.lower().replace("_", " ").replace("/", " ").split())
        if "val" in words:
            key = "validation"
        elif "test" in words:
            key = TEST
        elif "coefficient" in words:
            key = "coefficient"
        elif words & {"prototype", "prototypes", "perplexity", "usage", "entropy"}:
            key = "prototypes"
        elif words & {"accuracy", "acc", "agreement"}:
            key = "training accuracy"
        elif words & LOSSES:
            key = "losses"
        else:
            key = "other"
        found[key].append(name)
    return {key: members for key, members in found.items() if members}


def _by_size(title: str, names: list[str], curves: Mapping[str, Sequence[tuple[float, float]]]) -> list[list[str]]:
    """Scalars that share a panel: outside the losses, none dwarfs another twentyfold; among scores, fivefold."""
    if title == "losses":
        return [names]
    most = 5 if title in ("validation", TEST) else 20
    size = {name: float(np.abs(np.array(curves[name])[:, 1]).max()) for name in names}
    parts: list[list[str]] = []
    for name in sorted(names, key=lambda n: -size[n]):
        if parts and size[parts[-1][0]] <= most * size[name]:
            parts[-1].append(name)
        else:
            parts.append([name])
    return parts


def training(curves: Mapping[str, Sequence[tuple[float, float]]], axis: str) -> bytes:
    """SVG: a panel per group of scalars, over epochs or steps. A panel of one sign and wide range is logarithmic."""
    panels = [(title, part) for title, names in groups(curves).items() for part in _by_size(title, names, curves)]
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    last = max((x for points in curves.values() for x, _ in points), default=1)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * columns, 2.8 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        for number, (title, names) in enumerate(panels):
            axes = figure.add_subplot(rows, columns, number + 1)
            for index, name in enumerate(sorted(names, key=lambda n: (n != "loss", n))):
                x, y = np.array(curves[name]).T
                style = ".-" if len(x) <= FEW else "-"
                label = name.removeprefix("val ").removeprefix("test ")
                axes.plot(x, y, style, color=COLOURS[index % len(COLOURS)], linewidth=1.4, label=label)
            values = np.concatenate([np.array(curves[name])[:, 1] for name in names])
            if title == "losses" and values.min() > 0 and values.max() > 50 * values.min():
                axes.set_yscale("log")
            axes.set_xlim(-0.03 * last, 1.03 * last)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            axes.set_xlabel(axis)
            axes.legend(title=title, **ABOVE)
        return _svg(figure)


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


# --- samples


def png(image: NDArray[Any], least: int = 0) -> bytes:
    """PNG of uint8 (H, W), (H, W, 1) or (H, W, 3), enlarged by whole pixels to a side of at least ``least``."""
    pixels = np.asarray(image, dtype=np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    factor = max(1, -(-least // min(pixels.shape[:2])))
    pixels = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def class_colour(index: int) -> tuple[int, int, int]:
    """A fixed colour for a class: hues a golden angle apart, three lightnesses in turn."""
    import colorsys

    red, green, blue = colorsys.hls_to_rgb((0.58 + index * 0.381966) % 1, (0.45, 0.62, 0.33)[index % 3], 0.62)
    return round(255 * red), round(255 * green), round(255 * blue)


def colour_mask(mask: NDArray[Any], classes: int, ignore_index: int | None) -> NDArray[np.uint8]:
    """(H, W) class numbers as (H, W, 3) colours; what is ignored is nearly white."""
    palette = np.full((256, 3), 240, np.uint8)
    palette[:classes] = [class_colour(index) for index in range(classes)]
    if ignore_index is not None and 0 <= ignore_index < 256:
        palette[ignore_index] = 240
    found: NDArray[np.uint8] = palette[np.clip(np.asarray(mask), 0, 255).astype(np.uint8)]
    return found
