"""Cross-lingual extractive question answering: token ids in, start and end logits out; F1 over all language pairs.

G-XLT is the mean F1 over all (question language, context language) cells, the diagonal included; XLT over the diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from toolchain import qa_metrics
from toolchain.artifact import digest, sha256
from toolchain.config import TrainSection
from toolchain.methods.options import QUESTIONS, Recipe, SelfDistillation
from toolchain.qa_windows import answer_of, best_spans, pooled
from toolchain.section import Section
from toolchain.tasks import Arrays, Data, Split, qa_data
from toolchain.tasks.qa_data import CELLS, TYDIQA, UNSEEN
from toolchain.tasks.qa_readers import TYDIQA as TYDIQA_LANGUAGES
from toolchain.tasks.qa_readers import XQUAD
from toolchain.tasks.qa_templates import LANGUAGES
from toolchain.tasks.qa_tokenizer import encoder_folder

if TYPE_CHECKING:
    from torch import nn

    from toolchain.stage import Job

HEADLINE = "gxlt_f1"
HIGHER_IS_BETTER = True
UNIT = "%"
STAGES = ("teacher",)
PACKAGES = ("transformers", "tokenizers")
TIE = 1e-3  # of logits
READ = (".json", ".safetensors", ".bin", ".txt", ".model")  # of an encoder's folder, or one of questions
SPECIAL = 4  # most special tokens around a question and a context: RoBERTa's <s> </s></s> </s>
DEFAULTS: dict[str, Any] = {
    "export": {
        "precisions": ["fp32", "fp16", "int8-cpu"],
        "dynamic_int8": True,
        "parity": {
            "limits": {
                "fp32": {"max_difference": 1e-3, "agreement": 0.995, "metric_drop": 0.1},
                "fp16": {"max_difference": 0.5, "agreement": 0.98, "metric_drop": 0.5},
                "int8-cpu": {"agreement": 0.9, "metric_drop": 2.0},
            }
        },
    },
    "compile": {"precisions": ["fp16"], "shapes": {"sequence": {"min": 8, "opt": 128, "max": 384}}},
    "bench": {"batches": [1, 8], "paced_seconds": 0},
}


def defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """Config values below a person's own."""
    return DEFAULTS


Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]


class Windows(Section):
    """``max_length`` tokens a window, at most ``max_question`` of them for the question. Windows start every ``step``
    context tokens, or share ``overlap`` tokens: one of the two."""

    max_length: Annotated[int, Field(ge=16, le=8192)] = 384
    max_question: Positive = 64
    step: Positive | None = None
    overlap: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _sound(self) -> Windows:
        if (self.step is None) == (self.overlap is None):
            raise ValueError(
                "give step (windows start every so many tokens) or overlap (they share so many): one of them"
            )
        room = self.max_length - self.max_question - SPECIAL
        if not (self.step or 0) <= room or not (self.overlap or 0) < room:
            raise ValueError(
                f"beside a question of {self.max_question} tokens there is room for {room} of the context, so tokens "
                "would be lost between windows; raise max_length, or lower max_question, step or overlap"
            )
        return self


