from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolchain.tasks.datasets import DataError
from toolchain.tasks.tracks import (
    Recording,
    at_pace,
    constant_velocity,
    longest_run,
    reach,
    read_tracks,
    repeated_steps,
    walking_axis,
    window_rows,
)

ROWS = [(780, 1, 8.46, 3.59), (790, 1, 9.57, 3.79), (790, 2, -1.5, 0.25), (810, 2, -1.25, 0.5)]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def recording(present: dict[int, list[int]], step: int = 10) -> Recording:
    """Agent -> the time steps it is present in; x is the step, y the agent."""
    rows = sorted((k, agent) for agent, steps in present.items() for k in steps)
    k, agent = np.array(rows).T
    return Recording("r", 100 + step * k, agent, np.stack([k, agent], 1).astype(float), step)


# Reading


@pytest.mark.parametrize(
    "text",
    [
        "\n".join("\t".join(map(str, row)) for row in ROWS),
        "\n".join(" ".join(map(str, row)) for row in ROWS) + "\n\n",
        "\n".join(f"  {float(f)}   {float(a)} {x:.2e} {y}" for f, a, x, y in ROWS) + "\n",
        "\r\n".join(",".join(map(str, row)) for row in ROWS),
        "frame;id;x;y\n" + "\n".join("; ".join(map(str, row)) for row in ROWS),
        "\ufeff# frame id x y\n" + "\n".join(" ".join(map(str, row)) for row in ROWS),
        "id,y,note,frame,x\n" + "\n".join(f"{a},{y},seen,{f},{x}" for f, a, x, y in ROWS),
    ],
    ids=["tabs", "spaces", "floats", "commas", "semicolons", "hash", "by name"],
)
def test_every_way_of_writing_gives_the_same(tmp_path: Path, text: str) -> None:
    read = read_tracks(write(tmp_path / "street.txt", text))
    assert read.name == "street"
    assert read.frame.tolist() == [780, 790, 790, 810]
    assert read.agent.tolist() == [1, 1, 2, 2]
    assert (read.frame.dtype, read.agent.dtype, read.xy.dtype) == (np.int64, np.int64, np.float64)
    assert np.allclose(read.xy, [row[2:] for row in ROWS])


def test_agent_by_agent_is_an_order_too(tmp_path: Path) -> None:
    by_agent = sorted(ROWS, key=lambda row: (-row[1], row[0]))
    read = read_tracks(write(tmp_path / "a.txt", "\n".join(" ".join(map(str, row)) for row in by_agent)))
    rows = zip(read.frame.tolist(), read.agent.tolist(), *read.xy.T.tolist(), strict=True)
    assert list(rows) == ROWS


def test_columns_and_scale(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "track,t,u,v,w\n1,0,9,2.5,5\n1,12,9,3,6\n")
    named = read_tracks(path, ["t", "track", "v", "w"], 12, scale=2.0)
    assert named.xy.tolist() == [[5, 10], [6, 12]]
    assert np.array_equal(named.xy, read_tracks(path, [1, 0, 3, 4], 12, scale=2.0).xy)


