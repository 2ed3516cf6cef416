"""The stages before a trajectory student: a PPT that teaches, and its predictions."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.toolchain.methods.doubles import same, weights
from tests.toolchain.methods.walks import METHOD, NET, OBSERVE, PREDICT, WIDTH, K, config, tiny_run, write_data
from toolchain import artifact
from toolchain.artifact import ArtifactError
from toolchain.commands import lineage
from toolchain.distill import run as distil
from toolchain.stage import Job
from toolchain.tasks import load_data, trajectory
from toolchain.tasks.trajectory_batches import normalised, versions
from toolchain.tasks.trajectory_ensemble import Ensemble
from toolchain.tasks.trajectory_teacher import TeacherError, load_predictions

TEACHER: dict[str, Any] = {
    "student": {"model": "ppt", **NET},
    "method": METHOD,
    "train": {"batch_size": 8, "weight_decay": 0.0, "threads": 1},
}


def sections(**teacher: Any) -> dict[str, Any]:
    cfg = config({"name": "ppt_student"}, teacher=teacher or TEACHER)
    return cfg.section("seed", "task", "data", "teacher")


def finished(root: Path, **changes: Any) -> Path:
    """The student folder of a run of ``method``, here ppt."""
    cfg = config(changes.pop("method", METHOD), student=changes.pop("student", None), **changes)
    keys = ("seed", "task", "data", "teacher", "student", "method", "train")
    distil(Job("student", root / "student", cfg.section(*keys), {"data": root / "data"}))
    return root / "student"


def made_of(root: Path, **teacher: Any) -> Path:
    job = Job("teacher", root / "teacher", sections(**teacher), {"data": root / "data"})
    trajectory.teacher(job)
    return job.out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("run")
    write_data(folder / "data")
    made_of(folder)
    inputs = {name: folder / name for name in ("data", "teacher")}
    trajectory.predictions(Job("predictions", folder / "predictions", sections(), inputs))
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of method ppt on the same data."""
    folder: Path = tmp_path_factory.mktemp("other")
    write_data(folder / "data")
    finished(folder)
    return folder


def test_the_teacher_is_a_ppt_trained_in_all_its_stages(root: Path) -> None:
    manifest = artifact.verify(root / "teacher")
    assert [stage["name"] for stage in manifest.extra["stages"]] == [
        "I-next-position",
        "IIa-warmup",
        "IIb-destination",
        "III-complete",
    ]
    assert {"minADE", "minFDE", "topADE"} <= manifest.metrics["val"].keys()
    assert (root / "teacher" / "train.jsonl").read_text().count("\n") == 6
    net = trajectory.load_teacher(root / "teacher")
    assert not net.training
    assert manifest.extra["parameters"] == sum(parameter.numel() for parameter in net.parameters())


STREET: dict[str, Any] = {"source": "simulator", "walk_axis": {}}


@pytest.mark.parametrize(
    ("keys", "data", "count"),
    [({}, {}, 5), ({"versions": 2}, {}, 2), ({"versions": 2, "rotate": True}, {}, 2), ({}, {"data": STREET}, 4)],
)
def test_predictions_are_what_the_teacher_says_live_for_the_version_that_is_shown(
    root: Path, tmp_path: Path, keys: dict[str, Any], data: dict[str, Any], count: int
) -> None:
    inputs = {name: root / name for name in ("data", "teacher")}
    turns = {"method": TEACHER["method"] | {"rotate": True}} if "rotate" in keys else {}
    cfg = config({"name": "ppt_student"}, teacher=TEACHER | keys | turns, **data)
    own = cfg.section("seed", "task", "data", "teacher")
    trajectory.predictions(Job("predictions", tmp_path / "predictions", own, inputs))
    inputs["predictions"] = tmp_path / "predictions"
    run = tiny_run(tmp_path, cfg, inputs)
    net: Any = trajectory.load_teacher(root / "teacher")
    shown = set()
    batches = run.batches("paths", "feature")
    for epoch in range(3):
        shown |= set(batches.version_of(epoch).tolist())
        for batch in batches.epoch(epoch):
            assert batch["paths"].shape == (8, K, PREDICT, 2)
            assert batch["feature"].shape == (8, WIDTH)
            observed = batch["track"][:, :OBSERVE]
            with torch.no_grad():
                torch.testing.assert_close(batch["paths"], net(observed)[0], atol=1e-3, rtol=1e-4)
                torch.testing.assert_close(batch["feature"], net.destination.feature(observed), atol=1e-4, rtol=1e-4)
    assert shown == set(range(count))


