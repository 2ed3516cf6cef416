"""PPT's speed: a training step of task III, and predictions for one pedestrian and for a crowd.

    python -m benchmarks.ppt [--quick] [--threads 2] [--out benchmarks/results/ppt.json]

One process, interleaved rounds A B C A B C on one host clock. Weights are freshly initialised and tracks are random:
speed depends on neither.

Training: samples per second of whole optimiser steps, ours against the straightforward loop. That runs the trajectory
predictor once for each of the K candidates, though only the nearest one's path is in the loss, and computes every token
in the last layer. Its passes for the other candidates build no graph, the cheapest way to write it.

Inference: milliseconds per call, numpy in and numpy out, of PyTorch with a pass for each candidate, PyTorch with the
candidates folded into the batch, ONNX Runtime with the same graph, and ONNX Runtime with the student that ships.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.environment import environment
from toolchain import artifact, pipeline
from toolchain.checkpoint import save_tensors
from toolchain.distiller import Batch
from toolchain.methods import options
from toolchain.methods.ppt import Complete
from toolchain.runtime import load
from toolchain.stage import Job, console
from toolchain.tasks import Data, Split, save_data
from toolchain.tasks.nets import count_parameters
from toolchain.tasks.trajectory import StudentSection
from toolchain.tasks.trajectory_nets import EVERY, PPT, Destination, Step, World, build, shape_of

INFO: dict[str, Any] = {"observe": 8, "predict": 12, "unit": "m", "seconds_per_step": 0.4}
EXPORT = {"opset": 20, "parity": {"samples": 32, "limits": {"fp32": {"max_difference": 1e-3}}}}
WARMUP = 2  # steps or calls at the start of every block that do not count
SMALL = StudentSection(model="ppt", width=64, depth=2, heads=4, activation="relu")
PUBLISHED = StudentSection(model="ppt", width=128, depth=3, heads=8, dropout=0.1, activation="gelu")
RECIPE = options.PPT(name="ppt", destination_lr=0, features=0, destination_features=0)
NETWORKS = {"PPT, published size": (PUBLISHED, options.PPT(name="ppt")), "PPT, small": (SMALL, RECIPE)}
STUDENTS = {"one_shot student": StudentSection(model="one_shot", width=64, depth=2, heads=4)}

Observed = np.ndarray[Any, Any]
Networks = Mapping[str, tuple[StudentSection, options.PPT]]


@dataclass(frozen=True)
class Plan:
    """In each of ``rounds``, ``steps`` of ``batch`` samples are timed, and ``calls`` for each of ``pedestrians``."""

    rounds: int = 3
    steps: int = 2
    batch: int = 256
    calls: int = 30
    pedestrians: tuple[int, ...] = (1, 64)


QUICK = Plan(rounds=2, steps=1, batch=32, calls=5)


class EveryToken(nn.Module):
    """An encoder whose last layer computes all tokens, also those that nothing reads."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor, positions: Sequence[int], causal: bool, keep: slice = EVERY) -> Tensor:
        return self.encoder(tokens, positions, causal)[:, keep]  # type: ignore[no-any-return]


class EveryCandidate(Complete):
    """Task III with a pass for each candidate; which one a pass is for changes nothing about its cost."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        track, shape = batch["track"], self.student.shape
        with torch.no_grad():
            for _ in range(shape.hypotheses - 1):
                self.student.complete(track[:, : shape.observe], track[:, -1])
        return super().forward(batch)


def step_of(section: StudentSection, method: options.PPT, batch: int, straightforward: bool) -> Callable[[], None]:
    """One optimiser step of task III, as a function."""
    torch.manual_seed(0)
    step = Step(shape_of(section, INFO))
    if straightforward:
        step.encoder = EveryToken(step.encoder)  # type: ignore[assignment]
    destination = Destination(step)
    kind = EveryCandidate if straightforward else Complete
    distiller = kind(PPT(destination), method, step, destination).train()
    groups = distiller.param_groups(method.complete.lr)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    track = torch.randn(batch, INFO["observe"] + INFO["predict"], 2).cumsum(1) * 15

    def one() -> None:
        distiller({"track": track})["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return one


def multiply_adds(call: Callable[[], Any]) -> int:
    """Of all matrix products that ``call`` computes, backward ones too."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops()) // 2


def seconds(call: Callable[[], Any], times: int) -> list[float]:
    """Of each of ``times`` calls, after some that do not count."""
    taken = []
    for number in range(WARMUP + times):
        start = perf_counter()
        call()
        if number >= WARMUP:
            taken.append(perf_counter() - start)
    return taken


def spread(medians: Sequence[float]) -> float:
    return (max(medians) - min(medians)) / statistics.median(medians)


def training(networks: Networks, plan: Plan) -> list[dict[str, Any]]:
    """A row per network and way: samples per second, multiply-adds per sample."""
    steps = {
        (name, way): step_of(section, method, plan.batch, way != "ours")
        for name, (section, method) in networks.items()
        for way in ("a pass for each candidate", "ours")
    }
    taken: dict[Any, list[float]] = {key: [] for key in steps}
    for number in range(plan.rounds):
        for key, step in steps.items():
            taken[key].append(statistics.median(seconds(step, plan.steps)))
            console.print(
                f"    training, round {number + 1}/{plan.rounds}: {', '.join(key)}: "
                f"{plan.batch / taken[key][-1]:.0f} samples/s",
                markup=False,
            )
    return [
        {
            "network": name,
            "way": way,
            "samples_per_second": plan.batch / statistics.median(times),
            "speed_up": statistics.median(
                a / b for a, b in zip(taken[name, "a pass for each candidate"], times, strict=True)
            ),
            "spread": spread(times),
            "multiply_adds_per_sample": multiply_adds(steps[name, way]) // plan.batch,
            "round_medians_s": times,
        }
        for (name, way), times in taken.items()
    ]


