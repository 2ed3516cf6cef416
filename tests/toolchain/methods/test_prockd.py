"""The acceptance tests of the specification, by number, and the switches."""

import json
import math

import pytest
import torch
from torch import nn

from tests.toolchain.methods.doubles import (
    CHANNELS,
    CLASSES,
    GRID,
    TAP_CHANNELS,
    WIDTH,
    TinyBatches,
    same,
    samples,
    student,
    tiny_run,
    weights,
)
from toolchain.artifact import EdgestillError
from toolchain.distiller import Frozen
from toolchain.methods import plain, prockd
from toolchain.methods.options import ProCKD as Options
from toolchain.train import read_metrics

OFF = {"w_T": 0, "w_A": 0, "w_KL": 0}


def options(**keys):
    return Options(**({"name": "prockd", "K": 5} | keys))


def distiller(dense=False, **keys):
    torch.manual_seed(0)
    made = prockd.ProCKD(student(dense=dense), TAP_CHANNELS, GRID, options(**keys), 255 if dense else None)
    made.progress = 0.5
    return made


def gradients(module):
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def test_01_factored_residuals_equal_explicit_ones():
    x, prototypes = torch.randn(2, 7, 6), torch.rand(5, 6)
    assignment = torch.randn(2, 7, 5).softmax(-1)
    explicit = torch.zeros(2, 5, 6)
    for b in range(2):
        for k in range(5):
            for n in range(7):
                explicit[b, k] += assignment[b, n, k] * (x[b, n] - prototypes[k])
    assert (prockd.residuals(x, assignment, prototypes) - explicit).abs().max() < 1e-5


def test_02_descriptor_ignores_the_order_of_tokens():
    learner, prototypes = prockd.PrototypeLearning(WIDTH, 5), torch.rand(5, WIDTH)
    p = torch.rand(3, 9, WIDTH)
    order = torch.randperm(9)
    u, assignment = learner.descriptor(p, prototypes)
    moved, moved_assignment = learner.descriptor(p[:, order], prototypes)
    torch.testing.assert_close(u, moved)
    torch.testing.assert_close(assignment[:, order], moved_assignment)


