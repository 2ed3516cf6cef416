"""Studies: which runs there are, which are left, and that a killed or failed one is gone on with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from toolchain import study
from toolchain.artifact import ArtifactError, EdgestillError, create, read
from toolchain.config import Config
from toolchain.faults import ConfigError
from toolchain.pipeline import StageError, lock
from toolchain.stage import Job

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"
STUDY = f"""
study: tiny
config: {DIGITS}
protocol: as fast as can be
seeds: [0, 1]
datasets: {{digits: {{data.train_samples: 100}}, digits-200: {{data.train_samples: 200}}}}
methods:
  plain: {{method: plain}}
  fitnet: {{method: {{name: fitnet, weight: 3}}, train.lr: 0.001}}
common: {{train.epochs: 2}}
"""


@pytest.mark.parametrize("study_path", sorted((DIGITS.parent / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_loads(study_path: Path) -> None:
    section, planned = study.rows(study_path)
    keys = [(row.dataset, row.method, row.seed) for row in planned]
    assert len(set(keys)) == len(keys) > 0
    assert {row.seed for row in planned} == set(section.seeds)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(STUDY)
    return tmp_path / "tiny.yaml"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Stages that train nothing: every run of a group gets its row, but those named in ``fails``."""
    jobs: list[Job] = []

    def side_by_side(module: str, given: Iterable[Job], most: int) -> Iterator[tuple[Job, EdgestillError | None]]:
        assert (module, most) == ("toolchain.study", 1)
        for job in given:
            jobs.append(job)
            for item in job.config["runs"]:
                row = {key: item[key] for key in ("dataset", "method", "seed")} | {"config_sha256": item["sha256"]}
                with Path(job.config["results"]).open("a") as file:
                    file.write(json.dumps(row) + "\n")
            yield job, None

    monkeypatch.setattr(study, "side_by_side", side_by_side)
    monkeypatch.setattr(study, "_shared", lambda root, config: root.mkdir(parents=True, exist_ok=True))
    return jobs


def go(path: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    return study.run(path, overrides, path.parent / "results", path.parent / "work", **options)


def test_every_run_is_a_whole_config(path: Path) -> None:
    _, rows = study.rows(path, ["seeds=[4]", "train.batch_size=8"])
    assert [(row.dataset, row.method, row.seed) for row in rows] == [
        (dataset, method, 4) for dataset in ("digits", "digits-200") for method in ("plain", "fitnet")
    ]
    fitnet = rows[1].config
    assert (fitnet.method.name, fitnet.method.weight, fitnet.train.lr) == ("fitnet", 3, 0.001)
    assert (fitnet.train.epochs, fitnet.train.batch_size, fitnet.data.train_samples) == (2, 8, 100)
    assert len({row.sha256 for row in rows}) == 4
    with pytest.raises(ConfigError, match=r"^command line: train.epoch: unknown key[^\n]*\n.*plain on digits"):
        study.rows(path, ["train.epoch=8"])


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("seeds: [0, 1]", "seed: [0, 1]", 5, "seed: unknown key; did you mean 'seeds'?"),
        ("train.epochs: 2", "train.epoch: 2", 10, "train.epoch: unknown key; did you mean 'epochs'?"),
        ("train.lr: 0.001", "train: {lr: -1}", 9, "train.lr: input should be greater than 0"),
        ("weight: 3", "wieght: 3", 9, "method.wieght: unknown key; did you mean 'weight'?"),
    ],
)
def test_a_fault_names_its_line_in_the_study(path: Path, old: str, new: str, line: int, words: str) -> None:
    path.write_text(STUDY.replace(old, new))
    with pytest.raises(ConfigError) as error:
        study.rows(path)
    assert f"{path}:{line}: {words}" in str(error.value)


def test_a_fault_of_the_base_config_is_not_the_study_s(path: Path) -> None:
    base = path.with_name("base.yaml")
    base.write_text(DIGITS.read_text().replace("  width: 32", "  widht: 32"))
    path.write_text(STUDY.replace(str(DIGITS), "base.yaml"))
    with pytest.raises(ConfigError, match=rf"^{base}:\d+: student.widht: unknown key"):
        study.rows(path)


