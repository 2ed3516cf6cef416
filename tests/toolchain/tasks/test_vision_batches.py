"""Real stages on random pictures with timm's smallest networks: data, features, probe, student."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from toolchain import distill
from toolchain.artifact import EdgestillError, create, read
from toolchain.config import validate
from toolchain.stage import Job
from toolchain.tasks import Data, Split, load_data, load_task, save_data
from toolchain.tasks import vision_batches as module
from toolchain.tasks.vision import Views, apply_view, apply_view_mask
from toolchain.tasks.vision_nets import normalise
from toolchain.train import Run

COUNT = 24


def config(task="classification", method=None, **train):
    size = 16 if task == "classification" else [16, 24]
    source = {"source": "folder", "path": "unused", "image_size": size, "views": {"count": 3, "shift": 0.2}}
    if task == "segmentation":
        source["classes"] = ["a", "b", "c"]
    return validate(
        {
            "name": "tiny",
            "task": task,
            "data": source,
            "teacher": {"model": "test_resnet", "weights": "random", "image_size": 32, "probe": {"epochs": 1}},
            "student": {"model": "small_cnn", "width": 4},
            "method": method or {"name": "prockd", "K": 4},
            "train": {"epochs": 2, "batch_size": 8} | train,
        }
    )


@pytest.fixture(scope="module", params=["classification", "segmentation"])
def made(request, tmp_path_factory):
    """A folder with data, features and teacher artifacts."""
    root, cfg = tmp_path_factory.mktemp(request.param), config(request.param)
    rng = np.random.default_rng(0)
    dense = request.param == "segmentation"
    height, width = (16, 24) if dense else (16, 16)
    meta = {"classes": ["a", "b", "c"], "ignore_index": 255 if dense else None}

    def split(count):
        shape = (count, height, width) if dense else (count,)
        label = rng.integers(3, size=shape).astype(np.int64)
        return Split(
            {"image": rng.integers(0, 256, (count, height, width, 3), np.uint8), "label": label}, ("image",), meta
        )

    info = meta | {"image_size": [height, width], "channels": 3, "mean": [0.5] * 3, "std": [0.3] * 3}
    sections = cfg.section("task", "data")
    with create(root / "data", stage="data", config=sections) as draft:
        save_data(draft.path, Data({"train": split(COUNT), "val": split(9), "test": split(5)}, info))
    task, inputs = load_task(request.param), {"data": root / "data"}
    for name in ("features", "teacher"):
        getattr(task, name)(Job(name, root / name, cfg.section("seed", "task", "data", "teacher"), dict(inputs)))
        inputs[name] = root / name
    return SimpleNamespace(root=root, cfg=cfg, inputs=inputs, task=request.param)


def run_of(made, cfg, tmp_path):
    return Run(cfg, load_data(made.root / "data"), made.inputs, tmp_path, quiet=True)


def test_a_batch_is_one_view_of_image_label_and_features(made, tmp_path):
    run = run_of(made, made.cfg, tmp_path)
    batches = run.batches("tokens", "teacher_logits")
    train, views = run.data.splits["train"], made.cfg.data.views
    taps = np.load(made.root / "features" / "taps.npy")
    seen = set()
    for batch in batches.epoch(1):
        for row, (index, view) in enumerate(zip(batch["index"].tolist(), batch["view"].tolist(), strict=True)):
            seen.add(view)
            picture = apply_view(np.array(train.arrays["image"][index : index + 1]), view, views)
            assert torch.equal(
                batch["image"][row : row + 1], normalise(torch.from_numpy(picture.copy()), run.data.info)
            )
            assert np.array_equal(batch["tokens"][row].numpy(), taps[view, index].astype(np.float32))
            label = np.array(train.arrays["label"][index : index + 1])
            if label.ndim > 1:
                label = apply_view_mask(label, view, views, 255)
            assert np.array_equal(batch["label"][row : row + 1].numpy(), label)
        assert batch["teacher_logits"].shape[:2] == (8, 3)
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert seen == {0, 1, 2}


def test_views_are_drawn_anew_each_epoch_and_the_same_again(made, tmp_path):
    a, b = (run_of(made, made.cfg, tmp_path).batches() for _ in range(2))
    assert np.array_equal(a.view_of(3), b.view_of(3))
    assert not np.array_equal(a.view_of(3), a.view_of(4))
    assert "tokens" not in next(iter(a.epoch(0)))


def test_views_made_per_batch_are_those_made_at_once(made, monkeypatch, tmp_path):
    run = run_of(made, made.cfg, tmp_path)
    whole = next(iter(run.batches().epoch(0)))
    monkeypatch.setattr(module, "IN_MEMORY_BYTES", 0)
    lazy = next(iter(run.batches().epoch(0)))
    assert torch.equal(whole["image"], lazy["image"])
    assert torch.equal(whole["label"], lazy["label"])


def test_a_method_that_needs_a_teacher_says_so(made, tmp_path):
    run = run_of(made, made.cfg, tmp_path)
    run.inputs = {"data": run.inputs["data"]}
    with pytest.raises(EdgestillError, match="prockd learns from a teacher"):
        run.batches("tokens")
    with pytest.raises(EdgestillError, match="expected some of tokens"):
        run.batches("token")


@pytest.mark.parametrize(
    "method", [{"name": "prockd", "K": 4, "infer": "aug"}, {"name": "fitnet"}, {"name": "hinton"}, {"name": "plain"}]
)
def test_the_student_stage(made, tmp_path, method):
    cfg = config(made.task, method)
    keys = ("seed", "task", "data", "teacher", "student", "method", "train")
    job = Job("student", tmp_path / "student", cfg.section(*keys), made.inputs)
    distill.run(job)
    manifest = read(job.out)
    assert sorted(manifest.files) == ["model.safetensors", "train.jsonl"]
    assert manifest.extra["info"]["classes"] == ["a", "b", "c"]
    assert [stage["name"] for stage in manifest.extra["stages"]] == ["student"]
    assert not job.work.exists()
    loaded = load_task(made.task).load_student(job.out)
    assert sum(p.numel() for p in loaded.parameters()) == manifest.extra["parameters"]
    run = run_of(made, cfg, tmp_path / "again")
    assert run.scorer()(loaded) == manifest.metrics["val"]


def test_views_section_default_is_the_picture_itself():
    lookup = module.viewed(np.ones((2, 8, 8, 3), np.uint8), Views(), torch.device("cpu"))
    assert lookup(np.array([0]), np.array([1])).shape == (1, 8, 8, 3)
