from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export.onnx import ExportError, call_torch, export, prove_batches, run, weights_in
from export.verify import ParityError, cpu_call
from toolchain import artifact
from toolchain.artifact import ArtifactError, Port
from toolchain.checkpoint import save_tensors
from toolchain.config import ExportSection
from toolchain.stage import Job
from toolchain.tasks import Data, Split, load_data, save_data, teacher
from toolchain.tasks.vision import StudentSection, TeacherSection
from toolchain.tasks.vision_nets import build_student, deploy

INFO = {"classes": list("abc"), "image_size": [12, 12], "channels": 1, "mean": [0.4], "std": [0.3], "ignore_index": 255}


def write_data(folder: Path, task: str) -> Path:
    rng = np.random.default_rng(0)
    splits = {}
    for name, count in {"train": 12, "val": 20, "test": 40}.items():
        shape = (count,) if task == "classification" else (count, 12, 12)
        arrays = {"image": rng.integers(0, 256, (count, 12, 12, 1), np.uint8), "label": rng.integers(0, 3, shape)}
        splits[name] = Split(arrays, ("image",), {"classes": INFO["classes"], "ignore_index": 255})
    with artifact.create(folder, stage="data", config={}) as draft:
        save_data(draft.path, Data(splits, INFO))
    return folder


def write_student(folder: Path, task: str) -> Path:
    section = StudentSection(width=4)
    student = build_student(section, INFO, task, 0)
    config = {"seed": 0, "task": task, "student": section.model_dump(mode="json"), "method": {"name": "plain"}}
    with artifact.create(folder, stage="student", config=config) as draft:
        save_tensors(draft.path / "model.safetensors", student.state_dict())
        draft.extra = {"info": INFO}
    return folder


def job(root: Path, task: str, which: str = "student", **export: Any) -> Job:
    settings = ExportSection(**export).model_dump(mode="json")
    config = {"task": task, "which": which, "export": settings}
    return Job("onnx", root / "onnx", config, {"model": root / which, "data": root / "data"})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("classification")
    write_data(folder / "data", "classification")
    write_student(folder / "student", "classification")
    run(job(folder, "classification"))
    return folder


def test_a_student_becomes_a_whole_artifact(root: Path) -> None:
    manifest = artifact.verify(root / "onnx")
    assert sorted(manifest.files) == ["model.onnx", "samples.npz"]
    assert manifest.inputs_ports[0].shape == ("batch", 12, 12, 1)
    assert [port.name for port in manifest.outputs_ports] == ["probabilities", "label"]
    extra = manifest.extra
    assert (extra["precision"], extra["opset"], extra["task"], extra["float_nodes"]) == (
        "fp32",
        20,
        "classification",
        [],
    )
    assert extra["verify"]["passed"]
    assert extra["verify"]["samples"] == 20
    assert extra["info"] == INFO
    assert 0 < extra["parameters"] <= extra["trained_parameters"] + 8
    with np.load(root / "onnx" / "samples.npz") as samples:
        np.testing.assert_array_equal(samples["image"], load_data(root / "data").splits["test"].arrays["image"][:32])


def test_the_graph_is_folded_standard_and_dynamic(root: Path) -> None:
    model = onnx.load(root / "onnx" / "model.onnx")
    kinds = {node.op_type for node in model.graph.node}
    assert "BatchNormalization" not in kinds
    assert {entry.domain for entry in model.opset_import} == {""}
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    call = cpu_call(str(root / "onnx" / "model.onnx"))
    pictures = load_data(root / "data").splits["test"].feed(slice(None))
    whole = call(pictures)
    for size in (1, 5, 40):
        part = call({"image": pictures["image"][:size]})
        np.testing.assert_allclose(part["probabilities"], whole["probabilities"][:size], atol=1e-5)
    np.testing.assert_array_equal(whole["label"], whole["probabilities"].argmax(1))


def test_the_parity_gate_fails_the_stage(root: Path, tmp_path: Path) -> None:
    tight = job(root, "classification", parity={"limits": {"fp32": {"max_difference": 1e-12}}})
    with pytest.raises(
        ParityError, match=r"probabilities differs from torch by .* \(export.parity.limits.fp32.max_difference\)"
    ):
        run(dataclasses.replace(tight, out=tmp_path / "onnx"))
    assert not (tmp_path / "onnx").exists()


