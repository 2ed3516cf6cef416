"""What a method is made of: a Distiller learns, a Frozen teaches."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


class Distiller(nn.Module):
    """A student with all that helps it learn; only ``student`` ships.

    ``progress`` is the share of this training's steps already done, in [0, 1); the training loop sets it before each
    step. Set ``no_decay = True`` on a module to keep weight decay off its own parameters.
    """

    student: nn.Module
    progress: float = 0.0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``loss`` (a scalar to minimise) and further scalars to log."""
        raise NotImplementedError

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for the optimiser; one without ``weight_decay`` gets the recipe's.

        Default: all that requires a gradient, without decay on norms, biases and modules flagged ``no_decay``.
        """
        decayed: dict[int, nn.Parameter] = {}
        free: dict[int, nn.Parameter] = {}
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    exempt = parameter.ndim < 2 or getattr(module, "no_decay", False)
                    (free if exempt else decayed)[id(parameter)] = parameter
        groups: list[dict[str, Any]] = [
            {"params": list(decayed.values()), "lr": lr},
            {"params": [p for key, p in free.items() if key not in decayed], "lr": lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def on_epoch_start(self, epoch: int) -> None:
        """Called before the first step of each epoch; an epoch resumed midway does not call it again."""


class Frozen(nn.Module):
    """A copy of ``module`` that teaches: in eval mode whatever ``train()`` says, without gradients.

    It has no parameters and an empty state dict, so optimisers and artifacts do not see it; ``to()`` moves it.
    ``module`` is the copy, for calls other than ``forward``; they need a ``torch.no_grad()`` of their own.
    """

    module: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.training = False
        self.refreshed = False
        self._hold(module)

    def _hold(self, module: nn.Module) -> None:
        held = copy.deepcopy(module).eval().requires_grad_(False)
        self.__dict__["module"] = held  # not a registered child: out of parameters(), state_dict() and train()

    def refresh(self, module: nn.Module) -> None:
        """Become a copy of ``module`` as it is now. From here on training checkpoints include the copy."""
        self._hold(module)
        self.refreshed = True

    def train(self, mode: bool = True) -> Frozen:
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        self.module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def frozen_parts(distiller: nn.Module) -> dict[str, Frozen]:
    """The Frozen modules inside, by their place."""
    return {name: module for name, module in distiller.named_modules() if isinstance(module, Frozen)}


def fingerprint(distiller: nn.Module) -> str:
    """sha256 of every weight, the frozen ones too."""
    state = hashlib.sha256()
    for module in (distiller, *(frozen.module for frozen in frozen_parts(distiller).values())):
        for name, tensor in module.state_dict().items():
            state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
