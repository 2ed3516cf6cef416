"""Pictures of what prototypes hold: the image patches nearest to each, and how much each is used.

    python -m benchmarks.prototypes CONFIG RUN OUT [KEY=VALUE ...]

CONFIG of method prockd, preset assignment; RUN a folder with its ``data`` and ``features``. The prototypes are those
that a training of CONFIG learns, for it learns them before anything else, from the teacher's tokens and the seed. In
OUT: ``<name>-patches.png`` of the deepest tap, and ``<name>-usage.png`` of all.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.plots import COLOURS, GREY, STYLE
from toolchain.artifact import EdgestillError
from toolchain.config import Config, load
from toolchain.methods.prototypes import Banks, first_tokens, unit
from toolchain.stage import console, guard
from toolchain.tasks import Data, load_data
from toolchain.train import Run

Array = NDArray[Any]
ROWS, COLUMNS = 10, 8
CONTEXT = 1.5  # cells of the teacher's grid on each side of a patch's centre
COARSE = 4  # on a grid of so few cells a side the whole image is shown


@dataclass(frozen=True)
class Tap:
    """One bank: ``share`` (K,) of all tokens in percent, ``nearest`` (K, COLUMNS) token numbers, ``perplexity``."""

    share: Array
    nearest: Array
    perplexity: float


@dataclass(frozen=True)
class Found:
    """The banks over the training images; token n lies in image ``n // (h w)``, at cell ``n % (h w)`` of ``grid``."""

    taps: list[Tap]
    grid: tuple[int, int]


def look(cfg: Config, data: Data, inputs: dict[str, Path]) -> Found:
    """Learn the banks as a training of ``cfg`` does, and assign every training image's tokens to them."""
    if cfg.method.name != "prockd" or not cfg.method.w_P:
        raise EdgestillError("method: expected prockd with preset assignment, found another; give the key")
    if cfg.method.learner:
        raise EdgestillError(
            f"method.train_prototypes: expected prototypes learned before the training, found {cfg.method.learner}; "
            "leave the key out"
        )
    with tempfile.TemporaryDirectory() as work:
        batches = Run(cfg, data, inputs, Path(work), quiet=True).batches("tokens")
    banks = Banks(1, batches.tap_channels, cfg.method.K, cfg.method.temperature)
    banks.learn(first_tokens(batches.epoch(0)), cfg.seed)
    tokens = torch.from_numpy(np.array(np.load(inputs["features"] / "taps.npy", mmap_mode="r")[0])).flatten(0, 1)
    assignment = torch.cat([banks.assignment(part.float()[None])[0] for part in _chunks(tokens)])
    per_image = batches.grid[0] * batches.grid[1]
    parts = zip(banks.parts(tokens), banks.parts(banks.C), strict=True)
    taps = []
    for number, (points, prototypes) in enumerate(parts):
        share = assignment[:, number].mean(0)
        cosine = torch.cat([unit(part) @ prototypes.T for part in _chunks(points)])
        best, cell = cosine.view(-1, per_image, len(prototypes)).max(1)
        images = best.topk(min(COLUMNS, len(best)), 0).indices.T
        nearest = images * per_image + cell.T.gather(1, images)
        taps.append(Tap(100 * share.numpy(), nearest.numpy(), float(torch.special.entr(share).sum().exp())))
    return Found(taps, batches.grid)


def _chunks(value: Tensor, size: int = 4096) -> Iterator[Tensor]:
    return (value[start : start + size] for start in range(0, len(value), size))


def _box(token: int, found: Found, size: tuple[int, int]) -> tuple[int, float, float, float, float]:
    """Image, top, left, height and width, in pixels, of a token's cell."""
    (rows, columns), (height, width) = found.grid, size
    image, cell = divmod(token, rows * columns)
    tall, wide = height / rows, width / columns
    return image, cell // columns * tall, cell % columns * wide, tall, wide


