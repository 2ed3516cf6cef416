"""A YAML file becomes a validated config, whole, before anything runs.

Unknown keys and bad values name the file, the line, the key, what is allowed and the nearest spelling.
Imports neither torch nor numpy.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, field_validator, model_validator

from toolchain.artifact import MOST_THREADS, digest
from toolchain.faults import ConfigError, Fault, allowed, checked, kind, told
from toolchain.methods.options import OPTIONS
from toolchain.section import Section

Precision = Literal["fp32", "fp16", "int8-cpu", "int8-trt"]
Positive = Annotated[int, Field(ge=1)]
Threads = Annotated[int, Field(ge=1, le=MOST_THREADS)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class TrainSection(Section):
    """One training: AdamW; ``lr`` is the peak learning rate.

    ``batch_size`` counts the samples of all ``processes`` together; there is one process per GPU. The validation
    split is scored every ``score_every`` epochs and after the last; ``select: best`` chooses among those. A checkpoint
    is due every ``checkpoint_seconds``; where saving is slow, up to ten times less often.
    """

    epochs: Positive = 30
    batch_size: Positive = 128
    lr: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    schedule: Literal["one_cycle", "cosine", "linear", "constant"] = "one_cycle"
    warmup: Fraction = 0.1
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulate: Positive = 1
    select: Literal["last", "best"] = "last"
    score_every: Positive = 1
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 30.0
    threads: Threads | None = None
    processes: Positive = 1


class Limits(Section):
    """What a step of the chain may lose against the step before it, on real held-out samples.

    ``max_difference``: largest absolute difference of any float output; ``agreement``: least share of equal
    predictions; ``metric_drop``: points of the headline metric.
    """

    max_difference: Annotated[float, Field(gt=0)] | None = None
    agreement: Fraction = 0.0
    metric_drop: Annotated[float, Field(ge=0)] = 100.0


def _limits() -> dict[Precision, Limits]:
    return {
        "fp32": Limits(max_difference=1e-3, agreement=0.999, metric_drop=0.1),
        "fp16": Limits(max_difference=0.05, agreement=0.99, metric_drop=0.5),
        "int8-cpu": Limits(agreement=0.95, metric_drop=2.0),
        "int8-trt": Limits(agreement=0.95, metric_drop=2.0),
    }


class ParitySection(Section):
    samples: Positive = 512
    limits: dict[Precision, Limits] = Field(default_factory=_limits)

    @field_validator("limits")
    @classmethod
    def _complete(cls, value: dict[Precision, Limits]) -> dict[Precision, Limits]:
        return _limits() | value


class CalibrationSection(Section):
    samples: Positive = 256
    method: Literal["minmax", "entropy", "percentile"] = "minmax"


class ExportSection(Section):
    opset: Annotated[int, Field(ge=17, le=23)] = 20
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8-cpu", "int8-trt")
    calibration: CalibrationSection = CalibrationSection()
    dynamic_int8: bool = False
    parity: ParitySection = ParitySection()

    @field_validator("precisions")
    @classmethod
    def _fp32(cls, value: tuple[Precision, ...]) -> tuple[Precision, ...]:
        if "fp32" not in value:
            raise ValueError("fp32 must be among them: the other precisions are made from it")
        return tuple(dict.fromkeys(value))


class Range(Section):
    """Least, usual and greatest size of a dynamic dimension."""

    min: Positive = 1
    opt: Positive = 8
    max: Positive = 64

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"expected min <= opt <= max, found {self.min}, {self.opt}, {self.max}")
        return self


Target = Annotated[str, Field(pattern=r"^sm_\d{2,3}$")]


class CompileSection(Section):
    backend: Literal["auto", "tensorrt", "tensorrt-rtx", "none"] = "auto"
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = ("sm_86",)
    precisions: tuple[Literal["fp32", "fp16", "int8-trt"], ...] = ("fp16", "int8-trt")
    batch: Range = Range()
    shapes: dict[str, Range] = Field(default_factory=dict)
    workspace_mb: Positive = 1024


class BenchSection(Section):
    batches: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 8, 64)
    seconds: Annotated[float, Field(gt=0)] = 1.0
    rounds: Positive = 5
    warmup_ms: Annotated[float, Field(ge=0)] = 200.0
    threads: Threads = 2
    paced_fps: Annotated[float, Field(gt=0)] = 30.0
    paced_seconds: Annotated[float, Field(ge=0)] = 2.0
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    teacher: bool = True


class ReportSection(Section):
    """``max_drop``: accuracy budget, in points of the headline metric below the student in torch."""

    max_drop: Annotated[float, Field(ge=0)] = 2.0


class Config(Section):
    """A whole pipeline. ``data``, ``teacher``, ``student`` are the task's models; ``method`` is the method's."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    task: str
    method: Any
    data: Any
    teacher: Any = None
    student: Any = None
    train: TrainSection = TrainSection()
    export: ExportSection = ExportSection()
    compile: CompileSection = CompileSection()
    bench: BenchSection = BenchSection()
    report: ReportSection = ReportSection()

    def section(self, *keys: str) -> dict[str, Any]:
        """The named sections as JSON values: what a stage depends on."""
        whole = self.model_dump(mode="json")
        return {key: whole[key] for key in keys}

    @property
    def sha256(self) -> str:
        return digest(self.model_dump(mode="json"))


