from __future__ import annotations

import subprocess
import sys
from typing import Any

import onnx
import pytest

from toolchain import doctor
from toolchain.doctor import IDENTITY, Check, examine


@pytest.fixture(scope="module")
def checks() -> list[Check]:
    return examine()


def test_every_group_is_examined_and_every_failure_has_a_reason_and_a_remedy(checks: list[Check]) -> None:
    assert list(dict.fromkeys(check.group for check in checks)) == ["package", "provider", "builder", "device"]
    for check in checks:
        assert check.detail
        assert check.ok != bool(check.remedy), check
    names = {(check.group, check.name) for check in checks}
    assert {("provider", "cpu"), ("provider", "cuda"), ("builder", "tensorrt-rtx"), ("package", "onnxruntime")} <= names


def test_the_cpu_provider_really_ran(checks: list[Check]) -> None:
    cpu = next(check for check in checks if (check.group, check.name) == ("provider", "cpu"))
    assert cpu.ok, cpu
    assert "CPUExecutionProvider" in cpu.detail


def test_the_builder_for_rtx_works_without_a_gpu(checks: list[Check]) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert next(check for check in checks if check.name == "tensorrt-rtx").ok


def test_the_identity_model_is_valid() -> None:
    model = onnx.load_from_string(IDENTITY)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Identity"]


def test_examining_is_silent_and_light() -> None:
    script = (
        "import sys; from toolchain.doctor import examine; examine()\n"
        "sys.exit(str({'torch', 'onnx', 'onnxruntime', 'tensorrt_rtx'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr.strip()) == ("", "")


def test_missing_packages_name_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    remedies = {check.name: check.remedy for check in doctor._packages()}
    assert remedies["torch"] == "pip install 'edgestill[distill]'"
    assert remedies["rich"] == "pip install 'edgestill[cli]'"
    assert "edgestill[ort]" in remedies["onnxruntime"]
    assert doctor._provider("cuda")[0].remedy == "pip install 'edgestill[ort-gpu]'"
    assert doctor._builder("tensorrt")[0].remedy == "pip install 'edgestill[trt]'"
    assert not doctor._device("cuda")[0].ok


def test_both_onnxruntimes_at_once_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "1.2.3")
    check = next(check for check in doctor._packages() if check.name == "onnxruntime")
    assert not check.ok
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in check.remedy


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("import os, sys; sys.stderr.write('boom\\n'); sys.stderr.flush(); os.abort()", "status -6: boom"),
        ("print('not json')", "status 0: it said nothing"),
        ("import time; time.sleep(9)", "no answer within 1 s"),
    ],
)
def test_a_probe_that_crashes_or_hangs_is_a_failed_check(
    monkeypatch: pytest.MonkeyPatch, code: str, detail: str
) -> None:
    run = subprocess.run

    def instead(command: list[str], **options: Any) -> Any:
        return run([sys.executable, "-c", code], **options)

    monkeypatch.setattr(subprocess, "run", instead)
    monkeypatch.setattr(doctor, "TIMEOUT", 1.0)
    (check,) = doctor._in_process("provider:cuda")
    assert not check.ok
    assert detail in check.detail
    assert check.remedy


def test_bf16_on_the_cpu_is_judged_by_its_speed(checks: list[Check], monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = next(check for check in checks if check.name == "bf16")
    assert "times as long as in fp32" in bf16.detail
    monkeypatch.setattr(doctor, "bf16_cost", lambda: 17.0)
    assert doctor._device("bf16") == [
        Check(
            "bf16",
            "device",
            False,
            "a product on the CPU takes 17.0 times as long as in fp32",
            "train with precision: fp32 on this CPU",
        )
    ]