class OnePassEach(nn.Module):
    """A PPT that predicts the path to one candidate after the other."""

    def __init__(self, net: PPT) -> None:
        super().__init__()
        self.net = net

    def forward(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        candidates = self.net.destination(observed)
        paths = [self.net.complete(observed, candidates[:, k])[0] for k in range(candidates.shape[1])]
        return torch.stack(paths, 1), self.net.log_share.expand(len(observed), -1)


def walks(count: int) -> Observed:
    """Random tracks (count, 20, 2) in metres."""
    rng = np.random.default_rng(0)
    return rng.normal(0, 0.4, (count, INFO["observe"] + INFO["predict"], 2)).cumsum(1).astype(np.float32)


def graph_of(section: StudentSection, net: nn.Module, root: Path) -> Path:
    """The artifact of the network's graph, made and proven by stage ``onnx``."""
    config = {"task": "trajectory", "student": section.model_dump(mode="json")}
    with artifact.create(root / "data", stage="data", config={}) as draft:
        observed, future = np.split(walks(32), [INFO["observe"]], axis=1)
        split = Split({"observed": observed, "future": future}, ("observed",))
        save_data(draft.path, Data({"val": split, "test": split}, INFO))
    with artifact.create(root / "student", stage="student", config=config) as draft:
        save_tensors(draft.path / "model.safetensors", net.state_dict())
        draft.extra = {"info": INFO}
    how = {"task": "trajectory", "which": "student", "export": EXPORT}
    job = Job("onnx", root / "onnx", how, {"model": root / "student", "data": root / "data"})
    pipeline.perform("export.onnx", job)
    return job.out


def torch_call(net: nn.Module, section: StudentSection) -> Callable[[Observed], Any]:
    world = World(net, section.scale_of(INFO["unit"])).eval()

    @torch.inference_mode()
    def call(observed: Observed) -> Any:
        return [value.numpy() for value in world(torch.from_numpy(observed))]

    return call


def inference(
    networks: Networks,
    students: Mapping[str, StudentSection],
    plan: Plan,
    threads: int,
) -> list[dict[str, Any]]:
    """A row per network and runtime: p50 in milliseconds by the number of pedestrians."""
    feeds = {n: np.ascontiguousarray(walks(n)[:, : INFO["observe"]]) for n in plan.pedestrians}
    rows: list[dict[str, Any]] = []
    calls: list[Callable[[Observed], Any]] = []
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, section in {**{name: section for name, (section, _) in networks.items()}, **students}.items():
            net = build(section, INFO, 0).eval()
            whole: list[tuple[str, nn.Module | None]] = [("ONNX Runtime", None)]
            if isinstance(net, PPT):
                whole = [("PyTorch, a pass for each candidate", OnePassEach(net)), ("PyTorch, folded", net), *whole]
            model = stack.enter_context(load(graph_of(section, net, root / name), threads=threads))
            for runtime, module in whole:
                calls.append(torch_call(module, section) if module else lambda x, m=model: m({"observed": x}))  # type: ignore[misc]
                with torch.no_grad():
                    one = torch.zeros(1, INFO["observe"], 2)
                    work = multiply_adds(lambda run=module or net, one=one: run(one))  # type: ignore[misc]
                facts = {"parameters": count_parameters(net), "multiply_adds": work}
                rows.append({"network": name, "runtime": runtime, **facts, "pedestrians": {}})
        taken = [{n: list[list[float]]() for n in feeds} for _ in calls]
        for number in range(plan.rounds):
            for row, call, times in zip(rows, calls, taken, strict=True):
                for n, observed in feeds.items():
                    times[n].append(seconds(lambda call=call, x=observed: call(x), plan.calls))  # type: ignore[misc]
                last = ", ".join(f"{n}: {1000 * statistics.median(times[n][-1]):.3g} ms" for n in feeds)
                shown = f"{row['network']}, {row['runtime']}: {last}"
                console.print(f"    inference, round {number + 1}/{plan.rounds}: {shown}", markup=False)
    for row, times in zip(rows, taken, strict=True):
        for n, rounds in times.items():
            medians = [1000 * statistics.median(one) for one in rounds]
            p50 = 1000 * statistics.median([value for one in rounds for value in one])
            row["pedestrians"][str(n)] = {"p50_ms": p50, "spread": spread(medians), "round_medians_ms": medians}
    return rows


def measure(plan: Plan, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return {
        "training": training(NETWORKS, plan),
        "inference": inference(NETWORKS, STUDENTS, plan, threads),
        "plan": asdict(plan),
        "networks": {
            name: {"network": section.model_dump(mode="json"), "method": method.model_dump(mode="json")}
            for name, (section, method) in NETWORKS.items()
        }
        | {name: {"network": section.model_dump(mode="json")} for name, section in STUDENTS.items()},
        "environment": environment() | {"threads": threads},
        "versions": artifact.versions("torch", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy"),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and short rounds: to see that it runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    text = json.dumps(measure(QUICK if arguments.quick else Plan(), arguments.threads), indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
