"""Artifacts: folders that are whole, hashed and traceable.

An artifact is a folder with a ``manifest.json``. It is written under a temporary name, the manifest is
written last, and the folder is renamed: a folder with a manifest is whole. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

SCHEMA = 1
MANIFEST = "manifest.json"
MOST_THREADS = 1024
_HEX64 = re.compile(r"[0-9a-f]{64}")


class EdgestillError(Exception):
    """A user's error: the message says what was expected, what was found, and the remedy."""


class UsageError(EdgestillError):
    """The command line or the config is wrong: exit code 2."""


class ArtifactError(EdgestillError):
    """A folder is not a whole, intact artifact of a schema this version reads."""


@dataclass(frozen=True)
class Port:
    """A named input or output of a deployable graph.

    ``dtype`` is numpy's name (``uint8``, ``float32``, ``int64``); a ``str`` in ``shape`` is a symbolic dimension.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    meaning: str = ""
    unit: str = ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Port:
        known = {key: value[key] for key in ("name", "dtype", "meaning", "unit") if key in value}
        return cls(shape=tuple(value["shape"]), **known)


@dataclass(frozen=True)
class Manifest:
    """What a stage made, of what, and how it can be checked.

    ``inputs`` maps a role to ``{"path", "id"}`` of the artifact read; ``files`` maps a relative POSIX path to
    ``{"sha256", "bytes"}``; ``ports`` holds ``{"inputs": [...], "outputs": [...]}``; ``extra`` is the stage's own.
    """

    stage: str
    config: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    files: dict[str, dict[str, Any]]
    ports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    created: str = ""
    host: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def id(self) -> str:
        """sha256 of the content: files, ports and stage, not time or host."""
        files = {name: entry["sha256"] for name, entry in self.files.items()}
        return digest({"stage": self.stage, "files": files, "ports": self.ports})

    @property
    def parents(self) -> dict[str, dict[str, str]]:
        """Path and id of each artifact it was made of: its ``inputs``, and the finished runs that its config names."""
        return {**self.inputs, **self.extra.get("sources", {})}

    @property
    def inputs_ports(self) -> list[Port]:
        return [Port.from_json(port) for port in self.ports.get("inputs", [])]

    @property
    def outputs_ports(self) -> list[Port]:
        return [Port.from_json(port) for port in self.ports.get("outputs", [])]


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:
    state = hashlib.sha256()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of ``packages`` (absent ones left out), with Python's and edgestill's."""
    found = {"python": platform.python_version()}
    for package in ("edgestill", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def is_whole(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read(folder: Path | str) -> Manifest:
    """The manifest of ``folder``, checked for form but not against its files.

    Raises ArtifactError: not a folder, no manifest, unreadable, of a newer schema, or naming paths outside the folder.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder}: expected an artifact folder, found {'a file' if folder.exists() else 'nothing'}"
        )
    if not path.is_file():
        raise ArtifactError(
            f"{folder}: no {MANIFEST}, so this is not a finished artifact; run the stage that makes it again"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON ({error}); make the artifact again") from error
    return _checked(value, path)


def _checked(value: Any, path: Path) -> Manifest:
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: expected a JSON object, found {type(value).__name__}; make the artifact again")
    schema = value.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise ArtifactError(f"{path}: no schema number; this is not an edgestill manifest")
    if schema > SCHEMA:
        raise ArtifactError(
            f"{path}: written with manifest schema {schema}, this edgestill reads up to {SCHEMA}; upgrade edgestill"
        )
    known = set(Manifest.__dataclass_fields__)
    if unknown := sorted(set(value) - known - {"id"}):
        raise ArtifactError(f"{path}: unknown keys {unknown}; make the artifact again")
    shapes: dict[str, type] = {"stage": str, "config": dict, "inputs": dict, "files": dict, "ports": dict}
    shapes |= {"metrics": dict, "versions": dict, "host": dict, "extra": dict, "created": str}
    for key, kind in shapes.items():
        if key in value and not isinstance(value[key], kind):
            raise ArtifactError(f"{path}: {key} should be a {kind.__name__}, found {type(value[key]).__name__}")
    if missing := [key for key in ("stage", "config", "inputs", "files") if key not in value]:
        raise ArtifactError(f"{path}: lacks {missing}; make the artifact again")
    for role, entry in value["inputs"].items():
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("path", "id")):
            raise ArtifactError(f"{path}: the input {role} has no path and id; make the artifact again")
    for name, entry in value["files"].items():
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or not name:
            raise ArtifactError(f"{path}: names the file {name!r}, outside its folder; do not use this artifact")
        if not isinstance(entry, dict) or not _HEX64.fullmatch(str(entry.get("sha256", ""))):
            raise ArtifactError(f"{path}: {name} has no sha256; make the artifact again")
        if not isinstance(entry.get("bytes"), int):
            raise ArtifactError(f"{path}: {name} has no size in bytes; make the artifact again")
    try:
        for port in [*value.get("ports", {}).get("inputs", []), *value.get("ports", {}).get("outputs", [])]:
            Port.from_json(port)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: malformed port ({error}); make the artifact again") from error
    manifest = Manifest(**{key: item for key, item in value.items() if key in known})
    if value.get("id", manifest.id) != manifest.id:
        raise ArtifactError(f"{path}: its id is not that of its content: it was changed; make the artifact again")
    return manifest


def verify(folder: Path | str) -> Manifest:
    """Read the manifest and check every file's presence, size and sha256. Raises ArtifactError."""
    folder = Path(folder)
    manifest = read(folder)
    root = folder.resolve()
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{folder}: {name} is missing; copy the folder again or make it again")
        if root not in path.resolve().parents:
            raise ArtifactError(f"{folder}: {name} leads outside the folder; do not use this artifact")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ArtifactError(f"{path}: expected {entry['bytes']} bytes, found {size}; copy or make the folder again")
        if (found := sha256(path)) != entry["sha256"]:
            raise ArtifactError(
                f"{path}: expected sha256 {entry['sha256'][:12]}, found {found[:12]}: the file is damaged or was "
                "changed; copy or make the folder again"
            )
    return manifest


@dataclass
class Draft:
    """An artifact being written: put files under ``path``, fill the fields, and leave the ``with`` block."""

    path: Path
    ports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def set_ports(self, inputs: list[Port], outputs: list[Port]) -> None:
        self.ports = {"inputs": [asdict(port) for port in inputs], "outputs": [asdict(port) for port in outputs]}


def carried(manifest: Manifest) -> dict[str, Any]:
    """What a graph's ``extra`` hands on to what is made of it; ``ships`` names the files that go with it."""
    return {key: manifest.extra[key] for key in ("parameters", "task", "ships", "mask") if key in manifest.extra}


def inputs_of(folders: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Role -> path and content id, as a manifest records them."""
    return {role: {"path": str(folder), "id": read(folder).id} for role, folder in sorted(folders.items())}


def check_place(folder: Path, stage: str) -> None:
    """That an artifact of ``stage`` may be written here: on nothing, or in place of one of that stage."""
    if is_whole(folder):
        found = read(folder).stage
        if found != stage:
            raise ArtifactError(
                f"{folder}: expected nothing, or an earlier artifact of stage {stage}, found one of stage {found}; "
                "choose another --out, or remove it"
            )
    elif folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise ArtifactError(f"{folder}: exists and is no edgestill artifact; choose another --out or remove it")


@contextmanager
def create(
    folder: Path | str, *, stage: str, config: Mapping[str, Any], inputs: Mapping[str, Path] | None = None
) -> Iterator[Draft]:
    """Write an artifact atomically: nothing is at ``folder`` until all of it is.

    An artifact of the same stage that is already there is replaced; on an exception the draft is removed and
    ``folder`` is as it was.
    """
    folder = Path(folder)
    check_place(folder, stage)
    draft_path = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left_over in [*folder.parent.glob(f".{folder.name}.*.tmp"), *folder.parent.glob(f".{folder.name}.*.old")]:
        shutil.rmtree(left_over, ignore_errors=True)
    draft_path.mkdir()
    draft = Draft(draft_path)
    recorded = inputs_of(inputs or {})
    start = time.perf_counter()
    try:
        yield draft
        files = {
            path.relative_to(draft_path).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
            for path in sorted(draft_path.rglob("*"))
            if path.is_file()
        }
        manifest = Manifest(
            stage=stage,
            config=dict(config),
            inputs=recorded,
            files=files,
            ports=draft.ports,
            metrics=draft.metrics,
            versions=draft.versions or versions(),
            seconds=round(time.perf_counter() - start, 3),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            host={"machine": platform.machine(), "system": platform.system(), "name": socket.gethostname()},
            extra=draft.extra,
        )
        write_json(draft_path / MANIFEST, asdict(manifest) | {"id": manifest.id})
        _replace(draft_path, folder)
    except BaseException:
        remove(draft_path)
        raise


def _replace(source: Path, target: Path) -> None:
    if target.exists():
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old)
    else:
        source.rename(target)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically (UTF-8, indented, no NaN)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def remove(path: Path) -> None:
    """Delete a file or folder. A folder is renamed first: killed half way, what is left is no folder of that name."""
    if path.is_dir() and not path.is_symlink():
        old = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        shutil.rmtree(old)
    else:
        path.unlink(missing_ok=True)


def stale_reason(folder: Path, *, stage: str, config: Mapping[str, Any], inputs: Mapping[str, Path]) -> str | None:
    """Why the artifact at ``folder`` must be made again, or None when it is fresh."""
    if not is_whole(folder):
        return "not there"
    manifest = read(folder)
    if manifest.stage != stage:
        return f"made by stage {manifest.stage}"
    if digest(manifest.config) != digest(dict(config)):
        keys = sorted(k for k in {*manifest.config, *config} if manifest.config.get(k) != config.get(k))
        return f"config changed: {', '.join(keys)}"
    if sorted(manifest.inputs) != sorted(inputs):
        return "its inputs are others"
    for role, path in inputs.items():
        if manifest.inputs[role].get("id") != read(path).id:
            return f"{role} changed"
    return None
