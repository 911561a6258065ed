"""One validator for presets, command line and notebooks; every error names the key and what is allowed."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest

from xclip_lab import config
from xclip_lab.config import config_from_dict, load_config, presets, save_config, to_dict
from xclip_lab.datasets import DATASETS
from xclip_lab.datasets.base import PROTOCOLS, Known, Protocol
from xclip_lab.datasets.reading import own_name
from xclip_lab.errors import ConfigError
from xclip_lab.grid import load_grid
from xclip_lab.heads import HEADS
from xclip_lab.preset_files import preset_values
from xclip_lab.validation import leaf_names, merge, nest


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
        (
            {"head.contrasts": ["frame-words"]},
            r"contrasts: \['frame-words'\] .* did you mean 'frame-word'\?\)",
        ),
        (
            {"head.contrasts": "[frame-words]"},
            r"contrasts: '\[frame-words\]' .* did you mean 'frame-word'\?\)",
        ),
        ({"head.name": "xcilp"}, r"unknown head 'xcilp'; did you mean 'xclip'"),
        ({"train.epochs": None}, r"train.epochs: None is not allowed"),
        ({"train.batch_size": 0}, r"train.batch_size: 0 is not allowed \(expected a whole number above 0\)"),
        ({"train.batch_size": 2.5}, r"train.batch_size: 2.5 is not allowed"),
        ({"train.accumulate": 3}, r"train.accumulate: 3 equal parts .* a batch of 63 or 66 is"),
        ({"train.accumulate": 100}, r"train.accumulate: 100 equal parts .* a batch of 100 is"),
        ({"train.select": "t2v/R@2"}, r"train.select: 't2v/R@2' is not allowed .*did you mean 't2v/R@"),
        ({"towers.precision": "fp16"}, r"towers.precision: fp16 is the official recipe's way"),
        ({"optim.beta2": 1}, r"optim.beta2: 1 is not allowed \(expected a number from 0 to below 1\)"),
        ({"max_frames": 100}, r"max_frames: 100 is not allowed \(there are positions for 77\)"),
        ({"towers.architecture.context_length": 16}, r"max_words: 24 is not allowed .*positions for 16"),
        ({"towers.architecture.embed_dim": 200}, r"embed_dim: 200 is not allowed .*192, 256"),
        ({"seed": 2**32}, r"seed: 4294967296 is not allowed \(expected a whole number from 0 to"),
        ({"head.name": ["a"]}, r"head.name: \['a'\] is not allowed"),
        ({"data": []}, r"data: \[\] is not allowed"),
        ({"data": 3}, r"data: 3 is not allowed"),
        ({"data.preload": 2}, r"data.preload: 2 is not allowed \(expected true or false\)"),
        ({"data.preload": 1.0}, r"data.preload: 1.0 is not allowed"),
        ({"max_words": 100}, r"max_words: 100 is not allowed .*77"),
        ({"towers.name": "ViT-B-32-quickgelu"}, r"either towers.name or towers.architecture"),
        (
            {"data.generate.level_shares": [1, 2]},
            r"level_shares: \[1, 2\] .* a list of 4, each a number, 0 or",
        ),
        (
            {"data.generate.level_shares": [0, 0, 0, 0]},
            r"data.generate.level_shares: all are 0; give at least",
        ),
        (
            {"data.generate.size": 7},
            r"data.generate.size: 7 is not allowed \(expected an even number from 32\)",
        ),
        ({"data.val_split": "vla"}, r"data.val_split: 'vla' is not allowed .*did you mean 'val'"),
        ({"data.dataset": "msrvt"}, r"data.dataset: unknown dataset 'msrvt'; did you mean 'msrvtt'"),
        (
            {"data": {"dataset": "msrvtt", "protocol": "1k-B"}},
            r"data.protocol: .*'1k-B'; did you mean '1k-A'",
        ),
        ({"train.device": "cud"}, r"train.device: 'cud' is not allowed \(allowed: .*did you mean 'cuda'"),
        ({"train.device": "cuda:x"}, r"train.device: 'cuda:x' is not allowed .*such as cuda:1"),
        ({"towers.pretrained": "openia"}, r"towers.pretrained: 'openia' is neither a file nor .*own sizes"),
        ({"head.": 1}, r"unknown key 'head.'; did you mean 'head.name'"),
    ],
)
def test_bad_values(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", override)


@pytest.mark.parametrize("head", HEADS.names())
def test_what_a_value_may_be_is_told_in_words(head):
    """Not in those of Python's typing."""
    prefixes = {**config._SECTIONS, "head": HEADS[head].config_class}
    for key in [name for prefix, cls in prefixes.items() for name in leaf_names(cls, prefix)]:
        with pytest.raises(ConfigError) as refused:
            config_from_dict(merge({"head": {"name": head}}, nest(key, {"a": 1})))
        told = str(refused.value)
        assert key.startswith("towers.architecture") or told.startswith(f"{key}: {{'a': 1}} is not allowed (")
        assert not re.search(r"typing|Literal|tuple|\[|Positive|class", told), told


