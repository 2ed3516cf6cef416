from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.toolchain.methods.walks import METHOD, OBSERVE, PREDICT, STEPS, K, config, ppt, tiny_run, walks
from toolchain.artifact import EdgestillError
from toolchain.tasks.trajectory_batches import (
    TrajectoryBatches,
    destination_scorer,
    next_position_scorer,
    normalised,
    predict,
    scorer,
    versions,
)
from toolchain.train import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return tiny_run(tmp_path, config(METHOD))


def test_the_last_observed_position_is_the_origin() -> None:
    split = walks(9)
    tracks = normalised(split, 30.0)
    assert tracks.shape == (9, STEPS, 2)
    assert tracks.dtype == np.float32
    assert not tracks[:, 7].any()
    assert tracks[:, 6].any()
    world = np.concatenate([split.arrays["observed"], split.arrays["future"]], 1)
    np.testing.assert_allclose(tracks / 30 + world[:, 7:8], world, atol=1e-5)


def test_the_five_versions_are_rotations_and_a_mirror_and_keep_all_distances() -> None:
    tracks = normalised(walks(30), 30.0)
    found = versions(tracks)
    x, y = tracks[..., 0], tracks[..., 1]
    every = [np.stack(pair, -1) for pair in [(x, y), (-y, x), (-x, -y), (y, -x), (-x, y)]]
    np.testing.assert_array_equal(found, every)
    two = versions(tracks, 2)
    drawn = [[next(k for k in range(5) if np.array_equal(every[k][i], v[i])) for v in two] for i in range(30)]
    assert all(len(set(row)) == 2 for row in drawn)
    assert len(set(map(tuple, drawn))) > 5, "all tracks are shown in the same two versions"
    for version in found:
        for i in range(STEPS):
            for j in range(i):
                before, after = (np.linalg.norm(t[:, i] - t[:, j], axis=-1) for t in (tracks, version))
                np.testing.assert_allclose(after, before, rtol=1e-6)


def test_every_epoch_shows_every_window_once_in_a_version_drawn_anew(run: Run) -> None:
    batches = TrajectoryBatches(run)
    every = versions(normalised(run.data.splits["train"], 30.0))
    shown = []
    for epoch in range(12):
        drawn, order = batches.version_of(epoch), batches.order(epoch)
        seen = torch.cat([batch["track"] for batch in batches.epoch(epoch)]).numpy()
        np.testing.assert_array_equal(seen, every[drawn[order], order])
        shown.append(drawn)
    assert set(np.concatenate(shown)) == {0, 1, 2, 3, 4}
    assert not np.array_equal(shown[0], shown[1])
    again = TrajectoryBatches(run)
    np.testing.assert_array_equal(again.version_of(11), shown[11])
    np.testing.assert_array_equal(again.version_of(0), shown[0])


def test_versions_that_keep_the_axes() -> None:
    tracks = np.random.default_rng(0).normal(size=(40, 5, 2)).astype(np.float32)
    found = versions(tracks, axis=True)
    assert found.shape == (4, 40, 5, 2)
    np.testing.assert_array_equal(np.abs(found), np.abs(np.broadcast_to(tracks, found.shape)))
    assert len({tuple(np.sign(version[0, 0] * tracks[0, 0])) for version in found}) == 4
    assert versions(tracks, 5, axis=True).shape == found.shape


def test_turned_versions_keep_their_form_and_have_an_angle_each() -> None:
    tracks = np.random.default_rng(0).normal(size=(30, 5, 2)).astype(np.float32)
    plain, turned = (versions(tracks, 2, rotate=rotate) for rotate in (False, True))
    turn = turned.view(np.complex64) / plain.view(np.complex64)
    np.testing.assert_allclose(turn, np.broadcast_to(turn[:, :, :1], turn.shape), atol=1e-4)
    np.testing.assert_allclose(np.abs(turn), 1, atol=1e-5)
    assert len(np.unique(np.angle(turn[:, :, 0]).round(3))) > 50


