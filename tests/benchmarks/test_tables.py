from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import formats, tables

SCORES = {
    ("plain", 0): 90.0,
    ("plain", 1): 92.0,
    ("plain", 2): 91.0,
    ("prockd", 0): 91.0,
    ("prockd", 1): 93.5,
    ("prockd", 2): 92.0,
}


def write(folder: Path, name: str = "digits", extra: list[dict[str, Any]] | None = None) -> Path:
    rows = [
        {
            "study": name,
            "method": m,
            "dataset": "digits",
            "seed": s,
            "metrics": {"accuracy": v, "loss": 1.0},
            "device": "cpu",
        }
        for (m, s), v in reversed(SCORES.items())
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *(extra or [])]), encoding="utf-8")
    return path


def test_a_study_shows_mean_sd_and_the_paired_difference_of_equal_seeds(tmp_path: Path) -> None:
    table = tables.study_table(tables.read_results(write(tmp_path)))
    prockd, plain, _, made_on = table.splitlines()[2:]
    assert plain == "| digits | plain | – | accuracy | 91.00 ± 1.00 | – | 3 |"
    # differences 1, 1.5, 1: mean 1.167, sd 0.289, t(2) 4.303 / sqrt(3) * sd = 0.717
    assert prockd == "| digits | prockd | – | accuracy | 92.17 ± 1.26 | +1.17 ± 0.29 [+0.45, +1.88] | 3 |"
    assert made_on == "Computed on cpu."


def test_no_sentence_of_a_protocol_stands_twice(tmp_path: Path) -> None:
    row = {"method": "prockd", "dataset": "digits", "metrics": {"accuracy": 99.0}, "device": "cpu"}
    extra = [
        row | {"seed": s, "protocol": f"At .5 and 1.5 epochs. {what} (both)."} for s, what in enumerate(("A", "B"))
    ]
    lines = tables.study_table(tables.read_results(write(tmp_path, extra=extra))).splitlines()
    assert lines[-1] == "At .5 and 1.5 epochs. B (both). A (both). Computed on cpu."


def test_a_study_is_compared_with_any_of_its_methods(tmp_path: Path) -> None:
    write(tmp_path)
    text = "<!-- results:digits against prockd of digits -->\n<!-- /results -->"
    assert "| digits | plain | – | accuracy | 91.00 ± 1.00 | −1.17 ± 0.29 [−1.88, −0.45] | 3 |" in tables.render(
        text, tmp_path, "a.md"
    )
    with pytest.raises(tables.TableError, match="no such method among prockd, plain"):
        tables.render(text.replace("prockd of", "hinton of"), tmp_path, "a.md")
    assert "No results yet" in tables.render(text.replace("of digits", "of mnist"), tmp_path, "a.md")


def test_a_document_may_show_some_methods_alone(tmp_path: Path) -> None:
    write(tmp_path)
    text = "<!-- results:digits of digits with plain -->\n<!-- /results -->"
    found = tables.render(text, tmp_path, "a.md")
    assert "| digits | plain |" in found
    assert "prockd" not in found
    assert "prockd" in tables.render(text.replace("plain", "plain; prockd"), tmp_path, "a.md")
    row = {"dataset": "digits", "seed": 0, "metrics": {"accuracy": 1.0}}
    protocol = "All: at .5 epochs. Short: 3 epochs. Taught: by a net. Pruned: to a half."
    names = ["plain", "plain, short", "plain, taught"]
    path = tmp_path / "told.jsonl"
    path.write_text("".join(json.dumps(row | {"method": name, "protocol": protocol}) + "\n" for name in names))
    text = "<!-- results:told with plain; plain, short -->\n<!-- /results -->"
    assert "\nAll: at .5 epochs. Short: 3 epochs. Pruned: to a half. " in tables.render(text, tmp_path, "a.md")
    assert " Taught: by a net. " in tables.render(text.replace("short", "taught"), tmp_path, "a.md")
    text = "<!-- results:digits of digits with plain -->\n<!-- /results -->"
    with pytest.raises(tables.TableError, match=r"^a.md: with plane: no such method; did you mean 'plain'"):
        tables.render(text.replace("plain", "plane"), tmp_path, "a.md")


