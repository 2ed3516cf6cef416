"""The three networks of PPT and the one that ships, against plain reimplementations and the specification."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.toolchain.methods.walks import INFO, NET, OBSERVE, PREDICT, STEPS, WIDTH, K, ppt, shaken, shape, tracks
from toolchain import artifact
from toolchain.artifact import ArtifactError
from toolchain.checkpoint import save_tensors
from toolchain.tasks import trajectory
from toolchain.tasks.backbones import ModelError
from toolchain.tasks.trajectory import StudentSection
from toolchain.tasks.trajectory_nets import (
    EVERY,
    LAST,
    PPT,
    Destination,
    Encoder,
    OneShot,
    Shape,
    Step,
    build,
    deploy,
    shape_of,
)


def naive(encoder: Any, tokens: Tensor, positions: list[int], causal: bool) -> Tensor:
    """All tokens through torch's own attention."""
    x = tokens + encoder.place(torch.tensor(positions))
    for block in encoder.blocks:
        attention = block.attention
        q, k, v = attention.qkv(block.norm_attention(x)).chunk(3, -1)
        heads = [part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in (q, k, v)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=causal)
        x = x + attention.out(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm_mlp(x))
    return encoder.norm(x)  # type: ignore[no-any-return]


def moved(before: Tensor, after: Tensor) -> Tensor:
    """Which time steps of (B, T, ...) changed."""
    return (before - after).abs().reshape(*before.shape[:2], -1).amax((0, 2)) > 1e-9


def used_positions(net: Any, call: Callable[[], Tensor]) -> list[int]:
    """Rows of the position table that change what ``call`` gives."""
    before, table, used = call(), net.encoder.place.weight.data, []
    for row in range(len(table)):
        kept = table[row].clone()
        table[row] = torch.randn_like(kept)
        used += [row] if not torch.equal(before, call()) else []
        table[row] = kept
    return used


def outputs(net: nn.Module, track: Tensor) -> Tensor:
    found = net(track)
    return found if isinstance(found, Tensor) else found[0]  # type: ignore[no-any-return]


NETWORKS: list[Callable[[Shape], nn.Module]] = [
    Step,
    lambda shape: Destination(Step(shape)),
    lambda shape: PPT(Destination(Step(shape))),
    OneShot,
]

