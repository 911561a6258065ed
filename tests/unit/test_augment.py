"""GLSCL's RandAugment: its operations are timm's, its draws those of the official string, one for a clip."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from xclip_lab import augment
from xclip_lab.augment import OPERATIONS, augment_frames


def picture(seed: int, side: int = 64) -> np.ndarray:
    """Coloured blotches, uint8 `[side, side, 3]`."""
    coarse = np.random.default_rng(seed).integers(40, 216, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def frames(*seeds: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([picture(seed) for seed in seeds])).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_timms(name, sign, monkeypatch):
    """Of any strength, in both directions. Moved pixels differ by the interpolation and at the border."""
    timm = pytest.importorskip("timm.data.auto_augment")
    monkeypatch.setattr(timm, "_randomly_negate", lambda value: sign * value)
    moves = name.startswith(("Rotate", "Shear", "Translate"))
    fill = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BICUBIC} if moves else {}
    for level in (5.5, 7.0, 8.2):
        to_arguments = timm.LEVEL_TO_ARG[name]
        arguments = to_arguments(level, {}) if to_arguments else ()
        theirs = np.array(timm.NAME_TO_OP[name](Image.fromarray(picture(0)), *arguments, **fill))
        ours = OPERATIONS[name](frames(0), sign * level / 10)[0].permute(1, 2, 0).numpy()
        apart = np.abs(theirs.astype(int) - ours.astype(int))
        assert np.quantile(apart, 0.95) <= (4 if moves else 1), (name, level)


def test_the_operations_are_those_of_the_official_string():
    timm = pytest.importorskip("timm.data.auto_augment")
    official = timm.rand_augment_transform("rand-m7-n4-mstd0.5-inc1", {})
    assert list(OPERATIONS) == [operation.name for operation in official.ops]
    assert official.num_layers == augment.OPERATIONS_A_CLIP
    for operation in official.ops:
        assert (operation.prob, operation.magnitude) == (augment.PROBABILITY, augment.MAGNITUDE)
        assert operation.magnitude_std == augment.DEVIATION


def test_how_often_and_how_strongly(monkeypatch):
    used, strengths = Counter(), []

    def note(name, pixels, strength):
        used[name] += 1
        strengths.append(strength)
        return pixels

    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, partial(note, name))
    for seed in range(1500):
        augment_frames(frames(0), seed)
    assert 2800 < used.total() < 3200
    assert len(used) == 15
    assert min(used.values()) > 140
    assert np.mean(np.abs(strengths)) == pytest.approx(0.7, abs=0.005)
    assert np.std(np.abs(strengths)) == pytest.approx(0.05, abs=0.005)
    assert np.mean(np.sign(strengths)) == pytest.approx(0, abs=0.06)


def test_a_seed_decides_it_and_nothing_else_random_moves():
    clip = frames(0, 1, 2)
    before = clip.clone()
    states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    results = [augment_frames(clip, seed) for seed in range(30)]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), repr(np.random.get_state())) == states[1:]  # noqa: NPY002
    assert torch.equal(clip, before)
    assert all(result.shape == clip.shape and result.dtype == torch.uint8 for result in results)
    assert all(torch.equal(augment_frames(clip, seed), result) for seed, result in enumerate(results))
    changed = [result for result in results if not torch.equal(result, clip)]
    assert len(changed) > 20
    assert len({result.numpy().tobytes() for result in changed}) > 15


def test_all_frames_of_a_clip_are_treated_alike():
    for seed in range(20):
        together = augment_frames(frames(0, 1), seed)
        assert torch.equal(together[1:], augment_frames(frames(1), seed))