def test_a_document_may_show_the_validation_split(tmp_path: Path) -> None:
    row = {"method": "tried", "dataset": "digits", "seed": 0, "device": "cpu"}
    write(tmp_path, extra=[row | {"metrics": {"accuracy": 80.0, "val_accuracy": 85.0}}])
    text = "<!-- results:digits on validation of digits -->\n<!-- /results -->"
    assert (
        tables.render(text, tmp_path, "a.md").splitlines()[4]
        == "| digits | tried | – | accuracy, validation | 85.00 | – | 1 |"
    )


def test_a_seed_run_twice_counts_once_and_unpaired_seeds_do_not_pair(tmp_path: Path) -> None:
    extra = [{"method": "prockd", "dataset": "digits", "seed": s, "metrics": {"accuracy": 99.0}} for s in (0, 7)]
    line = tables.study_table(tables.read_results(write(tmp_path, extra=extra))).splitlines()[2]
    assert "| 4 |" in line
    assert "+3.83" in line


def test_rows_of_an_earlier_config_do_not_count(tmp_path: Path) -> None:
    row = {"method": "prockd", "dataset": "digits", "metrics": {"accuracy": 99.0}, "config_sha256": "new"}
    extra = [row | {"seed": 5, "config_sha256": "older"}, row | {"seed": 0}, row | {"seed": 1}]
    line = tables.study_table(tables.read_results(write(tmp_path, extra=extra))).splitlines()[2]
    assert "| 99.00 ± 0.00 |" in line
    assert "| 2 |" in line


@pytest.mark.parametrize(("kinds", "name"), [(("onnx", "student"), "the student in PyTorch"), (("onnx",), "a-onnx")])
def test_the_notes_say_what_is_compared_with_what(kinds: tuple[str, ...], name: str) -> None:
    common = {"precision": "fp32", "accuracy": {"accuracy": 90.0}, "latency": {}}
    rows = [common | {"name": f"a-{kind}", "kind": kind} for kind in kinds]
    value = {"rows": rows, "metric": {"name": "accuracy", "unit": "%"}, "environment": {}}
    assert f"Change and agreement: against {name}." in tables.notes(value)[0]
    assert "agreement" not in tables.notes(value | {"metric": None})[0]


def test_a_summary_in_a_document_says_how_it_was_measured_and_what_is_missing(tmp_path: Path) -> None:
    common = {"precision": "fp16", "accuracy": None, "parameters": 12, "bytes": 90, "agreement": None}
    latency = {"1": {"p50": {"ms": 2.0}, "noisy": True}}
    missing = common | {"kind": "engine", "status": "not run", "reason": "no  GPU", "latency": {}}
    rows = [common | {"name": "onnx", "kind": "onnx", "status": "ok", "reason": None, "latency": latency}]
    rows += [missing | {"name": name} for name in ("a", "b")]
    value = {"rows": rows, "metric": None, "settings": {"threads": 2}, "environment": {"cpu": {"model": "A CPU"}}}
    (tmp_path / "demo.json").write_text(json.dumps(value))
    lines = tables.render("<!-- results:demo -->\n<!-- /results -->", tmp_path, "a.md").splitlines()
    assert lines[-5] == (
        "Latency: batch 1, 2 threads, A CPU (? cores), numpy to numpy. Speed-up: against the first row. "
        "~ noisy: medians of the rounds lie more than 5 % apart."
    )
    assert lines[-4:-1] == ["", "a, b not run: no GPU.", ""]


