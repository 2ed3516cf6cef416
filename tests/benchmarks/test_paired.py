from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import paired, tables


def samples(folder: Path, name: str, shift: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = {
        f"q{n}_{pair}": float(v)
        for n in range(60)
        for pair, v in zip(("en-en", "en-es"), rng.uniform(0, 90, 2), strict=True)
    }
    noise = np.random.default_rng(len(name)).normal(0, 1, len(base))
    value = {"cells": {key: item + shift + float(n) for (key, item), n in zip(base.items(), noise, strict=True)}}
    (folder / f"{name}-{seed}.json").write_text(json.dumps(value))


def test_methods_are_compared_by_question_over_their_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        samples(tmp_path, "ntl3-ce", 0, seed)
        samples(tmp_path, "ntl3-skd-map", 3, seed)
    samples(tmp_path, "ntl5-ce", 0, 0)
    assert paired.main([str(tmp_path), "--out", str(tmp_path / "out.json")]) == 0
    told = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    assert told["ntl5"] == []
    (row,) = told["ntl3"]
    assert (row["method"], row["part"], row["seeds"], row["n"]) == ("skd-map", "cells", [0, 1], 60)
    assert 2 < row["low"] < row["mean"] < row["high"] < 4
    assert row["p"] < 0.01
    assert row["p_wilcoxon"] < 0.01
    assert (line := "| ntl3 | skd-map | cells |") in capsys.readouterr().out
    text = "<!-- results:out -->\n<!-- /results -->\n"
    assert line in (shown := tables.render(text, tmp_path, "README.md"))
    assert paired.NOTE in shown


def test_a_missing_baseline_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paired.main([str(tmp_path)]) == 1
    assert "expected samples of a method ce, found none" in " ".join(capsys.readouterr().err.split())