def test_a_dense_teacher_is_exported_with_its_taps(tmp_path: Path) -> None:
    task = "segmentation"
    write_data(tmp_path / "data", task)
    section = TeacherSection(model="test_resnet", weights="random", image_size=32, taps=("layer2", "layer3"))
    body = teacher.TeacherBody(section, 1)
    probe = teacher.Probe(sum(body.tap_channels), 3, body.grid, (12, 12))
    nn.init.normal_(probe.linear.weight)
    model = teacher.ProbeTeacher(body, probe, INFO)
    config = {"seed": 0, "task": task, "teacher": section.model_dump(mode="json")}
    with artifact.create(tmp_path / "teacher", stage="teacher", config=config) as draft:
        save_tensors(draft.path / "model.safetensors", model.state_dict())
        shape = {"width": sum(body.tap_channels), "classes": 3, "grid": list(body.grid)}
        draft.extra = {"info": INFO, "probe": shape}
    run(job(tmp_path, task, "teacher"))
    manifest = artifact.verify(tmp_path / "onnx")
    assert manifest.extra["verify"]["agreement"] > 0.999
    assert manifest.outputs_ports[1].shape == ("batch", 12, 12)


def test_a_pickle_is_no_student(root: Path, tmp_path: Path) -> None:
    with artifact.create(tmp_path / "student", stage="student", config=artifact.read(root / "student").config) as draft:
        torch.save({}, draft.path / "model.safetensors")
        draft.extra = {"info": INFO}
    work = job(root, "classification")
    with pytest.raises(ArtifactError, match="found a pickle"):
        run(dataclasses.replace(work, inputs=work.inputs | {"model": tmp_path / "student"}, out=tmp_path / "onnx"))


class Branching(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image if image.float().sum() > 3 else -image


class Fixed(nn.Module):
    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = image.float().reshape(2, -1)[:, :3]
        return flat.softmax(1), flat.argmax(1)


@pytest.mark.parametrize("module", [Branching(), Fixed()])
def test_what_cannot_be_exported_says_so(module: nn.Module, tmp_path: Path) -> None:
    ready = deploy(nn.Identity(), {"task": "classification"}, INFO)
    ready.module = module
    with pytest.raises(ExportError, match=r"cannot export|other ports"):
        export(ready, tmp_path / "model.onnx", 20)
    assert not (tmp_path / "model.onnx").exists()


def test_ports_must_be_those_the_task_declares(tmp_path: Path) -> None:
    student = build_student(StudentSection(width=4), INFO, "classification", 0).eval()
    ready = deploy(student, {"task": "classification"}, INFO)
    ready.outputs[0] = Port("probabilities", "float32", ("batch", 7))
    with pytest.raises(ExportError, match=r"expected .*'batch', 7.*found .*'batch', 3"):
        export(ready, tmp_path / "model.onnx", 20)


def test_batch_sizes_are_proven() -> None:
    split = Split({"image": np.zeros((4, 2), np.uint8)}, ("image",))

    def good(feeds: Any) -> dict[str, np.ndarray]:
        return {"y": feeds["image"].astype(np.float32)}

    def stuck(feeds: Any) -> dict[str, np.ndarray]:
        return {"y": np.zeros((1, 2), np.float32)}

    def breaks(feeds: Any) -> dict[str, np.ndarray]:
        raise RuntimeError("Got invalid dimensions")

    prove_batches(good, good, split)
    with pytest.raises(ExportError, match="batch of 3: expected y of shape"):
        prove_batches(good, stuck, split)
    with pytest.raises(ExportError, match="fails on a batch of 1: Got invalid"):
        prove_batches(good, breaks, split)


def test_torch_is_called_by_port_names() -> None:
    student = build_student(StudentSection(width=4), INFO, "classification", 0).eval()
    outputs = call_torch(deploy(student, {"task": "classification"}, INFO))(
        {"image": np.zeros((3, 12, 12, 1), np.uint8)}
    )
    assert {name: value.shape for name, value in outputs.items()} == {"probabilities": (3, 3), "label": (3,)}


def test_values_that_depend_on_the_batch_size_are_found() -> None:
    split = Split({"x": np.arange(12, dtype=np.float32).reshape(6, 2)}, ("x",))

    def expected(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": feeds["x"] * 2}

    def found(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": feeds["x"] * 2 + (len(feeds["x"]) == 3)}

    prove_batches(expected, expected, split, 1e-6)
    with pytest.raises(ParityError, match="batch of 3: y differs from torch by 1"):
        prove_batches(expected, found, split, 1e-3)


def test_a_weight_that_stands_twice_counts_once() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    named = [(name, array + shift) for name, shift in (("a", 0), ("again", 0), ("b", 1))]
    weights = [onnx.numpy_helper.from_array(value, name) for name, value in named]
    count = onnx.numpy_helper.from_array(np.arange(9), "count")
    graph = onnx.helper.make_graph([], "g", [], [], initializer=[*weights, count])
    assert weights_in(onnx.helper.make_model(graph)) == 12
