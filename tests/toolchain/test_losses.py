"""Every loss against a naive loop."""

import math

import pytest
import torch

from toolchain import losses

torch.manual_seed(0)
LOGITS, OTHER = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5)
LABEL = torch.randint(0, 4, (3, 2, 5))
LABEL[0, 0] = 255


def positions(ignore):
    return [
        (b, i, j) for b in range(3) for i in range(2) for j in range(5) if ignore is None or LABEL[b, i, j] != ignore
    ]


def log_softmax(values):
    top = max(values)
    total = math.log(sum(math.exp(v - top) for v in values)) + top
    return [v - total for v in values]


def naive_kl(p, q, temperature=1.0):
    p, q = (log_softmax([v / temperature for v in x.tolist()]) for x in (p, q))
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def test_cross_entropy_is_the_mean_over_positions_that_count():
    expected = [-log_softmax(LOGITS[b, :, i, j].tolist())[LABEL[b, i, j]] for b, i, j in positions(255)]
    assert losses.cross_entropy(LOGITS, LABEL, 255).item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    flat = losses.cross_entropy(LOGITS[:, :, 0, 0], torch.tensor([1, 2, 3]))
    rows = [-log_softmax(LOGITS[b, :, 0, 0].tolist())[b + 1] for b in range(3)]
    assert flat.item() == pytest.approx(sum(rows) / 3, rel=1e-5)


def test_all_positions_ignored_gives_zero_not_nan():
    logits = LOGITS.clone().requires_grad_()
    loss = losses.cross_entropy(logits, torch.full_like(LABEL, 255), 255)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()
    assert losses.kl(LOGITS, OTHER, torch.zeros_like(LABEL, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("ignore", [None, 255])
def test_kl(ignore):
    expected = [naive_kl(LOGITS[b, :, i, j], OTHER[b, :, i, j]) for b, i, j in positions(ignore)]
    found = losses.kl(LOGITS, OTHER, losses.valid(LABEL, ignore)).item()
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert losses.kl(LOGITS, LOGITS).item() == pytest.approx(0, abs=1e-6)


def test_hinton_kd_has_the_teacher_first_and_the_squared_temperature():
    pairs = [(OTHER[b, :, 0, 0], LOGITS[b, :, 0, 0]) for b in range(3)]
    expected = sum(16 * naive_kl(teacher, student, 4.0) for teacher, student in pairs) / 3
    assert losses.hinton_kd(LOGITS[:, :, 0, 0], OTHER[:, :, 0, 0], 4.0).item() == pytest.approx(expected, rel=1e-5)


def test_feature_losses():
    a, b = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    expected = sum((x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)) / 42
    assert losses.fitnet(a, b).item() == pytest.approx(expected, rel=1e-5)

    def normed(rows):
        out = []
        for row in rows.reshape(-1, 7).tolist():
            mean = sum(row) / 7
            scale = math.sqrt(sum((v - mean) ** 2 for v in row) / 7 + 1e-5)
            out += [(v - mean) / scale for v in row]
        return out

    gaps = [x - y for x, y in zip(a[:, 0].flatten().tolist(), normed(b[:, 0]), strict=True)]
    smooth = sum(g * g / 2 if abs(g) < 1 else abs(g) - 0.5 for g in gaps) / 14
    assert losses.vkd(a[:, 0], b[:, 0]).item() == pytest.approx(smooth, rel=1e-4)
    gaps = [x - y for x, y in zip(normed(a), normed(b), strict=True)]
    assert losses.inverted_projection(a, b).item() == pytest.approx(sum(g * g for g in gaps) / 42, rel=1e-4)
    assert losses.inverted_projection(a, 0.1 * a).item() < 0.01


def test_usage_perplexity_counts_the_prototypes_in_use():
    even, one = torch.full((2, 3, 8), 1 / 8), torch.eye(8)[[2]].expand(2, 3, 8)
    assert losses.usage_perplexity(even).item() == pytest.approx(8, rel=1e-5)
    assert losses.usage_perplexity(one).item() == pytest.approx(1)
    assert losses.usage_perplexity(torch.eye(8)[[0, 1, 2, 3]]).item() == pytest.approx(4, rel=1e-5)


def test_the_nearest_candidate_is_by_plain_distance():
    candidates = torch.tensor([[[3.0, 4.0], [0.0, 6.0]], [[1.0, 0.0], [0.0, 0.5]]], requires_grad=True)
    distance, index = losses.nearest(candidates, torch.zeros(2, 2))
    assert distance.tolist() == [5.0, 0.5]
    assert index.tolist() == [0, 1]
    distance.sum().backward()
    assert candidates.grad.flatten(0, 1).norm(dim=1).tolist() == pytest.approx([1, 0, 0, 1])


def test_diversity_is_one_where_all_coincide_and_nothing_where_far_apart():
    assert losses.diversity(torch.randn(3, 1, 2).expand(-1, 20, -1), 1.0).item() == 1
    apart = torch.arange(20.0)[None, :, None] * torch.tensor([30.0, 40.0])
    assert losses.diversity(apart, 1.0).item() == 0
    assert losses.diversity(torch.randn(3, 1, 2), 1.0).item() == 0
    pair = torch.tensor([[[0.0, 0.0], [1.0, 2.0]]])
    assert losses.diversity(pair, 10.0).item() == pytest.approx(math.exp(-0.5))


def test_displacement_is_the_mean_distance():
    path = torch.tensor([[[0.0, 0.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 2.0]]])
    assert losses.displacement(path, torch.zeros(2, 2, 2)).item() == pytest.approx((0 + 5 + 2**0.5 + 5**0.5) / 4)


def test_accuracy_is_percent_of_what_counts():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 0.0]])
    assert losses.accuracy(logits, torch.tensor([0, 1, 1])).item() == pytest.approx(200 / 3)
    assert losses.accuracy(logits, torch.tensor([0, 9, 1]), 9).item() == pytest.approx(50)


def test_losses_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.nn.functional.linear(torch.randn(4, 8), torch.randn(3, 8))
        assert logits.dtype == torch.bfloat16
        assert losses.kl(logits, logits + 1).dtype == torch.float32
        assert losses.cross_entropy(logits, torch.zeros(4, dtype=torch.long)).dtype == torch.float32
