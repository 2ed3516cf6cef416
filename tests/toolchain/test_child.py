"""Processes run our modules, whatever a person's folders are called."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from toolchain import child

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A person's folder with packages called as ours, and one of their own."""
    for name in ("toolchain", "export", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not ours')\n")
    (tmp_path / "my_net.py").touch()
    return tmp_path


@pytest.mark.parametrize("path", ["", "its own"])
@pytest.mark.parametrize("module", ["benchmarks.tables", "toolchain.doctor", "export.engine"])
def test_packages_of_a_person_do_not_shadow_ours(folder: Path, module: str, path: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(folder)} if path else {}
    words = {"benchmarks.tables": ["--help"], "toolchain.doctor": ["builder:tensorrt"], "export.engine": []}[module]
    command = child.command(module, *words)
    reply = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert "not ours" not in reply.stderr
    assert "ImportError" not in reply.stderr
    assert reply.returncode == (2 if module == "export.engine" else 0)  # which wants a job


def test_a_module_on_pythonpath_is_found_with_the_packages_beside_it(folder: Path) -> None:
    (folder / "export" / "__init__.py").write_text("mine = True\n")
    (folder / "my_net.py").write_text("import json, sys, export\nprint(json.dumps([sys.argv[1:], export.mine]))\n")
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    command = child.command("my_net", "a", "b")
    reply = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=True)
    assert json.loads(reply.stdout) == [["a", "b"], True]


def test_a_module_in_the_working_directory_alone_is_not_found(folder: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    reply = subprocess.run(
        child.command("my_net"), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert "No module named my_net" in reply.stderr
