from __future__ import annotations

import os
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
