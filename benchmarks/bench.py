"""The bench stage: every model of a run, measured side by side for accuracy, latency, memory and size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks import accuracy
from benchmarks.environment import environment
from benchmarks.latency import LEAST, BenchError, Measured, NoDevice, Worker, measure, ticks
from toolchain import artifact
from toolchain.artifact import EdgestillError, Manifest
from toolchain.stage import Job, main, progress
from toolchain.tasks import Arrays, Split, digits_of, load_data, load_task, unit_of

SCHEMA = 1
BATCH = 64
ORDER = ("teacher", "student", "onnx", "engine")
PRECISIONS = ("fp32", "fp16", "int8-cpu", "int8-trt")
MODELS = {"model.onnx": "onnxruntime", "model.engine": "tensorrt", "model.safetensors": "torch"}


@dataclass
class Row:
    """A row of the bench: an artifact, what is known of it from its manifest, and what became of it here."""

    name: str
    folder: Path
    manifest: Manifest
    kind: str
    backend: str
    precision: str
    status: str = "ok"
    reason: str | None = None
    load: dict[str, float] = field(default_factory=dict)
    worker: Worker | None = None
    outputs: Arrays | None = None

    @property
    def bytes(self) -> int:
        """Of the deployable files: the model and its external weights."""
        return sum(entry["bytes"] for name, entry in self.manifest.files.items() if name.startswith("model."))

    def fail(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason


def subjects(inputs: Mapping[str, Path]) -> list[Row]:
    """The models among a job's inputs, in the order of the chain: first the exported teacher, or the teacher."""
    found = []
    for role, folder in inputs.items():
        manifest = artifact.read(folder)
        backend = next((backend for file, backend in MODELS.items() if file in manifest.files), None)
        if backend is None or (role == "teacher" and "onnx-teacher" in inputs):
            continue
        teacher = role in ("teacher", "onnx-teacher") or manifest.config.get("which") == "teacher"
        kind = {"onnxruntime": "onnx", "tensorrt": "engine", "torch": "student"}[backend]
        backend = manifest.extra.get("backend", backend)
        precision = manifest.extra.get("precision", "fp32")
        found.append(Row(role, folder, manifest, "teacher" if teacher else kind, backend, precision))
    return sorted(found, key=lambda one: (ORDER.index(one.kind), _rank(one.precision)))


def _rank(precision: str) -> int:
    return PRECISIONS.index(precision) if precision in PRECISIONS else len(PRECISIONS)


def run(job: Job) -> None:
    settings = job.config["bench"]
    data = job.inputs.get("data")
    rows = subjects(job.inputs)
    if not rows:
        raise EdgestillError(f"nothing to measure: no model among {', '.join(job.inputs) or 'no folders'}")
    where = environment()
    try:
        for row in rows:
            _start(row, settings, data)
        alive = [row.worker for row in rows if row.worker is not None]
        if not alive:
            raise EdgestillError("nothing could be measured: " + "; ".join(f"{row.name}: {row.reason}" for row in rows))
        with progress("latency, interleaved", ticks(len(alive), settings)) as bar:
            measured = measure(alive, settings, bar.advance)
        results = _results(job, rows, measured)
    finally:
        for row in rows:
            if row.worker is not None:
                row.worker.close()
    apart = any(found.get("rounds_apart") for one in measured.values() for found in one.latency.values())
    value = {
        "schema": SCHEMA,
        "task": job.config.get("task"),
        "metric": results["metric"],
        "environment": where,
        "protocol": protocol(settings, results["samples"], apart),
        "settings": settings,
        "rows": results["rows"] + [_absent(name, reason) for name, reason in job.config.get("failed", {}).items()],
    }
    raw = {name: {"latency_ns": m.raw, "paced_ns": m.paced_raw} for name, m in measured.items()}
    with artifact.create(job.out, stage=job.stage, config=job.config, inputs=job.inputs) as draft:
        artifact.write_json(draft.path / "bench.json", value)
        (draft.path / "bench-raw.json").write_text(json.dumps(raw), encoding="utf-8")
        for name, arrays in results["shown"].items():
            np.savez_compressed(draft.path / f"{name}.npz", **arrays)
        draft.versions = artifact.versions("onnxruntime", "onnxruntime-gpu", "tensorrt", "torch", "numpy")


