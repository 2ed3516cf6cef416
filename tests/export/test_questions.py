"""The graph of a question answering network: any batch, any length, padding without effect, in every precision."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolchain import artifact
from toolchain.stage import Job
from toolchain.tasks import Data, Split, as_fed, load_data, qa, save_data

pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data``, ``student`` (untrained, of half the vocabulary), and its ``onnx``, ``onnx-fp16``, ``onnx-int8-cpu``."""
    from export import onnx as exporting
    from export import precision
    from tests.toolchain.qa_doubles import config, data, net
    from toolchain.checkpoint import save_tensors
    from toolchain.tasks.qa_nets import save_extra
    from toolchain.tasks.qa_pruning import smaller
    from toolchain.tasks.qa_tokenizer import used_pieces

    root = tmp_path_factory.mktemp("chain")
    with artifact.create(root / "data", stage="data", config={}) as draft:
        save_data(draft.path, data())
    whole = net(root / "work")
    used = [part.arrays["input_ids"] for part in data().splits.values()]
    model = smaller(whole, [1], used_pieces(whole.tokenizer, used))
    with artifact.create(root / "student", stage="student", config={"task": "qa"}) as draft:
        save_tensors(draft.path / "model.safetensors", model.state_dict())
        save_extra(model, draft.path)
        draft.extra = {"info": data().info}
    settings = config().export.model_dump(mode="json")
    for limits in settings["parity"]["limits"].values():
        limits |= {"agreement": 0.0, "metric_drop": 100.0}
    inputs = {"data": root / "data", "model": root / "student"}
    exporting.run(Job("onnx", root / "onnx", {"task": "qa", "which": "student", "export": settings}, inputs))
    inputs = {"data": root / "data", "onnx": root / "onnx"}
    for name in ("fp16", "int8-cpu"):
        how = {"task": "qa", "precision": name, "export": settings}
        precision.run(Job(f"onnx-{name}", root / f"onnx-{name}", how, inputs))
    return root


FOLDERS = ("onnx", "onnx-fp16", "onnx-int8-cpu")


def split(root: Path) -> Any:
    return as_fed(load_data(root / "data").splits["test"], root / "onnx")


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_folder_ships_its_tokenizer_and_names_its_ports(made: Path, folder: str) -> None:
    manifest = artifact.verify(made / folder)
    assert {"model.onnx", "tokenizer.json", "qa.json", "samples.npz"} <= set(manifest.files)
    assert [(p.name, p.dtype, p.shape) for p in manifest.inputs_ports] == [
        ("input_ids", "int64", ("batch", "sequence")),
        ("attention_mask", "int64", ("batch", "sequence")),
    ]
    assert [p.name for p in manifest.outputs_ports] == ["start", "end"]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize(("batch", "sequence"), [(1, 5), (1, 48), (2, 17), (5, 33)])
def test_any_batch_and_any_sequence(made: Path, folder: str, batch: int, sequence: int) -> None:
    from toolchain.runtime import load

    feeds = {name: array[:batch, :sequence] for name, array in split(made).arrays.items() if name in qa_feeds()}
    feeds = {name: np.ascontiguousarray(np.pad(a, ((0, 0), (0, sequence - a.shape[1])))) for name, a in feeds.items()}
    with load(made / folder) as model:
        out = model(feeds)
    assert {value.shape for value in out.values()} == {(batch, sequence)}
    assert all((value[feeds["attention_mask"] == 0] == -1e4).all() for value in out.values())
    assert all(np.isfinite(value).all() for value in out.values())


def test_attention_is_one_operator_in_dynamic_int8_alone(made: Path) -> None:
    kinds = {name: [node.op_type for node in onnx.load(made / name / "model.onnx").graph.node] for name in FOLDERS}
    assert {name: kinds[name].count("Attention") for name in FOLDERS} == {"onnx": 0, "onnx-fp16": 0, "onnx-int8-cpu": 1}
    assert "Softmax" not in kinds["onnx-int8-cpu"]
    extra = artifact.read(made / "onnx-int8-cpu").extra
    assert extra["opset"] == 23
    assert [name for name in extra["float_nodes"] if "Attention" in name]


