"""The stages before a trajectory student: a PPT that teaches, and what it predicts for every training window."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from toolchain.artifact import (
    ArtifactError,
    EdgestillError,
    Manifest,
    create,
    inputs_of,
    is_whole,
    read,
    verify,
    versions,
)
from toolchain.checkpoint import save_tensors
from toolchain.config import validate
from toolchain.stage import Job, console, progress
from toolchain.tasks import load_data, trajectory, unit_of
from toolchain.tasks.backbones import WEIGHTS
from toolchain.tasks.nets import count_parameters
from toolchain.tasks.trajectory_batches import EVALUATION_BATCH, normalised, scores
from toolchain.tasks.trajectory_batches import versions as versions_of
from toolchain.tasks.trajectory_ensemble import Ensemble

FIELDS = ("paths", "feature")


class TeacherError(EdgestillError):
    """The teacher asked for cannot teach here."""


def teach(job: Job) -> None:
    """Stage ``teacher``: train the PPT of the teacher section, or copy a finished one's weights; and of an ensemble."""
    from accelerate import PartialState

    from toolchain.distill import train_student
    from toolchain.train import read_metrics

    section = trajectory.TeacherSection.model_validate(job.config["teacher"])
    data = load_data(job.inputs["data"])
    unit = data.info["unit"]
    manifest, members = check_finished(section, job.config, unit, job.inputs["data"])
    if section.folder is not None and manifest is not None:
        net, val = trajectory.load_student(section.folder), manifest.metrics["val"]
        log, stages = _log(Path(section.folder)), manifest.extra.get("stages", [])
    else:
        config = {key: job.config[key] for key in ("seed", "task", "data")}
        given = section.model_dump(mode="json", include={"student", "method", "train"})
        inner = {key: value for key, value in given.items() if value is not None}
        cfg = validate({"name": "teacher", "method": "ppt", "train": trajectory.PUBLISHED} | config | inner)
        trained = train_student(cfg, data, {"data": job.inputs["data"]}, job.work)
        net, val, log, stages = trained.student, trained.val, read_metrics(trained.run), trained.run.records
    if not PartialState().is_main_process:
        return
    if section.merges:
        net = Ensemble([net, *map(trajectory.load_student, section.ensemble)], mirrored=section.mirrored)  # type: ignore[list-item]
        device = PartialState().device
        scale = section.student.scale_of(unit)
        val = scores(net.to(device), data.splits["val"], scale, device, trajectory)
    with create(job.out, stage=job.stage, config=job.config, inputs=job.inputs) as draft:
        save_tensors(draft.path / WEIGHTS, net.state_dict())
        if log:
            (draft.path / "train.jsonl").write_text(log, encoding="utf-8")
        draft.metrics = {"val": val}
        draft.versions = versions("torch", "accelerate", "safetensors", "numpy")
        draft.extra = {"info": data.info, "parameters": count_parameters(net), "stages": stages}
        named = {"teacher.folder": section.folder} if section.folder is not None else {}
        named |= {f"teacher.ensemble[{k}]": folder for k, folder in enumerate(section.ensemble)}
        draft.extra["sources"] = inputs_of({role: Path(folder) for role, folder in named.items()})
        if section.merges:
            draft.extra["ensemble"] = [member.model_dump(mode="json") for member in members]
    metres = unit_of(trajectory, data.info)
    shown = ", ".join(f"{name} {value:.{trajectory.DIGITS}f} {metres}" for name, value in list(val.items())[:2])
    console.print(f"    teacher: {count_parameters(net):,} parameters, validation {shown}", markup=False)


def check_finished(
    section: Any, config: Mapping[str, Any], unit: str, data: Path | None = None
) -> tuple[Manifest | None, list[Any]]:
    """The manifest of ``folder`` and the networks of ``ensemble``, after checking that they can teach here.

    ``config`` has the run's sections ``data`` and ``files``; without the folder of the ``data`` it is not checked that
    the user's own files are still those. Raises TeacherError.
    """
    manifest = None
    if section.folder is not None:
        manifest = _finished("folder", Path(section.folder), config, data)
        ours, theirs = (
            net.model_dump(exclude={"max_parameters"}) | {"scale": net.scale_of(unit)}
            for net in (section.student, trajectory.network_of(manifest.config))
        )
        if differing := [f"{key} {theirs[key]}, not {ours[key]}" for key in ours if ours[key] != theirs[key]]:
            raise TeacherError(
                f"teacher.folder {section.folder}: another network than teacher.student says: it has "
                f"{'; '.join(differing)}; copy its student section"
            )
    return manifest, [_member(Path(folder), section, config, unit, data) for folder in section.ensemble]


