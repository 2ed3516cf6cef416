"""Folders of random pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)


def write_image(path: Path, size: tuple[int, int] = (10, 12), grey: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, size if grey else (*size, 3), dtype=np.uint8)).save(path)
    return path


def write_classes(root: Path, counts: dict[str, int], **options: Any) -> Path:
    for name, count in counts.items():
        for i in range(count):
            write_image(root / name / f"{i}.png", **options)
    return root
