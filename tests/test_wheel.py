"""The wheel in an empty environment: what a device gets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def uv() -> str:
    found = shutil.which("uv") or (str(ROOT / ".uv" / "bin" / "uv") if (ROOT / ".uv" / "bin" / "uv").exists() else None)
    if found is None:
        pytest.skip("uv is not installed")
    return found


@pytest.fixture(scope="module")
def device(uv: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and numpy alone."""
    folder = tmp_path_factory.mktemp("device")
    subprocess.run([uv, "build", "--quiet", "--wheel", "--out-dir", str(folder), str(ROOT)], check=True)
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder / "env")], check=True)
    wheel = next(folder.glob("*.whl"))
    install(uv, folder, str(wheel))
    return folder


def install(uv: str, folder: Path, what: str) -> None:
    python = str(folder / "env" / "bin" / "python")
    reply = subprocess.run([uv, "pip", "install", "--quiet", "--python", python, what], capture_output=True, text=True)
    if reply.returncode and "fetch" in reply.stderr:
        pytest.skip("the package index cannot be reached")
    assert reply.returncode == 0, reply.stderr


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "EDGESTILL"))}
    program = str(folder / "env" / "bin" / command[0])
    return subprocess.run([program, *command[1:]], capture_output=True, text=True, cwd=folder, env=environment)


def test_base_install_is_numpy_and_says_what_the_command_needs(device: Path) -> None:
    reply = run(
        device, "python", "-c", "import toolchain.runtime, sys; print(sorted({'numpy', 'torch'} & set(sys.modules)))"
    )
    assert reply.stdout.strip() == "['numpy']", reply.stderr
    reply = run(device, "edgestill", "--help")
    if reply.returncode:
        assert reply.returncode == 2
        assert "pip install 'edgestill[" in reply.stderr
        assert "Traceback" not in reply.stderr


def test_with_its_command_every_verb_answers(uv: str, device: Path) -> None:
    wheel = next(device.glob("*.whl"))
    install(uv, device, f"edgestill[cli] @ {wheel.as_uri()}")
    verbs = ("run", "distill", "export", "compile", "bench", "report", "inspect", "doctor", "study")
    for verb in verbs:
        assert run(device, "edgestill", verb, "--help").returncode == 0
    reply = run(device, "edgestill", "doctor")
    assert reply.returncode == 0, reply.stderr
    assert "pip install" in reply.stderr
    (device / "my.yaml").write_text((ROOT / "configs" / "digits.yaml").read_text())
    reply = run(device, "edgestill", "run", "my.yaml")
    assert reply.returncode == 1
    assert "torch is not installed: pip install 'edgestill[distill]'" in reply.stderr
    assert "Traceback" not in reply.stderr