class TinyTeacher(nn.Module):
    """Taps on a 2x2 grid; a head of its own label space."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, CHANNELS, 4, 4), nn.Linear(CHANNELS, 1000)

    def tokens(self, image):
        return self.body(image).flatten(2).transpose(1, 2)


def test_03_the_teachers_head_does_not_matter():
    torch.manual_seed(1)
    teacher, batch = TinyTeacher(), samples()

    def loss(teacher):
        torch.manual_seed(2)
        return distiller()(batch | {"tokens": teacher.tokens(batch["image"]).detach()})["loss"]

    expected = loss(teacher)
    teacher.head = nn.Linear(CHANNELS, 7)
    assert torch.equal(expected, loss(teacher))
    del teacher.head
    assert torch.equal(expected, loss(teacher))


def test_04_gradients_reach_prototypes_by_each_branch_and_never_the_teacher():
    torch.manual_seed(1)
    teacher, batch = Frozen(TinyTeacher()), samples()
    with torch.no_grad():
        tokens = teacher.module.tokens(batch["image"])
    for keys, reached in (({"w_A": 0}, True), ({"w_T": 0, "w_KL": 0}, True), (OFF, False)):
        made = distiller(**keys)
        made(batch | {"tokens": tokens})["loss"].backward()
        assert ("kit.augment.C" in gradients(made)) == reached, keys
        assert not gradients(teacher.module)
    assert not teacher.module.training


@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student"])
@pytest.mark.parametrize("stop", [True, False])
def test_04_stop_gradient_keeps_the_kl_off_the_teacher_branch(direction, stop):
    made, batch = distiller(stop_grad=stop, kl_dir=direction), samples()
    z_t, _ = made.teacher_branch(made.kit.local(batch["tokens"]), None)
    z_s = torch.zeros_like(z_t, requires_grad=True)
    made._guided({}, "teacher", z_s, z_t, batch["label"], 0.0, 10.0).backward()
    assert z_s.grad.any()
    assert bool(gradients(made.kit)) != stop


def test_05_what_ships_in_plain_mode_has_no_kit_and_is_z_s(tmp_path):
    run = tiny_run(tmp_path, method=options(), train={"epochs": 1})
    shipped = prockd.distill(run.cfg, run)
    assert shipped.state_dict().keys() == student().state_dict().keys()
    image = samples()["image"]
    program = torch.export.export(shipped.eval(), (image,))
    assert not [name for name in program.state_dict if "kit" in name or name.endswith(".C")]
    torch.testing.assert_close(program.module()(image), shipped.head(shipped.features(image)))


def test_06_aug_mode_needs_no_teacher_and_keeps_only_c_we_and_a(tmp_path):
    run = tiny_run(tmp_path, method=options(infer="aug"), train={"epochs": 1})
    shipped = prockd.distill(run.cfg, run)
    extra = shipped.state_dict().keys() - {f"student.{name}" for name in student().state_dict()}
    assert {name.split(".")[1] for name in extra} == {"C", "encode", "mix"}
    rebuilt = prockd.aug_student(student(seed=9), run.cfg.method.model_dump(mode="json"))
    rebuilt.load_state_dict(shipped.state_dict())
    image = samples()["image"]
    assert torch.equal(rebuilt.eval()(image), shipped.eval()(image))
    exported = torch.export.export(rebuilt, (image,)).module()
    torch.testing.assert_close(exported(image), shipped(image))


def test_07_other_grids_and_widths_than_the_students():
    batch = samples()
    batch["tokens"] = torch.randn(len(batch["label"]), 3 * 5, 17)
    made = prockd.ProCKD(student(), (7, 10), (3, 5), options())
    made(batch)["loss"].backward()
    assert "kit.adapter.0.weight" in gradients(made)


def test_08_one_prototype_works():
    out = distiller(K=1)(samples())
    assert out["loss"].isfinite()
    assert out["perplexity"].item() == pytest.approx(1)


@pytest.mark.parametrize("learner", [True, "ema", "sinkhorn"])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_09_autocast_is_finite_and_normalises_in_float32(kind, learner):
    made, batch = distiller(train_prototypes=learner), samples()
    batch["tokens"] = batch["tokens"] * 100
    batch["tokens"][0] = 0
    with torch.autocast("cpu", kind):
        out = made(batch)
        assert prockd.unit(torch.zeros(2, 3, dtype=kind)).dtype == torch.float32
        assert made.teacher_branch(made.kit.local(batch["tokens"]), None)[1].dtype == torch.float32
    out["loss"].backward()
    assert all(value.isfinite() for value in out.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())


def test_10_prototype_usage_and_branch_accuracy_are_logged(tmp_path):
    run = tiny_run(tmp_path, method=options(), train={"epochs": 2})
    prockd.distill(run.cfg, run)
    last = json.loads(read_metrics(run).splitlines()[-1])
    assert 1 <= last["perplexity"] <= 5.0001
    assert {"teacher_accuracy", "aug_accuracy", "teacher_kl", "ce"} <= last.keys()
    assert list(last["val"]) == ["accuracy", "plain_accuracy", "aug_accuracy", "teacher_branch_accuracy"]


def test_10_perplexity_is_of_the_mean_assignment():
    made, batch = distiller(token_dropout=0), samples()
    _, assignment = made.kit.rewrite(made.kit.local(batch["tokens"]))
    mean = assignment.reshape(-1, 5).mean(0).tolist()
    expected = math.exp(-sum(p * math.log(p) for p in mean))
    assert made(batch)["perplexity"].item() == pytest.approx(expected, rel=1e-5)


def test_11_all_weights_zero_is_plain_training_to_the_bit(tmp_path):
    run = tiny_run(tmp_path / "prockd", method=options(**OFF))
    other = tiny_run(tmp_path / "plain")
    assert same(weights(prockd.distill(run.cfg, run)), weights(plain.distill(other.cfg, other)))


def test_losses_are_composed_as_specified():
    made, batch = distiller(w_T=0.5, w_A=0.25, w_KL=3, w_KA=2, kl_warmup=1.0).eval(), samples()
    out = {name: value.item() for name, value in made(batch).items()}
    expected = out["ce"] + 0.5 * out["teacher_ce"] + 0.25 * out["aug_ce"]
    expected += 0.5 * (3 * out["teacher_kl"] + 2 * out["aug_kl"])
    assert out["loss"] == pytest.approx(expected, rel=1e-5)


def test_augmentation_is_the_formula():
    aug, q = prockd.TaskAdaptiveAugmentation(WIDTH, 5), torch.randn(2, 4, WIDTH)
    e, m = aug.encode(q), aug.encode(aug.C)
    mixture = torch.zeros_like(q)
    for b in range(2):
        for n in range(4):
            mixture[b, n] = sum(w * row for w, row in zip((m @ e[b, n]).softmax(0), m, strict=True))
    torch.testing.assert_close(aug(q), torch.relu(aug.mix(torch.cat([e, mixture], -1)) + q))


def test_segmentation_reads_the_teacher_on_the_students_grid_and_ignores_pixels():
    made, batch = distiller(dense=True), samples(dense=True)
    z_t, _ = made.teacher_branch(made.kit.local(batch["tokens"]), (4, 4))
    assert z_t.shape == (len(batch["label"]), CLASSES, 8, 8)
    made.eval()
    before = made(batch)
    before["loss"].backward()
    assert "kit.augment.C" in gradients(made)
    empty = batch | {"label": torch.full_like(batch["label"], 255)}
    assert made(empty)["loss"].item() == 0


@pytest.mark.parametrize("init", ["uniform", "unit_normal", "kmeans"])
def test_prototype_initialisation(tmp_path, init):
    run = tiny_run(tmp_path, method=options(proto_init=init, train_prototypes=False, infer="aug"), train={"epochs": 1})
    shipped = prockd.distill(run.cfg, run)
    prototypes = shipped.augment.C
    if init == "uniform":
        assert prototypes.min() >= 0
        assert prototypes.max() <= 1
    elif init == "unit_normal":
        torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(5))
    assert not prototypes.requires_grad


@pytest.mark.parametrize("learner", ["ema", "sinkhorn"])
def test_prototypes_with_a_learner_of_their_own_get_no_gradient_of_the_task(learner):
    made, batch = distiller(train_prototypes=learner), samples()
    made.kit.augment.C.requires_grad_()
    p, s = made.kit.local(batch["tokens"]), torch.randn(len(batch["label"]), 4, WIDTH, requires_grad=True)
    z_t, _ = made.teacher_branch(p, None)
    (z_t.square().sum() + made.kit.aug(s).square().sum()).backward()
    assert "kit.augment.C" not in gradients(made)
    s.grad = None
    made.kit.learn(made.kit.local(batch["tokens"]), s, False).backward()
    assert ("kit.augment.C" in gradients(made)) == (learner == "sinkhorn")
    assert "kit.adapter.0.weight" in gradients(made)
    assert s.grad is None


def test_moving_averages_change_only_while_training_and_are_the_points_means():
    made, batch = distiller(train_prototypes="ema", token_dropout=0), samples()
    made.kit.averages.start(made.kit.augment.C.data)
    before = made.kit.augment.C.clone()
    points = prockd.unit(made.kit.local(batch["tokens"])).flatten(0, 1).detach()
    loss = made.eval()(batch)["prototype_loss"]
    assert torch.equal(before, made.kit.augment.C)
    nearest = torch.cdist(points, before).argmin(1)
    assert loss.item() == pytest.approx(0.25 * (points - before[nearest]).square().sum(-1).mean().item(), rel=1e-5)
    assert made.train()(batch)["prototype_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for k, c in enumerate(made.kit.augment.C.detach()):
        mine = points[nearest == k]
        size = 0.99 + 0.01 * len(mine)
        if size < 1:
            assert (points - c).abs().sum(1).min() < 1e-6
        else:
            torch.testing.assert_close(c, (0.99 * before[k] + 0.01 * mine.sum(0)).detach() / size)


@pytest.mark.parametrize("where", [{"preset": "default", "infer": "aug"}, {"preset": "assignment"}])
def test_the_first_of_several_epochs_of_swav_leaves_the_prototypes_alone(tmp_path, where):
    def prototypes(made):
        return (made.banks if made.banks is not None else made.kit.augment).C

    made, batch = distiller(train_prototypes="sinkhorn", **where), samples()
    made.rest = 0.5
    for progress, learns in ((0.0, False), (0.49, False), (0.5, True)):
        made.zero_grad(set_to_none=True)
        made.progress = progress
        made(batch)["loss"].backward()
        assert (prototypes(made).grad is not None) == learns


def test_kmeans_finds_separated_groups():
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    points = (centres[:, None] + 0.1 * torch.randn(3, 20, 2)).flatten(0, 1)
    found = prockd.kmeans(points, 3, torch.Generator().manual_seed(0))
    assert torch.cdist(centres, found).min(1).values.max() < 0.2


@pytest.mark.parametrize(
    "keys",
    [
        {"preset": "evidence"},
        {"prototype_learning": False},
        {"feature_augmentation": False},
        {"proto_reduce": 3},
        {"token_dropout": 0.5},
        {"w_KA": 1.0},
        {"train_prototypes": "ema"},
        {"train_prototypes": "sinkhorn"},
    ],
)
def test_every_switch_trains(tmp_path, keys):
    run = tiny_run(tmp_path, method=options(**keys), train={"epochs": 1})
    before = weights(student())
    assert not same(before, weights(prockd.distill(run.cfg, run)))


def test_prototypes_and_biases_have_no_weight_decay():
    made = distiller()
    decayed, free = made.param_groups(0.1)
    assert any(p is made.kit.augment.C for p in free["params"])
    assert all(p.ndim > 1 for p in decayed["params"])


def test_a_width_other_than_the_students_is_refused():
    assert distiller(d=WIDTH)
    with pytest.raises(EdgestillError, match=f"expected the student's width {WIDTH}, found 7"):
        distiller(d=7)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (OFF, "ema learns from teacher tokens"),
        ({"preset": "assignment", "w_A": 1}, "ema learns in the teacher branch"),
        ({"preset": "assignment", "infer": "aug"}, "ema learns in the teacher branch"),
        ({"prototype_learning": False, "feature_augmentation": False}, "nothing uses them"),
        ({"proto_init": "kmeans"}, "replaces what proto_init=kmeans sets"),
        ({"preset": "assignment", "control": "shuffled"}, "leave train_prototypes out"),
        ({"train_prototypes": "sinkhorn", "temperature": 0.2}, "temperature is SwAV's"),
    ],
)
def test_a_learner_that_would_learn_nothing_is_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        options(**{"train_prototypes": "ema", **keys})


def test_a_collapsing_combination_is_refused():
    with pytest.raises(ValueError, match="w_T=0 with stop_grad"):
        options(w_T=0)


@pytest.mark.parametrize("after", [2, 6])  # of four batches an epoch
@pytest.mark.parametrize(
    "keys",
    [
        {"infer": "aug", "token_dropout": 0.3},
        {"infer": "aug", "token_dropout": 0.3, "train_prototypes": "ema"},
        {"infer": "aug", "token_dropout": 0.3, "train_prototypes": "sinkhorn"},
        {"preset": "assignment", "train_prototypes": "ema"},
        {"preset": "assignment", "train_prototypes": "sinkhorn"},
    ],
)
def test_killed_midway_it_ends_with_the_same_bits(tmp_path, keys, after):
    class Killed(BaseException):
        pass

    class Dying(TinyBatches):
        def pick(self, index, epoch):
            if self.fetched == after:
                raise Killed
            return super().pick(index, epoch)

    method = options(**keys)
    whole = tiny_run(tmp_path / "whole", method=method)
    expected = weights(prockd.distill(whole.cfg, whole))
    dying = tiny_run(tmp_path / "killed", method=method, batches=Dying())
    with pytest.raises(Killed):
        prockd.distill(dying.cfg, dying)
    for _ in range(2):  # resumed, then loaded as a finished stage
        again = tiny_run(tmp_path / "killed", method=method)
        assert same(expected, weights(prockd.distill(again.cfg, again)))
