"""Where a measurement was made: machine, clocks, versions, load. Standard library only."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from toolchain import artifact

PACKAGES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx",
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-rtx",
    "tensorrt-rtx-cu13",
    "torch",
)
_SMI = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu")
_FIELDS = ("name", "driver", "memory_mib", "sm_mhz", "sm_max_mhz", "memory_mhz", "celsius")


def environment() -> dict[str, Any]:
    """The machine as JSON: cpu, memory, os, versions, gpus, and the load when called (1, 5, 15 minutes).

    What cannot be read is None, or an empty list for ``gpus``. Memory in MiB, clocks in MHz.
    """
    return {
        "cpu": cpu(),
        "memory_mib": _memory(),
        "os": platform.platform(),
        "machine": platform.machine(),
        "versions": artifact.versions(*PACKAGES),
        "gpus": gpus(),
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cpu() -> dict[str, Any]:
    info = _read("/proc/cpuinfo") or ""
    pairs = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in info.splitlines())]
    names = [value for key, value in pairs if key == "model name"]
    clocks = [float(value) for key, value in pairs if key == "cpu MHz"]
    flags = next((set(value.split()) for key, value in pairs if key in ("flags", "Features")), set())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": names[0] if names else _read("/proc/device-tree/model") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "mhz": round(max(clocks)) if clocks else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "int8": sorted(flags & {"avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}),
    }


def gpus() -> list[dict[str, Any]]:
    """One entry a GPU, through NVML where nvidia-ml-py is installed, else nvidia-smi; empty without either."""
    try:
        import pynvml
    except ImportError:
        return _from_smi()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_from_nvml(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _from_nvml(nvml: Any, index: int) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(function: str, *arguments: int) -> Any:
        try:
            return getattr(nvml, function)(handle, *arguments)
        except nvml.NVMLError:
            return None

    memory = ask("nvmlDeviceGetMemoryInfo")
    return {
        "name": ask("nvmlDeviceGetName"),
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "memory_mib": memory and memory.total >> 20,
        "sm_mhz": ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        "sm_max_mhz": ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
        "memory_mhz": ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
        "celsius": ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
    }


def _from_smi() -> list[dict[str, Any]]:
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_smi(done.stdout)


def parse_smi(text: str) -> list[dict[str, Any]]:
    """nvidia-smi's CSV as the same entries that NVML gives."""
    rows = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        entry: dict[str, Any] = dict(zip(_FIELDS, row, strict=False))
        for field in _FIELDS[2:]:
            value = str(entry.get(field, ""))
            entry[field] = int(value) if value.isdigit() else None
        rows.append(entry)
    return rows


def _memory() -> int | None:
    for line in (_read("/proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) >> 10
    return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None
