"""Training batches of windows, grouped by length so that little is padding, and the score of a network on a split."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toolchain.artifact import EdgestillError
from toolchain.batches import Batches
from toolchain.tasks import FILL

if TYPE_CHECKING:
    from toolchain.train import Run

POOL = 4  # batches' worth of shuffled samples that are sorted by length together
EVALUATION_TOKENS = 8192  # tokens of a batch when scoring, padding included


class SpanBatches(Batches):
    """Batches of ``input_ids`` and ``attention_mask`` int64 (B, S), S the longest of the batch, ``label`` int64 (B, 2),
    start and end, and ``index`` (B,) of the windows of ``splits`` one after the other. ``fetched_epoch`` is the last
    batch's."""

    fetched_epoch = -1

    def __init__(self, run: Run, splits: tuple[str, ...], batch_size: int) -> None:
        if missing := [name for name in splits if name not in run.data.splits]:
            raise EdgestillError(f"the data has no split {missing[0]!r}; it has {', '.join(run.data.splits)}")
        chosen = [run.data.splits[name].arrays for name in splits]
        self.width = max(arrays["input_ids"].shape[1] for arrays in chosen)
        self.ids = np.concatenate([_wide(arrays["input_ids"], self.width, run.data.info["pad"]) for arrays in chosen])
        self.mask = np.concatenate([_wide(arrays["attention_mask"], self.width, 0) for arrays in chosen])
        self.label = np.concatenate([np.stack([arrays["start"], arrays["end"]], 1) for arrays in chosen])
        self.length = self.mask.sum(1)
        super().__init__(len(self.ids), batch_size, self.gather, seed=run.cfg.seed)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Shuffled; then every POOL batches' worth is sorted by length and the batches are shuffled again."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.count)[: len(self) * self.batch_size]
        pool = POOL * self.batch_size
        parts = [order[at : at + pool] for at in range(0, len(order), pool)]
        order = np.concatenate([part[np.argsort(self.length[part], kind="stable")] for part in parts])
        return rng.permutation(order.reshape(-1, self.batch_size)).ravel()

    def gather(self, index: NDArray[np.int64], epoch: int) -> dict[str, Tensor]:
        self.fetched_epoch, longest = epoch, int(self.length[index].max())
        found = {"input_ids": self.ids[index, :longest], "attention_mask": self.mask[index, :longest]}
        found |= {"label": self.label[index], "index": index}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in found.items()}


def _wide(array: NDArray[Any], width: int, fill: int) -> NDArray[np.int64]:
    full = np.full((len(array), width), fill, np.int64)
    full[:, : array.shape[1]] = array
    return full


def scorer(run: Run, name: str = "val") -> Callable[[nn.Module], dict[str, float]]:
    """A function that scores a network on a split with the task's metrics; windows run in batches of like length."""
    split, device, task = run.data.splits[name], run.device, run.task

    def score(module: nn.Module) -> dict[str, float]:
        scores: dict[str, float] = task.score(outputs(module, split, device), split)
        return scores

    return score


@torch.inference_mode()
def outputs(module: nn.Module, split: Any, device: torch.device) -> dict[str, NDArray[np.float32]]:
    """``start`` and ``end`` (N, S) of every window."""
    module.eval()
    length = np.asarray(split.arrays["attention_mask"]).sum(1)
    width = split.arrays["attention_mask"].shape[1]
    found = {side: np.full((len(split), width), FILL, np.float32) for side in ("start", "end")}
    order, at = np.argsort(-length, kind="stable"), 0
    while at < len(order):
        part = order[at : at + max(1, EVALUATION_TOKENS // int(length[order[at]]))]
        at += len(part)
        feeds = split.feed(part)
        logits = module(*(torch.from_numpy(feeds[key]).to(device) for key in ("input_ids", "attention_mask")))
        for column, side in enumerate(found):
            found[side][part, : logits.shape[1]] = logits[:, :, column].float().cpu().numpy()
    return found
