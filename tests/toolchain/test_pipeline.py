"""The pipeline with stages that write a line instead of training: freshness, failure, SIGKILL."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from toolchain import artifact, pipeline
from toolchain.artifact import EdgestillError
from toolchain.config import load
from toolchain.pipeline import Pipeline, Stage, StageError, measure, plan
from toolchain.stage import Job

STAGE = """
import os, sys, time
from toolchain.artifact import EdgestillError, create
from toolchain.stage import main

def run(job):
    with open(os.environ["TRACE"], "a") as trace:
        trace.write(job.stage + "\\n")
    try:
        for _ in range(2000):
            if len(open(os.environ["TRACE"]).readlines()) >= job.config.get("meets", 0):
                break
            time.sleep(0.01)
        else:
            raise EdgestillError("waited for others in vain")
    except KeyboardInterrupt:
        time.sleep(0.1)
        with open(os.environ["TRACE"], "a") as trace:
            print("saved-" + job.stage, file=trace)
        raise
    if job.config.get("fail"):
        raise EdgestillError(job.config["fail"])
    if job.config.get("crash"):
        raise ZeroDivisionError("a bug")
    with create(job.out, stage=job.stage, config=job.config, inputs=job.inputs) as draft:
        for part in range(4):
            text = "".join((folder / "text0").read_text() for folder in job.inputs.values())
            (draft.path / f"text{part}").write_text(text + job.stage + str(job.config.get("value", "")))
            time.sleep(job.config.get("seconds", 0) / 4)

main(run)
"""
DRIVER = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_pipeline import chain
chain(Path(sys.argv[1]), seconds=0.08).run("d")
"""


@pytest.fixture(autouse=True)
def stage_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "written_stage.py").write_text(STAGE)
    search = f"{tmp_path / 'modules'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    monkeypatch.setenv("PYTHONPATH", search)
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    return tmp_path


def chain(root: Path, seconds: float = 0.0, **settings: Any) -> Pipeline:
    """a -> b -> c (optional), a + b -> d; ``b={"fail": ...}`` sets a stage's config."""

    def stage(name: str, *inputs: str, optional: bool = False) -> Stage:
        config = {"seconds": seconds} | settings.get(name, {})
        return Stage(name, "written_stage", config, {i: i for i in inputs}, optional)

    stages = [stage("a"), stage("b", "a"), stage("c", "b", optional=True), stage("d", "a", "b")]
    cfg: Any = SimpleNamespace(model_dump=lambda mode: {})
    return Pipeline(cfg, root, stages)


def trace(tmp_path: Path) -> list[str]:
    return (tmp_path / "trace").read_text().split()


def test_a_second_run_reuses_everything(tmp_path: Path) -> None:
    assert chain(tmp_path / "run").run("d").made == ["a", "b", "c", "d"]
    assert chain(tmp_path / "run").run("d").reused == ["a", "b", "c", "d"]
    assert trace(tmp_path) == ["a", "b", "c", "d"]
    assert not (tmp_path / "run" / ".work").exists()


def test_only_what_depends_on_a_change_is_made_again(tmp_path: Path) -> None:
    chain(tmp_path / "run").run("d")
    outcome = chain(tmp_path / "run", c={"value": 2}).run("d")
    assert (outcome.made, outcome.reused) == (["c"], ["a", "b", "d"])
    outcome = chain(tmp_path / "run", b={"value": 2}, c={"value": 2}).run("d")
    assert (outcome.made, outcome.reused) == (["b", "c", "d"], ["a"])


@pytest.mark.parametrize(("name", "words"), [("text0", "damaged"), ("manifest.json", "not readable as JSON")])
def test_a_damaged_artifact_stops_the_run(tmp_path: Path, name: str, words: str) -> None:
    chain(tmp_path / "run").run("d")
    (tmp_path / "run" / "b" / name).write_text("aX")
    with pytest.raises(artifact.ArtifactError, match=rf"{words}.*remove that folder, and run the same command again"):
        chain(tmp_path / "run").run("d")
    pipeline = chain(tmp_path / "run")
    with pytest.raises(artifact.ArtifactError, match=words):
        pipeline.stale(pipeline.stages[1])


def test_an_optional_stage_may_fail_and_says_why(tmp_path: Path) -> None:
    outcome = chain(tmp_path / "run", c={"fail": "no builder here"}).run("d")
    assert outcome.failed == {"c": "no builder here"}
    assert outcome.made == ["a", "b", "d"]


def test_a_failed_stage_ends_the_run_with_its_own_message(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="disc is full"):
        chain(tmp_path / "run", b={"fail": "disc is full"}).run("d")
    assert artifact.is_whole(tmp_path / "run" / "a")
    assert chain(tmp_path / "run").run("d").reused == ["a"]


