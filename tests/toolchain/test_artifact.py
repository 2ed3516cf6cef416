from __future__ import annotations

import json
from pathlib import Path

import pytest

from toolchain import artifact
from toolchain.artifact import ArtifactError, Port


def make(folder: Path, text: str = "weights", inputs: dict[str, Path] | None = None) -> Path:
    with artifact.create(folder, stage="student", config={"epochs": 3}, inputs=inputs) as draft:
        (draft.path / "model.safetensors").write_text(text)
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "log.jsonl").write_text("{}\n")
        draft.set_ports([Port("image", "uint8", ("batch", 8, 8, 1))], [Port("label", "int64", ("batch",))])
    return folder


def test_what_is_created_is_verified_and_read_back(tmp_path: Path) -> None:
    manifest = artifact.verify(make(tmp_path / "a"))
    assert sorted(manifest.files) == ["model.safetensors", "sub/log.jsonl"]
    assert manifest.inputs_ports == [Port("image", "uint8", ("batch", 8, 8, 1))]
    assert json.loads((tmp_path / "a" / artifact.MANIFEST).read_text())["id"] == manifest.id


def test_id_depends_on_content_alone(tmp_path: Path) -> None:
    ids = [artifact.read(make(tmp_path / name, text)).id for name, text in (("a", "x"), ("b", "x"), ("c", "y"))]
    assert ids[0] == ids[1] != ids[2]


def test_a_failed_stage_leaves_what_was_there(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), artifact.create(folder, stage="student", config={}) as draft:
        (draft.path / "model.safetensors").write_text("new")
        raise RuntimeError("half way")
    assert (folder / "model.safetensors").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_foreign_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="no edgestill artifact"):
        make(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_an_artifact_of_another_stage_is_not_replaced(tmp_path: Path) -> None:
    folder = make(tmp_path / "student")
    words = "earlier artifact of stage onnx, found one of stage student; choose"
    with pytest.raises(ArtifactError, match=words), artifact.create(folder, stage="onnx", config={}):
        raise AssertionError("begun")
    assert artifact.verify(folder).stage == "student"
    make(folder, "again")


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".a.4711.tmp").mkdir()
    (tmp_path / ".a.4711.tmp" / "model.safetensors").write_text("half")
    make(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["model.safetensors", "sub/log.jsonl"])
def test_every_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "a")
    content = bytearray((folder / name).read_bytes())
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        (folder / name).write_bytes(damaged)
        with pytest.raises(ArtifactError, match="damaged"):
            artifact.verify(folder)


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    (folder / "model.safetensors").write_text("w")
    with pytest.raises(ArtifactError, match="expected 7 bytes, found 1"):
        artifact.verify(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        artifact.verify(folder)


def edit(folder: Path, **changes: object) -> None:
    path = folder / artifact.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "..\\up", "C:secret", ""])
def test_paths_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "a")
    edit(folder, files={name: {"sha256": "0" * 64, "bytes": 1}})
    with pytest.raises(ArtifactError, match="outside its folder"):
        artifact.read(folder)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    (tmp_path / "outside").write_text("weights")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match="leads outside"):
        artifact.verify(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "reads up to 1; upgrade"),
        ({"schema": "1"}, "no schema number"),
        ({"files": []}, "files should be a dict"),
        ({"files": {"a": {"sha256": "zz", "bytes": 1}}}, "no sha256"),
        ({"files": {"a": {"sha256": "0" * 64}}}, "no size"),
        ({"surprise": 1}, "unknown keys"),
        ({"inputs": {"data": "runs/data"}}, "input data has no path and id"),
        ({"ports": {"inputs": [{"dtype": "int8"}]}}, "malformed port"),
    ],
)
def test_malformed_manifests(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    folder = make(tmp_path / "a")
    edit(folder, **changes)
    with pytest.raises(ArtifactError, match=message):
        artifact.read(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\x01", "[" * 100_000])
def test_unreadable_manifests(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path / "a")
    (folder / artifact.MANIFEST).write_text(text)
    with pytest.raises(ArtifactError):
        artifact.read(folder)


def test_not_a_folder_and_not_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, message in (("file", "a file"), ("nothing", "nothing"), ("empty", "not a finished artifact")):
        with pytest.raises(ArtifactError, match=message):
            artifact.read(tmp_path / path)


def test_stale_reasons(tmp_path: Path) -> None:
    data = make(tmp_path / "data", "data")
    folder = make(tmp_path / "a", inputs={"data": data})
    config = {"epochs": 3}

    def reason(stage: str = "student", **changed: object) -> str | None:
        return artifact.stale_reason(folder, stage=stage, config=config | changed, inputs={"data": data})

    assert reason() is None
    assert reason(epochs=4) == "config changed: epochs"
    assert reason(stage="teacher") == "made by stage student"
    make(data, "other data")
    assert reason() == "data changed"
    artifact.remove(folder)
    assert reason() == "not there"


def test_a_folder_killed_while_it_is_removed_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "a")

    def half(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            (path / artifact.MANIFEST).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(artifact.shutil, "rmtree", half)
        artifact.remove(folder)
    assert not folder.exists()
    make(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
