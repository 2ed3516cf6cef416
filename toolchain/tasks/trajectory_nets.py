"""Networks for pedestrian trajectories, and the adapter that makes a trained one deployable.

``Step``, ``Destination`` and ``PPT`` are the three networks of Lin, Liang, Lai, Hu, *Progressive Pretext Task Learning
for Human Trajectory Prediction* (ECCV 2024, arXiv 2407.11588), each built from the one before it; ``OneShot`` is ours,
small enough for a camera. Tracks are relative to the last observed position and multiplied by the scale (metres to the
loss's unit); a network divides them by ``unit`` inside and multiplies what it predicts back. Two more ways to see them
are ours: with a ``speed_floor`` that divisor is proportional to the observed speed, where it is above the floor, and
the network is told by how much; with ``align_heading`` they are turned, and back, so that everyone walks along x.

Every network that ships maps observed (B, T_o, 2) to paths (B, K, T_p, 2) and the hypotheses' logits (B, K).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolchain.artifact import Port, verify
from toolchain.tasks.backbones import WEIGHTS, ModelError, load_state, seeded
from toolchain.tasks.nets import Deploy, count_parameters, made_by, own

EVERY, LAST = slice(None), slice(-1, None)
STANDS = 1e-3  # scaled units from the first to the last observed position that are no way to walk
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


def in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer`` of ``x`` in float32 under autocast too: eight bits of a coordinate in bf16 are centimetres."""
    if not torch.is_autocast_enabled(x.device.type):
        return layer(x)  # type: ignore[no-any-return]
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float())  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head self-attention over (B, T, d), for the tokens ``keep`` alone; ``causal`` hides later tokens."""

    mask: Tensor

    def __init__(self, width: int, heads: int, dropout: float, steps: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop_weights, self.drop = nn.Dropout(dropout), nn.Dropout(dropout)
        self.register_buffer("mask", torch.full((steps, steps), -torch.inf).triu(1), persistent=False)

    def forward(self, x: Tensor, causal: bool, keep: slice) -> Tensor:
        steps, width = x.shape[1:]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = self._split(F.linear(x[:, keep], weight[:width], bias[:width]))
        k, v = (self._split(part) for part in F.linear(x, weight[width:], bias[width:]).chunk(2, -1))
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if causal:
            weights = weights + self.mask[:steps, :steps][keep]
        mixed = self.drop_weights(weights.softmax(-1)) @ v
        return self.drop(self.out(mixed.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, heads, T, d / heads)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block: x += MHA(LN(x)); x += MLP(LN(x))."""

    def __init__(self, width: int, heads: int, dropout: float, activation: str, steps: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout, steps)
        layers = nn.Linear(width, 4 * width), ACTIVATIONS[activation](), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(*layers, nn.Dropout(dropout))

    def forward(self, x: Tensor, causal: bool, keep: slice = EVERY) -> Tensor:
        x = x[:, keep] + self.attention(self.norm_attention(x), causal, keep)
        return x + self.mlp(self.norm_mlp(x))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Tokens (B, T, d) at learned positions (time steps 1..``steps``) to features after a final LayerNorm.

    The last layer computes the features of the tokens ``keep`` alone: what no loss and no head reads costs nothing.

    Linear and embedding weights are drawn from N(0, .02), the attention's output projection from N(0, .02/sqrt(2 L)).
    """

    def __init__(self, width: int, depth: int, heads: int, dropout: float, activation: str, steps: int) -> None:
        super().__init__()
        self.place = nn.Embedding(steps + 1, width)
        self.drop = nn.Dropout(dropout)
        blocks = [Block(width, heads, dropout, activation, steps) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in blocks:
            nn.init.normal_(block.attention.out.weight, std=0.02 / math.sqrt(2 * depth))

    def forward(self, tokens: Tensor, positions: Sequence[int], causal: bool, keep: slice = EVERY) -> Tensor:
        x = self.drop(tokens + self.place.weight[list(positions)])
        for block in self.blocks[:-1]:
            x = block(x, causal)
        return self.norm(self.blocks[-1](x, causal, keep))  # type: ignore[no-any-return]


def mlp(inside: int, hidden: int, outside: int) -> nn.Sequential:
    """Three ReLU layers and a linear one, as all of PPT's larger heads."""
    widths = [inside, hidden, hidden, hidden]
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(hidden, outside))


