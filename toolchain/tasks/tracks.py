"""Pedestrian tracks: text files of ``frame, id, x, y`` to recordings, and recordings to windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.tasks.datasets import DataError

Floats = NDArray[np.float64]
Points = NDArray[np.float32]
Integers = NDArray[np.int64]

COLUMNS = ("frame", "id", "x", "y")
_EXACT = 2**53  # the integers that a float64 holds
ROUNDED = 0.002  # of a mean step, that float32 may round the farthest coordinate by


@dataclass(frozen=True)
class Recording:
    """What one camera saw: ``frame`` and ``agent`` (M,), ``xy`` (M, 2), sorted by frame, no (frame, agent) twice.

    Frame ids lie on a grid of ``frame_step``, one time step apart; a frame or an agent may be missing anywhere.
    """

    name: str
    frame: Integers
    agent: Integers
    xy: Floats
    frame_step: int = 10

    def __len__(self) -> int:
        return len(self.frame)

    def select(self, index: NDArray[Any] | slice) -> Recording:
        return Recording(self.name, self.frame[index], self.agent[index], self.xy[index], self.frame_step)


def read_tracks(
    path: Path, columns: Sequence[str | int] = COLUMNS, frame_step: int = 10, scale: float = 1.0
) -> Recording:
    """A text file of one row per frame and agent; ``scale`` multiplies x and y.

    Cells are separated by semicolons, commas or whitespace; the first line may name them. ``columns`` says where frame,
    id, x and y are: names of the first line, or numbers from 0; without a header the default means four columns in
    that order. Rows go by frame, or agent by agent. Raises DataError with file and line.
    """
    lines, rows = _cells(path)
    where = f"{path}:{lines[0]}"
    names = None
    if not any(map(_is_number, rows[0])):
        names, rows, lines = rows[0], rows[1:], lines[1:]
    place, width = _places(where, columns, names, rows)
    for line, row in zip(lines, rows, strict=True):
        if len(row) != width:
            raise DataError(f"{path}:{line}: expected {width} columns, found {len(row)}; mend the line, or remove it")
    values = np.empty((len(rows), 4))
    for k, column in enumerate(place):
        try:
            values[:, k] = [float(row[column]) for row in rows]
        except ValueError:
            bad = next(i for i, row in enumerate(rows) if not _is_number(row[column]))
            raise DataError(
                f"{path}:{lines[bad]}: expected a number for {COLUMNS[k]}, found {rows[bad][column]!r}; "
                f"{'number the ids' if COLUMNS[k] == 'id' else 'mend the line (decimals with a point)'}, or remove it"
            ) from None
    recording = _checked(path, np.array(lines), values, frame_step, scale)
    _check_rounding(path, lines, values[:, 2:], recording)
    return recording


def _check_rounding(path: Path, lines: Sequence[int], places: Floats, recording: Recording) -> None:
    """Windows, networks and graphs are float32: what that rounds must be little beside a step."""
    order, steps = _by_agent(recording)
    most = float(np.abs(recording.xy).max())
    with np.errstate(over="ignore", invalid="ignore"):
        walked = np.linalg.norm(np.diff(recording.xy[order], axis=0)[steps], axis=-1)
        rounded = float(np.spacing(np.float32(most)))
    mean = float(walked.mean()) if len(walked) else 0.0
    if not np.isfinite(rounded) or (mean and rounded > ROUNDED * mean):
        line = lines[int(np.abs(places).max(1).argmax())]
        raise DataError(
            f"{path}:{line}: expected coordinates near 0, of which float32 keeps a 500th of a step ({mean:.3g}), "
            f"found {most:.7g}; subtract an origin from every position, or check data.columns"
        )


def _cells(path: Path) -> tuple[list[int], list[list[str]]]:
    """Line numbers and cells of the lines that are not blank and no comments. Where as many cells as the rows have
    follow the # of the first line, they are the header."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a track file, found nothing there; correct its name") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(
            f"{path}: cannot be read as UTF-8 text ({reason}); check data.path, or save it again"
        ) from error
    written = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    kept = [(i, line) for i, line in written if not line.startswith("#")]
    if not written:
        raise DataError(f"{path}:1: expected rows of {', '.join(COLUMNS)}, found an empty file; remove or replace it")
    (first, head), body = written[0], (kept or written)[0][1].removeprefix("#")
    separator = next((mark for mark in ";," if mark in body), None)
    cells = _split(body, separator)
    if head.startswith("#") and any(map(_is_number, cells)) and len(_split(head[1:], separator)) == len(cells):
        kept = [(first, head[1:]), *kept]
    elif not kept:
        kept = [(first, head[1:])]
    return [i for i, _ in kept], [_split(line, separator) for _, line in kept]