class DataSection(Section):
    """``source``: ``xquad`` (XQuAD, split by article; or all of it, with ``evaluate: mlqa``), ``folder`` (SQuAD-v1.1
    files ``train.en.json`` ... of your own in ``path``) or ``templates`` (needs no data).

    ``tokenizer``: the encoder's folder or hub id; none with ``templates``, which trains one. ``ntl``: target languages
    drawn for each training question; all ordered pairs of them and the ``pivot`` are trained on. ``first``: the sets of
    the first stage, in ``pivot``. Only tested: ``unseen``, languages of the source, and ``tydiqa``, of TyDiQA-GoldP.
    ``articles``: of ``templates``, for first, train, val, test. ``*_questions``: use so many ids at most;
    ``unlabelled_questions`` are others of the training files, or those of ``unlabelled.en.json`` ... in ``path``; their
    answers are not looked at: qa_student asks its teacher about them.
    """

    source: Literal["xquad", "folder", "templates"]
    path: str | None = None
    tokenizer: str | None = None
    languages: Annotated[tuple[Language, ...], Field(min_length=1)] = ("en", "es", "de", "ar", "vi", "hi", "zh")
    pivot: Language = "en"
    ntl: Annotated[int, Field(ge=0)] = 3
    keep_pivot: bool = True
    sampling_seed: Seed = 0
    first: tuple[Literal["squad_train", "squad_dev", "tydiqa_en"], ...] = ()
    evaluate: Literal["xquad", "mlqa"] = "xquad"
    normaliser: Literal["squad", "mlqa"] = "squad"
    unseen: tuple[Language, ...] = ()
    tydiqa: tuple[Language, ...] = ()
    windows: Windows = Windows(step=128)
    first_windows: Windows | None = None
    articles: tuple[Positive, Positive, Positive, Positive] = (400, 100, 8, 16)
    first_questions: Positive | None = None
    train_questions: Positive | None = None
    unlabelled_questions: Annotated[Positive | None, Field(exclude_if=lambda value: value is None)] = None
    eval_questions: Positive | None = None
    download: bool = False

    @model_validator(mode="before")
    @classmethod
    def _scored_as_published(cls, value: Any) -> Any:
        mlqa = isinstance(value, dict) and value.get("evaluate") == "mlqa"
        return {"normaliser": "mlqa"} | value if mlqa else value

    @model_validator(mode="after")
    def _sound(self) -> DataSection:
        if self.pivot not in self.languages:
            raise ValueError(f"pivot {self.pivot} is not among languages ({', '.join(self.languages)}); add it")
        if (self.source != "templates") != (self.tokenizer is not None):
            raise ValueError(
                "tokenizer: the encoder's folder or hub id, for every source but templates, which trains one"
            )
        if self.source == "folder" and not self.path:
            raise ValueError(
                "source folder needs path: the folder of your train.en.json, val.en.json, test.en.json, ..."
            )
        if self.source != "xquad" and (self.first or self.tydiqa or self.evaluate != "xquad"):
            raise ValueError("first, tydiqa and evaluate go with source xquad")
        if self.evaluate == "mlqa" and self.normaliser != "mlqa":
            raise ValueError(
                "evaluate: mlqa is scored by MLQA's own normaliser, articles of each language; leave normaliser out"
            )
        if self.evaluate == "mlqa" and self.unseen:
            raise ValueError(
                "unseen: XQuAD's other languages are translations of articles that evaluate: mlqa trains on"
            )
        if self.unlabelled_questions and not self.train_questions and self.source != "folder":
            raise ValueError(
                "unlabelled_questions are those that train_questions leaves over, which is none: give train_questions"
            )
        known = {"xquad": XQUAD, "templates": LANGUAGES}.get(self.source)
        for name, languages in (("languages", self.languages), ("unseen", self.unseen)):
            if known and (strange := [one for one in languages if one not in known]):
                raise ValueError(f"{name}: {self.source} has no {strange[0]!r}; it has {', '.join(known)}")
        if strange := [one for one in self.tydiqa if one not in TYDIQA_LANGUAGES]:
            raise ValueError(f"tydiqa: has no {strange[0]!r}; it has {', '.join(TYDIQA_LANGUAGES)}")
        if twice := set(self.languages) & set(self.unseen):
            raise ValueError(f"unseen: {', '.join(sorted(twice))} is trained on; a language is in one of the two lists")
        return self


class Encoder(Section):
    """``model``: the folder or hub id of any Hugging Face encoder, or ``small``, a random one of ``options`` (keys of
    BertConfig). ``weights``: ``pretrained``, or ``random`` for the same architecture untrained. ``dropout`` overrides
    the encoder's own."""

    model: Annotated[str, Field(min_length=1)] = "small"
    weights: Literal["pretrained", "random"] = "pretrained"
    options: dict[str, Any] = Field(default_factory=dict)
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _sound(self) -> Encoder:
        if self.options and self.model != "small":
            raise ValueError("options describe the encoder small; another model brings its own")
        return self


class StudentSection(Encoder):
    """``layers``: with method qa_student, how many of the teacher's layers to keep."""

    layers: Positive | None = None


class TeacherSection(Encoder):
    """The large model, trained by ``method`` with the recipe ``train`` before the student is."""

    method: SelfDistillation = SelfDistillation(name="self_distillation", first=Recipe())
    train: TrainSection = TrainSection()


