"""The presets of the papers, held against their table written out here, and the published numbers."""

from __future__ import annotations

import math

import pytest
import yaml

from tests.shared import needs_shared, shared
from xclip_lab import preset_files
from xclip_lab.__main__ import main
from xclip_lab.config import load_config, presets
from xclip_lab.datasets.base import PROTOCOLS
from xclip_lab.errors import ConfigError
from xclip_lab.published import METRICS, ablation, published

OURS = ("quickstart", "folder")
"""Words in the names of presets that stand for no row of a paper."""

GLSCL = {"temp": 3, "alpha": 1e-4, "beta": 0.005, "queries": 8}

# name: batch, epochs, words and frames, protocol, split that selects, t2v R@1 published, own settings
TABLE = {
    "xclip-msrvtt-b32": (300, 5, 32, 12, "9k", "test", 46.1, {}),
    "xclip-msrvtt-b16": (80, 5, 32, 12, "9k", "test", 49.3, {}),
    "xclip-msvd-b32": (300, 5, 32, 12, None, "val", 47.1, {}),
    "xclip-msvd-b16": (80, 5, 32, 12, None, "val", 50.4, {}),
    "xclip-lsmdc-b32": (300, 5, 32, 12, None, "val", 23.3, {}),
    "xclip-lsmdc-b16": (80, 5, 32, 12, None, "val", 26.1, {}),
    "xclip-didemo-b32": (64, 20, 64, 64, None, "val", 45.2, {}),
    "xclip-didemo-b16": (16, 20, 64, 64, None, "val", 47.8, {}),
    "xclip-activitynet-b32": (112, 20, 64, 64, None, "test", 44.3, {}),
    "xclip-activitynet-b16": (32, 20, 64, 64, None, "test", 46.2, {}),
    "clip4clip-msrvtt-b32": (128, 5, 32, 12, "9k", "test", 44.5, {}),
    "clip4clip-msrvtt-b16": (128, 5, 32, 12, "9k", "test", 46.4, {}),
    "clip4clip-msvd-b32": (128, 5, 32, 12, None, "test", 45.2, {}),
    "clip4clip-msvd-b16": (128, 5, 32, 12, None, "test", 47.2, {}),
    "clip4clip-lsmdc-b32": (128, 5, 32, 12, None, "test", 22.6, {}),
    "clip4clip-lsmdc-b16": (128, 5, 32, 12, None, "test", 23.5, {}),
    "clip4clip-didemo-b32": (128, 5, 64, 64, None, "test", 42.8, {}),
    "clip4clip-didemo-b16": (128, 5, 64, 64, None, "test", 44.8, {}),
    "clip4clip-activitynet-b32": (128, 5, 64, 64, None, "test", 40.5, {}),
    "clip4clip-activitynet-b16": (128, 5, 64, 64, None, "test", 44.5, {}),
    "clip2video-msrvtt-b32": (128, 5, 32, 12, "9k", None, 45.6, {"centers": 5, "stride": 2}),
    "clip2video-msrvtt-full-b32": (128, 5, 32, 12, "full", "val", 29.8, {"centers": 5, "stride": 2}),
    "clip2video-msvd-b32": (128, 5, 32, 12, None, "val", 47.0, {"centers": 5, "stride": 1}),
    "clip2video-vatex-b32": (128, 5, 32, 12, "hgr", "val", 61.2, {"centers": 7, "stride": 1}),
    "clip2video-vatex-1k5-b32": (128, 5, 32, 12, "random-1k5", None, 57.3, {"centers": 7, "stride": 1}),
    "glscl-msrvtt-b32": (128, 5, 32, 12, "9k", "test", 48.1, GLSCL | {"beta": 0.02}),
    "glscl-msrvtt-b16": (128, 5, 32, 12, "9k", "test", 49.5, GLSCL | {"beta": 0.02}),
    "glscl-msvd-b32": (128, 5, 32, 12, None, "val", 47.5, GLSCL),
    "glscl-lsmdc-b32": (128, 5, 32, 12, None, "val", 23.4, GLSCL | {"temp": 5, "alpha": 0.01}),
    "glscl-didemo-b32": (32, 5, 64, 64, None, "test", 46.7, GLSCL),
    "glscl-activitynet-b32": (64, 10, 64, 64, None, "test", 41.4, GLSCL | {"queries": 12}),
}


