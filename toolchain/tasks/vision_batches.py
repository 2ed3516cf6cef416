"""Training batches of image tasks, with the teacher's cached features of the very view each image is shown in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toolchain.artifact import EdgestillError
from toolchain.batches import Batches
from toolchain.tasks.vision import Views, apply_view, apply_view_mask
from toolchain.tasks.vision_nets import Normalise

if TYPE_CHECKING:
    from toolchain.train import Run

Array = NDArray[Any]
IN_MEMORY_BYTES = 1 << 30  # all views of the images are made at once up to this size, per batch above
FIELDS = ("tokens", "pooled", "teacher_logits")
EVALUATION_BATCH = 256


class Table:
    """Rows of an array (V, N, ...) by (view, index), as tensors on a device; kept there while it has room."""

    def __init__(self, array: Array, device: torch.device) -> None:
        self.count, self.device = array.shape[1], device
        flat = array.reshape(-1, *array.shape[2:])
        self.array, self.resident = flat, None
        if device.type == "cuda" and flat.nbytes < torch.cuda.mem_get_info(device)[0] // 4:
            self.resident = torch.from_numpy(np.array(flat)).to(device)

    def __call__(self, view: NDArray[np.int64], index: NDArray[np.int64]) -> Tensor:
        rows = view * self.count + index
        if self.resident is not None:
            return self.resident[torch.from_numpy(rows).to(self.device, non_blocking=True)]
        return torch.from_numpy(np.take(self.array, rows, axis=0)).to(self.device)


Lookup = Callable[[NDArray[np.int64], NDArray[np.int64]], Tensor]


def viewed(array: Array, views: Views, device: torch.device, ignore_index: int | None = None) -> Lookup:
    """Images (N, H, W, C), or masks (N, H, W), by (view, index)."""

    def transform(part: Array, view: int) -> Array:
        if part.ndim == 4:
            return apply_view(part, view, views)
        return apply_view_mask(part, view, views, -100 if ignore_index is None else ignore_index)

    if views.count * array.nbytes <= IN_MEMORY_BYTES:
        whole = np.ascontiguousarray(array)
        return Table(np.stack([transform(whole, view) for view in range(views.count)]), device)

    def lookup(view: NDArray[np.int64], index: NDArray[np.int64]) -> Tensor:
        out = np.array(array[index])
        for number in np.unique(view):
            out[view == number] = transform(out[view == number], int(number))
        return torch.from_numpy(out).to(device)

    return lookup


def _probed(probe: nn.Module, table: Table) -> Lookup:
    return lambda view, index: probe(table(view, index).float())


class VisionBatches(Batches):
    """Batches of ``image`` float32 (B, C, H, W) normalised, ``label`` int64 (B,) or (B, H, W), ``index``, ``view``.

    With ``wanted``: ``tokens`` float32 (B, L, C), ``pooled`` (B, D), ``teacher_logits`` (B, classes, ...) of the same
    view. Tokens lie on ``grid`` (h, w); their ``channels`` C are those of the taps, ``tap_channels``, one after the
    other. Each epoch draws a view for every sample.
    """

    def __init__(self, run: Run, wanted: tuple[str, ...]) -> None:
        train, info, self.device = run.data.splits["train"], run.data.info, run.device
        super().__init__(len(train), run.cfg.train.batch_size, self.gather, seed=run.cfg.seed)
        self.views: Views = run.cfg.data.views
        self.normalise = Normalise(info).to(self.device)
        self.val = run.data.splits["val"]
        self.images = viewed(train.arrays["image"], self.views, self.device)
        self.labels = self._labels(train.arrays["label"], info.get("ignore_index"))
        self.extra: dict[str, Lookup] = {}
        self.val_tokens: Array | None = None
        self.grid, self.channels = (1, 1), 0
        self.tap_channels: tuple[int, ...] = ()
        self._drawn: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))
        if wanted:
            self._teach(run, wanted)

    def _labels(self, labels: Array, ignore_index: int | None) -> Lookup:
        if labels.ndim > 1:
            return viewed(labels.astype(np.int16), self.views, self.device, ignore_index)
        table = Table(np.array(labels)[None], self.device)
        return lambda view, index: table(np.zeros_like(view), index)

    def _teach(self, run: Run, wanted: tuple[str, ...]) -> None:
        from toolchain.tasks.teacher import load_features, load_probe

        if unknown := [name for name in wanted if name not in FIELDS]:
            raise EdgestillError(f"batches: expected some of {', '.join(FIELDS)}, found {unknown}")
        if "features" not in run.inputs:
            raise EdgestillError(
                f"method {run.cfg.method.name} learns from a teacher; add a teacher section to the config"
            )
        sections = run.cfg.section("data", "teacher")
        features = load_features(run.inputs["features"], data_folder=run.inputs["data"], config=sections)
        self.grid, self.channels, self.val_tokens = features.grid, features.taps.shape[-1], features.val_taps[0]
        self.tap_channels = features.tap_channels
        tables: dict[str, Array | None] = {"tokens": features.taps, "pooled": features.pooled}
        for name in wanted:
            if name == "teacher_logits":
                source = features.taps if features.pooled is None else features.pooled
                self.extra[name] = _probed(
                    load_probe(run.inputs["teacher"]).to(self.device), Table(source, self.device)
                )
                continue
            if (array := tables[name]) is None:
                raise EdgestillError(f"{run.cfg.task}: teacher features have no {name!r}; use the tokens")
            self.extra[name] = Table(array, self.device)

    def view_of(self, epoch: int) -> NDArray[np.int64]:
        """The view in which each sample is shown in ``epoch``."""
        if self._drawn[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch, 1))
            self._drawn = (epoch, rng.integers(self.views.count, size=self.count))
        return self._drawn[1]

    def gather(self, index: NDArray[np.int64], epoch: int) -> dict[str, Tensor]:
        view = self.view_of(epoch)[index]
        batch = {"image": self.normalise(self.images(view, index)), "label": self.labels(view, index).long()}
        batch |= {"index": torch.from_numpy(index), "view": torch.from_numpy(view)}
        return batch | {name: table(view, index).float() for name, table in self.extra.items()}

    def held_out(self) -> Iterator[Mapping[str, Tensor]]:
        """The validation split in order, in its identity view: ``image``, ``label`` and ``tokens``."""
        for start in range(0, len(self.val), EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            names = {"image": self.val.arrays["image"], "label": self.val.arrays["label"]}
            arrays = names | ({} if self.val_tokens is None else {"tokens": self.val_tokens})
            found = {name: torch.from_numpy(np.array(array[part])).to(self.device) for name, array in arrays.items()}
            yield found | {
                "image": self.normalise(found["image"]),
                "label": found["label"].long(),
                **({"tokens": found["tokens"].float()} if "tokens" in found else {}),
            }


def batches(run: Run, *wanted: str) -> VisionBatches:
    """The training batches of ``run``, with the teacher's ``wanted`` among tokens, pooled, teacher_logits."""
    return VisionBatches(run, wanted)


def scorer(run: Run, name: str = "val") -> Callable[[nn.Module], dict[str, float]]:
    """A function that scores a module (normalised images to logits) on a split with the task's metrics."""
    split, device = run.data.splits[name], run.device
    normalise = Normalise(run.data.info).to(device)

    @torch.inference_mode()
    def score(module: nn.Module) -> dict[str, float]:
        module.eval()
        labels, probabilities = [], []
        for start in range(0, len(split), EVALUATION_BATCH):
            image = torch.from_numpy(np.array(split.arrays["image"][start : start + EVALUATION_BATCH])).to(device)
            logits = module(normalise(image)).float()
            labels.append(logits.argmax(1).cpu().numpy())
            if logits.ndim == 2:
                probabilities.append(logits.softmax(1).cpu().numpy())
        outputs = {"label": np.concatenate(labels)}
        if probabilities:
            outputs["probabilities"] = np.concatenate(probabilities)
        scores: dict[str, float] = run.task.score(outputs, split)
        return scores

    return score