GOOD = "0 1 0 0\n10 1 0 0\n"
BROKEN = {
    "too few": (GOOD + "20 1 0\n", 3, r"expected 4 columns, found 3; mend the line"),
    "too many": (GOOD + "\n20 1 0 0 0\n", 4, r"expected 4 columns, found 5; mend the line"),
    "eight columns": ("0 1 2 3 4 5 6 7\n", 1, r"expected 4 columns .* found 8: 0, .* 7; say .* data\.columns"),
    "decimal commas between tabs": ("24\t30\t7,455\t8,636\n", 1, "found 3: .*; say .* write decimals with a point"),
    "named ids": (GOOD + "20 a1 0 0\n", 3, "expected a number for id, found 'a1'; number the ids, or remove it"),
    "far away": (
        "0 1 500000 5400000\n10 1 500000.5 5400001\n20 1 500001 5400002\n",
        3,
        r"expected coordinates near 0, .* a 500th of a step \(1\.12\), found 5400002; subtract an origin",
    ),
    "too large for float32": ("0 1 0 0\n10 1 1e300 0\n", 2, r"found 1e\+300; subtract an origin"),
    "text": (GOOD + "20 1 a 0\n", 3, r"expected a number for x, found 'a'; mend the line"),
    "decimal comma": (
        "0;1;1.5;2\n10;1;1,5;2\n",
        2,
        r"number for x, found '1,5'; mend the line \(decimals with a point",
    ),
    "empty cell": ("0,1,1,2\n10,1,1,\n", 2, r"number for y, found ''; mend the line"),
    "nan": (GOOD + "20 1 nan 0\n", 3, r"expected a finite x, found nan; remove the line"),
    "inf": (GOOD + "20 1 0 -inf\n", 3, r"expected a finite y, found -inf; remove the line"),
    "half frame": ("0 1 0 0\n10.5 1 0 0\n", 2, r"expected an integer frame, found 10\.5; mend it"),
    "half id": ("0 1 0 0\n10 1.5 0 0\n", 2, r"expected an integer id, found 1\.5; mend it"),
    "huge id": ("0 1e300 0 0\n", 1, r"expected an integer id, found 1e\+300"),
    "unsorted": (
        GOOD + "10 2 0 0\n20 1 0 0\n10 3 0 0\n",
        5,
        r"expected a frame of at least 20, the line before's, found 10; sort the file by frame \(or id by id\)",
    ),
    "unsorted agent": (
        GOOD + "30 2 0 0\n20 2 0 0\n",
        4,
        r"expected a frame of at least 30, .* found 20; sort the file",
    ),
    "duplicate": (
        GOOD + "10 2 0 0\n10 1 5 5\n",
        4,
        r"expected each id once a frame, found id 1 in frame 10 as in line 2; remove one",
    ),
    "off the grid": (
        GOOD + "15 1 0 0\n",
        3,
        r"expected a frame at 0 \+ 10 k .* found 15; .* set data\.frame_step: 5 divides every step",
    ),
    "empty": ("", 1, r"found an empty file; remove or replace it"),
    "header alone": ("frame id x y\n", 1, r"expected rows below this header, found none; remove or replace"),
    "header alone after a hash": ("# frame id x y\n", 1, r"expected rows below this header, found none"),
    "other names after a hash": ("#ped t x y\n" + GOOD, 1, r"a column named 'frame', found \['ped', 't', 'x', 'y'\]"),
    "other names": (
        "t,id,x,y\n0,1,2,3\n",
        1,
        r"a column named 'frame', found \['t', 'id', 'x', 'y'\]; set data\.columns",
    ),
}


