"""Ask a text: question and context in, the answer out, in any of the languages that the model was trained on.

    with load_qa("runs/qa_demo/onnx-int8-cpu/") as model:
        found = model.answer("¿Dónde vive Ana?", "Anna lives in Paris. Boris likes soup best.")
        print(found.text, found.start, found.end, found.score)  # Paris 14 19 ...

Needs numpy, tokenizers, and what the artifact runs on; neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolchain import runtime
from toolchain.qa_windows import Window, answer_of, arrays, best_spans, cut_of, layout_of, pooled, windows
from toolchain.runtime import Runtime, RuntimeInputError, RuntimeLoadError, import_or_explain
from toolchain.tasks import FILL

TOKENIZER, SETTINGS = "tokenizer.json", "qa.json"


@dataclass(frozen=True)
class Answer:
    """``text`` is ``context[start:end]``, in code points; ``score`` is start logit + end logit, comparable between the
    answers of one model."""

    text: str
    start: int
    end: int
    score: float


class QaRuntime:
    """A loaded model with its tokenizer. Safe to call from several threads.

    Dynamic int8 takes its scales from the whole batch, so such a graph gets one window at a time: an answer does not
    depend on what is asked beside it.
    """

    def __init__(self, model: Runtime, tokenizer: Any, settings: dict[str, Any], batch: int) -> None:
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self.layout, self.cut, self.pad = layout_of(tokenizer), cut_of(settings["windows"]), int(settings["pad"])
        extra = model.manifest.extra if model.manifest else {}
        shapes = list(extra.get("profile", {}).values())
        alone = [1] if extra.get("calibration", {}).get("method") == "dynamic" else []
        self.batch = min([batch, *alone, *(int(shape["max"][0]) for shape in shapes)])
        self.least = max([1, *(int(shape["min"][1]) for shape in shapes)])

    def answer(self, question: str, context: str) -> Answer:
        """The best answer to ``question`` in ``context``, of any length. Raises RuntimeInputError, RuntimeRunError."""
        return self.answer_all([question], [context])[0]

    def answer_all(self, questions: Sequence[str], contexts: Sequence[str]) -> list[Answer]:
        """An answer for each pair; windows of all of them run in batches of like length."""
        if len(questions) != len(contexts):
            raise RuntimeInputError(
                f"expected as many contexts as questions, found {len(contexts)} and {len(questions)}"
            )
        for number, text in enumerate((*questions, *contexts)):
            if not isinstance(text, str) or not text.strip():
                what = "question" if number < len(questions) else "context"
                raise RuntimeInputError(f"{what}: expected a text, found {text!r}")
        found = list(windows(self.tokenizer, self.layout, self.cut, questions, contexts))
        width = max([self.least, *(len(window.ids) for window in found)]) if found else 0
        start, end = (np.full((len(found), width), FILL, np.float32) for _ in range(2))
        order = sorted(range(len(found)), key=lambda row: -len(found[row].ids))
        for at in range(0, len(order), self.batch):
            rows = order[at : at + self.batch]
            logits = self._run([found[row] for row in rows])
            for side, name in ((start, "start"), (end, "end")):
                side[rows, : logits[name].shape[1]] = logits[name]
        return self._decoded(found, start, end, contexts)

    def _run(self, part: list[Window]) -> runtime.Outputs:
        width = max(self.least, *(len(window.ids) for window in part))
        feeds = arrays(part, width, self.pad, decode=False)
        return self.model({port.name: feeds[port.name] for port in self.model.inputs})

    def _decoded(self, found: list[Window], start: Any, end: Any, contexts: Sequence[str]) -> list[Answer]:
        if not found:
            return []
        placed = arrays(found, start.shape[1], self.pad, decode=True)
        first, last, score = best_spans(start, end, placed["role"])
        best = pooled(np.array([window.pair for window in found]), score)
        result = []
        for pair, row in sorted(best.items()):
            if not np.isfinite(score[row]):
                raise RuntimeInputError(f"context {contexts[pair]!r:.80}: expected words, found nothing to answer with")
            text, low, high = answer_of(contexts[pair], placed["offset"][row], first[row], last[row])
            result.append(Answer(text, low, high, float(score[row])))
        return result

    def close(self) -> None:
        self.model.close()

    def __enter__(self) -> QaRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_qa(
    folder: Path | str, *, provider: str = "cpu", threads: int | None = None, device: int = 0, batch: int = 8
) -> QaRuntime:
    """The question answering model in ``folder``; see ``toolchain.runtime.load``. ``batch``: windows a call, at most.

    Raises ArtifactError, RuntimeLoadError.
    """
    folder = Path(folder)
    tokenizers = import_or_explain("tokenizers", "qa")
    model = runtime.load(folder, provider=provider, threads=threads, device=device)
    if missing := [name for name in (TOKENIZER, SETTINGS) if not (folder / name).is_file()]:
        raise RuntimeLoadError(
            f"{folder}: expected a model that answers questions, found one without {missing[0]}; give an onnx or "
            "engine folder of task qa"
        )
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    return QaRuntime(model, tokenizers.Tokenizer.from_file(str(folder / TOKENIZER)), settings, batch)