def test_predictions_of_other_data_or_another_teacher_are_refused(root: Path, tmp_path: Path) -> None:
    cfg = config({"name": "ppt_student"}, teacher=TEACHER).section("data", "teacher")
    found = load_predictions(root / "predictions", root / "data", cfg)
    assert {name: value.shape for name, value in found.items()} == {
        "paths": (5, 24, K, PREDICT, 2),
        "feature": (5, 24, WIDTH),
    }
    foreign = write_data(tmp_path / "data", seed=9)
    with pytest.raises(ArtifactError, match="of other data or another teacher; run its stage again"):
        load_predictions(root / "predictions", foreign, cfg)
    changed = config({"name": "ppt_student"}, teacher=TEACHER | {"train": {"batch_size": 4}})
    with pytest.raises(ArtifactError, match="of other data or another teacher"):
        load_predictions(root / "predictions", root / "data", changed.section("data", "teacher"))
    assert np.isfinite(found["paths"]).all()


def test_a_finished_ppt_teaches_without_training(root: Path, other: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    made = made_of(tmp_path, folder=str(other / "student"), student=TEACHER["student"])
    assert same(weights(trajectory.load_teacher(made)), weights(trajectory.load_student(other / "student")))
    source, manifest = artifact.read(other / "student"), artifact.verify(made)
    assert manifest.metrics["val"] == source.metrics["val"]
    assert manifest.extra["stages"] == source.extra["stages"]
    assert (made / "train.jsonl").read_text() == (other / "student" / "train.jsonl").read_text()


def test_the_teachers_scores_are_those_of_its_paths(root: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, config({"name": "ppt_student"}, teacher=TEACHER), {"teacher": root / "teacher"})
    assert trajectory.teacher_scores(run, "val") == pytest.approx(artifact.read(root / "teacher").metrics["val"])
    assert trajectory.teacher_scores(run, "test") != trajectory.teacher_scores(run, "val")


def nothing(root: Path, other: Path) -> tuple[Path, dict[str, Any]]:
    return root / "missing", TEACHER["student"]


def data_folder(root: Path, other: Path) -> tuple[Path, dict[str, Any]]:
    return other / "data", TEACHER["student"]


def plain_student(root: Path, other: Path) -> tuple[Path, dict[str, Any]]:
    method = {"name": "ppt_student", "paths": 0, "destinations": 0, "features": 0}
    return finished(root, method=method), TEACHER["student"]


def other_network(root: Path, other: Path) -> tuple[Path, dict[str, Any]]:
    return other / "student", TEACHER["student"] | {"depth": 1}


def other_data(root: Path, other: Path) -> tuple[Path, dict[str, Any]]:
    return finished(root, data={"source": "simulator", "seed": 4}), TEACHER["student"]


def selected_by_the_test_split(root: Path, other: Path) -> tuple[Path, dict[str, Any]]:
    data = {"source": "eth_ucy", "scene": "zara1", "validation": "test"}
    return finished(root, data=data, train={"select": "best", "epochs": 1}), TEACHER["student"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, "expected the student folder of a run of method ppt, found nothing whole at"),
        (data_folder, "expected a student of method ppt, found data"),
        (plain_student, "expected a student of method ppt, found ppt_student"),
        (other_network, "another network than teacher.student says: it has depth 2, not 1; copy its student section"),
        (selected_by_the_test_split, "trained on other data (scene, source, validation differ)"),
        (other_data, "trained on other data (seed differ); give a teacher trained on the same data section"),
    ],
)
def test_a_folder_that_cannot_teach_here_is_refused(
    make: Callable[[Path, Path], tuple[Path, dict[str, Any]]], message: str, other: Path, tmp_path: Path
) -> None:
    write_data(tmp_path / "data")
    folder, network = make(tmp_path, other)
    with pytest.raises(TeacherError, match=re.escape(message)):
        made_of(tmp_path, folder=str(folder), student=network)
    assert not (tmp_path / "teacher").exists()
    cfg = config({"name": "ppt_student"}, teacher={"folder": str(folder), "student": network})
    with pytest.raises(TeacherError, match=re.escape(message)):
        trajectory.dry_run(cfg, load_data(tmp_path / "data"))


