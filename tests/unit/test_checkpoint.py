"""Models on disk: ours and the official code's. What does not fit is refused with a list."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.parity.golden import Golden
from tests.shared import golden_path, needs_golden
from tests.unit.tiny import tiny
from xclip_lab import load_model, load_official, save_official
from xclip_lab.checkpoint import official_state_dict, save_model
from xclip_lab.errors import CheckpointError, ConfigError


def same_weights(one, other) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("agg_module", ["meanP", "seqLSTM", "seqTransf"])
@pytest.mark.parametrize("fusion", ["aosm", "max-max", "transformer"])
def test_round_trip_of_ours(tmp_path, agg_module, fusion):
    model = tiny(**{"temporal.agg_module": agg_module, "head.fusion": fusion})
    path = save_model(model, tmp_path)
    for source in (tmp_path, path):
        again = load_model(source)
        assert again.config == model.config
        assert same_weights(model, again)
        assert not again.training


def test_a_checkpoint_of_another_shape(tmp_path):
    """Weights that do not fit their config, as after editing one by hand."""
    path = save_model(tiny(), tmp_path)
    metadata = _metadata(path)
    state = load_file(path)
    state["head.global_mat_weight"] = torch.eye(5)
    save_file(state, path, metadata=metadata)
    with pytest.raises(
        CheckpointError, match=r"head.global_mat_weight \(5, 5\) where the model has \(32, 32\)"
    ):
        load_model(path)


def _metadata(path):
    with safe_open(path, "pt") as archive:
        return archive.metadata()


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(tmp_path)
    path = save_model(tiny(), tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(tmp_path)


@pytest.mark.parametrize("agg_module", ["meanP", "seqLSTM", "seqTransf"])
def test_official_names_there_and_back(tmp_path, agg_module):
    model = tiny(**{"temporal.agg_module": agg_module})
    save_official(model, tmp_path / "pytorch_model.bin.0")
    assert not any(name.startswith(("head.", "temporal.")) for name in official_state_dict(model))
    again = load_official(tmp_path / "pytorch_model.bin.0", "xclip", agg_module=agg_module)
    assert same_weights(model, again)
    assert load_official(official_state_dict(model), "xclip").config == again.config


def test_official_refusals(tmp_path):
    state = official_state_dict(tiny())
    with pytest.raises(ConfigError, match="unknown family 'xlcip'; did you mean 'xclip'"):
        load_official(state, "xlcip")
    with pytest.raises(
        ConfigError, match=r"'mask_pading' of xclip; did you mean 'mask_padding'\? \(options:"
    ):
        load_official(state, "xclip", mask_pading=True)
    with pytest.raises(
        ConfigError, match=r"unknown option 'sim_header' of xclip \(options: agg_module, backend, contr"
    ):
        load_official(state, "xclip", sim_header="meanP")
    with pytest.raises(ConfigError, match=r"agg_module: 'tightTransf' is not allowed .*meanP, seqLSTM"):
        load_official(state, "xclip", agg_module="tightTransf")
    with pytest.raises(CheckpointError, match="lstm_visual"):
        load_official(state, "xclip", agg_module="seqLSTM")
    with pytest.raises(CheckpointError, match=r"unexpected: .*transformerClip"):
        load_official(state, "xclip", agg_module="meanP")
    with pytest.raises(CheckpointError, match="missing: global_mat_weight"):
        load_official({k: v for k, v in state.items() if k != "global_mat_weight"}, "xclip")
    with pytest.raises(CheckpointError, match="no 'word_logit_weight'"):
        load_official({k: v for k, v in state.items() if "word" not in k}, "xclip")
    for broken in (torch.eye(5), torch.ones(8, 7)):
        with pytest.raises(CheckpointError, match=r"of another size: word_mat_weight2 \("):
            load_official(state | {"word_mat_weight2": broken}, "xclip")
    with pytest.raises(CheckpointError, match="too few dimensions"):
        load_official(state | {"clip.visual.conv1.weight": torch.ones(3, 3)[0, 0]}, "xclip")
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        load_official(tmp_path / "pytorch_model.bin.4", "xclip")


def test_what_was_given_is_unwrapped_like_a_file(tmp_path):
    state = official_state_dict(tiny())
    wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()} | {"epoch": "five"}}
    torch.save(wrapped, tmp_path / "wrapped.bin")
    for source in (wrapped, state | {"note": "text"}, tmp_path / "wrapped.bin"):
        assert same_weights(load_official(state, "xclip"), load_official(source, "xclip"))
    with pytest.raises(CheckpointError, match="give a file's path or a state dict, not a list"):
        load_official([state], "xclip")
    with pytest.raises(CheckpointError, match="the state dict holds no tensors"):
        load_official({}, "xclip")


@pytest.mark.parametrize("prefix", ["clip.transformer.", "clip.visual.transformer."])
def test_towers_without_layers(prefix):
    state = official_state_dict(tiny())
    without = {key: value for key, value in state.items() if not key.startswith(prefix)}
    with pytest.raises(CheckpointError, match=f"no xclip checkpoint: it has no '{prefix}resblocks.*'"):
        load_official(without, "xclip")


def test_a_decoder_without_layers():
    state = official_state_dict(tiny(**{"head.name": "glscl"}))
    without = {key: value for key, value in state.items() if not key.startswith("transformer_decoder_noun")}
    with pytest.raises(CheckpointError, match=r"it has no 'transformer_decoder_noun.layers.\*'"):
        load_official(without, "glscl")


def test_a_single_number_has_no_size():
    state = official_state_dict(tiny()) | {"word_logit_weight": torch.tensor(1.0)}
    with pytest.raises(CheckpointError, match=r"its 'word_logit_weight' has too few dimensions: \[\]"):
        load_official(state, "xclip")


@pytest.mark.parametrize("positions", [6, 12, 13])
def test_a_short_cross_transformer_leaves_room_for_the_sentence(positions):
    state = official_state_dict(
        tiny(
            **{
                "head.name": "tightTransf",
                "head.positions": positions,
                "towers.architecture.context_length": positions,
                "temporal.agg_module": "meanP",
                "max_words": 6,
            }
        )
    )
    config = load_official(state, "clip4clip").config
    assert (config.head.positions, config.max_frames) == (positions, min(12, positions - 1))


def test_wide_weights_are_refused_and_narrow_ones_come_back_as_they_were(tmp_path):
    state, key = official_state_dict(tiny()), "clip.visual.proj"
    with pytest.raises(
        CheckpointError, match=r"holds 'clip.visual.proj' in float64, which float32 would round"
    ):
        load_official(state | {key: state[key].double()}, "xclip")
    half = state[key].half()
    half[0, 0], half[0, 1] = torch.nan, torch.inf
    save_official(load_official(state | {key: half}, "xclip"), tmp_path / "again.bin")
    again = torch.load(tmp_path / "again.bin", weights_only=True)[key]
    assert again.dtype == torch.float16
    assert torch.equal(again.view(torch.int16), half.view(torch.int16))


def test_share_flags_in_the_official_spelling():
    state = official_state_dict(tiny(**{"head.name": "glscl"}))
    for off in (0, "0", "false", np.int64(0), np.bool_(False), False):
        head = load_official(state, "glscl", query_share=off, cross_att_share=1).config.head
        assert (head.query_share, head.cross_att_share) == (False, True)
    for wrong in (2, "maybe", 0.5, [1]):
        with pytest.raises(ConfigError, match=r"query_share: .* is not allowed .*expected true or false"):
            load_official(state, "glscl", query_share=wrong)


@needs_golden("xclip_seqTransf.npz")
def test_lengths_migrate_on_request():
    """Cut or padded with the identity; between the two the shared part is untouched (ledger 2)."""
    golden = Golden(golden_path("xclip_seqTransf.npz"))
    state = golden.below("sd/")
    model = load_official(state, "xclip", max_words=16, max_frames=4)
    words, frames = model.head.word_mat_weight, model.head.frame_mat_weight2
    assert torch.equal(words[:12, :12], state["word_mat_weight"])
    assert torch.equal(words[12:, 12:], torch.eye(4))
    assert not words[:12, 12:].any()
    assert torch.equal(frames, state["frame_mat_weight2"][:4, :4])
    assert (model.config.max_words, model.config.max_frames) == (16, 4)


def test_a_state_dict_of_arrays():
    """As `numpy.load` gives it."""
    model = tiny()
    arrays = {key: value.numpy() for key, value in official_state_dict(model).items()}
    again = official_state_dict(load_official(arrays, "xclip"))
    assert all(torch.equal(again[key], torch.from_numpy(value)) for key, value in arrays.items())
