"""A stage is a process: as its JOB.json says, it reads folders and writes one artifact."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from toolchain.artifact import EdgestillError, UsageError

FAILED = 1
WRONG_USE = 2
INTERRUPTED = 130
STOPS = (signal.SIGINT, signal.SIGTERM)

console = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Job:
    """One stage to do: the config sections it depends on, the artifacts it reads, the folder it makes."""

    stage: str
    out: Path
    config: dict[str, Any]
    inputs: dict[str, Path] = field(default_factory=dict)

    def to_json(self) -> str:
        inputs = {role: str(path) for role, path in self.inputs.items()}
        return json.dumps({"stage": self.stage, "out": str(self.out), "config": self.config, "inputs": inputs})

    @classmethod
    def from_json(cls, text: str) -> Job:
        value = json.loads(text)
        inputs = {role: Path(path) for role, path in value["inputs"].items()}
        return cls(value["stage"], Path(value["out"]), value["config"], inputs)

    @property
    def work(self) -> Path:
        """A folder that outlives this process: checkpoints and caches go here; removed when the stage is done."""
        return self.out.parent / ".work" / self.out.name


class Bar:
    """A progress bar; without a terminal it prints a line every tenth of the way."""

    def __init__(self, progress: Progress | None, description: str, total: int) -> None:
        self._progress, self._description, self._total = progress, description, total
        self._done, self._told = 0, 0
        self._task = progress.add_task(description, total=total) if progress else None

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        if self._progress and self._task is not None:
            self._progress.advance(self._task, steps)
        elif self._total and (tenth := 10 * self._done // self._total) > self._told:
            self._told = tenth
            console.print(f"    {self._description} {self._done}/{self._total}")

    def update(self, text: str) -> None:
        """Replace the description: the latest loss, the node being built."""
        self._description = text
        if self._progress and self._task is not None:
            self._progress.update(self._task, description=text)


@contextmanager
def progress(description: str, total: int) -> Iterator[Bar]:
    """Show progress on standard error."""
    if not console.is_terminal:
        yield Bar(None, description, total)
        return
    columns = (TextColumn("    {task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bars:
        yield Bar(bars, description, total)


def guard(action: Callable[[], int | None]) -> int:
    """The exit code of ``action``, None is 0. An error is one message, and a traceback only with EDGESTILL_DEBUG."""
    try:
        return action() or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("EDGESTILL_DEBUG"):
            raise
        text = _no_folder(error) or _unwritable(error) or str(error)
        if not isinstance(error, (EdgestillError, OSError)):
            text = f"{type(error).__name__}: {text} (an unexpected error; EDGESTILL_DEBUG=1 shows its traceback)"
        console.print(f"error: {text}", markup=False, style="red")
        return WRONG_USE if isinstance(error, UsageError) else FAILED


def _no_folder(error: Exception) -> str | None:
    """What to say where a file lies in a folder's place."""
    if not isinstance(error, (FileExistsError, NotADirectoryError)) or not isinstance(error.filename, str):
        return None
    place = Path(error.filename)
    file = next((one for one in (place, *place.parents) if one.is_file()), None)
    if file is None:
        return None
    return f"{file}: expected a folder, found a file; move it away, or name another place"


def _unwritable(error: Exception) -> str | None:
    if not isinstance(error, OSError) or not error.filename:
        return None
    return f"{error.filename}: {error.strerror}; check that place and its permissions, or name another"


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(run: Callable[[Job], None], argv: Sequence[str] | None = None) -> None:
    """Entry point of a stage's module. The pipeline starts it with STOPS blocked, so that no import is cut in two."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        console.print("error: expected one argument, JOB.json; stages are started by `edgestill`", markup=False)
        raise SystemExit(WRONG_USE)
    path = Path(arguments[0])
    job = Job.from_json(path.read_text(encoding="utf-8"))
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        run(job)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        debug = bool(os.environ.get("EDGESTILL_DEBUG"))
        message = str(error) if isinstance(error, EdgestillError) else _unexpected(job, error)
        path.with_suffix(".error").write_text(json.dumps({"message": message}), encoding="utf-8")
        if debug:
            raise
        raise SystemExit(FAILED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _unexpected(job: Job, error: Exception) -> str:
    log = job.work.with_name(f"{job.out.name}.traceback.txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    text = " ".join(str(error).split())[:300]
    return f"{job.stage}: {type(error).__name__}: {text} (an unexpected error; its traceback is in {log})"
