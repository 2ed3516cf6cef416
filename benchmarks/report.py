"""The report stage: what was distilled into what, what was gained and what was lost, rendered from bench.json.

Writes report.html (self-contained), report.md, summary.json and the plots as files of their own.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks import findings, plots
from benchmarks.formats import markdown, size
from benchmarks.report_tables import tables
from benchmarks.tables import (
    cells,
    device,
    first_batch,
    header,
    headline,
    notes,
    p50,
    reasons,
    summary_markdown,
)
from toolchain import artifact
from toolchain.artifact import EdgestillError
from toolchain.stage import Job, main
from toolchain.tasks import Arrays, Split, load_data, load_task

SCHEMA = 1
TEMPLATES = Path(__file__).parent / "templates"


def run(job: Job) -> None:
    bench = _read(job.inputs["bench"] / "bench.json")
    summary = summarise(job, bench)
    pictures: dict[str, bytes] = {}
    if (plane := pareto_of(summary)) is not None:
        pictures["pareto.svg"] = plane
    training = curves(job.inputs)
    pictures |= {f"training-{number}.svg": content for number, (_, content) in enumerate(training)}
    view = {
        "summary": summary,
        "tables": tables(summary),
        "ledger": (header(summary), cells(summary)),
        "notes": notes(summary),
        "failed": [row for row in summary["rows"] if row["status"] != "ok"],
        "pareto": pictures.get("pareto.svg"),
        "training": training,
        "samples": samples(job, summary),
        "environment": environment_words(summary["environment"]),
    }
    with artifact.create(job.out, stage=job.stage, config=job.config, inputs=job.inputs) as draft:
        artifact.write_json(draft.path / "summary.json", summary)
        (draft.path / "report.md").write_text(render_markdown(view), encoding="utf-8")
        (draft.path / "report.html").write_text(render_html(view), encoding="utf-8")
        for name, content in pictures.items():
            (draft.path / name).write_bytes(content)
        draft.metrics = {"recommended": (summary["recommended"] or {}).get("name")}
        draft.versions = artifact.versions("matplotlib", "jinja2")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EdgestillError(f"{path}: not readable as JSON ({error}); run the bench stage again") from error


def summarise(job: Job, bench: Mapping[str, Any]) -> dict[str, Any]:
    """summary.json: the bench without its protocol's raw parts, the recommendation, and the lineage."""
    max_drop = job.config["report"]["max_drop"]
    student = job.inputs.get("student")
    config = artifact.read(student).config if student else {}
    summary = {
        "schema": SCHEMA,
        "name": job.config["name"],
        **{key: bench[key] for key in ("task", "metric", "environment", "settings", "protocol", "rows")},
        "max_drop": max_drop,
        "recommended": findings.recommend(bench["rows"], bench["metric"], max_drop),
        "precision": findings.precision_words(bench["rows"]),
        "steps": steps(job.inputs, bench["metric"]),
        "lineage": lineage(job.inputs),
    }
    return summary | {"headline": findings.sentence(summary, config)}


