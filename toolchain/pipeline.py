"""Runs stages, each in a process of its own, skipping those whose artifact is fresh.

``plan`` turns a config into stages; ``Pipeline.run`` makes what is stale. Killed at any point, the next run goes on
from the last whole artifact, and training from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolchain import artifact, child
from toolchain.artifact import ArtifactError, EdgestillError
from toolchain.config import Config
from toolchain.stage import INTERRUPTED, STOPS, Job, console
from toolchain.tasks import load_task

POLL_S = 0.1  # between looks at processes side by side


class StageError(EdgestillError):
    """A stage failed; the message is the stage's own."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which reached this process or one stage alone; the terminal's Ctrl-C reaches all of them."""


@dataclass(frozen=True)
class Stage:
    """``inputs`` maps roles to names of earlier stages; an ``optional`` stage may fail without ending the run.

    ``packages`` are needed beside those that the module always needs.
    """

    name: str
    module: str
    config: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    optional: bool = False
    packages: tuple[str, ...] = ()


NEEDED = {
    "toolchain.stages": ("torch", "timm", "accelerate", "safetensors"),
    "toolchain.distill": ("torch", "timm", "accelerate", "safetensors"),
    "export.onnx": ("torch", "onnx", "onnxscript", "onnxruntime"),
    "export.precision": ("onnx", "onnxscript", "onnxruntime"),
    "benchmarks.bench": ("onnxruntime",),
    "benchmarks.report": ("jinja2", "matplotlib"),
}
EXTRA = {"onnxruntime": "edgestill[distill,ort]"}


def plan(cfg: Config) -> list[Stage]:
    """The stages of a config, in order."""
    sections = cfg.section
    task = load_task(cfg.task)
    states = {
        key: task.files_state(section) for key in ("data", "teacher", "student") if (section := getattr(cfg, key))
    }

    def config(*keys: str) -> dict[str, Any]:
        found = {key: states[key] for key in keys if states.get(key)}
        return sections(*keys) | ({"files": found} if found else {})

    packages = tuple(getattr(task, "PACKAGES", ()))
    stages = [Stage("data", "toolchain.stages", config("task", "data"), packages=packages)]
    taught = list(task.STAGES) if cfg.teacher is not None else []
    for name in taught:
        inputs = {stage.name: stage.name for stage in stages}
        stages.append(Stage(name, "toolchain.stages", config("seed", "task", "data", "teacher"), inputs))
    inputs = {stage.name: stage.name for stage in stages}
    keys = ("seed", "task", "data", "teacher", "student", "method", "train")
    stages.append(Stage("student", "toolchain.distill", config(*keys), inputs))

    export = sections("export")["export"]
    exact = {key: export[key] for key in ("opset", "parity")}
    if "teacher" in taught and cfg.bench.teacher:
        stages.append(_onnx("onnx-teacher", "teacher", cfg.task, exact))
    stages.append(_onnx("onnx", "student", cfg.task, exact))
    for precision in cfg.export.precisions:
        if precision != "fp32":
            how = {"task": cfg.task, "precision": precision, "export": _without(export, "precisions")}
            inputs = {"onnx": "onnx", "data": "data"}
            stages.append(Stage(f"onnx-{precision}", "export.precision", how, inputs, optional=True))
    if cfg.compile.backend != "none":
        settings = _without(sections("compile")["compile"], "targets", "precisions")
        for target in cfg.compile.targets:
            for precision in cfg.compile.precisions:
                how = {"compile": settings, "targets": [target]}
                source = "onnx" if precision == "fp32" else f"onnx-{precision}"
                name = f"engine-{target}-{precision}"
                stages.append(Stage(name, "export.engine", how, {"onnx": source}, optional=True))
    return stages


def _onnx(name: str, model: str, task: str, export: dict[str, Any]) -> Stage:
    config = {"task": task, "which": model, "export": export}
    return Stage(name, "export.onnx", config, {"model": model, "data": "data"})


def _without(section: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}


def measure(cfg: Config, stages: Sequence[Stage], failed: Mapping[str, str]) -> list[Stage]:
    """The closing stages: ``bench`` over everything made, and ``report``."""
    deployed = [s.name for s in stages if s.name.startswith(("onnx", "engine-")) and s.name not in failed]
    inputs = {name: name for name in ("data", "student", *deployed)}
    bench = {"task": cfg.task, "bench": cfg.section("bench")["bench"], "failed": dict(failed)}
    report = {"name": cfg.name, "task": cfg.task, "report": cfg.section("report")["report"]}
    shown = {stage.name: stage.name for stage in stages if stage.name not in failed}
    return [
        Stage("bench", "benchmarks.bench", bench, inputs),
        Stage("report", "benchmarks.report", report, shown | {"bench": "bench"}),
    ]


def missing_packages(stages: Sequence[Stage]) -> list[str]:
    """What the whole plan needs and this environment lacks, with the command that installs it."""
    needed = dict.fromkeys(p for stage in stages for p in (*NEEDED.get(stage.module, ()), *stage.packages))
    absent = [package for package in needed if importlib.util.find_spec(package) is None]
    return [f"{name} is not installed: pip install '{EXTRA.get(name, 'edgestill[distill]')}'" for name in absent]


@dataclass
class Outcome:
    """What a run did: folders made, folders reused, and optional stages that failed with their reasons."""

    root: Path
    made: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"root": str(self.root), "made": self.made, "reused": self.reused, "failed": self.failed}


class Pipeline:
    """A run folder and the stages that fill it. Raises EdgestillError where one of them would replace its teacher."""

    def __init__(self, cfg: Config, root: Path, stages: Sequence[Stage] | None = None) -> None:
        self.cfg, self.root = cfg, root
        self._spare_teachers()
        self.stages = plan(cfg) if stages is None else list(stages)

    def run(self, last: str | None = None) -> Outcome:
        """Make every stale stage, up to ``last``. Raises StageError; EdgestillError when another run works here."""
        names = [stage.name for stage in self.stages]
        stages = self.stages[: names.index(last) + 1] if last else self.stages
        if faults := missing_packages([*stages, *([] if last else measure(self.cfg, stages, {}))]):
            raise EdgestillError("this pipeline cannot run here:\n" + "\n".join(f"  {fault}" for fault in faults))
        self.root.mkdir(parents=True, exist_ok=True)
        outcome = Outcome(self.root)
        with lock(self.root):
            for left_over in [*self.root.glob(".*.tmp"), *self.root.glob(".*.old")]:
                artifact.remove(left_over)
            artifact.write_json(self.root / "config.json", self.cfg.model_dump(mode="json"))
            for place, stage in enumerate(stages):
                if place == 1 and self._teacher_to_make(stages):
                    self._check_networks()
                self._step(stage, outcome)
            for stage in [] if last else measure(self.cfg, stages, outcome.failed):
                self._step(stage, outcome)
            artifact.remove(self.root / ".work")
        return outcome

    def _spare_teachers(self) -> None:
        """A finished student that teaches is not replaced by its own student."""
        teacher = getattr(self.cfg, "teacher", None)
        named = [getattr(teacher, "folder", None), *getattr(teacher, "ensemble", ())]
        for folder in filter(None, named):
            if Path(folder).resolve().parent == self.root.resolve():
                raise EdgestillError(
                    f"teacher {folder}: expected a folder of another run, found one of {self.root}, which this run "
                    "would replace; choose another --out or another name"
                )

    def _teacher_to_make(self, stages: Sequence[Stage]) -> bool:
        """Whether a stage between the data and the student would be made."""
        names = [stage.name for stage in stages]
        before = stages[1 : names.index("student")] if "student" in names else []
        return any(self.stale(stage) for stage in before)

    def _check_networks(self) -> None:
        """Before a teacher costs time: a network that cannot be built from this config ends the run."""
        command = child.command("toolchain.dryrun", str(self.root / "config.json"), str(self.root / "data"))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            code = process.wait()
        except KeyboardInterrupt as stop:
            _stop([process], isinstance(stop, Terminated))
            raise
        if code in (INTERRUPTED, -signal.SIGINT):
            raise KeyboardInterrupt
        if code:
            raise EdgestillError("the check of the networks failed; nothing was trained")

    def job(self, stage: Stage) -> Job:
        inputs = {role: self.root / name for role, name in stage.inputs.items()}
        return Job(stage.name, self.root / stage.name, stage.config, inputs)

    def stale(self, stage: Stage) -> str | None:
        """Why ``stage`` must be made, or None. Raises ArtifactError where what would be reused is damaged."""
        job = self.job(stage)
        for role, folder in job.inputs.items():
            if not artifact.is_whole(folder):
                return f"{role} is not there"
        with _remedied():
            reason = artifact.stale_reason(job.out, stage=job.stage, config=job.config, inputs=job.inputs)
            if reason is None:
                artifact.verify(job.out)
        return reason

    def _step(self, stage: Stage, outcome: Outcome) -> None:
        lost = [name for name in stage.inputs.values() if name in outcome.failed]
        if lost:
            outcome.failed[stage.name] = f"{lost[0]} failed"
            return
        if (reason := self.stale(stage)) is None:
            console.print(f"[dim]{stage.name:<24} reused[/]")
            outcome.reused.append(stage.name)
            return
        console.print(f"[bold]{stage.name:<24}[/] [dim]{reason}[/]", markup=True)
        try:
            perform(stage.module, self.job(stage))
        except StageError as error:
            if not stage.optional:
                raise
            console.print(f"{stage.name}: {error}", style="yellow", markup=False)
            outcome.failed[stage.name] = str(error)
            return
        outcome.made.append(stage.name)


def perform(module: str, job: Job) -> None:
    """Run one stage in a process, and tell what it wrote. Raises StageError, or KeyboardInterrupt once it saved."""
    for _, error in side_by_side(module, [job], 1):
        if error is not None:
            raise error


def side_by_side(module: str, jobs: Iterable[Job], most: int) -> Iterator[tuple[Job, EdgestillError | None]]:
    """Run stages in a process each, ``most`` at a time; each as it ends, with what went wrong, which stops no other.

    A job is asked for when there is a place for it. Raises KeyboardInterrupt once all that ran have saved.
    """
    waiting, running, terminate = iter(jobs), dict[subprocess.Popen[bytes], _Started](), True
    try:
        while True:
            while len(running) < most and (job := next(waiting, None)) is not None:
                started = _Started(job)
                try:
                    running[_start(module, started, alone=most == 1)] = started
                except EdgestillError as error:
                    yield job, error
            if not running:
                return
            process = _first(list(running))
            started = running.pop(process)
            try:
                _finish(started, process.returncode)
            except EdgestillError as error:
                yield started.job, error
            else:
                yield started.job, None
    except KeyboardInterrupt as stop:
        terminate = isinstance(stop, Terminated)
        raise
    finally:
        _stop(list(running), terminate)


@contextlib.contextmanager
def _remedied() -> Iterator[None]:
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"{error}; or remove that folder, and run the same command again") from error


class _Started:
    """A stage whose process runs, and its files."""

    def __init__(self, job: Job) -> None:
        self.job, self.since = job, time.perf_counter()
        self.path = job.work.with_name(f"{job.out.name}.job.json")
        self.error_path = self.path.with_suffix(".error")


def _start(module: str, started: _Started, alone: bool) -> subprocess.Popen[bytes]:
    """The process of a stage; one that is not ``alone`` draws no live progress, as two would overwrite each other."""
    job, environment = started.job, _environment(module)
    artifact.check_place(job.out, job.stage)
    if not alone:
        environment["TTY_COMPATIBLE"] = "0"
    job.work.mkdir(parents=True, exist_ok=True)
    started.path.write_text(job.to_json(), encoding="utf-8")
    started.error_path.unlink(missing_ok=True)
    return subprocess.Popen(_command(module, job, started.path), env=environment, preexec_fn=_as_stage)


def _finish(started: _Started, code: int) -> None:
    job = started.job
    if code == INTERRUPTED or code == -signal.SIGINT:
        raise Terminated
    if code != 0:
        raise StageError(_reason(job, code, started.error_path))
    if not artifact.is_whole(job.out):
        raise StageError(f"{job.stage}: ended without writing {job.out}")
    artifact.remove(job.work)
    started.path.unlink()
    with contextlib.suppress(OSError):
        job.work.parent.rmdir()
    size = sum(entry["bytes"] for entry in artifact.read(job.out).files.values())
    took = time.perf_counter() - started.since
    console.print(f"    {job.out}  {human_bytes(size)}  {took:.1f} s", style="green", markup=False)


def _environment(module: str) -> dict[str, str]:
    """Training threads sleep while they wait: spinning made a step 10 times slower when another process had a core.

    Measurements keep the libraries' own defaults.
    """
    environment = dict(os.environ)
    if module.startswith("toolchain."):
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return environment


def _command(module: str, job: Job, path: Path) -> list[str]:
    """The stage's process; a training with ``train.processes`` above 1 is started through accelerate."""
    processes = job.config.get("train", {}).get("processes", 1)
    if processes == 1:
        return child.command(module, str(path))
    launch = child.command("accelerate.commands.launch", "--num_processes", str(processes))
    settings = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*launch, *settings, *_devices(processes), child.__file__, module, str(path)]