def _start(row: Row, settings: Mapping[str, Any], data: Path | None) -> None:
    """Load the row's model in its worker, or note why not: it failed, or is ``not run`` where it has no device."""
    which = "teacher" if row.kind == "teacher" else "student"
    provider = settings["provider"] if row.backend == "onnxruntime" else "cpu"
    worker = Worker(row.name, row.folder, row.backend, which, provider, settings["threads"], data)
    try:
        row.load = worker.load()
        row.worker = worker
    except BenchError as error:
        worker.close()
        row.fail("not run" if isinstance(error, NoDevice) else "failed", str(error))


def _results(job: Job, rows: list[Row], measured: dict[str, Measured]) -> dict[str, Any]:
    """The rows of bench.json; the accuracy columns too when there are data and a task to score with."""
    values = [_row(row, measured.get(row.name, Measured())) for row in rows]
    found: dict[str, Any] = {"rows": values, "metric": None, "samples": 0, "shown": {}}
    if not job.config.get("task") or "data" not in job.inputs:
        return found
    task = load_task(job.config["task"])
    data = load_data(job.inputs["data"])
    split = data.splits["test"]
    work = job.work / "outputs"
    try:
        _predict(rows, job.inputs["data"], len(split), work)
        for row, value in zip(rows, values, strict=True):
            value["status"], value["reason"] = row.status, row.reason
            value |= _accuracy(row, rows, task, split)
        found |= {
            "metric": {
                "name": task.HEADLINE,
                "higher_is_better": task.HIGHER_IS_BETTER,
                "unit": unit_of(task, data.info),
                "digits": digits_of(task),
                "note": data.info.get("note"),
            },
            "samples": len(split),
            "shown": _shown(rows, task, split),
        }
    finally:
        for row in rows:
            row.outputs = None
        shutil.rmtree(work, ignore_errors=True)
    return found


def _predict(rows: list[Row], data: Path, count: int, work: Path) -> None:
    alive = [row for row in rows if row.worker is not None]
    with progress(f"accuracy on {count} test samples", len(alive)) as bar:
        for row in alive:
            assert row.worker is not None
            bar.update(f"accuracy: {row.name}")
            out = work / row.name
            try:
                order = {"data": str(data), "split": "test", "folder": str(row.folder), "out": str(out)}
                row.worker.ask("predict", batch=_largest(row), **order)
                row.outputs = accuracy.load_outputs(out)
            except BenchError as error:
                row.fail("failed", f"no predictions: {error}")
            bar.advance()


def _largest(row: Row) -> int:
    """The batch to predict with: 64, or the most an engine's profile takes."""
    profile = row.manifest.extra.get("profile", {})
    return min([BATCH, *(int(shapes["max"][0]) for shapes in profile.values())])


def _accuracy(row: Row, rows: list[Row], task: ModuleType, split: Split) -> dict[str, Any]:
    """Scores, and how far this row is from the student, from the row it was made of, and from the fp32 graph."""
    if row.outputs is None:
        return {}
    value: dict[str, Any] = {"accuracy": accuracy.score(task, row.outputs, split)}
    value["interval"] = accuracy.interval(task, row.outputs, split)
    before = _previous(row, rows)
    student = next((r for r in rows if r.kind == "student" and r.outputs), None) or _fp32(rows)
    agreement = {
        key: float(task.agreement(other.outputs, row.outputs)) if other and other is not row and other.outputs else None
        for key, other in (("student", student), ("previous", before))
    }
    value["agreement"] = agreement | {"previous_name": before.name if before else None}
    exact = _fp32(rows)
    if exact and exact.outputs and row.kind in ("student", "onnx", "engine"):
        value["max_difference"] = accuracy.max_difference(exact.outputs, row.outputs)
    return value


def _fp32(rows: list[Row]) -> Row | None:
    return next((row for row in rows if row.kind == "onnx" and row.precision == "fp32"), None)


def _previous(row: Row, rows: list[Row]) -> Row | None:
    """The row this one was made of, by the ids in its manifest; the student's is the teacher."""
    if row.kind == "teacher":
        return None
    if row.kind == "student":
        return next((other for other in rows if other.kind == "teacher"), None)
    parents = {entry["id"] for entry in row.manifest.inputs.values()}
    return next((other for other in rows if other.manifest.id in parents), None)


