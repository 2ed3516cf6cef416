"""Predict where everyone in view walks next, with a folder that edgestill shipped: numpy in, numpy out.

    python examples/track_pedestrians.py runs/trajectory_demo/onnx                 # simulated pedestrians
    python examples/track_pedestrians.py runs/trajectory_demo/onnx zara01.txt      # rows of frame, id, x, y

Goes through the recording frame by frame as a camera would: keeps the last positions of everyone in view, predicts all
of them in one call, and times it. Writes a picture of one frame. Needs numpy, matplotlib and the folder's runtime
(for an ONNX folder: pip install 'edgestill[ort]' matplotlib); no torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.artifact import EdgestillError, UsageError
from toolchain.runtime import Runtime, load
from toolchain.tasks.datasets import DataError
from toolchain.tasks.simulator import simulate
from toolchain.tasks.tracks import COLUMNS, Recording, read_tracks, turned

Floats = NDArray[np.float32]
WARM_UP = 10  # calls that are not counted
OPTIONS = {"data.frame_step": "--frame-step", "data.columns": "--columns", "data.path": "the name"}  # of config keys
LEAST = 6  # calls that a median can be told from
PICTURES = (".png", ".svg", ".pdf", ".jpg")
INK, GREY, TRUTH, PATH, TOP = "#1d2733", "#c9d0d8", "#2f8f4e", "#0b6fa4", "#8457aa"


@dataclass
class Frame:
    """What was predicted at ``frame`` for N ``agents``: ``observed`` (N, T_o, 2), ``trajectories`` (N, K, T, 2)."""

    frame: int
    agents: list[int]
    observed: Floats
    trajectories: Floats
    probability: Floats


class Memory:
    """The last ``steps`` positions of everyone in view; who was away for a frame begins anew."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.tracks: dict[int, deque[Floats]] = {}

    def see(self, agents: Sequence[int], xy: Floats) -> tuple[list[int], Floats]:
        """The agents known for long enough, and their positions (N, steps, 2), oldest first."""
        tracks = {agent: self.tracks.get(agent, deque(maxlen=self.steps)) for agent in agents}
        for agent, point in zip(agents, xy, strict=True):
            tracks[agent].append(point)
        self.tracks = tracks
        known = [agent for agent in agents if len(tracks[agent]) == self.steps]
        observed = np.array([tracks[agent] for agent in known], np.float32).reshape(len(known), self.steps, 2)
        return known, observed


def steps_of(model: Runtime, folder: Path) -> int:
    """How many positions the model wants. Raises UsageError when it is no predictor of trajectories."""
    inputs = {port.name: port for port in model.inputs}
    outputs = {port.name for port in model.outputs}
    if set(inputs) != {"observed"} or not outputs >= {"trajectories", "probability"}:
        raise UsageError(
            f"{folder}: expected a model from observed to trajectories and probability, found {', '.join(inputs)} to "
            f"{', '.join(sorted(outputs))}; give an onnx or engine folder of a run of task trajectory"
        )
    return int(inputs["observed"].shape[1])


def predict(model: Runtime, recording: Recording, steps: int) -> tuple[list[Frame], list[int]]:
    """Every frame with somebody known for long enough, and the nanoseconds of each call."""
    memory, frames, spent = Memory(steps), [], []
    for frame, agents, xy in by_frame(recording):
        known, observed = memory.see(agents, xy)
        if known:
            start = time.perf_counter_ns()
            out = model({"observed": observed})
            spent.append(time.perf_counter_ns() - start)
            frames.append(Frame(frame, known, observed, out["trajectories"], out["probability"]))
    return frames, spent


def by_frame(recording: Recording) -> Iterator[tuple[int, list[int], Floats]]:
    """Frame id, agents and positions (N, 2) of every step from first to last; nobody is there in a missing one."""
    for frame in range(int(recording.frame[0]), int(recording.frame[-1]) + 1, recording.frame_step):
        here = slice(*(np.searchsorted(recording.frame, frame, side=side) for side in ("left", "right")))
        yield frame, recording.agent[here].tolist(), recording.xy[here].astype(np.float32)


def future_of(recording: Recording, frame: int, agent: int, steps: int) -> Floats:
    """Where ``agent`` really was in the next ``steps`` steps, as far as it was there without a gap: (up to T, 2)."""
    mine = recording.agent == agent
    places = dict(zip(recording.frame[mine].tolist(), recording.xy[mine], strict=True))
    found = []
    for step in range(1, steps + 1):
        if (point := places.get(frame + step * recording.frame_step)) is None:
            break
        found.append(point)
    return np.array(found, np.float32).reshape(-1, 2)


def latency(frames: Sequence[Frame], spent: Sequence[int], where: str) -> str:
    """The time of a call, with what it depends on."""
    counted, people = spent[WARM_UP:], [len(frame.agents) for frame in frames[WARM_UP:]]
    if len(counted) < LEAST:
        return f"latency: {len(counted)} calls after {WARM_UP} to warm up are too few to tell; give a longer recording"
    return (
        f"latency: p50 {np.median(counted) / 1e6:.3f} ms per call, n = {len(counted)} calls (the first {WARM_UP} left "
        f"out), {min(people)} to {max(people)} pedestrians a call (median {np.median(people):.0f}), {where}, "
        "numpy to numpy"
    )


