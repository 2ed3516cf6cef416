"""Training batches of tracks in the versions of PPT's augmentation, and the scorers of each network.

Everything lies on the training's device; tracks are relative to the last observed position and scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toolchain.artifact import EdgestillError
from toolchain.batches import Batches
from toolchain.tasks import Arrays, Split
from toolchain.tasks.tracks import rotations

if TYPE_CHECKING:
    from toolchain.train import Run

Array = NDArray[Any]
EVALUATION_BATCH = {"cpu": 32, "cuda": 1024}  # on a CPU the folded hypotheses should stay in the cache
# Rows give x and y: identity, rotations by 90, 180 and 270 degrees, and the mirror image x -> -x (specification 1.4).
VERSIONS = np.array(
    [[[1, 0], [0, 1]], [[0, -1], [1, 0]], [[-1, 0], [0, -1]], [[0, 1], [-1, 0]], [[-1, 0], [0, 1]]], np.float32
)

# Those that keep the axis people walk along: identity, mirror images in x and in y, half a turn.
AXIS_VERSIONS = np.array([[[1, 0], [0, 1]], [[1, 0], [0, -1]], [[-1, 0], [0, -1]], [[-1, 0], [0, 1]]], np.float32)


def normalised(split: Split, scale: float) -> NDArray[np.float32]:
    """Whole tracks (N, T, 2) relative to the last observed position, times ``scale``."""
    observed = np.asarray(split.arrays["observed"], np.float64)
    track = np.concatenate([observed, split.arrays["future"]], 1)
    relative: NDArray[np.float32] = ((track - observed[:, -1:]) * scale).astype(np.float32)
    return relative


def versions(
    tracks: NDArray[np.float32], count: int | None = None, seed: int = 0, *, rotate: bool = False, axis: bool = False
) -> NDArray[np.float32]:
    """(N, T, 2) -> (V, N, T, 2): ``count`` of the five versions of each track (None: all), drawn from ``seed``.

    With ``axis`` of the four that keep the axes, at most; with ``rotate`` each is turned by an angle of its own, too.
    """
    rng, known = np.random.default_rng(seed), AXIS_VERSIONS if axis else VERSIONS
    chosen = rng.permuted(np.tile(np.arange(len(known)), (len(tracks), 1)), axis=1)
    chosen = np.sort(chosen[:, :count], axis=1).T
    turn = known[chosen]
    if rotate:
        turn = rotations(rng.uniform(0, 2 * np.pi, chosen.shape)).astype(np.float32) @ turn
    found: NDArray[np.float32] = np.einsum("vnij,ntj->vnti", turn, tracks)
    return found


def scale_of(run: Run) -> float:
    """What the tracks of a run are multiplied by."""
    return float(run.cfg.student.scale_of(run.data.info["unit"]))


class TrajectoryBatches(Batches):
    """Batches of ``track`` float32 (B, T, 2), each in a version drawn anew every epoch.

    With ``balance`` (see ``methods.options.PPT``) an epoch has as many windows, drawn with replacement; with ``jitter``
    the observed positions are noisy, and all are relative to the noisy last one; ``stretch`` leaves the noise alone.

    ``extra`` adds named float32 arrays (V, N, ...) for the ``count`` V versions that ``versions`` gives, ``turned`` or
    not. They are left as they are, which ``stretch`` and ``rotate`` (see ``methods.options.PPT``) exclude.
    """

    def __init__(
        self, run: Run, extra: Mapping[str, Array] | None = None, count: int | None = None, *, turned: bool = False
    ) -> None:
        train = run.data.splits["train"]
        super().__init__(len(train), run.cfg.train.batch_size, self.gather, seed=run.cfg.seed)
        self.scale = scale_of(run)
        self.observe = int(run.data.info["observe"])
        axis = getattr(run.cfg.data, "walk_axis", None) is not None
        tracks = versions(normalised(train, self.scale), count, rotate=turned, axis=axis)
        arrays = {"track": tracks} | dict(extra or {})
        self.versions, self.stretch = len(tracks), float(getattr(run.cfg.method, "stretch", 1.0))
        self.rotate = bool(getattr(run.cfg.method, "rotate", False))
        self.jitter = self.scale * float(getattr(run.cfg.method, "jitter", 0.0))
        self.arrays = {name: torch.from_numpy(np.array(a)).flatten(0, 1).to(run.device) for name, a in arrays.items()}
        self._drawn: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))
        self._noise: tuple[int, NDArray[np.float32]] = (-1, np.zeros(0, np.float32))
        balance, self._chances = float(getattr(run.cfg.method, "balance", 0.0)), None
        if balance:
            recording = np.asarray(train.arrays["scene"])
            weights = np.bincount(recording)[recording] ** -balance
            self._chances = weights / weights.sum()

    def order(self, epoch: int) -> NDArray[np.int64]:
        if self._chances is None:
            return super().order(epoch)
        return np.random.default_rng((self.seed, epoch, 3)).choice(self.count, self.count, p=self._chances)

    def version_of(self, epoch: int) -> NDArray[np.int64]:
        """The version in which each sample is shown in ``epoch``."""
        if self._drawn[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch, 1))
            self._drawn = (epoch, rng.integers(self.versions, size=self.count))
        return self._drawn[1]

    def noise_of(self, epoch: int) -> NDArray[np.float32]:
        """What is added to the observed positions of each sample in ``epoch``, (N, T_o, 2); 0 in half of them."""
        if self._noise[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch, 4))
            deviation = rng.uniform(-self.jitter, self.jitter, (self.count, 1, 1)).clip(0).astype(np.float32)
            noise = rng.standard_normal((self.count, self.observe, 2), np.float32) * deviation
            self._noise = (epoch, noise)
        return self._noise[1]

    def gather(self, index: NDArray[np.int64], epoch: int) -> dict[str, Tensor]:
        rows = torch.from_numpy(self.version_of(epoch)[index] * self.count + index)
        batch = {name: array[rows.to(array.device)].float() for name, array in self.arrays.items()}
        if self.stretch > 1:
            drawn = np.random.default_rng((self.seed, epoch, 2)).uniform(-1, 1, self.count)[index]
            factor = torch.from_numpy(self.stretch**drawn).to(batch["track"])
            batch["track"] = batch["track"] * factor[:, None, None]
        if self.rotate:
            angle = np.random.default_rng((self.seed, epoch, 5)).uniform(0, 2 * np.pi, self.count)[index]
            batch["track"] = batch["track"] @ torch.from_numpy(rotations(angle)).to(batch["track"]).mT
        if self.jitter:
            noise = torch.from_numpy(self.noise_of(epoch)[index]).to(batch["track"])
            shift = noise[:, -1:]
            track = batch["track"] - shift
            batch["track"] = torch.cat([track[:, : self.observe] + noise, track[:, self.observe :]], 1)
            if "paths" in batch:
                batch["paths"] = batch["paths"] - shift[:, None]
        return batch


def pieces(split: Split, scale: float, device: torch.device) -> Iterator[Tensor]:
    """The tracks of a split in order, scaled, (B, T, 2) on ``device``."""
    tracks = normalised(split, scale)
    size = EVALUATION_BATCH.get(device.type, 1024)
    for start in range(0, len(tracks), size):
        yield torch.from_numpy(tracks[start : start + size]).to(device)


def predict(
    split: Split, scale: float, device: torch.device, call: Callable[[Tensor], tuple[Tensor, ...]]
) -> list[Array]:
    """What ``call`` gives for the observed positions (B, T_o, 2) of a split, concatenated."""
    observe = split.arrays["observed"].shape[1]
    with torch.inference_mode():
        found = [
            tuple(value.cpu().numpy() for value in call(track[:, :observe])) for track in pieces(split, scale, device)
        ]
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def scores(module: nn.Module, split: Split, scale: float, device: torch.device, task: Any) -> dict[str, float]:
    """The task's metrics of a network that ships, in the data's unit."""
    paths, logits = predict(split, scale, device, module.eval())
    observed: Array = np.asarray(split.arrays["observed"])
    outputs: Arrays = {"trajectories": observed[:, None, -1:] + paths / scale, "probability": logits}
    found: dict[str, float] = task.score(outputs, split)
    return found


def scorer(run: Run, name: str = "val") -> Callable[[nn.Module], dict[str, float]]:
    """A function that scores a network that ships on a split with the task's metrics, in the data's unit."""
    split, scale = run.data.splits[name], scale_of(run)
    return lambda module: scores(module, split, scale, run.device, run.task)


def next_position_scorer(run: Run, name: str = "val") -> Callable[[nn.Module], dict[str, float]]:
    """Mean L2 error of every next position on a split, in the data's unit: what task I is selected by."""
    split, scale = run.data.splits[name], scale_of(run)

    @torch.inference_mode()
    def score(module: nn.Module) -> dict[str, float]:
        module.eval()
        found = [(module(track[:, :-1]) - track[:, 1:]).norm(dim=-1) for track in pieces(split, scale, run.device)]
        return {"next_position": float(torch.cat(found).mean()) / scale}

    return score


