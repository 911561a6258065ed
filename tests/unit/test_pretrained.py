"""CLIP weights from disk: OpenAI's archive, state dicts, safetensors; what does not fit is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from xclip_lab import pretrained
from xclip_lab.backbone import Towers, build_towers, sizes_of
from xclip_lab.config import TowersConfig, TowerSizes
from xclip_lab.errors import CheckpointError, ConfigError

SIZES = TowerSizes(
    embed_dim=32,
    image_size=32,
    patch_size=16,
    vision_width=64,
    vision_layers=1,
    vision_heads=1,
    text_width=64,
    text_layers=1,
    text_heads=1,
    vocab_size=100,
)


@pytest.fixture
def towers():
    torch.manual_seed(0)
    return Towers(SIZES)


def half(towers) -> dict[str, torch.Tensor]:
    """The weights as OpenAI stores them: matrices in fp16, and three numbers that are no weights."""
    state = {name: value.half() for name, value in towers.state_dict().items()}
    numbers = {"input_resolution": 32, "context_length": 77, "vocab_size": 100}
    return state | {name: torch.tensor(value) for name, value in numbers.items()}


class Archive(nn.Module):
    """Nested modules that carry a state dict's dotted names, so that TorchScript can archive them."""

    def __init__(self, state):
        super().__init__()
        children: dict[str, dict] = {}
        for name, value in state.items():
            head, _, rest = name.partition(".")
            if rest:
                children.setdefault(head, {})[rest] = value
            else:
                self.register_buffer(head, value)
        for head, inner in children.items():
            self.add_module(head, Archive(inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def write(kind, state, folder):
    if kind == "torchscript":
        path = folder / "archive.pt"
        torch.jit.script(Archive(state)).save(str(path))
    elif kind == "safetensors":
        path = folder / "weights.safetensors"
        save_file(state, path)
    else:
        path = folder / "weights.bin"
        nested = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}
        torch.save(nested if kind == "nested" else state, path)
    return path


def config(path, **changes) -> TowersConfig:
    return TowersConfig(name=None, architecture=SIZES, pretrained=str(path), **changes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["torchscript", "state dict", "nested", "safetensors"])
def test_every_form_gives_the_same_towers(towers, tmp_path, kind):
    loaded = build_towers(config(write(kind, half(towers), tmp_path)))
    for name, value in towers.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name
        assert loaded.state_dict()[name].dtype == torch.float32


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openai_weights_need_quick_gelu(towers, tmp_path):
    path = write("torchscript", half(towers), tmp_path)
    assert pretrained.is_openai_archive(path)
    plain = TowersConfig(name="ViT-B-32", pretrained=str(path))
    with pytest.raises(ConfigError, match="use ViT-B-32-quickgelu"):
        build_towers(plain)
    sizes = dataclasses.replace(SIZES, quick_gelu=False)
    with pytest.raises(ConfigError, match=r"^towers.architecture.quick_gelu: false .*; set it to true$"):
        build_towers(TowersConfig(name=None, architecture=sizes, pretrained=str(path)))


def test_checksum(towers, tmp_path, monkeypatch):
    path = write("state dict", half(towers), tmp_path)
    named = path.rename(tmp_path / "ViT-B-32.pt")
    with pytest.warns(UserWarning, match="not the file OpenAI published .*expected 40d36571"):
        build_towers(config(named))
    digest = hashlib.sha256(named.read_bytes()).hexdigest()
    monkeypatch.setitem(pretrained.OPENAI_SHA256, "ViT-B-32.pt", digest)
    build_towers(config(named))  # a warning here would be an error, see below


pytestmark = pytest.mark.filterwarnings("error::UserWarning:xclip_lab")


class Evil:
    def __reduce__(self):
        return (print, ("this pickle ran",))


def test_foreign_pickles_do_not_run(tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "plain.pkl"):
        with pytest.raises(CheckpointError, match=name):
            pretrained.read_state_dict(tmp_path / name)
    assert "this pickle ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"PK\x03\x04 cut off", "damaged"),
        (bytes(range(7, 99)), "is damaged or not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a git-lfs pointer; fetch the file"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        pretrained.read_state_dict(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def test_missing_and_unknown(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        pretrained.read_state_dict(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="neither a file nor one of open_clip's weights"):
        build_towers(config(tmp_path / "none.pt"))
    with pytest.raises(CheckpointError, match="did you mean 'openai'"):
        pretrained.locate("opnai", "ViT-B-32-quickgelu")


def test_keys_that_do_not_fit_are_listed(towers, tmp_path):
    state = half(towers)
    state["extra"] = state.pop("ln_final.weight")
    state["text_projection"] = state["text_projection"][:, :3]
    with pytest.raises(CheckpointError) as caught:
        build_towers(config(write("state dict", state, tmp_path)))
    for part in (
        "missing: ln_final.weight",
        "unexpected: extra",
        "text_projection (64, 3) where the model has (64, 32)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "patch", "width"),
    [("ViT-B-32-quickgelu", 32, 768), ("ViT-B-16-quickgelu", 16, 768), ("ViT-L-14", 14, 1024)],
)
def test_sizes_by_name(name, patch, width):
    sizes = sizes_of(name)
    assert (sizes.patch_size, sizes.vision_width) == (patch, width)
    assert sizes.quick_gelu is name.endswith("quickgelu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-32-quikgelu", "did you mean"),
        ("RN50", "not a plain CLIP ViT"),
        ("coca_ViT-B-32", "not a plain"),
    ],
)
def test_names_that_do_not_serve(name, message):
    with pytest.raises(ConfigError, match=message):
        sizes_of(name)


def test_heads_must_divide_the_width():
    bad = TowersConfig(name=None, pretrained=None, architecture=TowerSizes(vision_heads=7))
    with pytest.raises(ConfigError, match="vision_heads: 7 heads do not divide a width of 768"):
        build_towers(bad)


def test_half_precision_towers_stay_near(towers, tmp_path):
    """The official runs' fp16 matrices (ledger 6): LayerNorms stay float32, features come out float32."""
    path = write("state dict", towers.state_dict(), tmp_path)
    full, halved = build_towers(config(path)), build_towers(config(path, precision="fp16"))
    assert halved.visual.conv1.weight.dtype == torch.float16
    assert halved.ln_final.weight.dtype == torch.float32
    ids = torch.tensor([[98, 4, 5, 99, 0]])
    images = torch.randn(2, 1, 3, 32, 32)
    with torch.no_grad():
        for ours, theirs in (
            (full.frames(images), halved.frames(images)),
            (full.words(ids)[1], halved.words(ids)[1]),
        ):
            assert theirs.dtype == torch.float32
            torch.testing.assert_close(theirs, ours, atol=0.02, rtol=0.02)
            assert not torch.equal(theirs, ours)


def test_gradient_checkpointing_changes_no_number(towers, tmp_path):
    path = write("state dict", towers.state_dict(), tmp_path)
    gradients = []
    for checkpointing in (False, True):
        built = build_towers(config(path, gradient_checkpointing=checkpointing)).train()
        built.frames(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 1, 3, 32, 32)).sum().backward()
        gradients.append(built.visual.conv1.weight.grad)
    assert torch.equal(*gradients)


def test_words_do_not_see_what_comes_after(towers):
    """The causal mask cut to W: a shorter input gives the same features for what it holds."""
    ids = torch.tensor([[98, 4, 5, 6, 7, 99, 0, 0]])
    sentence, words = towers.words(ids)
    shorter_sentence, shorter = towers.words(ids[:, :6])
    torch.testing.assert_close(words[:, :6], shorter)
    torch.testing.assert_close(sentence, shorter_sentence)
    torch.testing.assert_close(sentence, words[:, 5])


OFFLINE = """
import huggingface_hub
from xclip_lab.errors import CheckpointError
from xclip_lab.pretrained import locate
try:
    locate("openai", "ViT-B-32-quickgelu")
except CheckpointError as error:
    print(error)
assert huggingface_hub.constants.HF_HUB_OFFLINE is False
"""


def test_without_a_network_the_download_is_one_error(tmp_path):
    """In a process of its own, which the environment sends to an address where nobody answers."""
    nobody = "http://127.0.0.1:9"
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment |= {"HF_ENDPOINT": nobody, "HF_HOME": str(tmp_path), "no_proxy": "*"}
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True)
    assert done.stdout == (
        "towers.pretrained: the download of the weights 'openai' of ViT-B-32-quickgelu failed (is there a "
        "network?); download them elsewhere and give the file's path\n"
    )
    assert done.stderr == ""
    assert time.monotonic() - began < 40  # the hub alone tries for more than a minute
