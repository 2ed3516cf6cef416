from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import bench, findings, plots, report, report_tables, tables
from tests.benchmarks import tiny_task
from tests.benchmarks.models import TASK, write_run
from toolchain import artifact
from toolchain.stage import Job
from toolchain.tasks import load_data

METRIC = {"name": "accuracy", "higher_is_better": True, "unit": "%"}


def row(name: str, kind: str, precision: str, ms: float, score: float | None, **more: Any) -> dict[str, Any]:
    p50 = {"ms": ms, "low_ms": 0.97 * ms, "high_ms": 1.03 * ms}
    latency = {"1": {"batch": 1, "p50": p50, "p90": None, "p99": None, "noisy": False}}
    accuracy = None if score is None else {"accuracy": score}
    value = {"name": name, "kind": kind, "precision": precision, "status": "ok", "reason": None, "latency": latency}
    return value | {"accuracy": accuracy, "parameters": 1000, "bytes": 4000, "agreement": None} | more


ROWS = [
    row("onnx-teacher", "teacher", "fp32", 5.0, 98.0, parameters=50_000, bytes=200_000),
    row("student", "student", "fp32", 1.0, 96.0),
    row("onnx", "onnx", "fp32", 0.2, 96.0),
    row("onnx-fp16", "onnx", "fp16", 0.26, 96.0, bytes=2000),
    row("onnx-int8-cpu", "onnx", "int8-cpu", 0.1, 93.0, bytes=1000, converted="3 of 4 compute nodes converted"),
    row("engine-sm_86-fp16", "engine", "fp16", 0.01, None, status="not run", reason="no GPU", latency={}),
]


def test_the_fastest_within_the_budget_is_recommended() -> None:
    strict, loose = findings.recommend(ROWS, METRIC, 2.0), findings.recommend(ROWS, METRIC, 3.0)
    assert strict is not None
    assert strict["name"] == "onnx"
    assert strict["over_budget"] == ["onnx-int8-cpu"]
    assert loose is not None
    assert loose["name"] == "onnx-int8-cpu"
    assert loose["over_budget"] == []
    assert findings.recommend(ROWS[:2], METRIC, 2.0) is None
    unscored = findings.recommend(ROWS, None, 2.0)
    assert unscored is not None
    assert unscored["name"] == "onnx-int8-cpu"
    assert "not measured" in unscored["reason"]


def test_rounds_with_cores_apart_are_told_beside_their_spread() -> None:
    whole = {"throughput_per_s": 1.0, "spread": 0.4, "noisy": True, "calls": 5, "rounds": 5}
    rows = [
        row(
            name, "onnx", "fp32", 1.0, 96.0, latency={"1": row(name, "onnx", "fp32", 1.0, None)["latency"]["1"] | found}
        )
        for name, found in (("a", whole | {"rounds_apart": 2}), ("b", whole | {"rounds_apart": 0}), ("c", whole))
    ]
    _, body = report_tables.latency_table(rows)
    assert [line[8] for line in body] == [
        "40.0 % noisy; 2 of 5 rounds with cores apart",
        "40.0 % noisy",
        "40.0 % noisy",
    ]


def test_for_an_error_metric_lower_is_better() -> None:
    rows = [row("onnx", "onnx", "fp32", 0.2, 1.0), row("onnx-fp16", "onnx", "fp16", 0.1, 1.5)]
    metric = {"name": "ade", "higher_is_better": False, "unit": "m"}
    rows = [one | {"accuracy": {"ade": one["accuracy"]["accuracy"]}} for one in rows]
    strict = findings.recommend(rows, metric, 0.2)
    assert strict is not None
    assert strict["name"] == "onnx"
    assert "with ade at most 0.20 m above the student's (1.00 m)" in strict["reason"]
    assert findings.recommend(rows, metric, 0.6)["name"] == "onnx-fp16"  # type: ignore[index]


def test_rows_that_cannot_be_told_apart_are_named() -> None:
    rows = [*ROWS[:3], row("onnx-fp16", "onnx", "fp16", 0.205, 96.0)]
    assert findings.recommend(rows, METRIC, 2.0)["ties"] == ["onnx-fp16"]  # type: ignore[index]
    assert "no measurable difference at batch 1" in findings.precision_words(rows)[0]["text"]


def test_a_slower_precision_is_said_to_be_slower() -> None:
    half, int8 = findings.precision_words(ROWS)
    assert half["slower"]
    assert half["text"].startswith("onnx-fp16: slower than fp32 here: 1.30× as long at batch 1")
    assert not int8["slower"]
    assert "2.00× as fast" in int8["text"]
    assert "4.00× smaller" in int8["text"]
    assert int8["text"].endswith("smaller. 3 of 4 compute nodes converted.")