def validates_on_test(config: Config) -> bool:
    """Whether the test split selects what this config trains: then all that is found must be told as such."""
    return getattr(config.data, "validation", None) == "test"


def trains_on_validation(config: Config) -> bool:
    """Whether the validation windows train too: then scores on that split are of what trained."""
    return getattr(config.data, "validation", None) == "train"


def load(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read ``path``, apply ``key.sub=value`` overrides, validate. Raises ConfigError with every fault found."""
    path = Path(path)
    value, lines = read_yaml(path)
    overridden = apply_overrides(value, overrides)
    return validate(value, source=str(path), lines=lines, overridden=overridden)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[Any, ...], int]]:
    """A YAML mapping and the line of each key. Raises ConfigError, for a key given twice too."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected a text file in UTF-8, found other bytes ({error}); save it anew"
        ) from error
    except (OSError, ValueError) as error:
        near = (
            difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
            if path.parent.is_dir()
            else []
        )
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}){hint}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
        lines: dict[tuple[Any, ...], int] = {}
        twice = _collect_lines(node, (), lines)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid YAML: {problem}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {kind(value)}")
    if twice:
        faults = [(where, f"is on line {first} too; remove one") for where, first, _ in twice]
        raise told(faults, source=str(path), lines={where: second for where, _, second in twice})
    return value, lines


def _collect_lines(
    node: Any, where: tuple[Any, ...], lines: dict[tuple[Any, ...], int]
) -> list[tuple[tuple[Any, ...], int, int]]:
    """Fill ``lines``; returns the keys that are given twice, with both lines."""
    twice = []
    if isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            here, line = (*where, getattr(key, "value", None)), key.start_mark.line + 1
            if not isinstance(here[-1], str):
                continue
            if here in lines:
                twice.append((here, lines[here], line))
            else:
                lines[here] = line
                twice += _collect_lines(child, here, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            lines[(*where, index)] = child.start_mark.line + 1
            twice += _collect_lines(child, (*where, index), lines)
    return twice


def apply_overrides(value: dict[str, Any], overrides: Sequence[str]) -> set[tuple[Any, ...]]:
    """Set ``a.b=value`` (value read as YAML) in place; returns the keys set."""
    done = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"override {override!r}: expected key=value, for example train.epochs=5")
        try:
            item = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
        if isinstance(item, str):
            item = _number(item)
        *parents, last = key.split(".")
        if parents[:1] == ["method"] and isinstance(value.get("method"), str):
            value["method"] = {"name": value["method"]}
        place = value
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            if not isinstance(place[parent], dict):
                raise ConfigError(f"override {override!r}: {parent} is not a section")
            place = place[parent]
        place[last] = item
        done.add(tuple(key.split(".")))
    return done


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def validate(
    value: Mapping[str, Any],
    *,
    source: str = "config",
    lines: Mapping[tuple[Any, ...], int] | None = None,
    overridden: set[tuple[Any, ...]] | None = None,
) -> Config:
    """Validate a whole config; all faults are reported together. Raises ConfigError."""
    faults: list[Fault] = []
    value = dict(value)
    sections: dict[str, Any] = {}
    if isinstance(value.get("method"), str):
        value["method"] = {"name": value["method"]}
    task = _task(value.get("task"), faults) if "task" in value else None
    method = _method(value.get("method"), faults) if "method" in value else None
    if task is not None:
        from toolchain.tasks import defaults_of

        value = _below(value, defaults_of(task, value.get("data")))
        models = {"data": task.DataSection, "student": task.StudentSection, "teacher": task.TeacherSection}
        for key, model in models.items():
            if model is None or (key == "teacher" and value.get(key) is None):
                if value.get(key) is not None:
                    faults.append(((key,), f"task {value['task']} has no {key} section"))
                sections[key] = None
            else:
                sections[key] = checked(model, value.get(key), (key,), faults)
    if method is not None:
        sections["method"] = checked(method, value["method"], ("method",), faults)
    rest = {key: item for key, item in value.items() if key not in sections}
    config = checked(
        Config, rest | {key: sections.get(key, {}) for key in ("data", "method") if key in value}, (), faults
    )
    if config is not None and not faults:
        config = config.model_copy(update=sections)
        for check in (getattr(task, "check", None), getattr(sections["method"], "check", None)):
            if check is not None:
                faults.extend(check(config))
    if config is not None and config.compile.backend != "none":
        where = ("compile", "precisions")
        made = config.export.precisions
        faults.extend(
            (where, f"{name} is not among export.precisions ({', '.join(made)}); add it there, or remove it here")
            for name in config.compile.precisions
            if name not in made
        )
    if faults or config is None:
        raise told(faults, source, lines, overridden)
    assert isinstance(config, Config)
    return config


