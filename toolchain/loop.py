"""One training, from wherever it stopped to its last epoch: ``train.Run.stage`` is how a method asks for one.

Everything random is derived from (seed, stage, epoch) or kept in the checkpoint, so on a CPU with a fixed number of
threads a resumed training gives the same weights to the bit. Of the random generators, torch's are kept.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from toolchain import artifact, checkpoint
from toolchain.batches import Batches, TrainingError
from toolchain.config import TrainSection
from toolchain.distiller import Distiller, frozen_parts
from toolchain.stage import Bar, progress

if TYPE_CHECKING:
    from toolchain.train import Run

Score = Callable[[nn.Module], Mapping[str, float]]
Moments = dict[str, float]
SAVING = 20  # a checkpoint's time is waited for as often before the next, so that saving takes 5 % of a training
POINTS = 60  # of a training's curves: where epochs are fewer, means of parts of each are logged in its line
DRAIN_STEPS = 32  # on an accelerator, steps between two looks at the losses: a look waits for the device


def lr_factor(recipe: TrainSection, step: int, total: int) -> float:
    """Learning rate of ``step`` (of ``total``) as a share of the peak.

    ``one_cycle`` rises by a cosine from 1/25 during ``warmup`` and falls by a cosine to 4e-6 (Smith and Topin,
    arXiv 1708.07120, with torch's constants); the others rise linearly, then ``cosine`` and ``linear`` fall to 0.
    """
    if recipe.schedule == "one_cycle":
        top = recipe.warmup * total - 1
        if step < top:
            return _cosine(1 / 25, 1.0, step / top)
        return _cosine(1.0, 4e-6, (step - max(top, 0)) / max(total - 1 - max(top, 0), 1))
    rise = recipe.warmup * total
    if step < rise:
        return (step + 1) / (math.floor(rise) + 1)
    fall = (step - rise) / max(total - rise, 1)
    return {"constant": 1.0, "linear": 1 - fall, "cosine": _cosine(1.0, 0.0, fall)}[recipe.schedule]


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


@contextmanager
def _interrupts_deferred() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, so that a step is never cut in two; a second Ctrl-C interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    kept = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


class Training:
    """One training: its position, its means, its best epoch, and how they are saved and restored."""

    def __init__(
        self,
        run: Run,
        name: str,
        key: str,
        distiller: Distiller,
        batches: Batches,
        recipe: TrainSection,
        score: Score | None,
        watch: Mapping[str, Score],
    ) -> None:
        self.run, self.name, self.key, self.recipe, self.score, self.watch = run, name, key, recipe, score, watch
        self.batches = batches
        self.folder = run.work / name
        self.metrics = self.folder / "train.jsonl"
        self.micro = min(recipe.accumulate, len(batches))
        self.steps = math.ceil(len(batches) / self.micro)
        self.total = self.steps * recipe.epochs
        self.epoch = self.step = self.lines = 0  # step counts optimiser steps over all epochs
        self.parts = min(self.steps, max(1, POINTS // recipe.epochs))
        self.course: dict[str, Moments] = {}  # the epoch's sums, by the last step of each of its parts
        self.seconds = 0.0
        self.best: dict[str, Any] = {}
        self.watched: dict[str, dict[str, Any]] = {}
        self.best_tensors: dict[str, Tensor] = {}
        self.pending: list[tuple[int, dict[str, Tensor]]] = []
        self.saved: Path | None = None

        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision="bf16" if recipe.precision == "bf16" else "no",
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.device = self.accelerator.device
        self.distiller = distiller.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups = distiller.param_groups(recipe.lr)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        if not self.parameters:
            raise TrainingError(f"stage {name}: no parameter requires a gradient, so there is nothing to train")
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in self.parameters)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.model, self.stepper = self.accelerator.prepare(self.distiller, self.optimizer)

    def fit(self, out: Path) -> None:
        """Train to the last epoch and write the stage's artifact."""
        self._resume()
        self.started = self.checked = time.monotonic()
        self.patience = self.recipe.checkpoint_seconds
        bar_of = _silent if self.run.quiet or not self.accelerator.is_main_process else progress
        with _interrupts_deferred() as asked, bar_of(self.name, self.total) as bar:
            bar.advance(self.step)
            while self.epoch < self.recipe.epochs:
                self._train_epoch(asked, bar)
                self._end_epoch(bar)
                self._save_if_due(asked)
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.recipe.select == "best":
            self.distiller.load_state_dict(self.best_tensors)
        self.distiller.eval().to(memory_format=torch.contiguous_format)
        if self.accelerator.is_main_process:
            self._write(out)
        self.accelerator.wait_for_everyone()

    def _train_epoch(self, asked: threading.Event, bar: Bar) -> None:
        self.distiller.train()
        at = self.step - self.epoch * self.steps
        if at == 0:
            self.distiller.on_epoch_start(self.epoch)
        stream = self.batches.epoch(self.epoch, at * self.micro)
        every = 1 if self.device.type == "cpu" else DRAIN_STEPS
        for number in range(at, self.steps):
            self._step(stream, min(self.micro, len(self.batches) - number * self.micro))
            bar.advance()
            last = number + 1 == self.steps
            if last or self.step % every == 0:
                self._drain(bar)
                if not last:
                    self._save_if_due(asked)

    def _step(self, stream: Iterator[Mapping[str, Tensor]], micro: int) -> None:
        self.distiller.progress = self.step / self.total
        factor = lr_factor(self.recipe, self.step, self.total)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        for part in range(micro):
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in next(stream).items()}
            with nullcontext() if part + 1 == micro else self.accelerator.no_sync(self.model):
                scalars = self.model(batch)
                self.accelerator.backward(scalars["loss"] / micro if micro > 1 else scalars["loss"])
            self.pending.append((self.step, {name: value.detach() for name, value in scalars.items()}))
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.recipe.clip or math.inf)
        self.pending[-1][1]["grad_norm"] = norm.detach()
        self.stepper.step()
        self.stepper.zero_grad()
        self.step += 1

    def _drain(self, bar: Bar) -> None:
        """Fetch the scalars of the steps since the last look, refuse what is not finite, add to the epoch's means."""
        flat = [value.float() for _, scalars in self.pending for value in scalars.values()]
        values = iter(torch.stack(flat).tolist())
        for step, scalars in self.pending:
            sums = self.course.setdefault(str(self._part_end(step)), {})
            for name in scalars:
                value = next(values)
                if not math.isfinite(value):
                    self._refuse(step, name, value)
                sums[name] = sums.get(name, 0.0) + value
                sums[f"{name} count"] = sums.get(f"{name} count", 0.0) + 1
        self.pending.clear()
        means = _means(*self.course.values())
        shown = " ".join(f"{name} {means[name]:.3g}" for name in ("loss", "accuracy", "agreement") if name in means)
        score = f" val {next(iter(self.best['val'].values())):.4g}" if self.best.get("val") else ""
        bar.update(f"{self.name}: epoch {self.epoch + 1}/{self.recipe.epochs} {shown}{score}")

    def _part_end(self, step: int) -> int:
        """How many steps are done when the part of the epoch that ``step`` is in ends."""
        part = (step - self.epoch * self.steps) * self.parts // self.steps
        return self.epoch * self.steps - (-(part + 1) * self.steps // self.parts)

    def _refuse(self, step: int, what: str, value: float) -> None:
        kept = f"the last good checkpoint is kept: {self.saved}" if self.saved else "no checkpoint was due before that"
        raise TrainingError(
            f"stage {self.name}, epoch {step // self.steps + 1}, step {step + 1}: expected {what} to be finite, found "
            f"{value}; {kept}. Lower train.lr (now {self.recipe.lr:g}) or the method's weights, or set train.clip"
        )

    def _logged(self, *sums: Moments) -> dict[str, float]:
        means = _means(*sums)
        if self.accelerator.num_processes > 1:
            reduced = self.accelerator.reduce(torch.tensor(list(means.values()), device=self.device), "mean").tolist()
            means = dict(zip(means, reduced, strict=True))
        return means

    def _end_epoch(self, bar: Bar) -> None:
        spent = self._elapsed()
        due = (self.epoch + 1) % self.recipe.score_every == 0 or self.epoch + 1 == self.recipe.epochs
        val = self._scores("validation", self.score) if due and self.score is not None else {}
        watched = {name: self._scores(name, score) for name, score in self.watch.items()} if due else {}
        line = {"stage": self.name, "epoch": self.epoch + 1, "step": self.step}
        line |= {
            "lr": self.optimizer.param_groups[0]["lr"],
            **self._logged(*self.course.values()),
            "val": val,
            **watched,
        }
        line["seconds"] = round(spent, 3)
        samples = len(self.batches) * self.batches.batch_size
        line["samples_per_second"] = round(samples / max(spent, 1e-9), 1)
        if self.parts > 1:
            line["course"] = [{"step": int(step)} | self._logged(sums) for step, sums in self.course.items()]
        self._consider(val)
        for name, scores in watched.items():
            if self._better(scores, self.watched.get(name, {}).get("scores", {})):
                self.watched[name] = {"epoch": self.epoch + 1, "scores": scores}
        self.epoch, self.course, self.seconds, self.lines = self.epoch + 1, {}, 0.0, self.lines + 1
        self.started = time.monotonic()
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")

    def _scores(self, what: str, score: Score) -> dict[str, float]:
        found = {name: float(value) for name, value in score(self.distiller.student).items()}
        for name, value in found.items():
            if not math.isfinite(value):
                self._refuse(self.step - 1, f"{what} score {name}", value)
        return found

    def _better(self, found: Mapping[str, float], old: Mapping[str, float]) -> bool:
        """Whether the first value of ``found`` beats that of ``old``."""
        if not found or not old:
            return bool(found) or not old
        sign = 1 if self.run.task.HIGHER_IS_BETTER else -1
        return sign * next(iter(found.values())) > sign * next(iter(old.values()))

    def _consider(self, val: dict[str, float]) -> None:
        if self.recipe.select == "last" or self._better(val, self.best.get("val", {})):
            self.best = {"epoch": self.epoch + 1, "val": val}
            if self.recipe.select == "best":
                self.best_tensors = {
                    name: value.detach().clone() for name, value in self.distiller.state_dict().items()
                }

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def _save_if_due(self, asked: threading.Event) -> None:
        stop, due = asked.is_set(), time.monotonic() - self.checked >= self.patience
        if self.accelerator.num_processes > 1:
            told = [stop, due]
            broadcast_object_list(told)
            stop, due = told
        if due or stop:
            self._save()
        if stop:
            self.run.say(f"stage {self.name}: stopped at step {self.step} of {self.total}; saved {self.saved}")
            raise KeyboardInterrupt

    def _save(self) -> None:
        began = time.monotonic()
        tensors = {f"model.{name}": value for name, value in self.distiller.state_dict().items()}
        for place, frozen in frozen_parts(self.distiller).items():
            if frozen.refreshed:
                tensors |= {f"frozen.{place}.{name}": value for name, value in frozen.module.state_dict().items()}
        for index, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{index}.{name}"] = value
        tensors |= {f"best.{name}": value for name, value in self.best_tensors.items()}
        tensors |= {f"rng.{name}": self._gathered(value) for name, value in checkpoint.rng_states(self.device).items()}
        state = {"key": self.key, "epoch": self.epoch, "step": self.step, "lines": self.lines}
        state |= {"course": self.course, "seconds": self._elapsed(), "best": self.best, "watched": self.watched}
        if self.accelerator.is_main_process:
            self.saved = checkpoint.save(self.folder, self.step, tensors, state)
        self.checked = time.monotonic()
        asked = self.recipe.checkpoint_seconds
        self.patience = max(asked, min(SAVING * (self.checked - began), 10 * asked))

    def _gathered(self, value: Tensor) -> Tensor:
        gathered: Tensor = self.accelerator.gather(value.to(self.device)[None])
        return gathered.cpu()

    def _resume(self) -> None:
        found: checkpoint.Checkpoint | None = None
        for entry in checkpoint.read(self.folder):
            if isinstance(entry, str):
                self.run.say(f"stage {self.name}: checkpoint {entry}; trying the one before it")
            elif entry.state.get("key") != self.key:
                self.run.say(f"stage {self.name}: checkpoint {entry.path} is of another config or start; not used")
            else:
                found = entry
                break
        if found is None:
            if self.accelerator.is_main_process:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            return
        self._restore(found)
        self.run.say(f"stage {self.name}: resumed at step {self.step} of {self.total} from {found.path.name}")

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        tensors, state = found.tensors, found.state
        self.saved = found.path
        self.distiller.load_state_dict(checkpoint.under(tensors, "model."))
        for place, frozen in frozen_parts(self.distiller).items():
            if weights := checkpoint.under(tensors, f"frozen.{place}."):
                frozen.module.load_state_dict(weights)
                frozen.refreshed = True
        for index, parameter in enumerate(self.parameters):
            for name, value in checkpoint.under(tensors, f"optimizer.{index}.").items():
                like = (
                    torch.empty_like(parameter) if value.ndim else torch.empty_like(value, device=self._step_device())
                )
                self.optimizer.state[parameter][name] = like.copy_(value)
        self.best_tensors = {name: value.to(self.device) for name, value in checkpoint.under(tensors, "best.").items()}
        self.epoch, self.step, self.lines = state["epoch"], state["step"], state["lines"]
        self.course, self.seconds, self.best = state["course"], state["seconds"], state["best"]
        self.watched = state["watched"]
        rank = self.accelerator.process_index
        checkpoint.set_rng_states(
            {name: value[rank].clone() for name, value in checkpoint.under(tensors, "rng.").items()}
        )
        if self.accelerator.is_main_process:
            kept = self.metrics.read_bytes().splitlines(keepends=True)[: self.lines] if self.lines else []
            temporary = self.metrics.with_suffix(".tmp")
            temporary.write_bytes(b"".join(kept))
            temporary.replace(self.metrics)

    def _step_device(self) -> torch.device:
        return self.device if self.optimizer.defaults["fused"] else torch.device("cpu")

    def _write(self, out: Path) -> None:
        with artifact.create(out, stage=self.name, config={"key": self.key}) as draft:
            checkpoint.save_tensors(draft.path / "model.safetensors", self.distiller.state_dict())
            shutil.copyfile(self.metrics, draft.path / "train.jsonl")
            draft.metrics = {"val": self.best.get("val", {})}
            draft.versions = artifact.versions("torch", "accelerate")
            draft.extra = {
                "name": self.name,
                "epochs": self.recipe.epochs,
                "best_epoch": self.best.get("epoch"),
                "val": self.best.get("val", {}),
                "watched": self.watched,
                "steps": self.total,
            }


def _means(*parts: Moments) -> dict[str, float]:
    """Of the sums and counts in ``parts`` together."""
    sums: Moments = {}
    for part in parts:
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: value / sums[f"{name} count"] for name, value in sums.items() if not name.endswith(" count")}


@contextmanager
def _silent(name: str, total: int) -> Iterator[Bar]:
    yield Bar(None, name, 0)
