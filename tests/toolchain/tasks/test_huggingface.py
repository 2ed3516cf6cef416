from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.toolchain.tasks.image_doubles import write_classes
from toolchain.tasks.classification import DataSection, prepare
from toolchain.tasks.datasets import DataError


def test_huggingface_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        prepare(DataSection(source="huggingface", dataset="x/y", download=True))


class Rows(list[dict[str, Any]]):
    """What is used of a datasets.Dataset."""

    def __init__(self, rows: list[dict[str, Any]], names: list[str] | None) -> None:
        super().__init__(rows)
        self.column_names = list(rows[0])
        self.features = {"label": SimpleNamespace(names=names) if names else SimpleNamespace()}

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[Any]], names: list[str] | None = None) -> None:
    image = Image.new("RGB", (9, 9))
    loaded = {k: Rows([{"image": image, "label": v} for v in values], names) for k, values in splits.items()}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: loaded))


def load_hub(**keys: Any) -> Any:
    return prepare(DataSection(source="huggingface", dataset="x/y", download=True, image_size=8, **keys))


def test_huggingface_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, {"train": [0, 1] * 10, "validation": [1, 0]}, ["cat", "dog"])
    data = load_hub()
    assert data.info["classes"] == ["cat", "dog"]
    assert {name: len(s) for name, s in data.splits.items()} == {"train": 16, "val": 2, "test": 4}
    assert data.info["note"] == "no test split given: of the training images were drawn test 4 (20 %)"
    hub(monkeypatch, {"train": ["b", "a"] * 10, "test": ["b", "a"]})
    data = load_hub()
    assert data.info["note"] is None
    assert data.info["classes"] == ["a", "b"]
    assert data.splits["test"].arrays["label"].tolist() == [1, 0]


def test_huggingface_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, {"train": [0, 1] * 10, "test": [-1, -1]}, ["cat", "dog"])
    with pytest.raises(DataError, match="split test: expected labels among the 2"):
        load_hub()
    with pytest.raises(DataError, match=r"no column 'img', found \['image', 'label'\]"):
        load_hub(image_column="img")
    hub(monkeypatch, {"train": [0, 1] * 10}, ["cat", "dog"])
    with pytest.raises(DataError, match="expected an image in 'label'"):
        load_hub(image_column="label")
    hub(monkeypatch, {"test": [0]})
    with pytest.raises(DataError, match="expected a split called train"):
        load_hub()
    hub(monkeypatch, {"train": [0, 1], "extra": [7]})
    with pytest.raises(DataError, match="only train, val and test, found 'extra'; put the splits that you want"):
        load_hub()
    hub(monkeypatch, {"train": [0, 1], "val": [1], "validation": [0]})
    with pytest.raises(DataError, match="one split val, found 'val' and 'validation'"):
        load_hub()

    def fail(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("no such dataset")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fail))
    with pytest.raises(DataError, match=r"no such dataset\); check data\.dataset"):
        load_hub()


def test_huggingface_asks_before_it_fetches() -> None:
    with pytest.raises(DataError, match=r"'x/y': expected a local folder.*data\.download=true"):
        prepare(DataSection(source="huggingface", dataset="x/y"))


def test_huggingface_reads_a_local_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for name, count in (("train", 12), ("test", 3)):
        write_classes(tmp_path / name, {"a": count, "b": count})
    data = prepare(DataSection(source="huggingface", dataset=str(tmp_path), image_size=8))
    assert data.info["classes"] == ["a", "b"]
    assert len(data.splits["test"]) == 6