def test_a_method_may_run_on_some_datasets_only(path: Path) -> None:
    path.write_text(f"{STUDY}only: {{fitnet: [digits-200]}}\n")
    _, rows = study.rows(path, ["seeds=[4]"])
    assert [(row.dataset, row.method) for row in rows] == [
        ("digits", "plain"),
        ("digits-200", "plain"),
        ("digits-200", "fitnet"),
    ]


@pytest.mark.parametrize("dataset", ["digits", "digits-200"])
def test_a_method_is_tuned_on_one_dataset(dataset: str, path: Path) -> None:
    path.write_text(f"{STUDY}tuned: {{{dataset}: {{fitnet: {{method.weight: 5, train.lr: 0.5}}}}}}\n")
    found = {(row.dataset, row.method): row.config for row in study.rows(path)[1]}
    tuned = found.pop((dataset, "fitnet"))
    assert (tuned.method.weight, tuned.train.lr) == (5, 0.5)
    assert all(config.train.lr != 0.5 for config in found.values())
    assert all(config.method.weight == 3 for (_, method), config in found.items() if method == "fitnet")


def test_what_is_tuned_is_in_the_study(path: Path) -> None:
    path.write_text(f"{STUDY}tuned: {{digit: {{fitnet: {{}}}}}}\n")
    with pytest.raises(ConfigError, match=r"tiny.yaml:11: tuned.digit: no dataset 'digit'; did you mean 'digits'\?"):
        study.rows(path)
    path.write_text(f"{STUDY}tuned: {{digits: {{plane: {{}}}}}}\n")
    with pytest.raises(
        ConfigError, match=r"tiny.yaml:11: tuned.digits.plane: no method 'plane'; did you mean 'plain'\?"
    ):
        study.rows(path)


@pytest.mark.parametrize(
    ("only", "words"),
    [
        ("{fitnat: [digits]}", r"only.fitnat: no method 'fitnat'; did you mean 'fitnet'\? allowed: plain, fitnet"),
        ("{fitnet: [digit-200]}", r"only.fitnet.digit-200: no dataset 'digit-200'; did you mean 'digits-200'\?"),
        ("{fitnet: []}", "only"),
    ],
)
def test_names_of_only_are_checked(path: Path, only: str, words: str) -> None:
    path.write_text(f"{STUDY}only: {only}\n")
    with pytest.raises(ConfigError, match=words):
        study.rows(path)


def worked_off(
    path: Path, monkeypatch: pytest.MonkeyPatch, teacher: str | None = "there", **task: Any
) -> dict[str, Any]:
    """The row of a run that is not trained; its samples lie in ``samples`` beside the study."""
    return all_worked_off(path, monkeypatch, 1, teacher, **task)[0]


def all_worked_off(
    path: Path, monkeypatch: pytest.MonkeyPatch, count: int, teacher: str | None = "there", **task: Any
) -> list[dict[str, Any]]:
    """The rows of ``count`` runs of one group."""
    watched = {"test": {"epoch": 5, "scores": {"selection": 1.9, "minADE": 0.31, "minFDE": 0.97}}}
    run = SimpleNamespace(
        records=[{"watched": {"test": {"scores": {"minADE": 9.0}}}}, {"watched": watched}],
        scorer=lambda split: lambda student: {"minADE": 0.3456, "minFDE": 1.0},
        task=SimpleNamespace(DIGITS=3, **task),
        cfg=SimpleNamespace(teacher=teacher),
    )
    student = SimpleNamespace(parameters=list)
    monkeypatch.setattr(
        "toolchain.distill.train_student", lambda *_: SimpleNamespace(run=run, student=student, val={"minADE": 0.4})
    )
    monkeypatch.setattr(study, "load_data", lambda folder: None)
    declared, rows = study.rows(path, ["seeds=[0]"])
    shared, results = path.parent / "shared", path.parent / "r.jsonl"
    with create(shared / "data", stage="data", config={}):
        pass
    study.work_off(study._job(declared, shared, rows[:count], results))
    found = [dict(json.loads(line)) for line in results.read_text().splitlines()]
    assert all(row["inputs"] == {"data": read(shared / "data").id} for row in found)
    return found