@dataclass(frozen=True)
class Frame:
    """How a network sees positions (B, t, 2): in units of ``divisor`` ((B, 1, 1), or a number for all), and turned so
    that ``heading``, (B, 1, 2) of length 1, points along x."""

    divisor: Tensor | float
    heading: Tensor | None = None

    def inside(self, places: Tensor) -> Tensor:
        return self._turned(places / self.divisor, 1)

    def outside(self, places: Tensor) -> Tensor:
        return self._turned(places, -1) * self.divisor

    def _turned(self, places: Tensor, sign: int) -> Tensor:
        if self.heading is None:
            return places
        x, y = places[..., :1], places[..., 1:]
        cos, sin = self.heading[..., :1], sign * self.heading[..., 1:]
        return torch.cat([x * cos + y * sin, y * cos - x * sin], -1)


@dataclass(frozen=True)
class Shape:
    """Sizes of a network: see ``trajectory.StudentSection``; ``observe`` and ``predict`` are time steps.

    ``speed_floor`` is in scaled units a step.
    """

    observe: int
    predict: int
    hypotheses: int = 20
    width: int = 128
    depth: int = 3
    heads: int = 8
    dropout: float = 0.1
    activation: str = "gelu"
    unit: float = 60.0
    speed_floor: float | None = None
    align_heading: bool = False

    @property
    def steps(self) -> int:
        return self.observe + self.predict

    def inp(self) -> nn.Linear:
        """The layer that makes tokens of x, y and, with a ``speed_floor``, the logarithm of the relative speed."""
        return nn.Linear(2 if self.speed_floor is None else 3, self.width)

    def relative_speed(self, observed: Tensor) -> Tensor | float:
        """(B, t, 2), 2 <= t -> (B, 1, 1): mean step over ``speed_floor``, at least 1; 1.0 without one."""
        if self.speed_floor is None:
            return 1.0
        step: Tensor = (observed[:, 1:] - observed[:, :-1]).norm(dim=-1).mean(1)
        return (step / self.speed_floor).clamp(min=1)[:, None, None]

    def frame(self, observed: Tensor) -> Frame:
        """Of observed positions (B, t, 2), 2 <= t. The heading is from first to last; who stands heads along x."""
        divisor = self.unit * self.relative_speed(observed)
        if not self.align_heading:
            return Frame(divisor)
        way = observed[:, -1:] - observed[:, :1]
        length = way.norm(dim=-1, keepdim=True)
        return Frame(divisor, torch.where(length > STANDS, way / length.clamp(min=STANDS), way.new_tensor([1.0, 0.0])))

    def tokens(self, inp: nn.Module, places: Tensor, frame: Frame) -> Tensor:
        """Positions (B, t, 2) -> (B, t, d)."""
        inside, divisor = frame.inside(places), frame.divisor
        if isinstance(divisor, Tensor):
            inside = torch.cat([inside, (divisor / self.unit).log().expand(*places.shape[:2], 1)], -1)
        return in_float32(inp, inside)

    def encoder(self) -> Encoder:
        return Encoder(self.width, self.depth, self.heads, self.dropout, self.activation, self.steps)


class Step(nn.Module):
    """Task I: a causal network that predicts each next position. Positions 1..T-1 in, 2..T out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.inp, self.encoder, self.head = shape.inp(), shape.encoder(), nn.Linear(shape.width, 2)

    def features(self, track: Tensor) -> Tensor:
        """(B, t, 2), t < T -> (B, t, d)."""
        tokens = self.shape.tokens(self.inp, track, self._frame(track))
        return self.encoder(tokens, range(1, track.shape[1] + 1), causal=True)  # type: ignore[no-any-return]

    def forward(self, track: Tensor) -> Tensor:
        """(B, t, 2) -> (B, t, 2): the position after each."""
        return self._frame(track).outside(in_float32(self.head, self.features(track)))

    def _frame(self, track: Tensor) -> Frame:
        return self.shape.frame(track[:, : self.shape.observe])


class Destination(nn.Module):
    """Task II: K candidates for the last position in one jump.

    ``inp`` and ``encoder`` are copies of ``step``'s; a prompt stands at position T - 1, whose token in task I predicts
    position T.
    """

    def __init__(self, step: Step) -> None:
        super().__init__()
        shape = self.shape = step.shape
        self.inp, self.encoder = copy.deepcopy(step.inp), copy.deepcopy(step.encoder)
        self.prompt = nn.Parameter(torch.rand(shape.width))
        self.pin = nn.Linear(shape.width, shape.width)
        self.head = mlp(shape.width, 4 * shape.width, 2 * shape.hypotheses)
        self.positions = (*range(1, shape.observe + 1), shape.steps - 1)

    def feature(self, observed: Tensor) -> Tensor:
        """(B, T_o, 2) -> (B, d): the prompt's feature."""
        prompt = self.pin(self.prompt).expand(observed.shape[0], 1, -1)
        tokens = torch.cat([self.shape.tokens(self.inp, observed, self.shape.frame(observed)), prompt], 1)
        return self.encoder(tokens, self.positions, causal=True, keep=LAST)[:, 0]  # type: ignore[no-any-return]

    def candidates(self, feature: Tensor, observed: Tensor) -> Tensor:
        """(B, d) and (B, T_o, 2) -> (B, K, 2)."""
        found = in_float32(self.head, feature).view(feature.shape[0], -1, 2)
        return self.shape.frame(observed).outside(found)

    def forward(self, observed: Tensor) -> Tensor:
        """(B, T_o, 2) -> (B, K, 2)."""
        return self.candidates(self.feature(observed), observed)