def test_the_headline_says_gain_and_loss() -> None:
    summary = {"rows": ROWS, "metric": METRIC, "recommended": {"name": "onnx"}}
    config = {
        "teacher": {"model": "big"},
        "student": {"model": "small"},
        "method": {"name": "prockd"},
        "data": {"source": "d"},
    }
    text = findings.sentence(summary, config)
    assert text.startswith("big (50 k parameters) was distilled into small (1 k parameters) with prockd on d.")
    assert "50× fewer parameters" in text
    assert "25× the speed at batch 1" in text
    assert "2.00 points of accuracy lost: 96.00 against the teacher's 98.00 %" in text
    assert "without a teacher" in findings.sentence(summary, config | {"method": {"name": "plain"}})
    cut = findings.sentence(summary, config | {"student": {"model": "small", "layers": 6}})
    assert cut.startswith("big (50 k parameters) was distilled into 6 of its layers (1 k parameters) with prockd on d.")
    narrow = findings.sentence(summary, config | {"method": {"name": "qa_student", "intermediate_size": 8}})
    assert " distilled into its layers, 8 intermediate neurons in each (1 k parameters) with qa_student" in narrow
    findings.sentence({"rows": [], "metric": None, "recommended": None}, {"task": "t"})


METRES = {"name": "minADE", "higher_is_better": False, "unit": "m", "digits": 3}


@pytest.mark.parametrize(
    ("gain", "metric", "words"),
    [
        (-2.0, METRIC, "2.00 points of accuracy lost"),
        (1.5, METRIC, "1.50 points of accuracy gained"),
        (0.004, METRIC, "the same accuracy"),
        (-0.0121, METRES, "minADE 0.012 m worse"),
        (0.0121, METRES, "minADE 0.012 m better"),
        (-0.0004, METRES, "the same minADE"),
        (-1.0, METRES | {"name": "error", "unit": "%"}, "error 1.000 points worse"),
    ],
)
def test_changes_read_right_for_scores_and_for_errors(gain: float, metric: dict[str, Any], words: str) -> None:
    assert findings.change(gain, metric) == words


def test_a_budget_is_told_exactly() -> None:
    assert findings.budget(2.0, METRIC) == "within 2.00 points of accuracy of the student"
    assert findings.budget(0.01, METRES) == "with minADE at most 0.010 m above the student's"
    assert findings.budget(0.0005, METRES) == "with minADE at most 0.0005 m above the student's"


def test_what_became_of_the_teacher_is_told_step_by_step(tmp_path: Path) -> None:
    steps = [{"what": "half of its layers", "parameters": 50, "val": {"accuracy": 40.0}}]
    for role, parameters, value, extra in (("teacher", 100, 90.0, {}), ("student", 50, 85.0, {"steps": steps})):
        with artifact.create(tmp_path / role, stage=role, config={}) as draft:
            draft.metrics, draft.extra = {"val": {"accuracy": value}}, {"parameters": parameters} | extra
    inputs = {role: tmp_path / role for role in ("teacher", "student")}
    found = report.steps(inputs, METRIC)
    title, body = tables.steps_table(found, METRIC)
    assert title[2] == "accuracy (%), validation"
    assert body == [
        ["the teacher", "100", "90.00", "–"],
        ["half of its layers", "50", "40.00", "−50.00"],
        ["the student", "50", "85.00", "+45.00"],
    ]
    assert report.steps({"student": tmp_path / "student"}, METRIC) == []


def test_every_table_of_an_error_has_its_digits_and_direction() -> None:
    rows = [
        row("onnx-teacher", "teacher", "fp32", 5.0, None, accuracy={"minADE": 0.3812, "minFDE": 0.68}),
        row("student", "student", "fp32", 1.0, None, accuracy={"minADE": 0.3691, "minFDE": 0.67}),
        row("onnx", "onnx", "fp32", 0.2, None, accuracy={"minADE": 0.3648, "minFDE": 0.66}),
    ]
    rows = [one | {"max_difference": None} for one in rows]
    summary = {"rows": rows, "metric": METRES, "environment": {}, "recommended": {"name": "onnx"}}
    assert tables.header(summary)[3] == "minADE (m) ↓"
    assert [cells[3:5] for cells in tables.cells(summary)] == [
        ["0.381", "+0.012"],
        ["0.369", "0.000"],
        ["0.365", "−0.004"],
    ]
    assert "minADE: less is better, so a change above 0 is a loss." in tables.notes(summary)
    title, body = report_tables.accuracy_table(rows, METRES)
    assert title[1] == "minADE (m) ↓"
    assert body[2][1:4] == ["0.365", "–", "–"]
    assert body[2][5] == "−0.004"
    assert body[2][-1] == "0.660"
    title, body = report_tables.accuracy_table([rows[0], rows[1] | {"interval": [0.3112, 0.4409]}], METRES)
    assert [title[2], body[0][2], body[1][2]] == ["95 % interval", "–", "0.311 – 0.441"]
    text = findings.sentence(summary, {"method": {"name": "ppt_student"}})
    assert "minADE 0.016 m better: 0.365 against the teacher's 0.381 m" in text
    nested = {"method": {"name": "ppt_student"}, "teacher": {"student": {"model": "ppt"}}}
    assert findings.sentence(summary, nested).startswith("ppt (1 k parameters) was distilled")


