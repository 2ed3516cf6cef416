"""PPT and the student that ships as ONNX graphs, against torch, and their int8 graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.half import COMPUTE, measured
from export.onnx import call_torch, export
from export.precision import run as make_precise
from export.verify import cpu_call
from tests.toolchain.methods.walks import EXPORT, INFO, NET, OBSERVE, shaken, walks
from toolchain import artifact
from toolchain.runtime import Runtime, load
from toolchain.stage import Job
from toolchain.tasks import trajectory
from toolchain.tasks.trajectory import LIMITS, StudentSection
from toolchain.tasks.trajectory_ensemble import Ensemble
from toolchain.tasks.trajectory_nets import build

FRAME = ("speed_floor", 0.4), ("align_heading", True), ("depth", 1)


@pytest.fixture(params=[("ppt",), ("one_shot",), ("ppt", *FRAME), ("one_shot", *FRAME)], ids=str)
def root(request: pytest.FixtureRequest, exported_tracks: Callable[..., Path]) -> Path:
    return exported_tracks(*request.param)


@pytest.fixture
def graph(root: Path) -> Iterator[Runtime]:
    with load(root / "onnx") as model:
        yield model


@pytest.mark.parametrize("count", [1, 7, 64])
def test_the_graph_says_what_torch_says_for_any_number_of_pedestrians(root: Path, graph: Runtime, count: int) -> None:
    observed = walks(count, 5).arrays["observed"]
    net = trajectory.load_student(root / "student")
    expected = call_torch(trajectory.deploy(net, artifact.read(root / "student").config, INFO))({"observed": observed})
    found = graph({"observed": observed})
    assert list(found) == ["trajectories", "probability"]
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert np.abs(found[name] - value).max() < 1e-4, name
    assert np.abs(found["trajectories"][:, :, 0] - observed[:, None, -1]).max() > 0.01, "nothing moves"


def test_coordinates_are_the_worlds_own(graph: Runtime) -> None:
    observed = walks(9, 6).arrays["observed"]
    there = np.array([64.0, -32.0], np.float32)
    here, moved = graph({"observed": observed}), graph({"observed": observed + there})
    np.testing.assert_allclose(moved["trajectories"], here["trajectories"] + there, atol=1e-3)
    np.testing.assert_allclose(moved["probability"], here["probability"], atol=1e-4)
    np.testing.assert_allclose(here["probability"].sum(1), 1, atol=1e-6)
    assert (here["probability"] >= 0).all()


def test_the_ports_tell_the_unit_and_the_steps(root: Path) -> None:
    manifest = artifact.verify(root / "onnx")
    assert manifest.inputs_ports[0].shape == ("batch", OBSERVE, 2)
    assert [(port.name, port.unit) for port in manifest.outputs_ports] == [
        ("trajectories", "m"),
        ("probability", "0..1"),
    ]
    assert "every 0.4 s" in manifest.inputs_ports[0].meaning
    assert manifest.extra["verify"]["metric"] == "minADE"


def before(model: Any, name: str) -> set[str]:
    """Operators of what the data input of node ``name`` is computed with."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    (node,) = (node for node in model.graph.node if node.name == name)
    waiting, found = [node.input[0]], set[str]()
    while waiting:
        if node := made_by.get(waiting.pop()):
            found.add(node.op_type)
            waiting += node.input
    return found


@pytest.mark.parametrize("precision", ["int8-cpu", "int8-trt"])
def test_positions_are_read_in_float_where_the_rest_is_int8(root: Path, precision: str, tmp_path: Path) -> None:
    import onnx

    loose = {"limits": {precision: {"metric_drop": 1e6}}, "samples": 10}
    config = {"task": "trajectory", "precision": precision, "export": EXPORT | {"parity": loose}}
    job = Job("onnx-" + precision, tmp_path / precision, config, {"onnx": root / "onnx", "data": root / "data"})
    make_precise(job)
    manifest = artifact.verify(job.out)
    first, floats = measured(onnx.load(root / "onnx" / "model.onnx")), set(manifest.extra["float_nodes"])
    assert len(first) == (2 if root.name.startswith("ppt") else 1), "an input layer for each of PPT's two predictors"
    assert first <= floats
    if root.name.startswith("one_shot"):
        assert "QuantizeLinear" not in before(onnx.load(job.out / "model.onnx"), *first)
    compute = [node for node in onnx.load(job.out / "model.onnx").graph.node if node.op_type in COMPUTE]
    assert len(floats) < len(compute) / 2
    with load(job.out) as model:
        found = model({"observed": walks(3, 7).arrays["observed"]})
    assert np.isfinite(found["trajectories"]).all()


@pytest.mark.parametrize("mirrored", [False, True])
def test_an_ensembles_graph_merges_as_torch_does(mirrored: bool, tmp_path: Path) -> None:
    sections = [
        StudentSection(model="ppt", **NET),
        StudentSection(model="ppt", **(NET | {"width": 12}), speed_floor=0.4),
    ]
    members = [shaken(build(section, INFO, 0), seed).float() for seed, section in enumerate(sections)]
    config = {"student": sections[0].model_dump()}
    ready = trajectory.deploy(Ensemble(members, mirrored=mirrored), config, INFO)
    export(ready, tmp_path / "model.onnx", 20)
    found, expected = cpu_call(str(tmp_path / "model.onnx")), call_torch(ready)
    for count in (1, 7, 64):
        feeds = {"observed": walks(count, 5).arrays["observed"]}
        ours, theirs = expected(feeds), found(feeds)
        for name, value in ours.items():
            assert np.abs(theirs[name] - value).max() < LIMITS["fp32"]["max_difference"]
