"""The stages before the student: data, and whatever the task puts between data and student."""

from __future__ import annotations

from toolchain.artifact import create, versions
from toolchain.config import validate_section
from toolchain.stage import Job, console, main
from toolchain.tasks import load_task, save_data


def run(job: Job) -> None:
    task = load_task(job.config["task"])
    if job.stage != "data":
        getattr(task, job.stage)(job)
        return
    section = validate_section(task.DataSection, job.config["data"])
    data = task.prepare(section)
    with create(job.out, stage=job.stage, config=job.config) as draft:
        save_data(draft.path, data)
        draft.metrics = {"samples": {name: len(split) for name, split in data.splits.items()}}
        draft.versions = versions("numpy", "pillow", "scikit-learn", "tokenizers")
    if note := data.info.get("note"):
        console.print(f"    note: {note}", style="yellow", markup=False)


if __name__ == "__main__":
    main(run)
