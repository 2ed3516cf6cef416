"""FitNet, VkD, inverted projection, Hinton: they learn, ship the student alone, and compute what they say."""

import importlib

import pytest
import torch

from tests.toolchain.methods.doubles import CHANNELS, GRID, WIDTH, same, samples, student, tiny_run, weights
from toolchain import losses
from toolchain.grids import map_of, resized, tokens_of
from toolchain.methods.fitnet import FitNet
from toolchain.methods.hinton import Hinton
from toolchain.methods.inverted_projection import InvertedProjection
from toolchain.methods.options import OPTIONS
from toolchain.methods.vkd import VkD


@pytest.mark.parametrize("name", ["plain", "fitnet", "vkd", "inverted_projection", "hinton"])
@pytest.mark.parametrize("dense", [False, True])
def test_each_baseline_learns_and_ships_the_student_alone(tmp_path, name, dense):
    run = tiny_run(tmp_path, method=OPTIONS[name](name=name), train={"epochs": 12, "lr": 0.02}, dense=dense)
    shipped = importlib.import_module(f"toolchain.methods.{name}").distill(run.cfg, run)
    assert shipped.state_dict().keys() == student(dense=dense).state_dict().keys()
    assert run.records[0]["val"]["accuracy"] > 60


def features_of(distiller, batch):
    return distiller.student.features(batch["image"])


def test_fitnet_is_cross_entropy_and_weighted_hint():
    made, batch = FitNet(student(), CHANNELS, GRID, 20.0).eval(), samples()
    out = made(batch)
    pooled = torch.nn.functional.adaptive_avg_pool2d(features_of(made, batch), GRID).flatten(2).transpose(1, 2)
    hint = (pooled @ made.regressor.weight.T + made.regressor.bias - batch["tokens"]).square().mean()
    torch.testing.assert_close(out["hint"], hint)
    torch.testing.assert_close(out["loss"], out["ce"] + 20 * hint)


def test_vkd_projector_stays_orthogonal_while_it_learns():
    made, batch = VkD(student(), CHANNELS, 20.0), samples()
    optimizer = torch.optim.AdamW(made.param_groups(0.05), lr=0.05)
    start = made.projector.matrix().detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        made(batch)["loss"].backward()
        optimizer.step()
    weight = made.projector.matrix().detach()
    torch.testing.assert_close(weight.T @ weight, torch.eye(WIDTH), atol=1e-5, rtol=0)
    assert (weight - start).abs().max() > 1e-3
    decayed = [id(p) for p in made.param_groups(0.1)[0]["params"]]
    assert id(made.projector.free) not in decayed
    rows = VkD(student(), 4, 20.0).projector.matrix()
    torch.testing.assert_close(rows @ rows.T, torch.eye(4), atol=1e-5, rtol=0)


def test_inverted_projection_projects_the_teacher():
    made, batch = InvertedProjection(student(), CHANNELS, GRID, 20.0).eval(), samples()
    assert made.projector.weight.shape == (WIDTH, CHANNELS)
    pooled = tokens_of(resized(features_of(made, batch), GRID))
    expected = losses.inverted_projection(pooled, batch["tokens"] @ made.projector.weight.T)
    torch.testing.assert_close(made(batch)["distance"], expected)


def test_hinton_mixes_by_alpha_and_skips_ignored_pixels():
    made, batch = Hinton(student(dense=True), 4.0, 0.9, 255).eval(), samples(dense=True)
    out = made(batch)
    torch.testing.assert_close(out["loss"], 0.1 * out["ce"] + 0.9 * out["kd"])
    changed = batch["teacher_logits"].clone()
    changed[:, 0, 0] += 50  # the first row of pixels is ignored
    torch.testing.assert_close(made(batch | {"teacher_logits": changed})["kd"], out["kd"])


def test_grids():
    tokens = torch.arange(24.0).reshape(1, 6, 4)
    assert torch.equal(tokens_of(map_of(tokens, (2, 3))), tokens)
    features = torch.randn(1, 2, 4, 4)
    assert resized(features, (4, 4)) is features
    torch.testing.assert_close(resized(features, (2, 2))[0, 0, 0, 0], features[0, 0, :2, :2].mean())
    assert resized(features, (6, 3)).shape == (1, 2, 6, 3)


def test_baselines_start_from_the_same_student(tmp_path):
    starts = []
    for name in ("plain", "fitnet"):
        run = tiny_run(tmp_path / name, method=OPTIONS[name](name=name))
        starts.append(weights(run.student()))
    assert same(*starts)