def _shown(rows: list[Row], task: ModuleType, split: Split) -> dict[str, Arrays]:
    """The outputs of teacher, student and deployed rows on the samples that the report shows."""
    ready = [row for row in rows if row.outputs is not None]
    student = next((row for row in ready if row.kind != "teacher"), None)
    if student is None or student.outputs is None:
        return {}
    index = accuracy.choose_samples(task, student.outputs, split)
    shown: dict[str, Arrays] = {"shown": {"index": index}}
    for row in {row.kind: row for row in (*reversed(ready), student)}.values():
        if row.outputs is not None and row.kind in ("teacher", student.kind):
            name = "shown-teacher" if row.kind == "teacher" else "shown-student"
            shown[name] = {key: array[index] for key, array in row.outputs.items()}
            if hasattr(task, "totals"):
                shown[name] |= task.totals(row.outputs, split)
    return shown


def _row(row: Row, found: Measured) -> dict[str, Any]:
    reasons = [entry["reason"] for entry in found.latency.values() if entry.get("reason")]
    if row.worker is not None and reasons and len(reasons) == len(found.latency):
        row.fail("failed", reasons[0])
    return {
        "name": row.name,
        "kind": row.kind,
        "backend": row.backend,
        "precision": row.precision,
        "id": row.manifest.id,
        "parameters": row.manifest.extra.get("parameters"),
        "converted": row.manifest.extra.get("converted"),
        "bytes": row.bytes,
        "accuracy": None,
        "interval": None,
        "agreement": None,
        "max_difference": None,
        "latency": found.latency,
        "paced": found.paced,
        "memory_mb": found.memory_mb,
        "memory_base_mb": row.load.get("base_mb"),
        "load_ms": row.load.get("load_ms"),
        "first_call_ms": found.first_call_ms,
        "status": row.status,
        "reason": row.reason,
    }


def _absent(name: str, reason: str) -> dict[str, Any]:
    """A row for what an earlier stage could not make."""
    kind = "engine" if name.startswith("engine") else "teacher" if "teacher" in name else "onnx"
    precision = next((one for one in PRECISIONS if name.endswith(one)), "fp32")
    empty = Row(name, Path(), Manifest("", {}, {}, {}), kind, "", precision)
    return _row(empty, Measured()) | {"id": None, "bytes": None, "status": "not made", "reason": reason}


def protocol(settings: Mapping[str, Any], samples: int, apart: bool = False) -> list[str]:
    """How it was measured, in words that stand beside the numbers."""
    batches = ", ".join(map(str, sorted(settings["batches"])))
    text = [
        (
            f"Latency: batches {batches}; {settings['threads']} threads; ONNX Runtime on {settings['provider']}; one "
            "host clock (perf_counter_ns) from numpy inputs ready on the host to numpy outputs on the host, so that "
            "normalisation and decoding, which are in the graph, are included, and copies to a GPU too."
        ),
        (
            f"Each model runs in a process of its own; only one works at a time; {settings['rounds']} interleaved "
            f"rounds (A B C A B C) share {settings['seconds']:g} s per model and batch."
        ),
        (
            f"Warm-up: at least {settings['warmup_ms']:g} ms and until the rolling median moves by no more than 2 %, "
            "at most five times as long; before every round a fifth of it again."
        ),
        "Inputs are real samples of the test split, in rotation." if samples else "Inputs are real samples.",
        "Intervals are 95 % order-statistic intervals over calls; that of p50 also covers the median of every round. "
        "A percentile is left out below "
        + ", ".join(f"{count} calls (p{q})" for q, count in LEAST.items())
        + ". `noisy` marks rounds whose medians lie more than 5 % apart.",
        (
            f"Memory is the peak resident set of the whole process after batch {min(settings['batches'])}, Python and "
            "runtime included. Load time is cold: imports, hash checks and session in a fresh process."
        ),
    ]
    if apart:
        text.append(
            "Cores apart: when the round began, a core took long to read what the other had written. Two cores of a "
            "virtual machine may share a cache at one time and none at another; threads of small networks then gain "
            "little."
        )
    if settings["paced_seconds"]:
        text.append(
            f"Paced: a frame arrives {settings['paced_fps']:g} times a second for {settings['paced_seconds']:g} s, "
            "idle in between as behind a camera; latency counts from the arrival; above 1/fps the deadline is missed."
        )
    if samples:
        text.append(
            f"Accuracy and agreement: all {samples} test samples, the same for every row. The interval of a score, "
            "where there is one, is for other samples of the kind (for trajectories, for other people: each is drawn "
            "with all windows). Rows share their samples: their differences are surer than their intervals."
        )
    return text


if __name__ == "__main__":
    main(run)
