"""A model of all real parts that is built in milliseconds."""

import torch

from xclip_lab import create_model, load_config

TINY = {
    "towers.architecture.vision_width": 32,
    "towers.architecture.text_width": 32,
    "towers.architecture.embed_dim": 32,
    "towers.architecture.vision_layers": 1,
    "towers.architecture.text_layers": 1,
    "towers.architecture.image_size": 32,
    "towers.architecture.vocab_size": 60,
    "temporal.layers": 1,
    "max_words": 8,
    "max_frames": 4,
}


def tiny(**changes):
    """The quickstart's model at the smallest sizes, in evaluation mode; `changes` are dotted keys."""
    torch.manual_seed(0)
    return create_model(load_config("quickstart", TINY | changes)).eval()
