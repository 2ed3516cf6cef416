"""The whole chain on simulated pedestrians, once; then what a person does with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from toolchain import artifact
from toolchain.runtime import load

DEMO = Path(__file__).parents[1] / "configs" / "trajectory_demo.yaml"
NETWORK = "{model: %s, hypotheses: 5, width: 8, depth: 1, heads: 2}"
SMALL = [
    *("data.recordings=1", "data.train_samples=200", f"teacher.student={NETWORK % 'ppt'}", "teacher.method.winners=5"),
    *(f"teacher.method.{task}.epochs=1" for task in ("step", "warmup", "destination", "complete")),
    "compile.precisions=[int8-trt]",
    *(f"student={NETWORK % 'one_shot'}", "train.epochs=2", "train.threads=1", "bench.batches=[1, 4]"),
    *("bench.seconds=0.1", "bench.rounds=2", "bench.warmup_ms=20", "bench.paced_seconds=0.2", "bench.paced_fps=30"),
    *("compile.batch.max=16", "export.calibration.samples=64"),
    "export.parity.limits={int8-cpu: {metric_drop: 5}, int8-trt: {metric_drop: 5}}",
]
STAGES = ["data", "teacher", "predictions", "student", "onnx-teacher", "onnx", "onnx-fp16", "onnx-int8-cpu"]
STAGES += ["onnx-int8-trt", "engine-sm_86-int8-trt", "bench", "report"]


def edgestill(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "toolchain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}, check=False)


def builder() -> bool:
    try:
        import tensorrt_rtx  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def settings() -> list[str]:
    """Engines are built where the builder is installed."""
    return [*SMALL, f"compile.backend={'tensorrt-rtx' if builder() else 'none'}"]


@pytest.fixture(scope="module")
def stages() -> list[str]:
    return [name for name in STAGES if builder() or not name.startswith("engine")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, settings: list[str], stages: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    reply = edgestill("run", str(DEMO), *settings, "--out", str(folder), "--json")
    assert reply.returncode == 0, reply.stderr
    assert json.loads(reply.stdout)["made"] == stages
    return folder


def test_every_stage_left_a_verified_artifact(root: Path, stages: list[str]) -> None:
    for name in stages:
        assert artifact.verify(root / name).stage == name
    assert {path.name for path in root.iterdir()} >= {"report.html", "report.md", "summary.json", "config.json"}
    assert not (root / ".work").exists()


def test_a_second_run_reuses_everything(root: Path, settings: list[str]) -> None:
    reply = edgestill("run", str(DEMO), *settings, "--out", str(root))
    assert reply.returncode == 0, reply.stderr
    assert "already complete: every stage was reused" in reply.stderr


def test_the_ledger_scores_the_teacher_first_and_loses_little_on_the_way(root: Path) -> None:
    value = json.loads((root / "bench" / "bench.json").read_text())
    rows = {row["name"]: row for row in value["rows"]}
    assert list(rows)[:3] == ["onnx-teacher", "student", "onnx"]
    assert (value["metric"]["name"], value["metric"]["unit"]) == ("minADE", "m")
    for name, row in rows.items():
        if not name.startswith("engine"):
            assert row["status"] == "ok", row
            scores = row["accuracy"]
            assert 0 < scores["minADE"] <= scores["meanADE"]
            assert scores["minADE"] <= scores["topADE"]
    assert rows["onnx"]["accuracy"]["minADE"] == pytest.approx(rows["student"]["accuracy"]["minADE"], abs=1e-4)
    html = (root / "report.html").read_text()
    assert "minADE" in html


def test_the_shipped_folder_needs_no_torch_and_predicts_in_the_world(root: Path) -> None:
    code = (
        "import sys, numpy as np\nfrom toolchain.runtime import load\n"
        f"observed = np.load({str(root / 'onnx-int8-cpu' / 'samples.npz')!r})['observed'][:3]\n"
        f"with load({str(root / 'onnx-int8-cpu')!r}) as model:\n"
        "    out = model({'observed': observed})\n"
        "assert out['trajectories'].shape == (3, 5, 12, 2), out\n"
        "assert np.abs(out['probability'].sum(1) - 1).max() < 1e-5\n"
        "heavy = {'torch', 'onnx', 'pydantic', 'timm', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_any_number_of_pedestrians_anywhere_gives_the_same_answers(root: Path) -> None:
    observed = np.load(root / "onnx" / "samples.npz")["observed"]
    with load(root / "onnx") as model:
        whole = model({"observed": observed})["trajectories"]
        single = [model({"observed": observed[i : i + 1] + np.float32(16)})["trajectories"] for i in range(9)]
    np.testing.assert_allclose(np.concatenate(single), whole[:9] + 16, atol=1e-3)


@pytest.mark.slow
def test_a_finished_ppt_teaches_the_next_run(root: Path, settings: list[str], tmp_path: Path) -> None:
    """Method ppt from the command, and its folder as the teacher of another run."""
    shutil.copytree(root / "data", tmp_path / "ppt" / "data")
    alone = tmp_path / "ppt.yaml"
    demo = yaml.safe_load(DEMO.read_text())
    method = {"name": "ppt"} | demo["teacher"]["method"]
    alone.write_text(yaml.safe_dump(demo | {"method": method, "student": demo["teacher"]["student"], "teacher": None}))
    mine = [item.replace("teacher.", "") for item in settings if not item.startswith("student=")]
    reply = edgestill("distill", str(alone), *mine, "--out", str(tmp_path / "ppt"), "--json")
    assert reply.returncode == 0, reply.stderr
    assert json.loads(reply.stdout)["reused"] == ["data"]
    shutil.copytree(root / "data", tmp_path / "student" / "data")
    demo["teacher"] = {"folder": str(tmp_path / "ppt" / "student"), "versions": 1}
    taught = tmp_path / "taught.yaml"
    taught.write_text(yaml.safe_dump(demo))
    theirs = [item for item in settings if not item.startswith("teacher.method")]
    reply = edgestill("distill", str(taught), *theirs, "--out", str(tmp_path / "student"), "--json")
    assert reply.returncode == 0, reply.stderr
    assert json.loads(reply.stdout)["made"] == ["teacher", "predictions", "student"]
    files = [
        artifact.read(tmp_path / a / b).files["model.safetensors"]
        for a, b in (("ppt", "student"), ("student", "teacher"))
    ]
    assert files[0] == files[1]


def test_a_dry_run_describes_both_networks_and_trains_nothing(settings: list[str], tmp_path: Path) -> None:
    reply = edgestill("run", str(DEMO), *settings, "--out", str(tmp_path / "run"), "--dry-run", "--json")
    assert reply.returncode == 0, reply.stderr
    checked = json.loads(reply.stdout)["checked"]
    assert checked["samples"]["train"] == 200
    assert checked["teacher"].startswith("ppt, ")
    assert "5 hypotheses" in checked["student"]
    assert not (tmp_path / "run" / "data").exists()


def test_a_wrong_key_ends_with_exit_code_2_and_its_remedy(settings: list[str], tmp_path: Path) -> None:
    reply = edgestill("run", str(DEMO), *settings, "student.hypotheses=6", "--out", str(tmp_path / "run"))
    assert reply.returncode == 2
    assert "student.hypotheses: expected the teacher's 5 hypotheses, found 6" in reply.stderr


def test_a_broken_track_file_is_named_with_its_line(tmp_path: Path) -> None:
    lines = [f"{10 * frame} 1 {0.4 * frame:.2f} 2.0" for frame in range(200)]
    lines[7] = "70 1 2,80 2.0"
    (tmp_path / "tracks.txt").write_text("\n".join(lines) + "\n")
    source = f"data={{source: files, path: {tmp_path / 'tracks.txt'}}}"
    reply = edgestill("run", str(DEMO), source, "--out", str(tmp_path / "run"))
    assert reply.returncode == 1, reply.stderr
    assert f"{tmp_path / 'tracks.txt'}:8: expected" in reply.stderr
    assert "Traceback" not in reply.stderr
    assert not (tmp_path / "run" / "data").exists()
