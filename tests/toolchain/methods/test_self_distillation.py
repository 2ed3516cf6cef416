from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.toolchain.methods.doubles import same, weights
from tests.toolchain.qa_doubles import net, run
from toolchain.losses import cross_entropy, hinton_kd, hit_precision, weighted_kd
from toolchain.methods.options import SelfDistillation
from toolchain.methods.self_distillation import Generations, TeacherLogits, coefficient, distill
from toolchain.tasks import FILL
from toolchain.tasks.qa_batches import SpanBatches
from toolchain.train import read_metrics


def options(**changes: Any) -> SelfDistillation:
    return SelfDistillation(name="self_distillation", **changes)


def ranking(*rows: list[int], size: int = 64) -> Tensor:
    """Logits (B, size) whose best positions are ``rows``, in that order; the others far from every label."""
    logits = torch.zeros(len(rows), size) - torch.arange(size) / 1000
    for row, order in enumerate(rows):
        rest = [place for place in range(40, size) if place not in order]
        for rank, place in enumerate([*order, *rest]):
            logits[row, place] = 1000 - rank
    return logits


@pytest.mark.parametrize(
    ("order", "label", "value"),
    [([20, 16], 12, 1 / 2), ([20, 17, 7], 12, 1 / 3), ([6, 17, 30], 12, 0), ([9, 4], 0, 1 / 2), ([12], 12, 1)],
)
def test_the_vectors_of_the_specification(order: list[int], label: int, value: float) -> None:
    found = hit_precision(ranking(order), torch.tensor([label]))
    assert found.tolist() == pytest.approx([value])


def test_the_coefficient_is_the_mean_over_windows_and_both_ends() -> None:
    start, end = ranking([20, 16], [20, 17, 7]), ranking([12], [13])
    teacher, label = torch.stack([start, end], 2), torch.full((2, 2), 12)
    assert coefficient(teacher, label, options()).tolist() == pytest.approx([0.75, 2 / 3])
    assert float(coefficient(teacher, label, options()).mean()) == pytest.approx(0.70833, abs=1e-5)
    assert float(hit_precision(start, label[:, 0]).mean()) == pytest.approx(0.41667, abs=1e-5)


def test_its_options() -> None:
    label = torch.tensor([[12, 12]])

    def value(order: list[int], **changes: Any) -> float:
        return float(coefficient(ranking(order)[:, :, None].expand(-1, -1, 2), label, options(**changes)))

    assert (value([17]), value([17], symmetric=True), value([7]), value([18], symmetric=True)) == (0, 1, 1, 0)
    assert (value([13]), value([13], strict=True), value([20, 12], strict=True)) == (1, 0, 0.5)
    assert value([20, 20 - 4], k=1) == 0
    assert value([30], coefficient="constant") == 1
    found = (1 / 2 + 2 / 4) / 10  # hits at ranks 2 and 4 of ten right positions
    assert value([20, 12, 21, 13], every_hit=True) == pytest.approx(found)
    assert value([20, 12], every_hit=True, strict=True) == pytest.approx(1 / 2)
    assert float(hit_precision(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([2]))) == 1  # fewer than k positions


@pytest.mark.parametrize("size", [7, 12])
@pytest.mark.parametrize("every_hit", [False, True])
def test_it_does_not_depend_on_padding(every_hit: bool, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, size, 2, generator=generator)
    label = torch.randint(size // 2, size, (20, 2), generator=generator)
    padded = torch.nn.functional.pad(logits, (0, 0, 0, 8), value=FILL)
    chosen, length = options(every_hit=every_hit), torch.full((20,), size)
    found = coefficient(logits, label, chosen)
    assert torch.equal(coefficient(padded, label, chosen, length), found)
    assert torch.equal(coefficient(logits, label, chosen, length), found)
    assert float(found.max()) <= 1


def test_it_agrees_with_a_naive_loop_and_carries_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 30, 2, generator=generator, requires_grad=True)
    label = torch.randint(0, 30, (50, 2), generator=generator)
    found = hit_precision(logits, label)
    for row in range(50):
        for side in range(2):
            order = sorted(range(30), key=lambda place: -float(logits.detach()[row, place, side]))[:10]
            hits = [r for r, p in enumerate(order, 1) if label[row, side] - 5 <= p <= label[row, side] + 4]
            assert float(found[row, side]) == pytest.approx(1 / hits[0] if hits else 0)
    assert not found.requires_grad


