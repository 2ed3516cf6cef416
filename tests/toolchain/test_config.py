from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolchain.config import Config, load, validate
from toolchain.faults import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = CONFIGS / "digits.yaml"


def fault(tmp_path: Path, text: str, *overrides: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    return str(error.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads(path: Path) -> None:
    cfg = load(path)
    assert cfg.name == path.stem
    assert Config.model_validate(cfg.model_dump()).name == cfg.name


def test_overrides_are_typed_and_nested() -> None:
    overrides = ["student.width=16", "train.lr=1e-3", "method.w_P=3", "compile.targets=[sm_89]", "bench.batches=[2]"]
    cfg = load(DIGITS, overrides)
    assert (cfg.student.width, cfg.train.lr, cfg.method.w_P) == (16, 1e-3, 3.0)
    assert (cfg.compile.targets, cfg.bench.batches) == (("sm_89",), (2,))


def test_an_unknown_key_names_file_line_key_and_nearest(tmp_path: Path) -> None:
    text = DIGITS.read_text().replace("  width: 32", "  widht: 32")
    line = text[: text.index("widht")].count("\n") + 1
    message = fault(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'mine.yaml'}:{line}: student.widht: unknown key; did you mean 'width'?")


def test_nested_keys_are_strict_too(tmp_path: Path) -> None:
    message = fault(tmp_path, DIGITS.read_text() + "\n", "export.parity.limits.fp16.agreemnt=0.9")
    assert "export.parity.limits.fp16.agreemnt" in message
    assert "did you mean 'agreement'?" in message
    assert message.startswith("command line:")


def test_a_fault_of_a_section_names_what_the_command_line_changed_in_it(tmp_path: Path) -> None:
    text = (CONFIGS / "trajectory_demo.yaml").read_text()
    message = fault(tmp_path, text, "data.scene=zara1", "train.epochs=2")
    line = text[: text.index("\ndata:") + 1].count("\n") + 1
    assert message.startswith(f"{tmp_path / 'mine.yaml'}:{line} with data.scene from the command line: data: scene has")


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_a_number_is_finite(tmp_path: Path, value: str) -> None:
    assert "train.lr: " in fault(tmp_path, DIGITS.read_text(), f"train.lr={value}")


def test_all_faults_are_reported_together(tmp_path: Path) -> None:
    message = fault(tmp_path, DIGITS.read_text(), "train.epochs=0", "student.wdth=3", "metod=x", "method.K=none")
    assert [key in message for key in ("train.epochs", "student.wdth", "metod", "method.K")] == [True] * 4


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("task=clasification", "did you mean 'classification'?"),
        ("method=prokd", "did you mean 'prockd'?"),
        ("method.preset=defualt", "did you mean 'default'?"),
        ("train.schedule=one-cycle", "did you mean 'one_cycle'?"),
        ("export.precisions=[fp32,fp61]", "did you mean 'fp16'?"),
        ("export.precisions=[fp16]", "fp32 must be among them"),
        ("compile.targets=[86]", "compile.targets"),
        ("compile.targets=sm_89", "compile.targets: expected a list, such as [a, b], found 'sm_89'"),
        ("export.precisions=[fp32,fp16]", "compile.precisions: int8-trt is not among export.precisions (fp32, fp16)"),
        ("compile.batch.max=4", "min <= opt <= max"),
        ("train=3", "expected a section"),
        ("name=../up", "name"),
        ("seed=yes", "seed: expected a number, not true or false, found True"),
        ("train.threads=true", "train.threads: expected a number"),
        ("bench.threads=100000", "bench.threads: "),
        ("train.clip=true", "train.clip: expected a number"),
        ("bench.batches=[true]", "bench.batches: expected a number"),
        ("export.parity.limits.fp16.max_difference=yes", "export.parity.limits.fp16.max_difference: expected a number"),
        ("student.width", "expected key=value"),
        ("task.x.y=1", "not a section"),
        ("task=no_such_package.task", "cannot import"),
        ("method=json", "no method 'json'"),
        ("method=os.path", "no pydantic model called Options"),
    ],
)
def test_bad_values(tmp_path: Path, override: str, part: str) -> None:
    assert part in fault(tmp_path, DIGITS.read_text(), override)