def test_a_document_is_rendered_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    document = tmp_path / "README.md"
    document.write_text("# A\n<!-- results:digits -->\nold\n<!-- /results -->\nafter\n", encoding="utf-8")
    command = ["--results", str(tmp_path), str(document)]
    assert tables.main(["--check", *command]) == 1
    assert "old" in document.read_text(encoding="utf-8")
    assert "tables differ" in capsys.readouterr().err
    assert tables.main(command) == 0
    text = document.read_text(encoding="utf-8")
    assert "92.17 ± 1.26" in text
    assert "old" not in text
    assert text.endswith("<!-- /results -->\nafter\n")
    assert tables.main(["--check", *command]) == 0
    write(tmp_path, extra=[{"method": "plain", "dataset": "digits", "seed": 9, "metrics": {"accuracy": 1.0}}])
    assert tables.main(["--check", *command]) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!-- results:digits -->\nno end\n", "has no"),
        ("<!-- results:other -->\n<!-- /results -->", "studies there: digits"),
        ("<!-- results:broken -->\n<!-- /results -->", "broken.jsonl:1: expected a JSON object"),
    ],
)
def test_faults_of_documents_and_results_are_named(tmp_path: Path, text: str, words: str) -> None:
    write(tmp_path)
    if "broken" in text:
        (tmp_path / "broken.jsonl").write_text('{"method": "plain"}\n', encoding="utf-8")
    with pytest.raises(tables.TableError, match=words):
        tables.render(text, tmp_path, "README.md")


def test_numbers_are_shown_with_the_digits_that_count() -> None:
    assert [tables.ms(v) for v in (None, 0.04123, 1.234, 12.34, 123.4)] == ["–", "0.0412", "1.23", "12.3", "123"]
    assert [tables.count(v) for v in (None, 12, 98_765, 3_412_345)] == ["–", "12", "98.8 k", "3.41 M"]
    assert [tables.size(v) for v in (None, 512, 2_345_678)] == ["–", "0.5 kB", "2.35 MB"]
    assert [formats.score(v, signed=True) for v in (0.004, -0.004, -1.5)] == ["0.00", "0.00", "−1.50"]
    assert [formats.score(v, 3, signed=True) for v in (0.004, -0.0004, -1.5)] == ["+0.004", "0.000", "−1.500"]
    assert [formats.scored(0.3647, metric) for metric in (None, {}, {"digits": 3})] == ["0.36", "0.36", "0.365"]


def test_committed_tables_agree_with_their_results() -> None:
    root = Path(__file__).parents[2]
    documents = [path for path in (root / "README.md", *root.glob("docs/**/*.md")) if path.is_file()]
    assert tables.update(documents, tables.RESULTS, check=True) == []


def test_single_measurements_are_rendered_too(tmp_path):
    environment = {"cpu": {"model": "A CPU", "usable_cores": 2}, "gpus": [], "threads": 2}
    rows = {
        "plain": {"samples_per_second": 700.4, "epoch_time_vs_plain": 1.0, "spread": 0.5},
        "other": {"status": "not installed"},
    }
    (tmp_path / "speed.json").write_text(
        json.dumps({"pair": {}, "rounds": 3, "rows": rows, "environment": environment})
    )
    row = {
        "model": "mlp",
        "threads": 1,
        "bare_p50_us": 12.7,
        "ours_p50_us": 12.3,
        "ratio": 0.964,
        "ratio_ci95": [0.96, 0.97],
    }
    (tmp_path / "calls.json").write_text(json.dumps({"results": [row], "environment": environment}))
    (tmp_path / "odd.json").write_text("{}")
    document = tmp_path / "doc.md"
    document.write_text("".join(f"<!-- results:{name} -->\n<!-- /results -->\n" for name in ("speed", "calls")))
    tables.update([document], tmp_path, check=False)
    text = document.read_text()
    assert "| other" in text
    assert "700 ~" in text
    assert "0.964 [0.960, 0.970]" in text
    assert "3 interleaved rounds, 2 threads, A CPU (2 cores)" in text
    document.write_text("<!-- results:odd -->\n<!-- /results -->\n")
    with pytest.raises(tables.TableError, match="neither"):
        tables.update([document], tmp_path, check=False)
