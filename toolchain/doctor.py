"""What works here: packages, execution providers, engine builders, devices; why not, and what to install.

Whatever loads native code is tried in a process of its own, so that a crash or its chatter stays there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from toolchain import child
from toolchain.artifact import EdgestillError
from toolchain.onnx_runtime import provider_problem
from toolchain.runtime import PROVIDERS, first_line, import_or_explain
from toolchain.tensorrt_runtime import BACKENDS, Cuda, logger

CLI = ["typer", "rich", "pydantic", "yaml"]
DISTILL = "torch torchvision timm transformers accelerate safetensors onnx onnxscript PIL sklearn matplotlib jinja2"
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn"}
ORT = ("onnxruntime", "onnxruntime-gpu")
CLASH = "one overwrites the other: pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'edgestill[ort-gpu]'"
SLOW = 1.5  # times the cost of float32 from which bfloat16 is not worth having
TIMEOUT = 60.0  # seconds for one probe

# y = Identity(x), float32 (n,): opset 13, IR 7; written out so that the check needs no onnx package.
IDENTITY = (
    b"\x08\x07:9\n\x10\n\x01x\x12\x01y\"\x08Identity\x12\x01gZ\x10\n\x01x\x12\x0b\n\t\x08\x01\x12\x05\n\x03\x12\x01n"
    b"b\x10\n\x01y\x12\x0b\n\t\x08\x01\x12\x05\n\x03\x12\x01nB\x04\n\x00\x10\r"
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One thing examined. ``detail`` is the version or the reason; ``remedy`` is empty when ``ok``."""

    name: str
    group: str  # package | provider | builder | device
    ok: bool
    detail: str
    remedy: str = ""


def examine() -> list[Check]:
    """Every check, in order of group; takes a few seconds, imports nothing heavy into this process."""
    probes = [
        *(f"provider:{name}" for name in PROVIDERS),
        *(f"builder:{name}" for name in BACKENDS),
        "device:cuda",
        "device:bf16",
    ]
    with ThreadPoolExecutor(2) as pool:
        probed = list(pool.map(_in_process, probes))
    return [*_packages(), *(check for checks in probed for check in checks)]


def _packages() -> list[Check]:
    distils = sys.version_info >= (3, 11)
    remedy = "" if distils else "this Python runs and compiles models; to distil, install Python 3.11 or later"
    checks = [Check("python", "package", distils, platform.python_version(), remedy)]
    for extra, modules in (("cli", CLI), ("distill", DISTILL.split())):
        for module in modules:
            ok = importlib.util.find_spec(module) is not None
            detail = _version(DISTRIBUTIONS.get(module, module)) or "version unknown" if ok else "not installed"
            checks.append(Check(module, "package", ok, detail, "" if ok else f"pip install 'edgestill[{extra}]'"))
    installed = [f"{name} {version}" for name in ORT if (version := _version(name))]
    remedy = ["pip install 'edgestill[ort]' (CPU) or pip install 'edgestill[ort-gpu]' (NVIDIA)", "", CLASH][
        len(installed)
    ]
    checks.append(Check("onnxruntime", "package", len(installed) == 1, ", ".join(installed) or "not installed", remedy))
    return checks


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _in_process(probe: str) -> list[Check]:
    """The checks of ``probe`` ("group:name"), made by this module in a new Python."""
    group, name = probe.split(":")
    command = child.command("toolchain.doctor", probe)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return [Check(name, group, False, f"no answer within {TIMEOUT:.0f} s", "run it again; reinstall the package")]
    try:
        return [Check(**entry) for entry in json.loads(done.stdout.splitlines()[-1])]
    except (IndexError, ValueError, TypeError):
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return [Check(name, group, False, f"the probe ended with status {done.returncode}: {said}", "reinstall it")]


