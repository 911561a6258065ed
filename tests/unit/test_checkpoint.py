"""Models on disk: ours and the official code's. What does not fit is refused with a list."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.parity.golden import Golden
from tests.shared import golden_path, needs_golden
from tests.unit.combinations import batch_of
from tests.unit.tiny import tiny
from xclip_lab import load_model, load_official, save_official
from xclip_lab.attention import run_with_cache
from xclip_lab.checkpoint import official_state_dict, save_model
from xclip_lab.errors import CheckpointError, ConfigError, UserError
from xclip_lab.families import options_of


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
    with pytest.raises(ConfigError, match="unknown family None"):
        load_official(state, None)
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
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        load_official(tmp_path / "pytorch_model.bin.4", "xclip")


def test_what_was_given_is_unwrapped_like_a_file(tmp_path):
    state = official_state_dict(tiny())
    wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": "five"}
    torch.save(wrapped, tmp_path / "wrapped.bin")
    for source in (wrapped, tmp_path / "wrapped.bin"):
        assert same_weights(load_official(state, "xclip"), load_official(source, "xclip"))
    with pytest.raises(CheckpointError, match="give a file's path or a state dict, not a list"):
        load_official([state], "xclip")
    with pytest.raises(CheckpointError, match="the state dict holds no tensors"):
        load_official({}, "xclip")


@pytest.mark.parametrize("where", ["a file", "a dict"])
def test_what_is_no_weight_among_weights_is_listed(where, tmp_path):
    state, meta = official_state_dict(tiny()), torch.empty(32, 32, device="meta")
    sparse = state["global_mat_weight"].to_sparse()
    for wrong, match in (
        ({"epoch": 3, "note": "text"}, "no tensor, unexpected: epoch, note; leave"),
        ({"global_mat_weight": None}, "no tensor, unexpected: global_mat_weight; "),
        ({"global_mat_weight": sparse}, r"without data \(meta\): global_mat_weight; save them dense"),
        ({"global_mat_weight": meta}, r"without data \(meta\): global_mat_weight; save them dense"),
    ):
        source = state | wrong
        if where == "a file":
            torch.save(source, tmp_path / "x.bin")
            source = tmp_path / "x.bin"
        with pytest.raises(CheckpointError, match=match):
            load_official(source, "xclip")


READ_OFF = {
    "clip4clip": (
        {"head.name": "tightTransf", "temporal.agg_module": "meanP"},
        "clip.visual.conv1.weight clip.visual.positional_embedding clip.token_embedding.weight "
        "clip.text_projection clip.positional_embedding cross.embeddings.position_embeddings.weight",
    ),
    "xclip": ({}, "word_logit_weight frame_logit_weight"),
    "clip2video": ({"head.name": "clip2video", "temporal.agg_module": "tdb"}, "weight_center"),
    "glscl": ({"head.name": "glscl"}, "spatial_queries decoder_layer_noun.linear1.weight"),
}
"""Which keys the sizes of a family's model are read off."""


@pytest.mark.parametrize("family", READ_OFF)
def test_what_sizes_are_read_off_is_refused_by_its_name(family):
    settings, keys = READ_OFF[family]
    state = official_state_dict(tiny(**settings))
    for key in keys.split():
        shape = list(state[key].shape)
        for wrong in ([0, *shape[1:]], [*shape[:-1], 0], [1, *shape], [*shape, 1], shape[1:], []):
            with pytest.raises(
                CheckpointError, match=f"no {family} checkpoint: its {key!r} has the size"
            ) as found:
                load_official(state | {key: torch.zeros(wrong)}, family)
            assert str(wrong) in str(found.value)
        for rows in (1, shape[0] - 1, shape[0] + 1):  # another model, or none: never a bare error
            with suppress(UserError):
                load_official(state | {key: torch.zeros(rows, *shape[1:])}, family)


