"""Track files of people who walk, and the sizes of what is cut from them."""

from __future__ import annotations

from pathlib import Path

from toolchain.tasks import Data


def walk(path: Path, agents: int, steps: int, step: int = 10, first: int = 0) -> Path:
    """Everybody walks along x at 1 a step, and sways along y; all are there all the time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        f"{first + k * step} {a} {100 * a + k} {a + k % 2 / 10}" for k in range(steps) for a in range(1, agents + 1)
    ]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def sizes(data: Data) -> dict[str, int]:
    return {name: len(split) for name, split in data.splits.items()}
