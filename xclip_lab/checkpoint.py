"""Models on disk: our own files (safetensors with the config inside) and the official code's, in and out."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xclip_lab.config import (
    ModelConfig,
    RunConfig,
    load_config,
    model_config_from_dict,
    to_dict,
)
from xclip_lab.errors import CheckpointError, ConfigError
from xclip_lab.families import check_options, read_config
from xclip_lab.model import Origin, RetrievalModel, official_name
from xclip_lab.pretrained import load_strictly, only_tensors, read_state_dict
from xclip_lab.seen import read_seen

MODEL_FILE = "model.safetensors"
_TOO_WIDE = (torch.float64, torch.complex64, torch.complex128)


def save_model(model: RetrievalModel, folder: str | Path) -> Path:
    """Write `model.safetensors`, weights and config in one file, and return its path."""
    path = Path(folder) / MODEL_FILE
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(state, path, metadata={"model_config": json.dumps(to_dict(model.config))})
    return path


def load_model(path: str | Path) -> RetrievalModel:
    """A model from a run folder (its best checkpoint, else its last), a checkpoint folder or a file.

    Raises:
        CheckpointError: nothing there, a damaged file, or weights that do not fit the config inside.
        ConfigError: the run's `config.yaml` is damaged.
    """
    file = find_model_file(path)
    try:
        with safe_open(file, "pt") as archive:
            metadata = archive.metadata() or {}
            state = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or not a checkpoint: {error}") from error
    if "model_config" not in metadata:
        raise CheckpointError(f"{file} was not written by this package; official files load by load_official")
    try:
        config = model_config_from_dict(json.loads(metadata["model_config"]))
    except ConfigError as error:
        raise CheckpointError(f"{file} holds a config that this version does not know: {error}") from error
    model = RetrievalModel(config, load_pretrained=False)
    load_strictly(model, state, str(file))
    seen = read_seen(run_folder_of(file))
    model.origin = Origin(str(file), _selection_split(file), _run_config(file), seen=seen)
    return model.eval()


def _selection_split(file: Path) -> str | None:
    """The split that chose a checkpoint of a run, as the stamp beside it says."""
    stamp = file.with_name("stamp.json")
    try:
        return json.loads(stamp.read_text())["selection_split"] if stamp.is_file() else None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{stamp} is damaged; without it nobody knows which split chose {file}"
        ) from error


def _run_config(file: Path) -> RunConfig | None:
    """The config of the run that a checkpoint lies in, None for a file that lies elsewhere."""
    folder = run_folder_of(file)
    return None if folder is None else load_config(folder / "config.yaml")


def run_folder_of(file: Path) -> Path | None:
    """`<run>` of `<run>/checkpoints/best/model.safetensors`, None for a file that lies elsewhere."""
    folders = file.absolute().parents[:3]  # `resolve` would follow the link `best`
    return next((folder for folder in folders if (folder / "config.yaml").is_file()), None)


def find_model_file(path: str | Path) -> Path:
    """The model file that a run folder, a checkpoint folder or a file's path stands for."""
    path = Path(path)
    if path.is_file():
        return path
    candidates = [path / "checkpoints" / which / MODEL_FILE for which in ("best", "last")]
    for candidate in [path / MODEL_FILE, *candidates]:
        if candidate.is_file():
            return candidate
    raise CheckpointError(f"no checkpoint in {path}: expected {MODEL_FILE} or a run folder with checkpoints/")


def load_official(source: str | Path | Mapping[str, Tensor], family: str, **options: Any) -> RetrievalModel:
    """A model from the official code's weights. All sizes are read off the shapes.

    Args:
        source: a file (`pytorch_model.bin.N`) or a state dict with the official key names.
        family: clip4clip, xclip, clip2video or glscl.
        options: what shapes cannot tell; what is left out is told by the keys or as in the released code.
            All: `agg_module` (meanP, seqLSTM, seqTransf; clip4clip also tightTransf, clip2video also tdb),
            and any setting of the head or switch of the ledger, such as `mask_padding`. xclip: `max_words`
            and `max_frames` migrate the learned matrices to other lengths (cut, or padded with the identity).
            clip2video and what has tdb: `temporal_proj` (default, sigmoid_mlp, sigmoid_selfA) and
            `mask_differences`. clip2video: `center_proj` (None for no TAB, plain, TAB, TAB_TDB),
            `center_weight`. glscl: `query_share`, `cross_att_share`, `temp`,
            `alpha`, `beta`, `loss2_weight`.

    Raises:
        ConfigError: unknown family or option. CheckpointError: unsafe or damaged file; weights wider than
            float32; missing, unexpected or mis-sized keys, listed.
    """
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    state = read_official(source)
    check_options(family, options, state)
    lengths = {key: options.pop(key) for key in ["max_words", "max_frames"] if key in options}
    return fill_officially(read_config(state, family, options, name), state, name, family, lengths)


