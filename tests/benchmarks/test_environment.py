from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import environment as module
from benchmarks.environment import environment, gpus, parse_smi


def test_the_environment_is_json_and_says_where_it_ran() -> None:
    found = json.loads(json.dumps(environment(), allow_nan=False))
    assert found["cpu"]["model"]
    assert 1 <= found["cpu"]["usable_cores"] <= found["cpu"]["cores"] == os.cpu_count()
    assert found["versions"]["python"]
    assert found["versions"]["numpy"]
    assert found["memory_mib"] is None or found["memory_mib"] > 100
    assert isinstance(found["gpus"], list)


def test_it_imports_nothing_but_the_standard_library() -> None:
    script = (
        "import sys; from benchmarks.environment import environment; environment()\n"
        "sys.exit(str({'torch', 'numpy', 'onnxruntime', 'psutil'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr.strip()) == ("", "")


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA RTX A2000, 580.65.06, 6138, 210, 2100, [N/A], 41'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (gpu,) = gpus()
    assert (gpu["name"], gpu["driver"], gpu["memory_mib"]) == ("NVIDIA RTX A2000", "580.65.06", 6138)
    assert (gpu["sm_mhz"], gpu["sm_max_mhz"], gpu["memory_mhz"], gpu["celsius"]) == (210, 2100, None, 41)


def test_without_nvidia_there_are_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus() == []
    assert parse_smi("") == []


class FakeNvml:
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetName": "Orin",
            "nvmlSystemGetDriverVersion": "540.4",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=8 << 30),
            "nvmlDeviceGetClockInfo": 918,
        }

        def call(*_: Any) -> Any:
            if name in ("nvmlDeviceGetTemperature", "nvmlDeviceGetMaxClockInfo"):
                raise self.NVMLError("not supported")
            return answers.get(name)

        return call


def test_nvml_gives_what_the_device_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    (gpu,) = gpus()
    assert gpu == {
        "name": "Orin",
        "driver": "540.4",
        "memory_mib": 8192,
        "sm_mhz": 918,
        "sm_max_mhz": None,
        "memory_mhz": 918,
        "celsius": None,
    }


def test_a_machine_that_hides_its_files_has_unknowns_not_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_read", lambda path: None)
    found = environment()
    assert found["memory_mib"] is None
    assert found["cpu"]["governor"] is None
    assert found["cpu"]["model"]