def test_comments_quotes_and_a_header_after_a_hash_are_read(tmp_path: Path) -> None:
    rows = '"0","1","2.5","3"\n# break\n"10","1","3.5","3"\n'
    for head in ("# made by a tracker\n", "#frame,id,x,y\n", '"frame","id","x","y"\n', ""):
        assert read_tracks(write(tmp_path / "a.csv", head + rows)).xy.tolist() == [[2.5, 3], [3.5, 3]]
    swapped = read_tracks(write(tmp_path / "a.csv", "#frame,id,y,x\n" + rows))
    assert swapped.xy.tolist() == [[3, 2.5], [3, 3.5]]


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_files_are_named_with_line_and_remedy(tmp_path: Path, fault: str) -> None:
    text, line, message = BROKEN[fault]
    with pytest.raises(DataError, match=rf"/street\.txt:{line}: .*{message}"):
        read_tracks(write(tmp_path / "street.txt", text))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["f", "id", "x", "y"], r":1: expected a column named 'f', found no header; set data\.columns"),
        ([0, 1, 2, 4], r":1: expected a column 4, found 4 columns; data\.columns counts from 0"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, columns: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_tracks(write(tmp_path / "a.txt", GOOD), columns)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe0\x00")
    with pytest.raises(DataError, match=r"a\.txt: cannot be read as UTF-8 text .*check data\.path"):
        read_tracks(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"none\.txt: expected a track file, found nothing there"):
        read_tracks(tmp_path / "none.txt")


# Windows


def naive(read: Recording, length: int, stride: int, least_agents: int) -> list[tuple[int, int]]:
    """(first frame, agent) of every window, by the definition."""
    present = set(zip(read.frame.tolist(), read.agent.tolist(), strict=True))
    found = []
    for start in range(int(read.frame[0]), int(read.frame[-1]) + 1, stride * read.frame_step):
        frames = [start + k * read.frame_step for k in range(length)]
        agents = [a for a in sorted(set(read.agent.tolist())) if all((f, a) in present for f in frames)]
        if len(agents) >= least_agents:
            found += [(start, a) for a in agents]
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("length", "stride", "least"), [(5, 1, 1), (5, 1, 2), (3, 4, 1), (4, 3, 3), (60, 1, 1)])
def test_windows_are_those_of_the_definition(seed: int, length: int, stride: int, least: int) -> None:
    rng = np.random.default_rng(seed)
    steps = {a: np.flatnonzero(rng.random(40) < 0.85).tolist() for a in (3, 1, 7, 2)}
    read = recording({a: [k for k in s if k not in (17, 18)] for a, s in steps.items()})
    rows = window_rows(read, length, stride, least)
    points, agent, frame = read.xy[rows], read.agent[rows[:, 0]], read.frame[rows[:, 0]]
    assert list(zip(frame.tolist(), agent.tolist(), strict=True)) == naive(read, length, stride, least)
    assert points.shape == (len(agent), length, 2)
    assert np.array_equal(points[..., 0], (frame[:, None] - 100) / 10 + np.arange(length))
    assert (points[..., 1] == agent[:, None]).all()


def test_a_gap_is_in_no_window() -> None:
    own, everyone = recording({1: [0, 1, 2, 4, 5, 6], 2: list(range(7))}), recording({1: [0, 1, 2, 4, 5, 6]})
    assert own.agent[window_rows(own, 3)[:, 0]].tolist() == [1, 2, 2, 2, 2, 1, 2]
    assert everyone.frame[window_rows(everyone, 3)[:, 0]].tolist() == [100, 140]
    assert (longest_run(own), longest_run(everyone)) == (7, 3)


def test_the_grid_is_that_of_frame_step() -> None:
    assert len(window_rows(recording({1: list(range(6))}, step=12), 6)) == 1
    sparse = recording({1: [0, 2, 4, 6]})
    assert (len(window_rows(sparse, 2)), longest_run(sparse)) == (0, 1)


@pytest.mark.parametrize(("pace", "positions"), [(1.0, 5), (0.5, 3), (5 / 3, 8), (1.6667, 8), (2.0, 9), (0.25, 2)])
def test_positions_at_another_pace_lie_on_the_track(pace: float, positions: int) -> None:
    assert reach(5, pace) == positions
    xy = np.random.default_rng(0).normal(size=(3, positions, 2)).cumsum(1)
    found = at_pace(xy, 5, pace)
    time = np.arange(positions)
    expected = [[np.interp(np.arange(5) * pace, time, track[:, k]) for k in (0, 1)] for track in xy]
    np.testing.assert_allclose(found, np.moveaxis(np.array(expected), 1, 2), atol=1e-12)
    if pace == 1:
        assert np.array_equal(found, xy)


