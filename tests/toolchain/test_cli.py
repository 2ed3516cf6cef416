from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from toolchain import artifact, commands
from toolchain.artifact import EdgestillError
from toolchain.stage import guard

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "digits.yaml")


def edgestill(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "toolchain", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"} | environment,
        check=False,
        timeout=120,
    )


def cpu_seconds_of_children() -> float:
    """What a command costs however busy the machine is."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_names_every_verb_and_is_quick() -> None:
    seconds = []
    for _ in range(5):
        before = cpu_seconds_of_children()
        reply = edgestill("--help")
        seconds.append(cpu_seconds_of_children() - before)
    assert reply.returncode == 0
    for verb in ("run", "distill", "export", "compile", "bench", "report", "inspect", "doctor", "study"):
        assert f" {verb} " in reply.stdout
    assert statistics.median(seconds) < 0.5


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, toolchain.cli\n"
        "heavy = {'numpy', 'torch', 'onnx', 'onnxruntime', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("verb", ["run", "distill"])
def test_a_wrong_config_exits_2_without_a_traceback(verb: str) -> None:
    reply = edgestill(verb, DIGITS, "student.widht=3")
    assert reply.returncode == 2
    assert "did you mean 'width'?" in reply.stderr
    assert "Traceback" not in reply.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["run", "no/such.yaml"], 2, "cannot be read"),
        (["export", "no/such/student"], 1, "expected an artifact folder, found nothing"),
        (["export", "configs", "--precision", "fp8"], 2, "allowed: fp32, fp16, int8-cpu, int8-trt"),
        (["compile", "configs"], 1, "no manifest.json"),
        (["bench", "configs"], 1, "no manifest.json"),
        (["report", "configs"], 2, "expected the folder of a run"),
        (["inspect", "configs"], 1, "no manifest.json"),
        (["study", "no/such.yaml"], 2, "cannot be read"),
        (["run", DIGITS, "--out", ""], 2, "expected the name of a folder, found none"),
        (["rnu"], 2, "No such command"),
    ],
)
def test_user_errors_end_with_a_message_and_a_code(arguments: list[str], code: int, part: str) -> None:
    reply = edgestill(*arguments)
    assert reply.returncode == code
    assert part in reply.stderr
    assert "Traceback" not in reply.stderr


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guard((tmp_path / "nowhere" / "x").mkdir) == 1
    assert "nowhere/x: No such file or directory; check that place and its permissions" in capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "runs/digits"])
def test_a_file_where_a_folder_should_be_is_told(below: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    reply = edgestill("run", DIGITS, "--out", str(file / below))
    assert reply.returncode == 1
    assert f"{file}: expected a folder, found a file" in " ".join(reply.stderr.split())


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in edgestill("run", DIGITS, "student.widht=3", "--debug").stderr


def test_doctor_tells_what_works_and_what_to_install() -> None:
    reply = edgestill("doctor", "--json")
    assert reply.returncode == 0
    checks = json.loads(reply.stdout)
    assert {check["group"] for check in checks} == {"package", "provider", "builder", "device"}
    assert all(check["ok"] or (check["detail"] and check["remedy"]) for check in checks)
    assert any((check["group"], check["name"]) == ("provider", "cpu") and check["ok"] for check in checks)


def test_a_dry_run_checks_data_taps_and_shapes(tmp_path: Path) -> None:
    small = ["teacher.model=test_efficientnet", "teacher.weights=random", "teacher.taps=null"]
    reply = edgestill("run", DIGITS, *small, "--out", str(tmp_path / "run"), "--dry-run", "--json")
    assert reply.returncode == 0, reply.stderr
    checked = json.loads(reply.stdout)
    assert checked["stages"]["student"] == "not there" or "is not there" in checked["stages"]["student"]
    assert checked["checked"]["samples"]["train"] > 1000
    assert not (tmp_path / "run").exists()
    reply = edgestill("run", DIGITS, *small, "teacher.taps=[blocks.77]", "--out", str(tmp_path / "run"), "--dry-run")
    assert reply.returncode != 0
    assert "blocks.77" in reply.stderr
    assert "Traceback" not in reply.stderr


def test_a_bug_is_one_line_and_a_traceback_on_request(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    assert guard(broken) == 1
    assert "ZeroDivisionError: a bug (an unexpected error" in capfd.readouterr().err
    monkeypatch.setenv("EDGESTILL_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        guard(broken)


def test_a_wrong_student_ends_a_run_before_its_teacher_is_made(tmp_path: Path) -> None:
    small = ["teacher.model=test_efficientnet", "teacher.weights=random", "teacher.taps=null", "student.model=smal_cnn"]
    reply = edgestill("run", DIGITS, *small, "--out", str(tmp_path / "run"))
    assert reply.returncode != 0
    assert "student.model: no timm model 'smal_cnn'" in reply.stderr
    assert "nothing was trained" in reply.stderr
    assert "Traceback" not in reply.stderr
    assert artifact.is_whole(tmp_path / "run" / "data")
    assert not (tmp_path / "run" / "features").exists()


def test_a_table_that_cannot_be_drawn_is_an_error_without_a_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(EdgestillError, match=r"summary.json: its table could not be shown"):
        commands.show_summary(tmp_path)
    said = capfd.readouterr().err
    assert "not readable as JSON" in said
    assert "Traceback" not in said