def test_along_a_street_no_window_is_turned_by_90_degrees(tmp_path: Path, run: Run) -> None:
    cfg = config(METHOD, data={"source": "simulator", "walk_axis": {}})
    street, index = TrajectoryBatches(tiny_run(tmp_path, cfg)), np.arange(24)
    plain = torch.from_numpy(normalised(run.data.splits["train"], 30.0)).abs()
    for epoch in range(4):
        torch.testing.assert_close(street.gather(index, epoch)["track"].abs(), plain)


def test_a_stretched_window_keeps_its_form(tmp_path: Path, run: Run) -> None:
    stretched = TrajectoryBatches(tiny_run(tmp_path, config(METHOD | {"stretch": 2.0})))
    index = np.arange(24)
    factors = []
    for epoch in (0, 1):
        before, after = (batches.gather(index, epoch)["track"] for batches in (TrajectoryBatches(run), stretched))
        factor = after.flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
        torch.testing.assert_close(after, before * factor[:, None, None])
        assert ((factor >= 0.5) & (factor <= 2)).all()
        assert factor.min() < 0.8
        assert factor.max() > 1.25
        torch.testing.assert_close(stretched.gather(index[5:7], epoch)["track"], after[5:7])
        factors.append(factor)
    assert not torch.equal(*factors)


def test_a_turned_window_keeps_its_form_and_size(tmp_path: Path, run: Run) -> None:
    turned = TrajectoryBatches(tiny_run(tmp_path, config(METHOD | {"rotate": True})))
    index = np.arange(24)
    angles = []
    for epoch in (0, 1):
        before, after = (
            torch.view_as_complex(batches.gather(index, epoch)["track"].contiguous())
            for batches in (TrajectoryBatches(run), turned)
        )
        turn = after[:, -1:] / before[:, -1:]
        torch.testing.assert_close(after, before * turn, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(turn.abs(), torch.ones_like(turn.abs()))
        torch.testing.assert_close(torch.view_as_complex(turned.gather(index[5:7], epoch)["track"]), after[5:7])
        angles.append(turn.angle())
        assert all(((angles[-1] > low) & (angles[-1] < low + 1.6)).any() for low in (-3.2, -1.6, 0, 1.6))
    assert not torch.equal(*angles)


def test_jitter_moves_what_half_of_the_people_were_seen_to_do_and_leaves_where_they_went(tmp_path: Path) -> None:
    count, paths = 400, np.zeros((1, 400, K, PREDICT, 2), np.float32)
    scale = 20.0
    plain, noisy = (
        tiny_run(tmp_path, config(METHOD | jitter, student={"scale": scale})) for jitter in ({}, {"jitter": 0.05})
    )
    plain.data.splits["train"] = noisy.data.splits["train"] = walks(count)
    before, after = (TrajectoryBatches(run, {"paths": paths}, 1) for run in (plain, noisy))
    index, moved, shifts = np.arange(count), [], []
    for epoch in (0, 1):
        was, found = (batches.gather(index, epoch) for batches in (before, after))
        assert not found["track"][:, OBSERVE - 1].any(), "not relative to the last observed position"
        shift = was["track"][:, OBSERVE:] - found["track"][:, OBSERVE:]
        torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=0, atol=1e-4)
        torch.testing.assert_close(
            was["paths"] - found["paths"], shift[:, None].expand(-1, K, -1, -1), rtol=0, atol=1e-4
        )
        noise = (found["track"] + shift[:, :1] - was["track"])[:, :OBSERVE] / scale
        moved.append(noise.abs().amax((1, 2)) > 1e-5)
        deviation = noise[moved[-1]].std(dim=(1, 2))
        assert moved[-1].float().mean() == pytest.approx(0.5, abs=0.08)
        assert deviation.mean() == pytest.approx(0.025, abs=0.004)
        assert deviation.max() < 0.05 * 1.6
        assert noise.mean().abs() < 0.002
        torch.testing.assert_close(after.gather(index[5:7], epoch)["track"], found["track"][5:7])
        shifts.append(shift)
    assert not torch.equal(*moved)
    assert not torch.equal(*shifts)


