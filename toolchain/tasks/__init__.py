"""Tasks: one module per domain, and the data artifact they all share.

A task module offers, with numpy and pydantic alone at import:

- ``HEADLINE`` (name of the main metric), its ``UNIT`` (a unit in the data's info goes before it) and
  ``HIGHER_IS_BETTER``; optionally ``DIGITS``, the decimals that scores are printed with (default 2);
- ``DataSection``, ``StudentSection``, ``TeacherSection``: pydantic models of its config sections
  (``TeacherSection`` is None when the method makes its own teacher);
- ``STAGES``: the stages that run between ``data`` and ``student`` when the config has a teacher section;
- ``prepare(data_section) -> Data``;
- ``score(outputs, split) -> {metric: value}``, the headline first, and ``agreement(a, b) -> float`` in [0, 1];
- ``show(outputs, split, index) -> dict``, or ``figures(split, outputs) -> [(title, png)]`` with outputs by ``student``
  and maybe ``teacher``, for the report's sample pictures;

and, importing torch only inside, ``student(config, info)``, ``deploy(model, config, info)`` and a function for each
of its ``STAGES``.
"""

from __future__ import annotations

import importlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.artifact import ArtifactError, EdgestillError, read, write_json

Arrays = dict[str, NDArray[Any]]
INFO = "info.json"


@dataclass
class Split:
    """Samples: ``arrays`` share their first dimension; those named in ``feeds`` are inputs of the deployed graph.

    ``meta`` holds what is not an array (texts, file names); it is not sliced.
    """

    arrays: Arrays
    feeds: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def feed(self, index: slice | NDArray[Any]) -> Arrays:
        return {name: np.ascontiguousarray(self.arrays[name][index]) for name in self.feeds}

    def select(self, index: slice | NDArray[Any]) -> Split:
        return Split({name: array[index] for name, array in self.arrays.items()}, self.feeds, self.meta)


@dataclass
class Data:
    """Splits by name (``train``, ``val``, ``test``) and what the networks need to know about them."""

    splits: dict[str, Split]
    info: dict[str, Any]


def save_data(folder: Path, data: Data) -> None:
    for split_name, split in data.splits.items():
        for name, array in split.arrays.items():
            np.save(folder / f"{split_name}.{name}.npy", array, allow_pickle=False)
    splits = {name: {"feeds": list(split.feeds), "meta": split.meta} for name, split in data.splits.items()}
    write_json(folder / INFO, {"splits": splits, "info": data.info})


def save_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """``np.savez`` without the time of day: the same arrays give the same bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)


def load_data(folder: Path | str) -> Data:
    """Read a data artifact; arrays are memory-mapped. Raises ArtifactError."""
    folder = Path(folder)
    read(folder)
    try:
        described = json.loads((folder / INFO).read_text(encoding="utf-8"))
        splits = {}
        for split_name, entry in described["splits"].items():
            arrays = {
                path.name[len(split_name) + 1 : -len(".npy")]: np.load(path, mmap_mode="r", allow_pickle=False)
                for path in sorted(folder.glob(f"{split_name}.*.npy"))
            }
            splits[split_name] = Split(arrays, tuple(entry["feeds"]), entry["meta"])
        return Data(splits, described["info"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder}: not a readable data artifact ({error}); remove it and run again") from error


def load_task(name: str) -> ModuleType:
    """The task module: ``classification`` is ``toolchain.tasks.classification``; a dotted name is the user's own."""
    target = name if "." in name else f"{__name__}.{name}"
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name is None or not target.startswith(error.name):
            raise
        raise EdgestillError(
            f"task {name!r}: no module {target}; one of {', '.join(built_in())}, or a dotted path"
        ) from error


def digits_of(task: ModuleType) -> int:
    """The decimals that scores of ``task`` are printed with."""
    return int(getattr(task, "DIGITS", 2))


def unit_of(task: ModuleType, info: Mapping[str, Any]) -> str:
    """The unit of the task's headline on data of ``info``; empty when it has none."""
    return str(info.get("unit", getattr(task, "UNIT", "")))


def built_in() -> list[str]:
    folder = Path(__file__).parent
    modules = [path for path in folder.glob("[a-z]*.py") if "\nHEADLINE" in path.read_text(encoding="utf-8")]
    return sorted(path.stem for path in modules)
