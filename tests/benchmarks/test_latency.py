from __future__ import annotations

import io
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import latency
from benchmarks.latency import BenchError, NoDevice, Subject, Worker, measure, percentile, summarise, summarise_paced
from tests.benchmarks.models import INPUTS, OUTPUTS, data_x, write_engine, write_onnx
from toolchain.runtime import FakeRuntime
from toolchain.tasks import Split

SETTINGS = {"batches": [1, 4], "seconds": 0.06, "rounds": 3, "warmup_ms": 5.0, "paced_fps": 200.0, "paced_seconds": 0.1}
SETTINGS |= {"threads": 1}


def subject(sleep_s: float = 0.0, seen: list[Any] | None = None) -> Subject:
    def function(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(sleep_s)
        if seen is not None:
            seen.append(feeds["x"])
        batch = len(feeds["x"])
        return {"probabilities": np.zeros((batch, 3), np.float32), "label": np.zeros(batch, np.int64)}

    return Subject(FakeRuntime(INPUTS, OUTPUTS, function), Split({"x": data_x(10)}, ("x",)))


def test_percentiles_are_given_only_where_the_count_carries_them() -> None:
    few, some, many = (np.arange(1, n + 1, dtype=np.int64) * 1000 for n in (5, 50, 500))
    assert percentile(few, 50) is None
    assert percentile(some, 90) is not None
    assert percentile(some, 99) is None
    found = percentile(many, 99)
    assert found is not None
    assert found["low_ms"] <= found["ms"] <= found["high_ms"]
    summary = summarise([[1000] * 4, [1000] * 4], batch=2)
    assert summary["p50"] is not None
    assert summary["p90"] is None
    assert summary["p99"] is None
    assert summary["missing"] == ["p90 needs 50 calls, there are 8", "p99 needs 500 calls, there are 8"]
    assert summary["throughput_per_s"] == pytest.approx(2 / 1e-6)


def test_the_interval_of_the_median_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        found = percentile(np.sort(rng.lognormal(10, 0.3, 200)), 50)
        assert found is not None
        covered += found["low_ms"] <= math.exp(10) / 1e6 <= found["high_ms"]
    assert covered >= 0.93 * 400


def test_rounds_that_differ_are_called_noisy_and_widen_the_interval() -> None:
    calm, noisy = summarise([[1000, 1010, 990] * 5] * 3, 1), summarise([[1000] * 15, [1200] * 15, [1000] * 15], 1)
    assert not calm["noisy"]
    assert noisy["noisy"]
    assert noisy["p50"]["high_ms"] == pytest.approx(1.2e-3)
    assert noisy["spread"] == pytest.approx(0.2)


def test_paced_counts_missed_deadlines() -> None:
    found = summarise_paced([1_000_000] * 8 + [30_000_000] * 2, fps=50)
    assert (found["calls"], found["missed"], found["missed_share"]) == (10, 2, 0.2)
    assert found["p50"]["ms"] == 1.0
    assert found["p90"] is None


def test_batches_rotate_through_different_real_samples() -> None:
    seen: list[Any] = []
    subject(seen=seen).time(4, seconds=0.0, least=3)
    assert all(x.shape == (4, 4) and x.flags.c_contiguous for x in seen)
    assert not np.array_equal(seen[-1], seen[-2])
    assert subject().batches(64)[0]["x"].shape == (64, 4)


def test_warming_ends_when_stationary_or_after_five_times_its_time() -> None:
    found = subject(0.001).warm(1, 20)
    assert 20 <= found["ms"] < 1000
    slow = subject(0.03).warm(1, 10)
    assert slow["calls"] <= 3
    assert not slow["stationary"]


def test_timing_takes_the_time_it_was_given_and_at_least_two_calls() -> None:
    assert len(subject(0.02).time(1, seconds=0.0)) == 2
    ns = subject(0.001).time(1, seconds=0.03, settle_ms=2)
    assert 2 <= len(ns) <= 30
    assert min(ns) >= 1_000_000


def test_a_frame_that_waits_for_the_one_before_counts_its_waiting() -> None:
    calm = subject(0.001).pace(50, 0.2)
    assert len(calm) == 10
    assert np.median(calm) < 18e6
    overrun = subject(0.012).pace(100, 0.1)
    assert overrun[-1] > overrun[0] + 10e6
    assert summarise_paced(overrun, 100)["missed"] == 10


def test_the_worker_answers_errors_and_goes_on() -> None:
    orders = [{"do": "time", "batch": 1, "seconds": 0, "settle_ms": 0}, {"do": "load", "folder": "/nowhere"}]
    orders[1] |= {"backend": "onnxruntime", "which": "student", "provider": "cpu", "threads": 1, "data": None}
    answers = io.StringIO()
    latency.serve(io.StringIO("".join(json.dumps(order) + "\n" for order in orders)), answers)
    first, second = map(json.loads, answers.getvalue().splitlines())
    assert first["error"] == "nothing is loaded"
    assert "expected an artifact folder" in second["error"]


def test_two_workers_are_measured_side_by_side(tmp_path: Path) -> None:
    workers = [Worker(name, write_onnx(tmp_path / name), "onnxruntime") for name in ("a", "b")]
    try:
        loads = [worker.load() for worker in workers]
        count = []
        found = measure(workers, SETTINGS, lambda: count.append(1))
    finally:
        for worker in workers:
            worker.close()
    assert len(count) == latency.ticks(2, SETTINGS)
    assert all(load["load_ms"] > 0 and load["base_mb"] > 5 for load in loads)
    for name in ("a", "b"):
        mine = found[name]
        assert sorted(mine.latency) == ["1", "4"]
        assert mine.latency["4"]["rounds"] == 3
        assert [len(one) for one in mine.raw["1"]]
        assert mine.latency["1"]["calls"] == sum(map(len, mine.raw["1"]))
        assert mine.latency["1"]["p50"]["ms"] < 50
        assert mine.latency["1"]["warmup"]["calls"] >= 1
        assert mine.paced is not None
        assert mine.paced["calls"] == 20
        assert mine.memory_mb is not None
        assert mine.memory_mb > 10
    assert all(worker.process.returncode == 0 for worker in workers)


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    onnx = write_onnx(tmp_path / "onnx", samples=False)
    for folder, backend, words, kind in (
        (onnx, "onnxruntime", "no samples.npz", BenchError),
        (write_engine(tmp_path / "engine", onnx), "tensorrt-rtx", "engine built for imaginary", NoDevice),
    ):
        worker = Worker("it", folder, backend)
        with pytest.raises(BenchError, match=words) as caught:
            worker.load()
        assert caught.type is kind
        worker.close()


def test_a_worker_that_dies_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    worker = Worker("it", write_onnx(tmp_path / "onnx"), "onnxruntime")
    worker.load()
    worker.process.kill()
    with pytest.raises(BenchError, match="its process died"):
        worker.ask("memory")
    worker.close()


def test_a_batch_that_a_model_refuses_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky:
        name = "picky"

        def ask(self, do: str, **order: Any) -> dict[str, Any]:
            if order.get("batch") == 4:
                raise BenchError("image: batch 4 is above 1")
            return {"ns": [1000] * 10, "ms": 1.0, "calls": 1, "stationary": True, "first_call_ms": 1.0, "peak_mb": 1.0}

    found = measure([Picky()], SETTINGS, lambda: None)["picky"]  # type: ignore[list-item]
    assert found.latency["1"]["p50"]
    assert found.latency["1"]["rounds_apart"] is None
    assert found.latency["4"]["reason"] == "image: batch 4 is above 1"


def test_rounds_of_several_threads_say_whether_the_cores_were_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    class Steady:
        name = "steady"

        def ask(self, do: str, **order: Any) -> dict[str, Any]:
            return {"ns": [1000] * 10, "ms": 1.0, "calls": 1, "stationary": True, "first_call_ms": 1.0, "peak_mb": 1.0}

    found = {}
    for name, answers in (("both", [True, False, True]), ("unknown", [None] * 3)):
        monkeypatch.setattr(latency.cores, "apart", iter(answers).__next__)
        settings = SETTINGS | {"threads": 2, "batches": [1]}
        found[name] = measure([Steady()], settings, lambda: None)["steady"].latency["1"]  # type: ignore[list-item]
    assert {name: one["rounds_apart"] for name, one in found.items()} == {"both": 2, "unknown": None}
