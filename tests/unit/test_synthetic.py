"""What generated clips show, what their captions say, and that both agree."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest

from xclip_lab.config import GenerateConfig
from xclip_lab.errors import ConfigError
from xclip_lab.sampling import uniform_indices
from xclip_lab.synthetic.generate import annotation
from xclip_lab.synthetic.plan import DISTRACTORS, MOTION, OBJECTS, ORDER, Clip, plan
from xclip_lab.synthetic.render import render
from xclip_lab.synthetic.scenes import (
    COLOURS,
    MOTIONS,
    SHAPES,
    TURN,
    Action,
    Event,
    Pose,
    Thing,
    is_held_out,
    place,
)
from xclip_lab.synthetic.truth import clip_truth

CONFIG = GenerateConfig(train_clips=400, val_clips=60, test_clips=200, level_shares=(1, 1, 1, 1))


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Clip]]:
    return {split: list(plan(CONFIG, split)) for split in ("train", "val", "test")}


def draw(clip: Clip) -> np.ndarray:
    return render(clip, 64, CONFIG.hold)


def triples(clip: Clip, told_only: bool = False) -> set[tuple[Thing, int]]:
    shown = [clip.events[index] for index in clip.told] if told_only else clip.events
    return {(thing, event.action.motion) for event in shown for thing in event.action.things}


def told(clip: Clip) -> tuple[Action, ...]:
    return tuple(clip.events[index].action for index in clip.told)


def groups(clips: list[Clip], level: int) -> list[tuple[Clip, ...]]:
    chosen = [clip for clip in clips if clip.level == level]
    return [tuple(members) for _, members in itertools.groupby(chosen, key=lambda clip: clip.group)]


def is_subsequence(part: tuple, whole: tuple) -> bool:
    rest = iter(whole)
    return all(item in rest for item in part)


def colours_seen(frames: np.ndarray) -> list[set[str]]:
    """For each frame, the colours of at least four of its pixels."""
    seen = []
    for frame in frames.astype(int):
        close = {name: (np.abs(frame - rgb).max(axis=-1) <= 3).sum() for name, rgb in COLOURS.items()}
        seen.append({name for name, count in close.items() if count >= 4})
    return seen


def test_levels_have_their_shares(splits):
    counts = Counter(clip.level for clip in splits["test"])
    assert counts == {OBJECTS: 50, MOTION: 50, ORDER: 50, DISTRACTORS: 50}
    default = list(plan(GenerateConfig(), "test"))
    assert Counter(clip.level for clip in default) == {OBJECTS: 68, MOTION: 66, ORDER: 66}
    assert [clip.video_id for clip in splits["val"][:2]] == ["val-000000", "val-000001"]


def test_motion_twins_show_the_same_frames_backwards_within_each_event(splits):
    pairs = groups(splits["test"], MOTION)
    assert pairs
    assert all(len(pair) == 2 for pair in pairs)
    for one, other in pairs[:12]:
        first, second = draw(one), draw(other)
        assert one.spans == other.spans
        for start, stop in one.spans:
            np.testing.assert_array_equal(first[start:stop][::-1], second[start:stop])
            assert (first[start] != first[stop - 1]).any()
        np.testing.assert_array_equal(first.astype(int).sum(0), second.astype(int).sum(0))
        assert [action.opposite() for action in told(one)] == list(told(other))
        assert one.template == other.template


@pytest.mark.parametrize("level", [MOTION, ORDER])
def test_eight_sampled_frames_of_twins_are_the_same_pictures(splits, level):
    timestamps = np.arange(CONFIG.frames) / CONFIG.fps
    indices = uniform_indices(timestamps, CONFIG.frames / CONFIG.fps, 8, None, None)
    for pair in groups(splits["test"], level)[:12]:
        one, other = (sorted(frame.tobytes() for frame in draw(clip)[indices]) for clip in pair)
        assert one == other


def test_order_twins_show_the_same_events_swapped(splits):
    pairs = groups(splits["test"], ORDER)
    assert pairs
    for one, other in pairs[:12]:
        first, second = draw(one), draw(other)
        border = one.spans[0][1]
        np.testing.assert_array_equal(np.concatenate([first[border:], first[:border]]), second)
        assert told(one) == told(other)[::-1]
        assert one.template == other.template


def test_the_frames_of_a_colour_word_are_those_that_show_the_colour(splits):
    for clip in [*splits["train"][:25], *splits["test"][:25]]:
        truth = clip_truth(annotation(clip, 8.0))
        seen = colours_seen(draw(clip))
        for word, kind, row in zip(truth.words, truth.classes, truth.frames, strict=True):
            if kind == "colour":
                assert row.tolist() == [word in colours for colours in seen], (clip, word)


def test_every_word_of_an_event_has_its_frames_and_others_have_none(splits):
    for clip in splits["train"][:60]:
        line = annotation(clip, 8.0)
        truth = clip_truth(line)
        assert " ".join(truth.words) == line["caption"] == line["caption"].lower()
        assert truth.frames.shape == (len(truth.words), clip.frames)
        content = np.array([kind in ("colour", "shape", "motion") for kind in truth.classes])
        assert (truth.frames.any(axis=1) == content).all()
        assert set(truth.classes) <= {"colour", "shape", "motion", "order", "function"}
        events = [event for event in line["events"] if event["told"]]
        for event in events:
            start, stop = event["span"]
            names = {word for thing in event["things"] for word in thing} | set(event["action"].split())
            here = truth.frames[:, start:stop].all(axis=1)
            assert {truth.words[index].rstrip(",") for index in np.flatnonzero(here)} == names
        if clip.level == DISTRACTORS:
            assert len(events) == 1
            assert truth.frames.any(axis=0).mean() < 0.35
            assert clip.frames == 3 * CONFIG.frames
        else:
            assert truth.frames.any(axis=0).all()


def test_truth_at_timestamps_takes_the_nearest_frame(splits):
    truth = clip_truth(annotation(splits["train"][0], 8.0))
    last = truth.frames.shape[1] - 1
    sampled = truth.at(np.array([0.0, 0.13, 0.24, 99.0]))
    np.testing.assert_array_equal(sampled, truth.frames[:, [0, 1, 2, last]])


def test_held_out_combinations(splits):
    for clip in splits["train"]:
        assert not any(is_held_out(*triple) for triple in triples(clip))
    for clip in [*splits["val"], *splits["test"]]:
        assert any(is_held_out(*triple) for triple in triples(clip, told_only=True))


def test_held_out_combinations_leave_every_pair_to_training():
    possible = [
        triple
        for triple in itertools.product(COLOURS, SHAPES, range(len(MOTIONS)))
        if triple[1:] != ("circle", TURN)
    ]
    kept = [triple for triple in possible if not is_held_out(Thing(*triple[:2]), triple[2])]
    assert 0.13 < 1 - len(kept) / len(possible) < 0.17
    for one, other in itertools.combinations(range(3), 2):
        pairs = {(triple[one], triple[other]) for triple in possible}
        assert {(triple[one], triple[other]) for triple in kept} == pairs


def test_no_caption_is_true_of_another_clip_of_the_gallery(splits):
    for clips in (splits["val"], splits["test"]):
        for one, other in itertools.permutations(clips, 2):
            assert not is_subsequence(told(one), tuple(event.action for event in other.events))
        sets = [frozenset(thing for thing, _ in triples(clip, told_only=True)) for clip in clips]
        by_group = dict(zip([clip.group for clip in clips], sets, strict=True))
        assert len(set(by_group.values())) == len(by_group)


def test_words_of_one_event_are_not_true_of_another(splits):
    for clip in splits["train"]:
        things = [thing for event in clip.events for thing in event.action.things]
        assert (
            len({thing.colour for thing in things}) == len({thing.shape for thing in things}) == len(things)
        )
        assert len({event.action.motion for event in clip.events}) == len(clip.events)


def test_clockwise_turns_clockwise():
    # A heart's point is below its centre; a quarter turn clockwise brings it to the left.
    pose = Pose(0.5, 0.5, 0.3)
    action = Action((Thing("white", "heart"),), TURN, reverse=False)
    event = Event(action, pose, dataclasses.replace(pose, angle=np.pi / 2))
    clip = Clip("x", OBJECTS, 0, (event,), ((0, 10),), (0,), 0, background=0)
    cover = draw(clip)[..., 0] > 150
    columns, rows = np.flatnonzero(cover[-1].any(axis=0)), np.flatnonzero(cover[0].any(axis=1))
    assert MOTIONS[TURN][0] == "turns clockwise"
    assert cover[0][rows[-1]].sum() < cover[0][rows[0]].sum()
    assert cover[-1][:, columns[0]].sum() < cover[-1][:, columns[-1]].sum()

    # Two steps at least; each under half of a star's symmetry, or the direction could not be seen.
    placed = place(np.random.default_rng(0), action)
    assert 0 < (placed.end.angle - placed.start.angle) / 2 < np.pi / 5


def pixels(frame: np.ndarray, thing: Thing) -> np.ndarray:
    """`[N, 2]` row and column of the pixels in a thing's colour."""
    return np.argwhere(np.abs(frame.astype(int) - COLOURS[thing.colour]).max(axis=-1) <= 3)