class PPT(nn.Module):
    """Task III: the destination predictor, and a trajectory predictor that fills in the way to each candidate.

    The trajectory predictor starts as a copy of ``destination``'s parts, with a prompt for each of the T_p - 1 steps
    between; it attends in both directions. ``log_share`` (K,) is the logarithm of each hypothesis' share of the
    training windows whose destination it was nearest to: PPT itself does not rank its hypotheses.
    """

    log_share: Tensor

    def __init__(self, destination: Destination) -> None:
        super().__init__()
        shape = self.shape = destination.shape
        width = shape.width
        self.destination = copy.deepcopy(destination)
        self.inp, self.encoder = copy.deepcopy(destination.inp), copy.deepcopy(destination.encoder)
        self.pin = copy.deepcopy(destination.pin)
        self.prompts = nn.Parameter(destination.prompt.detach().repeat(shape.predict - 1, 1))
        self.first, self.middle = nn.Linear(width, 2), nn.Linear(width, 2)
        self.last = mlp(width, 4 * width, 2)
        self.register_buffer("log_share", torch.full((shape.hypotheses,), -math.log(shape.hypotheses)))

    def complete(self, observed: Tensor, destination: Tensor) -> tuple[Tensor, Tensor]:
        """The way from ``observed`` (B, T_o, 2) to ``destination`` (B, 2).

        Returns the path (B, T_p, 2), whose end is the destination plus a correction, and the features (B, T_p, d) of
        the tokens T_o..T-1 that predict it.
        """
        shape = self.shape
        prompts = self.pin(self.prompts).expand(observed.shape[0], -1, -1)
        frame = shape.frame(observed)
        tokens = shape.tokens(self.inp, torch.cat([observed, destination[:, None]], 1), frame)
        tokens = torch.cat([tokens[:, :-1], prompts, tokens[:, -1:]], 1)
        features = self.encoder(tokens, range(1, shape.steps + 1), causal=False, keep=slice(shape.observe - 1, -1))
        first, middle = in_float32(self.first, features[:, :1]), in_float32(self.middle, features[:, 1:-1])
        last = in_float32(self.last, features[:, -1:])
        path = frame.outside(torch.cat([first, middle, last], 1))
        end = torch.cat([torch.zeros_like(path[:, :-1]), destination[:, None]], 1)
        return path + end, features

    def paths(self, observed: Tensor, candidates: Tensor) -> Tensor:
        """(B, T_o, 2) and (B, k, 2) -> (B, k, T_p, 2), the candidates folded into the batch."""
        count = candidates.shape[1]
        repeated = observed[:, None].expand(-1, count, -1, -1).reshape(-1, *observed.shape[1:])
        path, _ = self.complete(repeated, candidates.reshape(-1, 2))
        return path.view(-1, count, self.shape.predict, 2)

    def forward(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T_o, 2) -> paths (B, K, T_p, 2), logits (B, K)."""
        paths, logits, _ = self.with_feature(observed)
        return paths, logits

    def with_feature(self, observed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T_o, 2) -> paths (B, K, T_p, 2), logits (B, K), the destination predictor's feature (B, d)."""
        feature = self.destination.feature(observed)
        paths = self.paths(observed, self.destination.candidates(feature, observed))
        return paths, self.log_share.expand(observed.shape[0], -1), feature