def test_on_a_cpu_additions_are_not_fused_into_normalisations(made: Path, tmp_path: Path) -> None:
    import onnxruntime as ort

    from toolchain.onnx_runtime import NOT_ON_CPU

    def kinds(disabled: list[str]) -> set[str]:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        ort.InferenceSession(
            made / "onnx" / "model.onnx", options, ["CPUExecutionProvider"], disabled_optimizers=disabled
        )
        return {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}

    assert "SkipLayerNormalization" in kinds([])
    assert "SkipLayerNormalization" not in kinds(list(NOT_ON_CPU))


def qa_feeds() -> tuple[str, ...]:
    return ("input_ids", "attention_mask")


@pytest.mark.parametrize("folder", ["onnx", "onnx-fp16"])
def test_padding_does_not_change_an_answer(made: Path, folder: str) -> None:
    """Dynamic int8 takes its scale from the whole batch, so there only the answers' agreement is looked at, below."""
    from toolchain.runtime import load

    whole = split(made)
    length = np.asarray(whole.arrays["attention_mask"]).sum(1)
    with load(made / folder) as model:
        for row in np.argsort(length)[:4]:
            short = whole.feed(np.array([row]))
            long = {name: np.ascontiguousarray(whole.arrays[name][[row]]) for name in qa_feeds()}
            a, b = model(short), model(long)
            width = short["input_ids"].shape[1]
            for name in a:
                np.testing.assert_allclose(b[name][:, :width], a[name], atol=1e-5 if folder == "onnx" else 2e-3)


def test_the_graph_answers_what_the_network_answers(made: Path) -> None:
    import torch

    from export.verify import predict
    from tests.toolchain.qa_doubles import data
    from toolchain.runtime import load
    from toolchain.tasks.qa_batches import outputs
    from toolchain.tasks.qa_nets import load as load_net

    expected = outputs(load_net(made / "student"), data().splits["test"], torch.device("cpu"))
    for folder, least in (
        ("onnx", 1.0),
        ("onnx-fp16", 0.98),
        ("onnx-int8-cpu", 0.6),
    ):  # an untrained network's logits are flat
        with load(made / folder) as model:
            found = predict(model, split(made), 16)
        assert found["start"].shape == expected["start"].shape
        assert qa.agreement(expected, found) >= least, folder


def test_the_runtime_answers_from_text_as_the_scorer_does(made: Path) -> None:
    from export.verify import predict
    from toolchain.qa_runtime import load_qa
    from toolchain.runtime import RuntimeInputError, load

    whole = split(made)
    with load(made / "onnx") as model:
        expected = qa.answers(predict(model, whole, 16), whole)
    questions = [whole.meta["questions"][number] for number in sorted(expected)]
    contexts = [whole.meta["contexts"][question["context"]] for question in questions]
    with load_qa(made / "onnx", batch=4) as model:
        found = model.answer_all([question["question"] for question in questions], contexts)
        for number, context, answer in zip(sorted(expected), contexts, found, strict=True):
            assert (answer.text, pytest.approx(answer.score, abs=1e-4)) == expected[number]
            assert context[answer.start : answer.end] == answer.text
        alone = model.answer(questions[0]["question"], contexts[0])
        assert (alone.text, alone.start, alone.end) == (found[0].text, found[0].start, found[0].end)
        long = model.answer(questions[0]["question"], " ".join(contexts))
        assert long.text == " ".join(contexts)[long.start : long.end]
        assert model.answer_all([], []) == []
        for question, context in (("", "c"), ("q", "  "), (3, "c")):
            with pytest.raises(RuntimeInputError, match="expected a text"):
                model.answer(question, context)  # type: ignore[arg-type]
        with pytest.raises(RuntimeInputError, match="as many contexts as questions"):
            model.answer_all(["q"], [])