def steps(inputs: Mapping[str, Path], metric: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What became of the teacher on its way to a student that was cut out of it: parameters, validation score."""
    if metric is None or not {"teacher", "student"} <= set(inputs):
        return []
    teacher, student = (artifact.read(inputs[role]) for role in ("teacher", "student"))
    made = student.extra.get("steps")
    if not made:
        return []
    first, last = (
        {"what": what, "parameters": end.extra["parameters"], "val": end.metrics["val"]}
        for what, end in (("the teacher", teacher), ("the student", student))
    )
    return [
        {"what": one["what"], "parameters": one["parameters"], "score": one["val"].get(metric["name"])}
        for one in (first, *made, last)
    ]


def lineage(inputs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Each artifact of the run, made after what it was made of: role, id, parents, what is worth saying of it."""
    manifests = {role: artifact.read(folder) for role, folder in inputs.items()}
    known = {manifest.id: role for role, manifest in manifests.items()}
    parents = {
        role: {known.get(entry["id"], name): entry["id"] for name, entry in manifest.parents.items()}
        for role, manifest in manifests.items()
    }
    order: list[str] = []
    while len(order) < len(manifests):
        waiting = [role for role in manifests if role not in order]
        ready = [role for role in waiting if all(p in order or p not in manifests or p == role for p in parents[role])]
        order += ready or waiting
    return [
        {
            "role": role,
            "id": manifests[role].id,
            "parents": parents[role],
            "seconds": manifests[role].seconds,
            "created": manifests[role].created,
            "bytes": sum(entry["bytes"] for entry in manifests[role].files.values()),
        }
        for role in order
    ]


# --- pictures


def pareto_of(summary: Mapping[str, Any]) -> bytes | None:
    """Accuracy against latency; None when fewer than two rows have both."""
    metric, batch = summary["metric"], first_batch(summary["rows"])
    found = []
    for row in summary["rows"]:
        value = headline(row, metric)
        if value is not None and p50(row, batch):
            entry = row["latency"][batch]["p50"]
            point = plots.Point(row["name"], row["kind"], entry["ms"], entry["low_ms"], entry["high_ms"], value)
            found.append(point)
    if len(found) < 2:
        return None
    name = f"{metric['name']} ({metric['unit']})" if metric["unit"] else metric["name"]
    better = "higher" if metric["higher_is_better"] else "lower"
    best = (summary["recommended"] or {}).get("name")
    return plots.pareto(found, f"{name}, {better} is better →", metric["higher_is_better"], batch, best)


def curves(inputs: Mapping[str, Path]) -> list[tuple[str, bytes]]:
    """A picture per training stage from the train.jsonl of teacher and student; one point is no curve."""
    pictures = []
    for role in ("teacher", "student"):
        path = inputs[role] / "train.jsonl" if role in inputs else None
        if path is None or not path.is_file():
            continue
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        axis = "epoch" if any("epoch" in line for line in lines) else "step"
        for stage, found in plots.scalars(lines).items():
            if any(len(points) > 1 for points in found.values()):
                title = role if stage in ("", role) else f"{role}: {stage}"
                pictures.append((title, plots.training(found, axis)))
    return pictures


def samples(job: Job, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Sample predictions as pictures, by what the task shows: a text, an image with a class, or with a mask of classes.

    A task may add ``figures(split, outputs) -> [(title, png)]``; ``outputs`` holds ``student`` and maybe ``teacher``.
    """
    folder = job.inputs["bench"]
    found: dict[str, Any] = {"kind": None, "tiles": [], "legend": [], "figures": []}
    if not (folder / "shown.npz").is_file() or "data" not in job.inputs:
        return found
    task = load_task(summary["task"])
    with np.load(folder / "shown.npz", allow_pickle=False) as file:
        split = load_data(job.inputs["data"]).splits["test"].select(file["index"])
    outputs: dict[str, Arrays] = {}
    for who in ("student", "teacher"):
        if (path := folder / f"shown-{who}.npz").is_file():
            with np.load(path, allow_pickle=False) as file:
                outputs[who] = {name: file[name] for name in file.files}
    if hasattr(task, "show"):
        found |= _tiles(task, split, outputs)
    if hasattr(task, "figures"):
        found["figures"] = task.figures(split, outputs)
    return found


def _tiles(task: ModuleType, split: Split, outputs: Mapping[str, Arrays]) -> dict[str, Any]:
    tiles: list[dict[str, Any]] = []
    legend: list[tuple[str, str]] = []
    kind = None
    for index in range(len(split)):
        shown = {who: task.show(arrays, split, index) for who, arrays in outputs.items()}
        mine = shown["student"]
        if "text" in mine:
            kind = "texts"
            tiles.append(mine | {"teacher": shown["teacher"]["prediction"] if "teacher" in shown else None})
            continue
        if "image" not in mine:
            return {}
        if isinstance(mine["truth"], str):
            kind = "classes"
            teacher = shown["teacher"]["prediction"] if "teacher" in shown else None
            right = mine["truth"] == mine["prediction"]
            picture = plots.png(mine["image"], least=64)
            tiles.append(
                {
                    "png": picture,
                    "truth": mine["truth"],
                    "student": mine["prediction"],
                    "teacher": teacher,
                    "right": right,
                }
            )
        else:
            kind, classes, ignored = "masks", mine["classes"], mine.get("ignore_index")
            masks = {"truth": mine["truth"], **{who: one["prediction"] for who, one in shown.items()}}
            pictures = [("image", plots.png(mine["image"], least=120))]
            pictures += [
                (n, plots.png(plots.colour_mask(m, len(classes), ignored), least=120)) for n, m in masks.items()
            ]
            tiles.append({"pictures": pictures})
            colours = [(name, plots.class_colour(i)) for i, name in enumerate(classes) if i != ignored]
            legend = [(name, f"rgb{colour}") for name, colour in colours]
    if kind in ("classes", "texts"):
        tiles.sort(key=lambda tile: tile["right"])
    return {"kind": kind, "tiles": tiles, "legend": legend}


def environment_words(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    cpu = found.get("cpu") or {}
    governor = f", governor {cpu['governor']}" if cpu.get("governor") else ""
    words = [
        ("device", device(found)),
        ("clock", f"{cpu.get('mhz') or '?'} MHz{governor}"),
        ("int8 instructions", ", ".join(cpu.get("int8") or []) or "none found"),
        ("memory", f"{found['memory_mib']:,} MiB" if found.get("memory_mib") else "?"),
        ("system", str(found.get("os", "?"))),
        ("load when it began", ", ".join(map(str, found.get("load_average") or [])) or "?"),
        ("versions", ", ".join(f"{name} {version}" for name, version in (found.get("versions") or {}).items())),
        ("time", str(found.get("time", "?"))),
    ]
    for gpu in found.get("gpus") or []:
        told = (f"driver {gpu.get('driver')}", f"{gpu.get('memory_mib')} MiB", f"{gpu.get('sm_mhz')} MHz")
        words.append((str(gpu.get("name")), ", ".join(told)))
    return words


# --- rendering


def render_html(view: Mapping[str, Any]) -> str:
    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["svg"] = lambda content: f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"
    jinja.filters["png"] = lambda content: f"data:image/png;base64,{base64.b64encode(content).decode()}"
    jinja.filters["size"] = size
    jinja.filters["budget"] = findings.budget
    return jinja.get_template("report.html.j2").render(view)


SECTIONS = {
    "steps": "From the teacher to the student",
    "accuracy": "Accuracy, step by step",
    "latency": "Latency",
    "paced": "Paced, as behind a camera",
    "resources": "Size, memory, start",
}


def render_markdown(view: Mapping[str, Any]) -> str:
    """The report without its pictures."""
    summary = view["summary"]
    parts = [f"# {summary['name']}", summary["headline"]]
    if best := summary["recommended"]:
        parts.append(f"**Recommended: {best['name']}**, {best['reason']}")
    parts += [
        summary_markdown(summary).rstrip(),
        "\n".join(f"- {note}" for note in (*view["notes"], *reasons(summary))),
    ]
    if summary["precision"]:
        lines = [f"- {'**slow** ' if word['slower'] else ''}{word['text']}" for word in summary["precision"]]
        parts += ["## Lower precision, plainly", "\n".join(lines)]
    for key, (title, body) in view["tables"].items():
        parts += [f"## {SECTIONS[key]}", markdown(title, body, right=title[1:]).rstrip()]
    made = [
        f"- {step['role']} `{step['id'][:12]}`" + (f" from {', '.join(step['parents'])}" if step["parents"] else "")
        for step in summary["lineage"]
    ]
    parts += ["## Lineage", "\n".join(made)]
    parts += ["## Environment", "\n".join(f"- {name}: {value}" for name, value in view["environment"])]
    parts += ["## Protocol", "\n".join(f"- {line}" for line in summary["protocol"])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main(run)