def test_a_bug_in_a_stage_leaves_its_traceback_in_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StageError, match=r"ZeroDivisionError: a bug .*traceback is in"):
        chain(tmp_path / "run", b={"crash": True}).run("d")
    assert "Traceback" not in capfd.readouterr().err
    assert "ZeroDivisionError" in (tmp_path / "run" / ".work" / "b.traceback.txt").read_text()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    busy = pytest.raises(EdgestillError, match=f"process {os.getpid()} is running here")
    with pipeline.lock(root), busy, pipeline.lock(root, patience_s=0.2):
        pass


def test_missing_packages_are_told_for_the_whole_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda name: None)
    stages = [Stage("x", "export.precision", {}), Stage("y", "benchmarks.report", {})]
    faults = pipeline.missing_packages(stages)
    assert [fault.split()[0] for fault in faults] == ["onnx", "onnxscript", "onnxruntime", "jinja2", "matplotlib"]
    assert all("pip install 'edgestill[" in fault for fault in faults)


def test_sigkill_at_twenty_points(tmp_path: Path) -> None:
    """Killed anywhere, the next run goes on: no finished stage is repeated, and the result is the same."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(tests=str(Path(__file__).parent)))
    chain(tmp_path / "whole", seconds=0.08).run("d")
    expected = {name: artifact.read(tmp_path / "whole" / name).id for name in "abcd"}
    (tmp_path / "trace").unlink()

    generator = random.Random(3)
    kills = 0
    while kills < 20:
        root = tmp_path / f"run{kills}"
        finished: set[str] = set()
        while True:
            process = subprocess.Popen([sys.executable, str(driver), str(root)], start_new_session=True)
            try:
                process.wait(timeout=generator.uniform(0.3, 1.2))
            except subprocess.TimeoutExpired:
                kills += 1
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            process.wait()
            time.sleep(0.02)
            lines = trace(tmp_path) if (tmp_path / "trace").exists() else []
            assert not finished & set(lines), "a finished stage was run again"
            (tmp_path / "trace").write_text("")
            finished = {name for name in "abcd" if artifact.is_whole(root / name)}
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL
        assert {name: artifact.verify(root / name).id for name in "abcd"} == expected
        assert sorted(p.name for p in root.iterdir()) == [".lock", "a", "b", "c", "config.json", "d"]


def test_what_a_killed_run_left_half_written_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.4711.tmp").write_text("{")
    chain(tmp_path / "run").run("a")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "a", "config.json"]


def test_a_stage_dies_with_its_pipeline(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_pipeline import chain\n"
        "chain(Path(sys.argv[1]), seconds=60).run('d')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")])
    deadline = time.monotonic() + 20
    while not (tmp_path / "trace").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(0.2)
    started = subprocess.run(["pgrep", "-f", str(tmp_path / "run")], capture_output=True, check=False)
    assert started.stdout == b""


def test_stages_run_side_by_side_and_a_failed_one_stops_no_other(tmp_path: Path) -> None:
    configs: dict[str, dict[str, Any]] = {"a": {"meets": 2, "fail": "no luck"}, "b": {"meets": 3}, "c": {}, "d": {}}
    jobs = [Job(name, tmp_path / "run" / name, config) for name, config in configs.items()]
    ended = list(pipeline.side_by_side("written_stage", jobs, 2))
    assert ended[0][0].stage == "a"
    assert {job.stage: str(error) for job, error in ended if error} == {"a": "no luck"}
    assert {job.stage for job, _ in ended} == set(configs)
    assert all(artifact.verify(tmp_path / "run" / name).stage == name for name in "bcd")
    assert sorted(trace(tmp_path)) == list("abcd")


def driver(script: str, root: Path, lines: int) -> subprocess.Popen[str]:
    """A process of its own session that runs ``script`` in ``root/run``, once its stages have traced so many lines."""
    command = [sys.executable, "-c", script, str(root / "run")]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not ((root / "trace").exists() and len(trace(root)) >= lines):
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("asked", ["ctrl-c", "sigterm", "sigterm of one stage"])
def test_all_that_run_side_by_side_save_and_stop(asked: str, tmp_path: Path) -> None:
    script = (
        "import signal, sys; from pathlib import Path\nfrom toolchain import pipeline\n"
        "from toolchain.stage import Job, guard\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where tests run behind &
        "jobs = [Job(name, Path(sys.argv[1]) / name, {'meets': 9}) for name in 'abc']\n"
        "def work():\n    with pipeline.resumable(['the', 'command']):\n"
        "        list(pipeline.side_by_side('written_stage', jobs, 2))\n"
        "sys.exit(guard(work))\n"
    )
    process = driver(script, tmp_path, lines=2)
    if asked == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    elif asked == "sigterm":
        process.terminate()
    else:
        subprocess.run(["pkill", "-TERM", "-f", str(tmp_path / "run" / ".work" / "b.job.json")], check=True)
    said = process.communicate(timeout=20)[1]
    assert (process.returncode, "the command" in said, "Traceback" in said) == (130, True, False)
    assert sorted(trace(tmp_path)) == ["a", "b", "saved-a", "saved-b"]


def test_a_job_is_asked_for_when_there_is_a_place_for_it(tmp_path: Path) -> None:
    def jobs() -> Iterator[Job]:
        for name in "abc":
            asked.append(sorted(path.name for path in (tmp_path / "run").glob("[abc]")))
            yield Job(name, tmp_path / "run" / name, {"train": {"processes": 99}} if name == "b" else {})

    asked: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.device_count", lambda: 1)
        ended = [(job.stage, str(error)) for job, error in pipeline.side_by_side("written_stage", jobs(), 1)]
    assert ended == [
        ("a", "None"),
        ("b", "train.processes: expected at most the 1 GPUs of this machine, found 99"),
        ("c", "None"),
    ]
    assert asked == [[], ["a"], ["a"]]


def test_sigterm_says_how_to_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), pipeline.resumable(["edgestill", "run", "my config.yaml"]):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert "edgestill run 'my config.yaml'" in capfd.readouterr().err


@pytest.mark.parametrize("asked", ["ctrl-c", "sigterm"])
def test_a_stage_that_is_still_importing_stops_without_a_traceback(asked: str, stage_module: Path) -> None:
    (stage_module / "modules" / "written_stage.py").write_text(
        "import os, pathlib, time\nfrom toolchain.stage import main\n"
        "pathlib.Path(os.environ['TRACE']).write_text('here')\ntime.sleep(1)\nmain(lambda job: time.sleep(60))\n"
    )
    script = (
        f"import sys; from pathlib import Path; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where tests run behind &
        "from test_pipeline import chain\nfrom toolchain.pipeline import resumable\nfrom toolchain.stage import guard\n"
        "def work():\n    with resumable(['the', 'command']):\n        chain(Path(sys.argv[1])).run('d')\n"
        "sys.exit(guard(work))\n"
    )
    process = driver(script, stage_module, lines=1)
    os.killpg(process.pid, signal.SIGINT) if asked == "ctrl-c" else process.terminate()
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert "the command" in said
    assert "Traceback" not in said


def test_the_plan_of_the_digits_config() -> None:
    from toolchain.config import load

    path = Path(__file__).parents[2] / "configs" / "digits.yaml"
    stages = plan(load(path))
    assert [stage.name for stage in stages] == [
        *("data", "features", "teacher", "student", "onnx-teacher", "onnx"),
        *("onnx-fp16", "onnx-int8-cpu", "onnx-int8-trt", "engine-sm_86-fp16", "engine-sm_86-int8-trt"),
    ]
    bench, report = measure(load(path), stages, {"engine-sm_86-fp16": "no builder"})
    assert "engine-sm_86-fp16" not in bench.inputs
    assert bench.config["failed"] == {"engine-sm_86-fp16": "no builder"}
    assert {"teacher", "features", "bench"} <= set(report.inputs)
    json.dumps([stage.config for stage in stages])
    assert [stage.name for stage in plan(load(path, ["teacher=null", "method=plain"]))][:3] == [
        "data",
        "student",
        "onnx",
    ]


def test_a_changed_weights_file_or_image_folder_makes_its_stages_stale(tmp_path: Path) -> None:
    from toolchain.config import load

    weights = tmp_path / "teacher.safetensors"
    photo = tmp_path / "photos" / "train" / "cat" / "1.png"
    photo.parent.mkdir(parents=True)

    def configs() -> dict[str, str]:
        path = Path(__file__).parents[2] / "configs" / "digits.yaml"
        own = [f"teacher.weights={weights}", "data.source=folder", f"data.path={tmp_path / 'photos'}"]
        return {stage.name: artifact.digest(stage.config) for stage in plan(load(path, own))}

    weights.write_bytes(b"one")
    photo.write_bytes(b"a photo")
    before = configs()
    weights.write_bytes(b"two")
    other_teacher = configs()
    photo.write_bytes(b"another photo")
    other_photo = configs()
    assert [name for name in before if before[name] != other_teacher[name]] == ["features", "teacher", "student"]
    assert [n for n in before if other_teacher[n] != other_photo[n]] == ["data", "features", "teacher", "student"]


def test_a_precision_that_fails_its_gate_ends_no_run() -> None:
    demo = Path(__file__).parents[2] / "configs" / "trajectory_demo.yaml"
    stages = {stage.name: stage.optional for stage in plan(load(demo))}
    assert not any(stages[name] for name in ("data", "student", "onnx"))
    assert all(optional for name, optional in stages.items() if name.startswith("onnx-") and name != "onnx-teacher")
    assert {"onnx-fp16", "onnx-int8-cpu"} <= stages.keys()


def test_a_teacher_is_not_replaced_by_its_own_student(tmp_path: Path) -> None:
    settings = [f"teacher.folder={tmp_path / 'run' / 'student'}", "teacher.method=null", "teacher.train=null"]
    cfg = load(Path(__file__).parents[2] / "configs" / "trajectory_demo.yaml", settings)
    with pytest.raises(EdgestillError, match=r"student: expected a folder of another run, .* choose another --out"):
        Pipeline(cfg, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()