def check(config: Any) -> list[tuple[tuple[Any, ...], str]]:
    """Faults between sections, as (key path, message)."""
    faults: list[tuple[tuple[Any, ...], str]] = []
    method = getattr(config.method, "name", "")
    if method not in QUESTIONS and "." not in method:
        faults.append(
            (("method", "name"), f"{method} is a method of image tasks; use {' or '.join(sorted(QUESTIONS))}")
        )
    if method == "qa_student":
        if config.teacher is None:
            faults.append((("teacher",), "method qa_student makes a student out of a teacher; add a teacher section"))
        default = Encoder()
        faults += [
            (("student", name), "method qa_student cuts the student out of the teacher; give layers only")
            for name in Encoder.model_fields
            if getattr(config.student, name) != getattr(default, name)
        ]
    elif config.teacher is not None:
        faults.append((("teacher",), f"method {method} is its own teacher; remove the section, or use qa_student"))
    if config.data.unlabelled_questions and method == "self_distillation":
        faults.append(
            (("data", "unlabelled_questions"), "method self_distillation needs labels; these are for qa_student")
        )
    longest = config.data.windows.max_length
    sequence = config.compile.shapes.get("sequence")
    if config.compile.backend != "none" and (sequence is None or sequence.max < longest):
        faults.append(
            (
                ("compile", "shapes"),
                f"sequence: expected a range up to data.windows.max_length, {longest}, found {sequence}",
            )
        )
    if method == "self_distillation" and config.method.first is not None and config.data.source == "xquad":
        faults += [] if config.data.first else [(("data", "first"), "the first stage needs data: name its sets")]
    return faults


def prepare(section: DataSection) -> Data:
    """Read and cut the source. Arrays: ``input_ids``, ``attention_mask``, ``start``, ``end`` int64, a row a window."""
    return qa_data.assemble(section)


# --- scores


def answers(outputs: Arrays, split: Split) -> dict[int, tuple[str, float]]:
    """The best answer of each question that has a window in ``split``, by its number: text and score."""
    first, last, score = best_spans(outputs["start"], outputs["end"], np.asarray(split.arrays["role"]))
    found = {}
    for question, row in pooled(split.arrays["question"], score).items():
        context = split.meta["contexts"][split.meta["questions"][question]["context"]]
        told = np.isfinite(score[row])
        text = answer_of(context, split.arrays["offset"][row], first[row], last[row])[0] if told else ""
        found[question] = (text, float(score[row]))
    return found


def _scored(texts: Mapping[int, str], split: Split) -> list[tuple[dict[str, Any], float, float]]:
    """(question, F1, EM in percent) of each answered question, by its number."""
    result = []
    for number, text in texts.items():
        question = split.meta["questions"][number]
        f1, em = qa_metrics.best(text, question["answers"], _normaliser(split, question))
        result.append((question, 100 * f1, 100 * em))
    return result


def _normaliser(split: Split, question: Mapping[str, Any]) -> Any:
    """TyDiQA's is SQuAD's, whatever the other questions are scored by."""
    name = "squad" if question["part"] == TYDIQA else split.meta["normaliser"]
    return qa_metrics.normaliser(name, question["cell"][1])


def _texts(outputs: Arrays, split: Split) -> dict[int, str]:
    return {number: text for number, (text, _) in answers(outputs, split).items()}


def _cells(scored: list[tuple[dict[str, Any], float, float]], split: Split, which: int) -> Any:
    mine = [entry for entry in scored if entry[0]["part"] == CELLS]
    asked, read = ([entry[0]["cell"][side] for entry in mine] for side in (0, 1))
    return qa_metrics.cell_means(np.array([entry[which] for entry in mine]), asked, read, split.meta["languages"])


def score(outputs: Arrays, split: Split) -> dict[str, float]:
    """F1 and EM in percent: G-XLT with the diagonal, XLT, G-XLT without it, and means over the languages only tested.

    Over the questions that have a window in ``split``. The headline is NaN when none of them is in the cells.
    """
    return score_texts(_texts(outputs, split), split)


def score_texts(texts: Mapping[int, str], split: Split) -> dict[str, float]:
    """``score`` of answers by the numbers of their questions in ``split``, however they were found."""
    scored = _scored(texts, split)
    found = {HEADLINE: float("nan")}
    for which, name in ((1, "f1"), (2, "em")):
        found |= {f"{key}_{name}": value for key, value in qa_metrics.averages(_cells(scored, split, which)).items()}
        for part in (UNSEEN, TYDIQA):
            means = [
                float(np.mean([e[which] for e in scored if e[0]["part"] == part and e[0]["cell"][0] == language]))
                for language in sorted({e[0]["cell"][0] for e in scored if e[0]["part"] == part})
            ]
            if means:
                found[f"{part}_{name}"] = float(np.mean(means))
    return found


def per_question(outputs: Arrays, split: Split) -> dict[str, dict[str, float]]:
    """Part -> question id -> F1 in percent: what a paired test compares."""
    found: dict[str, dict[str, float]] = {}
    for question, f1, _ in _scored(_texts(outputs, split), split):
        found.setdefault(question["part"], {})[question["id"]] = f1
    return found