def _split(line: str, separator: str | None) -> list[str]:
    return [cell.strip().strip('"') for cell in line.split(separator)]


def _places(
    where: str, columns: Sequence[str | int], names: list[str] | None, rows: list[list[str]]
) -> tuple[list[int], int]:
    """Where frame, id, x and y are, and how many columns there are."""
    if not rows:
        raise DataError(f"{where}: expected rows below this header, found none; remove or replace the file")
    width = len(names or rows[0])
    if names is None and tuple(columns) == COLUMNS:
        if width != len(COLUMNS):
            raise DataError(
                f"{where}: expected 4 columns ({', '.join(COLUMNS)}), found {width}: {', '.join(rows[0])}; "
                "say which they are with data.columns, e.g. [0, 1, 2, 3], and write decimals with a point"
            )
        return list(range(4)), width
    found = []
    for column in columns:
        if isinstance(column, int):
            if column >= width:
                raise DataError(
                    f"{where}: expected a column {column}, found {width} columns; data.columns counts from 0"
                )
            found.append(column)
        elif names is None or column not in names:
            raise DataError(
                f"{where}: expected a column named {column!r}, found {names or 'no header'}; set data.columns to the "
                "names or the numbers (from 0) of frame, id, x and y"
            )
        else:
            found.append(names.index(column))
    return found, width


def _checked(path: Path, lines: Integers, values: Floats, frame_step: int, scale: float) -> Recording:
    def fail(bad: NDArray[np.bool_], expected: str, column: int, remedy: str) -> None:
        if bad.any():
            i = int(np.argmax(bad))
            raise DataError(f"{path}:{lines[i]}: expected {expected}, found {values[i, column]:.15g}; {remedy}")

    for k, name in enumerate(COLUMNS):
        fail(~np.isfinite(values[:, k]), f"a finite {name}", k, "remove the line: a missing point is a missing line")
    for k, name in enumerate(COLUMNS[:2]):
        wrong = (values[:, k] != np.rint(values[:, k])) | (np.abs(values[:, k]) > _EXACT)
        fail(wrong, f"an integer {name}", k, "mend it, or check data.columns")
    frame, agent = values[:, 0].astype(np.int64), values[:, 1].astype(np.int64)
    back = np.append(False, np.diff(frame) < 0)
    if np.count_nonzero(np.diff(agent)) + 1 == len(np.unique(agent)):  # written agent by agent
        back[1:] &= np.diff(agent) == 0
    before = frame[max(int(np.argmax(back)) - 1, 0)]
    fail(back, f"a frame of at least {before}, the line before's", 0, "sort the file by frame (or id by id)")
    order = np.lexsort((agent, frame))
    again = np.append(False, (np.diff(frame[order]) == 0) & (np.diff(agent[order]) == 0))
    if again.any():
        second = int(order[again].min())
        first = int(np.argmax((frame == frame[second]) & (agent == agent[second])))
        raise DataError(
            f"{path}:{lines[second]}: expected each id once a frame, found id {agent[second]} in frame "
            f"{frame[second]} as in line {lines[first]}; remove one, or give them different ids"
        )
    step = int(np.gcd.reduce(np.diff(frame)))
    remedy = f"mend the line, or set data.frame_step: {step} divides every step of this file"
    fail((frame - frame[0]) % frame_step != 0, f"a frame at {frame[0]} + {frame_step} k (data.frame_step)", 0, remedy)
    return Recording(path.stem, frame[order], agent[order], values[order, 2:] * scale, frame_step)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def window_rows(recording: Recording, length: int = 20, stride: int = 1, least_agents: int = 1) -> Integers:
    """Rows (N, length) of ``recording`` that make its windows, ordered by first frame, then agent.

    A window starts at every ``stride``-th step of the frame grid and holds one agent that is present in all ``length``
    frames; with ``least_agents`` it counts only where so many agents have the same one. A gap, of the agent or of the
    whole recording, is in no window.
    """
    step = (recording.frame - recording.frame[:1]) // recording.frame_step
    order = np.lexsort((step, recording.agent))
    last = order[length - 1 :]
    start = order[: len(last)]
    whole = (recording.agent[start] == recording.agent[last]) & (step[last] - step[start] == length - 1)
    at = np.flatnonzero(whole & (step[start] % stride == 0))
    _, group, count = np.unique(step[order[at]], return_inverse=True, return_counts=True)
    at = at[count[group] >= least_agents]
    at = at[np.lexsort((recording.agent[order[at]], step[order[at]]))]
    rows: Integers = order[at[:, None] + np.arange(length)]
    return rows


