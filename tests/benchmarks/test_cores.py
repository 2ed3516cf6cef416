from __future__ import annotations

import os

import pytest

from benchmarks import cores


def test_reading_what_another_core_wrote_takes_longer_than_reading_it_again() -> None:
    allowed = os.sched_getaffinity(0)
    found = cores.handover()
    if len(allowed) < 2:
        assert found is None
        return
    assert found is not None
    assert 0.5 < found < 100
    assert cores.apart() in (True, False)
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.parametrize(("ratio", "far"), [(1.6, False), (4.0, True), (None, None)])
def test_apart_is_well_above_what_near_cores_take(
    monkeypatch: pytest.MonkeyPatch, ratio: float | None, far: bool | None
) -> None:
    monkeypatch.setattr(cores, "handover", lambda: ratio)
    assert cores.apart() is far


def test_one_core_cannot_be_far_from_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert cores.handover() is None
