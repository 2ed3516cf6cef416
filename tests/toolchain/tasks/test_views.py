from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from toolchain.tasks.vision import ViewError, Views, apply_view, apply_view_mask, transforms

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 12, 16, 3), dtype=np.uint8)
MASKS = IMAGES[..., 0] % 4


def test_view_0_is_the_identity_and_view_1_the_mirror_image() -> None:
    views = Views(count=2, flip=True)
    assert np.array_equal(apply_view(IMAGES, 0, views), IMAGES)
    assert np.array_equal(apply_view(IMAGES, 1, views), IMAGES[:, :, ::-1])
    assert np.array_equal(apply_view_mask(MASKS, 1, views, 9), MASKS[:, :, ::-1])


def test_every_view_is_its_transform() -> None:
    views = Views(count=12, flip=True, shift=0.25, seed=3)
    for view, (mirrored, dy, dx) in enumerate(transforms(views, 12, 16)):
        assert abs(dy) <= 3
        assert abs(dx) <= 4
        source = IMAGES[:, :, ::-1] if mirrored else IMAGES
        padded = np.pad(source, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
        assert np.array_equal(apply_view(IMAGES, view, views), padded[:, 4 - dy : 16 - dy, 4 - dx : 20 - dx])
        labels = MASKS[:, :, ::-1] if mirrored else MASKS
        padded = np.pad(labels, ((0, 0), (4, 4), (4, 4)), constant_values=9)
        assert np.array_equal(apply_view_mask(MASKS, view, views, 9), padded[:, 4 - dy : 16 - dy, 4 - dx : 20 - dx])


def test_views_are_distinct_and_do_not_depend_on_count_or_batch() -> None:
    few, many = Views(count=4, shift=0.2, seed=1), Views(count=20, shift=0.2, seed=1)
    assert transforms(few, 12, 16) == transforms(many, 12, 16)[:4]
    assert len(set(transforms(many, 12, 16))) == 20
    whole = apply_view(IMAGES, 3, few)
    assert np.array_equal(np.concatenate([apply_view(IMAGES[i : i + 2], 3, few) for i in (0, 2, 4)]), whole)
    assert transforms(few, 12, 16) != transforms(Views(count=4, shift=0.2, seed=2), 12, 16)


def test_a_read_only_memory_map_is_left_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "masks.npy", MASKS)
    mapped = np.load(tmp_path / "masks.npy", mmap_mode="r")
    views = Views(count=3, shift=0.25)
    assert np.array_equal(apply_view_mask(mapped, 2, views, 9), apply_view_mask(MASKS, 2, views, 9))
    assert np.array_equal(mapped, MASKS)


def test_views_that_do_not_exist() -> None:
    with pytest.raises(ViewError, match="only 2 distinct views"):
        transforms(Views(count=3, flip=True), 12, 16)
    with pytest.raises(ViewError, match="less than one pixel"):
        transforms(Views(count=2, shift=0.01), 12, 16)
    with pytest.raises(ViewError, match=r"view in 0\.\.1, found 2"):
        apply_view(IMAGES, 2, Views(count=2, flip=True))
    with pytest.raises(ValidationError, match="set count to 2"):
        Views(flip=True)