def test_names_that_nobody_knows_are_refused_where_they_are_given_alone(tmp_path, monkeypatch):
    """A run's own file may be of another machine and of a dataset that some module registers."""
    with pytest.raises(ConfigError, match=r"'openia' .*ViT-B-32-quickgelu; did you mean 'openai'\? \(tags: "):
        load_config("xclip-msrvtt-b32", {"towers.pretrained": "openia"})
    written = config_from_dict({"data": {"dataset": "mine"}, "towers": {"pretrained": "weights"}})
    save_config(written, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", {"seed": 0}).data == written.data
    known: list[dict[str, object]] = [
        {"data.dataset": "folder"},
        {"towers.pretrained": "runs/a/model.safetensors"},
    ]
    known += [{"towers.pretrained": name} for name in ("laion400m_e32", None, "later.pt", "there")]
    known += [{"train.device": name} for name in ("auto", "cpu", "cuda", "cuda:3", "mps", "xpu:1")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    for overrides in known:
        load_config("xclip-msrvtt-b32", overrides)
    monkeypatch.setitem(DATASETS._entries, "mine", None)
    assert load_config("quickstart", {"data.dataset": "mine", "data.val_split": "held-out"})
    splits = {"train": Known(None, None), "dev": Known(None, None)}
    monkeypatch.setitem(PROTOCOLS, "mine", {"standard": Protocol(splits, {})})
    for split in ("dev", "val"):
        assert load_config("quickstart", {"data.dataset": "mine", "data.val_split": split})
        assert own_name("mine", split, None) == split
    with pytest.raises(ConfigError, match=r"'held-out' is not allowed \(allowed: train, val, test, dev\)"):
        load_config("quickstart", {"data.dataset": "mine", "data.val_split": "held-out"})


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
    with pytest.raises(ConfigError, match=r"no config file nnn"):
        load_config(f"{'n' * 300}.yaml")
    for broken in ("a: [", "[" * 10_000, f"seed: {'9' * 6000}"):
        (tmp_path / "broken.yaml").write_text(broken)
        with pytest.raises(ConfigError, match="not valid YAML"):
            load_config(tmp_path / "broken.yaml")


def test_a_key_that_stands_twice_in_a_file(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("seed: 1\ntrain:\n  epochs: 2\n  device: cpu\n  epochs: 3\n")
    for reader in (load_config, load_grid):
        with pytest.raises(ConfigError, match=r"the key 'epochs' stands there twice in .*line 5, column 3"):
            reader(file)
    file.write_text("usual: &usual\n  lr: 1.0e-3\ntrain:\n  <<: *usual\n  lr: 1.0e-4\n  epochs: 3\n")
    assert preset_values(file)[0]["train"] == {"lr": 1e-4, "epochs": 3}
    file.write_text("parts: [&a {x: 1}, &b {y: 2}]\nwhole:\n  <<: *a\n  <<: *b\n  1: int\n  '1': text\n")
    assert preset_values(file)[0]["whole"] == {"x": 1, "y": 2, 1: "int", "1": "text"}


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
