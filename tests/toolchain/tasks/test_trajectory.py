from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolchain import artifact
from toolchain.artifact import EdgestillError
from toolchain.config import load, validate
from toolchain.faults import ConfigError
from toolchain.tasks import Data, Split, load_task, trajectory
from toolchain.tasks.trajectory import StudentSection, TeacherSection

CONFIGS = Path(__file__).parents[3] / "configs"
DEMO = CONFIGS / "trajectory_demo.yaml"
PPT: dict[str, Any] = {
    "name": "mine",
    "task": "trajectory",
    "data": {"source": "simulator"},
    "method": "ppt",
    "student": {"model": "ppt"},
    "compile": {"backend": "none"},
}


def outputs(seed: int = 0, count: int = 6, hypotheses: int = 5) -> tuple[dict[str, np.ndarray], Split]:
    rng = np.random.default_rng(seed)
    paths = rng.normal(size=(count, hypotheses, 12, 2)).cumsum(2).astype(np.float32)
    probability = rng.dirichlet(np.ones(hypotheses), count).astype(np.float32)
    future = rng.normal(size=(count, 12, 2)).cumsum(1).astype(np.float32)
    return {"trajectories": paths, "probability": probability}, Split({"future": future}, ())


# --- scores


def test_scores_are_the_least_the_mean_and_those_of_the_most_probable() -> None:
    found, split = outputs()
    scores = trajectory.score(found, split)
    assert list(scores) == ["minADE", "minFDE", "meanADE", "meanFDE", "topADE", "topFDE"]
    assert next(iter(scores)) == trajectory.HEADLINE
    distance = np.linalg.norm(found["trajectories"] - split.arrays["future"][:, None], axis=-1)
    top = [row.argmax() for row in found["probability"]]
    assert scores["topADE"] == pytest.approx(np.mean([distance[i, k].mean() for i, k in enumerate(top)]))
    assert scores["topFDE"] == pytest.approx(np.mean([distance[i, k, -1] for i, k in enumerate(top)]))
    assert scores["minADE"] == pytest.approx(distance.mean(2).min(1).mean())
    assert scores["minFDE"] == pytest.approx(distance[:, :, -1].min(1).mean())
    order = [2, 4, 0, 1, 3]
    permuted = {name: value[:, order] for name, value in found.items()}
    assert trajectory.score(permuted, split) == pytest.approx(scores)


def test_the_interval_is_of_other_people() -> None:
    found, split = outputs(count=60)
    split.arrays |= {"scene": np.arange(60) % 2, "agent": np.arange(60) // 2}
    low, high = trajectory.interval(found, split) or (0.0, 0.0)
    assert low < trajectory.score(found, split)["minADE"] < high
    again = {name: value.repeat(5, 0) for name, value in found.items()}
    longer = Split({name: value.repeat(5, 0) for name, value in split.arrays.items()}, ())
    assert trajectory.interval(again, longer) == pytest.approx((low, high)), "more windows of them tell nothing new"
    split.arrays |= {"scene": np.zeros(60), "agent": np.zeros(60)}
    assert trajectory.interval(found, split) is None


def test_agreement_is_the_share_of_positions_within_one_percent_of_the_way() -> None:
    found, _ = outputs()
    travelled = np.linalg.norm(np.diff(found["trajectories"], axis=2), axis=-1).sum(2).mean()
    other = {"trajectories": found["trajectories"].copy()}
    assert trajectory.agreement(found, other) == 1
    other["trajectories"][:, :, :6, 0] += 0.009 * travelled
    assert trajectory.agreement(found, other) == 1
    other["trajectories"][:, :, :3, 1] += 0.009 * travelled
    assert trajectory.agreement(found, other) == pytest.approx(0.75)
    with pytest.raises(Exception, match="two non-empty arrays of one shape"):
        trajectory.agreement(found, {"trajectories": found["trajectories"][:3]})


# --- sections


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"width": 10, "heads": 4}, "width 10 is no multiple of heads 4"),
        ({"options": {"a": 1}}, "options are for a function of your own"),
        ({"model": "nets:mine", "speed_floor": 0.05}, "speed_floor is for ppt and one_shot; nets:mine normalises"),
        ({"model": "nets:mine", "align_heading": True}, "align_heading is for ppt and one_shot; nets:mine normalises"),
        ({"model": "resnet18"}, "should match pattern"),
        ({"scale": 0}, "greater than 0"),
    ],
)
def test_networks_that_make_no_sense_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudentSection(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"student": {"model": "one_shot"}}, "expected student.model ppt, found one_shot"),
        ({"method": {"branches": 1}}, "needs a teacher of its own"),
        ({"folder": "runs/ppt/student", "train": {"epochs": 3}}, "remove method and train, or remove folder"),
        ({"method": {"name": "plain"}}, "ppt"),
        ({"train": {"processes": 2}}, "processes"),
        ({"student": {"model": "ppt", "hypotheses": 5}, "method": {"winners": 6}}, "at most the 5 hypotheses, found 6"),
        ({"versions": 6}, "versions"),
        ({"folder": "runs/a/student", "ensemble": ["runs/a/student"]}, "remove what is named twice"),
        ({"ensemble": ["runs/a/student", "runs/a/student"]}, "remove what is named twice"),
        ({"folder": "runs/a/student", "ensemble": ["./runs/a/student/"]}, "remove what is named twice"),
    ],
)
def test_teachers_that_make_no_sense_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherSection(**keys)