def destination_scorer(run: Run, name: str = "val") -> Callable[[nn.Module], dict[str, float]]:
    """minFDE and meanFDE of a destination predictor on a split, in the data's unit: what task II is selected by."""
    split, scale = run.data.splits[name], scale_of(run)
    target = normalised(split, 1.0)[:, -1:]

    def score(module: nn.Module) -> dict[str, float]:
        module.eval()
        (candidates,) = predict(split, scale, run.device, lambda observed: (module(observed),))
        found = np.linalg.norm(candidates / scale - target, axis=-1)
        return {"minFDE": float(found.min(1).mean()), "meanFDE": float(found.mean())}

    return score


def batches(run: Run, *wanted: str) -> TrajectoryBatches:
    """The training batches of ``run``; ``paths`` and ``feature`` are what the teacher predicts for each version."""
    if unknown := [name for name in wanted if name not in ("paths", "feature")]:
        raise EdgestillError(f"batches: expected some of paths, feature, found {unknown}")
    if not wanted:
        return TrajectoryBatches(run)
    from toolchain.tasks.trajectory_teacher import load_predictions

    found = load_predictions(run.inputs["predictions"], run.inputs["data"], run.cfg.section("data", "teacher"))
    teacher, extra = run.cfg.teacher, {name: found[name] for name in wanted}
    return TrajectoryBatches(run, extra, teacher.versions, turned=teacher.rotate)
