"""Guidance through the assignment of the teacher's tokens to its prototypes."""

import pytest
import torch

from tests.toolchain.methods.doubles import (
    CHANNELS,
    GRID,
    TAP_CHANNELS,
    WIDTH,
    same,
    samples,
    student,
    tiny_run,
    weights,
)
from toolchain.methods import prockd
from toolchain.methods.options import ProCKD as Options
from toolchain.methods.prototypes import (
    Banks,
    MovingAverages,
    balanced_codes,
    commitment,
    first_tokens,
    swapped_prediction,
    unit,
)


def banks(count=5, temperature=0.1):
    torch.manual_seed(0)
    made = Banks(WIDTH, TAP_CHANNELS, count, temperature)
    made.learn(samples()["tokens"].flatten(0, 1), seed=0)
    return made


def test_the_assignment_and_its_loss_are_the_formulas():
    made, s = banks(), torch.randn(3, 4, WIDTH)
    t = samples()["tokens"][:3]
    found = made.assignment(t)
    loss, _ = made(s, t)
    total, logits = 0.0, made.predict(s)
    for tap, (start, end) in enumerate(((0, 4), (4, 10))):
        c, part = made.C[:, start:end], t[..., start:end]
        a = (torch.cosine_similarity(part[:, :, None], c, dim=-1) / 0.1).softmax(-1)
        torch.testing.assert_close(found[:, :, tap], a)
        log_q = logits[..., 5 * tap : 5 * tap + 5].log_softmax(-1)
        total += (a * (a.log() - log_q)).sum(-1).mean().item()
    assert loss.item() == pytest.approx(total, rel=1e-4)


def test_each_tap_has_unit_prototypes_that_its_tokens_are_near():
    made, tokens = banks(), samples()["tokens"]
    for c, t in zip(made.C.split(list(TAP_CHANNELS), -1), tokens.split(list(TAP_CHANNELS), -1), strict=True):
        torch.testing.assert_close(c.norm(dim=-1), torch.ones(5))
        other = unit(torch.randn(5, c.shape[1]))
        assert (unit(t) @ c.T).amax(-1).mean() > (unit(t) @ other.T).amax(-1).mean()


def test_prototypes_depend_on_the_seed_and_tokens_alone():
    assert torch.equal(banks().C, banks().C)
    assert not torch.equal(banks().C, banks(5).C.flip(0))


def test_shuffled_prototypes_keep_each_channels_values():
    made = Banks(WIDTH, TAP_CHANNELS, 7, 0.1)
    made.C.copy_(torch.arange(70.0).reshape(7, 10).sin())
    before = made.C.clone()
    made.shuffle(0)
    for old, new in zip(before.split(list(TAP_CHANNELS), -1), made.C.split(list(TAP_CHANNELS), -1), strict=True):
        torch.testing.assert_close(new.norm(dim=-1), torch.ones(7))
        assert not torch.allclose(unit(old), new)
        assert torch.equal(old[:, 0].sign().sort().values, new[:, 0].sign().sort().values)


def test_only_the_student_and_its_prediction_learn():
    made, batch = distiller(), samples()
    made(batch)["loss"].backward()
    with_gradient = {name for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    assert "banks.predict.weight" in with_gradient
    assert any(name.startswith("student.") for name in with_gradient)
    assert not any(name.startswith("kit.") for name in with_gradient)
    assert "banks.C" not in dict(made.named_parameters())


def distiller(**keys):
    torch.manual_seed(0)
    options = Options(**({"name": "prockd", "preset": "assignment", "K": 5} | keys))
    made = prockd.ProCKD(student(), TAP_CHANNELS, GRID, options)
    made.banks.learn(samples()["tokens"].flatten(0, 1), seed=0)
    return made.eval()


def test_the_preset_adds_its_weighted_loss_and_nothing_else():
    out = {name: value.item() for name, value in distiller(w_P=3)(samples()).items()}
    assert out["loss"] == pytest.approx(out["ce"] + 3 * out["assignment_kl"], rel=1e-5)
    assert 1 < out["bank_perplexity"] <= 5


def test_another_images_assignment_is_a_harder_target():
    batch, right, wrong = samples(), distiller(), distiller(control="other_image")
    assert wrong(batch)["assignment_kl"] != right(batch)["assignment_kl"]
    torch.testing.assert_close(wrong(batch)["bank_perplexity"], right(batch)["bank_perplexity"])


def test_balanced_codes_use_every_prototype_alike():
    scores = torch.randn(600, 5).mul(0.1) + torch.tensor([0.5, 0, 0, 0, 0])
    codes = balanced_codes(scores)
    torch.testing.assert_close(codes.sum(1), torch.ones(600))
    torch.testing.assert_close(codes.sum(0), torch.full((5,), 120.0), rtol=0.1, atol=0)
    assert (scores / 0.05).softmax(1).sum(0)[0] > 500


def test_balanced_codes_do_not_depend_on_what_a_row_adds_up_to():
    scores = torch.randn(60, 5).mul(0.1)
    far = balanced_codes(torch.cat([scores[:30], scores[30:] - 5]))
    assert far.isfinite().all()
    entropy = torch.special.entr(far).sum(1)
    assert (entropy[30:].mean() / entropy[:30].mean()).item() == pytest.approx(1, abs=0.3)


def test_swapped_prediction_is_the_formula_and_trains_both_views():
    one, other = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5, requires_grad=True)
    loss = swapped_prediction(one, other)
    expected = 0.0
    for seen, hidden in ((one, other), (other, one)):
        expected -= (balanced_codes(hidden) * (seen / 0.1).softmax(1).log()).sum(1).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert one.grad.any()
    assert other.grad.any()