def _finished(key: str, folder: Path, config: Mapping[str, Any], data: Path | None) -> Manifest:
    """Of a finished PPT, after checking that it is one and never saw this run's test split."""
    if not is_whole(folder):
        raise TeacherError(
            f"teacher.{key}: expected the student folder of a run of method ppt, found nothing whole at {folder}"
        )
    manifest = verify(folder)
    found = (manifest.config.get("method") or {}).get("name")
    if found != "ppt":
        raise TeacherError(f"teacher.{key} {folder}: expected a student of method ppt, found {found or manifest.stage}")
    ours, theirs = config["data"], manifest.config["data"]
    differing = sorted(key for key in {*ours, *theirs} - {"download"} if ours.get(key) != theirs.get(key))
    if (
        not differing
        and data
        and config.get("files", {}).get("data")
        and manifest.inputs["data"]["id"] != read(data).id
    ):
        differing.append("the files")
    if differing:
        raise TeacherError(
            f"teacher.{key} {folder}: trained on other data ({', '.join(differing)} differ); give a teacher "
            "trained on the same data section, which never saw this run's test split"
        )
    return manifest


def _member(folder: Path, teacher: Any, config: Mapping[str, Any], unit: str, data: Path | None) -> Any:
    """The network of a further PPT of the ensemble, after checking that its paths can be merged."""
    found = trajectory.network_of(_finished("ensemble", folder, config, data).config)
    for what, ours, theirs in (
        ("hypotheses", teacher.student.hypotheses, found.hypotheses),
        ("scale", teacher.student.scale_of(unit), found.scale_of(unit)),
    ):
        if ours != theirs:
            raise TeacherError(
                f"teacher.ensemble {folder}: expected the {what} of teacher.student, {ours:g}, found {theirs:g}; "
                "its paths cannot be merged with the others; remove it, or train it anew with that"
            )
    return found


def _log(folder: Path) -> str:
    path = folder / "train.jsonl"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def predictions(job: Job) -> None:
    """Stage ``predictions``: ``paths`` (V, N, K, T_p, 2) float32 scaled and ``feature`` (V, N, d) of each version."""
    from accelerate import PartialState

    section = trajectory.TeacherSection.model_validate(job.config["teacher"])
    train = load_data(job.inputs["data"]).splits["train"]
    net, device = trajectory.load_teacher(job.inputs["teacher"]).to(PartialState().device), PartialState().device
    info = load_data(job.inputs["data"]).info
    axis = job.config["data"].get("walk_axis") is not None
    tracks = normalised(train, section.student.scale_of(info["unit"]))
    tracks = versions_of(tracks, section.versions, rotate=section.rotate, axis=axis)
    observe, count = int(info["observe"]), len(train)
    size = EVALUATION_BATCH.get(device.type, 1024)
    with create(job.out, stage=job.stage, config=job.config, inputs=job.inputs) as draft:
        shapes = {"paths": (section.student.hypotheses, int(info["predict"]), 2), "feature": (section.student.width,)}
        files = {
            name: np.lib.format.open_memmap(draft.path / f"{name}.npy", "w+", np.float32, (len(tracks), count, *shape))
            for name, shape in shapes.items()
        }
        with torch.inference_mode(), progress("the teacher's predictions", len(tracks) * count) as bar:
            for version in range(len(tracks)):
                for start in range(0, count, size):
                    observed = torch.from_numpy(tracks[version, start : start + size, :observe]).to(device)
                    paths, _, feature = net.with_feature(observed)  # type: ignore[operator]
                    files["paths"][version, start : start + size] = paths.cpu().numpy()
                    files["feature"][version, start : start + size] = feature.cpu().numpy()
                    bar.advance(len(observed))
        for file in files.values():
            file.flush()
        draft.versions = versions("torch", "numpy")


def load_predictions(folder: Path, data_folder: Path, config: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The teacher's predictions, memory-mapped. Raises ArtifactError when they are of other data or another teacher."""
    manifest = read(folder)
    if manifest.inputs["data"]["id"] != read(data_folder).id or any(
        manifest.config[key] != value for key, value in config.items()
    ):
        raise ArtifactError(f"{folder}: made of other data or another teacher; run its stage again")
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in FIELDS}
