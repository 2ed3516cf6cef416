from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import ppt, tables
from benchmarks.ppt import INFO, EveryToken, OnePassEach, Plan, multiply_adds
from tests.toolchain.methods.walks import NET, OBSERVE, K, config, shaken, tracks
from tests.toolchain.methods.walks import ppt as tiny
from toolchain.methods import options
from toolchain.tasks.trajectory import StudentSection
from toolchain.tasks.trajectory_nets import build

PLAN = Plan(rounds=2, steps=1, batch=8, calls=2, pedestrians=(1, 3))
TINY = StudentSection(model="ppt", **NET)
STUDENT = StudentSection(model="one_shot", **NET)


def test_multiply_adds_are_those_of_the_matrix_products() -> None:
    layers = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    assert multiply_adds(lambda: layers(torch.zeros(7, 3))) == 7 * (15 + 10)
    d, t = 16, 9
    encoder = tiny(width=d, depth=1).encoder
    expected = t * (4 * d * d + 8 * d * d) + 2 * t * t * d
    assert multiply_adds(lambda: encoder(torch.zeros(1, t, d), range(1, t + 1), causal=False)) == expected


def test_the_published_network_costs_what_its_specification_says() -> None:
    net = build(ppt.PUBLISHED, INFO, 0).eval()
    with torch.no_grad():
        found = multiply_adds(lambda: net(torch.zeros(1, OBSERVE, 2)))
        every = EveryToken(net.encoder)  # type: ignore[arg-type]
        net.encoder = every
        whole = multiply_adds(lambda: net(torch.zeros(1, OBSERVE, 2)))
    assert whole == pytest.approx(0.26e9, rel=0.05)
    assert 0.8 * whole < found < whole


def test_both_ways_of_training_have_the_same_loss_and_ours_computes_less() -> None:
    losses, work = [], []
    for straightforward in (True, False):
        step = ppt.step_of(TINY, options.PPT(name="ppt"), 8, straightforward)
        distiller, track = _inside(step)
        losses.append(distiller({"track": track})["loss"].item())
        work.append(multiply_adds(step))
    with torch.no_grad():
        one = multiply_adds(lambda: distiller.student.complete(track[:, :OBSERVE], track[:, -1]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert work[0] - work[1] > (K - 1) * one


def _inside(step: Callable[[], None]) -> tuple[Any, torch.Tensor]:
    """The distiller and the tracks of a step."""
    found = dict(zip(step.__code__.co_freevars, (cell.cell_contents for cell in step.__closure__ or ()), strict=True))
    return found["distiller"], found["track"]


def test_a_pass_for_each_candidate_predicts_the_same() -> None:
    net, observed = shaken(tiny()), tracks()[:, :OBSERVE]
    for a, b in zip(OnePassEach(net)(observed), net(observed), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_a_quick_run_on_tiny_networks_is_rendered_into_a_document(
    exported_tracks: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppt, "NETWORKS", {"PPT, tiny": (TINY, config({"name": "ppt"}).method)})
    monkeypatch.setattr(ppt, "STUDENTS", {"student, tiny": STUDENT})
    monkeypatch.setattr(ppt, "QUICK", PLAN)
    monkeypatch.setattr(ppt, "graph_of", lambda section, net, root: exported_tracks(section.model) / "onnx")
    ppt.main(["--quick", "--threads", "1", "--out", str(tmp_path / "ppt.json")])
    value = json.loads((tmp_path / "ppt.json").read_text())
    slow, ours = value["training"]
    assert (slow["speed_up"], slow["way"], ours["way"]) == (1.0, "a pass for each candidate", "ours")
    assert all(len(row["round_medians_s"]) == 2 for row in value["training"])
    assert [(row["network"], row["runtime"]) for row in value["inference"]] == [
        ("PPT, tiny", "PyTorch, a pass for each candidate"),
        ("PPT, tiny", "PyTorch, folded"),
        ("PPT, tiny", "ONNX Runtime"),
        ("student, tiny", "ONNX Runtime"),
    ]
    for row in value["inference"]:
        assert [len(row["pedestrians"][n]["round_medians_ms"]) for n in ("1", "3")] == [2, 2]
    assert value["environment"]["threads"] == 1
    document = tmp_path / "README.md"
    document.write_text("<!-- results:ppt -->\n<!-- /results -->\n")
    tables.update([document], tmp_path, check=False)
    text = document.read_text()
    assert "| PPT, tiny | ours |" in text
    assert "| student, tiny | ONNX Runtime |" in text
    assert "p50 ms, 1 pedestrian | p50 ms, 3 pedestrians |" in text
    assert "Medians of 2 interleaved rounds, 1 threads" in text
    assert "batches of 8 samples" in text
    assert (" ~" in text) == ("~ noisy" in text)
