"""GLSCL's augmentation of training frames: RandAugment, one draw for all frames of a clip."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

OPERATIONS_A_CLIP, PROBABILITY = 4, 0.5
MAGNITUDE, DEVIATION, HIGHEST = 7.0, 0.5, 10.0
_FILL = [128.0]

Operation = Callable[[Tensor, float], Tensor]
"""Pixels `[F, 3, S, S]` and a strength from -1 to 1 to pixels; its sign matters where there are two ways."""


def augment_frames(pixels: Tensor, seed: int) -> Tensor:
    """What GLSCL's loaders of MSR-VTT, MSVD and LSMDC do to training frames: `rand-m7-n4-mstd0.5-inc1`.

    Four times one of 15 operations is drawn, and applied in half of the cases, to all frames alike. Its
    strength is normally distributed about 7 of 10.

    Unlike there the frames are resized and cropped already, so that what moves out of the crop is lost, and
    turned, sheared and shifted ones are interpolated bilinearly in place of bicubically.

    Args:
        pixels: uint8 `[F, 3, S, S]`. seed: decides all draws; no other random state is read or changed.

    Returns:
        uint8 `[F, 3, S, S]`.
    """
    random = np.random.default_rng(seed)
    for name in random.choice(list(OPERATIONS), OPERATIONS_A_CLIP):
        if random.random() < PROBABILITY:
            strength = np.clip(random.normal(MAGNITUDE, DEVIATION), 0, HIGHEST) / HIGHEST
            pixels = OPERATIONS[name](pixels, float(strength * random.choice((-1, 1))))
    return pixels


def _affine(
    pixels: Tensor, strength: float, shear: tuple[int, int] = (0, 0), shift: tuple[int, int] = (0, 0)
) -> Tensor:
    """Sheared about the upper left corner by up to 0.3, or shifted by up to 0.45 of the side."""
    side = pixels.shape[-1]
    return F.affine(
        pixels,
        angle=0.0,
        translate=[-0.45 * strength * side * axis for axis in shift],
        scale=1.0,
        shear=[math.degrees(math.atan(0.3 * strength)) * axis for axis in shear],
        interpolation=InterpolationMode.BILINEAR,
        fill=_FILL,
        center=[0, 0],
    )


def _rotate(pixels: Tensor, strength: float) -> Tensor:
    return F.rotate(pixels, 30 * strength, InterpolationMode.BILINEAR, fill=_FILL)


def _posterize(pixels: Tensor, strength: float) -> Tensor:
    return F.posterize(pixels, 4 - int(4 * abs(strength)))


def _solarize(pixels: Tensor, strength: float) -> Tensor:
    return torch.where(pixels >= 256 - int(256 * abs(strength)), 255 - pixels, pixels)


def _solarize_add(pixels: Tensor, strength: float) -> Tensor:
    added = (pixels.int() + int(110 * abs(strength))).clamp(max=255).to(torch.uint8)
    return torch.where(pixels < 128, added, pixels)


def _enhance(how: Callable[[Tensor, float], Tensor], pixels: Tensor, strength: float) -> Tensor:
    return how(pixels, 1 + 0.9 * strength)


def _always(how: Callable[[Tensor], Tensor], pixels: Tensor, strength: float) -> Tensor:
    return how(pixels)


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": partial(_always, F.autocontrast),
    "Equalize": partial(_always, F.equalize),
    "Invert": partial(_always, F.invert),
    "Rotate": _rotate,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": partial(_enhance, F.adjust_saturation),
    "ContrastIncreasing": partial(_enhance, F.adjust_contrast),
    "BrightnessIncreasing": partial(_enhance, F.adjust_brightness),
    "SharpnessIncreasing": partial(_enhance, F.adjust_sharpness),
    "ShearX": partial(_affine, shear=(1, 0)),
    "ShearY": partial(_affine, shear=(0, 1)),
    "TranslateXRel": partial(_affine, shift=(1, 0)),
    "TranslateYRel": partial(_affine, shift=(0, 1)),
}
"""By the names of timm's increasing RandAugment, from which GLSCL's is taken."""
