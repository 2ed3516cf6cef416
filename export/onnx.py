"""A trained network becomes a self-contained ONNX graph: named ports, dynamic batch, proven against torch."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.half import opset_of
from export.verify import ParityError, compare, cpu_call, evenly, predict
from toolchain.artifact import EdgestillError, Port, create, verify, versions
from toolchain.stage import Job, console, main
from toolchain.tasks import Split, as_fed, load_data, load_task, save_npz

Arrays = dict[str, NDArray[Any]]
MODEL = "model.onnx"
SAMPLES = 32
BATCHES = (1, 3, 8)
PARITY_BATCH = 64
LARGEST_BYTES = 2**31 - 1


class ExportError(EdgestillError):
    """The network cannot be exported, or the graph does not do what the network does."""


class Deployable(Protocol):
    """What a task's ``deploy`` gives: ``module(*example.values())`` is a tuple in the order of ``outputs``.

    ``example`` is a batch of two; ``dynamic`` names the free dimensions of each input.
    """

    module: nn.Module
    inputs: list[Port]
    outputs: list[Port]
    example: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]
    # Where the graph needs them, files to ship beside it: ``files`` (name -> text) and ``arrays`` (name -> array).


def run(job: Job) -> None:
    """Stage ``onnx``: inputs ``model`` (a student or teacher artifact) and ``data``."""
    folder, which, settings = job.inputs["model"], job.config["which"], job.config["export"]
    task = load_task(job.config["task"])
    manifest = verify(folder)
    data = load_data(job.inputs["data"])
    info = manifest.extra["info"]
    model = (task.load_teacher if which == "teacher" else task.load_student)(folder)
    ready: Deployable = task.deploy(model, manifest.config, info)
    console.print(f"    exporting {which} to ONNX, opset {settings['opset']}", markup=False)
    with create(job.out, stage=job.stage, config=job.config, inputs=job.inputs) as draft:
        path = draft.path / MODEL
        ships = ship(ready, draft.path)
        graph = export(ready, path, settings["opset"])
        found = cpu_call(str(path))
        expected = call_torch(ready)
        val, test = (as_fed(data.splits[name], draft.path) for name in ("val", "test"))
        parity = settings["parity"]
        prove_batches(expected, found, val, parity["limits"]["fp32"]["max_difference"])
        split = val.select(evenly(len(val), parity["samples"]))
        reference, candidate = (predict(call, split, PARITY_BATCH) for call in (expected, found))
        report = compare(reference, candidate, split, task, parity["limits"]["fp32"]).check("fp32")
        feeds: Any = test.feed(slice(0, SAMPLES))
        save_npz(draft.path / "samples.npz", feeds)
        draft.set_ports(ready.inputs, ready.outputs)
        draft.metrics = {"val": report.as_dict()}
        draft.extra = {
            "precision": "fp32",
            "which": which,
            "task": job.config["task"],
            "opset": settings["opset"],
            "parameters": weights_in(graph),
            "trained_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "float_nodes": [],
            "verify": report.as_dict(),
            "ships": ships,
            "mask": test.mask,
            "info": info,
            "method": manifest.config.get("method"),
        }
        draft.versions = versions("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")
    console.print(
        f"    agrees with torch on {report.samples} samples: {report.agreement:.2%}, largest difference "
        f"{max((value for value in report.max_difference.values() if value is not None), default=0.0):.2g}",
        markup=False,
    )


def ship(ready: Deployable, folder: Path) -> list[str]:
    """Write what goes beside the graph; the names of those files."""
    files, arrays = getattr(ready, "files", {}), getattr(ready, "arrays", {})
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, array in arrays.items():
        np.save(folder / name, array, allow_pickle=False)
    return sorted({*files, *arrays})


def export(ready: Deployable, path: Path, opset: int) -> onnx.ModelProto:
    """Write ``ready`` as one ONNX file, checked. Raises ExportError."""
    names = [port.name for port in ready.outputs]
    dimensions = {name: torch.export.Dim(name) for axes in ready.dynamic.values() for name in axes.values()}
    dynamic = [{axis: dimensions[name] for axis, name in ready.dynamic.get(port, {}).items()} for port in ready.example]
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                ready.module.eval(),
                tuple(ready.example.values()),
                dynamo=True,
                opset_version=opset,
                input_names=list(ready.example),
                output_names=names,
                dynamic_shapes=tuple(dynamic),
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # torch.export and onnxscript raise many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ExportError(
            f"torch cannot export this network to ONNX opset {opset}: {reason}; EDGESTILL_DEBUG=1 shows all of it"
        ) from error
    if program is None:
        raise ExportError(
            "torch.onnx.export gave nothing; this torch is too old for dynamo=True, expected 2.9 or later"
        )
    model: onnx.ModelProto = program.model_proto
    if model.ByteSize() > LARGEST_BYTES:
        raise ExportError(f"the graph has {model.ByteSize():,} bytes, more than the 2 GiB one ONNX file can hold")
    _name_dimensions(model, ready)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    onnx.checker.check_model(model, full_check=True)
    if (written := opset_of(model)) != opset:
        raise ExportError(f"asked for opset {opset}, but torch wrote opset {written}; set export.opset to {written}")
    _check_ports(model.graph.input, ready.inputs)
    _check_ports(model.graph.output, ready.outputs)
    onnx.save(model, path)
    return model


def _name_dimensions(model: onnx.ModelProto, ready: Deployable) -> None:
    """Give the free dimensions of inputs and outputs the ports' names."""
    ports = {port.name: port for port in [*ready.inputs, *ready.outputs]}
    for value in [*model.graph.input, *model.graph.output]:
        if value.name in ports:
            for found, wanted in zip(value.type.tensor_type.shape.dim, ports[value.name].shape, strict=False):
                if isinstance(wanted, str) and not found.HasField("dim_value"):
                    found.dim_param = wanted


