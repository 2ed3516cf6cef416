from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import paired, study_tables, tables


def run(
    folder: Path, dataset: str, method: str, shift: float, seed: int, sha256: str = "0" * 64, questions: int = 60
) -> None:
    """A row of ``results.jsonl`` and its samples."""
    rng = np.random.default_rng(seed)
    base = {
        f"the_q_{n}_{pair}": float(v)
        for n in range(questions)
        for pair, v in zip(("en-en", "en-es"), rng.uniform(0, 90, 2), strict=True)
    }
    noise = np.random.default_rng(len(method)).normal(0, 1, len(base))
    shifts = [shift if key.endswith("en-en") else 2 * shift for key in base]
    scores = (item + by + float(n) for item, by, n in zip(base.values(), shifts, noise, strict=True))
    value = {"cells": dict(zip(base, scores, strict=True))}
    (folder / f"{dataset}-{method}-{seed}-{sha256[:8]}.json").write_text(json.dumps(value))
    row = {"dataset": dataset, "method": method, "seed": seed, "metrics": {"gxlt_f1": 1}, "config_sha256": sha256}
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def compared(folder: Path, *arguments: str) -> int:
    return paired.main([str(folder / "results.jsonl"), str(folder), *arguments])


def test_methods_are_compared_by_question_over_their_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "ntl3", "skd-no-ce", 50, 0, "1" * 64)  # of an earlier config
    for seed in (0, 1):
        run(tmp_path, "ntl3", "ce", 0, seed)
        run(tmp_path, "ntl3", "skd-no-ce", 3, seed)
    run(tmp_path, "ntl5", "ce", 0, 0)
    run(tmp_path, "ntl5-skd", "no-ce", 0, 0)
    assert compared(tmp_path, "--out", str(tmp_path / "out.json")) == 0
    told = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    assert told.keys() == {"ntl3", "ntl5"}
    assert told["ntl5"] == []
    rows = {row["part"]: row for row in told["ntl3"]}
    for part, gain in {"cells": 4.5, "xlt": 3, "gxlt_off": 6}.items():
        row = rows.pop(part)
        assert (row["method"], row["seeds"], row["n"]) == ("skd-no-ce", [0, 1], 60)
        assert gain - 1 < row["low"] < row["mean"] < row["high"] < gain + 1
        assert row["p"] < 0.01
        assert row["p_wilcoxon"] < 0.01
    assert not rows
    assert (line := "| ntl3 | skd-no-ce | cells |") in capsys.readouterr().out
    text = "<!-- results:out -->\n<!-- /results -->\n"
    assert line in (shown := tables.render(text, tmp_path, "README.md"))
    assert study_tables.PAIRED_NOTE in shown


def test_one_question_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("ce", "skd"):
        run(tmp_path, "ntl3", method, 0, 0, questions=1)
    assert compared(tmp_path) == 1
    assert "at least 2 questions to compare, found 1" in " ".join(capsys.readouterr().err.split())


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said() -> str:
        assert compared(tmp_path) == 1
        return "".join(capsys.readouterr().err.split())

    assert "nosuchresults" in said()
    run(tmp_path, "ntl3", "skd", 0, 0)
    assert "expectedrowsofamethodce,foundskd" in said()
    run(tmp_path, "ntl3", "ce", 0, 0)
    (tmp_path / "ntl3-skd-0-00000000.json").unlink()
    assert "ntl3-skd-0-00000000.json:expectedthesamplesofarow" in said()


def test_one_dataset_is_compared_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dataset in ("ntl3", "ntl5"):
        run(tmp_path, dataset, "ce", 0, 0)
        run(tmp_path, dataset, "skd", 3, 0)
    for lost in tmp_path.glob("ntl5-*.json"):
        lost.unlink()
    assert compared(tmp_path, "--dataset", "ntl3", "--out", str(tmp_path / "out.json")) == 0
    assert json.loads((tmp_path / "out.json").read_text())["comparisons"].keys() == {"ntl3"}
    assert compared(tmp_path, "--dataset", "ntl4") == 1
    assert "expected rows of dataset ntl4, found ntl3, ntl5" in " ".join(capsys.readouterr().err.split())
