from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.toolchain.tasks.public_home import served
from tests.toolchain.tasks.walkers import sizes, walk
from toolchain import download
from toolchain.tasks.datasets import DataError
from toolchain.tasks.track_data import DataSection, prepare
from toolchain.tasks.tracks import constant_velocity, read_tracks, window_rows

SCENES: dict[Any, tuple[int, int, int, int, float, float]] = {
    # train, val, test, test of at least 2 people, constant velocity's ADE and FDE in metres
    "eth": (30307, 5422, 364, 181, 1.075, 2.282),
    "hotel": (29676, 5203, 1197, 1053, 0.319, 0.614),
    "univ": (9874, 2800, 24334, 24334, 0.524, 1.165),
    "zara1": (28577, 5184, 2356, 2253, 0.427, 0.952),
    "zara2": (26076, 4262, 5910, 5833, 0.324, 0.724),
}


@pytest.mark.parametrize("scene", SCENES)
def test_eth_ucy_has_the_published_windows(data_root: Path, scene: Any) -> None:
    train, val, test, shared, ade, fde = SCENES[scene]
    data = prepare(DataSection(source="eth_ucy", scene=scene, path=str(data_root)))
    assert sizes(data) == {"train": train, "val": val, "test": test}
    arrays = data.splits["test"].arrays
    error = np.linalg.norm(constant_velocity(arrays["observed"], 12) - arrays["future"], axis=-1)
    assert (round(float(error.mean()), 3), round(float(error[:, -1].mean()), 3)) == (ade, fde)
    assert data.splits["test"].meta["scenes"] == list(download.ETH_UCY[scene])
    assert ("interpolation" in (data.info["note"] or "")) == (scene == "eth")
    assert "% of the steps in the training tracks repeat the one before" in data.info["note"]
    assert f"keeps to {'no' if scene == 'univ' else 'an'} axis" in data.info["note"]
    two = prepare(DataSection(source="eth_ucy", scene=scene, path=str(data_root), least_agents=2))
    assert len(two.splits["test"]) == shared


def test_people_of_eth_walk_at_speeds_that_are_hardly_trained_on(data_root: Path) -> None:
    data = prepare(DataSection(source="eth_ucy", scene="eth", path=str(data_root)))

    def fast(split: str) -> float:
        steps = np.diff(data.splits[split].arrays["observed"], axis=1)
        return float((np.linalg.norm(steps, axis=-1).mean(1) > 0.7).mean())

    assert (round(fast("test"), 2), round(fast("train"), 3)) == (0.28, 0.003)
    track = np.concatenate([data.splits["test"].arrays[name] for name in ("observed", "future")], 1)
    steps = np.linalg.norm(np.diff(track, axis=1), axis=-1)
    walkers = steps[steps[:, :7].mean(1) > 0.7]
    assert (walkers[:, 6].mean().round(1), walkers[:, -1].mean().round(1)) == (0.9, 0.5)


def test_windows_of_eth_are_of_few_people(data_root: Path) -> None:
    folder = data_root / "trajectory" / "eth_ucy" / "raw" / "all_data"
    recording = read_tracks(next(folder.glob("biwi_eth*")))
    _, windows = np.unique(recording.agent[window_rows(recording)[:, 0]], return_counts=True)
    assert (windows.sum(), len(windows), windows.max()) == (364, 44, 95)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small copy of the public home, and its files in the place of the real ones."""
    places = [Path(*remote.url.split("/")[-3:]) for remote in download.PUBLIC["eth_ucy/zara1"]]
    for i, place in enumerate(places):
        walk(tmp_path / "home" / place, agents=i + 1, steps=25)
    with served(tmp_path / "home", places) as files:
        monkeypatch.setitem(download.PUBLIC, "eth_ucy/zara1", files)
        yield places


def test_eth_ucy_is_fetched_when_told_to(home: list[Path], tmp_path: Path) -> None:
    keys: dict[str, Any] = {"source": "eth_ucy", "scene": "zara1", "path": str(tmp_path / "data")}
    data = prepare(DataSection(**keys, download=True))
    root = tmp_path / "data" / "trajectory" / "eth_ucy"
    assert sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file()) == sorted(home)
    assert sizes(data) == {"train": 6 * 28, "val": 6 * 77, "test": 6 * 15}
    assert data.info["note"] is None
    assert sizes(prepare(DataSection(**keys))) == sizes(data)
    habit = prepare(DataSection(**keys, validation="test"))
    assert sizes(habit) == {"train": 6 * (28 + 77), "val": 6 * 15, "test": 6 * 15}
    for name, array in habit.splits["val"].arrays.items():
        assert np.array_equal(array, habit.splits["test"].arrays[name])
    assert "flatters" in habit.info["note"]
    refitted = prepare(DataSection(**keys, validation="train"))
    assert sizes(refitted) == sizes(data) | {"train": 6 * (28 + 77)}
    assert "scores on the validation split are of windows that trained" in refitted.info["note"]
    (root / home[0]).unlink()
    with pytest.raises(DataError, match=f"1 are missing, {home[0]} first"):
        prepare(DataSection(**keys))
    walk(root / home[0], agents=1, steps=30)
    assert f"{home[0]} are not the public files" in prepare(DataSection(**keys)).info["note"]


def test_eth_ucy_absent_names_both_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESTILL_DATA", str(tmp_path))
    with pytest.raises(
        DataError,
        match=r"expected 15 files .* under .*/trajectory/eth_ucy, 15 are missing, hotel/train/biwi_eth_train\.txt first"
        r"\. Set EDGESTILL_DATA .* or data\.download=true to fetch 2\.8 MB from https://raw\.githubusercontent\.com/abd",
    ):
        prepare(DataSection(source="eth_ucy", scene="hotel"))
