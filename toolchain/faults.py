"""What is wrong with a config, told in a line per fault: file, line, key, what is allowed, the nearest spelling.

Imports neither torch nor numpy.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from toolchain.artifact import UsageError

Fault = tuple[tuple[Any, ...], str]


class ConfigError(UsageError):
    """The config is wrong; the message has a line per fault."""


def told(
    faults: Sequence[Fault],
    source: str,
    lines: Mapping[tuple[Any, ...], int] | None = None,
    overridden: set[tuple[Any, ...]] | None = None,
) -> ConfigError:
    """The error to raise for ``faults``: a line for each, with its place in ``source``."""
    return ConfigError("\n".join(_render(fault, source, lines or {}, overridden or set()) for fault in faults))


def _render(fault: Fault, source: str, lines: Mapping[tuple[Any, ...], int], overridden: set[tuple[Any, ...]]) -> str:
    where, message = fault
    key = ".".join(str(part) for part in where)
    if any(where[: len(k)] == k for k in overridden):
        place = "command line"
    else:
        line = next((lines[where[:n]] for n in range(len(where), 0, -1) if where[:n] in lines), None)
        place = f"{source}:{line}" if line else source
        below = sorted(".".join(map(str, k)) for k in overridden if where and k[: len(where)] == where)
        place += f" with {', '.join(below)} from the command line" if below else ""
    return f"{place}: {key + ': ' if key else ''}{message}"


def checked(model: type[BaseModel], value: Any, where: tuple[Any, ...], faults: list[Fault]) -> Any:
    """``value`` as ``model``, or None, with what is wrong added to ``faults``; ``where``: the keys above it."""
    if value is None:
        value = {}
    if not isinstance(value, dict):
        faults.append((where, f"expected a section (a mapping of keys), found {kind(value)}"))
        return None
    if bad := [key for key in value if not isinstance(key, str)]:
        faults.append((where, f"keys must be text, found {bad[0]!r}"))
        return None
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False)
        inside = {entry["loc"][:-1] for entry in found}  # a list whose items are wrong is called too short as well
        found = [entry for entry in found if entry["type"] != "too_short" or entry["loc"] not in inside]
        faults.extend(((*where, *_path(entry["loc"])), _explain(model, entry)) for entry in found)
        return None
    except RecursionError:
        faults.append((where, "nested too deeply"))
        return None


def _path(loc: Sequence[Any]) -> tuple[Any, ...]:
    tags = ("function-", "constrained", "literal", "nullable", "is-instance")
    return tuple(part for part in loc if not (isinstance(part, str) and (part.startswith(tags) or "[" in part)))


def _explain(model: type[BaseModel], entry: Any) -> str:
    if entry["type"] == "extra_forbidden":
        names = _keys_at(model, entry["loc"][:-1])
        return f"unknown key; {allowed(str(entry['loc'][-1]), names)}"
    if entry["type"] == "missing":
        return "is missing"
    message = entry["msg"].removeprefix("Value error, ")
    found = entry.get("input")
    if entry["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "expected a section (a mapping of keys)"
    elif entry["type"] == "tuple_type":
        message = "expected a list, such as [a, b]"
    elif entry["type"] == "value_error" and isinstance(found, (dict, list)):
        return str(message)
    if entry["type"] == "literal_error" and isinstance(found, str):
        choices = [c.strip("' ") for c in entry["ctx"]["expected"].replace(" or ", ",").split(",")]
        return f"found {found!r}; {allowed(found, choices)}"
    shown = repr(found) if isinstance(found, (str, int, float, bool, type(None))) else kind(found)
    return f"{message[:1].lower()}{message[1:]}, found {shown[:80]}"


def _keys_at(model: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    current: Any = model
    for part in loc:
        if isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            current = _model_of(current.model_fields[part].annotation)
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _model_of(annotation: Any) -> Any:
    """The section inside ``Section | None``, ``tuple[Section, ...]`` or ``dict[str, Section]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is not None:
        for argument in get_args(annotation):
            found = _model_of(argument)
            if found is not None:
                return found
    return None


def allowed(found: str, names: Sequence[str]) -> str:
    """What may stand in place of ``found``, the nearest spelling first."""
    near = difflib.get_close_matches(found, names, 1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(names)}"


def kind(value: Any) -> str:
    """What YAML calls a value of this type."""
    kinds = {dict: "a mapping", list: "a list", str: "text", bool: "true/false", type(None): "nothing"}
    return kinds.get(type(value), f"a {type(value).__name__}")