def test_up_is_better_in_the_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(plots, "_label", lambda axes, *_: seen.append(axes))
    points = [plots.Point(name, "onnx", ms, ms, ms, 0.4 - 0.1 * ms) for name, ms in (("a", 1.0), ("b", 2.0))]
    for higher in (True, False):
        plots.pareto(points, "x", higher, "1", None)
        plots.pareto([points[0], points[0]], "x", higher, "1", None)
    assert [axes.yaxis_inverted() for axes in seen] == [False, False, True, True]


def test_the_front_holds_what_nothing_beats() -> None:
    points = [plots.Point(r["name"], r["kind"], tables.p50(r) or 0, 1, 1, r["accuracy"]["accuracy"]) for r in ROWS[:5]]
    assert [p.name for p in plots.pareto_front(points, True)] == ["onnx-int8-cpu", "onnx", "onnx-teacher"]


def test_labels_of_crowded_points_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[Any] = []
    original = plots._label

    def spy(axes: Any, canvas: Any, points: Any, best: Any) -> None:
        original(axes, canvas, points, best)
        boxes.extend(text.get_window_extent(canvas.get_renderer()) for text in axes.texts)

    monkeypatch.setattr(plots, "_label", spy)
    crowd = [plots.Point(f"onnx-name-{i}", "onnx", 1 + 0.001 * i, 1, 1.01, 90 + 0.01 * i) for i in range(7)]
    svg = plots.pareto(crowd, "accuracy", True, "1", "onnx-name-0")
    assert svg.startswith(b"<?xml")
    assert len(boxes) == 7
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_scalars_are_grouped_by_what_they_tell() -> None:
    lines = [
        {"stage": "a", "epoch": e, "loss": 1.0, "loss_kl": 2.0, "perplexity": 3.0, "grad_norm": 1.0} for e in (1, 2)
    ]
    lines.append({"stage": "a", "epoch": 2, "val": {"accuracy": 90.0}, "lr": 0.1})
    found = plots.scalars(lines)["a"]
    assert found["val accuracy"] == [(2.0, 90.0)]
    assert "lr" not in found
    groups = plots.groups(found)
    assert groups == {
        "validation": ["val accuracy"],
        "losses": ["loss", "loss_kl"],
        "prototypes": ["perplexity"],
        "other": ["grad_norm"],
    }
    assert b"<svg" in plots.training(found, "epoch")


def test_the_course_within_an_epoch_is_drawn() -> None:
    course = [{"step": 10, "coefficient": 0.6}, {"step": 20, "coefficient": 0.8}]
    line = {"stage": "a", "epoch": 1, "step": 20, "coefficient": 0.7, "val": {"f1": 50.0}, "course": course}
    later = {"stage": "a", "epoch": 2, "step": 40, "coefficient": 0.9, "course": [{"step": 30, "coefficient": 0.9}]}
    assert plots.scalars([line, later])["a"] == {
        "coefficient": [(0.5, 0.6), (1.0, 0.8), (1.5, 0.9)],
        "val f1": [(1.0, 50.0)],
    }


def test_the_scalars_of_trajectories_are_known() -> None:
    scores = {"selection": 2.0, "minADE": 0.3, "meanFDE": 6.0}
    line = {"stage": "III-complete", "loss": 60.0, "path": 54.0, "features": 0.7, "grad_norm": 9.0}
    found = plots.scalars([line | {"epoch": e, "val": scores, "test": scores} for e in (1, 2)])["III-complete"]
    groups = plots.groups(found)
    assert groups["losses"] == ["loss", "path", "features"]
    assert groups["test, watched only"] == ["test selection", "test minADE", "test meanFDE"]
    assert groups["other"] == ["grad_norm"]
    assert plots._by_size("validation", groups["validation"], found) == [
        ["val meanFDE", "val selection"],
        ["val minADE"],
    ]
    assert b"<svg" in plots.training(found, "epoch")


