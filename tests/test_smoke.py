"""The whole chain on a small real problem, once; then everything a person does with its folders."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolchain import artifact
from toolchain.runtime import load

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits.yaml")
SMALL = [
    *("data.train_samples=300", "data.views={count: 2, shift: 0.1}", "teacher.model=test_efficientnet"),
    *("teacher.weights=random", "teacher.image_size=32", "student.width=8", "train.epochs=4", "bench.batches=[1, 4]"),
    *("bench.seconds=0.1", "bench.rounds=2", "bench.warmup_ms=20", "bench.paced_seconds=0.2", "compile.batch.max=16"),
    *("export.calibration.samples=64", "compile.backend=tensorrt-rtx"),
    "export.parity.limits={int8-cpu: {metric_drop: 20, agreement: 0.7}, int8-trt: {metric_drop: 20, agreement: 0.7}}",
]
STAGES = [
    *("data", "features", "teacher", "student", "onnx-teacher", "onnx", "onnx-fp16", "onnx-int8-cpu"),
    *("onnx-int8-trt", "engine-sm_86-fp16", "engine-sm_86-int8-trt", "bench", "report"),
]


def edgestill(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "toolchain", *arguments]
    env = os.environ | {"COLUMNS": "200"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


@pytest.fixture(scope="module")
def run_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    root = tmp_path_factory.mktemp("runs") / "small"
    reply = edgestill("run", DIGITS, *SMALL, "--out", str(root), "--json")
    assert reply.returncode == 0, reply.stderr
    result = json.loads(reply.stdout)
    assert result["made"] == STAGES
    return root


def test_every_stage_left_a_verified_artifact(run_root: Path) -> None:
    for name in STAGES:
        assert artifact.verify(run_root / name).stage == name
    assert {path.name for path in run_root.iterdir()} >= {"report.html", "report.md", "summary.json", "config.json"}
    assert not (run_root / ".work").exists()


def test_a_second_run_reuses_everything(run_root: Path) -> None:
    reply = edgestill("run", DIGITS, *SMALL, "--out", str(run_root), "--json")
    assert reply.returncode == 0, reply.stderr
    assert json.loads(reply.stdout)["reused"] == STAGES


def test_the_ledger_has_the_teacher_first_and_every_artifact(run_root: Path) -> None:
    rows = json.loads((run_root / "bench" / "bench.json").read_text())["rows"]
    assert [row["name"] for row in rows][:3] == ["onnx-teacher", "student", "onnx"]
    for row in rows:
        if row["name"].startswith("engine"):
            continue
        assert row["status"] == "ok", row
        assert 0 <= row["accuracy"]["accuracy"] <= 100
        assert row["latency"]["1"]["mean_ms"] > 0  # a busy machine makes too few calls for a percentile


def test_the_report_is_self_contained(run_root: Path) -> None:
    html = (run_root / "report.html").read_text()
    assert "data:image/svg+xml" in html
    for reference in ('src="http', 'href="http', "<script src", "<link"):
        assert reference not in html
    assert "onnx-int8-cpu" in (run_root / "report.md").read_text()


def test_the_shipped_folder_needs_no_torch(run_root: Path) -> None:
    code = (
        "import sys, numpy as np\nfrom toolchain.runtime import load\n"
        f"samples = np.load({str(run_root / 'onnx-int8-cpu' / 'samples.npz')!r})\n"
        f"with load({str(run_root / 'onnx-int8-cpu')!r}) as model:\n"
        "    out = model({'image': samples['image'][:3]})\n"
        "assert out['label'].shape == (3,), out\n"
        "heavy = {'torch', 'onnx', 'pydantic', 'timm', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_any_batch_size_gives_the_same_answers(run_root: Path) -> None:
    samples = np.load(run_root / "onnx" / "samples.npz")["image"]
    with load(run_root / "onnx") as model:
        whole = model({"image": samples})["probabilities"]
        single = np.concatenate([model({"image": samples[i : i + 1]})["probabilities"] for i in range(len(samples))])
    np.testing.assert_allclose(whole, single, atol=1e-5)


def test_stages_one_by_one_on_a_copied_folder(run_root: Path, tmp_path: Path) -> None:
    for name in ("data", "student"):
        shutil.copytree(run_root / name, tmp_path / name)
    reply = edgestill("export", str(tmp_path / "student"), "--precision", "fp16", "--json")
    assert reply.returncode == 0, reply.stderr
    assert f"next: edgestill compile {tmp_path / 'onnx-fp16'}" in reply.stderr
    described: dict[str, Any] = json.loads(reply.stdout)
    assert {parent["role"]: parent["state"] for parent in described["lineage"]}["onnx"] == "unchanged"
    assert artifact.read(tmp_path / "onnx").id == artifact.read(run_root / "onnx").id
    shutil.copytree(tmp_path / "onnx-fp16", tmp_path / "device" / "onnx-fp16")
    reply = edgestill(
        "compile", str(tmp_path / "device" / "onnx-fp16"), "--target", "sm_89", "--backend", "tensorrt-rtx"
    )
    assert reply.returncode == 0, reply.stderr
    assert artifact.verify(tmp_path / "device" / "engine-sm_89-fp16").extra["compute_capabilities"] == ["sm_89"]
    quick = ["--set", "seconds=0.1", "--set", "rounds=2", "--set", "paced_seconds=0.1", "--set", "batches=[1]"]
    reply = edgestill(
        "bench", str(tmp_path / "onnx-fp16"), str(tmp_path / "onnx"), *quick, "--out", str(tmp_path / "b")
    )
    assert reply.returncode == 0, reply.stderr


def test_a_row_that_cannot_be_measured_shows_in_the_exit_code(run_root: Path, tmp_path: Path) -> None:
    shutil.copytree(run_root / "onnx-fp16", tmp_path / "onnx-fp16")
    (tmp_path / "onnx-fp16" / "model.onnx").write_bytes(b"no graph")
    quick = ["--set", "seconds=0.1", "--set", "rounds=1", "--set", "paced_seconds=0", "--set", "batches=[1]"]
    reply = edgestill(
        "bench", str(tmp_path / "onnx-fp16"), str(run_root / "onnx"), *quick, "--out", str(tmp_path / "b"), "--json"
    )
    assert reply.returncode == 3, reply.stderr
    rows = {row["name"]: row for row in json.loads(reply.stdout)["rows"]}
    assert rows["onnx"]["status"] == "ok"
    assert "copy or make the folder again" in rows["onnx-fp16"]["reason"]


def test_the_method_of_the_readme_trains(run_root: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "my_method.py").write_text(next(block for block in blocks if "Options" in block))
    (tmp_path / "my_package" / "nets.py").write_text("from torch import nn\ndef make(): return nn.Conv2d(1, 8, 3, 4)\n")
    for name in ("data", "features", "teacher"):
        shutil.copytree(run_root / name, tmp_path / "run" / name)
    own = ["method=my_package.my_method", "student.model=my_package.nets:make", "train.epochs=1"]
    reply = edgestill(
        "distill", DIGITS, *SMALL, *own, "--out", str(tmp_path / "run"), "--json", PYTHONPATH=str(tmp_path)
    )
    assert reply.returncode == 0, reply.stderr
    assert json.loads(reply.stdout)["student"]["extra"]["method"] == "my_package.my_method"


def test_the_same_seed_gives_the_same_student(run_root: Path, tmp_path: Path) -> None:
    for name in ("data", "features", "teacher"):
        shutil.copytree(run_root / name, tmp_path / "again" / name)
    reply = edgestill("distill", DIGITS, *SMALL, "--out", str(tmp_path / "again"))
    assert reply.returncode == 0, reply.stderr
    files = [artifact.read(root / "student").files["model.safetensors"] for root in (run_root, tmp_path / "again")]
    assert files[0] == files[1]


def test_inspect_shows_ports_lineage_and_parameters(run_root: Path) -> None:
    reply = edgestill("inspect", str(run_root / "onnx-int8-trt"))
    assert reply.returncode == 0
    for part in ("uint8 (batch, 32, 32, 1)", "probabilities", "parameters", "made of model", "made of data"):
        assert part in reply.stderr


def test_inspect_of_a_copied_run_looks_beside_it_where_the_original_changed(run_root: Path, tmp_path: Path) -> None:
    for copy in ("first", "second"):
        shutil.copytree(run_root, tmp_path / copy)
    manifest = tmp_path / "second" / "onnx" / "manifest.json"
    value = json.loads(manifest.read_text())
    value["inputs"]["model"]["path"] = str(tmp_path / "first" / "onnx")  # another artifact is there now
    manifest.write_text(json.dumps(value))
    (tmp_path / "second" / "onnx").rename(tmp_path / "second" / "graph")
    shutil.copytree(run_root / "student", tmp_path / "second" / "onnx")
    reply = edgestill("inspect", str(tmp_path / "second" / "graph"), "--json")
    lineage = {parent["role"]: parent for parent in json.loads(reply.stdout)["lineage"]}
    assert (lineage["model"]["state"], lineage["model"]["path"]) == ("unchanged", str(tmp_path / "second" / "onnx"))
    reply = edgestill("inspect", str(tmp_path / "first"))
    assert reply.returncode == 2
    assert "the folder of a run; inspect one of its artifacts: bench, data" in reply.stderr


def test_inspect_lists_hookable_layers(run_root: Path) -> None:
    reply = edgestill("inspect", DIGITS, "--json")
    assert reply.returncode == 0, reply.stderr
    assert "blocks.6" in [layer["name"] for layer in json.loads(reply.stdout)["layers"]]


def test_a_failed_gate_fails_the_command_and_the_report_says_why(run_root: Path, tmp_path: Path) -> None:
    shutil.copytree(run_root, tmp_path / "run")
    limits = "export.parity.limits={fp16: {max_difference: 1.0e-12}}"
    reply = edgestill("run", DIGITS, *SMALL, limits, "--out", str(tmp_path / "run"), "--json")
    assert reply.returncode == 3, reply.stderr
    failed = json.loads(reply.stdout)["failed"]
    assert "max_difference" in failed["onnx-fp16"]
    assert "onnx-int8-cpu" not in failed
    assert "onnx-fp16 not made: fp16 differs too much" in (tmp_path / "run" / "report.md").read_text()
    assert "Traceback" not in reply.stderr


def test_without_a_builder_the_run_finishes_and_says_so(run_root: Path, tmp_path: Path) -> None:
    shutil.copytree(run_root, tmp_path / "run")
    reply = edgestill("run", DIGITS, *SMALL, "compile.backend=tensorrt", "--out", str(tmp_path / "run"), "--json")
    assert reply.returncode == 3, reply.stderr
    result = json.loads(reply.stdout)
    assert sorted(result["failed"]) == ["engine-sm_86-fp16", "engine-sm_86-int8-trt"]
    assert "pip install 'edgestill[trt" in result["failed"]["engine-sm_86-fp16"]
    assert "pip install 'edgestill[trt" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.slow
def test_two_processes_train_one_student(tmp_path: Path) -> None:
    settings = ["method=plain", "teacher=null", "train.processes=2", "train.threads=1"]
    small = [value for value in SMALL if not value.startswith("teacher.")]
    reply = edgestill("distill", DIGITS, *small, *settings, "--out", str(tmp_path / "run"), "--json")
    assert reply.returncode == 0, reply.stderr
    assert artifact.verify(tmp_path / "run" / "student").extra["parameters"] > 0
