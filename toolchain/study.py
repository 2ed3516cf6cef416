"""A study: method x dataset x seed, many small trainings, one JSON line per run.

Every run is the pipeline's own data, teacher and student stages and a score on the test split. Runs of one dataset
and teacher share the data and the cached teacher features; trainings share a process, so that imports are paid once.
Rows that are in the results file are not run again: a row is known by its dataset, method, seed and config.
"""

from __future__ import annotations

import copy
import itertools
import json
import platform
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from toolchain import artifact
from toolchain.artifact import EdgestillError, digest
from toolchain.config import (
    Config,
    apply_overrides,
    load,
    read_yaml,
    trains_on_validation,
    validate,
    validate_section,
    validates_on_test,
)
from toolchain.faults import ConfigError, Fault, allowed, told
from toolchain.pipeline import Pipeline, lock, plan, resumable, side_by_side
from toolchain.section import Section
from toolchain.stage import Job, console, main
from toolchain.tasks import digits_of, load_data

SECTIONS = ("seed", "task", "data", "teacher", "student", "method", "train")  # what a student depends on

if TYPE_CHECKING:
    from toolchain.distill import Trained


class StudySection(Section):
    """A study's YAML. ``datasets`` and ``methods`` map a row's name to overrides of the base config.

    ``keep``: leave each run's student as an artifact, ``<work>/<study>/students/<dataset>-<method>-<seed>``.
    ``only``: the datasets that a method runs on, where not on all. ``tuned``: overrides of a method on one dataset.
    """

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    config: str
    protocol: str
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    datasets: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    methods: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    common: dict[str, Any] = Field(default_factory=dict)
    keep: bool = False
    only: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(default_factory=dict)
    tuned: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)

    def unknown(self) -> list[Fault]:
        """Methods and datasets of ``only`` and ``tuned`` that the study has not."""
        methods: list[tuple[str, ...]] = [("only", method) for method in self.only]
        methods += [("tuned", dataset, method) for dataset, changes in self.tuned.items() for method in changes]
        datasets: list[tuple[str, ...]] = [("tuned", dataset) for dataset in self.tuned]
        datasets += [("only", method, name) for method, names in self.only.items() for name in names]
        return [
            (where, f"no {kind} {where[-1]!r}; {allowed(where[-1], list(known))}")
            for kind, known, wheres in (("method", self.methods, methods), ("dataset", self.datasets, datasets))
            for where in wheres
            if where[-1] not in known
        ]

    def runs(self, method: str, dataset: str) -> bool:
        """Whether ``method`` runs on ``dataset``."""
        return dataset in self.only.get(method, self.datasets)


@dataclass(frozen=True)
class Row:
    """One run of a study, before it is run."""

    dataset: str
    method: str
    seed: int
    config: Config

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.dataset, self.method, self.seed, self.sha256

    @property
    def sha256(self) -> str:
        """Of the sections that decide the trained student."""
        return digest(self.config.section(*SECTIONS[1:]))


def rows(path: Path, overrides: Sequence[str] = ()) -> tuple[StudySection, list[Row]]:
    """Every run of a study, validated. Overrides apply to each run's config, or to ``seeds``. Raises ConfigError."""
    value, lines = read_yaml(path)
    own = [override for override in overrides if override.partition("=")[0] in StudySection.model_fields]
    overridden = apply_overrides(value, own)
    study = validate_section(StudySection, value, str(path), lines, overridden)
    if faults := study.unknown():
        raise told(faults, str(path), lines, overridden)
    base_path = path.parent / study.config
    load(base_path)
    base, _ = read_yaml(base_path)
    found = []
    order = itertools.product(study.datasets.items(), study.seeds, study.methods.items())
    for (dataset, data_changes), seed, (method, method_changes) in order:
        if not study.runs(method, dataset):
            continue
        config = json.loads(json.dumps(base))
        own_changes = study.tuned.get(dataset, {}).get(method, {})
        for changes in (study.common, data_changes, method_changes, own_changes):
            _merge(config, changes)
        config |= {"name": study.study, "seed": seed}
        overridden = apply_overrides(config, [override for override in overrides if override not in own])
        changed = _lines_of(lines, ("common",), ("datasets", dataset), ("methods", method), ("tuned", dataset, method))
        try:
            checked = validate(config, source=str(path), lines=changed, overridden=overridden)
        except ConfigError as error:
            raise ConfigError(f"{error}\n(in the run of {method} on {dataset})") from error
        if study.keep and validates_on_test(checked):
            raise ConfigError(
                f"{path}: keep: found a method whose students the test split selects ({method}, data.validation: "
                "test); remove keep, or give it a study of its own"
            )
        found.append(Row(dataset, method, seed, checked))
    return study, found


