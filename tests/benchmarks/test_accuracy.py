from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import accuracy, bench
from tests.benchmarks import tiny_task
from tests.benchmarks.models import data_x, write_engine, write_onnx, write_run
from toolchain import artifact, commands
from toolchain.artifact import EdgestillError
from toolchain.stage import Job
from toolchain.tasks import Split


def split(count: int = 10) -> Split:
    return Split({"x": data_x(count), "label": np.arange(count) % 3}, ("x",))


def labels(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"label": np.argmax(feeds["x"][:, :3], axis=1), "probabilities": feeds["x"][:, :3]}


def test_predictions_cover_the_split_whatever_the_batch(tmp_path: Path) -> None:
    accuracy.predict(labels, split(), 4, tmp_path / "a")
    accuracy.predict(labels, split(), 64, tmp_path / "b")
    a, b = accuracy.load_outputs(tmp_path / "a"), accuracy.load_outputs(tmp_path / "b")
    assert a["label"].tolist() == b["label"].tolist() == labels({"x": data_x(10)})["label"].tolist()
    assert accuracy.max_difference(a, b) == {"probabilities": 0.0}


@pytest.mark.parametrize(
    ("count", "call", "words"),
    [(0, labels, "empty test split"), (4, lambda f: {"label": np.zeros(())}, "a row for each of 4 samples")],
)
def test_predictions_that_cannot_be_are_named(tmp_path: Path, count: int, call: Any, words: str) -> None:
    with pytest.raises(EdgestillError, match=words):
        accuracy.predict(call, split(count), 4, tmp_path / "a")


def test_the_difference_is_the_greatest_and_none_when_it_is_no_number() -> None:
    a = {"p": np.zeros((130, 2), np.float32), "q": np.zeros(3, np.float32), "label": np.zeros(130, np.int64)}
    b = {"p": a["p"].copy(), "q": np.array([0, np.nan, 0], np.float32), "label": a["label"]}
    b["p"][129, 1] = -0.25
    assert accuracy.max_difference(a, b) == {"p": 0.25, "q": None}


def test_the_worst_samples_come_first() -> None:
    data = split(40)
    outputs = {"label": data.arrays["label"].copy()}
    outputs["label"][[5, 9]] = (outputs["label"][[5, 9]] + 1) % 3
    chosen = accuracy.choose_samples(tiny_task, outputs, data)  # type: ignore[arg-type]
    assert set(chosen[:2]) == {5, 9}
    assert len(set(chosen)) == 24


def test_the_whole_chain_is_measured_and_what_cannot_run_says_why(tmp_path: Path) -> None:
    job = Job(**write_run(tmp_path))
    bench.run(job)
    artifact.verify(job.out)
    value = json.loads((job.out / "bench.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in value["rows"]}
    order = ["onnx-teacher", "student", "onnx", "onnx-fp16", "engine-sm_86-fp16", "engine-sm_86-int8-trt"]
    assert list(rows) == order
    assert [rows[name]["kind"] for name in order] == ["teacher", "student", "onnx", "onnx", "engine", "engine"]
    metric = {"name": "accuracy", "higher_is_better": True, "unit": "%", "digits": 2, "note": None}
    assert value["metric"] == metric

    student, exact, half = rows["student"], rows["onnx"], rows["onnx-fp16"]
    assert student["backend"] == "torch"
    assert student["accuracy"] == {"accuracy": 100.0}
    assert student["interval"] == pytest.approx([95.9, 100.0], abs=0.05), "of 90 images, all right"
    assert exact["agreement"] == {"student": 1.0, "previous": 1.0, "previous_name": "student"}
    assert half["agreement"]["previous_name"] == "onnx"
    assert half["agreement"]["previous"] < 1
    assert half["accuracy"]["accuracy"] == pytest.approx(100 * half["agreement"]["student"])
    assert half["max_difference"]["probabilities"] > exact["max_difference"]["probabilities"] == 0
    for name in order[:4]:
        row = rows[name]
        assert row["status"] == "ok"
        assert row["reason"] is None
        assert row["parameters"] == (12)
        assert (
            row["bytes"]
            == (
                tmp_path / name / next(f for f in ("model.onnx", "model.safetensors") if (tmp_path / name / f).exists())
            )
            .stat()
            .st_size
        )
        assert row["latency"]["4"]["p50"]["ms"] > 0
        assert row["memory_mb"] > 10
        assert row["load_ms"] > 0

    assert rows["engine-sm_86-fp16"]["status"] == "not run"
    assert "engine built for imaginary" in rows["engine-sm_86-fp16"]["reason"]
    assert (
        rows["engine-sm_86-int8-trt"] | {"status": "not made", "reason": "no builder here"}
        == rows["engine-sm_86-int8-trt"]
    )
    raw = json.loads((job.out / "bench-raw.json").read_text(encoding="utf-8"))
    assert sum(map(len, raw["onnx"]["latency_ns"]["1"])) == exact["latency"]["1"]["calls"]
    with np.load(job.out / "shown.npz") as shown, np.load(job.out / "shown-teacher.npz") as teacher:
        assert len(shown["index"]) == len(teacher["label"]) == 24
    assert any("90 test samples" in line for line in value["protocol"])


def test_loose_folders_give_latency_alone(tmp_path: Path) -> None:
    config = write_run(tmp_path)["config"] | {"task": None}
    half = write_onnx(tmp_path / "other", noise=0.1, precision="int8-cpu")
    job = Job("bench", tmp_path / "loose", config | {"failed": {}}, {"b": half, "a": tmp_path / "onnx"})
    bench.run(job)
    value = json.loads((job.out / "bench.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in value["rows"]] == ["a", "b"]
    assert value["metric"] is None
    assert all(row["latency"]["1"]["p50"] and row["accuracy"] is None for row in value["rows"])


def test_what_is_damaged_failed_and_what_has_no_device_was_not_run(tmp_path: Path) -> None:
    config = write_run(tmp_path)["config"] | {"task": None, "failed": {}}
    with artifact.create(tmp_path / "bad", stage="onnx", config={}) as draft:
        (draft.path / "model.onnx").write_bytes(b"not a graph")
    folders = {name: tmp_path / name for name in ("bad", "onnx", "engine-sm_86-fp16")}
    bench.run(Job("bench", tmp_path / "bench", config, folders))
    rows = json.loads((tmp_path / "bench" / "bench.json").read_text(encoding="utf-8"))["rows"]
    assert {row["name"]: row["status"] for row in rows} == {
        "bad": "failed",
        "onnx": "ok",
        "engine-sm_86-fp16": "not run",
    }
    assert commands.failures(rows).keys() == {"bad"}


def test_nothing_to_measure_is_an_error(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    with pytest.raises(EdgestillError, match="no model among data"):
        bench.run(Job("bench", tmp_path / "b", config["config"], {"data": tmp_path / "data"}))
    with pytest.raises(EdgestillError, match="nothing could be measured: engine: "):
        bench.run(Job("bench", tmp_path / "b", config["config"], {"engine": tmp_path / "engine-sm_86-fp16"}))
    assert not (tmp_path / "b").exists()


def test_an_engine_is_predicted_within_its_profile(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "engine", write_onnx(tmp_path / "onnx"))
    row = bench.subjects({"engine": engine})[0]
    assert bench._largest(row) == 64
    row.manifest.extra["profile"] = {"x": {"min": [1, 4], "opt": [2, 4], "max": [16, 4]}}
    assert bench._largest(row) == 16
