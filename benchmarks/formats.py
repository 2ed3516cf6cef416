"""Numbers and tables as text, the same in the terminal, in Markdown and in HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from toolchain.artifact import EdgestillError


class TableError(EdgestillError):
    """A results file or a document's markers are wrong, or a table is out of date."""


def count(value: int | None) -> str:
    if value is None:
        return "–"
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}" if value < 1000 * limit else f"{value / limit:,.0f} {unit}"
    return str(value)


def size(value: int | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1e6:.2f} MB" if value >= 1e5 else f"{value / 1e3:.1f} kB"


def ms(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "–"
    return (
        f"{value:.0f}" if value >= 100 else f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"
    )


def score(value: float | None, digits: int = 2, *, signed: bool = False) -> str:
    if value is None:
        return "–"
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def scored(value: float | None, metric: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """A value or a difference of a bench.json's ``metric``, with its decimals."""
    return score(value, (metric or {}).get("digits", 2), signed=signed)


def titled(metric: Mapping[str, Any]) -> str:
    """A metric's name as the title of a column; ↓ says that less is better."""
    unit = f" ({metric['unit']})" if metric["unit"] else ""
    return f"{metric['name']}{unit}{'' if metric['higher_is_better'] else ' ↓'}"


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×" if value < 10 else f"{value:.0f}×"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[str] = ()) -> str:
    """A Markdown table; columns named in ``right`` are right-aligned."""
    right = set(right)
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join("--:" if h in right else "---" for h in header) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