def _lines_of(lines: Mapping[tuple[Any, ...], int], *sections: tuple[Any, ...]) -> dict[tuple[Any, ...], int]:
    """The lines of a run's keys that a study's ``sections`` change, later ones before earlier ones."""
    found = {}
    for section in sections:
        for where, line in lines.items():
            if where[: len(section)] == section and len(where) > len(section):
                first, *rest = where[len(section) :]
                found[(*first.split("."), *rest)] = line
    return found


def _merge(config: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Sections merge key by key; a method given replaces the base's method whole; dotted keys reach inside."""
    for dotted, item in changes.items():
        *parents, last = dotted.split(".")
        place = config
        for parent in parents:
            if parent == "method" and isinstance(place.get(parent), str):
                place[parent] = {"name": place[parent]}
            place = place.setdefault(parent, {})
        if isinstance(item, Mapping) and isinstance(place.get(last), dict) and dotted != "method":
            _merge(place[last], item)
        else:
            place[last] = copy.deepcopy(item)  # a later merge reaches inside


def done(results: Path) -> set[tuple[str, str, int, str]]:
    """The keys of the rows in a results file. Raises EdgestillError on a line that is not a row."""
    keys = set()
    for number, line in enumerate(_lines(results), start=1):
        try:
            row = json.loads(line)
            keys.add((row["dataset"], row["method"], row["seed"], row["config_sha256"]))
        except (ValueError, KeyError, TypeError) as error:
            raise EdgestillError(f"{results}:{number}: not a row of a study ({error}); remove the line") from error
    return keys


def run_name(dataset: str, method: str, seed: int, sha256: str) -> str:
    """Of the files of a run; ``sha256`` tells configs apart that go by the same names."""
    return f"{dataset}-{method}-{seed}-{sha256[:8]}"


def _lines(results: Path) -> Iterator[str]:
    if results.is_file():
        text = results.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            results.write_text(text, encoding="utf-8")
        yield from text.splitlines()


def run(
    path: Path, overrides: Sequence[str], out: Path, work: Path, *, dry_run: bool = False, jobs: int = 1
) -> dict[str, Any]:
    """Run what is left of a study and append its rows to ``out/<study>.jsonl``.

    ``jobs``: so many groups, of the runs of one dataset and teacher, side by side; what a group shares is made before.
    """
    study, planned = rows(path, overrides)
    results = out / f"{study.study}.jsonl"
    left = _left(planned, results)
    console.print(f"{study.study}: {len(planned)} runs, {len(planned) - len(left)} done, {len(left)} to do")
    result = {"results": str(results), "runs": len(planned), "left": len(left)}
    if dry_run or not left:
        if not left:
            console.print("already complete", style="green")
        return result
    root = work / study.study
    for folder in (out, root):
        folder.mkdir(parents=True, exist_ok=True)
    failures = []

    def failed(name: str, error: EdgestillError) -> None:
        failures.append(f"{name}: {error}")
        console.print(failures[-1], style="red", markup=False)

    def groups() -> Iterator[Job]:
        for shared, group in _groups(_left(planned, results), root):
            try:
                _shared(shared, group[0].config)
                yield _job(study, shared, group, results)
            except EdgestillError as error:
                failed(shared.name, error)

    command = ["edgestill", "study", str(path), *overrides, "--out", str(out), "--work", str(work)]
    command += ["--jobs", str(jobs)] if jobs > 1 else []
    with resumable(command), lock(root):
        for job, fault in side_by_side("toolchain.study", groups(), jobs):
            if fault is None:
                artifact.remove(job.out)
            else:
                failed(job.out.name, fault)
    if failures:
        still = len(_left(planned, results))
        raise EdgestillError(f"{study.study}: {still} of {len(planned)} runs are not done:\n" + "\n".join(failures))
    table = f"python -m benchmarks.tables --results {shlex.quote(str(out))} README.md"
    console.print(f"results: {results}\nnext:    {table}", markup=False)
    return result | {"left": 0}


def _left(planned: Sequence[Row], results: Path) -> list[Row]:
    finished = done(results)
    return [row for row in planned if row.key not in finished]


def _groups(left: Sequence[Row], work: Path) -> list[tuple[Path, list[Row]]]:
    """Runs by the folder of the data and teacher they share."""
    groups: dict[Path, list[Row]] = {}
    for row in left:
        name = f"{row.dataset}-{digest(row.config.section('task', 'data', 'teacher'))[:12]}"
        groups.setdefault(work / name, []).append(row)
    return list(groups.items())


def _shared(root: Path, config: Config) -> None:
    """Data, features and teacher of a group, made once, with seed 0 whatever the runs' seeds."""
    cfg = config.model_copy(update={"seed": 0})
    stages = [stage for stage in plan(cfg) if stage.module == "toolchain.stages"]
    Pipeline(cfg, root, stages).run(stages[-1].name)


def _job(study: StudySection, shared: Path, group: Sequence[Row], results: Path) -> Job:
    """Its folder lies beside ``shared``, whose own run clears the working files of its stages away."""
    runs = [
        {"dataset": row.dataset, "method": row.method, "seed": row.seed, "sha256": row.sha256}
        | {"config": row.config.model_dump(mode="json")}
        for row in group
    ]
    inputs = {path.name: path for path in sorted(shared.iterdir()) if artifact.is_whole(path)}
    kept = str(shared.with_name("students")) if study.keep else None
    config = {"study": study.study, "protocol": study.protocol, "results": str(results), "runs": runs, "keep": kept}
    return Job("rows", shared.with_name(f"{shared.name}-rows"), config | {"commit": commit()}, inputs)


def commit() -> str:
    """The commit of the working tree, with ``+`` when it has changes; empty outside git."""
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    status = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def work_off(job: Job) -> None:
    """The process of a group: train, score on the test split, append the row. A run that fails stops no other."""
    from toolchain.distill import train_student, write

    data = load_data(job.inputs["data"])
    inputs = {name: artifact.read(path).id for name, path in job.inputs.items()}
    failures, taught = [], None
    for number, item in enumerate(job.config["runs"], start=1):
        cfg = validate(item["config"])
        start = time.perf_counter()
        name = run_name(item["dataset"], item["method"], item["seed"], item["sha256"])
        folder = job.work / name
        try:
            trained = train_student(cfg, data, job.inputs, folder, job.work / "shared")
            selects, seconds = validates_on_test(cfg), round(time.perf_counter() - start, 1)
            taught = _teachers(trained) if taught is None and not selects else taught
        except EdgestillError as error:
            failures.append(f"{item['method']} seed {item['seed']}: {error}")
            continue
        test = _tested(trained, job.out.parent / "samples", name)
        test = {f"test_selected_{name}" if selects else name: value for name, value in test.items()}
        beside = {f"val_{name}": value for name, value in trained.val.items()} | (taught or {})
        if trains_on_validation(cfg):
            beside = {name: value for name, value in beside.items() if not name.startswith("val_")}
        if job.config["keep"]:
            place = Path(job.config["keep"]) / f"{item['dataset']}-{item['method']}-{item['seed']}"
            write(trained, place, cfg.section(*SECTIONS))
        row = {
            "study": job.config["study"],
            "method": item["method"],
            "dataset": item["dataset"],
            "seed": item["seed"],
            "metrics": test if selects else test | beside | selected(trained.run.records),
            "parameters": sum(p.numel() for p in trained.student.parameters()),
            "config_sha256": item["sha256"],
            "inputs": inputs,
            "commit": job.config["commit"],
            "device": device(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "seconds": seconds,
            "protocol": job.config["protocol"],
        }
        with Path(job.config["results"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        artifact.remove(folder)
        digits = digits_of(trained.run.task)
        scores = ", ".join(f"{name} {value:.{digits}f}" for name, value in test.items())
        console.print(
            f"    {number}/{len(job.config['runs'])} {item['dataset']} {item['method']} seed {item['seed']}: {scores}",
            markup=False,
        )
    if failures:
        raise EdgestillError("\n".join(failures))
    with artifact.create(job.out, stage=job.stage, config={"study": job.config["study"]}):
        pass


def selected(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the last training watched: ``test_selected_minADE`` is of the epoch that is best on the test split."""
    watched = records[-1].get("watched", {}) if records else {}
    return {
        f"{name}_selected_{metric}": float(value)
        for name, record in watched.items()
        for metric, value in record["scores"].items()
        if metric != "selection"
    }


def _tested(trained: Trained, samples: Path, name: str) -> dict[str, float]:
    """Scores on the test split; where the task tells samples apart, their scores go to ``samples/<name>.json``."""
    if not hasattr(trained.run.task, "examined"):
        return {name: float(value) for name, value in trained.run.scorer("test")(trained.student).items()}
    scores, each = trained.run.task.examined(trained.run, trained.student)
    samples.mkdir(parents=True, exist_ok=True)
    artifact.write_json(samples / f"{name}.json", each)
    return {name: float(value) for name, value in scores.items()}


def _teachers(trained: Trained) -> dict[str, float]:
    """``teacher_<metric>`` and ``val_teacher_<metric>``: the teacher's scores on the test and the validation split,
    where the task can tell them; a group shares them."""
    task, run = trained.run.task, trained.run
    if not hasattr(task, "teacher_scores") or run.cfg.teacher is None:
        return {}
    return {
        f"{prefix}teacher_{name}": float(value)
        for split, prefix in (("test", ""), ("val", "val_"))
        for name, value in task.teacher_scores(run, split).items()
    }


def device() -> str:
    """What the rows were computed on, in words."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"CPU, {torch.get_num_threads()} threads, {model}"


if __name__ == "__main__":
    main(work_off)
