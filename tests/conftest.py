from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def data_root() -> Path:
    """The folder of the real data sets; tests that want it skip where it is absent."""
    root = os.environ.get("EDGESTILL_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("EDGESTILL_DATA is not set to a data folder")
    return Path(root)


@pytest.fixture(scope="session")
def exported_tracks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run folder (data, student, onnx) of a tiny ``ppt`` or ``one_shot``, exported once for all tests.

    Pairs of key and value change its section.
    """
    from tests.toolchain.methods.walks import write_exported

    return cache(lambda model, *changes: write_exported(tmp_path_factory.mktemp(model), model, **dict(changes)))
