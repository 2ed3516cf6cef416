"""The base of every config section."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Strict keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
