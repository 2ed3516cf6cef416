"""Simulated pedestrians: real enough to develop on, free to share, always the same for a seed.

Everyone is driven towards the next gate of a route (Helbing & Molnar 1995), gives way by the law that Moussaid et al.
measured (2009), and keeps off bodies and walls by an exponential push. What makes a future uncertain: routes part at
junctions, some people walk in groups, some stop for a while, and headings wander. Metres and seconds; a point or
vector of the plane is a complex number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolchain.tasks.tracks import Recording

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Vectors = NDArray[np.complex128]
Line = tuple[complex, complex]
Route = tuple[float, tuple[Line, ...]]

SPEED, SPEED_SD, SPEED_RANGE = 1.34, 0.26, (0.7, 2.1)  # m/s, desired: Helbing & Molnar 1995
RELAXATION = 0.5  # s to reach the desired velocity: ibid.
RADIUS = 0.2  # m of a body
GIVE_WAY, GAMMA, TURN, BRAKE, RELATIVE = 4.5, 0.35, 2.0, 3.0, 2.0  # A in m/s2, gamma, n, n', lambda: Moussaid 2009
PUSH, PUSH_RANGE = 3.0, 0.1  # m/s2 at touch, m of its decay: a and b ibid., there from a wall to the centre
BEHIND = 0.2  # share of giving way to those behind: anisotropy after Helbing & Molnar 1995
WANDER, WANDER_TIME = 0.06, 2.0  # rad of the heading's drift, s of its memory
AIM = 0.6  # m behind a gate that people aim at; it is crossed when their body is behind it
GROUPS = (0.72, 0.22, 0.06)  # shares of arrivals of 1, 2 and 3 people
ABREAST, TOGETHER = 0.7, 0.95  # m between people of a group, factor of their speed
PAUSES = 0.06  # share of people who stop once
STRONGEST = 6.0  # m/s2
STEP, SAMPLE, WARM_UP = 0.08, 0.4, 20.0  # s: of the integration, between samples, before the first sample
FRAME_STEP = 10  # frame ids of one sample, as in ETH/UCY
SLOTS = 20  # people in a scene at once
FAR = 1e3  # m: where nobody is


@dataclass(frozen=True)
class Scene:
    """Walls and routes, with how often each is chosen; ``rate``: arrivals (of one person or group) per second.

    A route is gates that a person crosses, each at a point of his own: the first is the way in, the last the way out.
    """

    name: str
    walls: tuple[Line, ...]
    routes: tuple[Route, ...]
    rate: float


def _both(weight: float, *gates: Line) -> tuple[Route, Route]:
    return (weight, gates), (weight, gates[::-1])


def _corridor() -> Scene:
    """18 m long and 5 m wide, with a side door, and a pillar to walk around."""
    west, east, door = (-9 - 2j, -9 + 2j), (9 - 2j, 9 + 2j), (1.5 + 4.5j, 3.5 + 4.5j)
    above, below, turn = (-1 + 0.7j, -1 + 2j), (-1 - 2j, -1 - 0.7j), (1.5 + 2.4j, 3.5 + 2.4j)
    walls = (
        (-12 - 2.5j, 12 - 2.5j),
        (-12 + 2.5j, 1 + 2.5j),
        (4 + 2.5j, 12 + 2.5j),
        (1 + 2.5j, 1 + 6j),
        (4 + 2.5j, 4 + 6j),
        (-1 - 0.2j, -1 + 0.2j),
    )
    routes = (
        *_both(3, west, above, east),
        *_both(3, west, below, east),
        *_both(1, west, above, turn, door),
        *_both(1, east, turn, door),
    )
    return Scene("corridor", walls, routes, 0.35)


def _crossing() -> Scene:
    """Four arms of 5 m that meet: straight on, left or right."""
    arms = (-9 - 1.9j, -9 + 1.9j), (9 - 1.9j, 9 + 1.9j), (-1.9 - 9j, 1.9 - 9j), (-1.9 + 9j, 1.9 + 9j)
    middle = (-1.5 - 1.5j, 1.5 + 1.5j), (-1.5 + 1.5j, 1.5 - 1.5j)
    corners = [complex(x, y) for x in (-2.5, 2.5) for y in (-2.5, 2.5)]
    walls = [(c, complex(4 * c.real, c.imag)) for c in corners] + [(c, complex(c.real, 4 * c.imag)) for c in corners]
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    routes = [_both(6 if a // 2 == b // 2 else 1, arms[a], middle[(a + b) % 2], arms[b]) for a, b in pairs]
    return Scene("crossing", tuple(walls), tuple(route for both in routes for route in both), 0.4)


def _square() -> Scene:
    """Open, with trees; people cut across, some by way of a kiosk."""
    west, east, south, north = (-9 - 5j, -9 + 5j), (9 - 5j, 9 + 5j), (-6 - 7j, 6 - 7j), (-6 + 7j, 6 + 7j)
    kiosk = (-1.5 + 1.5j, 1.5 + 1.5j)
    trees = (-3.5 - 2.2j, 2.2 + 2.8j, 3.4 - 3j, -4 + 3.2j)
    routes = (
        *_both(3, west, east),
        *_both(1, south, north),
        *_both(1, west, north),
        *_both(1, east, south),
        *_both(0.5, west, kiosk, south),
        *_both(0.5, east, kiosk, north),
    )
    return Scene("square", tuple((tree, tree) for tree in trees), routes, 0.45)


def _doorway() -> Scene:
    """A wall with two doors: which one, and where to behind it."""
    west, doors = (-9 - 3.5j, -9 + 3.5j), ((1.2j, 2.4j), (-2.4j, -1.2j))
    goals = (4, (9 - 3.5j, 9 + 3.5j)), (1, (5 + 6j, 8 + 6j))
    walls = (2.8j, 8j), (-0.8j, 0.8j), (-8j, -2.8j), (-12 - 4.2j, 12 - 4.2j)
    routes = [_both(weight, west, door, goal) for door in doors for weight, goal in goals]
    return Scene("doorway", walls, tuple(route for both in routes for route in both), 0.35)


SCENES = (_corridor(), _crossing(), _square(), _doorway())
WALLS = max(len(scene.walls) for scene in SCENES)
GATES = max(len(gates) for scene in SCENES for _, gates in scene.routes)


class _Crowd:
    """The people of R recordings, SLOTS places each; in an empty place ``agent`` is -1, far away."""

    def __init__(self, scenes: list[Scene], seed: int) -> None:
        shape = len(scenes), SLOTS
        self.scenes = scenes
        self.rng = [np.random.default_rng([seed, i]) for i in range(len(scenes))]
        self.count = [0] * len(scenes)  # agents so far
        self.agent = np.full(shape, -1)
        self.group = np.empty(shape, np.int64)
        self.at, self.velocity = np.empty(shape, complex), np.empty(shape, complex)
        self.empty(self.agent < 0)
        self.speed, self.drift = np.zeros(shape), np.zeros(shape)  # desired; rad off the way to the gate
        self.pause = np.zeros((2, *shape))  # from and until
        self.route, self.across = np.zeros((*shape, GATES), complex), np.ones((*shape, GATES), complex)
        self.stage = np.zeros(shape, np.int64)  # the gate in front; the last is the way out
        self.walls = np.full((len(scenes), WALLS, 2), -FAR, complex)
        for walls, scene in zip(self.walls, scenes, strict=True):
            walls[: len(scene.walls)] = scene.walls

    def empty(self, gone: NDArray[np.bool_]) -> None:
        slots = np.nonzero(gone)[1]
        self.agent[gone], self.group[gone] = -1, -1 - slots
        self.at[gone], self.velocity[gone] = FAR * (1 + slots), 0

    def arrive(self, now: float) -> None:
        """New people, alone or in groups, where there is room."""
        for r, (scene, rng) in enumerate(zip(self.scenes, self.rng, strict=True)):
            if rng.random() > scene.rate * SAMPLE:
                continue
            size = int(rng.choice([1, 2, 3], p=GROUPS))
            weights = np.array([weight for weight, _ in scene.routes])
            gates = np.array(scene.routes[rng.choice(len(weights), p=weights / weights.sum())][1])
            start, end = gates.T
            share = rng.uniform(0.05, 0.95, len(gates))
            room = ABREAST / 2 * (size - 1) / abs(end[0] - start[0])
            share[0] = np.clip(share[0], room, 1 - room)
            points = start + (end - start) * share
            way = np.diff(points, prepend=2 * points[0] - points[1])
            across = 1j * (end - start) / np.abs(end - start)
            across *= np.sign((across.conj() * way).real)
            points[1:] += AIM * across[1:]
            speed = np.clip(rng.normal(SPEED, SPEED_SD), *SPEED_RANGE) * (1 if size == 1 else TOGETHER)
            stops = now + rng.uniform(1, 12) if rng.random() < PAUSES else np.inf
            pause = stops, stops + rng.uniform(1, 5)
            heading = way[1] / abs(way[1])
            places = points[0] + ABREAST * 1j * heading * (np.arange(size) - (size - 1) / 2)
            free = np.flatnonzero(self.agent[r] < 0)[:size]
            if len(free) < size or np.abs(self.at[r] - places[:, None]).min() < 0.9:
                continue
            self.agent[r, free] = self.count[r] + np.arange(size)
            self.group[r, free] = self.count[r]
            self.at[r, free], self.velocity[r, free], self.speed[r, free] = places, speed * heading, speed
            self.drift[r, free] = rng.normal(0, WANDER, size)
            self.pause[:, r, free] = np.array(pause)[:, None]
            self.route[r, free, -len(gates) :], self.across[r, free, -len(gates) :] = points, across
            self.stage[r, free] = GATES - len(gates) + 1
            self.count[r] += size

    def leave(self) -> None:
        beyond = (self.across[..., -1].conj() * (self.at - self.route[..., -1])).real
        self.empty((self.agent >= 0) & (self.stage == GATES - 1) & (beyond > RADIUS - AIM))

    def move(self, now: float, noise: Floats) -> None:
        """One step; ``noise`` (R, SLOTS) is standard normal."""
        stage = self.stage[..., None]
        goal = np.take_along_axis(self.route, stage, 2)[..., 0] - self.at
        beyond = -(np.take_along_axis(self.across, stage, 2)[..., 0].conj() * goal).real
        self.stage = np.minimum(self.stage + (beyond > RADIUS - AIM), GATES - 1)
        memory = STEP / WANDER_TIME
        self.drift += WANDER * np.sqrt(2 * memory) * noise - memory * self.drift
        walks = (now < self.pause[0]) | (now >= self.pause[1])
        wanted = self.speed * walks * _unit(goal) * np.exp(1j * self.drift)
        force = (wanted - self.velocity) / RELAXATION + self._people() + self._walls()
        force *= np.minimum(1, STRONGEST / np.maximum(np.abs(force), 1e-9))
        self.velocity += STEP * force * (self.agent >= 0)
        self.at += STEP * self.velocity

    def _people(self) -> Vectors:
        """(R, SLOTS) m/s2: give way to all but one's group, and keep off bodies."""
        to = self.at[:, None, :] - self.at[:, :, None]  # from i to j
        distance = np.abs(to)
        e = _unit(to)
        closing = RELATIVE * (self.velocity[:, :, None] - self.velocity[:, None, :]) + e
        reach, t = GAMMA * np.abs(closing), _unit(closing)
        angle = np.angle(e * t.conj())
        near = np.exp(-distance / np.maximum(reach, 1e-9))
        brake = near * np.exp(-((BRAKE * reach * angle) ** 2))
        turn = near * np.exp(-((TURN * reach * angle) ** 2)) * np.sign(angle)
        ahead = (_unit(self.velocity)[:, :, None].conj() * e).real
        same = self.group[:, :, None] == self.group[:, None, :]
        weight = GIVE_WAY * (BEHIND + (1 - BEHIND) * (1 + ahead) / 2) * ~same
        push = PUSH * np.exp((2 * RADIUS - distance) / PUSH_RANGE)
        force: Vectors = -(weight * t * (brake + 1j * turn) + push * e).sum(2)
        return force

    def _walls(self) -> Vectors:
        """(R, SLOTS) m/s2 away from the nearest point of each wall."""
        start, along = self.walls[:, None, :, 0], (self.walls[..., 1] - self.walls[..., 0])[:, None]
        to = self.at[:, :, None] - start
        share = (to * along.conj()).real / np.maximum(np.abs(along) ** 2, 1e-9)
        away = to - along * np.clip(share, 0, 1)
        force: Vectors = (PUSH * np.exp((RADIUS - np.abs(away)) / PUSH_RANGE) * _unit(away)).sum(2)
        return force