def test_the_runtime_needs_neither_torch_nor_transformers(made: Path) -> None:
    code = (
        "import sys\nfrom toolchain.qa_runtime import load_qa\n"
        f"with load_qa({str(made / 'onnx-int8-cpu')!r}) as model:\n"
        "    found = model.answer('Where does Anna live?', 'Anna lives in Paris. ' * 40)\n"
        "assert found.text, found\n"
        "heavy = {'torch', 'transformers', 'onnx', 'pydantic', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_without_a_tokenizer_is_no_question_answering_model(tmp_path: Path, made: Path) -> None:
    from toolchain.qa_runtime import load_qa
    from toolchain.runtime import RuntimeLoadError

    manifest = artifact.read(made / "onnx")
    with artifact.create(tmp_path / "other", stage="onnx", config={}) as draft:
        (draft.path / "model.onnx").write_bytes((made / "onnx" / "model.onnx").read_bytes())
        draft.ports = manifest.ports
    with pytest.raises(RuntimeLoadError, match=r"found one without tokenizer\.json"):
        load_qa(tmp_path / "other")


def test_an_engine_has_a_range_for_batch_and_sequence(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    from export import engine

    ranges = {"batch": {"min": 1, "opt": 2, "max": 8}, "shapes": {"sequence": {"min": 8, "opt": 32, "max": 48}}}
    how = {"compile": {"backend": "tensorrt-rtx", "workspace_mb": 64, **ranges}, "targets": ["sm_86"]}
    engine.run(Job("engine", tmp_path / "engine", how, {"onnx": made / "onnx-fp16"}))
    manifest = artifact.verify(tmp_path / "engine")
    assert manifest.extra["profile"]["input_ids"] == {"min": [1, 8], "opt": [2, 32], "max": [8, 48]}
    assert {"model.engine", "tokenizer.json", "qa.json"} <= set(manifest.files)


def test_real_inputs_of_a_bench_are_cut_to_their_length(made: Path) -> None:
    from benchmarks.latency import Subject, samples_of

    for data in (made / "data", None):
        samples = samples_of(made / "onnx", data)
        subject = Subject(lambda feeds: {}, samples)
        widths = {feeds["input_ids"].shape[1] for feeds in subject.batches(1)}
        assert len(widths) > 1
        assert int(np.asarray(samples.arrays["input_ids"]).max()) < len(np.unique(_table(made)))


def _table(made: Path) -> Any:
    return np.load(made / "onnx" / "lookup.input_ids.npy")


def test_what_ships_is_scored_from_texts_alone(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import questions, tables
    from toolchain.artifact import EdgestillError
    from toolchain.qa_runtime import load_qa

    monkeypatch.setattr(questions, "ROUNDS", 2)
    monkeypatch.setattr(questions, "LEAST", 2)
    monkeypatch.setattr(questions, "TIMED", 12)
    found = questions.measure(made, ["onnx", "onnx-int8-cpu"], threads=1)
    assert [(row["latency"]["rounds"], row["latency"]["calls"]) for row in found["answers"]] == [(2, 24)] * 2
    test = split(made)
    with load_qa(made / "onnx") as model:
        told = [model.answer(q, c).text for q, c in zip(*questions.texts(test), strict=True)]
    assert found["answers"][0]["scores"] == qa.score_texts(dict(enumerate(told)), test)
    assert [row["latency_apart"] for row in found["answers"]] == [None, None]
    assert all(0 < row["least_p50_ms"] < row["latency"]["p50"]["high_ms"] for row in found["answers"])
    table = tables.measured_table(found, "qa")
    assert "| onnx-int8-cpu | " in table
    assert "cores apart" not in table
    assert f"{found['questions']} questions" in table
    with pytest.raises(EdgestillError, match="expected a run of task qa"):
        with artifact.create(made / "other" / "data", stage="data", config={}) as draft:
            arrays = {"image": np.zeros((2, 4, 4, 1), np.uint8), "label": np.zeros(2, np.int64)}
            save_data(draft.path, Data({"test": Split(arrays, ("image",))}, {}))
        questions.measure(made / "other", ["onnx"], threads=1)


def test_the_least_of_the_rounds_is_of_each_question(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import questions

    rounds = {name: [[9, 2, 30], [1, 20, 3], [10, 20, 40]] for name in ("onnx", "onnx-int8-cpu")}
    none: dict[str, list[list[int]]] = {name: [] for name in rounds}
    monkeypatch.setattr(questions, "times", lambda *_: {False: rounds, True: none})
    found = questions.measure(made, list(rounds), threads=1)
    assert [row["least_p50_ms"] for row in found["answers"]] == [2e-6, 2e-6]
    monkeypatch.setattr(questions, "times", lambda *_: {False: none, True: rounds})
    assert [row["least_p50_ms"] for row in questions.measure(made, ["onnx"], threads=1)["answers"]] == [None]


def test_rounds_of_near_and_far_cores_are_told_apart(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import questions, tables
    from toolchain.qa_runtime import load_qa

    for name, value in (("ROUNDS", 2), ("LEAST", 2), ("MOST", 6), ("TIMED", 8)):
        monkeypatch.setattr(questions, name, value)
    probes = [*[True] * 3, True, False, False, *[False] * 6]
    with load_qa(made / "onnx") as a, load_qa(made / "onnx") as b:
        taken = questions.times({"a": a, "b": b}, split(made), iter(probes).__next__)
    assert {far: [len(rounds) for rounds in mine.values()] for far, mine in taken.items()} == {
        True: [1, 1],
        False: [2, 2],
    }

    def table(*probes: bool | None) -> str:
        forever = cycle(probes)
        return tables.measured_table(questions.measure(made, ["onnx"], threads=2, apart=lambda: next(forever)), "qa")

    least = "| least p50 ms | speed-up |\n"
    assert f"| p50 ms | speed-up {least}" in table(None)
    assert "languages not trained on | p50 ms, cores apart | speed-up, cores apart |\n" in table(True)
    both = table(*[True] * 4, *[False] * 4)
    assert f"| p50 ms | speed-up | p50 ms, cores apart | speed-up, cores apart {least}" in both
    never = table(True, False)
    assert "p50" not in never
    assert "questions, 2 threads" in never


def test_dynamic_int8_answers_the_same_whatever_is_asked_beside_it(made: Path) -> None:
    from benchmarks.questions import texts
    from toolchain.qa_runtime import load_qa

    asked = [part[:6] for part in texts(split(made))]
    with load_qa(made / "onnx-int8-cpu") as model:
        assert model.answer_all(*asked) == [model.answer(q, c) for q, c in zip(*asked, strict=True)]


def test_an_engine_is_asked_within_its_profile(made: Path) -> None:
    from dataclasses import replace

    from benchmarks.questions import texts
    from toolchain.qa_runtime import QaRuntime, load_qa

    asked = [part[:12] for part in texts(split(made))]
    shapes: list[tuple[int, ...]] = []

    class Profiled:
        """An engine of at most 2 windows of 40 to 48 tokens."""

        def __init__(self, model: Any) -> None:
            self.model, self.inputs = model, model.inputs
            profile = {"input_ids": {"min": [1, 40], "opt": [1, 40], "max": [2, 48]}}
            self.manifest = replace(model.manifest, extra=model.manifest.extra | {"profile": profile})

        def __call__(self, feeds: Any) -> Any:
            shapes.append(feeds["input_ids"].shape)
            return self.model(feeds)

    with load_qa(made / "onnx") as plain:
        settings = json.loads((made / "onnx" / "qa.json").read_text())
        limited = QaRuntime(Profiled(plain.model), plain.tokenizer, settings, batch=8)  # type: ignore[arg-type]
        expected, found = plain.answer_all(*asked), limited.answer_all(*asked)
    assert [one.text for one in found] == [one.text for one in expected]
    assert max(batch for batch, _ in shapes) == 2
    assert all(40 <= width <= 48 for _, width in shapes)
