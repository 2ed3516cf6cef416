"""The acceptance tests of the specification's section 8 for the method, and its switches."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from tests.toolchain.methods.doubles import same, weights
from tests.toolchain.methods.walks import (
    METHOD,
    NET,
    OBSERVE,
    STEPS,
    WIDTH,
    Dying,
    K,
    Killed,
    config,
    ppt,
    shaken,
    shape,
    tiny_run,
    tracks,
)
from toolchain import artifact
from toolchain.checkpoint import load_tensors, save_tensors
from toolchain.distill import train_student
from toolchain.methods import ppt as method
from toolchain.methods.options import PPT as Options
from toolchain.tasks import trajectory
from toolchain.tasks.trajectory_batches import normalised
from toolchain.tasks.trajectory_nets import Destination, Step
from toolchain.train import read_metrics


def options(**keys):
    return Options(**(METHOD | keys))


def complete(**keys):
    """Task III with teachers of its own, everything drawn anew, and a batch."""
    chosen = options(**keys)
    step, net = shaken(Step(shape()), 1), shaken(ppt(), 2)
    teacher = shaken(ppt(), 4) if chosen.branches else None
    made = shaken_adapters(method.Complete(net, chosen, step, shaken(Destination(step), 3), teacher))
    return made, {"track": tracks(5)}


def shaken_adapters(made):
    for adapter in (made.adapt_features, made.adapt_destination):
        if adapter is not None:
            adapter.double()
    return made


def teachers(made):
    return [frozen.module for frozen in (made.step, made.destination, made.teacher) if frozen is not None]


def lines(run, stage):
    return [line for line in map(json.loads, read_metrics(run).splitlines()) if line["stage"] == stage]


def distil(work, train=None, **keys):
    cfg = config(METHOD | keys, train)
    run = tiny_run(work, cfg)
    return run, method.distill(cfg, run)


# --- losses


def test_task_1_is_the_mean_squared_error_of_every_next_position():
    net, track = shaken(Step(shape())), tracks()
    out = net(track[:, :-1])
    terms = [(out[i, t, c] - track[i, t + 1, c]).item() ** 2 for i in range(3) for t in range(19) for c in range(2)]
    found = method.NextPosition(net)({"track": track})["loss"].item()
    assert found == pytest.approx(sum(terms) / (3 * 19 * 2))


@pytest.mark.parametrize(("weight", "sigma"), [(100.0, 1.0), (3.4, 100.0)])
def test_task_2_equals_a_naive_double_loop(weight, sigma):
    net, track = shaken(Destination(Step(shape()))), tracks(4)
    for parameter in net.head[-1].parameters():
        parameter.data *= 1e-3 * sigma**0.5
    candidates = net(track[:, :OBSERVE])
    nearest, spread = [], []
    for i in range(4):
        nearest.append(min((candidates[i, k] - track[i, -1]).pow(2).sum().sqrt().item() for k in range(K)))
        pairs = 0.0
        for a in range(K):
            for b in range(K):
                if a != b:
                    pairs += torch.exp(-(candidates[i, a] - candidates[i, b]).pow(2).sum() / sigma).item()
        spread.append(pairs / (K * (K - 1)))
    found = method.DestinationGuess(net, weight, sigma)({"track": track})
    assert found["distance"].item() == pytest.approx(np.mean(nearest))
    assert found["diversity"].item() == pytest.approx(np.mean(spread), abs=1e-12)
    assert found["loss"].item() == pytest.approx(np.mean(nearest) + weight * np.mean(spread))
    assert np.mean(spread) > 1e-4, "the second term was not tested"


def test_winners_fall_geometrically_to_one_and_the_nearest_is_what_is_shown():
    net, track = shaken(Destination(Step(shape()))), tracks(6)
    distances = (net(track[:, :OBSERVE]) - track[:, None, -1]).norm(dim=-1).sort(1).values
    made = method.DestinationGuess(net, 0.0, 1.0, winners=4)
    for progress, count in ((0.0, 4), (0.2, 3), (0.3, 2), (0.6, 1), (0.99, 1)):
        made.progress = progress
        found = made({"track": track})
        assert found.keys() == {"loss", "distance"}
        assert found["loss"].item() == pytest.approx(distances[:, :count].mean().item()), progress
        assert found["distance"].item() == pytest.approx(distances[:, 0].mean().item())


def test_task_3_is_composed_as_specified():
    made, batch = complete(features=5.0, destination_features=0.5, destination_weight=2.0)
    made.eval()
    found = {name: value.item() for name, value in made(batch).items()}
    net, track = made.student, batch["track"]
    observed, future = track[:, :OBSERVE], track[:, OBSERVE:]
    feature = net.destination.feature(observed)
    candidates = net.destination.candidates(feature, observed)
    best = [min(range(K), key=lambda k: (candidates[i, k] - future[i, -1]).norm().item()) for i in range(5)]
    assert len(set(best)) > 1, "one candidate is always the nearest"
    chosen = torch.stack([candidates[i, k] for i, k in enumerate(best)])
    path, features = net.complete(observed, chosen)
    expected = {
        "path": (path - future).pow(2).sum(-1).sqrt().mean(),
        "destination": (chosen - future[:, -1]).pow(2).sum(-1).sqrt().mean(),
        "features": (made.adapt_features(features) - made.step.module.features(track[:, :19])[:, 7:19]).pow(2).mean(),
        "destination_features": (made.adapt_destination(feature) - made.destination.module.feature(observed))
        .pow(2)
        .mean(),
    }
    assert {name: found[name] for name in expected} == pytest.approx({k: v.item() for k, v in expected.items()})
    total = found["path"] + 2 * found["destination"] + 5 * found["features"] + 0.5 * found["destination_features"]
    assert found["loss"] == pytest.approx(total)


def test_branches_follow_what_the_teacher_predicts_for_the_same_destination():
    made, batch = complete(branches=3.0, features=0, destination_features=0)
    made.eval()
    torch.manual_seed(5)
    found = made(batch)
    torch.manual_seed(5)
    other = torch.randint(K, (5,))
    observed = batch["track"][:, :OBSERVE]
    candidates = made.student.destination(observed)[torch.arange(5), other]
    wanted, _ = made.teacher.module.complete(observed, candidates)
    path, _ = made.student.complete(observed, candidates)
    assert found["branches"].item() == pytest.approx((path - wanted).norm(dim=-1).mean().item())
    rest = found["path"] + found["destination"]
    assert found["loss"].item() == pytest.approx((rest + 3 * found["branches"]).item())
    gradients = torch.autograd.grad(
        found["branches"], list(made.student.destination.parameters()), allow_unused=True, retain_graph=True
    )
    assert not any(gradient is not None and gradient.any() for gradient in gradients)


# --- the teachers


class Numbers(nn.Module):
    """An encoder whose feature of a token is its position."""

    def forward(self, tokens, positions, causal, keep=slice(None)):
        kept = torch.tensor(list(positions), dtype=tokens.dtype)[keep]
        return kept[None, :, None].expand(len(tokens), -1, tokens.shape[-1])


def test_features_of_tokens_8_to_19_meet_on_both_sides():
    step, net = Step(shape()).double(), ppt().double()
    step.encoder, net.encoder = Numbers(), Numbers()
    made = shaken_adapters(method.Complete(net, options(destination_features=0), step, None))
    nn.init.eye_(made.adapt_features.weight)
    nn.init.zeros_(made.adapt_features.bias)
    asked = []
    made.adapt_features.register_forward_hook(lambda module, given, out: asked.append(given[0][0, :, 0].tolist()))
    assert made({"track": tracks()})["features"].item() == 0
    assert asked == [[float(t) for t in range(8, 20)]]
    made.adapt_features.bias.data += 1
    assert made({"track": tracks()})["features"].item() == 1


def test_the_teacher_sees_the_true_future_and_what_ships_never_does():
    made, batch = complete()
    made.eval()
    seen, ours = [], []
    made.step.module.inp.register_forward_hook(lambda module, given, out: seen.append(given[0] * 60))
    made.adapt_features.register_forward_hook(lambda module, given, out: ours.append(given[0]))
    before = made(batch)["features"]
    assert torch.equal(seen[0], batch["track"][:, :19])
    changed = batch["track"].clone()
    changed[:, 12] += 5  # a point on the way: the nearest candidate stays the nearest
    after = made({"track": changed})
    assert after["features"] != before
    assert torch.equal(*ours)


def test_teachers_are_in_eval_mode_without_gradient_and_keep_their_bits():
    made, batch = complete(branches=1.0)
    made.train()
    before = [weights(teacher) for teacher in teachers(made)]
    assert len(before) == 3
    optimizer = torch.optim.SGD(made.param_groups(0.1))
    for _ in range(2):
        made(batch)["loss"].backward()
        optimizer.step()
    for teacher, kept in zip(teachers(made), before, strict=True):
        assert same(weights(teacher), kept)
        assert not any(module.training for module in teacher.modules())
        assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not {id(p) for teacher in teachers(made) for p in teacher.parameters()} & set(map(id, made.parameters()))


# --- what learns, and how fast


@pytest.mark.parametrize("rate", [0.0, 1e-7])
def test_every_parameter_that_learns_is_in_one_group_with_its_rate(rate):
    made, _ = complete(destination_lr=rate, destination_features=0.5 if rate else 0)
    groups: dict = {}
    for group in made.param_groups(1.5e-3):
        groups.setdefault(group["lr"], []).extend(group["params"])
        exempt = group.get("weight_decay") == 0.0
        assert all((p.ndim < 2) is exempt for p in group["params"])
    found = [id(p) for group in groups.values() for p in group]
    learning = [id(p) for p in made.parameters() if p.requires_grad]
    assert sorted(found) == sorted(learning)
    slow = {id(p) for p in made.student.destination.parameters()}
    assert {id(p) for p in groups.get(rate, ())} == (slow if rate else set())
    fast = {id(p) for p in groups[1.5e-3]}
    own = [p for name, p in made.student.named_parameters() if not name.startswith("destination.")]
    adapters = [p for one in (made.adapt_features, made.adapt_destination) if one is not None for p in one.parameters()]
    assert fast == {id(p) for p in (*own, *adapters)}


def test_a_frozen_destination_predictor_has_no_dropout_and_no_gradient():
    cfg = config(METHOD | {"destination_lr": 0, "destination_features": 0}, student={"dropout": 0.5})
    net = ppt(dropout=0.5)
    made = method.Complete(net, cfg.method, Step(net.shape), Destination(Step(net.shape))).train()
    out = made({"track": tracks(6).float()})
    assert not any(module.training for module in net.destination.modules())
    assert all(module.training for module in net.encoder.modules())
    assert "destination" not in out
    out["loss"].backward()
    assert all(p.grad is None for p in net.destination.parameters())
    assert all(p.grad is not None for p in net.encoder.blocks.parameters())


def test_the_warm_up_leaves_input_and_encoder_to_the_bit(tmp_path):
    cfg = config(METHOD, student={"dropout": 0.1})
    run = tiny_run(tmp_path, cfg)
    net = Destination(Step(shape(dropout=0.1)))
    before = weights(net)
    run.stage("IIa", method.DestinationGuess(net, 100.0, 100.0, warmup=True), run.batches(), cfg.train)
    after = weights(net)
    frozen = {name for name in before if name.startswith(("inp.", "encoder."))}
    assert {name for name in before if not np.array_equal(before[name], after[name])} == set(before) - frozen
    method.DestinationGuess(net, 100.0, 100.0)
    assert all(parameter.requires_grad for parameter in net.parameters())


# --- the whole chain


STAGES = ["I-next-position", "IIa-warmup", "IIb-destination", "III-complete"]


def test_stages_run_in_order_and_each_starts_from_the_one_before(tmp_path):
    run, net = distil(tmp_path, destination_lr=0, destination_features=0)
    assert [record["name"] for record in run.records] == STAGES
    assert [record["epochs"] for record in run.records] == [1, 1, 2, 2]
    assert [record["steps"] for record in run.records] == [3, 3, 6, 6]
    made = {name: load_tensors(tmp_path / "stages" / name / "model.safetensors") for name in STAGES}
    first, warm, tuned = (made[name] for name in STAGES[:3])
    for name in (name for name in first if "head" not in name):
        assert torch.equal(first[name], warm[name]), name  # the warm-up freezes what it copied
        assert not torch.equal(first[name], tuned[name]), name
    final = net.state_dict()
    for name, value in tuned.items():
        assert torch.equal(final[name.replace("student.", "destination.")], value), name
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_the_trained_model_knows_how_often_each_hypothesis_is_the_nearest(tmp_path):
    run, net = distil(tmp_path)
    counts = [1] * K
    track = torch.from_numpy(normalised(run.data.splits["train"], 30.0))
    with torch.no_grad():
        candidates = net.destination(track[:, :OBSERVE])
    for i in range(len(track)):
        counts[min(range(K), key=lambda k: (candidates[i, k] - track[i, -1]).norm().item())] += 1
    assert net.log_share.exp().tolist() == pytest.approx([count / (24 + K) for count in counts])


def test_killed_in_any_stage_it_ends_with_the_same_bits(tmp_path):
    settings = {"select": "best"}
    expected = weights(distil(tmp_path / "whole", settings, test_selected=True)[1])
    cfg = config(METHOD | {"test_selected": True}, settings)
    for after in (1, 4, 4, 5, 2):  # batches that each attempt still gets: in I, IIa, IIb, IIb-III, III
        run = tiny_run(tmp_path / "killed", cfg)
        dying = Dying(run, after)
        run.batches = lambda dying=dying: dying
        with pytest.raises(Killed):
            method.distill(cfg, run)
    for _ in range(2):  # resumed, then loaded stage by stage
        again = tiny_run(tmp_path / "killed", cfg)
        assert same(expected, weights(method.distill(cfg, again)))
        assert [record["name"] for record in again.records] == STAGES
        assert again.records[-1]["watched"]["test"]["epoch"] in (1, 2)


def test_task_3_is_selected_by_three_ade_and_fde(tmp_path):
    complete = {"epochs": 6, "lr": 0.05}
    run, net = distil(tmp_path, {"select": "best", "schedule": "constant"}, complete=complete)
    found = lines(run, "III-complete")
    for line in found:
        assert line["val"]["selection"] == pytest.approx(3 * line["val"]["minADE"] + line["val"]["minFDE"])
    best = min(found, key=lambda line: line["val"]["selection"])
    assert run.records[-1]["best_epoch"] == best["epoch"]
    assert run.scorer()(net)["minADE"] == pytest.approx(best["val"]["minADE"], rel=1e-6)


def test_the_epoch_best_on_the_test_split_is_reported_and_changes_nothing(tmp_path):
    complete, recipe = {"epochs": 5, "lr": 0.05}, {"select": "best", "schedule": "constant"}
    honest, net = distil(tmp_path / "a", recipe, complete=complete)
    habit, other = distil(tmp_path / "b", recipe, complete=complete, test_selected=True)
    assert same(weights(net), weights(other))
    assert honest.records[-1]["watched"] == {}
    assert honest.records[-1]["best_epoch"] == habit.records[-1]["best_epoch"]
    found = lines(habit, "III-complete")
    best = min(found, key=lambda line: line["test"]["selection"])
    assert habit.records[-1]["watched"] == {"test": {"epoch": best["epoch"], "scores": best["test"]}}
    assert "test" not in lines(honest, "III-complete")[0]


@pytest.mark.parametrize(
    ("keys", "stages"),
    [
        ({"step": {"epochs": 0, "lr": 1}, "features": 0}, STAGES[1:]),
        ({"warmup": {"epochs": 0, "lr": 1}}, [STAGES[0], *STAGES[2:]]),
        (
            {
                "step": {"epochs": 0, "lr": 1},
                "warmup": {"epochs": 0, "lr": 1},
                "destination": {"epochs": 0, "lr": 1},
                "features": 0,
                "destination_features": 0,
            },
            STAGES[3:],
        ),
    ],
)
def test_a_task_without_epochs_is_left_out(tmp_path, keys, stages):
    run, _ = distil(tmp_path, **keys)
    assert [record["name"] for record in run.records] == stages


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"complete": {"epochs": 0, "lr": 1}}, "task III makes the model that ships"),
        ({"destination": {"epochs": 0, "lr": 1}}, "set warmup.epochs to 0 too"),
        ({"step": {"epochs": 0, "lr": 1}}, "set features to 0"),
        (
            {"warmup": {"epochs": 0, "lr": 1}, "destination": {"epochs": 0, "lr": 1}},
            "set destination_features to 0",
        ),
        ({"destination_lr": 0}, "destination_lr 0 freezes"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        options(**keys)


def test_branches_train_with_a_teacher(tmp_path):
    network = trajectory.StudentSection(model="ppt", **NET)
    with artifact.create(
        tmp_path / "teacher", stage="teacher", config={"teacher": {"student": network.model_dump(mode="json")}}
    ) as draft:
        save_tensors(draft.path / "model.safetensors", ppt().state_dict())
        draft.extra = {"info": {"unit": "m", "observe": OBSERVE, "predict": STEPS - OBSERVE}}
    keys = METHOD | {"branches": 1.0}
    cfg = config(keys, teacher={"student": {"model": "ppt", **NET}})
    run = tiny_run(tmp_path, cfg, {"teacher": tmp_path / "teacher"})
    trained = train_student(cfg, run.data, run.inputs, tmp_path / "run")
    assert "branches" in lines(trained.run, "III-complete")[-1]
    assert trained.student.shape.width == WIDTH