def test_the_losses_are_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(4, 9, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    label = torch.randint(0, 9, (4, 2), generator=generator)
    naive_ce = naive_kd = 0.0
    for side in range(2):
        for row in range(4):
            naive_ce -= float(s[row, :, side].log_softmax(0)[label[row, side]]) / 8
            p, q = (t[row, :, side] / 2).softmax(0), (s[row, :, side] / 2).softmax(0)
            naive_kd += 4 * float((p * (p / q).log()).sum()) / 8
    assert float(cross_entropy(s, label)) == pytest.approx(naive_ce, rel=1e-5)
    assert float(hinton_kd(s, t, 2.0)) == pytest.approx(naive_kd, rel=1e-5)
    weight = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert float(weighted_kd(s, t, 2.0, weight)) == pytest.approx(float(hinton_kd(s[:1], t[:1], 2.0)) / 4, rel=1e-5)
    assert float(weighted_kd(s, t, 2.0, torch.ones(4))) == pytest.approx(naive_kd, rel=1e-5)
    near = [float(hinton_kd(1e-2 * s, 1e-2 * t, T)) for T in (2.0, 4.0)]
    assert near[0] == pytest.approx(near[1], rel=1e-2)  # T^2 keeps the size


def test_a_student_equal_to_its_teacher_has_no_kd_and_no_gradient(tmp_path: Path) -> None:
    model = net(tmp_path)
    distiller = Generations(model, options(ce=0)).eval()
    batch = next(SpanBatches(run(tmp_path), ("train",), 8).epoch(0))
    out = distiller(batch)
    assert float(out["kd"].detach()) == pytest.approx(0, abs=1e-7)
    out["loss"].backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-6
    assert all(not p.requires_grad for p in distiller.teacher.module.parameters())
    assert list(distiller.teacher.parameters()) == []


def test_the_switches(tmp_path: Path) -> None:
    model, batch = net(tmp_path), next(SpanBatches(run(tmp_path), ("train",), 8).epoch(0))
    with torch.no_grad():
        whole = Generations(model, options(coefficient="constant")).eval()(batch)
        assert float(whole["loss"]) == pytest.approx(float(whole["ce"] + whole["kd"]))
        assert float(whole["coefficient"]) == 1
        plain = Generations(model, options(kd=0)).eval()(batch)
        assert plain.keys() == {"loss", "ce", "accuracy"}
        assert float(plain["loss"]) == float(plain["ce"])
        weighted = Generations(model, options(ce=0, kd=2)).eval()(batch)
        assert float(weighted["loss"]) == pytest.approx(float(2 * weighted["coefficient"] * weighted["kd"]), abs=1e-9)


class Watched(Generations):
    """Notes, at every step, whether the teacher is what it was when the epoch began."""

    seen: list[tuple[bool, bool]]

    def on_epoch_start(self, epoch: int) -> None:
        super().on_epoch_start(epoch)
        self.start = weights(self.student)
        self.seen = getattr(self, "seen", [])

    def forward(self, batch: Any) -> dict[str, Tensor]:
        now = weights(self.teacher.module)
        self.seen.append((same(now, self.start), same(weights(self.student), self.start)))
        assert not self.teacher.module.training
        return super().forward(batch)


def test_the_teacher_is_the_student_at_the_epochs_start_and_stays_so(tmp_path: Path) -> None:
    this = run(tmp_path)
    distiller = Watched(net(tmp_path), options())
    this.stage("generations", distiller, this.batches("train"), this.cfg.train)
    steps = len(this.batches("train"))
    assert len(distiller.seen) == 3 * steps
    assert all(unchanged for unchanged, _ in distiller.seen)
    assert [number for number, (_, equal) in enumerate(distiller.seen) if equal] == [0, steps, 2 * steps]


def history(this: Any) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in json.loads(line).items() if "second" not in k} for line in read_metrics(this).splitlines()
    ]


