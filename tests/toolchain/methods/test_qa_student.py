from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.toolchain.methods.doubles import same, weights
from tests.toolchain.qa_doubles import DATA, SMALL, config, data, net, run
from tests.toolchain.tasks.test_qa_nets import saved
from toolchain.methods.options import QaStudent
from toolchain.methods.qa_student import Smaller, distill, state_distance
from toolchain.tasks import load_task
from toolchain.tasks.qa_batches import SpanBatches
from toolchain.tasks.qa_data import UNLABELLED
from toolchain.tasks.qa_pruning import layers_of, smaller
from toolchain.tasks.qa_tokenizer import TokenizerError
from toolchain.train import Run

METHOD = {"name": "qa_student"}


def test_the_distance_is_of_normalised_states_where_there_are_tokens() -> None:
    a, b = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    naive = 0.0
    for row, place in ((0, 0), (0, 1), (1, 0)):
        x, y = a[row, place], b[row, place]
        x, y = ((v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt() for v in (x, y))
        naive += float((x - y).square().mean()) / 3
    assert float(state_distance(a, b, mask)) == pytest.approx(naive, rel=1e-4)
    assert float(state_distance(a, 3 * a + 1, mask)) == pytest.approx(0, abs=1e-6)


def test_a_whole_copy_starts_where_its_teacher_is(tmp_path: Path) -> None:
    teacher = net(tmp_path)
    distiller = Smaller(smaller(teacher, [0, 1], None), teacher, [0, 1], QaStudent(name="qa_student", ce=0)).eval()
    out = distiller(next(SpanBatches(run(tmp_path), ("train",), 8).epoch(0)))
    assert float(out["loss"].detach()) == pytest.approx(0, abs=1e-6)
    assert float(out["agreement"]) == 100
    assert distiller.pairs == [(0, 0), (1, 1), (2, 2)]
    assert not any(p.requires_grad for p in distiller.teacher.module.parameters())


def test_a_smaller_student_learns_from_the_teachers_artifact(tmp_path: Path) -> None:
    teacher = net(tmp_path / "t")
    before = weights(teacher)
    inputs = {"teacher": saved(teacher, tmp_path / "teacher")}
    sections = {"method": METHOD, "teacher": {"options": SMALL}, "student": {"layers": 1}}
    sections |= {"train": {"epochs": 2, "batch_size": 8, "lr": 3e-3}}
    this = run(tmp_path / "run", inputs, **sections)
    student = distill(this.cfg, this)
    assert len(layers_of(student.encoder)) == 1
    assert student.encoder.config.vocab_size < data().info["pieces"]
    found = weights(student)
    assert same(found, weights(distill(this.cfg, run(tmp_path / "again", inputs, **sections))))
    assert same(before, weights(teacher))
    assert this.records[0]["name"] == "student"
    pruned, cut = this.steps
    assert "word pieces; " in pruned["what"]
    assert cut["what"] == "1 of its 2 layers, not yet distilled"
    sizes = [sum(p.numel() for p in module.parameters()) for module in (teacher, student)]
    assert sizes[0] > pruned["parameters"] > cut["parameters"] == sizes[1]
    assert pruned["val"] == pytest.approx(this.scorer()(teacher), abs=1e-4)


def test_neurons_are_cut_out_of_the_distilled_student_which_is_then_repaired(tmp_path: Path) -> None:
    wide = {"options": SMALL | {"intermediate_size": 24}}
    inputs = {"teacher": saved(net(tmp_path / "t", student=wide), tmp_path / "teacher")}
    method = METHOD | {"intermediate_size": 10, "repair": {"epochs": 2, "lr": 1e-3}}
    sections = {"method": method, "teacher": wide, "student": {"layers": 1}}
    sections |= {"train": {"epochs": 1, "batch_size": 8, "lr": 3e-3}}
    this = run(tmp_path / "run", inputs, **sections)
    student = distill(this.cfg, this)
    assert [(record["name"], record["epochs"]) for record in this.records] == [("student", 1), ("repair", 2)]
    _, cut, distilled, narrowed = this.steps
    assert distilled["what"] == "distilled, with all 24 intermediate neurons in each layer"
    assert distilled["parameters"] == cut["parameters"]
    assert distilled["val"] == this.records[0]["val"]
    assert narrowed["what"] == "10 of its 24 intermediate neurons in each layer, not repaired"
    assert cut["parameters"] - narrowed["parameters"] == 14 * (16 + 1 + 16)
    assert sum(p.numel() for p in student.parameters()) == narrowed["parameters"]
    made = {folder: (folder / "model.safetensors").stat().st_mtime_ns for folder in this.folders}
    again = run(tmp_path / "run", inputs, **sections)
    assert same(weights(student), weights(distill(again.cfg, again)))
    assert again.records == this.records
    assert made == {folder: (folder / "model.safetensors").stat().st_mtime_ns for folder in again.folders}
    sections["method"] = METHOD | {"intermediate_size": 10}
    bare = run(tmp_path / "bare", inputs, **sections)
    assert sum(p.numel() for p in distill(bare.cfg, bare).parameters()) == narrowed["parameters"]
    assert [record["name"] for record in bare.records] == ["student"]
    assert bare.steps == this.steps


def test_windows_without_a_label_teach_what_the_teacher_says_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = net(tmp_path)
    distiller = Smaller(smaller(teacher, [0], None), teacher, [0], QaStudent(name="qa_student")).eval()
    batch = next(SpanBatches(run(tmp_path), ("train",), 8).epoch(0))
    whole = distiller(batch)
    half = {name: tensor[:4] for name, tensor in batch.items()}
    label = batch["label"].clone()
    label[4:] = UNLABELLED
    mixed, none = distiller(batch | {"label": label}), distiller(batch | {"label": torch.full_like(label, UNLABELLED)})
    for name in ("kd", "hidden"):
        assert torch.equal(mixed[name], whole[name])
        assert torch.equal(none[name], whole[name])
    assert float(mixed["ce"].detach()) == pytest.approx(float(distiller(half)["ce"].detach()) / 2, rel=1e-5)
    assert float(none["ce"].detach()) == 0
    assert torch.equal(none["loss"], none["kd"] + none["hidden"])


def test_the_student_is_also_asked_the_unlabelled_questions(tmp_path: Path) -> None:
    asked = DATA | {"train_questions": 6, "unlabelled_questions": 8}
    teacher = saved(net(tmp_path / "t"), tmp_path / "teacher")
    sections = {"method": METHOD, "teacher": {"options": SMALL}, "student": {"layers": 1}, "data": asked}
    sections |= {"train": {"epochs": 1, "batch_size": 8}}
    steps = []
    for name in ("more", "fewer"):
        found = load_task("qa").prepare(config(**sections).data)
        if name == "fewer":
            del found.splits["unlabelled"]
        this = Run(config(**sections), found, {"teacher": teacher}, tmp_path / name, quiet=True)
        distill(this.cfg, this)
        steps.append(this.records[0]["steps"])
    assert steps[0] - steps[1] >= 8 * 4 // 8


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    teacher = smaller(net(tmp_path / "t"), [0, 1], torch.arange(0, 60).numpy())
    inputs = {"teacher": saved(teacher, tmp_path / "teacher")}
    this = run(tmp_path / "run", inputs, method=METHOD, teacher={"options": SMALL}, student={})
    with pytest.raises(TokenizerError, match="the teacher was made with another tokenizer"):
        distill(this.cfg, this)
