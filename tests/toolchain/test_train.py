import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.toolchain.methods.doubles import TinyBatches, same, student, tiny_run, weights
from tests.toolchain.train_doubles import lines, train
from toolchain.batches import Batches, TrainingError
from toolchain.config import TrainSection
from toolchain.distiller import Frozen
from toolchain.loop import lr_factor
from toolchain.methods.plain import Plain
from toolchain.train import Run, read_metrics


def test_training_learns_and_writes_a_line_per_epoch(tmp_path):
    run = tiny_run(tmp_path, train={"epochs": 15})
    distiller, result = train(run)
    found = [json.loads(line) for line in read_metrics(run).splitlines()]
    assert [line["epoch"] for line in found] == list(range(1, 16))
    assert found[-1]["step"] == 15 * 4
    assert found[-1]["loss"] < found[0]["loss"] / 2
    assert found[-1]["val"]["accuracy"] > 90
    assert {"stage", "lr", "accuracy", "grad_norm", "seconds", "samples_per_second"} <= found[0].keys()
    assert result is distiller.student
    assert not result.training
    assert not (tmp_path / "student").exists()
    assert run.records[0]["best_epoch"] == 15


@pytest.mark.parametrize(("epochs", "parts"), [(1, 4), (3, 4), (20, 3), (30, 2), (31, 1)])
def test_few_epochs_are_logged_in_parts(tmp_path, epochs, parts):
    class Counting(Plain):
        def forward(self, batch):
            return super().forward(batch) | {"number": torch.tensor(self.progress * 4 * epochs + 1)}

    run = tiny_run(tmp_path, train={"epochs": epochs})
    train(run, Counting, score=False)
    ends = {4: [1, 2, 3, 4], 3: [2, 3, 4], 2: [2, 4], 1: []}[parts]
    for line in lines(run):
        before = 4 * (line["epoch"] - 1)
        course = line.get("course", [])
        assert [part["step"] for part in course] == [before + end for end in ends]
        for start, part in zip([0, *ends], course, strict=False):
            assert part["number"] == pytest.approx((before + start + 1 + part["step"]) / 2)
            assert {"loss", "accuracy", "grad_norm"} <= part.keys()
        assert line["number"] == pytest.approx(before + 2.5)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_nan_stops_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, poison):
    class Poisoned(Plain):
        def forward(self, batch):
            out = super().forward(batch)
            if self.progress * 12 > 4.5:
                value = self.student.linear.bias.sum()
                out["loss"] = out["loss"] + (value * float("nan") if poison == "loss" else (value * 0).sqrt())
            return out

    what = "loss" if poison == "loss" else "grad_norm"
    with pytest.raises(TrainingError, match=rf"stage student, epoch 2, step 6: expected {what} to be finite") as caught:
        train(tiny_run(tmp_path), Poisoned)
    kept = tmp_path / "student" / "checkpoint-000000005.safetensors"
    assert str(kept) in str(caught.value)
    assert all(value.isfinite().all() for name, value in load_file(kept).items() if name.startswith("model."))


def test_best_epoch_is_selected_by_the_first_score_in_the_tasks_direction(tmp_path):
    def scored(values):
        rest = iter(values)
        states = []

        def score(module):
            states.append(weights(module))
            return {"error": next(rest)}

        return score, states

    for higher, best in ((True, 0), (False, 1)):
        run = tiny_run(tmp_path / str(higher))
        run.task.HIGHER_IS_BETTER = higher
        score, states = scored([3.0, 1.0, 2.0])
        result = run.stage(
            "s", Plain(student()), run.batches(), run.cfg.train.model_copy(update={"select": "best"}), score
        )
        assert same(states[best], weights(result))
        assert run.records[0]["best_epoch"] == best + 1
    with pytest.raises(TrainingError, match="needs a score"):
        train(tiny_run(tmp_path / "none"), score=False, select="best")


@pytest.mark.parametrize(("every", "epochs", "due"), [(2, 5, [2, 4, 5]), (3, 6, [3, 6]), (9, 4, [4])])
@pytest.mark.parametrize("select", ["best", "last"])
def test_the_validation_split_is_scored_every_few_epochs_and_always_at_the_end(tmp_path, every, epochs, due, select):
    run = tiny_run(tmp_path, train={"epochs": epochs, "score_every": every, "select": select})
    run.task.HIGHER_IS_BETTER = False
    states = []

    def score(module):
        states.append(weights(module))
        return {"error": float(len(states))}  # the first one is the best

    result = run.stage("s", Plain(student()), run.batches(), run.cfg.train, score)
    assert [line["epoch"] for line in lines(run) if line["val"]] == due
    assert run.records[0]["best_epoch"] == (due[0] if select == "best" else epochs)
    assert run.records[0]["val"] == {"error": 1.0 if select == "best" else float(len(due))}
    assert same(states[0 if select == "best" else -1], weights(result))