# --- the encoder


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keep", [EVERY, LAST, slice(7, -1)])
def test_computing_only_what_is_kept_gives_the_same_values_and_gradients(causal: bool, keep: slice) -> None:
    torch.manual_seed(0)
    encoder = Encoder(16, 2, 4, 0.0, "gelu", STEPS)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randn(3, STEPS, 16, requires_grad=True)
    inputs = [tokens, *encoder.parameters()]
    whole = encoder(tokens, range(1, STEPS + 1), causal)[:, keep]
    kept = encoder(tokens, range(1, STEPS + 1), causal, keep)
    torch.testing.assert_close(kept, whole)
    weight = torch.randn_like(whole)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in (whole, kept)]
    for name, a, b in zip(["tokens", *dict(encoder.named_parameters())], *gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_weights_start_as_published() -> None:
    encoder = Encoder(128, 3, 8, 0.1, "gelu", STEPS)
    for name, value in encoder.named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(6) if "out.weight" in name else 0.02
            assert value.std().item() == pytest.approx(expected, rel=0.06), name


# --- task I


def test_step_is_causal_at_every_step() -> None:
    net, track = shaken(Step(shape())), tracks()[:, :-1]
    before = net(track)
    assert before.shape == track.shape
    for t in range(STEPS - 1):
        changed = track.clone()
        changed[:, t] += 3
        expected = torch.arange(STEPS - 1) >= t
        assert torch.equal(moved(before, net(changed)), expected), t


def test_step_is_the_plain_causal_transformer() -> None:
    net, track = shaken(Step(shape())), tracks()[:, :-1]
    features = naive(net.encoder, net.inp(track / 60), list(range(1, STEPS)), causal=True)
    torch.testing.assert_close(net.features(track), features)
    torch.testing.assert_close(net(track), net.head(features) * 60)
    torch.testing.assert_close(net(track[:, :5]), net(track)[:, :5])


# --- task II


def test_destination_reads_positions_1_to_8_and_19() -> None:
    net, observed = shaken(Destination(Step(shape()))), tracks()[:, :OBSERVE]
    assert list(net.positions) == [1, 2, 3, 4, 5, 6, 7, 8, 19]
    assert net(observed).shape == (3, K, 2)
    assert used_positions(net, lambda: net(observed)) == [1, 2, 3, 4, 5, 6, 7, 8, 19]


def test_destination_is_the_plain_causal_transformer_with_a_prompt_at_the_end() -> None:
    net, observed = shaken(Destination(Step(shape()))), tracks()[:, :OBSERVE]
    prompt = net.pin(net.prompt).expand(3, 1, WIDTH)
    tokens = torch.cat([net.inp(observed / 60), prompt], 1)
    feature = naive(net.encoder, tokens, [*range(1, 9), 19], causal=True)[:, -1]
    torch.testing.assert_close(net.feature(observed), feature)
    torch.testing.assert_close(net(observed), net.head(feature).view(3, K, 2) * 60)


# --- speed


def test_relative_speed_is_the_mean_step_in_floors_and_at_least_one() -> None:
    observed = torch.tensor([1.0, 2.0, 6.0])[:, None, None] * torch.tensor([0.6, 0.8]) * torch.arange(-7.0, 1)[:, None]
    assert shape(speed_floor=2.0).relative_speed(observed).flatten().tolist() == pytest.approx([1, 1, 3])
    assert shape().relative_speed(observed) == 1
    assert shape_of(StudentSection(speed_floor=0.05), INFO).speed_floor == 0.05 * 30


def test_task_1_is_told_no_speed_of_the_future() -> None:
    net, track = shaken(Step(shape(speed_floor=0.5))), tracks()[:, :-1]
    changed = track.clone()
    changed[:, OBSERVE:] *= 3
    torch.testing.assert_close(net(changed)[:, :OBSERVE], net(track)[:, :OBSERVE])


@pytest.mark.parametrize("make", NETWORKS, ids=["step", "destination", "ppt", "one_shot"])
def test_the_faster_a_walker_the_larger_what_is_predicted(make: Callable[[Shape], nn.Module]) -> None:
    net, observed = shaken(make(shape(speed_floor=0.5))), tracks()[:, :OBSERVE]
    told = [module for name, module in net.named_modules() if name.split(".")[-1] == "inp"]
    slow, first, second = observed / 1e3, outputs(net, observed), outputs(net, 2 * observed)
    assert not torch.allclose(second, 2 * first), "the network is not told how fast"
    for layer in told:
        layer.weight.data[:, 2] = 0
    torch.testing.assert_close(outputs(net, 2 * observed), 2 * outputs(net, observed))
    assert not torch.allclose(outputs(net, 2 * slow), 2 * outputs(net, slow))

    plain = make(shape()).double().eval()
    plain.load_state_dict({k: v[:, :2] if k.endswith("inp.weight") else v for k, v in net.state_dict().items()})
    torch.testing.assert_close(outputs(net, slow), outputs(plain, slow))


# --- heading


def turned(track: Tensor, degrees: float) -> Tensor:
    angle = math.radians(degrees)
    return track @ track.new_tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


@pytest.mark.parametrize("make", NETWORKS, ids=["step", "destination", "ppt", "one_shot"])
def test_whoever_walks_another_way_is_predicted_as_if_the_world_were_turned(make: Callable[[Shape], nn.Module]) -> None:
    net, observed = shaken(make(shape(align_heading=True))), tracks()[:, :OBSERVE]
    there = turned(observed, 37)
    torch.testing.assert_close(outputs(net, there), turned(outputs(net, observed), 37))

    plain = make(shape()).double().eval()
    plain.load_state_dict(net.state_dict())
    assert not torch.allclose(outputs(plain, there), turned(outputs(plain, observed), 37))
    way = observed[:, -1] - observed[:, 0]
    along = torch.stack(
        [turned(track[None], -math.degrees(math.atan2(y, x)))[0] for track, (x, y) in zip(observed, way, strict=True)]
    )
    assert (along[:, -1, 0] > along[:, 0, 0]).all()
    torch.testing.assert_close(along[:, -1, 1], along[:, 0, 1])
    torch.testing.assert_close(outputs(net, along), outputs(plain, along))

    standing = torch.zeros_like(observed)
    torch.testing.assert_close(outputs(net, standing), outputs(plain, standing))


def test_task_1_is_told_no_heading_of_the_future() -> None:
    net, track = shaken(Step(shape(align_heading=True))), tracks()[:, :-1]
    changed = track.clone()
    changed[:, OBSERVE:] = turned(track[:, OBSERVE:], 90)
    torch.testing.assert_close(net(changed)[:, :OBSERVE], net(track)[:, :OBSERVE])


def test_each_network_starts_as_a_copy_of_the_one_before() -> None:
    step = Step(shape())
    destination = Destination(step)
    net = PPT(destination)
    for whole, part in ((destination, step), (net, destination)):
        for name in ("inp", "encoder"):
            a, b = getattr(whole, name).state_dict(), getattr(part, name).state_dict()
            assert all(torch.equal(a[key], b[key]) and a[key].data_ptr() != b[key].data_ptr() for key in a)
    assert torch.equal(net.prompts, destination.prompt.expand(PREDICT - 1, -1))
    assert 0 <= destination.prompt.min() < destination.prompt.max() <= 1


# --- task III


def test_ppt_attends_everywhere_a_change_of_any_input_changes_every_output() -> None:
    net, track = shaken(ppt()), tracks()
    observed, destination = track[:, :OBSERVE], track[:, -1]
    before, features = net.complete(observed, destination)
    assert before.shape == (3, PREDICT, 2)
    assert features.shape == (3, PREDICT, WIDTH)
    assert moved(before, net.complete(observed, destination + 3)[0]).all()
    for t in range(OBSERVE):
        changed = observed.clone()
        changed[:, t] += 3
        assert moved(before, net.complete(changed, destination)[0]).all(), t


def test_ppt_reads_positions_1_to_20() -> None:
    net, track = shaken(ppt()), tracks()
    found = used_positions(net, lambda: net.complete(track[:, :OBSERVE], track[:, -1])[0])
    assert found == list(range(1, STEPS + 1))


def test_token_t_predicts_point_t_plus_1_of_the_plain_transformer() -> None:
    net, track = shaken(ppt()), tracks()
    observed, destination = track[:, :OBSERVE], track[:, -1]
    prompts = net.pin(net.prompts).expand(3, -1, -1)
    tokens = torch.cat([net.inp(observed / 60), prompts, net.inp(destination[:, None] / 60)], 1)
    every = naive(net.encoder, tokens, list(range(1, STEPS + 1)), causal=False)
    path, features = net.complete(observed, destination)
    torch.testing.assert_close(features, every[:, 7:19])
    expected = [net.first(every[:, 7]), *(net.middle(every[:, t]) for t in range(8, 18))]
    expected.append(net.last(every[:, 18]) + destination / 60)
    torch.testing.assert_close(path, torch.stack(expected, 1) * 60)


def test_points_come_in_order_and_without_a_correction_the_last_is_the_destination_exactly() -> None:
    net, track = shaken(ppt()).float(), tracks().float()
    for head, value in ((net.first, 1.0), (net.middle, 2.0), (net.last[-1], 0.0)):
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, value)
    path, _ = net.complete(track[:, :OBSERVE], track[:, -1])
    assert torch.equal(path[:, -1], track[:, -1])
    assert path[0, :-1].tolist() == [[60.0, 60.0]] + 10 * [[120.0, 120.0]]


