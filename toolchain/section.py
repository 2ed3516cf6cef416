"""The base of every config section."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, field_validator
from pydantic_core.core_schema import ValidationInfo


class Section(BaseModel):
    """Strict keys, immutable; true and false are not numbers, and numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = list(_kinds(cls.model_fields[str(info.field_name)].annotation))
        if (int in kinds or float in kinds) and bool not in kinds and Any not in kinds and _holds_bool(value):
            raise ValueError("expected a number, not true or false")
        return value


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types inside ``tuple[Annotated[int, ...], ...] | None``."""
    yield annotation
    for argument in get_args(annotation):
        yield from _kinds(argument)


def _holds_bool(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, bool) or (isinstance(value, (list, tuple)) and any(map(_holds_bool, value)))
