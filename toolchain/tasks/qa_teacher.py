"""Stage ``teacher``: the large model, trained in full before a student is cut out of it."""

from __future__ import annotations

from toolchain.artifact import create, remove, versions
from toolchain.checkpoint import save_tensors
from toolchain.config import validate
from toolchain.distill import train_student
from toolchain.stage import Job, console
from toolchain.tasks import load_data
from toolchain.tasks.qa import TeacherSection
from toolchain.tasks.qa_nets import QaNet, save_extra
from toolchain.train import read_metrics


def teach(job: Job) -> None:
    """Input: ``data``. Trains by ``teacher.method`` and ``teacher.train``; resumes, see ``toolchain.train``."""
    section = TeacherSection.model_validate(job.config["teacher"])
    value = section.model_dump(mode="json")
    own = {key: value.pop(key) for key in ("method", "train")}
    sections = {key: job.config[key] for key in ("seed", "task", "data")}
    sections["data"] = {key: item for key, item in sections["data"].items() if key != "unlabelled_questions"}
    cfg = validate({"name": "teacher", "student": value, **own, **sections, "compile": {"backend": "none"}})
    data = load_data(job.inputs["data"])
    trained = train_student(cfg, data, job.inputs, job.work)
    net = trained.student
    assert isinstance(net, QaNet)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    with create(job.out, stage=job.stage, config=job.config, inputs=job.inputs) as draft:
        save_tensors(draft.path / "model.safetensors", net.state_dict())
        save_extra(net, draft.path)
        (draft.path / "train.jsonl").write_text(read_metrics(trained.run), encoding="utf-8")
        draft.metrics = {"val": trained.val}
        draft.versions = versions("torch", "accelerate", "safetensors", "transformers", "tokenizers", "numpy")
        draft.extra = {"info": data.info, "parameters": parameters, "stages": trained.run.records}
    remove(job.work)
    headline, score = next(iter(trained.val.items()))
    console.print(f"    teacher: {parameters:,} parameters, validation {headline} {score:.2f}", markup=False)