MEASURES = {
    "moves right": lambda frame, things: pixels(frame, things[0])[:, 1].mean(),
    "moves down": lambda frame, things: pixels(frame, things[0])[:, 0].mean(),
    "grows": lambda frame, things: 20 * len(pixels(frame, things[0])) ** 0.5 / 7,
    "leaves": lambda frame, things: (
        2 * np.linalg.norm(np.subtract(*(pixels(frame, t).mean(0) for t in things)))
    ),
}
OPPOSITES = {"moves left": "moves right", "moves up": "moves down", "shrinks": "grows", "meets": "leaves"}


def test_what_is_seen_is_what_the_verb_says(splits):
    checked: Counter[str] = Counter()
    for clip in splits["train"][:100]:
        frames = draw(clip)
        for event, (start, stop) in zip(clip.events, clip.spans, strict=True):
            verb, things = event.action.verb, event.action.things
            if verb.startswith("turns"):
                continue
            measure = MEASURES[OPPOSITES.get(verb, verb)]
            change = measure(frames[stop - 1], things) - measure(frames[start], things)
            assert change < -20 if verb in OPPOSITES else change > 20, (verb, change)
            checked[verb] += 1
    assert set(checked) == {*MEASURES, *OPPOSITES}


def test_splits_and_seeds_differ(splits):
    scenes = {split: [clip.events for clip in clips] for split, clips in splits.items()}
    assert not set(scenes["val"]) & set(scenes["test"])
    other = list(plan(dataclasses.replace(CONFIG, seed=1), "train"))
    assert not {clip.events for clip in other} & set(scenes["train"])
    assert list(plan(CONFIG, "train")) == splits["train"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"size": 63}, "data.generate.size"),
        ({"frames": 6}, "data.generate.frames"),
        ({"frames": 15}, "data.generate.frames"),
        ({"level_shares": (0, 0, 0, 0)}, "data.generate.level_shares"),
        ({"level_shares": (0, 1, 1, 0), "test_clips": 7}, "data.generate.test_clips"),
    ],
)
def test_impossible_configurations_are_refused(change, named):
    with pytest.raises(ConfigError, match=named):
        list(plan(dataclasses.replace(CONFIG, **change), "test"))


def test_more_different_clips_than_there_are_is_refused():
    config = GenerateConfig(test_clips=5_000, level_shares=(0, 0, 0, 1))
    with pytest.raises(ConfigError, match=r"data\.generate\.test_clips.*about \d+ are possible"):
        list(plan(config, "test"))
