"""The contract of the registry: every head on every `agg_module` it can stand on, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.unit.combinations import PAIRS, batch_of, settings_of
from tests.unit.tiny import TINY, tiny
from xclip_lab import create_model, load_config, load_model
from xclip_lab.checkpoint import save_model
from xclip_lab.errors import ConfigError
from xclip_lab.heads import HEADS
from xclip_lab.temporal import AGG_MODULES

VARIANTS = {
    "xclip-transformer": {"head.fusion": "transformer", "head.mask_padding": True},
    "clip2video-no-tab": {**settings_of("clip2video", "seqTransf"), "head.center_proj": None},
    "tdb-default": {**settings_of("clip2video", "tdb"), "temporal.temporal_proj": "default"},
    "tdb-mlp": {**settings_of("clip2video", "tdb"), "temporal.temporal_proj": "sigmoid_mlp"},
    "glscl-own-queries": {**settings_of("glscl", "meanP"), "head.query_share": False},
    "glscl-own-decoders": {**settings_of("glscl", "meanP"), "head.cross_att_share": False},
    "3d-patch": {**settings_of("clip4clip", "meanP"), "towers.linear_patch": "3d"},
}
CASES = {"-".join(pair): settings_of(*pair) for pair in PAIRS} | VARIANTS


@pytest.fixture(params=CASES.values(), ids=CASES, scope="module")
def model(request):
    return tiny(**request.param)


def unused_in(model) -> tuple[str, ...]:
    """How the names of the parameters begin that no loss depends on: in the official code, or off."""
    head, temporal = model.config.head, model.config.temporal
    names = []
    if head.name == "tightTransf":
        names.append("clip.logit_scale")
    if head.name == "clip2video" and temporal.agg_module != "tdb":
        names.append("head.trans_layernorm.")
    if head.name == "glscl":
        names += ["head.weight_fc.", "head.decoder_layer_"]
        names += ["head.noun_queries"] if head.query_share else []
        names += ["head.transformer_decoder_spatial."] if head.cross_att_share else []
    if temporal.agg_module == "seqLSTM" and getattr(head, "center_proj", None) != "TAB":
        names.append("temporal.frame_position_embeddings.")
    if temporal.agg_module == "tdb" and temporal.temporal_proj == "default":
        names.append("temporal.trans_layernorm.")
    if model.config.towers.linear_patch == "3d":
        names.append("clip.visual.conv1.")
    return tuple(names)


@torch.no_grad()
def similarity(model, batch):
    text = model.encode_text(batch.token_ids, batch.text_mask)
    return model.similarity(text, model.encode_video(batch.video, batch.video_mask))


@pytest.mark.parametrize("agg_module", sorted(AGG_MODULES))
@pytest.mark.parametrize("head", HEADS.names())
def test_a_combination_is_tested_or_refused(head, agg_module):
    if (head, agg_module) not in PAIRS:
        with pytest.raises(ConfigError, match="makes no sense"):
            load_config("quickstart", TINY | settings_of(head, agg_module))


def test_similarity_is_text_by_video(model):
    found = similarity(model, batch_of(texts=5, videos=3))
    assert found.shape == (5, 3)
    assert found.isfinite().all()
    assert (found.std(0) > 0).all()
    assert (found.std(1) > 0).all()


def test_the_loss_is_the_sum_of_its_named_parts(model):
    parts = model.loss(batch_of())
    named = [value for name, value in parts.items() if name != "loss" and name.endswith("_loss")]
    assert named
    torch.testing.assert_close(sum(named), parts["loss"])
    assert parts["loss"].shape == ()


def test_every_parameter_learns_but_those_known_to_be_unused(model):
    model = copy.deepcopy(model).train()
    model.loss(batch_of())["loss"].backward()
    unused = unused_in(model)
    for name, parameter in model.named_parameters():
        if name.startswith(unused or "none"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any() or parameter.ndim == 1, name  # a softmax does not mind a common bias
    for prefix in unused:
        assert any(name.startswith(prefix) for name, _ in model.named_parameters()), prefix


def test_round_trip(model, tmp_path):
    again = load_model(save_model(model, tmp_path))
    assert again.config == model.config
    assert torch.equal(similarity(again, batch_of()), similarity(model, batch_of()))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"head.name": "tightTransf"}, r"seqTransf makes no sense .* set temporal.agg_module=meanP"),
        ({"head.name": "tightTransf", "temporal.agg_module": "tdb"}, r"tdb makes no sense"),
        ({"temporal.agg_module": "tightTransf"}, r"tightTransf is a head here; set head.name=tightTransf"),
        (
            {"head.name": "clip2video", "head.center_proj": "TAB", "temporal.agg_module": "meanP"},
            r"TAB uses the frame positions .* meanP has none; .*seqTransf or tdb, or head.center_proj=plain",
        ),
        ({"head.name": "clip2video"}, r"TAB_TDB uses the difference tokens .* seqTransf has none; .*to tdb"),
        (
            {"head.name": "glscl", "towers.architecture.embed_dim": 36},
            r"embed_dim: 36 is not allowed with head.name=glscl.*a multiple of 8",
        ),
        (
            {**settings_of("tightTransf", "meanP"), "towers.architecture.embed_dim": 200},
            r"embed_dim: 200 is not allowed with head.name=tightTransf.*192, 256",
        ),
        (
            {**settings_of("clip2video", "seqLSTM"), "towers.architecture.embed_dim": 200},
            r"embed_dim: 200 is not allowed with head.center_proj=TAB.*192, 256",
        ),
        (
            {"temporal.agg_module": "tdb", "towers.architecture.embed_dim": 200},
            r"embed_dim: 200 is not allowed with tdb.*192, 256",
        ),
        ({"head.name": "glscl", "head.temperature": 0.1}, r"head.temperature is a key of another head"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", TINY | overrides)


def test_too_few_positions_are_refused():
    config = load_config("quickstart", TINY | settings_of("tightTransf", "meanP") | {"head.positions": 4})
    with pytest.raises(ConfigError, match=r"head.positions: 4 is not allowed with max_frames=4 .*take 5"):
        create_model(config)


def test_another_head_starts_from_its_own_defaults():
    """The preset's settings are those of its own head, and stay where that head stays."""
    assert load_config("quickstart", {"head.queries": 5, "head.name": "glscl"}).head == HEADS[
        "glscl"
    ].config_class(queries=5)
    assert load_config("quickstart-glscl", {"head": {"name": "xclip"}}).head.temperature == 0.01
    kept = load_config("quickstart", {"head.name": "xclip", "head.mask_padding": True}).head
    assert (kept.temperature, kept.mask_padding) == (0.1, True)
