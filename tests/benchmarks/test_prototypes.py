"""The pictures of prototypes are of those that a training uses."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import prototypes
from tests.toolchain.tasks.test_vision_batches import config, made, run_of
from toolchain.artifact import EdgestillError
from toolchain.checkpoint import load_tensors
from toolchain.distill import load_method
from toolchain.methods.prototypes import unit

__all__ = ["made"]  # the fixture

METHOD = {"name": "prockd", "preset": "assignment", "K": 3}


@pytest.fixture
def seen(made, tmp_path):
    cfg = config(made.task, METHOD, epochs=1)
    run = run_of(made, cfg, tmp_path)
    return cfg, run, prototypes.look(cfg, run.data, made.inputs)


def test_they_are_what_a_training_learns_and_their_nearest_tokens_are_nearest(made, seen):
    cfg, run, found = seen
    load_method("prockd").distill(cfg, run)
    trained = load_tensors(run.folders[-1] / "model.safetensors")["banks.C"]
    taps = torch.from_numpy(np.load(made.inputs["features"] / "taps.npy")[0]).float()
    channels = run.batches("tokens").tap_channels
    assert [len(tap.share) for tap in found.taps] == [3] * len(channels)
    for tap, bank, part in zip(found.taps, trained.split(channels, -1), taps.split(channels, -1), strict=True):
        assert tap.share.sum() == pytest.approx(100, abs=0.01)
        assert 1 <= tap.perplexity <= 3.001
        cosine = (unit(part) @ bank.T).flatten(0, 1)
        for k, nearest in enumerate(tap.nearest):
            assert cosine[nearest[0], k] == pytest.approx(cosine[:, k].max().item())
            assert len({int(token) // part.shape[1] for token in nearest}) == len(nearest)


def test_the_pictures_are_drawn(seen):
    _, run, found = seen
    for content in (prototypes.patches(found, run.data), prototypes.usage(found, ["a", "b", "c"])):
        picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        assert picture.std() > 10


def test_a_run_without_prototypes_is_refused(made, tmp_path):
    cfg = config(made.task, {"name": "prockd"})
    run = run_of(made, cfg, tmp_path)
    with pytest.raises(EdgestillError, match="expected prockd with preset assignment"):
        prototypes.look(cfg, run.data, made.inputs)