def test_what_changes_neither_data_nor_network_is_no_difference(other: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    network = TEACHER["student"] | {"scale": 30.0, "max_parameters": 10**6}
    chosen = sections(folder=str(other / "student"), student=network)
    chosen["data"] = chosen["data"] | {"download": True}
    trajectory.teacher(Job("teacher", tmp_path / "teacher", chosen, {"data": tmp_path / "data"}))
    assert artifact.verify(tmp_path / "teacher").extra["sources"]


def test_a_teachers_null_is_not_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolchain import distill

    write_data(tmp_path / "data")
    seen: list[Any] = []

    def stop(cfg: Any, *rest: Any) -> None:
        seen.append(cfg.train.clip)
        raise TeacherError("enough")

    monkeypatch.setattr(distill, "train_student", stop)
    for clip in (None, 0.5):
        with pytest.raises(TeacherError, match="enough"):
            made_of(tmp_path, **TEACHER | {"train": TEACHER["train"] | {"clip": clip}})
    assert seen == [None, 0.5]


def test_a_teacher_of_files_that_have_changed_is_refused(other: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data", seed=9)
    chosen = sections(folder=str(other / "student"), student=TEACHER["student"])
    job = Job("teacher", tmp_path / "teacher", chosen, {"data": tmp_path / "data"})
    changed = dataclasses.replace(job, config=chosen | {"files": {"data": "their state"}})
    with pytest.raises(TeacherError, match=r"trained on other data \(the files differ\)"):
        trajectory.teacher(changed)
    trajectory.teacher(dataclasses.replace(changed, inputs={"data": other / "data"}))


# --- an ensemble


def test_a_dry_run_tells_an_ensemble(other: Path) -> None:
    teacher = TEACHER | {"ensemble": [str(other / "student")], "mirrored": True}
    shown = trajectory.dry_run(config({"name": "ppt_student"}, teacher=teacher), load_data(other / "data"))
    words = f"{K} hypotheses; its paths merged with those of 1 more and those for the mirror image"
    assert shown["teacher"].endswith(words)


def ensemble(other: Path, **keys: Any) -> dict[str, Any]:
    return {"folder": str(other / "student"), "student": TEACHER["student"], **keys}


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory, other: Path) -> Path:
    """Another finished run of method ppt on the data of ``other``, of another network."""
    folder: Path = tmp_path_factory.mktemp("more")
    (folder / "data").symlink_to(other / "data")
    return finished(folder, student={"model": "ppt", **NET, "width": 12, "speed_floor": 0.3}, seed=3)


@pytest.mark.parametrize("mirrored", [False, True])
def test_an_ensemble_teaches_with_the_merged_paths_of_all(
    other: Path, more: Path, tmp_path: Path, mirrored: bool
) -> None:
    write_data(tmp_path / "data")
    keys = ensemble(other, ensemble=[str(more)], mirrored=mirrored, versions=1)
    made = made_of(tmp_path, **keys)
    net: Any = trajectory.load_teacher(made)
    first, second = (trajectory.load_student(folder) for folder in (other / "student", more))
    assert same(weights(net.members[0]), weights(first))
    assert same(weights(net.members[1]), weights(second))
    manifest = artifact.verify(made)
    assert manifest.extra["parameters"] == sum(parameter.numel() for parameter in net.parameters())
    assert [section["width"] for section in manifest.extra["ensemble"]] == [12]
    ours, theirs = manifest.metrics["val"], artifact.read(other / "student").metrics["val"]
    assert ours.keys() == theirs.keys()
    assert ours != theirs
    inputs = {"data": tmp_path / "data", "teacher": made}
    trajectory.predictions(Job("predictions", tmp_path / "predictions", sections(**keys), inputs))
    found = load_predictions(tmp_path / "predictions", tmp_path / "data", sections(**keys))
    observed = torch.from_numpy(versions(normalised(load_data(tmp_path / "data").splits["train"], 30.0), 1)[0])
    with torch.no_grad():
        paths, _ = Ensemble([first, second], mirrored=mirrored).eval()(observed[:, :OBSERVE])  # type: ignore[list-item]
        own, _ = first(observed[:, :OBSERVE])
        feature = net.members[0].destination.feature(observed[:, :OBSERVE])
    np.testing.assert_allclose(found["feature"][0], feature.numpy(), atol=1e-4)
    np.testing.assert_allclose(found["paths"][0], paths.numpy(), atol=1e-3)
    assert np.abs(found["paths"][0] - own.numpy()).max() > 0.01


def test_a_teacher_trained_here_leads_an_ensemble(root: Path, more: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(root / "data")
    net: Any = trajectory.load_teacher(made_of(tmp_path, **TEACHER, ensemble=[str(more)]))
    assert same(weights(net.members[0]), weights(trajectory.load_teacher(root / "teacher")))
    assert same(weights(net.members[1]), weights(trajectory.load_student(more)))
    assert not net.mirrored


def test_the_finished_ppts_are_in_the_lineage_and_are_sought_where_they_were(
    other: Path, more: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").symlink_to(other / "data")
    made = made_of(tmp_path, **ensemble(other, ensemble=[str(more)]))
    states = {found["role"]: found["state"] for found in lineage(made, artifact.read(made))}
    assert states == {"data": "unchanged", "teacher.folder": "unchanged", "teacher.ensemble[0]": "unchanged"}
    gone = made_of(tmp_path, **ensemble(other, ensemble=[str(shutil.copytree(more, tmp_path / "gone" / "student"))]))
    shutil.rmtree(tmp_path / "gone")
    shutil.copytree(other / "student", tmp_path / "student")  # the run's own, where an input would be sought
    states = {found["role"]: found["state"] for found in lineage(gone, artifact.read(gone))}
    assert states["teacher.ensemble[0]"] == "absent"


def test_one_ppt_and_its_mirror_image_are_an_ensemble(other: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(other / "data")
    made = made_of(tmp_path, **ensemble(other, mirrored=True))
    net: Any = trajectory.load_teacher(made)
    assert (len(net.members), net.mirrored) == (1, True)
    assert artifact.read(made).extra["ensemble"] == []


def test_a_member_trained_on_other_data_is_refused(other: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    foreign = finished(tmp_path, data={"source": "simulator", "seed": 4})
    with pytest.raises(TeacherError, match=re.escape(f"teacher.ensemble {foreign}: trained on other data (seed")):
        made_of(tmp_path, **ensemble(other, ensemble=[str(foreign)]))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"hypotheses": 3}, "expected the hypotheses of teacher.student, 4, found 3; its paths cannot be merged"),
        ({"scale": 10.0}, "expected the scale of teacher.student, 30, found 10; its paths cannot be merged"),
        (None, "teacher.ensemble: expected the student folder of a run of method ppt, found nothing whole at"),
    ],
)
def test_a_member_that_cannot_be_merged_is_refused_before_anything_trains(
    network: dict[str, Any] | None, message: str, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolchain.distill.train_student", lambda *_: pytest.fail("trained"))
    write_data(tmp_path / "data")
    folder = tmp_path / "student"
    if network is not None:
        config = {"method": {"name": "ppt"}, "data": sections()["data"], "student": {"model": "ppt", **NET} | network}
        with artifact.create(folder, stage="student", config=config):
            pass
    with pytest.raises(TeacherError, match=re.escape(message)):
        made_of(tmp_path, **TEACHER, ensemble=[str(folder)])