def test_a_wrong_item_is_one_fault(tmp_path: Path) -> None:
    assert fault(tmp_path, DIGITS.read_text(), "compile.targets=[sm86]").count("\n") == 0


def test_a_collapsing_prockd_is_refused(tmp_path: Path) -> None:
    assert "collapses" in fault(tmp_path, DIGITS.read_text(), "method.preset=default", "method.w_T=0", "method.w_KL=1")


@pytest.mark.parametrize("text", ["", "- a", "a: [", "a: 1\n\tb: 2", "3", "!!python/object:os.system {}", "\x00"])
def test_what_is_not_a_mapping(tmp_path: Path, text: str) -> None:
    assert str(tmp_path / "mine.yaml") in fault(tmp_path, text)


def test_a_key_given_twice_names_both_lines(tmp_path: Path) -> None:
    text = "task: classification\ntrain:\n  epochs: 3\n  lr: 0.1\n  epochs: 4\ntrain: {}\n"
    file = tmp_path / "mine.yaml"
    assert fault(tmp_path, text).splitlines() == [
        f"{file}:5: train.epochs: is on line 3 too; remove one",
        f"{file}:6: train: is on line 2 too; remove one",
    ]
    assert "not valid YAML" in fault(tmp_path, "a: &a {b: *a}\n")


def test_a_missing_file_suggests_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*digits\.yaml"):
        load(CONFIGS / "digit.yaml")


def test_a_method_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "__init__.py").touch()
    (tmp_path / "my_lab" / "dropout_kd.py").write_text(
        "from typing import Literal\nfrom toolchain.section import Section\n"
        "class Options(Section):\n    name: Literal['my_lab.dropout_kd']\n    rate: float = 0.5\n"
    )
    text = (tmp_path / "my_lab" / "dropout_kd.py").read_text()
    (tmp_path / "my_lab" / "half.py").write_text(text)
    (tmp_path / "my_lab" / "dropout_kd.py").write_text(text + "def distill(cfg, run): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "has no function distill" in fault(tmp_path, DIGITS.read_text(), "method=my_lab.half")
    assert "PYTHONPATH" in fault(tmp_path, DIGITS.read_text(), "method=your_lab.kd")
    assert load(DIGITS, ["method={name: my_lab.dropout_kd, rate: 0.1}"]).method.rate == 0.1
    assert "did you mean 'rate'?" in fault(tmp_path, DIGITS.read_text(), "method={name: my_lab.dropout_kd, rte: 0.1}")


def test_a_wrong_config_is_told_before_torch_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom toolchain import config\n"
        f"try:\n    config.load({str(DIGITS)!r}, ['student.widht=3'])\nexcept config.ConfigError:\n    pass\n"
        "heavy = {'torch', 'timm', 'onnx', 'onnxruntime', 'transformers', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


VALID: dict[str, Any] = yaml.safe_load(DIGITS.read_text())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=8), child, max_size=3),
    max_leaves=8,
)


def paths(value: Any, here: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [here]
    if isinstance(value, dict):
        for key, item in value.items():
            found += paths(item, (*here, key))
    return found


@st.composite
def malformed(draw: st.DrawFn) -> dict[Any, Any]:
    """The digits config with up to three keys replaced, removed or added anywhere."""
    config = yaml.safe_load(DIGITS.read_text())
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(paths(config)))
        place: Any = config
        for key in where[:-1]:
            place = place[key]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "add" or not where:
            target = place[where[-1]] if where else place
            if isinstance(target, dict):
                target[draw(st.text(max_size=8) | st.integers() | st.none())] = draw(JSON)
        elif action == "remove":
            place.pop(where[-1])
        else:
            place[where[-1]] = draw(JSON)
    return config


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(malformed())
def test_malformed_configs_never_end_in_a_traceback(config: dict[Any, Any]) -> None:
    try:
        assert isinstance(validate(config), Config)
    except ConfigError as error:
        assert str(error).strip()


def test_another_encoding_is_told_without_a_guess_of_the_name(tmp_path: Path) -> None:
    path = tmp_path / "any.yaml"
    path.write_text("name: a", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"any\.yaml: expected a text file in UTF-8, .*; save it anew$"):
        load(path)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text() | st.binary().map(lambda b: b.decode("latin-1")))
def test_any_text_as_a_config_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("any") / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(ConfigError):
        load(path)
