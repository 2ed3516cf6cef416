from __future__ import annotations

import io

import numpy as np
from PIL import Image

from toolchain.tasks.qa_figures import matrices

LANGUAGES = ["en", "es", "zh"]


def test_the_matrix_is_drawn_for_student_teacher_and_their_difference() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.uniform(0, 100, (2, 3, 3))
    student[0, 2] = np.nan
    sizes = []
    for cells in ({"student": student}, {"student": student, "teacher": teacher}):
        ((title, png),) = matrices(LANGUAGES, cells)
        assert "F1" in title
        image = Image.open(io.BytesIO(png))
        assert len(np.unique(np.asarray(image.convert("L")))) > 50
        sizes.append(image.size)
    assert abs(sizes[1][0] - 3 * sizes[0][0]) < 10
    assert sizes[1][1] == sizes[0][1]


def test_without_cells_there_is_no_picture() -> None:
    assert matrices(LANGUAGES, {}) == []
    assert matrices(LANGUAGES, {"student": np.full((3, 3), np.nan)}) == []