def read_official(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an official file or state dict, as they are.

    Raises:
        CheckpointError: unsafe or damaged file, none at all, or weights wider than float32.
    """
    if isinstance(source, Mapping):
        arrays = (np.ndarray, np.generic)  # from an .npz
        tensors = {key: torch.tensor(of) if isinstance(of, arrays) else of for key, of in source.items()}
        name, state = "the state dict", only_tensors(tensors, "the state dict")
    elif isinstance(source, str | Path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice about pickles that are not its own
            name, state = str(source), read_state_dict(source)
    else:
        raise CheckpointError(f"give a file's path or a state dict, not a {type(source).__name__}")
    for key, value in state.items():
        if value.dtype in _TOO_WIDE:
            raise CheckpointError(
                f"{name} holds {key!r} in {str(value.dtype).removeprefix('torch.')}, which float32 would "
                "round; save its weights in float32 or half precision"
            )
    return state


def fill_officially(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    name: str,
    family: str,
    lengths: Mapping[str, Any],
) -> RetrievalModel:
    """A model as configured, with the weights of an official state dict, in evaluation mode.

    Args:
        name: what the state dict is called. lengths: other `max_words` and `max_frames` than `config` has;
            X-CLIP's matrices migrate to them (ledger 2).

    Raises:
        CheckpointError: its keys and shapes are not the model's; lists missing, unexpected, mis-sized ones.
    """
    wanted = model_config_from_dict(to_dict(config) | dict(lengths))
    dtypes = {key: value.dtype for key, value in state.items()}
    if wanted != config and "word_logit_weight" in state:
        _filled(config, state, name)  # it must fit before it is changed
        state = migrate_lengths(state, wanted.max_words, wanted.max_frames)
    model = _filled(wanted, state, name)
    model.origin = Origin(f"{name} (official {family})", selection_split="unknown", dtypes=dtypes)
    return model.eval()


def _filled(config: ModelConfig, state: Mapping[str, Tensor], name: str) -> RetrievalModel:
    model = RetrievalModel(config, load_pretrained=False)
    load_strictly(model, state, name, official_name)
    return model


def official_state_dict(model: RetrievalModel) -> dict[str, Tensor]:
    """The weights under the official code's names, on the CPU.

    What came from an official file in another precision goes back to it, unless that would change it: the
    official runs keep the towers' matrices in fp16.
    """
    state = {official_name(name): value.detach().cpu() for name, value in model.state_dict().items()}
    state = {name: state[name] for name in [*model.origin.dtypes, *state]}  # in the order of that file
    for name, dtype in model.origin.dtypes.items():
        narrow = state[name].to(dtype)
        if torch.allclose(narrow.to(state[name].dtype), state[name], rtol=0, atol=0, equal_nan=True):
            state[name] = narrow
    return state


def save_official(model: RetrievalModel, path: str | Path) -> None:
    """Write the weights as the official code does (`pytorch_model.bin`): a state dict by `torch.save`."""
    with open(path, "wb") as file:  # torch.save on a path hides a full disk behind an error of its own
        torch.save(official_state_dict(model), file)


def migrate_lengths(state: Mapping[str, Tensor], max_words: int, max_frames: int) -> dict[str, Tensor]:
    """X-CLIP's word and frame matrices cut, or padded with the identity, to other lengths (ledger 2)."""
    lengths = {"word_logit_weight": max_words, "word_mat_weight": max_words, "word_mat_weight2": max_words}
    lengths |= {name.replace("word", "frame"): max_frames for name in lengths}
    migrated = dict(state)
    for name, length in lengths.items():
        if name in state:
            shared = min(length, state[name].shape[0])
            matrix = torch.eye(length, dtype=state[name].dtype)
            matrix[:shared, :shared] = state[name][:shared, :shared]
            migrated[name] = matrix
    return migrated
