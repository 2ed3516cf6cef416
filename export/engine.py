"""ONNX -> TensorRT engine, with TensorRT (a GPU of the target's kind is needed) or TensorRT for RTX (none is needed).

Networks are strongly typed: the engine computes in the types that the graph says, so precision is made by
``export.precision`` and only checked here. ``build`` needs neither torch nor onnx nor rich: it runs on the device.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from toolchain import artifact
from toolchain.artifact import EdgestillError
from toolchain.tensorrt_runtime import BACKENDS, logger, this_platform

if TYPE_CHECKING:
    from toolchain.stage import Job

COMPUTE = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM", "ATTENTION_INPUT")
PRECISIONS = ("fp32", "fp16", "int8-trt")
Ranges = Mapping[str, Mapping[str, int]]


class BuilderMissing(EdgestillError):
    """No builder for the targets is installed, or the GPU it needs is not here."""


class EngineError(EdgestillError):
    """The graph could not be compiled, or the engine is not what was asked for."""


class Bar(Protocol):
    def advance(self, steps: int = 1) -> None: ...
    def update(self, text: str) -> None: ...


def device_capability() -> str | None:
    """Compute capability of the first visible CUDA device, e.g. ``sm_86``; None without driver or device."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, value = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    numbers = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        numbers.append(str(value.value))
    return f"sm_{''.join(numbers)}"


def backend_module(backend: str) -> tuple[str, Any]:
    """Name and module of the builder: ``tensorrt``, ``tensorrt-rtx``, or ``auto``, the first that can build here.

    ``auto`` is TensorRT where it and a CUDA device are, else TensorRT for RTX. Raises BuilderMissing.
    """
    if backend not in (*BACKENDS, "auto"):
        raise EngineError(f"compile.backend {backend!r}: expected one of auto, {', '.join(BACKENDS)}")
    why = []
    for name, (module, _, extra) in BACKENDS.items():
        if backend not in (name, "auto"):
            continue
        if name == "tensorrt" and device_capability() is None:
            why.append(
                "tensorrt builds for the GPU it runs on, and there is no CUDA device here: compile on the target, or "
                "for RTX cards set compile.backend=tensorrt-rtx (pip install 'edgestill[trt-rtx]')"
            )
            continue
        try:
            return name, importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            why.append(f"{module} cannot be imported ({error}); pip install 'edgestill[{extra}]'")
    raise BuilderMissing(f"no TensorRT builder for compile.backend={backend}: {'; '.join(why)}")


def build(
    onnx_path: Path,
    *,
    backend: str,
    targets: Sequence[str],
    profile: Ranges,
    precision: str | None = None,
    workspace_mb: int = 1024,
    timing_cache: Path | None = None,
    progress: Bar | None = None,
) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    """Compile ``onnx_path`` for ``targets`` (``sm_86``, ...): the bare plan, its layers, and what it was built with.

    ``profile`` gives {min, opt, max} for every symbolic dimension, by the dimension's name. ``precision`` ("fp32",
    "fp16", "int8-trt") is checked in the network before the build and, where a GPU of a target is present, in the
    engine after it. ``timing_cache`` is read and written by TensorRT; TensorRT for RTX has none.
    Raises BuilderMissing; EngineError: a node the parser rejects (all of them are named), a dimension without a
    range, a target the builder does not know, a failed build, another precision than asked for.
    """
    if precision not in (None, *PRECISIONS):
        raise EngineError(f"{onnx_path}: precision {precision} has no engine; compile one of {', '.join(PRECISIONS)}")
    if not onnx_path.is_file():
        raise EngineError(f"{onnx_path}: expected an ONNX file, found none; give an onnx folder made by edgestill")
    name, trt = backend_module(backend)
    log = logger(trt)
    log.errors.clear()
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt, name))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_path)):
        reasons = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise EngineError(f"{onnx_path}: {name} {trt.__version__} cannot parse it: {'; '.join(reasons) or _said(log)}")
    layers: dict[str, Any] = {
        "source": "network",
        "note": "types of the parsed, strongly typed network, which the builder may fuse but not change",
        "layers": list(network_layers(network)),
    }
    if precision:
        check_network(layers["layers"], precision, str(onnx_path))

    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mb << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _set_targets(trt, name, config, targets)
    shapes = _set_profile(builder, network, config, profile)
    if timing_cache and name == "tensorrt":
        cached = timing_cache.read_bytes() if timing_cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(cached), ignore_mismatch=False)
    if progress:
        config.progress_monitor = _monitor(trt, progress)
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if plan is None:
        raise EngineError(
            f"{onnx_path}: {name} {trt.__version__} could not build it for {', '.join(targets)}: {_said(log)}; "
            "try another precision or target, or a larger compile.workspace_mb"
        )
    if timing_cache and name == "tensorrt":
        _write(timing_cache, bytes(memoryview(config.get_timing_cache().serialize())))
    plan = bytes(memoryview(plan))
    if device_capability() in targets:
        layers["engine"] = inspect(trt, log, plan)
        if precision:
            check_engine(layers["engine"], precision, str(onnx_path))
    info = {
        "backend": name,
        "backend_version": trt.__version__,
        "compute_capabilities": list(targets),
        "platform": this_platform(),
        "profile": shapes,
        "build_seconds": round(seconds, 3),
    }
    return plan, layers, info


