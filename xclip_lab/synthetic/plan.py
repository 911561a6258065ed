"""Which clips a split has: levels, pairs, spans. A pure function of the configuration and its seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xclip_lab.datasets.base import SPLITS
from xclip_lab.errors import ConfigError
from xclip_lab.synthetic.captions import TEMPLATES, Word, describe
from xclip_lab.synthetic.scenes import Action, Event, draw_actions, held_out_things, place

if TYPE_CHECKING:
    from xclip_lab.config import GenerateConfig

OBJECTS, MOTION, ORDER, DISTRACTORS = 1, 2, 3, 4
"""The levels: by what a clip differs from the one most like it, and 4: most frames are beside the point."""
_EVENTS_OF_LONG_CLIP = 4
_LENGTH_OF_LONG_CLIP = 3
_DRAWS = 2000

Span = tuple[int, int]


@dataclass(frozen=True)
class Clip:
    """One clip before it is drawn. `spans` are the events' frames `[start, stop)`, one after the other;
    `told` are the indices of the events that the caption tells; `group` is shared by the clips of a pair."""

    video_id: str
    level: int
    group: int
    events: tuple[Event, ...]
    spans: tuple[Span, ...]
    told: tuple[int, ...]
    template: int
    background: int

    @property
    def frames(self) -> int:
        """The number of frames."""
        return self.spans[-1][1]

    def words(self) -> list[Word]:
        """The caption's words."""
        return describe(tuple(self.events[index].action for index in self.told), self.template)


def video_ids(config: GenerateConfig, split: str) -> list[str]:
    """The ids of a split's clips, in order."""
    return [f"{split}-{index:06d}" for index in range(_count(config, split))]


def plan(config: GenerateConfig, split: str) -> Iterator[Clip]:
    """The clips of a split, in the order of `video_ids`.

    Every clip of val and test holds a combination that training never shows, no two of its groups show the
    same set of objects in what their captions tell, and no caption is true of another clip.

    Raises:
        ConfigError: impossible sizes or shares, or more val or test clips than there are different ones.
    """
    check(config)
    seeds = [config.seed, SPLITS.index(split)]
    levels = _levels(config, split, np.random.default_rng([*seeds, 0]))
    gallery = _Gallery()
    ids = iter(video_ids(config, split))
    for group, level in enumerate(levels):
        rng = np.random.default_rng([*seeds, 1 + group])
        for _ in range(_DRAWS):
            cast = _draw_cast(rng, level, held_out=split != "train")
            if split == "train" or gallery.add(cast):
                break
        else:
            raise ConfigError(
                f"data.generate.{split}_clips: {_count(config, split)} different clips do not exist; "
                f"about {int(next(ids).rpartition('-')[2])} are possible"
            )
        for shown, spans, told in _place(rng, cast, level, config.frames, config.hold):
            yield Clip(next(ids), level, group, shown, spans, told, cast.template, cast.background)


def check(config: GenerateConfig) -> None:
    """Raise ConfigError for what no clip can be made of."""
    if config.size < 32 or config.size % 2:
        raise ConfigError(
            f"data.generate.size: {config.size} is not allowed (expected an even number from 32)"
        )
    frames, hold = int(config.frames), int(config.hold)
    if frames % hold or frames < 4 * hold:
        raise ConfigError(
            f"data.generate.frames: {frames} is not allowed (expected a multiple of "
            f"data.generate.hold, {hold}, and at least {4 * hold})"
        )
    if not sum(config.level_shares) > 0:
        raise ConfigError("data.generate.level_shares: all are 0; give at least one level a share")
    for split in SPLITS:
        counts = _level_counts(config, split)
        if counts[MOTION] % 2 or counts[ORDER] % 2:
            raise ConfigError(
                f"data.generate.{split}_clips: {_count(config, split)} is odd, but levels 2 and 3 come in "
                "pairs; make it even or give level 1 or 4 a share"
            )


@dataclass(frozen=True)
class _Cast:
    """What a group's first clip shows, without places. `told` indexes `actions`."""

    actions: tuple[Action, ...]
    told: tuple[int, ...]
    level: int
    template: int
    background: int

    def versions(self) -> list[tuple[Action, ...]]:
        """The actions of each clip of the group."""
        if self.level == MOTION:
            return [self.actions, tuple(action.opposite() for action in self.actions)]
        if self.level == ORDER:
            return [self.actions, self.actions[::-1]]
        return [self.actions]