def _provider(name: str) -> list[Check]:
    import numpy as np

    extra = "ort" if name == "cpu" else "ort-gpu"
    if importlib.util.find_spec("onnxruntime") is None:
        return [Check(name, "provider", False, "onnxruntime is not installed", f"pip install 'edgestill[{extra}]'")]
    if problem := provider_problem(name):
        return [Check(name, "provider", False, *problem)]
    ort = import_or_explain("onnxruntime", extra)
    ort.set_default_logger_severity(4)
    wanted, detail = PROVIDERS[name], ""
    try:
        session = ort.InferenceSession(IDENTITY, providers=wanted, enable_fallback=0)
        active = session.get_providers()
        ok = active[: len(wanted)] == wanted and session.run(None, {"x": np.ones(1, np.float32)})[0].item() == 1
        detail = f"onnxruntime {ort.__version__}, active: {', '.join(active)}"
    except Exception as error:
        ok, detail = False, f"{type(error).__name__}: {first_line(error)}"
    remedy = f"check nvidia-smi, then pip install --force-reinstall 'edgestill[{extra}]'" if name != "cpu" else ""
    return [Check(name, "provider", ok, detail, "" if ok else remedy or "pip install --force-reinstall onnxruntime")]


def _builder(name: str) -> list[Check]:
    module, _, extra = BACKENDS[name]
    if importlib.util.find_spec(module) is None:
        return [Check(name, "builder", False, "not installed", f"pip install 'edgestill[{extra}]'")]
    try:
        trt = import_or_explain(module, extra)
    except EdgestillError as error:
        return [Check(name, "builder", False, str(error), f"pip install --force-reinstall 'edgestill[{extra}]'")]
    log = logger(trt)
    try:
        ok = bool(trt.Builder(log))
    except Exception as error:
        ok, log.errors = False, [*log.errors, first_line(error)]
    reason = f"{trt.__version__} cannot make a builder: {(log.errors or ['it gave no reason'])[0]}"
    remedy = "it needs an NVIDIA GPU and driver; pip install 'edgestill[trt-rtx]' compiles without"
    return [Check(name, "builder", ok, trt.__version__ if ok else reason, "" if ok else remedy)]


def bf16_cost() -> float:
    """How many times as long as in float32 a matrix product takes in bfloat16 on this CPU.

    Raises EdgestillError without torch.
    """
    torch = import_or_explain("torch", "distill")
    best = []
    for kind in (torch.float32, torch.bfloat16):
        one, times = torch.ones(256, 256, dtype=kind), []
        for _ in range(4):
            start = time.perf_counter()
            one @ one
            times.append(time.perf_counter() - start)
        best.append(min(times))
    return float(best[1] / best[0])


def _device(name: str) -> list[Check]:
    if name == "bf16":
        try:
            cost = bf16_cost()
        except EdgestillError as error:
            return [Check(name, "device", False, str(error).partition("; ")[0], "pip install 'edgestill[distill]'")]
        ok = cost < SLOW
        detail = f"a product on the CPU takes {cost:.1f} times as long as in fp32"
        return [Check(name, "device", ok, detail, "" if ok else "train with precision: fp32 on this CPU")]
    if importlib.util.find_spec("cuda") is None:
        return [Check("cuda", "device", False, "cuda-python is not installed", "pip install 'edgestill[trt-rtx]'")]
    try:
        devices = [Cuda(0, "trt-rtx")]
        devices += [Cuda(index, "trt-rtx") for index in range(1, devices[0].count)]
    except EdgestillError as error:
        detail, _, remedy = str(error).partition("; ")
        return [Check("cuda", "device", False, detail, remedy)]
    return [Check(f"cuda:{item.device}", "device", True, f"{item.name}, {item.capability}") for item in devices]


PROBES: dict[str, Callable[[str], list[Check]]] = {"provider": _provider, "builder": _builder, "device": _device}

if __name__ == "__main__":
    group, name = sys.argv[1].split(":")
    print("\n" + json.dumps([asdict(check) for check in PROBES[group](name)]))
