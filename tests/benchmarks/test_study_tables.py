"""The tables of trajectory studies."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import study_tables

SCENES = ("eth", "hotel", "univ", "zara1", "zara2")


def row(dataset: str, method: str, seed: int, ade: float, selected: float | None = None) -> dict[str, Any]:
    metrics = {"minADE": ade, "minFDE": 2 * ade, "meanADE": 10 * ade, "meanFDE": 20 * ade}
    if selected is not None:
        metrics |= {"test_selected_minADE": selected, "test_selected_minFDE": 2 * selected}
    value = {"dataset": dataset, "method": method, "seed": seed, "metrics": metrics, "device": "a GPU"}
    return value | {"protocol": "leave one out."}


def five(method: str, seed: int, *ades: float) -> list[dict[str, Any]]:
    return [row(scene, method, seed, ade) for scene, ade in zip(SCENES, ades, strict=True)]


def lines(rows: list[dict[str, Any]]) -> list[str]:
    return study_tables.study_table(rows).splitlines()


def test_five_scenes_have_an_average_and_its_spread() -> None:
    rows = five("ppt", 0, 0.1, 0.2, 0.3, 0.4, 0.5) + five("ppt", 1, 0.2, 0.3, 0.4, 0.5, 0.6)
    found = lines(rows[::-1])
    assert found[0] == "| method | ETH | HOTEL | UNIV | ZARA1 | ZARA2 | AVG | seeds |"
    assert found[2] == (
        "| constant velocity (K = 1) | 1.075/2.282 | .319/.614 | .524/1.165 | .427/.952 | .324/.724 | .534/1.147 | – |"
    )
    assert found[3] == (
        "| PPT, published (test-selected) | .36/.51 | .11/.15 | .22/.40 | .17/.30 | .12/.21 | .20/.31 | – |"
    )
    # means over seeds 0.3 and 0.4: sd 0.0707, of minFDE twice that
    assert (
        found[4] == "| ppt | .150/.300 | .250/.500 | .350/.700 | .450/.900 | .550/1.100 | .350/.700 ± .071/.141 | 2 |"
    )
    text = "\n".join(found)
    assert "| ppt | 1.500/3.000 | 2.500/5.000 |" in text
    assert "in metres" in text
    assert "arXiv 2407.11588" in text
    assert "plain mean of the five scenes" in text
    assert found[-1] == "leave one out. Computed on a GPU."


def test_seeds_that_a_scene_lacks_are_not_in_the_spread() -> None:
    rows = five("ppt", 0, 0.1, 0.2, 0.3, 0.4, 0.5) + five("ppt", 1, 0.2, 0.3, 0.4, 0.5, 0.6)[:4]
    assert lines(rows)[4].endswith("| .500/1.000 | .340/.680 | 1–2 |")


def test_an_ablation_on_one_scene_has_its_spread_there_and_no_average() -> None:
    rows = five("ppt", 0, 0.1, 0.2, 0.3, 0.4, 0.5)
    rows += [row("zara1", "ppt-branches", 0, 0.3), row("zara1", "ppt-branches", 1, 0.4)]
    assert lines(rows)[5] == "| ppt-branches | – | – | – | .350/.700 ± .071/.141 | – | – | 2 |"


def test_test_selected_scores_stand_in_rows_of_their_own() -> None:
    rows = [row("zara1", "ppt", 0, 0.2, selected=0.18), row("zara1", "student", 0, 0.21)]
    found = lines(rows)
    assert found[0] == "| method | ZARA1 | seeds |"
    assert found[2:7] == [
        "| constant velocity (K = 1) | .427/.952 | – |",
        "| PPT, published (test-selected) | .17/.30 | – |",
        "| ppt | .200/.400 | 1 |",
        "| student | .210/.420 | 1 |",
        "| ppt (test-selected) | .180/.360 | 1 |",
    ]
    assert any(line.startswith("(test-selected): the epoch") for line in found)


def test_a_teachers_scores_stand_in_a_row_below_its_students() -> None:
    student = row("zara1", "student", 0, 0.21)
    student["metrics"] |= {"teacher_minADE": 0.2, "teacher_minFDE": 0.4}
    found = lines([row("zara1", "ppt", 0, 0.3, selected=0.25), student])
    assert found[4:8] == [
        "| ppt | .300/.600 | 1 |",
        "| student | .210/.420 | 1 |",
        "| student (its teacher) | .200/.400 | 1 |",
        "| ppt (test-selected) | .250/.500 | 1 |",
    ]
    assert any(line.startswith("(its teacher): what taught") for line in found)
    assert "(its teacher)" not in "\n".join(lines([row("zara1", "ppt", 0, 0.3)]))


def test_a_teachers_validation_scores_stand_in_the_table_of_that_split() -> None:
    student = row("zara1", "student", 0, 0.21)
    student["metrics"] |= {"teacher_minADE": 0.2, "teacher_minFDE": 0.4, "val_minADE": 0.31, "val_minFDE": 0.61}
    student["metrics"] |= {"val_teacher_minADE": 0.3, "val_teacher_minFDE": 0.6}
    found = study_tables.study_table([student], split="validation").splitlines()
    assert found[2:4] == ["| student | .310/.610 | 1 |", "| student (its teacher) | .300/.600 | 1 |"]


def test_a_method_that_the_test_split_selected_has_no_row_among_the_others() -> None:
    selected = row("zara1", "habit", 0, 9, selected=0.17)
    selected["metrics"] = {name: value for name, value in selected["metrics"].items() if "selected" in name}
    found = lines([row("zara1", "ppt", 0, 0.2), selected])
    assert [line for line in found if "habit" in line] == ["| habit (test-selected) | .170/.340 | 1 |"]


def test_other_data_have_no_references_and_no_average() -> None:
    rows = [row("simulator", "ppt", 0, 0.2), row("simulator", "ppt", 0, 0.3)]
    found = lines(rows)
    assert found[0] == "| method | SIMULATOR | seeds |"
    assert found[2] == "| ppt | .300/.600 | 1 |"
    text = "\n".join(found)
    assert "published" not in text
    assert "in the unit of the data" in text


def test_scores_of_the_validation_split_stand_beside_no_published_ones() -> None:
    tried = row("zara1", "scale 10", 0, 0.2)
    tried["metrics"] |= {f"val_{name}": 2 * value for name, value in tried["metrics"].items()}
    found = study_tables.study_table([tried, row("zara1", "without", 0, 0.1)], split="validation").splitlines()
    assert found[:3] == ["| method | ZARA1 | seeds |", "|---|--:|--:|", "| scale 10 | .400/.800 | 1 |"]
    assert any(line.startswith("minADE/minFDE on the validation split, in metres") for line in found)
    assert "published" not in "\n".join(found)
    assert study_tables.study_table([row("zara1", "without", 0, 0.1)], split="validation") == "No results yet.\n"


def test_devices_are_told_apart() -> None:
    rows = [row("zara1", "ppt", 0, 0.2), row("zara1", "student", 0, 0.21) | {"device": "a CPU"}]
    assert lines(rows)[-1] == "leave one out. Computed on a GPU (ppt); a CPU (student)."


@pytest.mark.parametrize(
    ("pair", "text"), [((0.174, 0.321), ".174/.321"), ((1.0749, 12.5), "1.075/12.500"), ((0.9996, 0.0), "1.000/.000")]
)
def test_errors_below_one_begin_with_the_point(pair: tuple[float, float], text: str) -> None:
    assert study_tables.errors(pair) == text


def test_the_references_are_whole() -> None:
    known = json.loads(study_tables.REFERENCES.read_text(encoding="utf-8"))
    assert known["columns"] == list(SCENES)
    for one in known["rows"]:
        assert set(SCENES) <= set(one["scores"])
        assert one["source"]


def test_questions_have_a_column_for_each_average_that_all_rows_have() -> None:
    scores = {"gxlt_f1": 50.0, "gxlt_em": 30.0, "xlt_f1": 55.0, "gxlt_off_f1": 48.0, "unseen_f1": 40.0}
    rows = [
        {"dataset": "ntl2", "method": method, "seed": seed, "parameters": 4_000_000}
        | {"metrics": {name: value + seed + gain for name, value in scores.items()}}
        for method, gain in (("ce", 0), ("skd", 2))
        for seed in (0, 1)
    ]
    found = lines(rows)
    assert found[0].endswith(
        "| difference to ce ± sd [95 %] | G-XLT EM | XLT F1 | G-XLT F1 off the diagonal | F1, languages not trained on "
        "| seeds |"
    )
    assert found[2].startswith("| ntl2 | skd | 4 M | gxlt_f1 | 52.50 ± 0.71 | +2.00 ± 0.00")
    assert found[2].endswith("| 32.50 ± 0.71 | 57.50 ± 0.71 | 50.50 ± 0.71 | 42.50 ± 0.71 | 2 |")
    del rows[0]["metrics"]["unseen_f1"]
    assert "not trained on" not in lines(rows)[0]
