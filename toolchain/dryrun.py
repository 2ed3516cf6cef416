"""``--dry-run``, and the first thing of a run: data, teacher taps and shapes are checked with two samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from toolchain.config import Config, validate
from toolchain.stage import console, guard
from toolchain.tasks import Data, load_data, load_task


def check(path: Path, made: Path | None = None) -> dict[str, Any]:
    """Let the task build its networks and run two samples through them, of the data in the folder ``made``, or
    prepared in memory."""
    cfg = validate(json.loads(path.read_text(encoding="utf-8")))
    task = load_task(cfg.task)
    if made is not None:
        return _networks(task, cfg, load_data(made))
    data = task.prepare(cfg.data)
    result: dict[str, Any] = {"samples": {name: len(split) for name, split in data.splits.items()}}
    console.print(
        "data      " + ", ".join(f"{name} {count}" for name, count in result["samples"].items()), markup=False
    )
    result |= _networks(task, cfg, data)
    for key in result.keys() - {"samples"}:
        console.print(f"{key:<9} {result[key]}", markup=False)
    return result


def _networks(task: ModuleType, cfg: Config, data: Data) -> dict[str, Any]:
    """What the task tells of its networks; a task of one's own need not have a check."""
    shapes: dict[str, Any] = getattr(task, "dry_run", lambda cfg, data: {})(cfg, data)
    return shapes


if __name__ == "__main__":
    raise SystemExit(guard(lambda: print(json.dumps(check(*map(Path, sys.argv[1:]))))))
