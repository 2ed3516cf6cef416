"""A finished PPT teaches a smaller network: the loss, who learns from it, and the switches."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.toolchain.methods.doubles import same, weights
from tests.toolchain.methods.walks import (
    METHOD,
    NET,
    OBSERVE,
    PREDICT,
    STEPS,
    WIDTH,
    K,
    config,
    shaken,
    shape,
    tiny_run,
)
from tests.toolchain.methods.walks import write_data as data_artifact
from toolchain.artifact import EdgestillError
from toolchain.methods import ppt_student
from toolchain.methods.options import PPTStudent as Options
from toolchain.stage import Job
from toolchain.tasks import trajectory
from toolchain.tasks.trajectory_nets import OneShot
from toolchain.train import read_metrics

TEACHER = {"student": {"model": "ppt", **NET, "width": 12}, "method": METHOD, "train": {"batch_size": 8, "threads": 1}}
NONE = {"paths": 0, "destinations": 0, "features": 0}


def options(**keys):
    return Options(name="ppt_student", **keys)


def distiller(**keys):
    torch.manual_seed(0)
    chosen = options(**keys)
    return ppt_student.PPTStudent(OneShot(shape()), chosen, OBSERVE, 12 if chosen.features else None)


def batch(count=5, taught=True):
    generator = torch.Generator().manual_seed(1)
    track = torch.randn(count, STEPS, 2, generator=generator).cumsum(1) * 15
    found = {"track": track - track[:, OBSERVE - 1 : OBSERVE]}
    if taught:
        found["paths"] = torch.randn(count, K, PREDICT, 2, generator=generator) * 40
        found["feature"] = torch.randn(count, 12, generator=generator)
    return found


def learning(made):
    return {name for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}


def test_the_loss_equals_a_naive_loop():
    weights = {"paths": 2.0, "destinations": 3.0, "features": 0.5, "truth": 0.7, "ranking": 1.3}
    made, shown = distiller(**weights), batch()
    found = {name: value.item() for name, value in made(shown).items()}
    paths, logits = made.student(shown["track"][:, :OBSERVE])
    future, sums = shown["track"][:, OBSERVE:], dict.fromkeys(found, 0.0)
    for i in range(5):
        error = [[(paths[i, k, t] - future[i, t]).norm().item() for t in range(PREDICT)] for k in range(K)]
        gap = [[(paths[i, k, t] - shown["paths"][i, k, t]).norm().item() for t in range(PREDICT)] for k in range(K)]
        ends = [row[-1] for row in error]
        sums["truth"] += (min(sum(row) / PREDICT for row in error) + min(ends)) / 5
        sums["ranking"] -= logits[i].log_softmax(0)[ends.index(min(ends))].item() / 5
        sums["paths"] += sum(map(sum, gap)) / (K * PREDICT) / 5
        sums["destinations"] += sum(row[-1] for row in gap) / K / 5
    feature = made.adapt(made.student.feature(shown["track"][:, :OBSERVE]))
    sums["features"] = F.mse_loss(feature, shown["feature"]).item()
    sums["loss"] = sum(weight * sums[name] for name, weight in weights.items())
    assert found == pytest.approx(sums, rel=1e-4)


def test_gradients_reach_the_student_and_the_adapter_only():
    made, shown = distiller(), batch()
    made(shown)["loss"].backward()
    assert learning(made) >= {"adapt.weight", "student.head.2.weight", "student.inp.weight"}
    parameters = {id(p) for group in made.param_groups(0.1) for p in group["params"]}
    expected = [*made.student.parameters(), *made.adapt.parameters()]
    assert parameters == set(map(id, expected))
    assert "adapt" not in {name.split(".")[0] for name in made.student.state_dict()}


@pytest.mark.parametrize("term", ["paths", "destinations", "features", "truth", "ranking"])
def test_each_term_teaches_what_it_is_about(term):
    off = dict.fromkeys(("paths", "destinations", "features", "truth", "ranking"), 0.0)
    made, shown = distiller(**(off | {term: 1.0})), batch()
    made(shown)["loss"].backward()
    assert made(shown).keys() == {"loss", term}
    rows = made.student.head[2].weight.grad
    logits, ways = rows[:K].any().item(), rows[K:].view(K, PREDICT, 2, -1)
    assert logits == (term == "ranking")
    assert ways[:, -1].any().item() == (term in ("paths", "destinations", "truth"))
    assert ways[:, :-1].any().item() == (term in ("paths", "truth"))
    assert (made.adapt is not None) == (term == "features")
    assert "student.inp.weight" in learning(made)


def test_the_ranking_learns_which_hypothesis_ends_nearest_and_moves_no_path():
    made, shown = distiller(**NONE, truth=0), batch(taught=False)
    shaken(made.student).float()
    with torch.no_grad():
        paths, _ = made.student(shown["track"][:, :OBSERVE])
    best = (paths[:, :, -1] - shown["track"][:, None, -1]).norm(dim=-1).argmin(1)
    optimizer = torch.optim.Adam(made.student.head.parameters(), 0.1)
    for _ in range(150):
        optimizer.zero_grad()
        made(shown)["loss"].backward()
        for parameter in (made.student.head[0].weight, made.student.head[0].bias):
            parameter.grad = None  # the shared feature stays, so paths can move only by a gradient of their own
        optimizer.step()
    found, logits = made.student(shown["track"][:, :OBSERVE])
    assert torch.equal(found, paths)
    assert logits.argmax(1).tolist() == best.tolist()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("teacher")
    found = {"data": data_artifact(root / "data")}
    sections = config({"name": "ppt_student"}, teacher=TEACHER).section("seed", "task", "data", "teacher")
    for stage in ("teacher", "predictions"):
        getattr(trajectory, stage)(Job(stage, root / stage, sections, dict(found)))
        found[stage] = root / stage
    return found


def distil(work, inputs, student=None, teacher=TEACHER, **keys):
    cfg = config({"name": "ppt_student"} | keys, student=student, **({"teacher": teacher} if teacher else {}))
    run = tiny_run(work, cfg, inputs)
    return run, ppt_student.distill(cfg, run)


def test_a_student_learns_from_the_teachers_predictions(tmp_path, inputs):
    run, net = distil(tmp_path, inputs)
    last = json.loads(read_metrics(run).splitlines()[-1])
    assert {"paths", "destinations", "features", "truth", "ranking"} <= last.keys()
    assert next(iter(last["val"])) == "minADE"
    assert net.state_dict().keys() == OneShot(shape()).state_dict().keys()
    assert net.width == WIDTH
    _, again = distil(tmp_path / "again", inputs)
    assert same(weights(net), weights(again))


def test_without_its_weights_it_is_plain_training_and_needs_no_teacher(tmp_path, inputs):
    _, alone = distil(tmp_path / "alone", {}, teacher=None, **NONE)
    run, beside = distil(tmp_path / "beside", inputs, **NONE)
    assert same(weights(alone), weights(beside))
    assert not {"paths", "destinations", "features"} & json.loads(read_metrics(run).splitlines()[-1]).keys()
    _, taught = distil(tmp_path / "taught", inputs)
    assert not same(weights(alone), weights(taught))


class Own(nn.Module):
    """A network of the user's own, without a feature."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2 * OBSERVE, K * (2 * PREDICT + 1))

    def forward(self, observed):
        out = self.linear(observed.flatten(1) / 60)
        return 60 * out[:, K:].view(-1, K, PREDICT, 2), out[:, :K]


MINE = {"model": f"{__name__}:Own", "width": 64, "heads": 4}


def test_a_network_of_ones_own_learns_from_paths_and_destinations(tmp_path, inputs):
    run, net = distil(tmp_path, inputs, MINE, features=0)
    assert type(net).__name__ == "Own"
    first, *_, last = map(json.loads, read_metrics(run).splitlines())
    assert last["paths"] < first["paths"]
    assert "features" not in last


@pytest.mark.parametrize("student", [MINE, {"model": "ppt"}])
def test_a_network_without_a_feature_cannot_be_taught_one(tmp_path, inputs, student):
    with pytest.raises(EdgestillError, match=r"method.features.*width, feature and decode.*set method.features to 0"):
        distil(tmp_path, inputs, student)
