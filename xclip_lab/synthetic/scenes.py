"""What can be seen in a clip: coloured shapes, and motions that come in pairs opposite in time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

COLOURS = {
    "red": (225, 35, 35),
    "green": (40, 165, 60),
    "blue": (50, 90, 245),
    "yellow": (250, 225, 45),
    "orange": (250, 130, 20),
    "purple": (155, 60, 210),
    "cyan": (60, 220, 235),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
MOTIONS = (
    ("moves right", "moves left"),
    ("moves down", "moves up"),
    ("grows", "shrinks"),
    ("turns clockwise", "turns counterclockwise"),
    ("meets", "leaves"),
)
"""Each motion as (action, the same frames backwards)."""
TURN, MEET = 3, 4

_COLOUR_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Thing:
    """One coloured shape."""

    colour: str
    shape: str


@dataclass(frozen=True)
class Pose:
    """Centre, radius (fractions of the side) and angle (radians, clockwise on the screen)."""

    x: float
    y: float
    radius: float
    angle: float = 0.0


@dataclass(frozen=True)
class Action:
    """What things do, apart from where: `MOTIONS[motion]`, backwards if `reverse`.

    `things` holds the one that acts and, for meets and leaves, the one that stands still.
    """

    things: tuple[Thing, ...]
    motion: int
    reverse: bool

    @property
    def verb(self) -> str:
        """Such as `moves left`."""
        return MOTIONS[self.motion][self.reverse]

    def opposite(self) -> Action:
        """The same things in the time-reversed motion."""
        return replace(self, reverse=not self.reverse)


@dataclass(frozen=True)
class Event:
    """An action with its place. The first thing goes from `start` to `end`, or back if `action.reverse`; the
    second one, if any, stays at `still`. So opposite actions show the same frames in opposite order."""

    action: Action
    start: Pose
    end: Pose
    still: Pose | None = None


def is_held_out(thing: Thing, motion: int) -> bool:
    """Whether this colour, shape and motion (in both directions) are kept from training.

    35 of the 232 possible triples, spread so that each colour, shape and motion, and every two of them, still
    occur together in training.
    """
    if motion == TURN and thing.shape == "circle":
        return False
    colour, shape = _COLOUR_NAMES.index(thing.colour), SHAPES.index(thing.shape)
    return (9 * colour + 3 * shape + 8 * motion) % 20 < 3


def held_out_things(action: Action) -> list[Thing]:
    """The things of an action whose combination is kept from training."""
    return [thing for thing in action.things if is_held_out(thing, action.motion)]


def draw_actions(rng: np.random.Generator, count: int) -> tuple[Action, ...]:
    """`count` actions (at most 4) that share no colour, no shape and no motion, so that a word of one is
    never true of another."""
    while True:
        colours = iter(rng.permutation(len(COLOURS)))
        shapes = iter(rng.permutation(len(SHAPES)))
        actions = []
        for motion in rng.permutation(len(MOTIONS))[:count]:
            things = tuple(_thing(colours, shapes) for _ in range(2 if motion == MEET else 1))
            actions.append(Action(things, int(motion), bool(rng.integers(2))))
        # A circle that turns looks the same in every frame.
        if not any(action.motion == TURN and action.things[0].shape == "circle" for action in actions):
            return tuple(actions)


def place(rng: np.random.Generator, action: Action) -> Event:
    """Give an action its place. The draw does not depend on the direction."""
    if action.motion == MEET:
        return _place_meeting(rng, action)
    radius = rng.uniform(0.15, 0.19)
    if action.motion in (0, 1):
        along = rng.uniform(0.18, 0.26), rng.uniform(0.74, 0.82)
        across = rng.uniform(0.3, 0.7)
        if action.motion == 0:
            start, end = Pose(along[0], across, radius), Pose(along[1], across, radius)
        else:
            start, end = Pose(across, along[0], radius), Pose(across, along[1], radius)
        return Event(action, start, end)
    x, y = rng.uniform(0.32, 0.68, 2)
    if action.motion == TURN:
        # Under half of a star's 72 degrees between two poses, also where an event has but three.
        angle, sweep = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(50, 60))
        start = Pose(x, y, radius * 1.1, angle)
        return Event(action, start, replace(start, angle=angle + sweep))
    small, large = rng.uniform(0.08, 0.1), rng.uniform(0.24, 0.28)
    return Event(action, Pose(x, y, small), Pose(x, y, large))


def _place_meeting(rng: np.random.Generator, action: Action) -> Event:
    mover, other = rng.uniform(0.13, 0.15, 2)
    side = 1 if rng.integers(2) else -1
    across, shift = rng.uniform(0.3, 0.7), rng.uniform(-0.03, 0.03)
    there = 0.5 + side * 0.3 + shift
    far, near = 0.5 - side * 0.32 + shift, there - side * (mover + other) * 0.95
    if rng.integers(2):
        return Event(action, Pose(far, across, mover), Pose(near, across, mover), Pose(there, across, other))
    return Event(action, Pose(across, far, mover), Pose(across, near, mover), Pose(across, there, other))


def _thing(colours: Iterator[int], shapes: Iterator[int]) -> Thing:
    return Thing(_COLOUR_NAMES[next(colours)], SHAPES[next(shapes)])