def test_the_training_of_teacher_and_student_is_shown(tmp_path: Path) -> None:
    for role, stages in (("teacher", ("I", "warm-up", "III")), ("student", ("student",))):
        lines = [{"stage": s, "epoch": e, "loss": 1.0} for s in stages for e in ((1,) if s == "warm-up" else (1, 2))]
        (tmp_path / role).mkdir()
        (tmp_path / role / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    inputs = {role: tmp_path / role for role in ("data", "student", "teacher")}
    assert [title for title, _ in report.curves(inputs)] == ["teacher: I", "teacher: III", "student"]
    assert report.curves({"data": tmp_path}) == []


def test_masks_and_images_become_pictures() -> None:
    mask = np.array([[0, 1], [2, 11]])
    colours = plots.colour_mask(mask, 11, 11)
    assert colours.shape == (2, 2, 3)
    assert colours[1, 1].tolist() == [240, 240, 240]
    assert len({tuple(plots.class_colour(i)) for i in range(20)}) == 20
    for image in (colours, colours[..., :1], colours[..., 0]):
        assert plots.png(image, least=64).startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("run")
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    job = Job(**write_run(root))
    bench.run(job)
    config = {"name": "tiny", "task": TASK, "report": {"max_drop": 50.0}}
    report.run(Job("report", root / "report", config, {**job.inputs, "bench": root / "bench"}))
    yield root
    patch.undo()


def test_the_report_is_whole_and_self_contained(root: Path) -> None:
    artifact.verify(root / "report")
    html = (root / "report" / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert "http" not in re.sub(r'"data:[^"]*"', "", html)
    assert html.count("data:image/svg+xml") == 2
    assert html.count("data:image/png") == 24
    for words in ("linear", "prockd", "Recommended", "Protocol", "not made", "no builder here", "✓", "Lineage"):
        assert words in html, words


def test_the_summary_and_the_markdown_tell_the_same(root: Path) -> None:
    summary = json.loads((root / "report" / "summary.json").read_text(encoding="utf-8"))
    text = (root / "report" / "report.md").read_text(encoding="utf-8")
    assert summary["recommended"]["name"] in ("onnx", "onnx-fp16")
    assert summary["headline"] in text
    roles = [step["role"] for step in summary["lineage"]]
    assert (
        roles.index("data")
        < roles.index("student")
        < roles.index("onnx")
        < roles.index("onnx-fp16")
        < roles.index("bench")
    )
    for line in tables.summary_markdown(summary).splitlines():
        assert line in text
    assert "| engine-sm_86-int8-trt | – |" in text
    assert "not made: no builder here" in text


def test_the_terminal_shows_the_same_table(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (root / "report" / "summary.json", root / "bench" / "bench.json"):
        assert tables.main(["--summary", str(path)]) == 0
        err = capsys.readouterr().err
        assert "onnx-fp16" in err
        assert "speed-up" in err
        assert "no builder here" in err
        assert "…" not in err


def test_mistakes_come_first_and_are_marked(root: Path) -> None:
    split = load_data(root / "data").splits["test"].select(np.arange(6))
    wrong = {"label": split.arrays["label"].copy()}
    wrong["label"][4] = (wrong["label"][4] + 1) % 3
    tiles = report._tiles(tiny_task, split, {"student": wrong})["tiles"]  # type: ignore[arg-type]
    assert [tile["right"] for tile in tiles] == [False] + 5 * [True]
    summary = json.loads((root / "report" / "summary.json").read_text(encoding="utf-8"))
    samples = {"kind": "classes", "tiles": tiles, "legend": [], "figures": []}
    view = {"summary": summary, "tables": report_tables.tables(summary), "ledger": ([], []), "notes": [], "failed": []}
    html = report.render_html(view | {"pareto": None, "training": [], "samples": samples, "environment": []})
    assert html.count("<b>✗ ") == 1
    assert html.count(" ✓") == 5


def test_a_task_may_add_figures(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def figures(split: Any, outputs: dict[str, Any]) -> list[tuple[str, bytes]]:
        seen.update(count=len(split), who=sorted(outputs))
        return [("Heat map", plots.png(np.zeros((4, 4), np.uint8)))]

    monkeypatch.setattr(tiny_task, "figures", figures, raising=False)
    job = Job("report", root / "again", {}, {"bench": root / "bench", "data": root / "data"})
    found = report.samples(job, {"task": TASK})
    assert seen == {"count": 24, "who": ["student", "teacher"]}
    assert found["figures"][0][0] == "Heat map"
