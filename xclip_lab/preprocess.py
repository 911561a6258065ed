"""Frames to what CLIP's image tower takes: short side, centre crop, mean and deviation."""

from __future__ import annotations

import numpy as np
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image


def preprocess(frames: np.ndarray, image_size: int) -> torch.Tensor:
    """Resize the short side to `image_size` and cut out the middle.

    The resize is Pillow's antialiased bicubic, as in CLIP's own transform: a tensor's bicubic resize differs
    from it by some grey levels.

    Args:
        frames: uint8 `[F, H, W, 3]`. image_size: side of the result in pixels.

    Returns:
        uint8 `[F, 3, image_size, image_size]`.
    """
    height, width = frames.shape[1:3]
    short = min(height, width)
    new_height, new_width = (int(image_size * side / short) for side in (height, width))
    if short != image_size:
        resized = np.empty((len(frames), new_height, new_width, 3), np.uint8)
        for target, frame in zip(resized, frames, strict=True):
            image = Image.fromarray(frame).resize((new_width, new_height), Image.Resampling.BICUBIC)
            target[...] = np.asarray(image)
        frames = resized
    top = round((new_height - image_size) / 2)
    left = round((new_width - image_size) / 2)
    square = frames[:, top : top + image_size, left : left + image_size]
    return torch.from_numpy(np.ascontiguousarray(square.transpose(0, 3, 1, 2)))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels to the image tower's input: CLIP's mean and deviation, channel by channel.

    Args:
        pixels: uint8 `[..., 3, H, W]`.

    Returns:
        float32 of the same shape on the same device.
    """
    mean = torch.tensor(OPENAI_DATASET_MEAN, device=pixels.device).view(3, 1, 1)
    deviation = torch.tensor(OPENAI_DATASET_STD, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / deviation