def _below(value: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` with ``defaults`` where it has nothing of its own, inside its sections too."""
    found = dict(value)
    for key, item in defaults.items():
        mine = found.get(key)
        if mine is None:
            found[key] = item
        elif isinstance(mine, Mapping) and isinstance(item, Mapping):
            found[key] = _below(mine, item)
    return found


S = TypeVar("S", bound=BaseModel)


def validate_section(
    model: type[S],
    value: Mapping[str, Any],
    source: str | None = None,
    lines: Mapping[tuple[Any, ...], int] | None = None,
    overridden: set[tuple[Any, ...]] | None = None,
) -> S:
    """One section on its own, as a stage reads it from its job. Raises ConfigError; its lines start with ``source``."""
    faults: list[Fault] = []
    section = checked(model, dict(value), (), faults)
    if section is None:
        raise told(faults, source or model.__name__, lines, overridden)
    assert isinstance(section, model)
    return section


def _task(name: Any, faults: list[Fault]) -> Any:
    from toolchain.tasks import built_in, load_task

    if not isinstance(name, str):
        faults.append((("task",), f"expected one of {', '.join(built_in())}, found {kind(name)}"))
        return None
    if "." not in name and name not in built_in():
        faults.append(
            (("task",), f"no task {name!r}; {allowed(name, built_in())}, or the dotted path of your own module")
        )
        return None
    try:
        return load_task(name)
    except Exception as error:  # a user's module may raise anything while it is imported
        faults.append((("task",), f"cannot import {name!r}: {type(error).__name__}: {error}"))
        return None


def _method(value: Any, faults: list[Fault]) -> type[BaseModel] | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        faults.append((("method",), f"expected a method's name, or a mapping with `name`: {', '.join(OPTIONS)}"))
        return None
    name: str = value["name"]
    if name in OPTIONS:
        return OPTIONS[name]
    where = ("method", "name")
    if "." not in name:
        faults.append(
            (where, f"no method {name!r}; {allowed(name, list(OPTIONS))}, or the dotted path of your own module")
        )
        return None
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a user's module may raise anything while it is imported
        hint = "; install it, or put its folder on PYTHONPATH" if isinstance(error, ModuleNotFoundError) else ""
        faults.append((where, f"cannot import {name!r}: {type(error).__name__}: {error}{hint}"))
        return None
    options = getattr(module, "Options", None)
    if not (isinstance(options, type) and issubclass(options, BaseModel)):
        faults.append((where, f"{name} has no pydantic model called Options with a `name` field"))
        return None
    if not callable(getattr(module, "distill", None)):
        faults.append((where, f"{name} has no function distill(cfg, run) that returns the student"))
        return None
    return options