def test_folding_the_candidates_into_the_batch_equals_a_pass_for_each() -> None:
    net, track = shaken(ppt()), tracks()
    observed = track[:, :OBSERVE]
    paths, logits = net(observed)
    candidates = net.destination(observed)
    for k in range(K):
        torch.testing.assert_close(paths[:, k], net.complete(observed, candidates[:, k])[0])
    assert torch.equal(logits, net.log_share.expand(3, -1))
    assert net.log_share.exp().sum().item() == pytest.approx(1)


def test_the_published_shape_has_2_435_630_parameters() -> None:
    net = PPT(Destination(Step(Shape(OBSERVE, PREDICT))))
    assert sum(parameter.numel() for parameter in net.parameters()) == 2_435_630
    section = trajectory.TeacherSection().student
    assert sum(p.numel() for p in build(section, INFO, 0).parameters()) == 2_435_630


# --- the student


def test_one_shot_reads_every_observed_point_for_every_path() -> None:
    net, observed = shaken(OneShot(shape())), tracks()[:, :OBSERVE]
    paths, logits = net(observed)
    assert (paths.shape, logits.shape) == ((3, K, PREDICT, 2), (3, K))
    for t in range(OBSERVE):
        changed = observed.clone()
        changed[:, t] += 3
        assert moved(paths, net(changed)[0]).all(), t
        assert moved(logits, net(changed)[1]).all(), t
    tokens = naive(net.encoder, net.inp(observed / 60), list(range(1, OBSERVE + 1)), causal=False)
    out = net.head(tokens[:, -1])
    torch.testing.assert_close(logits, out[:, :K])
    torch.testing.assert_close(paths.flatten(1), out[:, K:] * 60)


