"""What the verbs make of settings, in a run's folder and outside of one; the stages themselves are not run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from toolchain import artifact, commands
from toolchain.artifact import UsageError
from toolchain.cli import app
from toolchain.config import load
from toolchain.faults import ConfigError
from toolchain.pipeline import Outcome, Pipeline
from toolchain.stage import Job

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    made: list[Job] = []
    monkeypatch.setattr(commands, "_make", lambda module, job: made.append(job))
    return made


def write(folder: Path, stage: str, file: str, task: str) -> Path:
    with artifact.create(folder, stage=stage, config={"task": task}) as draft:
        (draft.path / file).write_bytes(b"x")
        draft.extra = {"precision": "fp16", "task": task}
    return folder


def onnx(root: Path, task: str = "classification") -> Path:
    return write(root / "onnx-fp16", "onnx", "model.onnx", task)


def student(root: Path, task: str) -> Path:
    write(root / "data", "data", "info.json", task)
    return write(root / "student", "student", "model.safetensors", task)


def in_run(root: Path, config: str, *overrides: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(load(CONFIGS / config, overrides).model_dump(mode="json")))
    return root


def test_a_run_is_not_validated_on_its_test_split(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"ppt.yaml: data.validation: found test, .* remove the key, or write a study"
    ):
        commands.run(CONFIGS / "ppt.yaml", ["data.validation=test", "train.select=best"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_export_outside_a_run_has_the_gates_of_its_task(tmp_path: Path, jobs: list[Job]) -> None:
    commands.export(student(tmp_path, "trajectory"), "fp16", [], None, None)
    limits = jobs[-1].config["export"]["parity"]["limits"]
    assert limits["fp16"]["metric_drop"] == 0.002  # metres
    commands.export(student(tmp_path / "qa", "qa"), "int8-cpu", ["dynamic_int8=false"], None, None)
    assert jobs[-1].config["export"]["dynamic_int8"] is False
    commands.export(tmp_path / "qa" / "student", "int8-cpu", [], None, None)
    assert jobs[-1].config["export"]["dynamic_int8"] is True


def test_a_folder_of_any_name_holds_what_its_stage_makes(tmp_path: Path, jobs: list[Job]) -> None:
    folder = student(tmp_path, "trajectory")
    for precision in ("fp32", "fp16"):
        commands.export(folder, precision, [], tmp_path / "mine", None)
    assert [(job.stage, job.out.name) for job in jobs] == [("onnx", "mine"), ("onnx", "onnx"), ("onnx-fp16", "mine")]


def test_what_was_trained_is_not_overwritten_by_its_export(tmp_path: Path) -> None:
    folder = student(tmp_path, "trajectory")
    with pytest.raises(artifact.ArtifactError, match="found one of stage student; choose another --out"):
        commands.export(folder, "fp32", [], folder, None)
    with pytest.raises(artifact.ArtifactError, match="found one of stage onnx; choose another --out"):
        commands.bench([onnx(tmp_path)], [], tmp_path / "onnx-fp16", None, show=False)
    assert (folder / "model.safetensors").exists()
    assert (tmp_path / "onnx-fp16" / "model.onnx").exists()


def test_a_report_needs_measurements(tmp_path: Path) -> None:
    with pytest.raises(commands.UsageError, match="nothing was measured there yet; let edgestill run finish first"):
        commands.report(in_run(tmp_path, "trajectory_demo.yaml"), show=False)


def test_a_setting_reaches_inside_a_gate(tmp_path: Path, jobs: list[Job]) -> None:
    folder = student(tmp_path, "classification")
    commands.export(folder, "fp16", ["export.parity.limits.fp16.agreement=0.5"], None, None)
    assert jobs[-1].config["export"]["parity"]["limits"]["fp16"] == {
        "max_difference": 0.05,
        "agreement": 0.5,
        "metric_drop": 0.5,
    }
    with pytest.raises(ConfigError, match=r"export: samples: unknown key"):
        commands.export(folder, "fp16", ["samples=3"], None, None)
    with pytest.raises(UsageError, match="give --precision"):
        commands.export(folder, "fp16", ["export.precisions=[fp32]"], None, None)


@pytest.mark.parametrize(("precision", "compiled"), [("fp32", True), ("int8-trt", True), ("int8-cpu", False)])
def test_what_is_next_works(
    precision: str, compiled: bool, tmp_path: Path, jobs: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    commands.export(student(tmp_path, "classification"), precision, [], None, None)
    said = capsys.readouterr().err
    assert ("edgestill compile" in said) is compiled
    assert f"edgestill bench {tmp_path}" in said


def test_what_is_next_can_be_pasted(tmp_path: Path, jobs: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    commands.export(student(tmp_path / "my run", "classification"), "fp32", [], None, None)
    *_, last = capsys.readouterr().err.splitlines()
    assert shlex.split(last)[-3:] == ["edgestill", "bench", str(tmp_path / "my run" / "onnx")]


def test_compile_outside_a_run_has_the_ranges_of_its_task(
    tmp_path: Path, jobs: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    commands.compile(onnx(tmp_path, "qa"), None, None, ["batch.max=8", "batch.opt=2"], None)
    assert jobs[-1].config["compile"]["shapes"] == {"sequence": {"min": 8, "opt": 128, "max": 384}}
    assert jobs[-1].config["compile"]["batch"] == {"min": 1, "opt": 2, "max": 8}
    commands.compile(onnx(tmp_path / "own", "my_lab.task"), None, None, [], None)
    assert jobs[-1].config["compile"]["shapes"] == {}
    assert "no module my_lab.task" in capsys.readouterr().err


def test_compile_keeps_the_backend_of_the_run(tmp_path: Path, jobs: list[Job]) -> None:
    folder = onnx(in_run(tmp_path, "digits.yaml", "compile.backend=tensorrt-rtx", "compile.targets=[sm_89]"))
    commands.compile(folder, None, None, [], None)
    assert (jobs[-1].config["compile"]["backend"], jobs[-1].config["targets"]) == ("tensorrt-rtx", ["sm_89"])
    commands.compile(folder, "sm_86, sm_120", "tensorrt", [], None)
    assert [job.config["targets"] for job in jobs[-2:]] == [["sm_86"], ["sm_120"]]
    assert jobs[-1].config["compile"]["backend"] == "tensorrt"
    in_run(tmp_path, "digits.yaml", "compile.backend=none")
    with pytest.raises(UsageError, match="give --backend"):
        commands.compile(folder, None, None, [], None)
    with pytest.raises(ConfigError, match=r"compile: backend: found 'tensort'; did you mean 'tensorrt'\?"):
        commands.compile(folder, None, "tensort", [], None)


def test_compile_outside_a_run_is_for_the_gpu_that_is_here(
    tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = onnx(tmp_path)
    monkeypatch.setattr(commands, "_capability_here", lambda: "sm_87")
    for overrides, target in (([], "sm_87"), (["compile.targets=[sm_89]"], "sm_89")):
        commands.compile(folder, None, None, overrides, None)
        assert jobs[-1].config["targets"] == [target]
    monkeypatch.setattr(commands, "_capability_here", lambda: None)
    commands.compile(folder, None, None, [], None)
    assert jobs[-1].config["targets"] == ["sm_86"]
    monkeypatch.setattr(commands, "_capability_here", lambda: "sm_87")
    in_run(tmp_path, "digits.yaml")
    commands.compile(folder, None, None, [], None)
    assert jobs[-1].config["targets"] == ["sm_86"]


def test_the_gpu_that_is_here_is_asked_for_in_a_process() -> None:
    from export.engine import device_capability

    assert commands._capability_here() == device_capability()


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("not run", 0), ("failed", 3), ("not made", 3)])
def test_a_row_that_failed_is_told_by_the_exit_code(
    status: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bench", "report"):
        (tmp_path / name).mkdir()
    rows = [{"name": "onnx", "status": status, "reason": "it is damaged"}]
    (tmp_path / "bench" / "bench.json").write_text(json.dumps({"rows": rows}))
    for name in commands.REPORT_FILES:
        (tmp_path / "report" / name).write_text("{}")
    monkeypatch.setattr(Pipeline, "run", lambda self, last: Outcome(tmp_path, reused=["bench", "report"]))
    monkeypatch.setattr(commands, "show_summary", lambda root: None)
    reply = CliRunner().invoke(app, ["run", str(CONFIGS / "digits.yaml"), "--out", str(tmp_path)])
    assert reply.exit_code == code
    assert ("already complete" in reply.stderr) is (code == 0)
    assert (f"to measure again, remove {tmp_path / 'bench'}" in reply.stderr) is (code == 3)
    monkeypatch.setattr(commands, "bench", lambda *_, **__: tmp_path / "bench")
    assert CliRunner().invoke(app, ["bench", str(tmp_path)]).exit_code == code
