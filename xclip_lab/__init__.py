"""xclip_lab: a workbench for CLIP-based video-text retrieval. The names that a notebook needs."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xclip_lab.attention import run_with_cache as run_with_cache
    from xclip_lab.batching import Batch as Batch
    from xclip_lab.checkpoint import load_model as load_model
    from xclip_lab.checkpoint import load_official as load_official
    from xclip_lab.checkpoint import save_official as save_official
    from xclip_lab.config import RunConfig as RunConfig
    from xclip_lab.config import load_config as load_config
    from xclip_lab.datasets import Sample as Sample
    from xclip_lab.datasets import VideoTextDataset as VideoTextDataset
    from xclip_lab.datasets import load_dataset as load_dataset
    from xclip_lab.evaluation import evaluate as evaluate
    from xclip_lab.model import RetrievalModel as RetrievalModel
    from xclip_lab.model import create_model as create_model
    from xclip_lab.result import Result as Result
    from xclip_lab.tokens import TokenSet as TokenSet
    from xclip_lab.train import fit as fit

__version__ = version("xclip-lab")

_HOME = {
    "Batch": "batching",
    "Result": "result",
    "RetrievalModel": "model",
    "RunConfig": "config",
    "Sample": "datasets",
    "TokenSet": "tokens",
    "VideoTextDataset": "datasets",
    "create_model": "model",
    "evaluate": "evaluation",
    "fit": "train",
    "load_config": "config",
    "load_dataset": "datasets",
    "load_model": "checkpoint",
    "load_official": "checkpoint",
    "run_with_cache": "attention",
    "save_official": "checkpoint",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    # Imported at first use: `xclip-lab --help` and reading a dataset need no towers.
    if name not in _HOME:
        raise AttributeError(f"module 'xclip_lab' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"xclip_lab.{_HOME[name]}"), name)
    globals()[name] = value
    return value