def flat(net: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


@pytest.mark.parametrize("model", ["ppt", "one_shot"])
def test_the_start_depends_on_the_seed_alone(model: str) -> None:
    section = StudentSection(model=model, **NET)
    first = flat(build(section, INFO, 0))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(first, flat(build(section, INFO, 0)))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, flat(build(section, INFO, 1)))


class Own(nn.Module):
    """A network of the user's own: paths and logits from one linear layer."""

    def __init__(self, hypotheses: int = K, predict: int = PREDICT, dropout: float = 0.5) -> None:
        super().__init__()
        self.count, self.predict = hypotheses, predict
        self.linear, self.drop = nn.Linear(2 * OBSERVE, hypotheses * (2 * predict + 1)), nn.Dropout(dropout)

    def forward(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        out = self.drop(self.linear(observed.flatten(1)))
        return out[:, self.count :].view(-1, self.count, self.predict, 2), out[:, : self.count]


def test_a_network_of_ones_own_is_built_and_left_in_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    net = build(StudentSection(model=f"{__name__}:Own", hypotheses=K, options={"dropout": 0.1}), INFO, 0)
    assert isinstance(net, Own)
    assert net.training
    assert net.drop.p == 0.1


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"model": "no.such:thing"}, "No module named"),
        ({"model": "torch:float32"}, "is no function or class"),
        ({"model": "torch.nn:Linear", "options": {"in_features": 3, "out_features": 2}}, "fails on tracks (2, 8, 2)"),
        (
            {"model": f"{__name__}:Own", "options": {"predict": 11}},
            "expected paths (2, 4, 12, 2) and logits (2, 4), found [(2, 4, 11, 2), (2, 4)]",
        ),
        ({"model": "builtins:dict"}, "should give an nn.Module, found dict"),
        ({"model": f"{__name__}:Own", "options": {"hypotheses": 3}}, "found [(2, 3, 12, 2), (2, 3)]"),
        ({"model": "torch.nn:Flatten"}, "expected paths (2, 4, 12, 2) and logits (2, 4), found"),
        ({"model": f"{__name__}:Own", "options": {"deepness": 3}}, "student.options {'deepness': 3} do not suit"),
        ({"model": "one_shot", "max_parameters": 1000}, "allowed 1,000, found"),
    ],
)
def test_errors_name_what_is_wrong(section: dict[str, Any], message: str) -> None:
    network = {"hypotheses": K} | section if ":" in section["model"] else NET | section
    with pytest.raises(ModelError, match=re.escape(message)):
        build(StudentSection(**network), INFO, 0)


