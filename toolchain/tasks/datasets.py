"""From wherever images are to uint8 arrays: splits, sizes, balance, and what is wrong with a source.

A reader gives a ``Source`` of undecoded pools; ``assemble`` draws the splits, decodes what is used and resizes it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toolchain.artifact import EdgestillError
from toolchain.tasks import Arrays, Data, Split

if TYPE_CHECKING:
    from toolchain.stage import Bar

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class DataError(EdgestillError):
    """A source of data is absent or broken; the message names the file and the remedy."""


@dataclass(frozen=True)
class Pool:
    """Images not decoded yet: ``image(i)`` gives (H, W) or (H, W, 3) uint8.

    ``labels`` (N,) are the classes of whole images; where ``mask`` gives (H, W) classes they are zeros.
    """

    labels: Labels
    image: Callable[[int], Images]
    mask: Callable[[int], Images] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: NDArray[np.int64]) -> Pool:
        mask = self.mask
        return Pool(
            self.labels[index],
            lambda i: self.image(int(index[i])),
            None if mask is None else lambda i: mask(int(index[i])),
        )


@dataclass(frozen=True)
class Source:
    """``pools``: ``train`` and, where there are such, ``val`` and ``test``. ``note``: what to tell with a result."""

    name: str
    classes: Sequence[str]
    pools: dict[str, Pool]
    ignore_index: int | None = None
    note: str | None = None


def assemble(source: Source, section: Any, height: int, width: int) -> Data:
    """The data artifact's content: splits drawn, decoded and resized to ``height`` x ``width``.

    ``section`` is a ``vision.DataBase``. Images are uint8 (N, H, W, C), C = 1 if every image is grey, else 3; labels
    int64 (N,), or (N, H, W) with masks. Aspect is not kept. Raises DataError.
    """
    from toolchain.stage import progress

    pools = split(source, section)
    meta = {"classes": list(source.classes), "ignore_index": source.ignore_index}
    images, labels = {}, {}
    with progress(f"reading {source.name}", sum(map(len, pools.values()))) as bar:
        for name, pool in pools.items():
            images[name], labels[name] = _decode(source, name, pool, height, width, bar)
    channels = max(1 if image.ndim == 2 else 3 for split_images in images.values() for image in split_images)
    splits = {}
    for name, split_images in images.items():
        arrays: Arrays = {"image": np.stack([_channels(image, channels) for image in split_images])}
        splits[name] = Split(arrays | {"label": labels[name]}, ("image",), meta)
    mean, std = _statistics(splits["train"].arrays["image"])
    info = meta | {"image_size": [height, width], "channels": channels, "mean": mean, "std": std}
    return Data(splits, info | {"source": source.name, "note": _note(source, pools, section)})


def _note(source: Source, pools: Mapping[str, Pool], section: Any) -> str | None:
    """The source's, and the shares of the training images that were drawn to test with, as no published figure is."""
    if "test" in source.pools:
        return source.note
    shares = {"test": section.test_fraction, "val": section.val_fraction}
    drawn = ", ".join(f"{n} {len(pools[n]):,} ({100 * shares[n]:g} %)" for n in shares if n not in source.pools)
    return "; ".join(filter(None, (source.note, f"no test split given: of the training images were drawn {drawn}")))


def split(source: Source, section: Any) -> dict[str, Pool]:
    """Disjoint ``train``, ``val`` and ``test``; what the source lacks is drawn from its training images, by class."""
    pools = dict(source.pools)
    for name, pool in pools.items():
        if not len(pool):
            raise DataError(
                f"{source.name}: expected images in the split {name}, found none; add some, or remove the split"
            )
        if pool.labels.min() < 0 or pool.labels.max() >= len(source.classes):
            raise DataError(
                f"{source.name}: expected labels 0..{len(source.classes) - 1} in the split {name}, found "
                f"{pool.labels.min()}..{pool.labels.max()}; name every class, or remove those images"
            )
    shares = {"test": section.test_fraction, "val": section.val_fraction}
    for stream, (name, share) in enumerate(shares.items()):
        if name not in pools:
            pool = pools["train"]
            count = max(1, round(share * len(pool)))
            if count >= len(pool):
                raise DataError(
                    f"{source.name}: {len(pool)} images are too few to draw the split {name} from; add some"
                )
            drawn = draw(pool.labels, count, [section.split_seed, stream])
            pools[name] = pool.select(drawn)
            pools["train"] = pool.select(np.setdiff1d(np.arange(len(pool)), drawn))
    train = pools["train"]
    if section.train_samples is not None:
        if section.train_samples > len(train):
            raise DataError(
                f"data.train_samples: expected at most {len(train)} (what {source.name} has left for training), found "
                f"{section.train_samples}; lower it or remove the key"
            )
        index = draw(train.labels, section.train_samples, [section.split_seed, len(shares)], balanced=True)
        train = pools["train"] = train.select(index)
    counts = np.bincount(train.labels, minlength=len(source.classes))
    if train.mask is None and (counts == 0).any():
        empty = [name for name, count in zip(source.classes, counts, strict=True) if not count]
        raise DataError(
            f"{source.name}: no training images of class {', '.join(empty[:5])}; add some, remove the class, "
            "or raise data.train_samples"
        )
    return {name: pools[name] for name in ("train", "val", "test")}


