"""The naive ways of the benchmarks, in the shape of the released code: X-CLIP's score, the loop of the
evaluation, the decoding of a clip."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.models import FRAMES, SIDE
from xclip_lab.errors import UserError
from xclip_lab.heads.xclip import XClipHead
from xclip_lab.model import RetrievalModel, evaluating
from xclip_lab.preprocess import normalise
from xclip_lab.tokens import TokenSet


def official_scores(head: XClipHead, text: TokenSet, video: TokenSet) -> Tensor:
    """`[T, V]` before CLIP's scale, unmasked (X-CLIP eq. 5 to 17).

    All pairs at once, texts and videos in separate axes, which every mixing matrix turns around and back.
    """
    tau = head.config.temperature
    sentence, words = normalize(text.pooled, dim=-1), normalize(text.tokens, dim=-1)
    frames = normalize(video.tokens, dim=-1)
    of_words = (words @ video.pooled.T).permute(0, 2, 1)  # [T, V, W]
    of_frames = (frames @ sentence.T).permute(2, 0, 1)  # [T, V, F]
    fine = (words.flatten(0, 1) @ head.local_mat_weight @ frames.flatten(0, 1).T).view(
        len(words), words.shape[1], len(frames), frames.shape[1]
    )  # [T, W, V, F]
    over_words = torch.softmax(fine / tau, dim=1).permute(0, 2, 3, 1) @ head.word_mat_weight
    over_frames = torch.softmax(fine / tau, dim=-1) @ head.frame_mat_weight
    word_level = (over_words.permute(0, 3, 1, 2) * fine).sum(1)  # [T, V, F]
    frame_level = (over_frames * fine).sum(-1).permute(0, 2, 1)  # [T, V, W]
    matrix = (
        _attended(word_level, head.frame_mat_weight2, tau)
        + _attended(frame_level, head.word_mat_weight2, tau)
    ) / 2
    return (
        sentence @ head.global_mat_weight @ video.pooled.T
        + _attended(of_words, head.word_logit_weight, tau)
        + _attended(of_frames, head.frame_logit_weight, tau)
        + matrix
    ) / 4


def _attended(scores: Tensor, mixing: Tensor, tau: float) -> Tensor:
    return ((torch.softmax(scores / tau, dim=-1) @ mixing) * scores).sum(-1)


def official_evaluation(model: RetrievalModel, text: TokenSet, frames: Tensor, mask: Tensor) -> Tensor:
    """`[T, V]`: 32 texts and 32 videos in two loops, all of a video made again for each block of texts."""
    scores, step = torch.empty(len(text), len(frames)), 32
    with evaluating(model):
        for top in range(0, len(text), step):
            for left in range(0, len(frames), step):
                rows, columns = slice(top, top + step), slice(left, left + step)
                video = model.encode_video(frames[columns], mask[columns])
                scores[rows, columns] = official_scores(model.head, text[rows], video)
    return scores * model.logit_scale.exp().item()


def opencv() -> ModuleType:
    """Raises: UserError: it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise UserError("the official way needs OpenCV: pip install opencv-python-headless") from error
    return cv2


def official_decode(path: Path) -> Tensor:
    """CLIP4Clip's and X-CLIP's `rawvideo_util`: a second a seek, then CLIP's transform on each frame."""
    cv2 = opencv()
    capture = cv2.VideoCapture(str(path))
    count, fps = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), int(capture.get(cv2.CAP_PROP_FPS))
    images = []
    for second in range(count // fps + 1):
        capture.set(cv2.CAP_PROP_POS_FRAMES, second * fps)
        read, frame = capture.read()
        if not read:
            break
        image = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        scale = SIDE / min(image.size)
        image = image.resize([int(scale * side) for side in image.size], Image.Resampling.BICUBIC)
        left, top = ((side - SIDE) // 2 for side in image.size)
        pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))
        images.append(normalise(torch.from_numpy(pixels.copy()).permute(2, 0, 1)))
    capture.release()
    kept = np.linspace(0, len(images) - 1, num=min(FRAMES, len(images)), dtype=int)
    return torch.stack([images[place] for place in kept])
