"""CLIP weights from a file: OpenAI's archives, state dicts, safetensors. Foreign pickles are never run."""

from __future__ import annotations

import hashlib
import pickle
import ssl
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from xclip_lab.errors import CheckpointError
from xclip_lab.registry import did_you_mean

OPENAI_SHA256 = {
    "ViT-B-32.pt": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B-16.pt": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
}
_NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size"}
_LFS = b"version https://git-lfs"
_IN_MODEL = "clip."
"""What stands before the names of the towers' weights in a whole model."""


def locate(pretrained: str, name: str | None) -> Path:
    """The file behind `towers.pretrained`: the file itself, or what open_clip downloads for a tag.

    Raises:
        CheckpointError: neither a file nor a tag of that model, or the download failed.
    """
    path = Path(pretrained).expanduser()
    if path.is_file():
        return path
    wrong = unknown_weights(pretrained, name)
    if wrong:
        raise CheckpointError(wrong)
    config = open_clip.pretrained.get_pretrained_cfg(name, pretrained)
    try:
        with _quiet_hub():
            return Path(open_clip.pretrained.download_pretrained(config))
    except Exception as error:  # urllib, huggingface_hub and the disk each raise their own
        raise CheckpointError(
            f"towers.pretrained: the download of the weights {pretrained!r} of {name} failed (is there a "
            "network?); download them elsewhere and give the file's path"
        ) from error


def unknown_weights(pretrained: str, name: str | None) -> str | None:
    """What to say where `towers.pretrained` is neither a file nor a tag of that model; None where it is."""
    path = Path(pretrained).expanduser()
    tags = open_clip.list_pretrained_tags_by_model(name) if name else []
    if path.is_file() or pretrained in tags:
        return None
    looks_like_path = path.suffix != "" or len(path.parts) > 1
    hint = "" if looks_like_path else did_you_mean(pretrained, tags)
    return (
        f"towers.pretrained: {pretrained!r} is neither a file nor one of open_clip's weights for "
        f"{name or 'own sizes (towers.architecture)'}{hint} (tags: {', '.join(tags) or 'none'})"
    )


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """The Hugging Face hub without its own notes, and without its retries of half a minute a file where it
    cannot be reached: then it takes what it has downloaded before."""
    logging, constants = huggingface_hub.utils.logging, huggingface_hub.constants
    verbosity, offline = logging.get_verbosity(), constants.HF_HUB_OFFLINE
    logging.set_verbosity(logging.CRITICAL)
    constants.HF_HUB_OFFLINE = offline or not _answers(constants.ENDPOINT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        constants.HF_HUB_OFFLINE = offline


def _answers(url: str, seconds: float = 10.0) -> bool:
    """Whether there is a server. One that refuses, or whose certificate only others trust, is one."""
    try:
        urllib.request.urlopen(url, timeout=seconds).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLCertVerificationError)
    except OSError:
        return False
    return True


def is_openai_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, the form in which OpenAI publishes CLIP."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, on the CPU: TorchScript, safetensors or a plain (nested) state dict.

    Pickles are read by torch's restricted unpickler only.

    Raises:
        CheckpointError: missing, damaged or unsafe file, or one without tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file {path}")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        elif is_openai_archive(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.jit is deprecated, OpenAI publishes nothing else
                content = torch.jit.load(str(path), map_location="cpu").state_dict()
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            head = file.read(len(_LFS))
        if not head.startswith((b"PK", b"\x80")):  # neither an archive nor a pickle
            pointer = "a git-lfs pointer; fetch the file itself (git lfs pull)"
            raise CheckpointError(
                f"{path} is {pointer if head == _LFS else 'damaged or not a checkpoint'}"
            ) from error
        raise CheckpointError(
            f"{path} holds more than tensors and is not read, since that could run foreign code; "
            "save its state dict alone with torch.save(model.state_dict(), ...)"
        ) from error
    except (RuntimeError, SafetensorError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {reason[:200]}") from error
    return only_tensors(content, str(path))


def only_tensors(content: Any, name: str) -> dict[str, Tensor]:
    """The tensors of a plain or nested state dict, without the prefix of data-parallel training.

    Args:
        name: what to call it.

    Raises:
        CheckpointError: no state dict, one without tensors, or one with other things among them, listed.
    """
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{name} holds a {type(content).__name__}, not a state dict")
    state = {str(key).removeprefix("module."): value for key, value in content.items()}
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if len(others) == len(state):
        raise CheckpointError(f"{name} holds no tensors")
    unexpected = [key for key in others if key not in _NOT_WEIGHTS]
    if unexpected:
        raise CheckpointError(
            f"{name} holds among its weights what is no tensor, unexpected: {_listed(unexpected)}; leave it "
            "out, or put the weights into a 'state_dict' of their own beside it"
        )
    weights = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    bare = [key for key, of in weights.items() if of.is_meta or of.is_quantized or of.layout != torch.strided]
    if bare:
        raise CheckpointError(
            f"{name} holds tensors that are sparse, quantised or without data (meta): {_listed(bare)}; save "
            "them dense"
        )
    return weights


def load_clip_weights(towers: nn.Module, path: str | Path) -> None:
    """Fill the towers from a file of CLIP weights, in float32. A known archive's checksum is compared first.

    Of a whole retrieval model, one of ours or of the official code, the towers are taken.

    Raises:
        CheckpointError: as `read_state_dict`; also missing, unexpected or mis-sized keys, which it lists.
    """
    check_openai_checksum(Path(path))
    state = {key: value.float() for key, value in read_state_dict(path).items() if key not in _NOT_WEIGHTS}
    if f"{_IN_MODEL}logit_scale" in state:
        state = {k.removeprefix(_IN_MODEL): v for k, v in state.items() if k.startswith(_IN_MODEL)}
    load_strictly(towers, state, str(path))


def check_openai_checksum(path: Path) -> None:
    """Warn where a file carries the name of one of OpenAI's archives but not its SHA-256."""
    expected = OPENAI_SHA256.get(path.name)
    if expected is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        warnings.warn(
            f"{path} is not the file OpenAI published under that name (SHA-256 {found}, expected "
            f"{expected}); it may be damaged or someone's own weights",
            stacklevel=2,
        )


def load_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    rename: Callable[[str], str] = lambda name: name,
) -> None:
    """Load a state dict whose keys and shapes must be the module's own, after `rename` of the module's keys.

    Raises:
        CheckpointError: lists missing, unexpected and mis-sized keys.
    """
    names = {rename(name): name for name in module.state_dict()}
    own = {rename(name): value for name, value in module.state_dict().items()}
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    sized = [
        f"{key} {tuple(state[key].shape)} where the model has {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    problems = [
        f"{kind}: {_listed(keys)}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another size", sized))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit the model; " + "; ".join(problems))
    module.load_state_dict({names[key]: value for key, value in state.items()})


def _listed(keys: list[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