@pytest.mark.parametrize(("balance", "share"), [(0.0, 1 / 16), (0.5, 1 / (1 + 15**0.5)), (1.0, 0.5)])
def test_windows_of_a_small_recording_are_drawn_as_often_as_asked_for(
    tmp_path: Path, balance: float, share: float
) -> None:
    run = tiny_run(tmp_path, config(METHOD | {"balance": balance}))
    run.data.splits["train"] = split = walks(256)
    split.arrays["scene"] = np.array([0] * 16 + [1] * 240)
    batches = TrajectoryBatches(run)
    if not balance:
        assert sorted(batches.order(3)) == list(range(256))
    orders = np.array([batches.order(epoch) for epoch in range(400)])
    assert (orders < 16).mean() == pytest.approx(share, abs=0.005)
    np.testing.assert_array_equal(batches.order(7), orders[7])
    assert len({tuple(order) for order in orders}) == len(orders)


def test_what_the_teacher_says_comes_in_the_version_that_is_shown(run: Run) -> None:
    values = np.arange(3 * 24, dtype=np.float32).reshape(3, 24, 1)
    batches = TrajectoryBatches(run, {"feature": values}, 3)
    for batch in batches.epoch(3):
        assert batch["feature"].dtype == torch.float32
    order = batches.order(3)
    found = torch.cat([batch["feature"] for batch in batches.epoch(3)])[:, 0].numpy()
    np.testing.assert_array_equal(found, batches.version_of(3)[order] * 24 + order)
    assert set(batches.version_of(3)) == {0, 1, 2}


def test_only_what_a_teacher_has_can_be_wanted(run: Run) -> None:
    with pytest.raises(EdgestillError, match=r"expected some of paths, feature, found \['tokens'\]"):
        run.batches("paths", "tokens")


def test_scores_are_in_metres_and_equal_naive_ones(run: Run) -> None:
    net, split = ppt().eval(), run.data.splits["val"]
    track = torch.from_numpy(normalised(split, 30.0))
    observed, future = track[:, :OBSERVE], track[:, OBSERVE:]
    with torch.no_grad():
        candidates, (paths, _) = net.destination(observed), net(observed)
    ends = [[float((candidates[i, k] - future[i, -1]).norm()) / 30 for k in range(K)] for i in range(len(split))]
    found = destination_scorer(run)(net.destination)
    assert list(found) == ["minFDE", "meanFDE"]
    assert found["minFDE"] == pytest.approx(np.mean([min(row) for row in ends]), rel=1e-5)
    assert found["meanFDE"] == pytest.approx(np.mean(ends), rel=1e-5)
    found = scorer(run)(net)
    ade = [
        min(sum(float((paths[i, k, t] - future[i, t]).norm()) / 30 for t in range(PREDICT)) / PREDICT for k in range(K))
        for i in range(len(split))
    ]
    assert found["minADE"] == pytest.approx(np.mean(ade), rel=1e-4)
    assert scorer(run, "test")(net) != found


def test_the_next_position_is_scored_in_metres(run: Run) -> None:
    class Ahead(torch.nn.Module):
        """Three scaled units to the right of the truth, which it is shown."""

        def forward(self, track: torch.Tensor) -> torch.Tensor:
            assert track.shape[1] == STEPS - 1
            return torch.cat([track[:, 1:], last], 1) + torch.tensor([3.0, 0.0])

    last = torch.from_numpy(normalised(run.data.splits["val"], 30.0))[:, -1:]
    assert next_position_scorer(run)(Ahead())["next_position"] == pytest.approx(0.1, rel=1e-5)


def test_the_true_future_never_reaches_what_ships() -> None:
    net, split = ppt().eval(), walks(6)
    expected = predict(split, 30.0, torch.device("cpu"), net)
    split.arrays["future"] = split.arrays["future"] + 7
    for a, b in zip(expected, predict(split, 30.0, torch.device("cpu"), net), strict=True):
        np.testing.assert_array_equal(a, b)