def described(tokens: Array, found: Found, labels: Array, classes: Sequence[str], ignore_index: int | None) -> str:
    """The class that most of the ``tokens`` show, and its share."""
    votes = []
    for token in tokens:
        image, top, left, tall, wide = _box(int(token), found, labels.shape[1:3] if labels.ndim > 1 else (1, 1))
        part = labels[image]
        if part.ndim:
            part = part[int(top) : max(int(top + tall), int(top) + 1), int(left) : max(int(left + wide), int(left) + 1)]
        values, counts = np.unique(part[part != ignore_index] if part.ndim else part, return_counts=True)
        if len(values):
            votes.append(int(values[counts.argmax()]))
    if not votes:
        return "unlabelled"
    best = max(set(votes), key=votes.count)
    return f"{votes.count(best)} of {len(tokens)} {classes[best]}"


def patches(found: Found, data: Data) -> bytes:
    """PNG: a row for each of some prototypes of the deepest tap, most used first, with the patches nearest to it."""
    split, tap = data.splits["train"], found.taps[-1]
    images, labels = split.arrays["image"], split.arrays["label"]
    size = images.shape[1:3]
    order = np.argsort(-tap.share)
    shown = order[np.linspace(0, len(order) - 1, min(ROWS, len(order))).round().astype(int)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.0 * COLUMNS + 2.1, 1.0 * len(shown)), dpi=90)
        axes = figure.subplots(len(shown), COLUMNS, squeeze=False)
        figure.subplots_adjust(left=0.2, right=0.995, top=0.995, bottom=0.005, wspace=0.04, hspace=0.06)
        for row, k in zip(axes, shown, strict=True):
            classes, ignored = split.meta["classes"], split.meta["ignore_index"]
            about = described(tap.nearest[k], found, labels, classes, ignored)
            row[0].set_ylabel(f"{tap.share[k]:.1f} % used\n{about}", rotation=0, ha="right", va="center", labelpad=8)
            for axis, token in zip(row, tap.nearest[k], strict=False):
                image, top, left, tall, wide = _box(int(token), found, size)
                axis.imshow(images[image].squeeze(), cmap="gray", interpolation="nearest", vmin=0, vmax=255)
                axis.add_patch(Rectangle((left - 0.5, top - 0.5), wide, tall, fill=False, color=COLOURS[1], lw=1.5))
                if max(found.grid) > COARSE:
                    x, y = left + wide / 2, top + tall / 2
                    axis.set_xlim(x - CONTEXT * wide, x + CONTEXT * wide)
                    axis.set_ylim(y + CONTEXT * tall, y - CONTEXT * tall)
                axis.set_facecolor(GREY)
            for axis in row:
                axis.set(xticks=[], yticks=[])
                axis.grid(visible=False)
        return _png(figure)


def usage(found: Found, names: Sequence[str]) -> bytes:
    """PNG: the share of all tokens that each prototype of each tap has, most used first."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.4), dpi=90, layout="constrained")
        axes = figure.subplots(1, len(found.taps), squeeze=False, sharey=True)[0]
        for axis, tap, name in zip(axes, found.taps, names, strict=True):
            share = np.sort(tap.share)[::-1]
            axis.bar(np.arange(1, len(share) + 1), share, color=COLOURS[0])
            axis.axhline(100 / len(share), color=GREY, lw=1, ls="--")
            axis.set_axisbelow(True)
            axis.set_title(f"{name}: {tap.perplexity:.1f} of {len(share)} in use")
            axis.set_xlabel("prototype, most used first")
        axes[0].set_ylabel("share of tokens, %")
        return _png(figure)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prototypes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("run", type=Path, help="folder with data and features")
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args(argv)

    def act() -> None:
        cfg = load(arguments.config, arguments.overrides)
        inputs = {name: arguments.run / name for name in ("data", "features")}
        data = load_data(inputs["data"])
        found = look(cfg, data, inputs)
        arguments.out.mkdir(parents=True, exist_ok=True)
        names = [f"tap {number}" for number in range(1, len(found.taps) + 1)]
        for name, content in {"patches": patches(found, data), "usage": usage(found, names)}.items():
            path = arguments.out / f"{cfg.name}-{name}.png"
            path.write_bytes(content)
            console.print(str(path), markup=False)

    return guard(act)


if __name__ == "__main__":
    sys.exit(main())
