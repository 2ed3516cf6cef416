from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import noise, tables
from toolchain.artifact import EdgestillError
from toolchain.runtime import load
from toolchain.tasks import Split, load_data, save_data, trajectory


@pytest.fixture
def graph(exported_tracks: Callable[..., Path]) -> Path:
    return exported_tracks("one_shot") / "onnx"


def test_noise_is_of_the_deviation_asked_for_and_on_what_was_observed_alone() -> None:
    rng = np.random.default_rng(1)
    arrays = {"observed": rng.normal(size=(500, 8, 2)).astype(np.float32), "future": np.ones((500, 12, 2), np.float32)}
    split = Split(arrays, ("observed",), {"scenes": ["a"]})
    added = noise.noisy(split, 0.03).arrays["observed"] - arrays["observed"]
    assert added.std() == pytest.approx(0.03, rel=0.03)
    assert abs(added.mean()) < 0.001
    assert np.array_equal(noise.noisy(split, 0.03).arrays["future"], arrays["future"])
    assert np.array_equal(noise.noisy(split, 0.0).arrays["observed"], arrays["observed"])
    twice = noise.noisy(split, 0.06).arrays["observed"] - arrays["observed"]
    np.testing.assert_allclose(twice, 2 * added, atol=1e-6)


def test_a_graph_is_scored_at_every_deviation(graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "noise.json"
    assert noise.main([str(graph), "--deviations", "0", "0.5", "--threads", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    split = load_data(graph.parent / "data").splits["test"]
    with load(graph, threads=1) as model:
        clean = trajectory.score(model(split.feed(slice(None))), split)
        moved = noise.noisy(split, 0.5)
        expected = trajectory.score(model(moved.feed(slice(None))), moved)
    (row,) = found["noise"]
    assert row["graph"] == str(graph)
    assert row["scores"][0]["minADE"] == pytest.approx(clean["minADE"], rel=1e-5)
    assert row["scores"][1]["minADE"] == pytest.approx(expected["minADE"], rel=1e-5)
    assert expected["minADE"] != pytest.approx(clean["minADE"], rel=1e-3)
    assert found["windows"] == len(split)
    table = tables.render("<!-- results:noise -->\n<!-- /results -->", tmp_path, "it")
    assert "| graph | 0 m | 0.5 m |" in table
    assert f"{clean['minADE']:.3f}".lstrip("0") in table


def test_graphs_of_other_test_splits_are_not_compared(graph: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(graph.parent, other)
    data = load_data(other / "data")
    data.splits["test"].arrays["future"] = data.splits["test"].arrays["future"] + np.float32(1)
    save_data(other / "data", data)
    with pytest.raises(EdgestillError, match=r"expected the test split of .*, found another; compare runs of one data"):
        noise.measure([graph, other / "onnx"], (0.0,), threads=1)