def _unit(vectors: Vectors) -> Vectors:
    return vectors / np.maximum(np.abs(vectors), 1e-9)


def simulate(recordings: int = 8, seconds: float = 160.0, seed: int = 0) -> list[Recording]:
    """Recordings of ``seconds`` each, over the scenes in turn: metres, a sample each 0.4 s, frame ids 10 apart.

    Recording number i depends on ``seed`` and ``i`` alone.
    """
    scenes = [SCENES[i % len(SCENES)] for i in range(recordings)]
    crowd = _Crowd(scenes, seed)
    steps, warm_up = round(SAMPLE / STEP), round(WARM_UP / SAMPLE)
    agents, points = [], []
    for sample in range(-warm_up, round(seconds / SAMPLE)):
        now = sample * SAMPLE
        crowd.leave()
        crowd.arrive(now)
        if sample >= 0:
            agents.append(crowd.agent.copy())
            points.append(crowd.at.copy())
        noise = np.stack([rng.standard_normal((steps, SLOTS)) for rng in crowd.rng], 1)
        for i in range(steps):
            crowd.move(now + i * STEP, noise[i])
    agent, at = np.stack(agents, 1), np.stack(points, 1)  # (R, samples, SLOTS)
    return [_recording(f"{scene.name}_{i:02d}", agent[i], at[i]) for i, scene in enumerate(scenes)]


def _recording(name: str, agent: Integers, at: Vectors) -> Recording:
    """From (samples, SLOTS) to rows sorted by frame, then agent."""
    sample, slot = np.nonzero(agent >= 0)
    agent, at = agent[sample, slot], at[sample, slot]
    order = np.lexsort((agent, sample))
    xy = np.stack([at.real, at.imag], 1)
    return Recording(name, FRAME_STEP * sample[order], agent[order], xy[order], FRAME_STEP)
