"""The data of trajectory prediction: where tracks come from, how they are split, and the windows cut from them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from toolchain.artifact import digest, sha256
from toolchain.download import PUBLIC, fetch
from toolchain.faults import allowed
from toolchain.section import Section
from toolchain.tasks import Arrays, Data, Split
from toolchain.tasks.datasets import DataError, data_root
from toolchain.tasks.simulator import simulate
from toolchain.tasks.track_notes import (
    ETH_STEPS,
    INTERPOLATED,
    OFTEN,
    TEST_VALIDATION,
    TRAINED_VALIDATION,
    TURNED,
    way_note,
)
from toolchain.tasks.tracks import (
    COLUMNS,
    Integers,
    Recording,
    at_pace,
    longest_run,
    reach,
    read_tracks,
    repeated_steps,
    turned,
    window_rows,
)

SUFFIXES = (".txt", ".csv", ".tsv")
PARTS = ("train", "val", "test")
MEANT_FOR: dict[str, tuple[str, ...]] = {
    "scene": ("eth_ucy",),
    "download": ("eth_ucy",),
    "path": ("files", "eth_ucy", "sdd"),
    "columns": ("files",),
    "metres_per_unit": ("files", "sdd"),
    "val_fraction": ("files", "simulator", "sdd"),
    "test_fraction": ("files", "simulator"),
    "seed": ("simulator", "sdd"),
    "recordings": ("simulator",),
    "seconds": ("simulator",),
}
FIXED: dict[str, dict[str, Any]] = {
    "simulator": {"unit": "m", "frame_step": 10, "seconds_per_step": 0.4},
    "eth_ucy": {"unit": "m", "frame_step": 10, "seconds_per_step": 0.4},
    "sdd": {"seconds_per_step": 0.4},
}
NAMED = 3  # recordings that are told by name
ONE_PACE = (1.0,)

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Pace = Annotated[float, Field(ge=0.2, le=5)]
Degrees = Annotated[float, Field(ge=-180, le=180)]
Column = Annotated[int, Field(ge=0, strict=True)] | Annotated[str, Field(min_length=1)]
Recordings = dict[str, list[Recording]]


class DataSection(Section):
    """Tracks, and the windows of ``observe`` + ``predict`` steps cut from them at every ``stride``-th step.

    ``source``: ``simulator``; ``eth_ucy`` with ``scene`` held out for the test; ``sdd``, the Stanford drone tracks of
    TrajNet; ``files``, your own. ``path``: for ``files`` a file, or a folder of track files or of the folders train,
    val and test; else the data folder (default: EDGESTILL_DATA, else a cache folder). ``least_agents``: windows count
    where so many people share them (2: the Social-GAN loader's rule).

    ``validation``: ``test`` is the habit of PPT's official code, by which the held-out scene is the validation split
    too; the validation windows then train. For studies alone, which label what they find ``test_selected_``. ``train``:
    they train too, once everything has been chosen; the split stays what it was, so that scores on it are of what
    trained.

    Frame ids are ``frame_step`` apart (sdd: 12) for ``seconds_per_step``. ``columns``: names or numbers (from 0) of
    frame, id, x and y. ``metres_per_unit`` makes metres of the files' unit. ``val_fraction`` and ``test_fraction``:
    what is cut from the end of every recording where a source has no such split (sdd: tracks drawn from ``seed``).
    ``paces``: training windows are cut at each of these multiples of the time step, for cameras that are slower or
    faster. Positions are interpolated but for the last observed one, so that no observed one knows of later ones; with
    ``resampled`` it is the window's first that is not, for a camera whose tracks were interpolated to its frames
    themselves, as those of ETH's recording were.
    ``walk_axis``: people walk along one axis, up and down a street. Every recording is turned so that it is x; by how
    many degrees from x it was, anticlockwise, is given for each recording where it is not 0, by a part of its name (of
    several the longest). The augmentation then keeps the axis (see ``trajectory_batches.versions``), and what is
    exported wants tracks so turned.
    ``train_samples``: use that many training windows, evenly spread. ``recordings`` of ``seconds`` each are simulated
    from ``seed``.
    """

    source: Literal["simulator", "eth_ucy", "sdd", "files"]
    scene: Literal["eth", "hotel", "univ", "zara1", "zara2"] | None = None
    validation: Annotated[Literal["split", "train", "test"], Field(exclude_if=lambda value: value == "split")] = "split"
    path: str | None = None
    observe: Annotated[int, Field(ge=2)] = 8
    predict: Annotated[int, Field(ge=2)] = 12
    stride: Positive = 1
    least_agents: Annotated[int, Field(ge=1, le=2)] = 1
    frame_step: Positive = 10
    seconds_per_step: Annotated[float, Field(gt=0)] = 0.4
    unit: Literal["m", "px"] = "m"
    metres_per_unit: Annotated[float, Field(gt=0)] = 1.0
    columns: tuple[Column, Column, Column, Column] = COLUMNS
    val_fraction: Share = 0.1
    test_fraction: Share = 0.2
    paces: Annotated[tuple[Pace, ...], Field(min_length=1, exclude_if=lambda value: value == ONE_PACE)] = ONE_PACE
    resampled: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    walk_axis: Annotated[dict[str, Degrees] | None, Field(exclude_if=lambda value: value is None)] = None
    train_samples: Positive | None = None
    download: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    recordings: Positive = 8
    seconds: Annotated[float, Field(ge=60, le=3600)] = 160.0

    @property
    def now(self) -> int:
        """Of a window's positions, the one that is never interpolated, see ``paces``."""
        return 0 if self.resampled else self.observe - 1

    def reach(self, pace: float) -> int:
        """How many positions of a track lie under a window at ``pace``."""
        return reach(self.observe + self.predict, pace, self.now)

    @model_validator(mode="before")
    @classmethod
    def _of_sdd(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("source") == "sdd":
            return {"unit": "px", "frame_step": 12} | value
        return value

    @model_validator(mode="after")
    def _sound(self) -> DataSection:
        for key, sources in MEANT_FOR.items():
            if self.source not in sources and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} has no meaning with source {self.source}, only {', '.join(sources)}; remove it"
                )
        if self.validation == "test" and self.source != "eth_ucy":
            raise ValueError(
                "validation test is the habit of the published figures of eth_ucy; choose split, or train where "
                "everything has been chosen"
            )
        for key, expected in FIXED.get(self.source, {}).items():
            if getattr(self, key) != expected:
                raise ValueError(f"source {self.source} has {key} {expected}, found {getattr(self, key)}; remove {key}")
        if self.source == "eth_ucy" and self.scene is None:
            raise ValueError("source eth_ucy needs scene, the one held out: eth, hotel, univ, zara1 or zara2")
        if self.source == "files" and not self.path:
            raise ValueError("source files needs path: your track file, or the folder of them")
        if self.source == "sdd" and self.unit == "m" and self.metres_per_unit == 1:
            raise ValueError("source sdd is in pixels: unit m needs metres_per_unit, how many metres a pixel is")
        if self.unit == "px" and self.metres_per_unit != 1:
            raise ValueError("metres_per_unit makes metres, but unit is px; set unit: m, or remove metres_per_unit")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"columns: expected four different ones (frame, id, x, y), found {list(self.columns)}")
        if len(set(self.paces)) < len(self.paces):
            raise ValueError(f"paces: expected different ones, found {list(self.paces)}; remove what stands twice")
        if self.resampled and self.paces == ONE_PACE:
            raise ValueError("resampled: expected paces to train for beside it, found none; add paces, or remove it")
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction leave nothing for training; lower them")
        return self


