"""Tasks: one module per domain, and the data artifact they all share.

A task module offers, with numpy and pydantic alone at import:

- ``HEADLINE`` (name of the main metric), its ``UNIT`` (a unit in the data's info goes before it) and
  ``HIGHER_IS_BETTER``; optionally ``DIGITS``, the decimals that scores are printed with (default 2);
- ``DataSection``, ``StudentSection``, ``TeacherSection``: pydantic models of its config sections
  (``TeacherSection`` is None when the method makes its own teacher);
- ``STAGES``: the stages that run between ``data`` and ``student`` when the config has a teacher section;
- ``prepare(data_section) -> Data``;
- ``score(outputs, split) -> {metric: value}``, the headline first, and ``agreement(a, b) -> float`` in [0, 1];
- ``show(outputs, split, index) -> dict`` for the report's sample pictures, or ``figures`` instead;

may offer

- ``interval(outputs, split) -> (low, high) or None``: 95 % interval of the headline, had other samples been drawn;
- ``defaults(data)``: a nested mapping of config values, below a person's own, for a data section as it was given;
- ``PACKAGES``: what its stages need beside the usual packages;
- ``totals(outputs, split) -> Arrays``: over the whole test split, kept with the outputs of the samples shown;
- ``figures(split, outputs) -> [(title, png)]`` for the report, outputs by ``student`` and maybe ``teacher``;
- ``save_student(model, folder)``: further files of a student's artifact;
- ``teacher_scores(run, split) -> {metric: value}``: of a run's teacher, for a study's rows;
- ``examined(run, model) -> (scores, {part: {sample: score}})`` on the test split, for a study's paired tests;

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
FILL = -1e4  # of positions that a model did not see: a logit that no softmax notices and half precision holds


@dataclass
class Split:
    """Samples: ``arrays`` share their first dimension; those named in ``feeds`` are inputs of the deployed graph.

    ``meta`` holds what is not an array (texts, file names); it is not sliced. ``mask`` names the array (N, S) of ones
    and zeros that says how long each sample is: feeds (N, S) are cut to the longest sample of a batch.
    """

    arrays: Arrays
    feeds: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    mask: str | None = None

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def feed(self, index: slice | NDArray[Any]) -> Arrays:
        found = {name: self.arrays[name][index] for name in self.feeds}
        if self.mask is not None:
            longest = int(np.count_nonzero(found[self.mask], axis=1).max(initial=1))
            found = {name: array[:, :longest] for name, array in found.items()}
        return {name: np.ascontiguousarray(array) for name, array in found.items()}

    def whole(self, output: NDArray[Any]) -> NDArray[Any]:
        """An output (n, s) of a feed that was cut, filled up to S with FILL; other outputs as they are."""
        if self.mask is None or output.ndim < 2 or output.shape[1] == (width := self.arrays[self.mask].shape[1]):
            return output
        full = np.full((len(output), width, *output.shape[2:]), FILL, output.dtype)
        full[:, : output.shape[1]] = output
        return full

    def select(self, index: slice | NDArray[Any]) -> Split:
        return Split({name: array[index] for name, array in self.arrays.items()}, self.feeds, self.meta, self.mask)


@dataclass
class Data:
    """Splits by name (``train``, ``val``, ``test``), what the networks need to know about them, small text files."""

    splits: dict[str, Split]
    info: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)


def save_data(folder: Path, data: Data) -> None:
    for split_name, split in data.splits.items():
        for name, array in split.arrays.items():
            np.save(folder / f"{split_name}.{name}.npy", array, allow_pickle=False)
    for name, text in data.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    splits = {
        name: {"feeds": list(split.feeds), "meta": split.meta, "mask": split.mask}
        for name, split in data.splits.items()
    }
    write_json(folder / INFO, {"splits": splits, "info": data.info, "files": sorted(data.files)})


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
            splits[split_name] = Split(arrays, tuple(entry["feeds"]), entry["meta"], entry.get("mask"))
        files = {name: (folder / name).read_text(encoding="utf-8") for name in described.get("files", [])}
        return Data(splits, described["info"], files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder}: not a readable data artifact ({error}); remove it and run again") from error


def as_fed(split: Split, folder: Path) -> Split:
    """``split`` as the model in ``folder`` is fed: through its tables ``lookup.<array>.npy`` where it has some.

    A table gives for each value of the data's, an index, the model's own: a vocabulary that was pruned.
    """
    tables = {path.name.split(".")[1]: np.load(path, allow_pickle=False) for path in folder.glob("lookup.*.npy")}
    mine = {name: table[array := split.arrays[name]].astype(array.dtype) for name, table in tables.items()}
    return Split({**split.arrays, **mine}, split.feeds, split.meta, split.mask)


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


def defaults_of(task: ModuleType, data: Any) -> Mapping[str, Any]:
    """The task's own config values for a ``data`` section as it was given, whatever that is; {} where it has none."""
    found: Mapping[str, Any] = {}
    if hasattr(task, "defaults"):
        found = task.defaults(data if isinstance(data, Mapping) else {})
    return found


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
