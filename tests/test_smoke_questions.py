"""Question answering through the command line, shrunk: the whole chain, and a study. Minutes, so not by default."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from toolchain import artifact

pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = [
    *("data.articles=[20, 10, 2, 3]", "teacher.method.first.epochs=1", "teacher.train.epochs=2", "train.epochs=1"),
    "teacher.options={hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 16}",
    *("student.layers=1", "bench.seconds=0.1", "bench.rounds=2", "bench.warmup_ms=20", "bench.batches=[1]"),
    "export.parity.limits={fp16: {agreement: 0.5, metric_drop: 50}, int8-cpu: {agreement: 0.3, metric_drop: 50}}",
]
STAGES = ["data", "teacher", "student", "onnx-teacher", "onnx", "onnx-fp16", "onnx-int8-cpu"]


def edgestill(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "toolchain", *arguments]
    env = os.environ | {"COLUMNS": "200"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_the_demos_chain(tmp_path: Path) -> None:
    arguments = ["run", str(CONFIGS / "qa_demo.yaml"), *SMALL, "--out", str(tmp_path / "run"), "--json"]
    reply = edgestill(*arguments, "compile.backend=none")
    assert reply.returncode == 0, reply.stderr
    made = [*STAGES, "bench", "report"]
    assert json.loads(reply.stdout)["made"] == made
    for name in made:
        assert artifact.verify(tmp_path / "run" / name).stage == name
    rows = {row["name"]: row for row in json.loads((tmp_path / "run" / "bench" / "bench.json").read_text())["rows"]}
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows["onnx"]["bytes"] < rows["onnx-teacher"]["bytes"]
    html = (tmp_path / "run" / "report.html").read_text()
    assert "F1 of every question language and context language" in html
    assert '<td dir="auto">' in html
    stages = [json.loads(line) for line in (tmp_path / "run" / "teacher" / "train.jsonl").read_text().splitlines()]
    assert [0 <= line["coefficient"] <= 1 for line in stages if "coefficient" in line] == [True, True]
    reply = edgestill(*arguments, "compile.backend=none")
    assert json.loads(reply.stdout)["reused"] == made


def test_the_demo_learns(tmp_path: Path) -> None:
    arguments = ["run", str(CONFIGS / "qa_demo.yaml"), "--out", str(tmp_path / "run"), "compile.backend=none"]
    reply = edgestill(*arguments)
    assert reply.returncode == 0, reply.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "run" / "bench" / "bench.json").read_text())["rows"]}
    scores = {name: rows[name]["accuracy"]["gxlt_f1"] for name in ("onnx-teacher", "onnx", "onnx-int8-cpu")}
    assert min(scores.values()) > 80, scores
    stages = [json.loads(line) for line in (tmp_path / "run" / "teacher" / "train.jsonl").read_text().splitlines()]
    assert next(line["val"]["gxlt_f1"] for line in stages if line.get("val")) < scores["onnx-teacher"] - 20


def test_a_study_shares_the_first_stage_and_keeps_every_questions_score(tmp_path: Path) -> None:
    study = (CONFIGS / "studies" / "qa_xquad_cpu.yaml").read_text()
    study = study.replace("../qa_xquad.yaml", str(CONFIGS / "qa_demo.yaml"))
    head, _, tail = study.partition("  data:\n")
    study = head + tail[tail.index("  teacher: null") :].replace(
        "model: multilingual-e5-small-12lang, layers: null", "layers: null"
    )
    (tmp_path / "study.yaml").write_text(study)
    small = ["data.articles=[8, 4, 2, 2]", "train.epochs=2", "seeds=[0]"]
    folders = ["--out", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    reply = edgestill("study", str(tmp_path / "study.yaml"), *small, *folders, "--json")
    assert reply.returncode == 0, reply.stderr
    results = tmp_path / "results" / "qa_xquad_cpu.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    methods = yaml.safe_load(study)["methods"]
    assert [row["method"] for row in rows] == list(methods)
    assert all(0 <= row["metrics"]["gxlt_f1"] <= 100 for row in rows)
    samples = tmp_path / "work" / "qa_xquad_cpu" / "samples"
    command = [sys.executable, "-m", "benchmarks.paired", str(results), str(samples), "--against", "ce"]
    reply = subprocess.run(command, capture_output=True, text=True, check=False)
    assert reply.returncode == 0, reply.stderr
    assert reply.stdout.count("| ntl2 |") == 3 * (len(methods) - 1)  # cells, xlt, gxlt_off