def _check_ports(values: Any, ports: list[Port]) -> None:
    found = [
        Port(
            value.name,
            np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)).name,
            tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    ]
    wanted = [Port(port.name, port.dtype, port.shape) for port in ports]
    if found != wanted:
        shown = [", ".join(f"{p.name} {p.dtype}{list(p.shape)}" for p in side) for side in (wanted, found)]
        raise ExportError(
            f"the exported graph has other ports than the task declares: expected {shown[0]}; found {shown[1]}"
        )


def prove_batches(
    expected: Callable[..., Any], found: Callable[..., Any], split: Split, limit: float | None = None
) -> None:
    """Run three batch sizes of real samples through both sides.

    Raises ExportError where one fails or shapes differ, ParityError where a float output differs by over ``limit``.
    """
    for size in BATCHES:
        feeds = split.feed(np.arange(size) % len(split))
        try:
            outputs = found(feeds)
        except Exception as error:  # ONNX Runtime raises its own kinds
            raise ExportError(f"the graph fails on a batch of {size}: {error}") from error
        for name, value in expected(feeds).items():
            if outputs[name].shape != value.shape:
                raise ExportError(
                    f"batch of {size}: expected {name} of shape {value.shape}, found {outputs[name].shape}; "
                    "the batch is not dynamic"
                )
            if limit is None or not np.issubdtype(value.dtype, np.floating):
                continue
            if not (difference := float(np.abs(outputs[name] - value).max())) <= limit:
                raise ParityError(
                    f"batch of {size}: {name} differs from torch by {difference:.3g}, expected at most {limit:.3g} "
                    "(export.parity.limits.fp32.max_difference)"
                )


def weights_in(model: onnx.ModelProto) -> int:
    """Elements of the floating-point initializers; what stands in the graph twice (an ensemble's second view of a
    track) counts once."""
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
    found = [tensor for tensor in model.graph.initializer if tensor.data_type in kinds]
    arrays = (onnx.numpy_helper.to_array(tensor) for tensor in found)
    return sum({(a.dtype, a.shape, hashlib.sha256(a.tobytes()).digest()): a.size for a in arrays}.values())


def call_torch(ready: Deployable) -> Callable[[Mapping[str, NDArray[Any]]], Arrays]:
    names = [port.name for port in ready.outputs]

    @torch.inference_mode()
    def call(feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        values = ready.module(*(torch.from_numpy(feeds[name]) for name in ready.example))
        return {name: value.numpy() for name, value in zip(names, values, strict=True)}

    return call


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines or prints of the exporter."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


if __name__ == "__main__":
    main(run)