def _strongly_typed(trt: Any, backend: str) -> int:
    """Network creation flags: TensorRT 10 needs one to be strongly typed, its successors and RTX always are."""
    if backend == "tensorrt-rtx" or int(trt.__version__.split(".")[0]) >= 11:
        return 0
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        raise BuilderMissing(
            f"expected a TensorRT with strongly typed networks, found {trt.__version__}; install TensorRT 10 or newer"
        )
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _said(log: Any) -> str:
    return "; ".join(dict.fromkeys(error.strip() for error in log.errors)) or "it gave no reason"


def _monitor(trt: Any, bar: Bar) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """The outermost phase moves the bar, of 100 steps; the phase under way is its text."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.root, self.steps, self.shown = "", 1, 0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.root, self.steps = phase_name, max(1, num_steps)
            bar.update(phase_name.lower())

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.root:
                self._show(100 * (step + 1) // self.steps)
            return True

        def phase_finish(self, phase_name: str) -> None:
            if phase_name == self.root:
                self._show(100)

        def _show(self, percent: int) -> None:
            bar.advance(max(0, percent - self.shown))
            self.shown = max(percent, self.shown)

    return Monitor()


def _parser_error(error: Any) -> str:
    what = " ".join(line for line in error.desc().splitlines() if not line.startswith("[checkMacros"))
    name = getattr(error, "node_name", lambda: "")()
    kind = getattr(error, "node_operator", lambda: "")()
    return f"{name or 'graph'}{f' ({kind})' if kind else ''}: {what}"


def _set_targets(trt: Any, backend: str, config: Any, targets: Sequence[str]) -> None:
    if not targets:
        raise EngineError("compile.targets: expected at least one, such as sm_86; found none")
    if backend == "tensorrt":
        if list(targets) != [here := device_capability()]:
            raise EngineError(
                f"tensorrt builds for the GPU it runs on, {here}; the targets are {', '.join(targets)}: compile on the "
                "target, or set compile.backend=tensorrt-rtx"
            )
        return
    known = {name.lower().replace("sm", "sm_"): value for name, value in trt.ComputeCapability.__members__.items()}
    known = {name: value for name, value in known.items() if name.startswith("sm_")}
    if unknown := [target for target in targets if target not in known]:
        raise EngineError(
            f"compile.targets: {unknown[0]} is not built by tensorrt-rtx {trt.__version__}; one of {', '.join(known)}"
        )
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(known[target], index)


def _set_profile(builder: Any, network: Any, config: Any, profile: Ranges) -> dict[str, dict[str, list[int]]]:
    """Add one optimization profile when an input has symbolic dimensions; {input: {min, opt, max: shape}}."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    named = {tensor.name: [tensor.get_dimension_name(i) for i in range(len(tensor.shape))] for tensor in inputs}
    symbols = {dim for tensor in inputs for dim, size in zip(named[tensor.name], tensor.shape, strict=True) if size < 0}
    if missing := sorted(dim or "?" for dim in symbols - set(profile)):
        raise EngineError(
            f"dimension {missing[0]!r} of the inputs has no range; give compile.shapes.{missing[0]}: "
            "{min: ..., opt: ..., max: ...}"
        )
    if unused := sorted(set(profile) - symbols - {"batch"}):
        raise EngineError(f"compile.shapes.{unused[0]}: no input has that dimension; they have {sorted(symbols)}")
    shapes: dict[str, dict[str, list[int]]] = {}
    if not symbols:
        return shapes
    chosen = builder.create_optimization_profile()
    for tensor in inputs:
        sizes = list(zip(named[tensor.name], tensor.shape, strict=True))
        shapes[tensor.name] = {
            bound: [profile[dim][bound] if size < 0 else size for dim, size in sizes] for bound in ("min", "opt", "max")
        }
        chosen.set_shape(tensor.name, *shapes[tensor.name].values())
    if config.add_optimization_profile(chosen) < 0:
        raise EngineError(f"the profile {shapes} is not valid for this graph; expected min <= opt <= max")
    return shapes