def _devices(processes: int) -> list[str]:
    import torch

    count = torch.cuda.device_count()
    if count and count < processes:
        raise EdgestillError(f"train.processes: expected at most the {count} GPUs of this machine, found {processes}")
    return ["--multi_gpu"] if count else ["--cpu"]


def _first(running: Sequence[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """The first that ends."""
    if len(running) == 1:
        running[0].wait()
    while True:
        for process in running:
            if process.poll() is not None:
                return process
        time.sleep(POLL_S)


def _stop(running: Sequence[subprocess.Popen[bytes]], terminate: bool) -> None:
    """Let them save. A terminal's Ctrl-C reaches all by itself; ``terminate`` asks them to stop."""
    for process in running:
        if terminate:
            process.terminate()
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(timeout=30)
        if process.poll() is None:
            process.kill()
            process.wait()


def _reason(job: Job, code: int, error_path: Path) -> str:
    if error_path.is_file():
        return str(json.loads(error_path.read_text(encoding="utf-8"))["message"])
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the machine may have run out of memory" if -code == signal.SIGKILL else ""
        return f"{job.stage}: killed by {name}{hint}; run the same command again to go on"
    return f"{job.stage}: ended with exit code {code}"


def _as_stage() -> None:
    """Interrupts wait until ``stage.main``; on Linux a stage dies with a pipeline that is killed (PR_SET_PDEATHSIG)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@contextlib.contextmanager
def lock(root: Path, patience_s: float = 5.0) -> Iterator[None]:
    """Only one pipeline works in a folder. Raises EdgestillError."""
    with (root / ".lock").open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise EdgestillError(
                        f"{root}: process {file.read() or '?'} is running here; wait for it, or choose another --out"
                    ) from None
                time.sleep(0.1)
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextlib.contextmanager
def resumable(command: Sequence[str]) -> Iterator[None]:
    """On Ctrl-C or SIGTERM, say how to go on."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    previous: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"interrupted; nothing finished is lost. Go on with:\n  {shlex.join(command)}", markup=False)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def human_bytes(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