def test_what_a_teachers_recipe_leaves_out_is_as_published() -> None:
    train = TeacherSection(train={"batch_size": 512}).train
    assert train is not None
    assert train.batch_size == 512
    assert (train.schedule, train.weight_decay, train.warmup) == ("constant", 0, 0)


def test_metres_are_scaled_to_the_published_pixels_and_pixels_are_kept() -> None:
    section = StudentSection()
    assert (section.scale_of("m"), section.scale_of("px")) == (30, 1)
    assert StudentSection(scale=10).scale_of("m") == 10


# --- faults between sections


def fault(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("path", "overrides", "key", "message"),
    [
        ("trajectory_demo", ["method=prockd"], "method", "prockd is for pictures; for trajectories choose ppt or"),
        ("trajectory_demo", ["method=plain", "teacher=null"], "method", "choose ppt or ppt_student"),
        ("ppt", ["student.model=one_shot"], "student.model", "trains the network ppt, found one_shot"),
        ("ppt", ["data.validation=test"], "data.validation", "expected train.select best, found last"),
        ("ppt", ["data.validation=train", "train.select=best"], "data.validation", "train.select last, found best"),
        ("ppt", ["data.predict=1"], "data.predict", "greater than or equal to 2, found 1"),
        (
            "trajectory_demo",
            ["data={source: eth_ucy, scene: eth, validation: test}", "train.select=best"],
            "data.validation",
            "teacher.train.select best, found last",
        ),
        (
            "trajectory_demo",
            ["data.walk_axis={}", "teacher.method.rotate=true"],
            "data.walk_axis",
            "teacher.method.rotate",
        ),
        ("trajectory_demo", ["teacher.rotate=true"], "teacher.rotate", "set it too"),
        ("ppt", ["data.walk_axis={}", "method.rotate=true"], "data.walk_axis", "rotate turns windows by any angle"),
        ("ppt", ["method.winners=21"], "method.winners", "at most the 20 hypotheses, found 21"),
        ("ppt", ["method.branches=1"], "teacher", "if and only if method.branches is above 0"),
        ("ppt", ["teacher.folder=runs/a/student"], "teacher", "if and only if method.branches is above 0"),
        ("ppt", ["method.branches=1", "teacher.mirrored=true"], "teacher", "takes the ways of one PPT; remove ens"),
        ("trajectory_demo", ["teacher=null"], "teacher", "or set paths, destinations and features to 0"),
        ("trajectory_demo", ["student.hypotheses=6"], "student.hypotheses", "the teacher's 20 hypotheses, found 6"),
        ("trajectory_demo", ["student.scale=10"], "student.scale", "the teacher's scale 30, found 10"),
        ("digits", ["method=ppt", "teacher=null"], "method", "ppt is for trajectories"),
        ("digits", ["method=ppt_student"], "method", "ppt_student is for trajectories"),
    ],
)
def test_faults_between_sections_name_the_key_and_the_remedy(
    path: str, overrides: list[str], key: str, message: str
) -> None:
    found = fault(CONFIGS / f"{path}.yaml", *overrides)
    assert f" {key}: " in found
    assert message in found
    assert "\n" not in found


def test_a_scale_written_out_is_the_default_one() -> None:
    assert load(DEMO, ["student.scale=30"]).student.scale_of("m") == 30
    assert load(DEMO, ["student.scale=10", "teacher.student.scale=10"])


