from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from toolchain import artifact
from toolchain.config import validate
from toolchain.faults import ConfigError
from toolchain.tasks import Split, classification, load_data, load_task, save_data
from toolchain.tasks.classification import DataSection


def config(**sections: Any) -> dict[str, Any]:
    return {
        "name": "x",
        "task": "classification",
        "method": "prockd",
        "data": {"source": "digits"},
        "teacher": {"model": "tf_efficientnet_lite0"},
    } | sections


def faults(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(config(**sections))
    return str(caught.value)


def outputs(probabilities: np.ndarray) -> dict[str, np.ndarray]:
    return {"probabilities": probabilities.astype(np.float32), "label": probabilities.argmax(1)}


def test_score_and_agreement() -> None:
    rng = np.random.default_rng(0)
    a, b = outputs(rng.random((40, 8))), outputs(rng.random((40, 8)))
    truth = rng.integers(0, 8, 40)
    split = Split({"image": np.zeros((40, 2, 2, 1), np.uint8), "label": truth}, ("image",))
    scores = classification.score(a, split)
    assert list(scores) == ["accuracy", "top5"]
    assert scores[classification.HEADLINE] == pytest.approx(100 * np.mean(a["label"] == truth))
    assert classification.agreement(a, a) == 1.0
    assert classification.agreement(a, b) == np.mean(a["label"] == b["label"])
    few = Split({"label": truth[:4] % 3}, ())
    assert list(classification.score(outputs(rng.random((4, 3))), few)) == ["accuracy"]


def test_prepared_data_survives_the_artifact_and_can_be_shown(tmp_path: Path) -> None:
    data = classification.prepare(DataSection(source="digits", image_size=8, train_samples=50))
    with artifact.create(tmp_path / "data", stage="data", config={}) as draft:
        save_data(draft.path, data)
    loaded = load_data(tmp_path / "data")
    assert loaded.info == data.info
    split = loaded.splits["test"]
    assert split.feed(slice(3))["image"].shape == (3, 8, 8, 1)
    assert len(loaded.splits["train"]) == 50
    sample = classification.show(outputs(np.eye(10)[split.arrays["label"]]), split, 5)
    assert sample["truth"] == sample["prediction"] == str(split.arrays["label"][5])
    assert (sample["image"].shape, sample["image"].dtype) == ((8, 8, 1), np.uint8)


def test_a_sound_config_passes() -> None:
    cfg = validate(config(data={"source": "cifar10", "views": {"count": 2, "flip": True}}))
    assert cfg.data.views.flip
    assert cfg.teacher.probe.epochs == 40
    assert validate(config(method="plain", teacher=None)).teacher is None


def test_faults_between_sections_name_the_key() -> None:
    assert "teacher: method hinton learns from a teacher" in faults(method="hinton", teacher=None)
    mirrored = {"source": "digits", "views": {"count": 2, "flip": True}}
    assert "data.views.flip: a mirrored digit is not that digit" in faults(data=mirrored)
    tiny = {"source": "digits", "image_size": 8, "views": {"count": 2, "shift": 0.05}}
    assert "data.views: views.shift 0.05 of 8x8 pixels is less than one pixel" in faults(data=tiny)


def test_faults_in_a_section_name_the_key() -> None:
    assert "data.image_sise: unknown key; did you mean 'image_size'?" in faults(
        data={"source": "digits", "image_sise": 8}
    )
    assert "did you mean 'fashion_mnist'?" in faults(data={"source": "fashion-mnist"})
    assert "source folder needs path" in faults(data={"source": "folder"})
    assert "huggingface and the key dataset go together" in faults(data={"source": "digits", "dataset": "x"})
    assert "teacher.weights: expected hub, random, package:" in faults(teacher={"model": "m", "weights": "imagenet"})
    assert "student: small_cnn has no weights on the hub" in faults(student={"weights": "hub"})
    assert "teacher.taps: expected each layer once" in faults(teacher={"model": "m", "taps": ["a", "a"]})
    with pytest.raises(ValidationError):
        DataSection(source="digits", val_fraction=0)


def test_it_is_a_task_and_light_to_import() -> None:
    task = load_task("classification")
    assert (task.HEADLINE, task.HIGHER_IS_BETTER, task.STAGES) == ("accuracy", True, ("features", "teacher"))
    heavy = "'torch', 'PIL', 'sklearn', 'rich', 'datasets', 'timm'"
    code = (
        "import sys, toolchain.tasks.classification, toolchain.tasks.segmentation;"
        f"print([m for m in ({heavy}) if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