def draw(recording: Recording, shown: Frame, unit: str, out: Path) -> None:
    """A picture of a frame: observed dark, true green, predicted blue by probability, the likeliest dashed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EdgestillError(f"matplotlib cannot be imported ({error}); pip install matplotlib") from error
    drawn = np.concatenate([recording.xy, shown.observed.reshape(-1, 2), shown.trajectories.reshape(-1, 2)])
    (left, bottom), (right, top) = drawn.min(0), drawn.max(0)
    height = 8.2 * (top - bottom) / max(right - left, 1e-6)  # inches, of the axes when they are about 8.2 wide
    figure = Figure(figsize=(9, float(np.clip(height, 2.5, 9)) + 1.3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    axes.plot(*recording.xy.T, ".", color=GREY, markersize=1.5, zorder=0, label="everyone, any time")
    steps = shown.trajectories.shape[2]
    for agent, observed, paths, chance in zip(
        shown.agents, shown.observed, shown.trajectories, shown.probability, strict=True
    ):
        start, future = observed[-1:], future_of(recording, shown.frame, agent, steps)
        likeliest = int(chance.argmax())
        for path, share in zip(paths, chance / chance.max(), strict=True):
            axes.plot(*np.concatenate([start, path]).T, color=PATH, alpha=0.05 + 0.65 * float(share), linewidth=1)
        axes.plot(*np.concatenate([start, future]).T, ".-", color=TRUTH, linewidth=2, markersize=4)
        axes.plot(*np.concatenate([start, paths[likeliest]]).T, "--", color=TOP, linewidth=1.4)
        axes.plot(*observed.T, ".-", color=INK, linewidth=1, markersize=5)
    for label, colour, style in (
        ("observed", INK, ".-"),
        ("true", TRUTH, ".-"),
        ("predicted, by probability", PATH, "-"),
        ("most probable", TOP, "--"),
    ):
        axes.plot([], [], style, color=colour, label=label)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.margins(0.02)
    axes.set(aspect="equal", xlabel=f"x ({unit})", ylabel=f"y ({unit})")
    axes.set_title(f"{recording.name}, frame {shown.frame}: {len(shown.agents)} pedestrians in one call", loc="left")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def chosen(frames: Sequence[Frame], wanted: int | None, steps: int) -> Frame:
    """The frame to draw: the one asked for, or the one with the most people. Raises EdgestillError, UsageError."""
    if not frames:
        raise EdgestillError(
            f"nobody was in view for {steps} frames without a gap; check --frame-step, or give a longer recording"
        )
    if wanted is None:
        return max(frames, key=lambda frame: len(frame.agents))
    found = next((frame for frame in frames if frame.frame == wanted), None)
    if found is None:
        raise UsageError(
            f"--frame {wanted}: nothing was predicted there; give one of {len(frames)} from {frames[0].frame} to "
            f"{frames[-1].frame}"
        )
    return found


def run(arguments: argparse.Namespace) -> None:
    if arguments.out.suffix.lower() not in PICTURES:
        raise UsageError(f"--out {arguments.out}: expected a picture ({', '.join(PICTURES)}); name another")
    with load(arguments.folder, threads=arguments.threads) as model:
        steps = steps_of(model, arguments.folder)
        if arguments.tracks is None:
            (recording,) = simulate(1)
        else:
            recording = read(arguments)
        recording = turned(recording, arguments.walk_axis)
        frames, spent = predict(model, recording, steps)
        unit = model.inputs[0].unit or "unit of the tracks"
        onnx = model.manifest is not None and "model.onnx" in model.manifest.files
    shown = chosen(frames, arguments.frame, steps)
    draw(recording, shown, unit, arguments.out)
    where = f"threads: {arguments.threads}" if onnx else "on the GPU"
    print(latency(frames, spent, where))
    print(f"{arguments.out}: frame {shown.frame} of {recording.name}, {len(shown.agents)} pedestrians")


def read(arguments: argparse.Namespace) -> Recording:
    """The track file. Raises DataError, in the words of this script's options."""
    try:
        return read_tracks(
            arguments.tracks, arguments.columns, frame_step=arguments.frame_step, scale=arguments.metres_per_unit
        )
    except DataError as error:
        text = str(error)
        for key, option in OPTIONS.items():
            text = text.replace(key, option)
        raise DataError(text) from error


def columns(text: str) -> tuple[str | int, ...]:
    found = tuple(int(name) if name.isdecimal() else name for name in text.split(","))
    if not len(set(found)) == len(found) == len(COLUMNS):
        raise argparse.ArgumentTypeError(f"expected four different ones, such as {','.join(COLUMNS)}, found {text}")
    return found


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, found {text}")
    return value


def metres(text: str) -> float:
    value = float(text)
    if not 0 < value < np.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value


def degrees(text: str) -> float:
    value = float(text)
    if not np.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, found {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Predict where everyone in view walks next.")
    parser.add_argument("folder", type=Path, help="an onnx or engine folder of a run of task trajectory")
    parser.add_argument("tracks", type=Path, nargs="?", help="rows of frame, id, x, y; default: simulated pedestrians")
    parser.add_argument("--out", type=Path, default=Path("paths.png"), help="the picture (default: paths.png)")
    parser.add_argument("--frame", type=int, help="the frame to draw (default: the one with the most pedestrians)")
    parser.add_argument("--frame-step", type=positive, default=10, help="frame ids between two positions (default: 10)")
    parser.add_argument(
        "--columns", type=columns, default=COLUMNS, help="names or numbers (from 0) of frame, id, x and y, with commas"
    )
    parser.add_argument("--metres-per-unit", type=metres, default=1.0, help="makes metres of x and y (default: 1)")
    parser.add_argument(
        "--walk-axis",
        type=degrees,
        default=0.0,
        metavar="DEGREES",
        help="for a model trained with data.walk_axis: the direction that people walk in, anticlockwise from x "
        "(default: 0); everything is turned back by it",
    )
    parser.add_argument("--threads", type=positive, default=1, help="threads of ONNX Runtime (default: 1)")
    arguments = parser.parse_args(argv)
    try:
        run(arguments)
    except EdgestillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
