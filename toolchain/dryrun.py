"""``--dry-run``, and the first thing of a run: data, teacher taps and shapes are checked with two samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from toolchain.config import validate
from toolchain.stage import console, guard
from toolchain.tasks import load_data, load_task


def check(path: Path, made: Path | None = None) -> dict[str, Any]:
    """Let the task build its networks and run two samples through them, of the data in the folder ``made``, or
    prepared in memory."""
    cfg = validate(json.loads(path.read_text(encoding="utf-8")))
    task = load_task(cfg.task)
    if made is not None:
        shapes: dict[str, Any] = task.dry_run(cfg, load_data(made))
        return shapes
    data = task.prepare(cfg.data)
    result: dict[str, Any] = {"samples": {name: len(split) for name, split in data.splits.items()}}
    console.print(
        "data      " + ", ".join(f"{name} {count}" for name, count in result["samples"].items()), markup=False
    )
    result |= task.dry_run(cfg, data)
    for key in result.keys() - {"samples"}:
        console.print(f"{key:<9} {result[key]}", markup=False)
    return result


if __name__ == "__main__":
    raise SystemExit(guard(lambda: print(json.dumps(check(*map(Path, sys.argv[1:]))))))
