"""Pictures of predicted paths, and what of the task a report reads."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from toolchain.tasks import Arrays, Split, classification, digits_of, trajectory, trajectory_figures, unit_of


def samples(count: int, unit: str = "m") -> tuple[Split, Arrays]:
    rng = np.random.default_rng(0)
    track = rng.normal(0.4, 0.1, (count, 20, 2)).cumsum(1).astype(np.float32)
    paths = (track[:, None, 8:] + rng.normal(0, 0.2, (count, 5, 12, 2))).astype(np.float32)
    split = Split({"observed": track[:, :8], "future": track[:, 8:]}, ("observed",), {"unit": unit})
    return split, {"trajectories": paths, "probability": rng.dirichlet(np.ones(5), count).astype(np.float32)}


@pytest.mark.parametrize("unit", ["m", "px"])
def test_worst_and_random_samples_are_two_pictures(unit: str) -> None:
    split, outputs = samples(5, unit)
    found = trajectory.figures(split, {"student": outputs, "teacher": outputs})
    assert [title.rpartition(": ")[2] for title, _ in found] == ["the student's worst, worst first", "drawn at random"]
    first, second = (Image.open(io.BytesIO(png)) for _, png in found)
    assert first.width == second.width
    assert first.height > 1.5 * second.height  # three samples in two rows, two in one


def test_one_sample_of_a_student_alone_is_a_picture() -> None:
    split, outputs = samples(1)
    ((_, png),) = trajectory.figures(split, {"student": outputs})
    assert png.startswith(b"\x89PNG")


def test_what_is_drawn_is_where_it_was_predicted() -> None:
    from matplotlib.figure import Figure

    observed, future = np.array([[0.0, 0], [1, 0]]), np.array([[2.0, 0], [3, 0]])
    paths = np.array([[[1.0, 1], [1, 2]], [[2, 0.1], [3, 0.1]], [[1, -1], [1, -2]]])
    axes = Figure().add_subplot()
    trajectory_figures.draw(axes, observed, future, paths, np.array([0.2, 0.2, 0.6]))
    lines = {str(line.get_label()): np.asarray(line.get_xydata()) for line in axes.lines}
    assert lines["observed"].tolist() == observed.tolist()
    assert lines["true future"].tolist() == [[1, 0], *future.tolist()]
    assert lines["nearest of the predicted"].tolist() == [[1, 0], *paths[1].tolist()]
    assert lines["most probable"].tolist() == [[1, 0], *paths[2].tolist()]
    shades = {tuple(np.asarray(line.get_xydata())[-1]): line.get_alpha() for line in axes.lines if line.get_alpha()}
    assert shades[1, -2] > shades[1, 2] == shades[3, 0.1]
    trajectory_figures.draw(axes, observed, None, paths, np.array([0.2, 0.2, 0.6]))


def test_all_of_a_sample_fits_into_its_square() -> None:
    tracks = [np.array([[0.0, 0], [4, 1]]), np.zeros((3, 2, 2))]
    (x0, x1), (y0, y1) = trajectory_figures._limits(tracks)
    assert x1 - x0 == pytest.approx(y1 - y0)
    assert x0 < 0 < 4 < x1
    assert y0 < 0 < 1 < y1


def test_the_unit_is_the_data_s_and_the_digits_the_task_s() -> None:
    assert (unit_of(trajectory, {"unit": "px"}), unit_of(trajectory, {}), digits_of(trajectory)) == ("px", "m", 3)
    assert (unit_of(classification, {}), digits_of(classification)) == ("%", 2)