class OneShot(nn.Module):
    """All K paths and their logits from one feature: an encoder over the observed steps, and one MLP. Source: ours."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.inp, self.encoder = shape.inp(), shape.encoder()
        hidden, outputs = 4 * shape.width, shape.hypotheses * (2 * shape.predict + 1)
        self.head = nn.Sequential(nn.Linear(shape.width, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    @property
    def width(self) -> int:
        return self.shape.width

    def feature(self, observed: Tensor) -> Tensor:
        """(B, T_o, 2) -> (B, d)."""
        tokens = self.shape.tokens(self.inp, observed, self.shape.frame(observed))
        positions = range(1, self.shape.observe + 1)
        return self.encoder(tokens, positions, causal=False, keep=LAST)[:, 0]  # type: ignore[no-any-return]

    def decode(self, feature: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, d) and (B, T_o, 2) -> paths (B, K, T_p, 2), logits (B, K)."""
        out = in_float32(self.head, feature)
        shape = self.shape
        paths = shape.frame(observed).outside(out[:, shape.hypotheses :].view(feature.shape[0], -1, 2))
        return paths.view(-1, shape.hypotheses, shape.predict, 2), out[:, : shape.hypotheses]

    def forward(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T_o, 2) -> paths (B, K, T_p, 2), logits (B, K)."""
        return self.decode(self.feature(observed), observed)


# --- building and loading


def shape_of(section: Any, info: Mapping[str, Any]) -> Shape:
    """The sizes that a ``StudentSection`` asks for, for data of ``info``."""
    keys = ("hypotheses", "width", "depth", "heads", "dropout", "activation", "unit", "align_heading")
    floor = section.speed_floor and section.speed_floor * section.scale_of(info["unit"])
    return Shape(info["observe"], info["predict"], **{key: getattr(section, key) for key in keys}, speed_floor=floor)


def build(section: Any, info: Mapping[str, Any], seed: int) -> nn.Module:
    """The network of a ``StudentSection``, drawn from ``seed`` alone. Raises ModelError."""
    shape = shape_of(section, info)
    with seeded(seed):
        if section.model == "ppt":
            net: nn.Module = PPT(Destination(Step(shape)))
        elif section.model == "one_shot":
            net = OneShot(shape)
        else:
            net = made_by(own(section.model), section)
    _probe(net, section.model, shape)
    found, allowed = count_parameters(net), section.max_parameters
    if allowed is not None and found > allowed:
        raise ModelError(
            f"student.max_parameters: allowed {allowed:,}, found {found:,} in {section.model}; "
            "lower student.width or student.depth"
        )
    return net


def _probe(net: nn.Module, name: str, shape: Shape) -> None:
    """Two tracks through ``net``, to find out now what would fail later."""
    training = net.training
    try:
        with torch.no_grad():
            found = [tuple(value.shape) for value in net.eval()(torch.zeros(2, shape.observe, 2))]
    except Exception as error:  # a user's module may raise anything
        raise ModelError(f"student.model {name} fails on tracks (2, {shape.observe}, 2): {error}") from error
    net.train(training)
    wanted = [(2, shape.hypotheses, shape.predict, 2), (2, shape.hypotheses)]
    if found != wanted:
        raise ModelError(f"student.model {name}: expected paths {wanted[0]} and logits {wanted[1]}, found {found}")


def load(folder: Path | str, section: Any) -> nn.Module:
    """A trained network from its artifact, in eval mode. Raises ArtifactError, ModelError."""
    manifest = verify(Path(folder))
    net = build(section, manifest.extra["info"], 0)
    load_state(net, Path(folder) / WEIGHTS)
    return net.eval()


# --- deployment


class World(nn.Module):
    """Tracks in the world in, K futures in the world and the probability of each out."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        last = observed[:, -1:]
        paths, logits = self.model((observed - last) * self.scale)
        return last[:, None] + paths / self.scale, logits.softmax(-1)


def deploy(model: nn.Module, section: Any, info: Mapping[str, Any]) -> Deploy:
    """``model`` as a self-contained graph over tracks in the data's own coordinates."""
    shape, unit = shape_of(section, info), info["unit"]
    observed: tuple[int | str, ...] = ("batch", shape.observe, 2)
    paths: tuple[int | str, ...] = ("batch", shape.hypotheses, shape.predict, 2)
    every = f"every {info['seconds_per_step']:g} s" + (", people walking along x" if info.get("walk_axis") else "")
    generator = torch.Generator().manual_seed(0)
    return Deploy(
        module=World(model, section.scale_of(unit)).eval(),
        inputs=[Port("observed", "float32", observed, f"x, y of the last {shape.observe} positions, {every}", unit)],
        outputs=[
            Port("trajectories", "float32", paths, f"x, y of the next {shape.predict} positions, {every}", unit),
            Port("probability", "float32", ("batch", shape.hypotheses), "probability of each trajectory", "0..1"),
        ],
        example={"observed": torch.randn(2, shape.observe, 2, generator=generator).cumsum(1)},
        dynamic={"observed": {0: "batch"}},
    )