def prepare(section: DataSection) -> Data:
    """Read the source and cut its windows. Raises DataError, DownloadError.

    Arrays: ``observed`` (N, observe, 2) and ``future`` (N, predict, 2) float32 in ``info["unit"]``, world coordinates;
    int64 (N,): ``scene``, an index into ``meta["scenes"]``, ``agent``, and ``frame``, the window's first. Training
    windows come pace by pace.
    """
    parts, note = READERS[section.source](section)
    if section.validation == "train":
        parts["train"] = parts["train"] + parts["val"]
        note = "; ".join([*filter(None, [note]), TRAINED_VALIDATION])
    if section.walk_axis is not None:
        parts = _turned(section.walk_axis, parts)
        note = "; ".join([*filter(None, [note]), TURNED])
    info = {key: getattr(section, key) for key in ("source", "unit", "observe", "predict", "seconds_per_step")}
    info |= {"walk_axis": True} if section.walk_axis is not None else {}
    counts, splits, lost = {}, {}, list[str]()
    for name in PARTS:
        splits[name], counts[name], without = _cut(section, name, parts[name])
        lost += without
    if section.source in ("files", "sdd"):
        more = [f"{len(lost) - NAMED} more recordings with such people"] if len(lost) > NAMED else []
        note = "; ".join([*filter(None, [note]), *lost[:NAMED], *more]) or None
    if section.source != "simulator" and (share := repeated_steps(parts["train"])) > OFTEN:
        note = "; ".join([*filter(None, [note]), INTERPOLATED.format(share=share, unit=section.unit)])
    if section.source != "simulator" and (way := way_note(splits["test"], section.walk_axis is not None)):
        note = "; ".join([*filter(None, [note]), way])
    if section.train_samples is not None:
        train = splits["train"]
        if section.train_samples > len(train):
            raise DataError(
                f"data.train_samples: expected at most {len(train)} (the training windows of source {section.source}), "
                f"found {section.train_samples}; lower it or remove the key"
            )
        splits["train"] = train.select(np.arange(section.train_samples) * len(train) // section.train_samples)
    return Data(splits, info | {"note": note, "counts": counts})


def _turned(axes: Mapping[str, float], parts: Recordings) -> Recordings:
    """Every recording whose name holds one of ``axes`` turned back by so many degrees."""
    recordings = [recording for part in parts.values() for recording in part]
    for name in axes:
        if not any(name in recording.name for recording in recordings):
            known = sorted({recording.name for recording in recordings})
            raise DataError(f"data.walk_axis: {name}: expected a part of a recording's name, {allowed(name, known)}")

    def back(recording: Recording) -> Recording:
        named = max((name for name in axes if name in recording.name), key=len, default=None)
        return recording if named is None else turned(recording, axes[named])

    return {part: list(map(back, found)) for part, found in parts.items()}


def _cut(section: DataSection, name: str, recordings: Sequence[Recording]) -> tuple[Split, dict[str, int], list[str]]:
    """The split's windows, what gave how many, and of whom a recording has none, in words."""
    length = section.observe + section.predict
    paces = section.paces if name == "train" else ONE_PACE
    cuts: list[tuple[int, float, Integers]] = []
    for pace in paces:
        found = [window_rows(r, section.reach(pace), section.stride, section.least_agents) for r in recordings]
        if not any(map(len, found)):
            raise DataError(_nothing(section, name, recordings, pace))
        cuts += [(k, pace, index) for k, index in enumerate(found)]
    rows = [
        np.concatenate([index.ravel() for _, _, index in cuts[k :: len(recordings)]]) for k in range(len(recordings))
    ]
    counts = {
        "recordings": len(recordings),
        "recordings_without_window": sum(not len(index) for index in rows),
        "agents": sum(len(np.unique(r.agent)) for r in recordings),
        "rows": sum(map(len, recordings)),
        "windows": sum(len(index) for _, _, index in cuts),
    }
    used = [(len(np.unique(r.agent[index])), len(np.unique(index))) for r, index in zip(recordings, rows, strict=True)]
    counts["agents_without_window"] = counts["agents"] - sum(agents for agents, _ in used)
    counts["rows_without_window"] = counts["rows"] - sum(points for _, points in used)
    tracks = [at_pace(recordings[k].xy[index], length, pace, section.now) for k, pace, index in cuts]
    xy = np.concatenate(tracks).astype(np.float32)
    first = [(k, index[:, 0]) for k, _, index in cuts]
    arrays: Arrays = {
        "observed": xy[:, : section.observe],
        "future": xy[:, section.observe :],
        "scene": np.repeat([k for k, _ in first], [len(index) for _, index in first]),
        "agent": np.concatenate([recordings[k].agent[index] for k, index in first]),
        "frame": np.concatenate([recordings[k].frame[index] for k, index in first]),
    }
    meta = {"unit": section.unit, "seconds_per_step": section.seconds_per_step}
    steps = section.reach(min(paces))
    lost = [why for r, index in zip(recordings, rows, strict=True) if (why := _lost(section, name, r, index, steps))]
    return Split(arrays, ("observed",), {"scenes": [r.name for r in recordings], **meta}), counts, lost


def _nothing(section: DataSection, part: str, recordings: Sequence[Recording], pace: float) -> str:
    """That no recording has a window at ``pace``, and what to do."""
    longest = max((longest_run(r) for r in recordings if len(r)), default=0)
    asked = "data.observe + data.predict" + (f", at {pace:g} of data.paces" if pace != 1 else "")
    rule = " shared by 2 people" if section.least_agents == 2 else ""
    lower = "data.predict, data.paces or data.stride" if pace > 1 else "data.predict or data.stride"
    share = f"raise data.{part}_fraction, " if section.source in MEANT_FOR.get(f"{part}_fraction", ()) else ""
    steps = math.gcd(*(int(np.gcd.reduce(np.diff(np.unique(r.frame)))) for r in recordings if len(r) > 1))
    wider = f" (it is {steps} or a fraction of it)" if steps > section.frame_step else ""
    return (
        f"{section.source}, split {part}: expected a window of {section.reach(pace)} steps "
        f"({asked}){rule}, found none in {', '.join(r.name for r in recordings)}: the longest track without a gap has "
        f"{longest} at {section.frame_step} frame ids a step; check data.frame_step{wider}, lower {lower}, {share}or "
        "give longer recordings"
    )


def _lost(section: DataSection, part: str, recording: Recording, index: Integers, steps: int) -> str | None:
    """Of whom ``recording`` has no window; ``index`` are the rows of its windows, which take ``steps`` at least."""
    people = np.setdiff1d(recording.agent, recording.agent[index])
    if not len(people):
        return None
    why = f"{steps} steps without a gap"
    why += f" at stride {section.stride}" if section.stride > 1 else ""
    why += " shared by 2 people" if section.least_agents > 1 else ""
    frames = recording.frame[recording.agent == people[0]]
    return (
        f"{part}, {recording.name}: no window of {why} for {len(people)} of {len(np.unique(recording.agent))} people "
        f"(id {people[0]}, frames {frames[0]} to {frames[-1]}, is the first)"
    )


def files_state(section: DataSection) -> str | None:
    """A digest of names and contents of the user's own track files; None where the source is public."""
    if section.source == "files":
        root = Path(section.path or "").expanduser()
    elif section.source == "sdd":
        root = _place(section, "sdd")
    else:
        return None
    below = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
    places = [root] if root.is_file() else below
    return digest([[path.relative_to(root).as_posix(), sha256(path)] for path in places]) if places else None


def _simulated(section: DataSection) -> tuple[Recordings, str | None]:
    made = simulate(section.recordings, section.seconds, section.seed)
    return _by_time(section, {"train": made}), "simulated pedestrians: results say nothing about real ones"


def _eth_ucy(section: DataSection) -> tuple[Recordings, str | None]:
    root = _place(section, "eth_ucy")
    remotes = {Path(*remote.url.split("/")[-3:]): remote for remote in PUBLIC[f"eth_ucy/{section.scene}"]}
    missing = [place for place in remotes if not (root / place).is_file()]
    if missing and not section.download:
        home = next(iter(remotes.values())).url.rsplit("/", 3)[0]
        raise DataError(
            f"eth_ucy: expected {len(remotes)} files <scene>/<split>/<recording>.txt under {root}, {len(missing)} are "
            f"missing, {missing[0]} first. Set EDGESTILL_DATA (or data.path) to a folder that has them in "
            f"trajectory/eth_ucy, or data.download=true to fetch "
            f"{sum(remotes[place].size for place in missing) / 1e6:.1f} MB from {home}"
        )
    for place in missing:
        fetch(remotes[place].url, root / place, remotes[place].sha256, remotes[place].size)
    notes = [ETH_STEPS] if section.scene == "eth" else []
    if other := [str(place) for place, remote in remotes.items() if sha256(root / place) != remote.sha256]:
        notes.append(f"{', '.join(other)} are not the public files: results do not compare with published ones")
    parts = {
        part: [_read(section, root / place) for place in sorted(remotes) if place.parts[1] == part] for part in PARTS
    }
    if section.validation == "test":
        parts = {"train": parts["train"] + parts["val"], "val": parts["test"], "test": parts["test"]}
        notes.append(TEST_VALIDATION)
    return parts, "; ".join(notes) or None


def _sdd(section: DataSection) -> tuple[Recordings, str | None]:
    root = _place(section, "sdd")
    if not all((root / part).is_dir() for part in ("train", "test")):
        raise DataError(
            f"sdd: expected {root}/train and {root}/test with text files of rows 'frame id x y' in pixels, found none. "
            "edgestill cannot download them: take the Stanford drone tracks of the TrajNet split that PECNet and Y-Net "
            "use (github.com/HarshayuGirase/Human-Path-Prediction names its copy; write pickled tables as text), and "
            "set EDGESTILL_DATA or data.path to the folder with trajectory/sdd"
        )
    parts = {part: _folder(section, root / part) for part in PARTS if (root / part).is_dir()}
    if "val" not in parts:
        agents = [np.unique(r.agent) for r in parts["train"]]
        order = np.random.default_rng(section.seed).permutation(sum(map(len, agents)))
        drawn = np.split(
            order < max(1, round(section.val_fraction * len(order))), np.cumsum(list(map(len, agents)))[:-1]
        )
        held = [np.isin(r.agent, a[d]) for r, a, d in zip(parts["train"], agents, drawn, strict=True)]
        pairs = list(zip(parts["train"], held, strict=True))
        parts["val"] = [r.select(h) for r, h in pairs if h.any()]
        parts["train"] = [r.select(~h) for r, h in pairs if not h.all()]
    return parts, None


def _files(section: DataSection) -> tuple[Recordings, str | None]:
    root = Path(section.path or "").expanduser()
    if root.is_file():
        return _by_time(section, {"train": [_read(section, root)]}), None
    if not root.is_dir():
        raise DataError(f"data.path {root}: expected a track file or a folder of them, found nothing; correct it")
    folders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    if not folders:
        return _by_time(section, {"train": _folder(section, root)}), None
    if other := sorted(set(folders) - set(PARTS)):
        raise DataError(
            f"{root / other[0]}: expected only folders train, val and test (or track files alone); rename or remove it"
        )
    if "train" not in folders:
        raise DataError(f"{root}: expected a folder train beside {', '.join(folders)}; add it")
    beside = [path.name for path in sorted(root.iterdir()) if path.suffix.lower() in SUFFIXES and path.is_file()]
    note = f"not read, since it lies beside the folders: {', '.join(beside)}" if beside else None
    return _by_time(section, {part: _folder(section, folder) for part, folder in folders.items()}), note


READERS: Mapping[str, Callable[[DataSection], tuple[Recordings, str | None]]] = {
    "simulator": _simulated,
    "eth_ucy": _eth_ucy,
    "sdd": _sdd,
    "files": _files,
}


def _by_time(section: DataSection, parts: Recordings) -> Recordings:
    """What is missing of val and test, cut from the end of every training recording, test last: no window straddles."""
    shares = {part: getattr(section, f"{part}_fraction") for part in ("val", "test") if part not in parts}
    names = ["train", *shares]
    cut: Recordings = {name: [] for name in names}
    for recording in parts["train"]:
        edges = np.rint(np.cumsum([1 - sum(shares.values()), *shares.values()])[:-1] * len(recording)).astype(np.int64)
        frames = recording.frame[np.minimum(edges, len(recording) - 1)]
        part = np.searchsorted(frames, recording.frame, side="right")
        for k, name in enumerate(names):
            cut[name].append(recording.select(part == k))
    return parts | cut


def _place(section: DataSection, name: str) -> Path:
    """The folder of a public source: ``trajectory/<name>`` under the data folder, or ``<name>`` where that exists."""
    root = data_root(section.path)
    return next(
        (root / place for place in (f"trajectory/{name}", name) if (root / place).is_dir()), root / "trajectory" / name
    )


def _folder(section: DataSection, folder: Path) -> list[Recording]:
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in files:
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            raise DataError(f"{path}: expected track files ({', '.join(SUFFIXES)}); rename it, or move it elsewhere")
    if not files:
        raise DataError(f"{folder}: expected track files ({', '.join(SUFFIXES)}), found none; add some")
    stems = Counter(path.stem for path in files)
    found = [(path, _read(section, path)) for path in files]
    return [replace(recording, name=path.name) if stems[path.stem] > 1 else recording for path, recording in found]


def _read(section: DataSection, path: Path) -> Recording:
    return read_tracks(path, section.columns, section.frame_step, section.metres_per_unit)
