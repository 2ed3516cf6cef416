"""Teacher features, cached on disk for every view.

They are computed in chunks of one fixed size (the last one filled up), so that a picture's features do not depend on
the pictures beside it: what is cached and what ``Features.live`` computes agree to the bit on one machine.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.artifact import EdgestillError, create, digest, read, remove, sha256, verify, versions, write_json
from toolchain.stage import Job, progress
from toolchain.tasks import load_data, save_npz
from toolchain.tasks.backbones import state_sha256, weight_file
from toolchain.tasks.teacher_net import Extractor, TeacherBody
from toolchain.tasks.vision import TeacherSection, Views, apply_view

Array = NDArray[Any]
LARGEST = 6e4  # float16 ends at 65504


class FeatureCacheError(EdgestillError):
    """Cached teacher features are of another teacher, other data or other views."""


@dataclass(frozen=True)
class Features:
    """Cached teacher features; arrays are float16 and memory-mapped.

    ``taps`` (V, N, L, C) tokens, standardised per channel by ``mean`` and ``std`` of the identity view; ``pooled``
    (V, N, D), for classification; ``val_taps`` and ``val_pooled`` have one view.
    """

    folder: Path
    taps: Array
    val_taps: Array
    pooled: Array | None
    val_pooled: Array | None
    mean: Array
    std: Array
    grid: tuple[int, int]
    tap_channels: tuple[int, ...]
    section: TeacherSection
    views: Views
    channels: int

    @cached_property
    def extractor(self) -> Extractor:
        return Extractor(TeacherBody(self.section, self.channels), self.section.batch_size)

    def live(self, images: Array, view: int = 0) -> tuple[Array, Array]:
        """Tokens and pooled features of uint8 pictures (N, H, W, C), computed now: the very numbers that are cached."""
        tokens, pooled = self.extractor(apply_view(images, view, self.views))
        return standardise(tokens, self.mean, self.std), pooled.astype(np.float16)


def standardise(tokens: Array, mean: Array, std: Array) -> Array:
    """float32 tokens (N, L, C) -> float16, per channel."""
    return ((tokens - mean) / std).clip(-LARGEST, LARGEST).astype(np.float16)


def _key(data_id: str, data: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, Any]:
    """What cached features depend on."""
    kept = {name: value for name, value in teacher.items() if name != "probe"}
    file = weight_file(kept["weights"])
    return {"data_id": data_id, "views": data["views"], "teacher": kept, "weights": sha256(file) if file else None}


def features(job: Job) -> None:
    """Stage: the teacher's features of each view of ``train`` and of ``val``.

    Resumes at the last finished view. A float32 copy of the identity view's tokens lies beside the cache meanwhile.
    """
    data = load_data(job.inputs["data"])
    teacher, views = TeacherSection.model_validate(job.config["teacher"]), Views(**job.config["data"]["views"])
    train, val = (data.splits[name].arrays["image"] for name in ("train", "val"))
    body = TeacherBody(teacher, train.shape[-1])
    data_id = read(job.inputs["data"]).id
    key = _key(data_id, job.config["data"], job.config["teacher"])
    tokens, width = (math.prod(body.grid), sum(body.tap_channels)), (body.pooled_width,)
    shapes: dict[str, tuple[int, ...]] = {
        "taps": (views.count, len(train), *tokens),
        "val.taps": (1, len(val), *tokens),
    }
    if not job.config["task"].endswith("segmentation"):
        shapes |= {"pooled": (views.count, len(train), *width), "val.pooled": (1, len(val), *width)}
    writer = _Writer(job.work, key, Extractor(body, teacher.batch_size), shapes)
    with progress("teacher features", views.count * len(train) + len(val)) as bar:
        writer.identity(train, bar.advance)
        for view in range(1, views.count):
            writer.write("", view, train, partial(apply_view, view=view, views=views), bar.advance)
        writer.write("val.", 0, val, np.asarray, bar.advance)
    with create(job.out, stage=job.stage, config=job.config, inputs=job.inputs) as draft:
        for path in writer.files:
            shutil.move(path, draft.path / path.name)
        draft.extra = {
            "grid": list(body.grid),
            "tap_channels": list(body.tap_channels),
            "taps": list(body.taps),
            "pooled": body.pooled_width,
            "channels": train.shape[-1],
            "views": job.config["data"]["views"],
            "data_id": data_id,
            "teacher_sha256": state_sha256(body.net),
            "key": key,
        }
        draft.versions = versions("torch", "timm", "numpy")


class _Writer:
    """float16 arrays in the working folder, and which views of them are finished."""

    def __init__(
        self, folder: Path, key: Mapping[str, Any], extract: Extractor, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.folder, self.extract, self.key = folder, extract, digest(dict(key))
        self.record, self.stats = folder / "done.json", folder / "stats.npz"
        paths = {name: folder / f"{name}.npy" for name in shapes}
        self.files = [*paths.values(), self.stats]
        known = json.loads(self.record.read_text(encoding="utf-8")) if self.record.is_file() else {}
        if known.get("key") == self.key and known["done"] and all(path.is_file() for path in self.files):
            self.done: list[str] = known["done"]
            self.arrays = {name: np.lib.format.open_memmap(path, mode="r+") for name, path in paths.items()}
            return
        remove(folder)
        folder.mkdir(parents=True)
        self.done = []
        self.arrays = {name: self._new(path, shapes[name], np.float16) for name, path in paths.items()}

    def _new(self, path: Path, shape: tuple[int, ...], dtype: type) -> Any:
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)

    def _finish(self, part: str) -> None:
        for array in self.arrays.values():
            array.flush()
        self.done.append(part)
        write_json(self.record, {"key": self.key, "done": self.done})

    def _chunks(self, count: int) -> Iterator[slice]:
        step = self.extract.batch_size
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def identity(self, images: Array, advance: Callable[[int], None]) -> None:
        """View 0 of ``train``: raw tokens first, then their statistics, then standardised."""
        if "taps.0" in self.done:
            advance(len(images))
            return
        taps, pooled = self.arrays["taps"], self.arrays.get("pooled")
        raw = self._new(self.folder / "raw.npy", taps.shape[1:], np.float32)
        total, square = np.zeros(taps.shape[-1]), np.zeros(taps.shape[-1])
        for part in self._chunks(len(images)):
            raw[part], averaged = self.extract(images[part])
            if pooled is not None:
                pooled[0, part] = averaged
            tokens = raw[part].astype(np.float64)
            total += tokens.sum((0, 1))
            square += np.square(tokens).sum((0, 1))
            advance(part.stop - part.start)
        mean = total / (len(images) * taps.shape[2])
        std = np.sqrt(np.maximum(square / (len(images) * taps.shape[2]) - mean**2, 0))
        std[std <= 1e-5 * std.max()] = 1.0  # channels that never move
        save_npz(self.stats, {"mean": mean.astype(np.float32), "std": std.astype(np.float32)})
        for part in self._chunks(len(images)):
            taps[0, part] = standardise(raw[part], *_stats(self.stats))
        self._finish("taps.0")
        remove(self.folder / "raw.npy")

    def write(
        self, prefix: str, view: int, images: Array, transform: Callable[[Array], Array], advance: Callable[[int], None]
    ) -> None:
        """Another view of ``train``, or (``prefix`` "val.") the identity view of ``val``."""
        name = f"{prefix}taps.{view}"
        if name in self.done:
            advance(len(images))
            return
        taps, pooled = self.arrays[f"{prefix}taps"], self.arrays.get(f"{prefix}pooled")
        stats = _stats(self.stats)
        for part in self._chunks(len(images)):
            tokens, averaged = self.extract(transform(images[part]))
            taps[view, part] = standardise(tokens, *stats)
            if pooled is not None:
                pooled[view, part] = averaged
            advance(part.stop - part.start)
        self._finish(name)


def _stats(path: Path) -> tuple[Array, Array]:
    with np.load(path, allow_pickle=False) as stats:
        return stats["mean"], stats["std"]


def load_features(folder: Path | str, *, data_folder: Path | str, config: Mapping[str, Any]) -> Features:
    """Open cached features for the sections ``data`` and ``teacher`` of ``config`` (JSON values).

    Raises FeatureCacheError when they are of another teacher, other data or other views; ArtifactError when damaged.
    """
    folder = Path(folder)
    manifest = verify(folder)
    if manifest.stage != "features":
        raise FeatureCacheError(f"{folder}: expected teacher features, found an artifact of stage {manifest.stage}")
    extra = manifest.extra
    wanted = json.loads(json.dumps(_key(read(data_folder).id, config["data"], config["teacher"])))
    if wrong := [name for name, value in wanted.items() if extra["key"].get(name) != value]:
        shown = "; ".join(
            f"{name}: expected {_short(wanted[name])}, found {_short(extra['key'].get(name))}" for name in wrong
        )
        raise FeatureCacheError(
            f"{folder}: these features are of something else ({shown}); run the features stage again"
        )

    def array(name: str) -> Array | None:
        path = folder / name
        return np.load(path, mmap_mode="r", allow_pickle=False) if path.is_file() else None

    taps, val_taps = array("taps.npy"), array("val.taps.npy")
    if taps is None or val_taps is None:
        raise FeatureCacheError(f"{folder}: expected taps.npy and val.taps.npy, found neither or one; run it again")
    mean, std = _stats(folder / "stats.npz")
    return Features(
        folder=folder,
        taps=taps,
        val_taps=val_taps,
        pooled=array("pooled.npy"),
        val_pooled=array("val.pooled.npy"),
        mean=mean,
        std=std,
        grid=(extra["grid"][0], extra["grid"][1]),
        tap_channels=tuple(extra["tap_channels"]),
        section=TeacherSection.model_validate(config["teacher"]),
        views=Views.model_validate(config["data"]["views"]),
        channels=extra["channels"],
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
