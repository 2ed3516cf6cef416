"""What the networks of every task share: the form of a deployable one, modules of the user's own, sizes."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn

from toolchain.artifact import Port
from toolchain.tasks.backbones import ModelError

_DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass
class Deploy:
    """A module ready for export: ``module(*example.values())`` gives a tuple in the order of ``outputs``.

    ``files`` (texts) and ``arrays`` ship beside the graph, by name.
    """

    module: nn.Module
    inputs: list[Port]
    outputs: list[Port]
    example: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def is_own(model: str) -> bool:
    """Whether ``model`` names a function of the user's own, as ``package.module:function``."""
    return bool(_DOTTED.fullmatch(model))


def own(path: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` names. Raises ModelError."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module may raise anything while it is imported
        remedy = "expected package.module:function, installed or on PYTHONPATH"
        raise ModelError(f"student.model {path!r}: {error}; {remedy}") from error
    if not callable(found):
        raise ModelError(f"student.model {path!r}: {type(found).__name__} is no function or class")
    return found  # type: ignore[no-any-return]


def made_by(make: Callable[..., Any], section: Any, **given: Any) -> nn.Module:
    """What ``make`` gives for ``given`` and the options of a ``StudentSection``. Raises ModelError."""
    try:
        net = make(**given, **section.options)
    except (TypeError, ValueError) as error:
        raise ModelError(f"student.options {section.options} do not suit {section.model}: {error}") from error
    except Exception as error:  # a user's function may raise anything
        raise ModelError(f"student.model {section.model} fails: {type(error).__name__}: {error}") from error
    if not isinstance(net, nn.Module):
        raise ModelError(f"student.model {section.model} should give an nn.Module, found {type(net).__name__}")
    return net
