"""The tables of a run's report, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.formats import count, ms, scored, share, size, times, titled
from benchmarks.tables import (
    changed,
    headline,
    p50,
    reference,
    steps_table,
)

Table = tuple[list[str], list[list[str]]]


def tables(summary: Mapping[str, Any]) -> dict[str, Table]:
    """The report's tables as text: a header and rows each."""
    rows, metric = summary["rows"], summary["metric"]
    found: dict[str, Table] = {}
    if metric is not None:
        if summary["steps"]:
            found["steps"] = steps_table(summary["steps"], metric)
        found["accuracy"] = accuracy_table(rows, metric)
    found["latency"] = latency_table(rows)
    if any(row["paced"] for row in rows):
        found["paced"] = paced_table(rows)
    found["resources"] = resource_table(rows)
    return found


def accuracy_table(rows: list[dict[str, Any]], metric: Mapping[str, Any]) -> Table:
    others = list(dict.fromkeys(name for row in rows for name in row["accuracy"] or {} if name != metric["name"]))
    sure = ["95 % interval"] if any(row.get("interval") for row in rows) else []
    title = ["row", titled(metric), *sure, "made of", "change", "agreement"]
    title += ["change vs student", "agreement vs student", "max. difference"]
    by_name = {row["name"]: row for row in rows}
    base = reference(rows, metric)
    against = headline(base, metric) if base else None
    body = []
    for row in rows:
        if not row["accuracy"]:
            continue
        mine, agreement = headline(row, metric), row["agreement"] or {}
        before = agreement.get("previous_name")
        body.append(
            [
                row["name"],
                scored(mine, metric),
                *(_interval(row.get("interval"), metric) for _ in sure),
                before or "–",
                changed(mine, headline(by_name[before], metric) if before else None, metric),
                share(agreement.get("previous")),
                changed(mine, against, metric),
                share(agreement.get("student")),
                _differences(row["max_difference"]),
                *(scored(row["accuracy"].get(name), metric) for name in others),
            ]
        )
    return title + others, body


def _interval(found: Sequence[float] | None, metric: Mapping[str, Any]) -> str:
    return "–" if found is None else " – ".join(scored(bound, metric) for bound in found)


def _differences(found: Mapping[str, float | None] | None) -> str:
    if not found:
        return "–"
    return ", ".join(f"{name} {'not a number' if value is None else f'{value:.2g}'}" for name, value in found.items())


def latency_table(rows: list[dict[str, Any]]) -> Table:
    title = ["row", "batch", "p50 ms", "95 % interval", "p90 ms", "p99 ms", "samples/s", "speed-up", "spread", "calls"]
    body = []
    for row in rows:
        for batch, found in (row["latency"] or {}).items():
            if found.get("reason"):
                body.append([row["name"], batch, found["reason"], *[""] * (len(title) - 3)])
                continue
            base, mine = p50(rows[0], batch), found["p50"]
            body.append(
                [
                    row["name"],
                    batch,
                    ms(mine["ms"]) if mine else "–",
                    f"{ms(mine['low_ms'])} – {ms(mine['high_ms'])}" if mine else "–",
                    *(ms(found[q]["ms"]) if found[q] else "too few calls" for q in ("p90", "p99")),
                    f"{found['throughput_per_s']:,.0f}",
                    times(base / mine["ms"] if base and mine else None),
                    f"{100 * found['spread']:.1f} %" + (" noisy" if found["noisy"] else "") + _apart(found),
                    f"{found['calls']:,}",
                ]
            )
    return title, body


def _apart(found: Mapping[str, Any]) -> str:
    far = found.get("rounds_apart")
    return f"; {far} of {found['rounds']} rounds with cores apart" if far else ""


def paced_table(rows: list[dict[str, Any]]) -> Table:
    title = ["row", "frames/s", "p50 ms", "p90 ms", "against back to back", "missed deadlines"]
    body = []
    for row in rows:
        found = row["paced"]
        if not found:
            continue
        if found.get("reason"):
            body.append([row["name"], f"{found['fps']:g}", found["reason"], "", "", ""])
            continue
        mine, tight = found["p50"], p50(row, 1)
        body.append(
            [
                row["name"],
                f"{found['fps']:g}",
                ms(mine["ms"]) if mine else "–",
                ms(found["p90"]["ms"]) if found["p90"] else "too few calls",
                times(mine["ms"] / tight if mine and tight else None),
                f"{found['missed']} of {found['calls']}",
            ]
        )
    return title, body


def resource_table(rows: list[dict[str, Any]]) -> Table:
    title = [
        "row",
        "runtime",
        "precision",
        "parameters",
        "size",
        "peak memory",
        "of it model and runtime",
        "load ms",
        "first call ms",
    ]
    body = []
    for row in rows:
        if row["status"] == "ok":
            memory, base = row["memory_mb"], row["memory_base_mb"]
            body.append(
                [
                    row["name"],
                    row["backend"],
                    row["precision"],
                    count(row["parameters"]),
                    size(row["bytes"]),
                    f"{memory:.0f} MB" if memory else "–",
                    f"{memory - base:.0f} MB" if memory and base else "–",
                    ms(row["load_ms"]),
                    ms(row["first_call_ms"]),
                ]
            )
    return title, body
