"""What the numbers of a bench say, in words: pure functions from bench.json's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.formats import count, ms, scored, size, times
from benchmarks.tables import first_batch, headline, of, p50, reference

Row = Mapping[str, Any]
Metric = Mapping[str, Any]


def points(value: float, metric: Metric) -> str:
    """A difference of the metric: ``1.20 points``, ``0.012 m``; more decimals where it would not be told exactly."""
    text = scored(value, metric)
    return f"{text if float(text) == value else f'{value:g}'} {_points(metric)}"


def budget(max_drop: float, metric: Metric) -> str:
    """What may be lost: ``within 2.00 points of accuracy of the student``."""
    amount = points(max_drop, metric)
    if metric["higher_is_better"]:
        return f"within {amount} of {metric['name']} of the student"
    return f"with {metric['name']} at most {amount} above the student's"


def change(gain: float, metric: Metric) -> str:
    """A gain in words: ``1.20 points of accuracy gained``, ``minADE 0.012 m better``."""
    amount = scored(abs(gain), metric)
    if not float(amount):
        return f"the same {metric['name']}"
    if metric["higher_is_better"]:
        return f"{amount} {_points(metric)} of {metric['name']} {'gained' if gain > 0 else 'lost'}"
    return f"{metric['name']} {amount} {_points(metric)} {'better' if gain > 0 else 'worse'}"


def _points(metric: Metric) -> str:
    return "points" if metric["unit"] in ("", "%") else str(metric["unit"])


def recommend(rows: Sequence[Row], metric: Metric | None, max_drop: float) -> dict[str, Any] | None:
    """The deployable row with the least p50 at the smallest batch, not more than ``max_drop`` below the student.

    Rows whose intervals overlap with the fastest one's are named too. None when nothing deployable was measured.
    """
    batch = first_batch(rows)
    timed = [row for row in rows if row["kind"] in ("onnx", "engine") and row["status"] == "ok" and p50(row, batch)]
    base = reference(rows, metric)
    before = headline(base, metric) if base else None
    told, dropped = "", []
    if metric is not None and before is not None:
        sign = 1 if metric["higher_is_better"] else -1
        drops = {row["name"]: sign * (before - found) for row in timed if (found := headline(row, metric)) is not None}
        dropped = [row["name"] for row in timed if drops.get(row["name"], float("inf")) > max_drop]
        timed = [row for row in timed if row["name"] not in dropped]
        told = f" {budget(max_drop, metric)} ({scored(before, metric)}{_unit(metric)})"
        if dropped:
            told += f"; over that budget: {', '.join(dropped)}"
    elif timed:
        told = "; accuracy was not measured"
    if not timed:
        return None
    best = min(timed, key=lambda row: p50(row, batch) or 0.0)
    edge = best["latency"][batch]["p50"]["high_ms"]
    ties = [r["name"] for r in timed if r is not best and r["latency"][batch]["p50"]["low_ms"] <= edge]
    reason = f"fastest at batch {batch} ({ms(p50(best, batch))} ms p50){told}."
    if ties:
        reason += f" Not measurably slower: {', '.join(ties)}."
    return {"name": best["name"], "reason": reason, "ties": ties, "over_budget": dropped}


def _unit(metric: Metric) -> str:
    return f" {metric['unit']}" if metric["unit"] else ""


def precision_words(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """``text`` on each lower precision: its speed here, its size, and how it was made; and ``slower``."""
    exact = of(rows, "onnx")
    words: list[dict[str, Any]] = []
    if exact is None:
        return words
    for row in rows:
        if row["kind"] != "onnx" or row["precision"] == "fp32" or row["status"] != "ok":
            continue
        verdicts = []
        for batch, found in row["latency"].items():
            base = exact["latency"].get(batch, {}).get("p50")
            mine = found.get("p50")
            if base and mine:
                verdicts.append((f"at batch {batch}", _verdict(mine, base)))
        if not verdicts:
            continue
        slower = sum("as long" in verdict for _, verdict in verdicts)
        lead = "slower than fp32 here: " if slower == len(verdicts) else "slower than fp32 in part: " if slower else ""
        smaller = (
            f"; its file is {times(exact['bytes'] / row['bytes'])} smaller" if row["bytes"] < exact["bytes"] else ""
        )
        told = ", ".join(f"{verdict} {place}" for place, verdict in verdicts)
        how = f" {row['converted']}." if row.get("converted") else ""
        words.append({"text": f"{row['name']}: {lead}{told}{smaller}.{how}", "slower": slower > 0})
    return words


def _verdict(mine: Mapping[str, float], base: Mapping[str, float]) -> str:
    if mine["low_ms"] > base["high_ms"]:
        return f"{times(mine['ms'] / base['ms'])} as long"
    if mine["high_ms"] < base["low_ms"]:
        return f"{times(base['ms'] / mine['ms'])} as fast"
    return "no measurable difference"


def sentence(summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """What was distilled into what, and what was gained and lost by it.

    ``config`` are the student's config sections: task, data, teacher, student, method.
    """
    rows, metric = summary["rows"], summary["metric"]
    batch = first_batch(rows)
    teacher = next((row for row in rows if row["kind"] == "teacher" and row["status"] == "ok"), None)
    best = (summary.get("recommended") or {}).get("name")
    small = next((row for row in rows if row["name"] == best), of(rows, "student"))
    sections = {key: config.get(key) or {} for key in ("teacher", "student", "method", "data")}
    own = sections["teacher"].get("student") or sections["teacher"]
    big_name = own.get("model", "the teacher")
    layers, small_name = sections["student"].get("layers"), sections["student"].get("model", "the student")
    width = sections["method"].get("intermediate_size")
    if (layers or width) and teacher is not None:  # cut out of the teacher
        small_name = f"{layers} of its layers" if layers else "its layers"
        small_name += f", {width} intermediate neurons in each" if width else ""
    method, data = sections["method"].get("name", "?"), sections["data"].get("source", config.get("task", "its data"))
    if small is None:
        return f"{small_name}, taught by {big_name} with {method} on {data}."
    small_text = f"{small_name} ({count(small['parameters'])} parameters)"
    if teacher is None:
        found = headline(small, metric)
        told = (
            f": {metric['name']} {scored(found, metric)}{_unit(metric)} on the test split"
            if metric and found is not None
            else ""
        )
        return f"{small_text}, trained with {method} on {data}{told}."
    big = f"{big_name} ({count(teacher['parameters'])} parameters)"
    text = f"{big} was distilled into {small_text} with {method} on {data}."
    if method == "plain":
        text = f"{small_text}, trained on {data} without a teacher, beside {big}."
    gains = []
    if teacher["parameters"] and small["parameters"]:
        gains.append(f"{times(teacher['parameters'] / small['parameters'])} fewer parameters")
    if teacher["bytes"] and small["bytes"]:
        gains.append(f"a {times(teacher['bytes'] / small['bytes'])} smaller file ({size(small['bytes'])})")
    slow, fast = p50(teacher, batch), p50(small, batch)
    if slow and fast:
        gains.append(f"{times(slow / fast)} the speed at batch {batch} ({ms(fast)} instead of {ms(slow)} ms)")
    before, after = headline(teacher, metric), headline(small, metric)
    compared = ""
    if metric and before is not None and after is not None:
        gain = after - before if metric["higher_is_better"] else before - after
        scores = f"{scored(after, metric)} against the teacher's {scored(before, metric)}{_unit(metric)}"
        compared = f"; {change(gain, metric)}: {scores}"
    return f"{text} As {small['name']} it has {_and(gains)}{compared}." if gains else f"{text[:-1]}{compared}."


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