def test_a_dry_run_tells_that_paths_are_merged() -> None:
    found = Data({}, {"observe": 8, "predict": 12, "unit": "m"})
    assert "merged" not in trajectory.dry_run(load(DEMO), found)["teacher"]
    mirrored = load(DEMO, ["teacher.mirrored=true"])
    assert trajectory.dry_run(mirrored, found)["teacher"].endswith("merged with those for the mirror image")


def test_a_dry_run_refuses_a_student_that_cannot_be_taught_a_feature() -> None:
    found = Data({}, {"observe": 8, "predict": 12, "unit": "m"})
    with pytest.raises(EdgestillError, match=r"features needs a student with .* PPT has not \(one_shot has them\)"):
        trajectory.dry_run(load(DEMO, ["student.model=ppt"]), found)
    assert trajectory.dry_run(load(DEMO, ["student.model=ppt", "method.features=0"]), found)


def test_without_its_weights_a_student_needs_no_teacher() -> None:
    none = "method={name: ppt_student, paths: 0, destinations: 0, features: 0}"
    assert load(DEMO, [none, "teacher=null"]).teacher is None


# --- the task's own defaults


def test_the_tasks_defaults_stand_below_what_the_user_writes_key_by_key() -> None:
    theirs = load_task("trajectory").defaults({})["export"]["parity"]["limits"]
    cfg = validate(PPT)
    assert cfg.report.max_drop == 0.01
    assert cfg.export.parity.limits["fp16"].model_dump() == theirs["fp16"]
    assert cfg.export.parity.samples == 512
    mine = {"export": {"opset": 19, "parity": {"limits": {"fp16": {"agreement": 0.5}}}}, "report": {"max_drop": 7}}
    cfg = validate(PPT | mine)
    assert cfg.report.max_drop == 7
    assert cfg.export.opset == 19
    fp16 = cfg.export.parity.limits["fp16"]
    assert (fp16.agreement, fp16.metric_drop, fp16.max_difference) == (0.5, 0.002, 0.05)
    assert cfg.export.parity.limits["int8-cpu"].metric_drop == 0.01
    assert theirs["fp16"]["agreement"] == 0.98, "the defaults themselves were changed"


def test_limits_of_pixels_are_thirty_times_those_of_metres() -> None:
    for data in ({"source": "sdd"}, {"source": "files", "path": "a.txt", "unit": "px"}):
        cfg = validate(PPT | {"data": data})
        fp16 = cfg.export.parity.limits["fp16"]
        assert (fp16.agreement, fp16.metric_drop, fp16.max_difference) == pytest.approx((0.98, 0.06, 1.5))
        assert cfg.report.max_drop == pytest.approx(0.3)


def test_one_key_of_a_training_leaves_the_others_as_they_are() -> None:
    cfg: Any = validate(PPT | {"method": {"name": "ppt", "destination": {"epochs": 3}, "step": {"lr": 0.5}}})
    assert (cfg.method.destination.epochs, cfg.method.destination.lr) == (3, 1e-4)
    assert (cfg.method.step.epochs, cfg.method.step.lr) == (60, 0.5)


def test_a_resolved_config_is_valid_again() -> None:
    for path in (DEMO, CONFIGS / "ppt.yaml"):
        cfg = load(path)
        assert validate(cfg.model_dump(mode="json")).sha256 == cfg.sha256


def test_a_section_that_is_no_mapping_is_still_a_fault() -> None:
    with pytest.raises(ConfigError, match="export: expected a section"):
        validate(PPT | {"export": 3})


def test_the_state_of_a_teachers_folder_follows_it(tmp_path: Path) -> None:
    section = TeacherSection(folder=str(tmp_path / "student"))
    assert trajectory.files_state(section) is None
    for text in ("a", "b"):
        artifact.remove(tmp_path / "student")
        with artifact.create(tmp_path / "student", stage="student", config={}) as draft:
            (draft.path / "file").write_text(text)
        assert trajectory.files_state(section) == artifact.read(tmp_path / "student").id
    assert trajectory.files_state(TeacherSection()) is None


def test_the_state_of_an_ensembles_folders_follows_each(tmp_path: Path) -> None:
    section = TeacherSection(folder=str(tmp_path / "a"), ensemble=[str(tmp_path / "b")])
    states = set()
    for name, text in (("a", "1"), ("b", "1"), ("b", "2"), ("a", "2")):
        artifact.remove(tmp_path / name)
        with artifact.create(tmp_path / name, stage="student", config={}) as draft:
            (draft.path / "file").write_text(text)
        states.add(trajectory.files_state(section))
    assert len(states) == 4
