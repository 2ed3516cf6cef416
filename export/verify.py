"""Two callables, the same real samples: is the second as good as the first?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from toolchain.artifact import EdgestillError
from toolchain.onnx_runtime import NOT_ON_CPU

if TYPE_CHECKING:
    from toolchain.tasks import Split

Arrays = Mapping[str, np.ndarray]
Call = Callable[[Arrays], Arrays]


class ParityError(EdgestillError):
    """The second side is further from the first than the config allows."""


@dataclass(frozen=True)
class Report:
    """How far ``candidate`` is from ``reference`` on ``samples`` real samples.

    ``metric`` is the task's headline, in its unit; ``agreement`` in [0, 1] is the share of equal predictions;
    ``max_difference`` holds the greatest absolute difference of each float output, in the output's unit (None where
    an output is not a number); ``reasons`` says which limits were exceeded.
    """

    metric: str
    metric_reference: float
    metric_candidate: float
    agreement: float
    max_difference: dict[str, float | None]
    samples: int
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.reasons

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed, "reasons": list(self.reasons)}

    def check(self, what: str) -> Report:
        """Return self, or raise ParityError naming every limit that was exceeded.

        ``what`` is the candidate's precision: the key under ``export.parity.limits``.
        """
        if self.reasons:
            raise ParityError(
                f"{what} differs too much from its reference on {self.samples} samples: {'; '.join(self.reasons)}. "
                f"Loosen export.parity.limits.{what}.<key>, or leave {what} out of export.precisions"
            )
        return self


def cpu_call(model: bytes | str) -> Callable[[Arrays], dict[str, np.ndarray]]:
    """A graph, or the path of one, on ONNX Runtime's CPU provider: feeds to outputs by name."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(NOT_ON_CPU)
    )
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def predict(call: Call, split: Split, batch: int) -> dict[str, np.ndarray]:
    """Run ``call`` over ``split`` in batches; the outputs concatenated along axis 0.

    Raises EdgestillError: the split is empty, or outputs do not have a row per sample.
    """
    if not len(split):
        raise EdgestillError("expected real samples to compare on, found an empty split; check the data stage")
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(split), batch):
        stop = min(start + batch, len(split))
        for name, value in call(split.feed(slice(start, stop))).items():
            array = np.array(value)
            if array.ndim == 0 or len(array) != stop - start:
                raise EdgestillError(
                    f"output {name!r}: expected {stop - start} rows for a batch of {stop - start}, found shape "
                    f"{array.shape}; export the graph with a dynamic batch as axis 0"
                )
            parts.setdefault(name, []).append(split.whole(array))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def evenly(total: int, count: int) -> np.ndarray:
    """``count`` indices spread evenly over ``total`` samples: the same ones every time, all when there are fewer."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


def compare(
    reference: Arrays, candidate: Arrays, split: Split, task: Any, limits: Mapping[str, float | None]
) -> Report:
    """Compare two sides' outputs over ``split``.

    ``task`` is a module of ``toolchain.tasks`` (HEADLINE, HIGHER_IS_BETTER, score, agreement). ``limits`` may hold
    ``max_difference`` (of any float output), ``agreement`` (least) and ``metric_drop`` (in the headline's unit);
    a limit that is absent or None does not bind. Values that are not numbers, on either side, exceed every limit.
    Raises EdgestillError when the two sides' outputs differ in name, shape or kind.
    """
    if set(reference) != set(candidate):
        raise EdgestillError(
            f"expected the outputs {sorted(reference)}, found {sorted(candidate)}; "
            "both sides must be exports of one model"
        )
    reasons: list[str] = []
    differences: dict[str, float | None] = {}
    most, least, budget = (limits.get(key) for key in ("max_difference", "agreement", "metric_drop"))
    for name, expected in reference.items():
        found = candidate[name]
        if expected.shape != found.shape or expected.dtype.kind != found.dtype.kind:
            raise EdgestillError(
                f"output {name!r}: expected {expected.dtype}{list(expected.shape)}, found "
                f"{found.dtype}{list(found.shape)}; both sides must be exports of one model"
            )
        if expected.dtype.kind != "f":
            continue
        difference = _difference(expected, found)
        differences[name] = difference
        if difference is None:
            reasons.append(f"{name} holds values that are not numbers")
        elif most is not None and difference > most:
            reasons.append(f"max_difference of {name}: expected <= {most:g}, found {difference:.4g}")

    metric = task.HEADLINE
    before, after = float(task.score(reference, split)[metric]), float(task.score(candidate, split)[metric])
    drop = before - after if task.HIGHER_IS_BETTER else after - before
    budget = np.inf if budget is None else budget
    if not drop <= budget:
        reasons.append(f"metric_drop of {metric}: expected <= {budget:g}, found {drop:.4g}")
    agreement = float(task.agreement(reference, candidate))
    least = 0.0 if least is None else least
    if not agreement >= least:
        reasons.append(f"agreement: expected >= {least:g}, found {agreement:.4f}")
    return Report(metric, before, after, agreement, differences, len(split), tuple(reasons))


def _difference(expected: np.ndarray, found: np.ndarray) -> float | None:
    """Greatest |expected - found|; equal infinities are equal, a NaN or another infinity gives None."""
    a, b = expected.astype(np.float64), found.astype(np.float64)
    same = a == b
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(a - b))
    return float(gap.max(initial=0.0)) if np.isfinite(gap).all() else None
