from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from toolchain import artifact
from toolchain.artifact import ArtifactError
from toolchain.checkpoint import save_tensors
from toolchain.tasks.backbones import ModelError
from toolchain.tasks.vision import StudentSection
from toolchain.tasks.vision_nets import (
    Normalise,
    Student,
    build_student,
    count_parameters,
    deploy,
    load_student,
    normalise,
)


def info(side: int | tuple[int, int] = 32, channels: int = 3) -> dict[str, Any]:
    size = [side, side] if isinstance(side, int) else list(side)
    mean, std = [0.4, 0.5, 0.6][:channels], [0.2, 0.25, 0.3][:channels]
    return {"image_size": size, "channels": channels, "classes": [str(i) for i in range(5)], "mean": mean, "std": std}


def build(side: int | tuple[int, int] = 32, task: str = "classification", seed: int = 0, **section: Any) -> Student:
    return build_student(StudentSection(**section), info(side), task, seed)


def weights(student: nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten() for value in student.state_dict().values() if value.is_floating_point()])


@pytest.mark.parametrize(("side", "grid"), [(8, 8), (28, 7), (32, 8), (64, 8), (96, 6)])
def test_small_cnn_is_small_and_ends_on_a_grid_of_at_most_8(side: int, grid: int) -> None:
    student = build(side, width=32).eval()
    image = torch.randn(2, 3, side, side)
    assert student.width == 128
    assert student.features(image).shape == (2, 128, grid, grid)
    assert student(image).shape == (2, 5)
    assert count_parameters(student) <= 200_000


def test_dense_small_cnn_and_a_head_that_reads_any_grid() -> None:
    student = build((45, 60), "segmentation").eval()
    assert student.features(torch.randn(1, 3, 45, 60)).shape == (1, 128, 6, 8)
    assert student(torch.randn(1, 3, 45, 60)).shape == (1, 5, 45, 60)
    assert student.head(torch.randn(1, 128, 3, 3)).shape == (1, 5, 45, 60)
    assert build().eval().head(torch.randn(1, 128, 1, 7)).shape == (1, 5)
    assert count_parameters(student) <= 500_000


def test_the_start_depends_on_the_seed_alone() -> None:
    first = weights(build())
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(first, weights(build()))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, weights(build(seed=1)))


@pytest.mark.parametrize(("model", "shape"), [("test_resnet", (96, 2, 2)), ("test_vit", (64, 4, 4))])
def test_any_timm_model(model: str, shape: tuple[int, int, int]) -> None:
    student = build(64, model=model)
    assert student.eval().features(torch.randn(2, 3, 64, 64)).shape == (2, *shape)
    assert student.width == shape[0]
    assert torch.equal(weights(student), weights(build(64, model=model)))


def test_own_modules_by_dotted_path() -> None:
    assert build(8, model="torch.nn:Identity").width == 3
    vector = build(8, model="torch.nn:Flatten", options={"start_dim": 1}).eval()
    assert vector(torch.randn(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"model": "resnet_18"}, "nearest: .*resnet18"),
        ({"model": "no.such:thing"}, "No module named"),
        ({"model": "torch.nn:Nothing"}, "Nothing"),
        ({"model": "os:getenv", "options": {"key": 1}}, "getenv"),
        ({"model": "torch:float32"}, "is no function or class"),
        ({"model": "builtins:dict"}, "should give an nn.Module, found dict"),
        ({"model": "torch.nn:Unfold", "options": {"kernel_size": 2}}, r"expected a map .* found \[1, 12, 961\]"),
        ({"model": "torch.nn:Conv2d", "options": {"in_channels": 7, "out_channels": 2, "kernel_size": 1}}, "fails on"),
        ({"options": {"deepness": 3}}, "options .* do not suit small_cnn"),
        ({"max_parameters": 1000}, "allowed 1,000, found 135,"),
        ({"model": "test_vit", "options": {"bogus": 1}}, "cannot build timm model"),
        ({"weights": "missing.safetensors"}, "no such file"),
    ],
)
def test_errors_name_what_is_wrong(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(32, **section)


def test_normalise_is_one_thing_in_training_and_in_the_graph() -> None:
    pictures = torch.randint(0, 256, (2, 6, 5, 3), dtype=torch.uint8)
    found = normalise(pictures, info())
    expected = (pictures.permute(0, 3, 1, 2) / 255 - torch.tensor(info()["mean"])[:, None, None]) / torch.tensor(
        info()["std"]
    )[:, None, None]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found, Normalise(info())(pictures))
    assert found.is_contiguous(memory_format=torch.channels_last)


def written(folder: Path, student: nn.Module, method: dict[str, Any], width: int = 8) -> Path:
    section = StudentSection(width=width).model_dump(mode="json")
    config = {"seed": 3, "task": "classification", "student": section, "method": method}
    with artifact.create(folder, stage="student", config=config) as draft:
        save_tensors(draft.path / "model.safetensors", student.state_dict())
        draft.extra = {"info": info()}
    return folder


def test_a_student_comes_back_from_its_artifact_alone(tmp_path: Path) -> None:
    student = build(width=8, seed=7).eval()
    loaded = load_student(written(tmp_path / "student", student, {"name": "plain"}))
    image = torch.randn(2, 3, 32, 32)
    assert not loaded.training
    assert torch.equal(student(image), loaded(image))
    with pytest.raises(ArtifactError, match="not the weights of this model"):
        load_student(written(tmp_path / "other", student, {"name": "plain"}, width=16))


def test_an_augmenting_student_comes_back(tmp_path: Path) -> None:
    prockd = pytest.importorskip("toolchain.methods.prockd")
    method = {"name": "prockd", "infer": "aug", "K": 4}
    student = prockd.aug_student(build(width=8), method).eval()
    loaded = load_student(written(tmp_path / "student", student, method))
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(student(image), loaded(image))


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    with artifact.create(
        tmp_path / "student", stage="student", config={"task": "classification", "student": {"width": 8}}
    ) as draft:
        torch.save(build(width=8).state_dict(), draft.path / "model.safetensors")
        draft.extra = {"info": info()}
    with pytest.raises(ArtifactError, match="expected safetensors, found a pickle"):
        load_student(tmp_path / "student")


def test_weights_of_a_file_start_a_student(tmp_path: Path) -> None:
    earlier = build(width=8, seed=5)
    save_tensors(tmp_path / "earlier.safetensors", earlier.state_dict())
    started = build(width=8, weights=str(tmp_path / "earlier.safetensors"))
    assert torch.equal(weights(started.body), weights(earlier.body))
    with pytest.raises(ModelError, match="not weights of this model"):
        build(width=16, weights=str(tmp_path / "earlier.safetensors"))


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_deployed_from_pixels_to_decoded_answers(task: str) -> None:
    student = build(16, task, width=4).eval()
    ready = deploy(student, {"task": task}, info(16))
    pictures = ready.example["image"]
    with torch.inference_mode():
        probabilities, label = ready.module(pictures)
        logits = student(normalise(pictures, info(16)))
    torch.testing.assert_close(probabilities, logits.softmax(1))
    assert torch.equal(label, logits.argmax(1))
    for port, value in zip(ready.outputs, (probabilities, label), strict=True):
        assert tuple(value.shape) == (2, *port.shape[1:])
        assert value.numpy().dtype == np.dtype(port.dtype)
    assert [port.name for port in ready.inputs] == ["image"]
    assert ready.dynamic == {"image": {0: "batch"}}