def agreement(a: Arrays, b: Arrays) -> float:
    """Share in [0, 1] of windows whose likeliest start and likeliest end are both the same.

    Logits within TIE of the greatest are as likely: an encoder may give its special tokens the same state.
    """
    same = []
    for name in ("start", "end"):
        chosen = np.take_along_axis(b[name], np.argmax(a[name], 1)[:, None], 1)[:, 0]
        same.append(chosen >= b[name].max(1) - TIE)
    return float(np.mean(same[0] & same[1]))


def show(outputs: Arrays, split: Split, index: int) -> dict[str, Any]:
    """A window for the report: ``text`` (the question), ``truth``, ``prediction``, and where in the languages it is."""
    one = split.select(np.array([index]))
    (number, (text, _)), *_ = answers({name: outputs[name][[index]] for name in ("start", "end")}, one).items()
    question = split.meta["questions"][number]
    return {
        "text": question["question"],
        "label": "-".join(question["cell"]),
        "truth": question["answers"][0],
        "prediction": text,
        "right": qa_metrics.best(text, question["answers"], _normaliser(split, question))[1] == 1,
    }


def totals(outputs: Arrays, split: Split) -> Arrays:
    """``cells`` float64 (L, L): mean F1 in percent of each question language (row) and context language (column)."""
    return {"cells": _cells(_scored(_texts(outputs, split), split), split, 1)}


def figures(split: Split, outputs: Mapping[str, Arrays]) -> list[tuple[str, bytes]]:
    """The matrix of the student and, beside a teacher, its change: (title, PNG)."""
    from toolchain.tasks import qa_figures

    return qa_figures.matrices(split.meta["languages"], {who: found["cells"] for who, found in outputs.items()})


# --- networks


def student(config: Mapping[str, Any], info: Mapping[str, Any]) -> nn.Module:
    """A new encoder with a span head from the sections ``seed`` and ``student``."""
    from toolchain.tasks import qa_nets

    return qa_nets.build(StudentSection.model_validate(config["student"]), info, config["seed"])


def network(run: Any) -> nn.Module:
    """``student`` for a run, knowing the tokenizer of the run's data. Raises TokenizerError when it has another."""
    from toolchain.tasks import qa_nets

    return qa_nets.network(run)


def load_student(folder: Any) -> nn.Module:
    from toolchain.tasks import qa_nets

    return qa_nets.load(Path(folder))


load_teacher = load_student


def save_student(model: Any, folder: Path) -> None:
    """The encoder's config, its tokenizer and the numbers of its pieces among the data's."""
    from toolchain.tasks import qa_nets

    qa_nets.save_extra(model, folder)


def deploy(model: nn.Module, config: Mapping[str, Any], info: Mapping[str, Any]) -> Any:
    """The Deploy of ``model``: token ids in, start and end logits out, with the tokenizer beside the graph."""
    from toolchain.tasks import qa_nets

    return qa_nets.deploy(model, info)


def teacher(job: Job) -> None:
    """Stage: train the large model, by the teacher section's own method and recipe."""
    from toolchain.tasks import qa_teacher

    qa_teacher.teach(job)


def batches(run: Any, *wanted: str) -> Any:
    """Training batches of the splits ``wanted`` (default: ``train``), by length."""
    from toolchain.tasks import qa_batches

    return qa_batches.SpanBatches(run, wanted or ("train",), run.cfg.train.batch_size)


def scorer(run: Any, split: str = "val") -> Any:
    """A function from a network to its scores on a split of a run's data."""
    from toolchain.tasks import qa_batches

    return qa_batches.scorer(run, split)


def examined(run: Any, module: nn.Module) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Scores on the test split, and the F1 of each question, see ``per_question``."""
    from toolchain.tasks import qa_batches

    split = run.data.splits["test"]
    outputs: Arrays = dict(qa_batches.outputs(module, split, run.device))
    return score(outputs, split), per_question(outputs, split)


def hookable(config: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    """Nothing to hook: the methods of this task take what they need from any encoder."""
    return []


def files_state(section: Any) -> str | None:
    """A digest of names and contents of the person's own files that a section names; None when it names none."""
    if isinstance(section, DataSection):
        place = Path(section.path).expanduser() if section.source == "folder" and section.path else None
    else:
        place = None if section.model == "small" else encoder_folder(section.model)
    if place is None or not place.is_dir():
        return None
    files = [path for path in sorted(place.iterdir()) if path.suffix in READ and path.is_file()]
    return digest([[path.name, sha256(path)] for path in files])


def dry_run(config: Any, data: Data) -> dict[str, str]:
    """Build the encoder, run two windows through it, and describe it."""
    from toolchain.tasks import qa_nets

    return qa_nets.dry_run(config, data)