def draw(labels: Labels, count: int, seed: Sequence[int], balanced: bool = False) -> NDArray[np.int64]:
    """``count`` sorted indices: each class by its share, or with ``balanced`` as equally as its images allow."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels)
    ranks = np.empty(len(labels))
    ranks[order] = np.arange(len(labels)) - (np.cumsum(sizes) - sizes)[labels[order]]
    if not balanced:
        ranks = (ranks + 0.5) / sizes[labels]
    return np.sort(np.argsort(ranks, kind="stable")[:count])


def _decode(source: Source, name: str, pool: Pool, height: int, width: int, bar: Bar) -> tuple[list[Images], Labels]:
    images: list[Images] = []
    masks = np.empty((len(pool), height, width), np.int64) if pool.mask else None
    for i in range(len(pool)):
        image = pool.image(i)
        if masks is not None and pool.mask is not None:
            mask = pool.mask(i)
            _check_mask(source, name, i, image, mask)
            masks[i] = resize(mask, height, width, nearest=True)
        images.append(resize(image, height, width))
        bar.advance()
    return images, pool.labels if masks is None else masks


def _check_mask(source: Source, name: str, i: int, image: Images, mask: Images) -> None:
    if mask.shape != image.shape[:2]:
        raise DataError(
            f"{source.name} {name} {i}: expected a mask of the image's size {image.shape[:2]}, found {mask.shape}; "
            "export the mask again"
        )
    wrong = mask[(mask >= len(source.classes)) & (mask != source.ignore_index)]
    if wrong.size:
        raise DataError(
            f"{source.name} {name} {i}: expected mask values 0..{len(source.classes) - 1} or {source.ignore_index} "
            f"(ignored), found {wrong[0]}; name every class in data.classes, or set data.ignore_index"
        )


def _channels(image: Images, channels: int) -> Images:
    image = image if image.ndim == 3 else image[:, :, None]
    return image if image.shape[2] == channels else np.repeat(image, channels, axis=2)


def _statistics(images: Images) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in 0..1; the deviation at least one grey level."""
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(images.shape[3]):
        share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        mean.append(float(share @ values))
        std.append(max(float(np.sqrt(share @ (values - mean[-1]) ** 2)), 1 / 255))
    return mean, std


def resize(image: Images, height: int, width: int, nearest: bool = False) -> Images:
    """(h, w) or (h, w, 3) to (height, width...): bicubic, or nearest for masks."""
    if image.shape[:2] == (height, width):
        return image
    pil, _ = _pillow()
    method = pil.Resampling.NEAREST if nearest else pil.Resampling.BICUBIC
    return np.asarray(pil.fromarray(image).resize((width, height), method))


def decode(file: Path | bytes, name: str, mask: bool = False) -> Images:
    """An image file, upright, as (H, W) if grey else (H, W, 3); a mask as its indices (H, W). Raises DataError."""
    pil, pil_ops = _pillow()
    try:
        with pil.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
            return to_array(pil_ops.exif_transpose(opened), name, mask)
    except DataError:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        reason = "nothing there" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        raise DataError(
            f"{name}: expected an image, found a file that cannot be decoded ({reason}); replace it"
        ) from error


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError(
            "images are read with the package pillow, which is not installed: pip install pillow"
        ) from error
    return Image, ImageOps


def to_array(image: Any, name: str, mask: bool = False) -> Images:
    """A PIL image as an array, see ``decode``."""
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{name}: expected 8 bits a channel, found mode {image.mode}; convert it to 8 bits")
    if mask:
        if image.mode not in ("1", "L", "P"):
            raise DataError(
                f"{name}: expected a mask with a class number per pixel (one channel), found {image.mode}; convert it"
            )
        return np.asarray(image).astype(np.uint8)
    return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))


def data_root(path: str | None) -> Path:
    """The data folder: ``path``, else EDGESTILL_DATA, else a cache folder of the user's."""
    if chosen := path or os.environ.get("EDGESTILL_DATA"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "edgestill"


def find(root: Path, *names: str) -> Path | None:
    """The first of ``names`` under ``root/vision`` or ``root``."""
    return next((base / name for name in names for base in (root / "vision", root) if (base / name).exists()), None)