def test_watched_scores_are_logged_and_select_nothing(tmp_path):
    def distil(name, watch):
        run = tiny_run(tmp_path / name, train={"epochs": 4, "score_every": 2, "select": "best"})
        values = iter([70.0, 60.0])
        result = run.stage(
            "s", Plain(student()), run.batches(), run.cfg.train, lambda module: {"accuracy": next(values)}, watch
        )
        return run, weights(result)

    seen = iter([10.0, 20.0])
    run, found = distil("watched", {"other": lambda module: {"share": next(seen)}})
    assert same(found, distil("alone", None)[1])
    assert [line.get("other") for line in lines(run)] == [None, {"share": 10.0}, None, {"share": 20.0}]
    assert run.records[0]["best_epoch"] == 2
    assert run.records[0]["watched"] == {"other": {"epoch": 4, "scores": {"share": 20.0}}}


def test_accumulated_micro_batches_equal_one_large_batch(tmp_path):
    class Linear(Plain):
        def __init__(self, module):
            super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
            with torch.no_grad():
                self.student[1].weight.fill_(0.01)
                self.student[1].bias.zero_()

    large = train(tiny_run(tmp_path / "a"), Linear, TinyBatches(12))[0]
    small = train(tiny_run(tmp_path / "b"), Linear, TinyBatches(4), accumulate=3)[0]
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_frozen_teachers_and_unequal_learning_rates(tmp_path):
    class Unequal(Plain):
        def __init__(self, module):
            super().__init__(module)
            self.teacher = Frozen(module)

        def param_groups(self, lr):
            slow, fast = self.student.body.parameters(), self.student.linear.parameters()
            return [{"params": list(slow), "lr": 0.0}, {"params": list(fast), "lr": lr}]

    before = weights(student())
    distiller, after = train(tiny_run(tmp_path), Unequal)
    after = weights(after)
    assert (before["body.0.weight"] == after["body.0.weight"]).all()
    assert (before["linear.weight"] != after["linear.weight"]).any()
    assert same(before, weights(distiller.teacher.module))


def test_random_numbers_do_not_depend_on_whether_a_stage_ran_or_was_loaded(tmp_path):
    train(tiny_run(tmp_path))
    ran = torch.rand(3)
    train(tiny_run(tmp_path))
    assert torch.equal(ran, torch.rand(3))


def test_a_loaded_stage_is_on_the_device_that_it_was_trained_on(tmp_path, monkeypatch):
    train(tiny_run(tmp_path))
    monkeypatch.setattr(Run, "device", torch.device("meta"))
    loaded = train(tiny_run(tmp_path), score=False)[1]
    assert {parameter.device.type for parameter in loaded.parameters()} == {"meta"}


def test_nothing_to_train_is_an_error(tmp_path):
    frozen = student().requires_grad_(False)
    run = tiny_run(tmp_path)
    with pytest.raises(TrainingError, match="nothing to train"):
        run.stage("student", Plain(frozen), run.batches(), run.cfg.train)


def test_bf16_trains_in_the_same_process_as_fp32(tmp_path):
    train(tiny_run(tmp_path / "a"))
    found = train(tiny_run(tmp_path / "b"), precision="bf16")[1]
    assert all(value.isfinite().all() and value.dtype != torch.bfloat16 for value in found.state_dict().values())


def test_one_cycle_is_torchs():
    recipe = TrainSection(schedule="one_cycle", warmup=0.3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=50, pct_start=0.3, cycle_momentum=False)
    for step in range(50):
        assert lr_factor(recipe, step, 50) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "one_cycle"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_schedules_rise_to_the_peak_and_fall(schedule, warmup):
    recipe = TrainSection(schedule=schedule, warmup=warmup)
    for total in (1, 2, 7, 40):
        factors = [lr_factor(recipe, step, total) for step in range(total)]
        assert all(0 < factor <= 1 for factor in factors)
    if warmup == 0.1:
        assert factors[0] < factors[3]
        assert max(factors[:6]) == pytest.approx(1, abs=0.01)
        assert (factors[-1] < 0.05) == (schedule != "constant")


def test_batches_are_the_epochs_alone_and_cover_every_sample():
    def indices(epoch, start=0):
        return [b["index"].tolist() for b in Batches(10, 3, fetch, seed=1).epoch(epoch, start)]

    def fetch(index, epoch):
        return {"index": torch.from_numpy(index)}

    assert indices(4) == indices(4)
    assert indices(4) != indices(5)
    assert indices(4, 2) == indices(4)[2:]
    seen = [i for batch in indices(0) for i in batch]
    assert len(set(seen)) == len(seen) == 9
    assert len(Batches(2, 3, fetch)) == 1


def test_processes_share_each_batch(tmp_path):
    halves = []
    for rank in (0, 1):
        batches = Batches(8, 4, lambda index, epoch: {"index": torch.from_numpy(index)})
        batches.rank, batches.world = rank, 2
        halves.append([b["index"].tolist() for b in batches.epoch(0)])
    whole = [b["index"].tolist() for b in Batches(8, 4, lambda i, e: {"index": torch.from_numpy(i)}).epoch(0)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of trainings on the CPU")
def test_bf16_where_it_is_emulated_is_told(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("toolchain.train.bf16_cost", lambda: 17.2)
    run = tiny_run(tmp_path, train={"epochs": 1, "precision": "bf16"})
    Run(run.cfg, run.data, {}, tmp_path, task=run.task)
    assert "bf16 takes 17 times as long as fp32 on this CPU" in capfd.readouterr().err