class _Gallery:
    """Refuses a group that shows the same told objects as another, or of which another's caption is true."""

    def __init__(self) -> None:
        self._objects: set[frozenset] = set()
        self._told: set[tuple[Action, ...]] = set()
        self._shown: set[tuple[Action, ...]] = set()

    def add(self, cast: _Cast) -> bool:
        objects = frozenset(thing for index in cast.told for thing in cast.actions[index].things)
        told = {tuple(actions[index] for index in cast.told) for actions in cast.versions()}
        shown = {part for actions in cast.versions() for part in _in_order(actions)}
        if objects in self._objects or told & self._shown or shown & self._told:
            return False
        self._objects.add(objects)
        self._told |= told
        self._shown |= shown
        return True


def _in_order(actions: tuple[Action, ...]) -> Iterator[tuple[Action, ...]]:
    """Every one and two actions that a caption could truly tell of a clip."""
    for index, action in enumerate(actions):
        yield (action,)
        for later in actions[index + 1 :]:
            yield (action, later)


def _draw_cast(rng: np.random.Generator, level: int, held_out: bool) -> _Cast:
    """Actions of which none is held out, or (`held_out`) of which a told one is."""
    long = level == DISTRACTORS
    while True:
        actions = draw_actions(rng, _EVENTS_OF_LONG_CLIP if long else 2)
        told = (int(rng.integers(len(actions))),) if long else (0, 1)
        if held_out:
            fits = any(held_out_things(actions[index]) for index in told)
        else:
            fits = not any(held_out_things(action) for action in actions)
        if fits:
            template = int(rng.integers(len(TEMPLATES[len(told)])))
            return _Cast(actions, told, level, template, int(rng.integers(2**31)))


def _place(
    rng: np.random.Generator, cast: _Cast, level: int, frames: int, hold: int
) -> Iterator[tuple[tuple[Event, ...], tuple[Span, ...], tuple[int, ...]]]:
    """Events and spans of each clip of a group; the clips share places and lengths."""
    events = tuple(place(rng, action) for action in cast.actions)
    poses = frames // hold
    if level == DISTRACTORS:
        lengths = _lengths(rng, poses * _LENGTH_OF_LONG_CLIP, _EVENTS_OF_LONG_CLIP)
    else:
        first = int(rng.integers(max(2, math.floor(0.4 * poses)), min(poses - 2, math.ceil(0.6 * poses)) + 1))
        lengths = [first, poses - first]
    lengths = [length * hold for length in lengths]
    yield events, _spans(lengths), cast.told
    if level == MOTION:
        opposite = tuple(Event(e.action.opposite(), e.start, e.end, e.still) for e in events)
        yield opposite, _spans(lengths), cast.told
    elif level == ORDER:
        yield events[::-1], _spans(lengths[::-1]), cast.told


def _lengths(rng: np.random.Generator, poses: int, parts: int) -> list[int]:
    """Nearly equal parts of `poses`, their borders moved by up to an eighth of a part."""
    ends = [poses * (part + 1 + rng.uniform(-0.125, 0.125)) / parts for part in range(parts - 1)]
    borders = [0, *(round(end) for end in ends), poses]
    return [stop - start for start, stop in itertools.pairwise(borders)]


def _spans(lengths: list[int]) -> tuple[Span, ...]:
    ends = np.cumsum(lengths).tolist()
    return tuple((end - length, end) for end, length in zip(ends, lengths, strict=True))


def _count(config: GenerateConfig, split: str) -> int:
    return int(getattr(config, f"{split}_clips"))


def _level_counts(config: GenerateConfig, split: str) -> dict[int, int]:
    """Clips of each level: shares rounded down, pairs whole, the rest to level 1 or else 4, 2, 3."""
    total, shares = _count(config, split), config.level_shares
    counts = {level: int(total * share / sum(shares)) for level, share in enumerate(shares, start=1)}
    for level in (MOTION, ORDER):
        counts[level] -= counts[level] % 2
    takes_rest = next(level for level in (OBJECTS, DISTRACTORS, MOTION, ORDER) if shares[level - 1] > 0)
    counts[takes_rest] += total - sum(counts.values())
    return counts


def _levels(config: GenerateConfig, split: str, rng: np.random.Generator) -> list[int]:
    """The level of each group, shuffled."""
    counts = _level_counts(config, split)
    groups = [
        level
        for level, count in counts.items()
        for _ in range(count // (2 if level in (MOTION, ORDER) else 1))
    ]
    return [groups[index] for index in rng.permutation(len(groups))]
