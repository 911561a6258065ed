"""CLIP4Clip equals the official code: logits, every intermediate value, loss and gradients."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from torch import Tensor, nn
from torch.nn.functional import normalize

from tests.parity import families
from tests.parity.golden import model_cases
from xclip_lab.model import evaluating

CASES = model_cases("clip4clip")
each_case = pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)


@each_case
def test_logits_and_intermediates(golden, model):
    families.check_logits(golden, model)
    for name in golden.sets():
        batch = golden.batch(name)
        with evaluating(model), ExitStack() as hooks:
            text = model.encode_text(batch.token_ids, batch.text_mask)
            video = model.encode_video(batch.video, batch.video_mask)
            found = {
                "sequence_output": text.pooled,
                "visual_output": model.clip.frames(batch.video),
                "video_feature": video.pooled,
                "sentence_feature": normalize(text.pooled, dim=-1),
                "frame_norm_masked": normalize(video.tokens, dim=-1) * batch.video_mask[..., None],
            }
            if hasattr(model.head, "cross"):
                crossed = watch_cross(hooks, model.head.cross)
                model.similarity(text, video)
                found |= crossed
        families.check_intermediates(golden, name, found)


def watch_cross(hooks: ExitStack, cross: nn.Module) -> dict[str, Tensor]:
    """What the cross transformer takes and gives, there once a similarity has been computed."""
    found: dict[str, Tensor] = {}

    def transformed(module, inputs, options, output):
        additive = options["attn_mask"][
            :: len(options["attn_mask"]) // len(output)
        ]  # of each pair's first head
        found["cross_mask"] = additive[:, 0] == 0
        found["cross_output"] = output[-1]  # the official code keeps the last pair's

    def pooled(module, inputs, output):
        found["cross_pooled"] = output

    hooks.callback(cross.transformer.register_forward_hook(transformed, with_kwargs=True).remove)
    hooks.callback(cross.pooler.register_forward_hook(pooled).remove)
    return found


@each_case
def test_loss_and_gradients(golden, model):
    parts = families.check_loss(golden, model)
    assert parts.keys() == {"loss", "contrastive_loss"}
    families.check_gradients(golden, model, parts["loss"])
