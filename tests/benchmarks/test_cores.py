from __future__ import annotations

import os

import pytest

from benchmarks import cores

bindable = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be bound to cores here")


@bindable
def test_two_cores_are_told_apart_or_not_and_nothing_else_is() -> None:
    allowed = os.sched_getaffinity(0)
    found = cores.handover()
    assert (found is None) == (len(allowed) != 2)
    assert found is None or 0.1 < found < 1000
    assert os.sched_getaffinity(0) == allowed


@bindable
@pytest.mark.parametrize("allowed", [{0}, {0, 1, 2}])
def test_of_one_core_or_more_than_two_nothing_is_told(monkeypatch: pytest.MonkeyPatch, allowed: set[int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    assert cores.handover() is None


@bindable
@pytest.mark.parametrize("refused", [[0], [0, 1]])
def test_cores_that_threads_may_not_be_bound_to(monkeypatch: pytest.MonkeyPatch, refused: list[int]) -> None:
    def bind(_: int, wanted: list[int]) -> None:
        if wanted[0] in refused:
            raise PermissionError

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(os, "sched_setaffinity", bind)
    monkeypatch.setattr(cores, "PATIENCE", 0.05)
    assert cores.handover() is None


@pytest.mark.parametrize(("ratio", "far"), [(1.6, False), (4.0, True), (None, None)])
def test_apart_is_well_above_what_near_cores_take(
    monkeypatch: pytest.MonkeyPatch, ratio: float | None, far: bool | None
) -> None:
    monkeypatch.setattr(cores, "handover", lambda: ratio)
    assert cores.apart() is far
