from __future__ import annotations

import os
import shutil
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tests.toolchain.tasks.walkers import sizes, walk
from toolchain.tasks import Data
from toolchain.tasks.datasets import DataError
from toolchain.tasks.track_data import DataSection, files_state, prepare


def own(path: Path, **keys: Any) -> Data:
    return prepare(DataSection(source="files", path=str(path), **{"observe": 2, "predict": 3} | keys))


# The section


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "eth_ucy"}, "source eth_ucy needs scene, the one held out: eth, hotel"),
        (
            {"source": "simulator", "scene": "eth"},
            "scene has no meaning with source simulator, only eth_ucy; remove",
        ),
        ({"source": "files"}, "source files needs path: your track file"),
        ({"source": "sdd", "download": True}, "download has no meaning with source sdd, only eth_ucy; remove it"),
        ({"source": "sdd", "unit": "m"}, "source sdd is in pixels: unit m needs metres_per_unit"),
        ({"source": "simulator", "frame_step": 5}, "source simulator has frame_step 10, found 5; remove frame_step"),
        ({"source": "files", "path": "p", "recordings": 3}, "recordings has no meaning with source files"),
        ({"source": "simulator", "validation": "test"}, "validation test is the habit of the published figures of eth"),
        ({"source": "simulator", "path": "p"}, "path has no meaning with source simulator"),
        ({"source": "files", "path": "p", "unit": "px", "metres_per_unit": 2}, "unit is px; set unit: m, or remove"),
        ({"source": "files", "path": "p", "columns": ["a", "b", "b", "c"]}, "columns: expected four different ones"),
        ({"source": "files", "path": "p", "val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing for training"),
        ({"source": "files", "path": "p", "least_agents": 3}, "less than or equal to 2"),
        ({"source": "files", "path": "p", "least_agents": True}, "expected a number"),
        ({"source": "files", "path": "p", "strides": 2}, "Extra inputs"),
    ],
)
def test_combinations_that_make_no_sense(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataSection(**keys)


@pytest.mark.parametrize("keys", [{"source": "sdd"}, {"source": "eth_ucy", "scene": "univ"}, {"source": "simulator"}])
def test_a_resolved_section_is_valid_again(keys: dict[str, Any]) -> None:
    section = DataSection(**keys)
    assert DataSection.model_validate(section.model_dump()) == section
    assert (section.unit, section.frame_step) == (("px", 12) if section.source == "sdd" else ("m", 10))


# Files of one's own


def test_one_file_is_cut_by_time(tmp_path: Path) -> None:
    data = own(walk(tmp_path / "street.txt", agents=3, steps=100), predict=8)
    assert sizes(data) == {"train": 3 * (70 - 9), "val": 3 * 1, "test": 3 * (20 - 9)}
    train, test = data.splits["train"], data.splits["test"]
    assert train.arrays["observed"].shape == (183, 2, 2)
    assert train.arrays["future"].shape == (183, 8, 2)
    assert {name: str(a.dtype) for name, a in train.arrays.items()} == {
        "observed": "float32",
        "future": "float32",
        "scene": "int64",
        "agent": "int64",
        "frame": "int64",
    }
    whole = np.concatenate([test.arrays["observed"], test.arrays["future"]], 1)
    assert np.array_equal(
        whole[..., 0], (100 * test.arrays["agent"] + test.arrays["frame"] // 10)[:, None] + np.arange(10)
    )
    assert (test.feeds, test.meta) == (("observed",), {"scenes": ["street"], "unit": "m", "seconds_per_step": 0.4})
    assert {key: data.info[key] for key in ("source", "unit", "observe", "predict", "seconds_per_step", "note")} == {
        "source": "files",
        "unit": "m",
        "observe": 2,
        "predict": 8,
        "seconds_per_step": 0.4,
        "note": None,
    }


def test_no_window_straddles_a_cut(tmp_path: Path) -> None:
    for name, steps in (("a.txt", 90), ("b.csv", 133)):
        walk(tmp_path / name, agents=4, steps=steps)
    data = own(tmp_path, val_fraction=0.15, test_fraction=0.25)
    for scene in (0, 1):
        edges = []
        for split in data.splits.values():
            of_scene = split.arrays["frame"][split.arrays["scene"] == scene]
            edges.append((of_scene.min(), of_scene.max() + 10 * (2 + 3 - 1)))
        assert all(last < first for (_, last), (first, _) in pairwise(edges))


def test_folders_of_splits_are_kept_and_pooled_in_order(tmp_path: Path) -> None:
    for name, steps in (("train/b.txt", 12), ("train/a.csv", 9), ("val/c.txt", 7), ("test/d.tsv", 6)):
        walk(tmp_path / name, agents=1, steps=steps)
    data = own(tmp_path)
    assert sizes(data) == {"train": 8 + 5, "val": 3, "test": 2}
    assert data.splits["train"].meta["scenes"] == ["a", "b"]
    assert data.splits["train"].arrays["scene"].tolist() == [0] * 5 + [1] * 8
    assert data.splits["train"].arrays["frame"].tolist() == [10 * k for k in (*range(5), *range(8))]


def test_a_missing_split_is_cut_from_training(tmp_path: Path) -> None:
    walk(tmp_path / "train" / "a.txt", agents=1, steps=100)
    walk(tmp_path / "test" / "b.txt", agents=1, steps=10)
    assert sizes(own(tmp_path, val_fraction=0.2)) == {"train": 80 - 4, "val": 20 - 4, "test": 6}


def test_keys_reach_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = [f"{7},{k * 5},{k},{2 * k}" for k in range(60)]
    path.write_text("\n".join(["who,when,east,north", *rows]), encoding="utf-8")
    columns = ["when", "who", "east", "north"]
    data = own(path, columns=columns, frame_step=5, seconds_per_step=0.2, metres_per_unit=0.5, stride=3)
    train = data.splits["train"].arrays
    assert train["frame"].tolist() == [15 * k for k in range(13)]
    assert train["observed"][1].tolist() == [[1.5, 3.0], [2.0, 4.0]]
    assert own(path, columns=[1, 0, 2, 3], frame_step=5, unit="px").info["unit"] == "px"


def test_least_agents_and_counts(tmp_path: Path) -> None:
    path = walk(tmp_path / "a.txt", agents=2, steps=100)
    lines = path.read_text(encoding="utf-8").splitlines()
    alone = [line for line in lines if not (line.split()[1] == "2" and 30 <= int(line.split()[0]) // 10 < 50)]
    path.write_text("\n".join([*alone[:40], *alone[40:]]), encoding="utf-8")
    counts = own(path).info["counts"]["train"]
    assert counts["rows"] - counts["rows_without_window"] == counts["rows"]
    pairs = own(path, least_agents=2)
    train = pairs.splits["train"].arrays
    assert len(train["agent"]) == 2 * (train["agent"] == 1).sum() < counts["windows"]
    assert pairs.info["counts"]["train"]["rows_without_window"] == 20
    assert pairs.info["counts"]["train"]["agents_without_window"] == 0


def test_train_samples_are_evenly_spread(tmp_path: Path) -> None:
    path = walk(tmp_path / "a.txt", agents=1, steps=100)
    whole, few = own(path), own(path, train_samples=6)
    assert few.splits["train"].arrays["frame"].tolist() == [0, 110, 220, 330, 440, 550]
    assert sizes(few) | {"train": 66} == sizes(whole)
    with pytest.raises(DataError, match=r"train_samples: expected at most 66 .* found 67; lower it or remove the key"):
        own(path, train_samples=67)


def test_too_short_says_how_long_it_is(tmp_path: Path) -> None:
    path = walk(tmp_path / "a.txt", agents=2, steps=10)
    with pytest.raises(
        DataError, match=r"split val: expected a window of 5 steps .* in a: .* has 1 at 10 .*raise data\.val_fraction"
    ):
        own(path)
    path = walk(tmp_path / "b.txt", agents=1, steps=200)
    with pytest.raises(DataError, match=r"split train: .* shared by 2 people, found none in b: .* has 140 .*lower"):
        own(path, least_agents=2)
    path = walk(tmp_path / "c.txt", agents=1, steps=200, step=20)
    words = (
        r"longest track without a gap has 1 at 10 .*; check data\.frame_step \(it is 20 or a fraction of it\), lower"
    )
    with pytest.raises(DataError, match=words):
        own(path)


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path .*/none: expected a track file or a folder .* correct it"):
        own(tmp_path / "none")
    with pytest.raises(DataError, match=r"expected track files .* found none; add some"):
        own(tmp_path)
    walk(tmp_path / "val" / "a.txt", 1, 9)
    with pytest.raises(DataError, match="expected a folder train beside val; add it"):
        own(tmp_path)
    walk(tmp_path / "train" / "map.png", 1, 9)
    with pytest.raises(DataError, match=r"train/map\.png: expected track files .* rename it, or move it elsewhere"):
        own(tmp_path)
    (tmp_path / "raw").mkdir()
    with pytest.raises(DataError, match=r"raw: expected only folders train, val and test .* rename or remove it"):
        own(tmp_path)


def test_a_broken_line_is_named_through_prepare(tmp_path: Path) -> None:
    path = walk(tmp_path / "a.txt", 1, 30)
    path.write_text(path.read_text(encoding="utf-8") + "300 1 nan 0\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.txt:31: expected a finite x, found nan; remove the line"):
        own(path)


def test_files_state_follows_the_files(tmp_path: Path) -> None:
    path = walk(tmp_path / "data" / "a.txt", 1, 30)
    section, alone = (DataSection(source="files", path=str(p)) for p in (tmp_path / "data", path))
    before = files_state(section), files_state(alone)
    assert None not in before
    os.utime(path, (1, 1))
    (tmp_path / "data" / "a.mp4").write_bytes(b"video")
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    copied = DataSection(source="files", path=str(tmp_path / "copy"))
    assert (files_state(section), files_state(alone), files_state(copied)) == (*before, before[0])
    walk(path, 1, 31)
    assert files_state(section) != before[0]
    assert files_state(alone) != before[1]
    other = DataSection(source="files", path=str(walk(tmp_path / "tracks.dat", 1, 30)))
    first = files_state(other)
    walk(tmp_path / "tracks.dat", 1, 31)
    assert files_state(other) not in (None, first)
    assert files_state(DataSection(source="simulator")) is None
    assert files_state(DataSection(source="eth_ucy", scene="eth", path=str(tmp_path))) is None
    assert files_state(DataSection(source="sdd", path=str(tmp_path))) is None
    walk(tmp_path / "sdd" / "train" / "a.txt", 1, 30)
    assert files_state(DataSection(source="sdd", path=str(tmp_path))) is not None


def test_sdd_draws_val_by_track(tmp_path: Path) -> None:
    root = tmp_path / "trajectory" / "sdd"
    for name, agents in (("train/bookstore_0.txt", 12), ("train/gates_1.txt", 8), ("test/coupa_0.txt", 5)):
        walk(root / name, agents=agents, steps=20, step=12)
    section = DataSection(source="sdd", path=str(tmp_path), val_fraction=0.2)
    data = prepare(section)
    assert sizes(data) == {"train": 16, "val": 4, "test": 5}
    assert (data.info["unit"], data.splits["test"].meta["scenes"]) == ("px", ["coupa_0"])
    tracks = [
        {(s.meta["scenes"][k], int(a)) for k, a in zip(s.arrays["scene"], s.arrays["agent"], strict=True)}
        for s in (data.splits["train"], data.splits["val"])
    ]
    assert len(tracks[0] | tracks[1]) == 20
    assert np.array_equal(prepare(section).splits["val"].arrays["agent"], data.splits["val"].arrays["agent"])
    others = [prepare(section.model_copy(update={"seed": seed})).splits["val"].arrays["observed"] for seed in (1, 2, 3)]
    assert any(not np.array_equal(other, data.splits["val"].arrays["observed"]) for other in others)
    walk(root / "val" / "hyang_0.txt", agents=3, steps=20, step=12)
    assert sizes(prepare(section)) == {"train": 20, "val": 3, "test": 5}
    metres = prepare(DataSection(source="sdd", path=str(tmp_path), unit="m", metres_per_unit=0.25))
    np.testing.assert_allclose(metres.splits["test"].arrays["observed"] * 4, data.splits["test"].arrays["observed"])


def test_people_without_a_window_are_told(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        walk(tmp_path / part / "a.txt", agents=2, steps=9)
    assert own(tmp_path).info["note"] is None
    lines = (tmp_path / "train" / "a.txt").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("20 2 ", "60 2 "))]  # frames 0, 10, 30 to 50, 70, 80
    (tmp_path / "train" / "a.txt").write_text("\n".join(kept))
    data = own(tmp_path)
    assert data.info["note"] == (
        "train, a: no window of 5 steps without a gap for 1 of 2 people (id 2, frames 0 to 80, is the first)"
    )
    assert sizes(data)["train"] == 5
    assert "without a gap at stride 2 for 1 of 2 people" in own(tmp_path, stride=2).info["note"]
    (tmp_path / "train" / "a.csv").write_text("\n".join(kept))
    assert all(f"train, {name}: no" in own(tmp_path).info["note"] for name in ("a.csv", "a.txt"))
    walk(tmp_path / "late.txt", agents=2, steps=9)
    assert own(tmp_path).info["note"].startswith("not read, since it lies beside the folders: late.txt; train, a.csv")


def test_recordings_are_turned_so_that_people_walk_along_x(tmp_path: Path) -> None:
    for part, name in product(("train", "val", "test"), ("along", "across")):
        walk(tmp_path / part / f"{name}.txt", agents=2, steps=9)
    before, after = own(tmp_path), own(tmp_path, walk_axis={"across": 90})
    for split in ("train", "test"):
        was, now = (data.splits[split].arrays for data in (before, after))
        across = was["scene"] == before.splits[split].meta["scenes"].index("across")
        assert np.array_equal(now["future"][~across], was["future"][~across])
        np.testing.assert_allclose(now["future"][across], was["future"][across][..., ::-1] * [1, -1], atol=1e-4)
    assert "walk along x" in after.info["note"]
    longest = own(tmp_path, walk_axis={"a": 5, "along": 0, "across": 90}).splits["test"].arrays["observed"]
    assert np.array_equal(longest, after.splits["test"].arrays["observed"])
    with pytest.raises(DataError, match=r"acros_: expected a part .* did you mean 'across'"):
        own(tmp_path, walk_axis={"acros_": 90})


def test_training_windows_are_cut_at_every_pace(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        walk(tmp_path / part / "a.txt", agents=2, steps=20)
        walk(tmp_path / part / "b.txt", agents=1, steps=8)
    plain, paced = own(tmp_path), own(tmp_path, paces=[1, 2, 0.5])
    assert sizes(plain) == {"train": 2 * 16 + 4, "val": 36, "test": 36}
    assert sizes(paced) == {"train": 36 + 2 * 12 + 2 * 17 + 5, "val": 36, "test": 36}
    train = paced.splits["train"]
    for name, array in plain.splits["train"].arrays.items():
        assert np.array_equal(train.arrays[name][:36], array)
    assert set(train.arrays["scene"][36:60]) == {0}, "eight steps hold no window of five twice as far apart"
    assert np.bincount(train.arrays["scene"]).tolist() == [32 + 24 + 34, 4 + 5]
    track = np.concatenate([train.arrays["observed"], train.arrays["future"]], 1)
    np.testing.assert_allclose(np.diff(track[36:60, :, 0], axis=1), 2)
    np.testing.assert_allclose(np.diff(track[60:, :, 0], axis=1), 0.5)
    assert paced.info["counts"]["train"]["windows"] == len(train)
    assert sizes(own(tmp_path, paces=[1, 2, 0.5], resampled=True))["train"] == 36 + 2 * 12 + 2 * 18 + 6
    one = own(tmp_path, paces=[3])
    assert sizes(one)["train"] == 2 * 8
    assert one.info["counts"]["train"]["agents_without_window"] == 1
    assert own(tmp_path, paces=[0.5, 3]).info["counts"]["train"]["agents_without_window"] == 0
    strided = own(tmp_path, paces=[2], stride=2, least_agents=2)
    assert sizes(strided)["train"] == 2 * 6
    assert sizes(own(tmp_path, paces=[1, 2], train_samples=7))["train"] == 7


def test_a_pace_without_a_window_is_an_error(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        walk(tmp_path / part / "a.txt", agents=2, steps=12)
    message = (
        r"files, split train: expected a window of 13 steps \(data.observe \+ data.predict, at 3 of data.paces\), "
        r"found none in a: the longest track without a gap has 12 .* lower data.predict, data.paces or data.stride"
    )
    with pytest.raises(DataError, match=message):
        own(tmp_path, paces=[1, 3])
    walk(tmp_path / "train" / "b.txt", agents=1, steps=8)
    note = own(tmp_path, paces=[2, 2.25]).info["note"]
    assert note == "train, b: no window of 9 steps without a gap for 1 of 1 people (id 1, frames 0 to 70, is the first)"
    different = r"paces: expected different ones, found \[1.0, 2.0, 1.0\]"
    for paces, fault in (((), "paces"), ((1, 2, 1.0), different), ((1,), "resampled: expected paces")):
        with pytest.raises(ValidationError, match=fault):
            DataSection(source="files", path=str(tmp_path), paces=paces, resampled=True)


def test_tracks_between_sparse_positions_are_told(tmp_path: Path) -> None:
    rows = [f"{10 * k} 1 {k} {abs(k % 10 - 5)}" for k in range(60)]
    (tmp_path / "a.txt").write_text("\n".join(rows))
    note = own(tmp_path).info["note"]
    assert note.startswith("80% of the steps in the training tracks repeat the one before, as where positions were")
    assert note.endswith("method.jitter, the standard deviation of the noisiest, in m")


def test_sdd_absent_says_what_and_where(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"sdd: expected .*trajectory/sdd/train and .*/test .*'frame id x y' .* TrajNet .*PECNet.*EDGESTILL_DATA",
    ):
        prepare(DataSection(source="sdd", path=str(tmp_path)))


# The simulator


def test_the_simulator_needs_no_files() -> None:
    data = prepare(DataSection(source="simulator", recordings=4, seconds=120, seed=3))
    assert min(sizes(data).values()) > 100
    assert data.splits["val"].meta["scenes"] == ["corridor_00", "crossing_01", "square_02", "doorway_03"]
    assert "simulated" in data.info["note"]