SOFT = {"name": "self_distillation", "first": {"epochs": 1}}
DROPOUT = {"options": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}}
DROPOUT |= {"dropout": 0.1}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kept_logits_give_the_same_loss_to_the_bit(precision: str, tmp_path: Path) -> None:
    found = []
    for cache in (True, False):
        train = {"precision": precision, "epochs": 2, "batch_size": 8}
        this = run(tmp_path / str(cache), method=SOFT | {"cache": cache}, student=DROPOUT, train=train)
        model = distill(this.cfg, this)
        found.append((history(this), weights(model)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])
    assert all(0 <= line["coefficient"] <= 1 for line in found[0][0] if line["stage"] == "generations")


def test_both_stages_resume_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    whole = run(tmp_path / "whole", method=SOFT, student=DROPOUT)
    expected = weights(distill(whole.cfg, whole))
    forward, left = Generations.forward, [0]

    def dying(self: Generations, batch: Any) -> dict[str, Tensor]:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return forward(self, batch)

    monkeypatch.setattr(Generations, "forward", dying)
    for after in (2, 8, 13):  # in the first stage, in a generation's first step, in the middle of one
        left[0] = after
        with pytest.raises(Killed):
            killed = run(tmp_path / "killed", method=SOFT, student=DROPOUT)
            distill(killed.cfg, killed)
    left[0] = 10**6
    resumed = run(tmp_path / "killed", method=SOFT, student=DROPOUT)
    assert same(expected, weights(distill(resumed.cfg, resumed)))
    assert history(whole) == history(resumed)
    assert [record["name"] for record in resumed.records] == ["first", "generations"]


def test_runs_of_a_study_share_the_first_stage_and_what_it_teaches(tmp_path: Path, monkeypatch) -> None:
    asked: list[int] = []
    computed = TeacherLogits._computed

    def counted(self: TeacherLogits, *arguments: Any) -> Any:
        asked.append(arguments[1])
        return computed(self, *arguments)

    monkeypatch.setattr(TeacherLogits, "_computed", counted)
    for number, method in enumerate((SOFT, SOFT | {"coefficient": "constant"}, SOFT | {"stop": "first"})):
        this = run(tmp_path / str(number), shared=tmp_path / "shared", method=method)
        distill(this.cfg, this)
    assert len(list((tmp_path / "shared").glob("first-*"))) == 1
    assert sorted(asked) == [0, 1, 1, 2, 2]
    assert [record["name"] for record in this.records] == ["first"]
    assert {line["stage"] for line in history(this)} == {"first"}


def test_logits_are_kept_by_window(tmp_path: Path) -> None:
    batches = SpanBatches(run(tmp_path), ("train",), 8)
    model = net(tmp_path).requires_grad_(False)
    kept = TeacherLogits(batches, tmp_path / "logits", tmp_path / "shared", "", "fp32")
    for batch in batches.epoch(1):
        live = model(batch["input_ids"], batch["attention_mask"])
        assert torch.equal(kept(model, batch), live)
    for batch in batches.epoch(2):
        kept(model, batch)
    (file,) = (tmp_path / "logits").iterdir()  # the latest generation's alone
    assert load_file(file)["logits"].shape == (batches.count, batches.width, 2)
    kept(model, next(batches.epoch(0)))
    assert len(list((tmp_path / "shared").iterdir())) == len(list((tmp_path / "logits").iterdir())) == 1
