from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from toolchain.tasks import simulator
from toolchain.tasks.simulator import SCENES, simulate
from toolchain.tasks.tracks import Recording, constant_velocity, window_rows


@pytest.fixture(scope="module")
def recordings() -> list[Recording]:
    return simulate(8, 100.0, seed=1)


def every_frame(recording: Recording) -> Iterator[np.ndarray]:
    edges = np.flatnonzero(np.diff(recording.frame)) + 1
    yield from np.split(recording.xy, edges)


def test_recordings_are_sound(recordings: list[Recording]) -> None:
    assert [r.name for r in recordings[:5]] == ["corridor_00", "crossing_01", "square_02", "doorway_03", "corridor_04"]
    for r in recordings:
        assert (r.frame.dtype, r.agent.dtype, r.xy.dtype) == (np.int64, np.int64, np.float64)
        assert (np.diff(r.frame) >= 0).all()
        assert set(np.unique(r.frame % r.frame_step)) == {0}
        assert r.frame.max() <= 2490
        assert len(set(zip(r.frame.tolist(), r.agent.tolist(), strict=True))) == len(r)
        assert np.abs(r.xy).max() < 12


def test_a_seed_is_always_the_same_and_others_differ(recordings: list[Recording]) -> None:
    for again, first in zip(simulate(3, 100.0, seed=1), recordings, strict=False):
        assert np.array_equal(again.xy, first.xy)
        assert np.array_equal(again.agent, first.agent)
    assert not np.array_equal(recordings[0].xy, recordings[4].xy)
    assert not np.array_equal(simulate(1, 100.0, seed=2)[0].agent, recordings[0].agent)


def test_people_walk_as_in_eth_ucy(recordings: list[Recording]) -> None:
    points = np.concatenate([r.xy[window_rows(r)] for r in recordings]).astype(np.float32)
    speed = np.linalg.norm(np.diff(points, axis=1), axis=-1) / 0.4
    error = np.linalg.norm(constant_velocity(points[:, :8], 12) - points[:, 8:], axis=-1)
    path, net = speed.sum(1) * 0.4, np.linalg.norm(points[:, -1] - points[:, 0], axis=-1)
    assert len(points) > 5000
    assert 1.0 < speed.mean() < 1.4
    assert 0.15 < speed.std() < 0.45
    assert np.quantile(speed, 0.999) < 2.5
    assert 0.3 < error.mean() < 0.65
    assert 0.7 < error[:, -1].mean() < 1.4
    assert 0.90 < (net / path).mean() < 0.985


def test_nobody_walks_through_anybody(recordings: list[Recording]) -> None:
    people, overlaps = 0, 0
    for r in recordings:
        for xy in every_frame(r):
            distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
            people += len(xy)
            overlaps += (distance[np.triu_indices(len(xy), 1)] < 1.5 * simulator.RADIUS).sum()
    assert people > 10_000
    assert overlaps / people < 0.001


def test_nobody_walks_through_a_wall(recordings: list[Recording]) -> None:
    for r, scene in zip(recordings, SCENES * 2, strict=True):
        order = np.lexsort((r.frame, r.agent))
        at = r.xy[order, 0] + 1j * r.xy[order, 1]
        same = np.diff(r.agent[order]) == 0
        start, end = at[:-1][same], at[1:][same]
        for a, b in scene.walls:
            of_ends = ((b - a) * np.conj(np.stack([start, end]) - a)).imag
            of_wall = np.stack([((end - start) * np.conj(c - start)).imag for c in (a, b)])
            assert not ((of_ends.prod(0) < 0) & (of_wall.prod(0) < 0)).any(), (r.name, a, b)


def test_nobody_is_stuck(recordings: list[Recording]) -> None:
    stays = np.concatenate([np.bincount(r.agent) for r in recordings]) * 0.4
    assert np.median(stays[stays > 0]) < 20
    assert stays.max() < 60


def test_one_past_has_several_futures() -> None:
    """From the west arm of the crossing people leave by every other arm."""
    crossing = simulate(2, 300.0, seed=0)[1]
    ends = []
    for agent in np.unique(crossing.agent):
        xy = crossing.xy[crossing.agent == agent]
        if xy[0, 0] < -8 and np.abs(xy[-1]).max() > 8.5:
            ends.append(
                "north" if xy[-1, 1] > 8 else "south" if xy[-1, 1] < -8 else "east" if xy[-1, 0] > 8 else "west"
            )
    shares = {side: ends.count(side) / len(ends) for side in ("north", "south", "east", "west")}
    assert shares["west"] == 0
    assert shares["east"] > 0.5
    assert min(shares["north"], shares["south"]) > 0.02


def test_groups_stay_together(recordings: list[Recording]) -> None:
    """Neighbours who arrive at once are still side by side 6 s later."""
    apart = []
    for r in recordings:
        tracks = {int(a): np.flatnonzero(r.agent == a) for a in np.unique(r.agent)}
        for one, two in ((rows, tracks[a + 1]) for a, rows in tracks.items() if a + 1 in tracks):
            together = 0 < r.frame[one[0]] == r.frame[two[0]] and np.linalg.norm(r.xy[one[0]] - r.xy[two[0]]) < 0.75
            if together and min(len(one), len(two)) > 15:
                apart.append(np.linalg.norm(r.xy[one[15]] - r.xy[two[15]]))
    assert len(apart) > 50
    assert np.median(apart) < 0.85
