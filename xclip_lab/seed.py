"""One seed for every generator of random numbers."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(seed: int, *place: int) -> None:
    """Seed the global generators of Python, numpy and torch: a model's dropout may use any of them.

    Args:
        place: numbers such as step, part and process, each with a stream of its own. Who seeds by the place
            before drawing anything has no state of generators to save, and draws the same when he goes on.
    """
    if place:
        seed = int(np.random.SeedSequence((int(seed), *place)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
