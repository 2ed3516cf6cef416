from __future__ import annotations

import numpy as np

from toolchain.tasks import Split
from toolchain.tasks.track_notes import way_note


def walks(*degrees: float, people: int = 30) -> Split:
    """People who walk eight steps straight on, each in the next of the directions, up or down."""
    angles = np.deg2rad(np.resize(degrees, people)) + np.pi * (np.arange(people) // len(degrees) % 2)
    way = np.stack([np.cos(angles), np.sin(angles)], -1)[:, None]
    observed = way * np.arange(8)[:, None]
    return Split({"observed": observed, "scene": np.zeros(people), "agent": np.arange(people)}, ("observed",))


def test_how_people_walk_is_told_with_what_to_do() -> None:
    street = way_note(walks(80, 84), turned=False)
    assert street is not None
    assert street.startswith("who walks in the test windows keeps to an axis, 82° from x (1.00 of 1): data.walk_axis")
    campus = way_note(walks(0, 45, 90, 135, people=40), turned=False)
    assert campus is not None
    assert campus.startswith("who walks in the test windows keeps to no axis (0.00 of 1): method.rotate")


def test_nothing_is_told_where_all_is_well_or_nothing_is_known() -> None:
    assert way_note(walks(3, -4), turned=True) is None
    astray = way_note(walks(40), turned=True)
    assert astray == "yet in the test windows people's axis is 40° from x, and they keep to it by 1.00 of 1"
    assert way_note(walks(80, people=19), turned=False) is None
    still = walks(80)
    still.arrays["observed"] = np.zeros((30, 8, 2))
    assert way_note(still, turned=False) is None
