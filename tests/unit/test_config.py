"""One validator for presets, command line and notebooks; every error names the key and what is allowed."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from xclip_lab.config import config_from_dict, load_config, presets, save_config, to_dict
from xclip_lab.errors import ConfigError
from xclip_lab.heads import HEADS


@pytest.mark.parametrize("name", sorted(presets()))
def test_presets_resolve_and_survive_a_file(name, tmp_path):
    config = load_config(name)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(to_dict(config)) == config


@pytest.mark.parametrize("name", [name for name in presets() if "-folder-" in name])
def test_presets_of_papers_switch_on_what_the_official_code_does(name):
    """All of it that lies outside the head, and nothing that another method's code does."""
    config = load_config(name)
    of_any = {key for head in HEADS.names() for key in HEADS[head].official}
    found = {key: functools.reduce(getattr, key.split("."), config) for key in of_any}
    assert config.optim.recipe == "official"
    assert found == dict.fromkeys(of_any, False) | dict(HEADS[config.head.name].official)


def test_overrides_reach_nested_keys_and_strings_are_read_as_values():
    config = load_config(
        "quickstart",
        {
            "towers.architecture.vision_width": "192",
            "head.temperature": 0.1,
            "head.contrasts": "[video-word, frame-word]",
            "train.max_steps": "null",
            "data.preload": "false",
        },
    )
    assert config.towers.architecture.vision_width == 192
    assert config.towers.architecture.text_width == load_config("quickstart").towers.architecture.text_width
    assert config.head.contrasts == ("video-word", "frame-word")
    assert config.train.max_steps is None
    assert config.data.preload is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"head.temprature": 0.1}, r"unknown key 'head.temprature'; did you mean 'head.temperature'"),
        ({"temperature": 0.1}, r"unknown key 'temperature'; did you mean 'head.temperature'"),
        ({"agg_module": "meanP"}, r"did you mean 'temporal.agg_module'"),
        ({"temporal.agg_module": "seqtransf"}, r"'seqtransf' is not allowed .*did you mean 'seqTransf'"),
        ({"head.temperature": 0}, r"head.temperature: 0 is not allowed \(expected a number above 0\)"),
        ({"head.temperature": "warm"}, r"head.temperature: 'warm' is not allowed"),
        ({"head.temperature": float("nan")}, r"head.temperature: nan is not allowed"),
        ({"head.temperature": float("inf")}, r"head.temperature: inf is not allowed"),
        ({"optim.lr": float("inf")}, r"optim.lr: inf is not allowed"),
        ({"head.contrasts": []}, r"head.contrasts: \[\] is not allowed"),
        ({"head.contrasts": ["frame-words"]}, r"head.contrasts: \['frame-words'\] is not allowed"),
        ({"head.name": "xcilp"}, r"unknown head 'xcilp'; did you mean 'xclip'"),
        ({"train.epochs": None}, r"train.epochs: None is not allowed"),
        ({"train.batch_size": 0}, r"train.batch_size: 0 is not allowed \(expected a whole number above 0\)"),
        ({"train.batch_size": 2.5}, r"train.batch_size: 2.5 is not allowed"),
        ({"train.accumulate": 3}, r"train.accumulate: 3 equal parts .* a batch of 63 or 66 is"),
        ({"train.accumulate": 100}, r"train.accumulate: 100 equal parts .* a batch of 100 is"),
        ({"train.select": "t2v/R@2"}, r"train.select: 't2v/R@2' is not allowed .*did you mean 't2v/R@"),
        ({"towers.precision": "fp16"}, r"towers.precision: fp16 is the official recipe's way"),
        ({"optim.beta2": 1}, r"optim.beta2: 1 is not allowed \(expected a number from 0 to below 1\)"),
        ({"max_frames": 100}, r"max_frames: 100 is not allowed \(there are 77 positions\)"),
        ({"towers.architecture.context_length": 16}, r"max_words: 24 is not allowed .*16 positions"),
        ({"towers.architecture.embed_dim": 200}, r"embed_dim: 200 is not allowed .*192, 256"),
        ({"seed": 2**32}, r"seed: 4294967296 is not allowed \(expected a whole number from 0 to"),
        ({"head.name": ["a"]}, r"head.name: \['a'\] is not allowed"),
        ({"data": []}, r"data: \[\] is not allowed"),
        ({"data": 3}, r"data: 3 is not allowed"),
        ({"data.preload": 2}, r"data.preload: 2 is not allowed \(expected true or false\)"),
        ({"data.preload": 1.0}, r"data.preload: 1.0 is not allowed"),
        ({"max_words": 100}, r"max_words: 100 is not allowed .*77"),
        ({"towers.name": "ViT-B-32-quickgelu"}, r"either towers.name or towers.architecture"),
        ({"data.generate.level_shares": [1, 2]}, r"data.generate.level_shares: \[1, 2\] is not allowed"),
    ],
)
def test_bad_values(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", override)


@pytest.mark.parametrize("value", [0, 1, "0", "1", np.bool_(False), np.int64(1), True, "false"])
def test_truth_values_may_be_0_and_1(value):
    preload = load_config("quickstart", {"data.preload": value}).data.preload
    assert preload is (str(value) in ("1", "True"))


def test_what_is_optional_may_be_none_in_words():
    for nothing in (None, "null", "None"):
        overrides = {"head.name": "clip2video", "head.center_proj": nothing, "data.val_split": nothing}
        config = load_config("quickstart", overrides)
        assert (config.head.center_proj, config.data.val_split) == (None, None)
    with pytest.raises(ConfigError, match=r"allowed: plain, TAB, TAB_TDB; did you mean 'TAB'\? or null\)"):
        load_config("quickstart", {"head.name": "clip2video", "head.center_proj": "TAP"})


def test_unknown_preset(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        load_config("quikstart")
    with pytest.raises(ConfigError, match="no config file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")


def test_configs_are_frozen():
    with pytest.raises(AttributeError):
        load_config("quickstart").seed = 3


def test_overrides_must_be_a_mapping():
    with pytest.raises(ConfigError, match=r"overrides: '\{\}' is not allowed"):
        load_config("quickstart", "{}")


def test_the_model_part_can_be_replaced():
    small, large = load_config("quickstart"), load_config("quickstart", {"max_words": 30, "seed": 3})
    assert small.with_model(large.model).model == large.model
    assert small.with_model(large.model).seed == small.seed