def test_every_preset_of_a_paper_has_a_row_here():
    assert {name for name in presets() if not any(word in name.split("-") for word in OURS)} == TABLE.keys()


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_is_its_row_of_the_table(name):
    batch, epochs, words, frames, protocol, selection, _, own = TABLE[name]
    family, dataset, patch = name.split("-")[0], name.split("-")[1], name[-2:]
    config = load_config(name)
    data, head, temporal, optim, train = config.data, config.head, config.temporal, config.optim, config.train

    assert (train.batch_size, train.epochs, config.max_words, config.max_frames) == (
        batch,
        epochs,
        words,
        frames,
    )
    assert (train.accumulate, train.max_steps, train.precision) == (1, None, "fp32")
    assert train.gather_gradients == ("exact" if family == "clip2video" else "official")

    assert (data.dataset, data.root, data.family) == (dataset, f"data/{dataset}", family)
    assert (data.protocol, data.train_split, data.val_split, data.test_split) == (
        protocol, "train", selection, "test",
    )  # fmt: skip
    assert (data.captions, data.slice_framepos, data.frame_order) == ("all", 2, 0)
    paragraphs = dataset in ("didemo", "activitynet")
    sampler = {"clip2video": "clip2video", "glscl": "official" if paragraphs else "glscl"}
    assert data.sampler == sampler.get(family, "official")
    assert data.feature_framerate == own.get("stride", 1)
    assert data.frame_jitter == (family == "clip2video")
    assert data.augment == ("randaugment" if family == "glscl" and not paragraphs else "none")

    assert config.towers.name == f"ViT-B-{patch}-quickgelu"
    assert (config.towers.pretrained, config.towers.precision) == ("openai", "fp16")
    frozen = (-1, True) if family == "glscl" else (0, False)
    assert (config.towers.freeze_layer_num, config.towers.freeze_conv1) == frozen
    assert config.towers.mask_padded_words == (family == "glscl")

    agg_module = "tdb" if family == "clip2video" else "seqTransf"
    assert (temporal.agg_module, temporal.layers) == (agg_module, 4)
    assert head.name == family
    if family == "xclip":
        assert head.temperature == 0.01
    if family == "clip2video":
        assert (temporal.temporal_proj, temporal.mixed_head_masks) == ("sigmoid_selfA", True)
        assert (head.center_proj, head.centers, head.center_weight) == ("TAB_TDB", own["centers"], 0.5)
    if family == "glscl":
        assert {key: getattr(head, key) for key in own} == own
        assert (head.layers, head.query_share, head.cross_att_share, head.loss2_weight) == (
            3,
            True,
            True,
            0.5,
        )

    assert (optim.recipe, optim.lr, optim.coef_lr) == ("official", 1e-4, 1e-3)
    assert (optim.warmup_proportion, optim.weight_decay) == (0.1, 0.2)
    assert optim.schedule_epochs == (5 if family == "glscl" else None)


@pytest.mark.parametrize("name", TABLE)
def test_a_presets_dataset_has_its_protocol_and_splits(name):
    data = load_config(name).data
    protocols = PROTOCOLS[data.dataset]
    splits = protocols[data.protocol or next(iter(protocols))].splits
    assert {data.train_split, data.val_split, data.test_split} - {None} <= splits.keys()


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_says_what_it_stands_for(name):
    told = preset_files.about(name)
    assert told.script
    assert told.published
    stated = published(*told.published)
    assert stated is not None
    assert stated.metrics["t2v"]["R@1"] == TABLE[name][6]
    assert stated.post_processing is None


def test_presets_for_own_videos_stand_for_no_paper():
    ours = presets().keys() - TABLE.keys()
    assert {preset_files.about(name) for name in ours} == {preset_files.About()}


def test_presets_leave_no_trace_on_each_other():
    values, _ = preset_files.preset_values("xclip-msrvtt-b32")
    values.pop("head")
    values["data"] = {}
    assert preset_files.preset_values("xclip-msrvtt-b32")[0]["head"]["name"] == "xclip"
    assert load_config("xclip-msrvtt-b32").data.dataset == "msrvtt"


def test_a_switch_away_from_a_preset():
    config = load_config("glscl-msrvtt-b32", {"data.val_split": "null", "data.protocol": "7k"})
    assert (config.data.val_split, config.data.protocol, config.data.augment) == (None, "7k", "randaugment")