def test_what_a_training_watched_is_in_its_row(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert worked_off(path, monkeypatch)["metrics"] == {
        "minADE": 0.3456,
        "minFDE": 1.0,
        "val_minADE": 0.4,
        "test_selected_minADE": 0.31,
        "test_selected_minFDE": 0.97,
    }
    assert "minADE 0.346, minFDE 1.000" in capsys.readouterr().err
    assert study.selected([]) == study.selected([{"epochs": 3}]) == {}


def test_the_teachers_scores_are_in_the_row_where_the_task_can_tell_them(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = worked_off(
        path, monkeypatch, teacher_scores=lambda run, split: {"minADE": {"test": 0.2, "val": 0.3}[split]}
    )
    assert (scored["metrics"]["teacher_minADE"], scored["metrics"]["val_teacher_minADE"]) == (0.2, 0.3)
    assert next(iter(scored["metrics"])) == "minADE", "tables go by the first"


def test_a_group_scores_its_teacher_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def scores(run: Any, split: str) -> dict[str, float]:
        asked.append(split)
        return {"minADE": 0.2}

    rows = all_worked_off(path, monkeypatch, 2, teacher_scores=scores)
    assert [row["metrics"]["teacher_minADE"] for row in rows] == [0.2, 0.2]
    assert asked == ["test", "val"]


@pytest.mark.parametrize(("teacher", "selects"), [(None, False), ("there", True)])
def test_a_teacher_is_not_scored_where_there_is_none_or_the_test_split_selects(
    teacher: str | None, selects: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "validates_on_test", lambda config: selects)
    row = worked_off(path, monkeypatch, teacher, teacher_scores=lambda *_: pytest.fail("scored"))
    assert not [name for name in row["metrics"] if "teacher" in name]


def test_a_teacher_that_cannot_be_scored_is_named_and_leaves_no_row(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(run: Any, split: str) -> dict[str, float]:
        raise ArtifactError("teacher: changed since it was written")

    with pytest.raises(EdgestillError, match="plain seed 0: teacher: changed since it was written"):
        worked_off(path, monkeypatch, teacher_scores=scores)
    assert not (path.parent / "r.jsonl").exists()


def test_what_the_test_split_selected_is_never_called_anything_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "validates_on_test", lambda config: True)
    row = worked_off(path, monkeypatch)
    assert row["metrics"] == {"test_selected_minADE": 0.3456, "test_selected_minFDE": 1.0}
    assert ": test_selected_minADE 0.346, test_selected_minFDE 1.000" in capsys.readouterr().err


def test_what_trained_is_not_told_as_a_validation_score(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "trains_on_validation", lambda config: True)
    row = worked_off(path, monkeypatch, teacher_scores=lambda *_: {"minADE": 0.2})
    assert set(row["metrics"]) >= {"minADE", "teacher_minADE"}
    assert not [name for name in row["metrics"] if name.startswith("val_")]


def test_students_that_the_test_split_selects_are_not_kept(path: Path) -> None:
    base = DIGITS.with_name("ppt.yaml")
    habit = "{honest: {}, habit: {data.validation: test, train.select: best}}"
    path.write_text(f"study: s\nconfig: {base}\nprotocol: p\nseeds: [0]\ndatasets: {{zara1: {{}}}}\nmethods: {habit}\n")
    study.rows(path)
    path.write_text(path.read_text() + "keep: true\n")
    with pytest.raises(ConfigError, match=r"keep: found a method .* \(habit, data.validation: test\); remove keep"):
        study.rows(path)


def test_samples_are_kept_under_the_name_that_their_row_gives(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = {"cells": {"q1": 50.0}}
    row = worked_off(path, monkeypatch, examined=lambda run, student: ({"minADE": 0.5}, each))
    assert row["metrics"]["minADE"] == 0.5
    (kept,) = (path.parent / "samples").iterdir()
    assert kept.name == f"digits-plain-0-{row['config_sha256'][:8]}.json"
    assert json.loads(kept.read_text()) == each


def test_rows_that_are_there_are_not_run_again(path: Path, trained: list[Job]) -> None:
    assert go(path, dry_run=True)["left"] == 8
    assert not (path.parent / "work").exists()
    assert go(path)["left"] == 0
    assert [len(job.config["runs"]) for job in trained] == [4, 4]
    results = path.parent / "results" / "tiny.jsonl"
    results.write_text("".join(results.read_text().splitlines(keepends=True)[:-1]) + '{"half a')
    go(path)
    assert [(run["method"], run["seed"]) for run in trained[-1].config["runs"]] == [("fitnet", 1)]
    assert len(results.read_text().splitlines()) == 8
    results.write_text("{}\n")
    with pytest.raises(EdgestillError, match=r"tiny.jsonl:1: not a row"):
        go(path)


def test_checkpoints_of_a_run_outlive_the_shared_stages(path: Path, trained: list[Job]) -> None:
    """Making the shared stages clears their folder's .work; the trainings' must not be in it."""
    go(path)
    for job in trained:
        shared = job.out.with_name(job.out.name.removesuffix("-rows"))
        assert shared.is_dir()
        assert shared not in job.work.parents


def test_one_failed_group_stops_no_other(path: Path, trained: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    side_by_side = study.side_by_side

    def failing(module: str, jobs: Iterator[Job], most: int) -> Iterator[tuple[Job, EdgestillError | None]]:
        yield next(jobs), StageError("fitnet seed 0: loss is nan")
        yield from side_by_side(module, jobs, most)

    with monkeypatch.context() as patch:
        patch.setattr(study, "side_by_side", failing)
        with pytest.raises(
            EdgestillError, match=r"4 of 8 runs are not done:\ndigits-\w+-rows: fitnet seed 0: loss is nan"
        ):
            go(path)
    assert go(path)["left"] == 0


def test_a_dataset_that_cannot_be_made_stops_no_other(
    path: Path, trained: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shared(root: Path, config: Config) -> None:
        root.mkdir(parents=True)
        if config.data.train_samples == 100:
            raise ArtifactError("data: changed since it was written")

    monkeypatch.setattr(study, "_shared", shared)
    with pytest.raises(EdgestillError, match=r"4 of 8 runs are not done:\ndigits-\w+: data: changed"):
        go(path)
    assert len(trained) == 1


def test_one_failed_run_stops_no_other(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def train(cfg: Any, *_: Any) -> None:
        seen.append(cfg.method.name)
        raise EdgestillError("loss is nan")

    monkeypatch.setattr("toolchain.distill.train_student", train)
    monkeypatch.setattr(study, "load_data", lambda folder: None)
    declared, rows = study.rows(path, ["seeds=[0]"])
    with create(tmp_path / "shared" / "data", stage="data", config={}):
        pass
    job = study._job(declared, tmp_path / "shared", rows[:2], tmp_path / "r.jsonl")
    with pytest.raises(EdgestillError, match=r"plain seed 0: loss is nan\nfitnet seed 0: loss is nan"):
        study.work_off(job)
    assert seen == ["plain", "fitnet"]


def test_one_study_at_a_time(path: Path, trained: list[Job]) -> None:
    root = path.parent / "work" / "tiny"
    root.mkdir(parents=True)
    with lock(root), pytest.raises(EdgestillError, match="is running here"):
        go(path)
    assert not trained


def test_what_to_do_next_names_the_folders(
    path: Path, trained: list[Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(module: str, jobs: Iterator[Job], most: int) -> Iterator[tuple[Job, EdgestillError | None]]:
        assert most == 2
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(study, "side_by_side", interrupted)
        go(path, "seeds=[0]", jobs=2)
    folders = f"--out {path.parent / 'results'} --work {path.parent / 'work'} --jobs 2"
    assert f"edgestill study {path} 'seeds=[0]' {folders}\n" in capsys.readouterr().err
    go(path)
    assert f"benchmarks.tables --results {path.parent / 'results'} README.md" in capsys.readouterr().err