def network_layers(network: Any) -> Iterator[dict[str, Any]]:
    """Every layer's name, type, and its tensors' types and shapes; ``quantised`` says that it computes from int8."""
    dequantised: set[str] = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        inputs = [tensor for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None]
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        kind = layer.type.name
        moved = kind in ("SHUFFLE", "IDENTITY") and inputs and inputs[0].name in dequantised
        if kind == "DEQUANTIZE" or moved:
            dequantised |= {tensor.name for tensor in outputs}
        yield {
            "name": layer.name,
            "type": kind,
            "inputs": [_tensor(tensor) for tensor in inputs],
            "outputs": [_tensor(tensor) for tensor in outputs],
            "quantised": kind in COMPUTE and len(inputs) > 1 and {t.name for t in inputs[:2]} <= dequantised,
        }


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name.lower(), "shape": list(tensor.shape)}


def check_network(layers: Sequence[Mapping[str, Any]], precision: str, what: str) -> None:
    """Raise EngineError unless the layers that compute do so in ``precision``.

    fp32: all in float; fp16: most in half; int8-trt: at least one from quantised values.
    """
    compute = [layer for layer in layers if layer["type"] in COMPUTE]
    half = sum(layer["outputs"][0]["dtype"] == "half" for layer in compute)
    quantised = sum(layer["quantised"] for layer in compute)
    single = sum(layer["outputs"][0]["dtype"] == "float" and not layer["quantised"] for layer in compute)
    fits = {"fp32": not half and not quantised, "fp16": 2 * half > len(compute), "int8-trt": quantised > 0}
    if compute and not fits[precision]:
        raise EngineError(
            f"{what}: expected a {precision} graph, found {single} layers computing in float, {half} in half and "
            f"{quantised} from int8; make it again with export.precisions={precision}"
        )


def inspect(trt: Any, log: Any, plan: bytes) -> dict[str, Any]:
    """The engine's own account of its layers. Needs a GPU of the engine's kind. Raises EngineError."""
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"the engine just built does not load here: {_said(log)}")
    account: dict[str, Any] = json.loads(
        engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    )
    return account


def check_engine(account: Mapping[str, Any], precision: str, what: str) -> None:
    """Raise EngineError when the built layers name their tensors' types and none is of ``precision``."""
    kinds = {
        str(tensor.get("Format/Datatype", tensor.get("Datatype", ""))).lower()
        for layer in account.get("Layers", [])
        if isinstance(layer, dict)
        for tensor in (*layer.get("Inputs", []), *layer.get("Outputs", []))
    } - {""}
    words = {"fp32": ("float", "fp32"), "fp16": ("half", "fp16", "float16"), "int8-trt": ("int8",)}[precision]
    if kinds and not any(word in kind for kind in kinds for word in words):
        raise EngineError(f"{what}: expected {precision} layers in the engine, found {sorted(kinds)}")


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def run(job: Job) -> None:
    """Compile the ONNX folder ``job.inputs["onnx"]`` for ``job.config["targets"]``, and write the artifact."""
    from toolchain.stage import console, progress

    source, settings, targets = job.inputs["onnx"], job.config["compile"], list(job.config["targets"])
    manifest = artifact.verify(source)
    precision = manifest.extra.get("precision", "fp32")
    backend, _ = backend_module(settings["backend"])
    console.print(f"    {backend} for {', '.join(targets)}, {precision}", markup=False)
    with progress("building", 100) as bar:
        plan, layers, info = build(
            source / "model.onnx",
            backend=backend,
            targets=targets,
            profile={"batch": settings["batch"], **settings["shapes"]},
            precision=precision,
            workspace_mb=settings["workspace_mb"],
            timing_cache=job.out.parent / "timing.cache",
            progress=bar,
        )
    with artifact.create(job.out, stage=job.stage, config=job.config, inputs=job.inputs) as draft:
        (draft.path / "model.engine").write_bytes(plan)
        artifact.write_json(draft.path / "layers.json", layers)
        draft.extra = artifact.carried(manifest)
        for name in ("samples.npz", *draft.extra.get("ships", ())):
            shutil.copyfile(source / name, draft.path / name)
        draft.ports = manifest.ports
        draft.metrics = {"build_seconds": info.pop("build_seconds"), "plan_bytes": len(plan)}
        draft.extra |= info | {"precision": precision}
        draft.versions = artifact.versions("tensorrt", "tensorrt-cu13", "tensorrt-rtx-cu13", "tensorrt-rtx")
    console.print(f"    {len(plan) / 2**20:.2f} MiB in {draft.metrics['build_seconds']:.1f} s", markup=False)


if __name__ == "__main__":
    if sys.argv[1:] == ["--device"]:
        print(device_capability() or "")
    else:
        from toolchain.stage import main

        main(run)