def test_the_command_shows_them_in_a_terminals_width(capsys):
    assert main(["presets"]) == 0
    header, *lines, blank, ours, b32 = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "preset"
    assert max(map(len, [header, *lines, ours, b32])) <= 120
    assert (blank, ours[:7], b32[:2]) == ("", "* ours:", "+ ")
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert rows.keys() == presets().keys()
    assert rows["xclip-didemo-b16"] == "didemo B/16 16 20 64/64 47.8 run_xclip_didemo_vit16.sh"
    assert rows["clip2video-vatex-1k5-b32"] == "vatex random-1k5 B/32 128* 5* 32/12 57.3 vatex_TAB_TDB.sh"
    marked = {mark: {name for name, row in rows.items() if row.count(mark) == 2} for mark in "*+"}
    assert marked["*"] == {name for name in TABLE if name.startswith("clip2video-")}
    clip4clip = {name for name in TABLE if name.startswith("clip4clip-") and name.endswith("b16")}
    assert marked["+"] == {"glscl-msrvtt-b16"} | clip4clip
    assert rows["glscl-msrvtt-b32"].split()[-2:] == ["48.1", "train_msrvtt.sh"]
    assert rows["xclip-folder-b32"] == "folder B/32 300 5 32/12 - own videos"
    assert rows["quickstart"] == "synthetic own 64 12 24/8 - generated clips"


def test_published_numbers():
    stated = published("msrvtt-1k-A", "xclip-b32")
    assert stated is not None
    assert list(stated.metrics["v2t"].values()) == [46.8, 73.3, 84.0, 2, 9.1]
    assert stated.source == {"t2v": "X-CLIP paper", "v2t": "X-CLIP paper"}
    reranked = published("msrvtt-1k-A", "glscl-b32-qbnorm")
    assert reranked is not None
    assert reranked.post_processing == "QB-Norm"
    not_given = published("msvd", "xclip-b32")
    assert not_given is not None
    assert not_given.metrics["t2v"] == {"R@1": 47.1, "R@5": 77.8, "MnR": 9.5}
    assert published("msvd", "nobody") is None
    assert published("ablations", "contrasts") is None


def test_published_numbers_are_well_formed():
    tables = yaml.safe_load((preset_files.PRESETS.parent / "published.yaml").read_text())
    tables.pop("ablations")
    rows = [row for sides in tables.values() for models in sides.values() for row in models.values()]
    assert len(rows) > 60
    for sides in tables.values():
        assert list(sides) == ["t2v", "v2t"]
        assert sides["t2v"].keys() == sides["v2t"].keys()
        for model in sides["t2v"]:
            assert len({sides[side][model].get("post_processing") for side in sides}) == 1
    for row in rows:
        assert len(row["values"]) == len(METRICS)
        first, fifth, tenth, median, mean = (math.nan if v is None else v for v in row["values"])
        assert 0 < first < fifth <= 100
        assert not fifth >= tenth
        assert not median >= mean
        assert row["source"]


def test_published_ablations():
    contrasts = ablation("contrasts")
    assert contrasts.rows["SV+SF+WV+WF"] == {"t2v/R@1": 46.1, "v2t/R@1": 46.8}
    assert contrasts.rows["SF+WV+WF"] == contrasts.rows["SV+SF+WV"]
    assert contrasts.note is not None
    assert "SF+WV+WF and SV+SF+WV" in contrasts.note
    assert list(ablation("temporal_encoder").rows) == ["off", "on", "off-b16", "on-b16"]
    with pytest.raises(ConfigError, match="'contrast'; did you mean 'contrasts'"):
        ablation("contrast")


@needs_shared("published.yaml")
def test_published_numbers_are_the_reference_ones():
    theirs = yaml.safe_load(shared("published.yaml").read_text())
    ours = yaml.safe_load((preset_files.PRESETS.parent / "published.yaml").read_text())
    tables = theirs.pop("xclip-ablations")

    def numbers(protocols):
        return {
            (protocol, side, model): (row["values"], row.get("post_processing"))
            for protocol, sides in protocols.items()
            for side, models in sides.items()
            for model, row in models.items()
        }

    for name, table in ours.pop("ablations").items():
        rows = {yaml.safe_load(key): row for key, row in table["rows"].items()}
        assert list(rows.items()) == list(tables[name].items())
    assert numbers(ours) == numbers(theirs)