def test_moving_averages_are_the_recurrence():
    points, prototypes = torch.tensor([[4.0, 0.0]] * 300 + [[0.0, 8.0]] * 300), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    learner = MovingAverages(2, 2)
    learner.start(prototypes)
    size, total = 1.0, torch.tensor([1.0, 0.0])
    for _ in range(3):
        prototypes = learner.update(points)
        size, total = 0.99 * size + 0.01 * 300, 0.99 * total + 0.01 * 300 * points[0]
        torch.testing.assert_close(prototypes[0], total / size)
    for _ in range(50):
        prototypes = learner.update(points)
    torch.testing.assert_close(prototypes, torch.tensor([[4.0, 0.0], [0.0, 8.0]]), rtol=0.05, atol=0)


def test_a_dead_prototype_becomes_a_point():
    prototypes = torch.tensor([[1.0, 0.0], [99.0, 99.0]])
    learner = MovingAverages(2, 2)
    learner.start(prototypes)
    prototypes = learner.update(torch.tensor([[1.0, 0.5]] * 200))
    torch.testing.assert_close(prototypes[1], torch.tensor([1.0, 0.5]))


def test_commitment_pulls_points_to_the_nearest_prototype_alone():
    points = torch.tensor([[1.0, 0.0], [0.0, 3.0]], requires_grad=True)
    prototypes = torch.tensor([[2.0, 0.0], [0.0, 2.0]], requires_grad=True)
    commitment(points, prototypes).backward()
    torch.testing.assert_close(points.grad, 0.25 * torch.tensor([[-1.0, 0.0], [0.0, 1.0]]))
    assert prototypes.grad is None


def learning_banks(learner):
    torch.manual_seed(0)
    made = Banks(WIDTH, TAP_CHANNELS, 5, 0.1, learner)
    made.learn(samples()["tokens"].flatten(0, 1), seed=0)
    return made


def test_banks_that_follow_moving_averages_are_the_formula():
    made, s, t = learning_banks("ema").eval(), torch.randn(36, 4, WIDTH), samples()["tokens"]
    start = made.C.clone()
    loss, _ = made(s, t)
    assert torch.equal(start, made.C)
    expected, logits = 0.0, made.predict(s)
    for tap, (low, high) in enumerate(((0, 4), (4, 10))):
        a = (torch.cosine_similarity(t[:, :, None, low:high], made.C[:, low:high], dim=-1) / 0.1).softmax(-1)
        log_q = logits[..., 5 * tap : 5 * tap + 5].log_softmax(-1)
        expected += (a * (a.log() - log_q)).sum(-1).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    first = MovingAverages(5, 4)
    first.start(start[:, :4])
    torch.manual_seed(1)
    moved = first.update(unit(t[..., :4]).flatten(0, 1))
    torch.manual_seed(1)
    made.train()(s, t)
    torch.testing.assert_close(made.C[:, :4], moved)


def test_banks_of_swav_are_the_formula():
    made, s, t = learning_banks("sinkhorn"), torch.randn(36, 4, WIDTH), samples()["tokens"]
    expected, logits = 0.0, made.predict(s)
    for tap, (low, high) in enumerate(((0, 4), (4, 10))):
        cosine = torch.cosine_similarity(t[:, :, None, low:high], made.C[:, low:high], dim=-1)
        views = cosine.flatten(0, 1), 0.1 * logits[..., 5 * tap : 5 * tap + 5].flatten(0, 1)
        expected += swapped_prediction(*views).item()
    loss, _ = made(s, t)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert made.C.grad.any()


@pytest.mark.parametrize("learner", ["ema", "sinkhorn"])
def test_banks_start_from_different_points(learner):
    assert len(torch.unique(learning_banks(learner).C, dim=0)) == 5


def test_a_control_of_nothing_is_refused():
    with pytest.raises(ValueError, match="control=shuffled breaks the assignment"):
        Options(name="prockd", control="shuffled")


@pytest.mark.parametrize("control", ["none", "shuffled", "other_image"])
@pytest.mark.parametrize("dense", [False, True])
def test_it_trains_and_ships_the_student_alone(tmp_path, control, dense):
    method = Options(name="prockd", preset="assignment", K=5, control=control)
    run = tiny_run(tmp_path, method=method, train={"epochs": 1}, dense=dense)
    before = weights(student(dense=dense))
    after = weights(prockd.distill(run.cfg, run))
    assert before.keys() == after.keys()
    assert not same(before, after)


def test_the_first_tokens_are_taken_and_no_more():
    batches = [{"tokens": torch.full((8192 // 4 - 1, 4, CHANNELS), float(i))} for i in range(3)]
    found = first_tokens(iter(batches))
    assert found.shape == (8192, CHANNELS)
    assert found[-1, 0] == 1