def turned(recording: Recording, degrees: float) -> Recording:
    """With x in the direction that was ``degrees`` from it, anticlockwise."""
    return replace(recording, xy=recording.xy @ rotations(np.deg2rad(np.array(degrees))))


def rotations(angles: Floats) -> Floats:
    """The matrices (..., 2, 2) that turn points by ``angles`` (...), in radians."""
    cosine, sine = np.cos(angles), np.sin(angles)
    found: Floats = np.stack([cosine, -sine, sine, cosine], -1).reshape(*angles.shape, 2, 2)
    return found


def reach(steps: int, pace: float, now: int = 0) -> int:
    """How many positions of a track lie under ``steps`` that are ``pace`` time steps apart, see ``at_pace``."""
    return math.ceil(round(float(_times(steps, pace, now)[-1]), 6)) + 1


def at_pace(xy: Floats, steps: int, pace: float, now: int = 0) -> Floats:
    """Positions ``pace`` time steps apart, linearly interpolated: (N, reach(steps, pace, now), 2) to (N, steps, 2).

    Position ``now`` is one of ``xy``: those before it are made of what was seen until then.
    """
    time = _times(steps, pace, now)
    before = time.astype(np.int64)
    after = np.minimum(before + 1, xy.shape[1] - 1)
    share = (time - before)[:, None]
    found: Floats = xy[:, before] * (1 - share) + xy[:, after] * share
    return found


def _times(steps: int, pace: float, now: int) -> Floats:
    times: Floats = np.arange(steps, dtype=np.float64) * pace + math.ceil(round(now * pace, 6)) - now * pace
    return times


def longest_run(recording: Recording) -> int:
    """The most consecutive frames that one agent is present in."""
    _, steps = _by_agent(recording)
    ends = np.flatnonzero(np.append(~steps, True))
    return int(np.diff(np.append(-1, ends)).max())


def repeated_steps(recordings: Sequence[Recording]) -> float:
    """Share of the steps of people who walk that repeat the one before to 1 %; NaN where nobody walks.

    At most .01 in the recordings of ETH/UCY that are noisy, .39 to .54 in those that were interpolated between sparse
    positions; rounded or smoothed positions repeat steps, too. Who takes less than half of the mean step does not walk.
    """
    steps = np.concatenate([_pairs(recording) for recording in recordings])
    length = np.linalg.norm(steps[:, 1], axis=-1)
    walks = _walks(length)
    change = np.linalg.norm(steps[:, 1] - steps[:, 0], axis=-1)
    return float((change <= 0.01 * length)[walks].mean()) if walks.any() else float("nan")


def walking_axis(tracks: Floats) -> tuple[float, float]:
    """The axis that people walk along in ``tracks`` (N, T, 2), in degrees from x (-90 to 90), and how well they keep to
    it, in [0, 1]; NaN where nobody walks.

    The mean of their steps' directions, doubled so that up and down a street are one (Mardia and Jupp 2000, section
    9.4), and its length. In the recordings of ETH/UCY that is .77 or more along streets, .27 and .48 on UNIV's campus.
    """
    steps = np.diff(tracks, axis=1).reshape(-1, 2)
    length = np.linalg.norm(steps, axis=-1)
    x, y = steps[_walks(length)].T
    if not len(x):
        return float("nan"), float("nan")
    mean = np.exp(2j * np.arctan2(y, x)).mean()
    return float(np.rad2deg(np.angle(mean)) / 2), float(np.abs(mean))


def _walks(length: Floats) -> NDArray[np.bool_]:
    """Of which steps one walks: who takes less than half of the mean step does not."""
    return length > length.mean() / 2 if len(length) else np.zeros(0, np.bool_)


def _by_agent(recording: Recording) -> tuple[Integers, NDArray[np.bool_]]:
    """Rows agent by agent, by frame; and whether from each but the last to the next is a step of one agent."""
    order = np.lexsort((recording.frame, recording.agent))
    steps = (np.diff(recording.agent[order]) == 0) & (np.diff(recording.frame[order]) == recording.frame_step)
    return order, steps


def _pairs(recording: Recording) -> Floats:
    """Every two steps (M, 2, 2) that follow each other."""
    order, steps = _by_agent(recording)
    first = np.flatnonzero(steps[:-1] & steps[1:])
    step = np.diff(recording.xy[order], axis=0)
    return np.stack([step[first], step[first + 1]], 1)


def constant_velocity(observed: Points, predict: int) -> Points:
    """(N, T, 2) to (N, predict, 2): the last displacement repeated."""
    steps = np.arange(1, predict + 1, dtype=observed.dtype)[:, None]
    return observed[:, -1:] + steps * (observed[:, -1:] - observed[:, -2:-1])
