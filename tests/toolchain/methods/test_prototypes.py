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
from toolchain.methods.prototypes import Banks, first_tokens, unit


def banks(count=5, temperature=0.1):
    torch.manual_seed(0)
    made = Banks(WIDTH, TAP_CHANNELS, count, temperature)
    made.learn(samples()["tokens"].flatten(0, 1), seed=0)
    return made


def test_the_assignment_and_its_loss_are_the_formulas():
    made, s = banks(), torch.randn(3, 4, WIDTH)
    t = samples()["tokens"][:3]
    found = made.assignment(t)
    loss, _ = made(s, found)
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
    assignment = right.banks.assignment(batch["tokens"])
    tokens = torch.randn(len(assignment), 4, WIDTH)
    assert wrong(batch)["assignment_kl"] != right(batch)["assignment_kl"]
    torch.testing.assert_close(right.banks(tokens, assignment.roll(1, 0))[1], right.banks(tokens, assignment)[1])


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
