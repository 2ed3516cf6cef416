"""The example for those who embed a shipped folder: no torch, and what it says and draws is right."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from toolchain import artifact
from toolchain.artifact import Port
from toolchain.tasks.tracks import Recording

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "track_pedestrians.py"
FACTORS = (1.0, 0.5, 0.0)  # of the last velocity: one hypothesis each


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("track_pedestrians", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """observed (batch, 8, 2) -> MatMul: the last position, and the last velocity times a factor for 12 steps."""
    weight = np.zeros((8, 2, len(FACTORS), 12, 2), np.float32)
    for k, factor in enumerate(FACTORS):
        for xy in (0, 1):
            steps = factor * np.arange(1, 13)
            weight[7, xy, k, :, xy], weight[6, xy, k, :, xy] = 1 + steps, -steps
    constants = {
        "flat": np.array([-1, 16]),
        "w": weight.reshape(16, -1),
        "shape": np.array([-1, len(FACTORS), 12, 2]),
        "v": np.zeros((16, len(FACTORS)), np.float32),
        "bias": np.array([2, 1, 0], np.float32),
    }
    nodes = [
        helper.make_node("Reshape", ["observed", "flat"], ["x"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Reshape", ["y", "shape"], ["trajectories"]),
        helper.make_node("Gemm", ["x", "v", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probability"], axis=-1),
    ]
    inputs = [Port("observed", "float32", ("batch", 8, 2), "positions", "m")]
    outputs = [
        Port("trajectories", "float32", ("batch", len(FACTORS), 12, 2), "positions", "m"),
        Port("probability", "float32", ("batch", len(FACTORS)), "probability", "0..1"),
    ]
    values = [
        [helper.make_tensor_value_info(p.name, TensorProto.FLOAT, p.shape) for p in ports]
        for ports in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "g", *values, [numpy_helper.from_array(a, name) for name, a in constants.items()])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    folder = tmp_path_factory.mktemp("run") / "onnx"
    with artifact.create(folder, stage="onnx", config={"task": "trajectory"}) as draft:
        onnx.save(proto, str(draft.path / "model.onnx"))
        draft.set_ports(inputs, outputs)
        draft.extra = {"precision": "fp32", "parameters": 0, "opset": 20}
    return folder


def walkers(frames: int = 30) -> str:
    """Agent 1 walks in x all the time; agent 2 in y, away at step 10."""
    rows = [f"{10 * t} 1 {0.5 * t} 0" for t in range(frames)]
    rows += [f"{10 * t} 2 3 {0.4 * t}" for t in range(frames) if t != 10]
    return "\n".join(sorted(rows, key=lambda row: int(row.split()[0]))) + "\n"


def test_it_runs_without_torch(model: Path, tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"code = runpy.run_path({str(SCRIPT)!r})['main']({[str(model), '--out', str(tmp_path / 'a' / 'p.png')]!r})\n"
        "assert code == 0, code\n"
        "print(sorted({'torch', 'onnx', 'pydantic', 'rich'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 0, found.stderr
    said = found.stdout.splitlines()
    assert said[-1] == "[]"
    assert said[0].startswith("latency: p50 ")
    assert " ms per call, n = " in said[0]
    assert "pedestrians a call" in said[0]
    assert "threads: 1" in said[0]
    with Image.open(tmp_path / "a" / "p.png") as picture:
        assert picture.width == 1080
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 100


def test_everyone_known_for_long_enough_is_predicted_in_one_call(
    example: ModuleType, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text(walkers())
    recording = example.read_tracks(tmp_path / "t.txt")
    with example.load(model) as runtime:
        frames, spent = example.predict(runtime, recording, 8)
    by_frame = {frame.frame: frame for frame in frames}
    assert len(spent) == len(frames) == 23
    assert sorted(by_frame) == list(range(70, 300, 10))
    assert by_frame[90].agents == [1, 2]
    assert by_frame[100].agents == by_frame[170].agents == [1]  # 2 was away at 100: it begins anew
    assert by_frame[180].agents == [1, 2]
    one = by_frame[180]
    assert one.observed[0, :, 0].tolist() == [0.5 * t for t in range(11, 19)]
    truth = example.future_of(recording, 180, 1, 12)
    assert np.allclose(one.trajectories[0, 0, :11], truth[:11], atol=1e-4)
    assert len(truth) == 11
    assert len(example.future_of(recording, 80, 2, 12)) == 1


def test_a_gap_of_the_whole_recording_begins_anew(example: ModuleType, model: Path) -> None:
    step = np.r_[0:9, 12:21]
    recording = Recording("r", 10 * step, np.zeros(18, np.int64), np.stack([step, step], 1).astype(np.float64))
    with example.load(model) as runtime:
        frames, _ = example.predict(runtime, recording, 8)
    assert [frame.frame for frame in frames] == [70, 80, 190, 200]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ["{model}", "{tracks}", "--frame", "3"],
            2,
            "--frame 3: nothing was predicted there; give one of 23 from 70 to",
        ),
        (["{model}", "{tracks}", "--frame-step", "7"], 1, "or set --frame-step: 10 divides"),
        (["{model}", "{tracks}", "--columns", "0,1,2,4"], 1, "expected a column 4, found 4 columns; --columns counts"),
        (["{model}", "{short}"], 1, "nobody was in view for 8 frames without a gap"),
        (["{model}", "nowhere.txt"], 1, "nowhere.txt: expected a track file, found nothing there"),
        (["nowhere"], 1, "nowhere"),
    ],
)
def test_mistakes_are_told(
    example: ModuleType,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    places = {"model": model, "tracks": tmp_path / "t.txt", "short": tmp_path / "s.txt"}
    places["tracks"].write_text(walkers())
    places["short"].write_text(walkers(5))
    found = example.main([argument.format(**places) for argument in arguments] + ["--out", str(tmp_path / "p.png")])
    assert found == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_predicted(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main(["nowhere", "--out", "paths.foo"]) == 2
    assert "--out paths.foo: expected a picture (.png, .svg, .pdf, .jpg)" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_unit_is_above_0(example: ModuleType, value: str) -> None:
    with pytest.raises(SystemExit):
        example.main(["nowhere", f"--metres-per-unit={value}"])


@pytest.mark.parametrize("value", ["nan", "inf", "east"])
def test_an_axis_has_an_angle(example: ModuleType, value: str) -> None:
    with pytest.raises(SystemExit):
        example.main(["nowhere", f"--walk-axis={value}"])


@pytest.mark.parametrize("value", ["frame,id,x", "0,1,1,2", "frame,id,x,y,y"])
def test_columns_are_four(example: ModuleType, value: str) -> None:
    with pytest.raises(SystemExit):
        example.main(["nowhere", f"--columns={value}"])


def test_columns_of_a_tracker(
    example: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [line.split() for line in walkers().splitlines()]
    text = "\n".join(["x,y,track,time", *(f"{x},{y},{agent},{frame}" for frame, agent, x, y in rows)])
    (tmp_path / "t.csv").write_text(text)
    (tmp_path / "t.txt").write_text(walkers())
    told = []
    for name, more in (("t.txt", []), ("t.csv", ["--columns", "time,track,x,y"])):
        assert example.main([str(model), str(tmp_path / name), "--out", str(tmp_path / "p.svg"), *more]) == 0
        told.append(capsys.readouterr().out.splitlines()[-1])
    assert told[0] == told[1]
    assert told[0].endswith("of t, 2 pedestrians")


def test_tracks_are_turned_for_a_model_that_wants_them_so(
    example: ModuleType, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(example, "predict", lambda model, recording, steps: seen.append(recording) or ([], []))
    (tmp_path / "t.txt").write_text(walkers())
    for degrees in ("0", "90"):
        example.main([str(model), str(tmp_path / "t.txt"), "--walk-axis", degrees])
    np.testing.assert_allclose(seen[1].xy, seen[0].xy[:, ::-1] * [1, -1], atol=1e-9)


def test_a_model_of_another_task_is_refused(example: ModuleType) -> None:
    from toolchain.runtime import FakeRuntime

    runtime = FakeRuntime([Port("image", "uint8", ("batch", 8, 8, 1))], [Port("label", "int64", ("batch",))], dict)
    with pytest.raises(example.UsageError, match="found image to label; give an onnx or engine folder"):
        example.steps_of(runtime, Path("x"))


def test_no_median_of_a_few_calls(example: ModuleType) -> None:
    frame = example.Frame(0, [1, 2], *(np.zeros(0),) * 3)
    assert "3 calls after 10 to warm up are too few" in example.latency([frame] * 13, [1] * 13, "")
    said = example.latency([frame] * 17, [10**9] * 10 + [2 * 10**6] * 7, "threads: 1")
    assert said.startswith("latency: p50 2.000 ms per call, n = 7 calls")
    assert "2 to 2 pedestrians a call (median 2), threads: 1" in said
