"""How the paths of several PPTs are merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from toolchain.tasks.trajectory_ensemble import Ensemble


class Says(nn.Module):
    """A PPT's double: what it predicts for every track, or for one walking left the mirror image of it."""

    def __init__(self, paths: Tensor, log_share: Tensor) -> None:
        super().__init__()
        self.paths, self.log_share = paths, log_share

    def forward(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        left = (observed[:, 0, 0] > 0).float()[:, None, None, None]
        mirror = torch.tensor([-1.0, 1.0])
        return (1 - left) * self.paths + left * self.paths * mirror, self.log_share.expand(len(observed), -1)

    def with_feature(self, observed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self(observed), torch.zeros(len(observed), 1)


def says(*ends: tuple[float, float], share: Sequence[float] | None = None) -> Says:
    """Straight paths of 3 steps to ``ends``."""
    part = torch.tensor([1 / 3, 2 / 3, 1.0])[:, None]
    chances = torch.tensor(share or [1 / len(ends)] * len(ends))
    return Says(torch.tensor(ends)[:, None] * part, chances.log())


def merged(*members: Says, mirrored: bool = False) -> tuple[Tensor, Tensor]:
    """Of one who walks to the right: paths (K, 3, 2) and probabilities (K,)."""
    observed = torch.tensor([[[-6.0, 0.0], [-3.0, 0.0], [0.0, 0.0]]])
    paths, logits = Ensemble(members, mirrored=mirrored)(observed)  # type: ignore[arg-type]
    return paths[0], logits[0].softmax(-1)


def test_an_ensemble_of_the_same_says_the_same() -> None:
    one = says((9.0, 3.0), (6.0, -6.0), share=[0.8, 0.2])
    for members in ([one], [one, one], [one, one, one]):
        paths, chances = merged(*members)
        torch.testing.assert_close(paths, one.paths)
        torch.testing.assert_close(chances, torch.tensor([0.8, 0.2]))


def test_paths_that_end_nearby_become_their_mean_in_the_first_members_order() -> None:
    paths, chances = merged(says((9.0, 3.0), (6.0, -9.0)), says((6.0, -8.0), (10.0, 3.0)))
    torch.testing.assert_close(paths, says((9.5, 3.0), (6.0, -8.5)).paths, atol=1e-3, rtol=0)
    torch.testing.assert_close(chances, torch.tensor([0.5, 0.5]), atol=1e-3, rtol=0)


def test_a_path_is_as_heavy_as_it_is_probable() -> None:
    paths, chances = merged(
        says((9.0, 3.0), (6.0, -9.0), share=[0.8, 0.2]), says((6.0, -8.0), (10.0, 3.0), share=[0.4, 0.6])
    )
    ends = (9.0 * 0.8 + 10.0 * 0.6) / 1.4, (-9.0 * 0.2 - 8.0 * 0.4) / 0.6
    torch.testing.assert_close(paths, says((ends[0], 3.0), (6.0, ends[1])).paths, atol=1e-3, rtol=0)
    torch.testing.assert_close(chances, torch.tensor([0.7, 0.3]), atol=1e-3, rtol=0)


def test_a_centre_moves_to_paths_that_another_members_centres_missed() -> None:
    paths, _ = merged(says((9.0, 0.0), (8.0, 0.0)), says((9.0, 0.0), (2.0, 0.0)), says((9.0, 0.0), (2.0, 0.0)))
    torch.testing.assert_close(paths[:, -1, 0], torch.tensor([8.75, 2.0]), atol=1e-3, rtol=0)


def test_a_centre_without_paths_stays_finite_and_keeps_its_place() -> None:
    members = [says((0.0, 0.0), (300.0, 0.0)), *[says((1.0, 0.0), (1.0, 0.5)) for _ in range(4)]]
    paths, chances = merged(*members)
    assert torch.isfinite(paths).all()
    assert torch.isfinite(chances).all()
    torch.testing.assert_close(paths[1, -1], torch.tensor([300.0, 0.0]))
    paths, _ = merged(says((0.0, 0.0), (0.0, 0.0)), says((0.0, 0.0), (0.0, 0.0)))
    assert torch.isfinite(paths).all()


def test_a_mirrored_ensemble_also_asks_for_the_mirror_image() -> None:
    paths, _ = merged(says((9.0, 3.0), (6.0, -9.0)), mirrored=True)
    torch.testing.assert_close(paths, says((9.0, 3.0), (6.0, -9.0)).paths)

    class Biased(Says):
        def forward(self, observed: Tensor) -> tuple[Tensor, Tensor]:
            return self.paths.expand(len(observed), -1, -1, -1), self.log_share.expand(len(observed), -1)

    straight = says((1.0, 9.0), (2.0, -9.0))
    paths, _ = merged(Biased(straight.paths, straight.log_share), mirrored=True)
    torch.testing.assert_close(paths[:, -1], torch.tensor([[0.0, 9.0], [0.0, -9.0]]), atol=1e-3, rtol=0)
