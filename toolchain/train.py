"""What a method trains with: ``Run.stage`` trains a Distiller to the end, or goes on where a killed run stopped.

The only training loop is in ``loop``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from toolchain import artifact, checkpoint
from toolchain.artifact import EdgestillError
from toolchain.batches import Batches, TrainingError
from toolchain.config import Config, TrainSection
from toolchain.distiller import Distiller, fingerprint
from toolchain.doctor import SLOW, bf16_cost
from toolchain.loop import Score, Training
from toolchain.stage import console
from toolchain.tasks import Data, digits_of, load_task
from toolchain.tasks.nets import count_parameters

SECTIONS = ("seed", "task", "data", "teacher", "student", "method")  # that a stage depends on


@dataclass
class Run:
    """What a method's ``distill(cfg, run)`` works with; usable without a pipeline.

    ``inputs`` maps roles (``data``, ``features``, ``teacher``) to artifacts; under ``work`` lie checkpoints and
    finished stages. ``records`` gets one summary per stage, ``folders`` its artifact, ``steps`` what ``step`` was told.
    In ``shared``, where there is such a folder, lie stages that other runs may take over.
    """

    cfg: Config
    data: Data
    inputs: dict[str, Path]
    work: Path
    quiet: bool = False
    task: Any = None
    records: list[dict[str, Any]] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    shared: Path | None = None

    def __post_init__(self) -> None:
        self.task = self.task or load_task(self.cfg.task)
        if self.cfg.train.threads:
            torch.set_num_threads(self.cfg.train.threads)
        if self.cfg.train.precision == "bf16" and self.device.type == "cpu" and (cost := bf16_cost()) > SLOW:
            self.say(f"bf16 takes {cost:.0f} times as long as fp32 on this CPU; train.precision=fp32 is faster here")
        self.seed("start")

    @property
    def device(self) -> torch.device:
        return torch.device(PartialState().device)

    def student(self) -> nn.Module:
        """A fresh student, the same for the same config."""
        module: nn.Module = self.task.student(self.cfg.section("seed", "task", "data", "student"), self.data.info)
        return module

    def batches(self, *wanted: str) -> Any:
        """The task's training batches, with what is ``wanted`` of the teacher's (for images ``tokens``, ...)."""
        return self.task.batches(self, *wanted)

    def scorer(self, split: str = "val") -> Score:
        """The task's score of a module on a split."""
        score: Score = self.task.scorer(self, split)
        return score

    def seed(self, *names: str) -> None:
        """Seed torch from the config's seed and ``names``, differently in every process."""
        key = artifact.digest([self.cfg.seed, *names, PartialState().process_index])
        torch.manual_seed(int(key[:15], 16))

    @contextmanager
    def seeded(self, *names: str) -> Iterator[None]:
        """Draw new weights inside from (seed, names), and leave torch's generator as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(artifact.digest([self.cfg.seed, *names])[:15], 16))
            yield

    def say(self, text: str) -> None:
        if not self.quiet and PartialState().is_main_process:
            console.print(f"    {text}", markup=False)

    def step(self, what: str, module: nn.Module, val: Mapping[str, float] | None = None) -> None:
        """Note, for the report's ledger, what a method made of the teacher; ``val`` where it has been scored."""
        if val is None:
            val = {name: float(value) for name, value in self.scorer()(module.to(self.device)).items()}
        parameters = count_parameters(module)
        self.steps.append({"what": what, "parameters": parameters, "val": val})
        headline, value = next(iter(val.items()))
        self.say(f"{what}: {parameters:,} parameters, validation {headline} {value:.{digits_of(self.task)}f}")

    def stage(
        self,
        name: str,
        distiller: Distiller,
        batches: Batches,
        recipe: TrainSection,
        score: Score | None = None,
        watch: Mapping[str, Score] | None = None,
        *,
        sections: Sequence[str] = SECTIONS,
    ) -> nn.Module:
        """Train ``distiller`` and return its student; a stage that an earlier run finished is loaded instead.

        ``sections`` of the config decide, with recipe, inputs and weights, whether it is the same stage; runs with the
        same ``shared`` folder share a stage that leaves some out. The whole distiller ends with the trained weights.
        The first value of ``score`` selects the best epoch when the recipe asks for it. Scores to ``watch`` select
        nothing: each is logged, and the record's ``watched`` holds the values of the epoch that is best by its own
        first one. Raises TrainingError when loss or gradient are not finite.
        """
        if recipe.select == "best" and score is None:
            raise TrainingError(f"stage {name}: train.select=best needs a score to select by; use last")
        inputs = {role: artifact.read(folder).id for role, folder in sorted(self.inputs.items())}
        kept = recipe.model_dump(mode="json", exclude={"checkpoint_seconds"})
        key = artifact.digest([name, self.cfg.section(*sections), kept, inputs, fingerprint(distiller)])
        folder = self.work / "stages" / name
        if self.shared is not None and sections != SECTIONS:
            folder = self.shared / f"{name}-{key[:16]}"
        if not self._load(folder, key, distiller):
            self.seed(name)
            Training(self, name, key, distiller, batches, recipe, score, watch or {}).fit(folder)
        shutil.rmtree(self.work / name, ignore_errors=True)
        self.records.append(artifact.read(folder).extra)
        self.folders.append(folder)
        self.seed(name, "done")
        return distiller.student

    def _load(self, folder: Path, key: str, distiller: Distiller) -> bool:
        if not artifact.is_whole(folder):
            return False
        try:
            if artifact.verify(folder).config != {"key": key}:
                self.say(f"stage {folder.name}: an earlier result is of another config or start; training anew")
                return False
            distiller.load_state_dict(checkpoint.load_tensors(folder / "model.safetensors"))
            distiller.to(self.device).eval()
        except EdgestillError as error:
            self.say(f"stage {folder.name}: the earlier result cannot be used, training anew: {error}")
            return False
        self.say(f"stage {folder.name}: already complete, reused")
        return True


def read_metrics(run: Run) -> str:
    """The JSON Lines of all finished stages of ``run``, in order."""
    return "".join((folder / "train.jsonl").read_text(encoding="utf-8") for folder in run.folders)