@pytest.mark.parametrize(("of_clip", "of_cross"), [(77, 78), (77, 128), (76, 77), (77, 20)])
def test_a_cross_transformer_has_positions_of_its_own(of_clip, of_cross):
    """More or fewer than CLIP's: those that both models have are used alike, and all come back."""
    settings, _ = READ_OFF["clip4clip"]
    key, state = "cross.embeddings.position_embeddings.weight", official_state_dict(tiny(**settings))
    longer = torch.cat([state[key], torch.randn(128, 32)])
    words = {"clip.positional_embedding": state["clip.positional_embedding"][:of_clip]}
    whole, other = (
        load_official(source, "clip4clip") for source in (state, state | words | {key: longer[:of_cross]})
    )
    (expected, _), (found, _) = (run_with_cache(each, batch_of(texts=2, videos=3)) for each in (whole, other))
    assert torch.equal(found, expected)
    assert torch.equal(official_state_dict(other)[key], longer[:of_cross])


def test_tdb_is_of_clip2video_alone():
    """Unless a model of ours has it all the same, as its keys then tell."""
    state, mixed = official_state_dict(tiny()), official_state_dict(tiny(**{"temporal.agg_module": "tdb"}))
    for family in ("clip4clip", "xclip", "glscl", "clip2video"):
        assert {"temporal_proj", "mask_differences"} & {*options_of(family)} == (
            {"temporal_proj", "mask_differences"} if family == "clip2video" else set()
        )
    with pytest.raises(ConfigError, match=r"'tdb' is not allowed \(allowed: meanP, seqLSTM, seqTransf\)"):
        load_official(state, "xclip", agg_module="tdb")
    for options in ({}, {"agg_module": "tdb"}):
        assert load_official(mixed, "xclip", **options).config.temporal.agg_module == "tdb"
    with pytest.raises(ConfigError, match="unknown option 'mask_differences' of xclip"):
        load_official(state, "xclip", mask_differences=True)


@pytest.mark.parametrize("projection", ["default", "sigmoid_mlp", "sigmoid_selfA"])
@pytest.mark.parametrize("head", ["clip4clip", "xclip", "clip2video", "glscl"])
def test_round_trip_of_tdb_under_every_head(tmp_path, head, projection):
    of_temporal = {"agg_module": "tdb", "temporal_proj": projection, "mask_differences": True}
    model = tiny(**{"head.name": head, **{f"temporal.{key}": of_temporal[key] for key in of_temporal}})
    save_official(model, tmp_path / "own.bin")
    for options in ({}, {"temporal_proj": projection}, {"mask_differences": True}):
        again = load_official(tmp_path / "own.bin", head, **options)
        assert same_weights(model, again)
        assert again.config.temporal.temporal_proj == projection
        assert again.config.temporal.mask_differences == ("mask_differences" in options)


def test_frames_without_positions_have_no_limit():
    many = {"temporal.agg_module": "meanP", "max_frames": 100}
    state = official_state_dict(tiny(**many))
    assert load_official(state, "xclip").config.max_frames == 100
    for agg_module in ("seqTransf", "tdb"):
        with pytest.raises(
            ConfigError, match=r"max_frames: 100 is not allowed \(there are positions for 77\)"
        ):
            tiny(**many | {"temporal.agg_module": agg_module})


def test_tab_has_a_position_for_every_second_frame():
    settings = {"head.name": "clip2video", "head.center_proj": "TAB", "temporal.agg_module": "seqLSTM"}
    model = tiny(**settings, max_frames=154)
    frames, mask = torch.randn(1, 154, model.clip.sizes.embed_dim), torch.ones(1, 154)
    assert model.head.with_added_tokens(frames, mask, model.temporal)[0].shape[1] == 154 + 77
    with pytest.raises(ConfigError, match=r"max_frames: 155 is not allowed \(there are positions for 154\)"):
        tiny(**settings, max_frames=155)


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