@pytest.mark.parametrize(("pace", "positions"), [(1.0, 5), (0.5, 3), (5 / 3, 9), (2.0, 9), (0.25, 3), (0.8, 5)])
def test_what_was_observed_knows_of_nothing_later(pace: float, positions: int) -> None:
    assert reach(5, pace, now=2) == positions
    xy = np.random.default_rng(0).normal(size=(3, positions, 2)).cumsum(1)
    found, at = at_pace(xy, 5, pace, now=2), int(np.ceil(2 * pace))
    assert np.array_equal(found[:, 2], xy[:, at])
    changed = xy.copy()
    changed[:, at + 1 :] += 7
    later = at_pace(changed, 5, pace, now=2)
    assert np.array_equal(later[:, :3], found[:, :3])
    assert not np.isclose(later[:, 3:], found[:, 3:]).any()
    time = np.arange(5) * pace + at - 2 * pace
    np.testing.assert_allclose(found[0, :, 0], np.interp(time, np.arange(positions), xy[0, :, 0]), atol=1e-12)


def test_steps_repeat_where_positions_were_interpolated() -> None:
    k = np.arange(41)
    zigzag = np.stack([k, np.abs(k % 10 - 5)], 1).astype(float)  # 39 pairs of steps, 7 of them around a corner
    noisy = zigzag + np.random.default_rng(0).normal(size=zigzag.shape) * 0.05

    def walked(xy: Any, steps: Any = k) -> Recording:
        return Recording("a", 10 * steps, np.zeros(len(xy), np.int64), xy)

    assert repeated_steps([walked(zigzag)]) == pytest.approx(32 / 39)
    assert repeated_steps([walked(noisy)]) < 0.03
    stands = walked(np.repeat(zigzag[:1], 9, 0), k[:9])
    assert repeated_steps([walked(zigzag), stands]) == pytest.approx(32 / 39), "who stands does not count"
    gaps = np.delete(k, k[2::3])
    assert np.isnan(repeated_steps([walked(zigzag[gaps], gaps)])), "a gap is no step"
    assert np.isnan(repeated_steps([stands]))


def test_constant_velocity_repeats_the_last_step() -> None:
    observed = np.array([[[9, 9], [0, 0], [1, 2]]], np.float32)
    assert constant_velocity(observed, 3).tolist() == [[[2, 4], [3, 6], [4, 8]]]
    assert constant_velocity(observed, 3).dtype == np.float32


def test_the_axis_is_that_of_who_walks_up_or_down() -> None:
    way = np.array([np.cos(np.pi / 6), np.sin(np.pi / 6)])
    up = np.arange(9)[:, None] * way
    stands = np.full((9, 2), 3.0) + np.random.default_rng(0).normal(0, 0.01, (9, 2))
    assert walking_axis(np.stack([up, 4 - up, up, stands])) == pytest.approx((30, 1))
    across = np.arange(9)[:, None] * np.array([-way[1], way[0]])
    assert walking_axis(np.stack([up, -up, up, across]))[1] == pytest.approx(0.5)
    assert np.isnan(walking_axis(np.zeros((2, 9, 2)))).all()
    assert np.isnan(walking_axis(np.zeros((0, 9, 2)))).all()


def test_people_walk_in_every_direction_on_univ_and_along_one_axis_elsewhere(data_root: Path) -> None:
    found = {}
    for path in sorted((data_root / "trajectory" / "eth_ucy").glob("*/test/*.txt")):
        recording = read_tracks(path)
        order = np.lexsort((recording.frame, recording.agent))
        pairs = np.stack([order[:-1], order[1:]], 1)[np.diff(recording.agent[order]) == 0]
        found[path.stem] = walking_axis(recording.xy[pairs])
    degrees, kept = zip(*found.values(), strict=True)
    assert list(found) == ["biwi_eth", "biwi_hotel", "students001", "students003", "crowds_zara01", "crowds_zara02"]
    assert kept == pytest.approx([0.88, 0.90, 0.27, 0.48, 0.85, 0.78], abs=0.01)
    assert [round(found) for found in degrees] == [4, -89, -8, -7, -3, -3]