@pytest.mark.parametrize("model", ["ppt", "one_shot"])
def test_a_network_comes_back_from_its_artifact_alone(model: str, tmp_path: Path) -> None:
    section = StudentSection(model=model, **NET)
    net = build(section, INFO, 7).eval()
    with artifact.create(
        tmp_path / "student", stage="student", config={"student": section.model_dump(mode="json")}
    ) as draft:
        save_tensors(draft.path / "model.safetensors", net.state_dict())
        draft.extra = {"info": INFO}
    loaded = trajectory.load_student(tmp_path / "student")
    assert not loaded.training
    observed = tracks()[:, :OBSERVE].float()
    for a, b in zip(net(observed), loaded(observed), strict=True):
        assert torch.equal(a, b)
    other = StudentSection(model=model, **(NET | {"width": 16})).model_dump(mode="json")
    with artifact.create(tmp_path / "other", stage="student", config={"student": other}) as draft:
        save_tensors(draft.path / "model.safetensors", net.state_dict())
        draft.extra = {"info": INFO}
    with pytest.raises(ArtifactError, match="not the weights of this model"):
        trajectory.load_student(tmp_path / "other")


# --- deployment


@pytest.mark.parametrize("model", ["ppt", "one_shot"])
@pytest.mark.parametrize(("unit", "scale"), [("m", 30.0), ("px", 1.0)])
def test_deployed_from_the_world_to_the_world(model: str, unit: str, scale: float) -> None:
    section = StudentSection(model=model, **NET)
    net = shaken(build(section, INFO, 0)).float()
    ready = deploy(net, section, INFO | {"unit": unit})
    assert "walking along x" in deploy(net, section, INFO | {"unit": unit, "walk_axis": True}).inputs[0].meaning
    observed = tracks()[:, :OBSERVE].float() / scale + torch.tensor([400.0, -70.0])
    with torch.inference_mode():
        found, probability = ready.module(observed)
        paths, logits = net((observed - observed[:, -1:]) * scale)
        shifted, same = ready.module(observed + torch.tensor([-256.0, 32.0]))
    torch.testing.assert_close(found, observed[:, None, -1:] + paths / scale)
    torch.testing.assert_close(probability, logits.softmax(-1))
    torch.testing.assert_close(probability.sum(1), torch.ones(3))
    torch.testing.assert_close(shifted, found + torch.tensor([-256.0, 32.0]), atol=5e-3, rtol=0)
    torch.testing.assert_close(same, probability, atol=1e-3, rtol=0)
    assert [(port.name, port.unit) for port in ready.outputs] == [("trajectories", unit), ("probability", "0..1")]
    for port, value in zip(ready.outputs, (found, probability), strict=True):
        assert tuple(value.shape) == (3, *port.shape[1:])
        assert value.numpy().dtype == np.dtype(port.dtype)
    assert ready.dynamic == {"observed": {0: "batch"}}


@pytest.mark.parametrize("name", ["step", "destination", "ppt", "one_shot"])
def test_coordinates_are_not_rounded_under_autocast(name: str) -> None:
    """Eight bits of 100 units are half a unit: positions enter and leave in float32."""
    step = Step(shape())
    made = {"step": step, "destination": Destination(step), "ppt": ppt(), "one_shot": OneShot(shape())}[name].float()
    track = torch.randn(64, 8, 2).cumsum(1) * 20
    rounded: list[Tensor] = []
    for module in made.modules():
        if isinstance(module, nn.Linear) and module.in_features == 2:
            module.register_forward_hook(lambda _, given, out: rounded.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        found = made(track)
    paths = found if isinstance(found, Tensor) else found[0]
    assert paths.dtype == torch.float32
    assert not torch.equal(paths, paths.bfloat16().float())
    assert rounded
    assert all(out.dtype == torch.float32 for out in rounded)
