"""How long a call takes, and how sure we are of it.

Every model lives in a worker process of its own (``benchmarks.latency --worker``), kept alive and idle
while others are measured; rounds are interleaved, A B C A B C, so that a slow minute of the machine falls on all.
One clock for every runtime: ``perf_counter_ns`` on the host, numpy in and numpy out.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import cores
from benchmarks.accuracy import predict
from toolchain import artifact, child
from toolchain.artifact import EdgestillError
from toolchain.runtime import DeviceMissing
from toolchain.tasks import Split, as_fed, load_data

Feeds = dict[str, NDArray[Any]]
Call = Callable[[Feeds], Mapping[str, NDArray[Any]]]

LEAST = {50: 6, 90: 50, 99: 500}  # samples without which a percentile is not given
NOISY = 0.05
STATIONARY = 0.02
WINDOWS = 16


class BenchError(EdgestillError):
    """A model cannot be loaded or run in its worker."""


class NoDevice(BenchError):
    """A model is for a device that is not here."""


# --- statistics


def percentile(sorted_ns: NDArray[Any], q: int) -> dict[str, float] | None:
    """A percentile of sorted samples with its distribution-free 95 % order-statistic interval, in ms.

    None when there are fewer than LEAST[q] samples.
    """
    n = len(sorted_ns)
    if n < LEAST[q]:
        return None
    p = q / 100
    half = 1.96 * math.sqrt(n * p * (1 - p))
    low = max(0, math.floor(n * p - half))
    high = min(n - 1, math.ceil(n * p + half))
    return {
        "ms": float(np.percentile(sorted_ns, q)) / 1e6,
        "low_ms": float(sorted_ns[low]) / 1e6,
        "high_ms": float(sorted_ns[high]) / 1e6,
    }


def summarise(rounds: Sequence[Sequence[int]], batch: int) -> dict[str, Any]:
    """Percentiles (ms per call), throughput (samples per second) and spread of interleaved rounds of nanoseconds.

    The interval of p50 also covers every round's own median, since rounds are the independent repeats. ``spread``
    is (greatest - least) / median of the rounds' medians; above 5 % the measurement is called noisy.
    """
    every = np.sort(np.concatenate([np.asarray(one, dtype=np.int64) for one in rounds]))
    medians = np.array([np.median(one) for one in rounds if len(one)])
    summary: dict[str, Any] = {"batch": batch, "calls": len(every), "rounds": len(medians)}
    for q in LEAST:
        summary[f"p{q}"] = percentile(every, q)
    if summary["p50"] is not None:
        summary["p50"]["low_ms"] = min(summary["p50"]["low_ms"], float(medians.min()) / 1e6)
        summary["p50"]["high_ms"] = max(summary["p50"]["high_ms"], float(medians.max()) / 1e6)
    spread = float((medians.max() - medians.min()) / np.median(medians))
    mean = float(every.mean())
    return summary | {
        "mean_ms": mean / 1e6,
        "cov": float(every.std() / mean),
        "spread": spread,
        "noisy": spread > NOISY,
        "throughput_per_s": batch * 1e9 / mean,
        "missing": [f"p{q} needs {LEAST[q]} calls, there are {len(every)}" for q in LEAST if len(every) < LEAST[q]],
    }


def summarise_paced(ns: Sequence[int], fps: float) -> dict[str, Any]:
    """Latency at ``fps`` calls a second with idle gaps between them; a call longer than 1/fps missed its deadline."""
    every = np.sort(np.asarray(ns, dtype=np.int64))
    missed = int((every > 1e9 / fps).sum())
    return {
        "fps": fps,
        "calls": len(every),
        "p50": percentile(every, 50),
        "p90": percentile(every, 90),
        "missed": missed,
        "missed_share": missed / len(every),
    }


# --- inside the worker


class Subject:
    """A callable model and the real samples it is fed with, in rotation."""

    def __init__(self, call: Call, samples: Split) -> None:
        self.call, self.samples = call, samples
        self._batches: dict[int, list[Feeds]] = {}

    def batches(self, size: int) -> list[Feeds]:
        """Up to WINDOWS different batches of ``size`` samples, contiguous, repeating samples when there are too few."""
        if size not in self._batches:
            count = len(self.samples)
            starts = range(0, max(1, min(count, WINDOWS * size)), size)
            rows = [np.arange(start, start + size) % count for start in starts]
            self._batches[size] = [self.samples.feed(index) for index in rows]
        return self._batches[size]

    def once(self, feeds: Feeds) -> int:
        """Nanoseconds of one call."""
        start = time.perf_counter_ns()
        self.call(feeds)
        return time.perf_counter_ns() - start

    def warm(self, batch: int, ms: float) -> dict[str, Any]:
        """Call for ``ms`` and until the rolling median is stationary, or five times as long."""
        feeds, stationary = self.batches(batch), False
        taken: list[int] = []
        start = time.perf_counter()
        while True:
            taken.append(self.once(feeds[len(taken) % len(feeds)]))
            elapsed = 1000 * (time.perf_counter() - start)
            if elapsed >= ms and len(taken) >= 10:
                window = max(5, len(taken) // 4)
                last, before = np.median(taken[-window:]), np.median(taken[-2 * window : -window])
                stationary = bool(abs(last - before) <= STATIONARY * before)
            if elapsed >= ms and (stationary or elapsed >= 5 * ms):
                return {"ms": elapsed, "calls": len(taken), "stationary": stationary, "first_call_ms": taken[0] / 1e6}

    def time(self, batch: int, seconds: float, settle_ms: float = 0.0, least: int = 2) -> list[int]:
        """Nanoseconds of every call made in ``seconds``, at least ``least``, after ``settle_ms`` that do not count."""
        feeds = self.batches(batch)
        taken: list[int] = []
        gc.collect()
        gc.disable()
        try:
            settled = time.perf_counter() + settle_ms / 1000
            self.once(feeds[0])
            while time.perf_counter() < settled:
                self.once(feeds[0])
            end = time.perf_counter() + seconds
            while time.perf_counter() < end or len(taken) < least:
                taken.append(self.once(feeds[len(taken) % len(feeds)]))
        finally:
            gc.enable()
        return taken

    def pace(self, fps: float, seconds: float) -> list[int]:
        """Nanoseconds from a frame's arrival to its answer, for frames arriving at ``fps``.

        A frame that arrives while the one before it is still being worked on waits, and its waiting counts.
        """
        feeds = self.batches(1)
        taken: list[int] = []
        period = round(1e9 / fps)
        first = time.perf_counter_ns() + period
        for frame in range(max(1, round(fps * seconds))):
            arrival = first + frame * period
            if (wait := arrival - time.perf_counter_ns()) > 0:
                time.sleep(wait / 1e9)
                arrival = time.perf_counter_ns()
            self.call(feeds[frame % len(feeds)])
            taken.append(time.perf_counter_ns() - arrival)
        return taken


def peak_memory_mb() -> float:
    """Peak resident memory of this process. (ru_maxrss would count the parent's before exec.)"""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1000 * 1.024
    import resource

    scale = 1e6 if sys.platform == "darwin" else 1e3 / 1.024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def samples_of(folder: Path, data: Path | None) -> Split:
    """Real inputs: the first 256 of the test split when there is data, else the artifact's own samples.npz."""
    if data is not None:
        return as_fed(load_data(data).splits["test"].select(slice(0, 256)), folder)
    path = folder / "samples.npz"
    if not path.is_file():
        raise BenchError(f"{folder}: no samples.npz to measure with; export it again, or bench the whole run")
    with np.load(path, allow_pickle=False) as file:
        return Split(
            {name: file[name] for name in file.files}, tuple(file.files), mask=artifact.read(folder).extra.get("mask")
        )


def eager(folder: Path, which: str, threads: int) -> Call:
    """A model of ours in eager PyTorch with its deploy adapter: numpy in, numpy out."""
    import torch

    from toolchain.tasks import load_task

    torch.set_num_threads(threads)
    manifest = artifact.verify(folder)
    task = load_task(manifest.config["task"])
    model = (task.load_teacher if which == "teacher" else task.load_student)(folder)
    deploy = task.deploy(model, manifest.config, manifest.extra["info"])
    module = deploy.module.eval()
    inputs, outputs = [port.name for port in deploy.inputs], [port.name for port in deploy.outputs]

    def call(feeds: Feeds) -> dict[str, NDArray[Any]]:
        with torch.inference_mode():
            found = module(*(torch.from_numpy(feeds[name]) for name in inputs))
        if isinstance(found, Mapping):
            found = [found[name] for name in outputs]
        found = found if isinstance(found, (tuple, list)) else [found]
        return {name: value.numpy() for name, value in zip(outputs, found, strict=True)}

    return call


def _load(order: dict[str, Any]) -> Call:
    folder = Path(order["folder"])
    if order["backend"] == "torch":
        return eager(folder, order["which"], order["threads"])
    from toolchain import runtime

    return runtime.load(folder, provider=order["provider"], threads=order["threads"])


def serve(orders: IO[str], answers: IO[str]) -> None:
    """Carry out a JSON order per line, answering with a JSON line each."""
    subject: Subject | None = None
    for line in orders:
        order = json.loads(line)
        try:
            answer: dict[str, Any] = {}
            if order["do"] == "load":
                answer["base_mb"] = peak_memory_mb()
                start = time.perf_counter()
                call = _load(order)
                answer["load_ms"] = 1000 * (time.perf_counter() - start)
                data = Path(order["data"]) if order["data"] else None
                subject = Subject(call, samples_of(Path(order["folder"]), data))
            elif subject is None:
                raise BenchError("nothing is loaded")
            elif order["do"] == "warm":
                answer = subject.warm(order["batch"], order["ms"])
            elif order["do"] == "time":
                answer["ns"] = subject.time(order["batch"], order["seconds"], order["settle_ms"])
            elif order["do"] == "pace":
                answer["ns"] = subject.pace(order["fps"], order["seconds"])
            elif order["do"] == "memory":
                answer["peak_mb"] = peak_memory_mb()
            else:
                split = as_fed(load_data(order["data"]).splits[order["split"]], Path(order["folder"]))
                predict(subject.call, split, order["batch"], Path(order["out"]))
        except Exception as error:  # whatever a runtime raises becomes a reason in the report
            text = str(error) if isinstance(error, EdgestillError) else f"{type(error).__name__}: {error}"
            answer = {"error": text, "no_device": isinstance(error, DeviceMissing)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


# --- outside


@dataclass
class Worker:
    """A model in its own process. Raises BenchError with the reason when it fails or dies."""

    name: str
    folder: Path
    backend: str
    which: str = "student"
    provider: str = "cpu"
    threads: int = 1
    data: Path | None = None
    process: subprocess.Popen[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        command = child.command("benchmarks.latency", "--worker")
        env = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=env
        )

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise BenchError(f"{self.name}: its process died ({self._ending()})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise (NoDevice if answer["no_device"] else BenchError)(answer["error"])
        return answer

    def load(self) -> dict[str, Any]:
        """Load the model; ``load_ms`` is cold: a fresh process, the backend's import and the hash checks included."""
        return self.ask(
            "load",
            folder=str(self.folder),
            backend=self.backend,
            which=self.which,
            provider=self.provider,
            threads=self.threads,
            data=str(self.data) if self.data else None,
        )

    def _ending(self) -> str:
        code = self.process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return f"exit code {code}; {lines[-1][:300]}" if lines else f"exit code {code}"

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._errors.close()


@dataclass
class Measured:
    """What was measured of one worker, by batch size: summaries; by round, raw nanoseconds and ``cores.apart``."""

    latency: dict[str, dict[str, Any]] = field(default_factory=dict)
    raw: dict[str, list[list[int]]] = field(default_factory=dict)
    apart: dict[str, list[bool | None]] = field(default_factory=dict)
    paced: dict[str, Any] | None = None
    paced_raw: list[int] = field(default_factory=list)
    memory_mb: float | None = None
    first_call_ms: float | None = None


def measure(workers: Sequence[Worker], settings: Mapping[str, Any], tick: Callable[[], None]) -> dict[str, Measured]:
    """Latency of loaded workers in interleaved rounds, batch size by batch size, then paced.

    ``settings`` are the config's ``bench`` section. A batch size a model refuses has a ``reason`` in place of numbers.
    ``memory_mb`` is the peak after the smallest batch size. ``tick`` is called ``ticks(...)`` times.
    """
    found = {worker.name: Measured() for worker in workers}
    for position, batch in enumerate(sorted(settings["batches"])):
        _sweep(workers, batch, settings, found, tick)
        if position == 0:
            for worker in workers:
                with contextlib.suppress(BenchError):
                    found[worker.name].memory_mb = worker.ask("memory")["peak_mb"]
    for worker in workers if settings["paced_seconds"] else ():
        fps = settings["paced_fps"]
        try:
            ns = worker.ask("pace", fps=fps, seconds=settings["paced_seconds"])["ns"]
            found[worker.name].paced, found[worker.name].paced_raw = summarise_paced(ns, fps), ns
        except BenchError as error:
            found[worker.name].paced = {"fps": fps, "reason": str(error)}
        tick()
    return found


def ticks(workers: int, settings: Mapping[str, Any]) -> int:
    """How often ``measure`` will tick."""
    return workers * (len(settings["batches"]) * (1 + int(settings["rounds"])) + bool(settings["paced_seconds"]))


def _sweep(
    workers: Sequence[Worker],
    batch: int,
    settings: Mapping[str, Any],
    found: dict[str, Measured],
    tick: Callable[[], None],
) -> None:
    key = str(batch)
    warmed: dict[str, dict[str, Any]] = {}

    def attempt(worker: Worker, do: str, **order: Any) -> dict[str, Any] | None:
        tick()
        if found[worker.name].latency.get(key, {}).get("reason"):
            return None
        try:
            return worker.ask(do, batch=batch, **order)
        except BenchError as error:
            found[worker.name].latency[key] = {"batch": batch, "reason": str(error)}
            return None

    for worker in workers:
        if (answer := attempt(worker, "warm", ms=settings["warmup_ms"])) is not None:
            warmed[worker.name] = answer
            if found[worker.name].first_call_ms is None:
                found[worker.name].first_call_ms = answer.pop("first_call_ms")
    part = {"seconds": settings["seconds"] / settings["rounds"], "settle_ms": settings["warmup_ms"] / 5}
    for _ in range(settings["rounds"]):
        for worker in workers:
            far = cores.apart() if settings["threads"] > 1 else None
            if (answer := attempt(worker, "time", **part)) is not None:
                found[worker.name].raw.setdefault(key, []).append(answer["ns"])
                found[worker.name].apart.setdefault(key, []).append(far)
    for worker in workers:
        mine = found[worker.name]
        if "reason" not in mine.latency.get(key, {}):
            warm = {name: value for name, value in warmed[worker.name].items() if name != "first_call_ms"}
            told = [far for far in mine.apart[key] if far is not None]
            more = {"warmup": warm, "rounds_apart": sum(told) if told else None}
            mine.latency[key] = summarise(mine.raw[key], batch) | more


if __name__ == "__main__":
    if sys.argv[1:] != ["--worker"]:
        raise SystemExit("benchmarks.latency is started by `edgestill bench`")
    private = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    serve(sys.stdin, private)
