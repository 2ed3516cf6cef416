"""What the data stage tells of tracks, beside their counts."""

from __future__ import annotations

import numpy as np

from toolchain.tasks import Split
from toolchain.tasks.tracks import walking_axis

ETH_STEPS = (
    "the ETH recording biwi_eth is a 10-frame interpolation of 6-frame annotations, as in the literature: people move "
    "about twice as far a step as in every other scene (data.paces [1, 1.6667] with data.resampled trains for such "
    "steps), and results on the 6-frame file do not compare"
)
INTERPOLATED = (
    "{share:.0%} of the steps in the training tracks repeat the one before, as where positions were interpolated: a "
    "network may rely on that, and positions that a camera finds are noisy. To train for those, ppt and ppt_student "
    "have method.jitter, the standard deviation of the noisiest, in {unit}"
)
OFTEN = 0.2  # of the steps
TEST_VALIDATION = (
    "the held-out scene is the validation split too, as in PPT's official code, and the validation windows train: what "
    "is selected by it flatters, and serves only to compare with published figures"
)
TRAINED_VALIDATION = (
    "the validation windows train too: scores on the validation split are of windows that trained, and say nothing of "
    "others"
)

TURNED = "tracks are turned so that people walk along x (data.walk_axis), and the graph wants them so"
ALONG = (
    "who walks in the test windows keeps to an axis, {degrees:.0f}° from x ({kept:.2f} of 1): data.walk_axis turns "
    "recordings so that it is x in all, so that a network learns to expect it"
)
ASTRAY = "yet in the test windows people's axis is {degrees:.0f}° from x, and they keep to it by {kept:.2f} of 1"
EVERY_WAY = (
    "who walks in the test windows keeps to no axis ({kept:.2f} of 1): method.rotate trains on windows at any angle"
)
KEEPS = 0.6  # to an axis, see walking_axis
ENOUGH = 20  # people, to tell how people walk


def way_note(test: Split, turned: bool) -> str | None:
    """What to do about the directions that people walk in, by the observed tracks alone; None where all is well."""
    people = np.stack([test.arrays["scene"], test.arrays["agent"]])
    degrees, kept = walking_axis(test.arrays["observed"])
    if np.unique(people, axis=1).shape[1] < ENOUGH or np.isnan(kept):
        return None
    if turned:
        return None if kept >= KEEPS and abs(degrees) < 20 else ASTRAY.format(degrees=degrees, kept=kept)
    return (ALONG if kept >= KEEPS else EVERY_WAY).format(degrees=degrees, kept=kept)
