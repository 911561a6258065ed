"""The tables and controls that the notebooks share."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from xclip_lab import create_model, evaluate, study, uniform_attention
from xclip_lab.attention import tap_names
from xclip_lab.checkpoint import save_model
from xclip_lab.errors import ConfigError, DatasetError, VideoError
from xclip_lab.model import Origin
from xclip_lab.runs import prepare_data
from xclip_lab.tokens import TokenSet


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    torch.set_num_threads(1)
    config = study.configure(
        "quickstart", {"data.root": str(tmp_path_factory.mktemp("study") / "clips")}, seed=3, smoke=True
    )
    prepare_data(config, progress=False)
    return config


@pytest.fixture(scope="module")
def clips(config):
    return study.open_clips(study.open_split(config, "test"), config)


@pytest.fixture(scope="module")
def model(config):
    torch.manual_seed(0)
    return create_model(config).eval()


def test_overrides_win_over_smoke_and_smoke_over_the_preset():
    assert study.configure("quickstart", {}, smoke=True).train.batch_size == 4
    assert study.configure("quickstart", {"train.batch_size": 6}, smoke=True).train.batch_size == 6
    assert study.configure("quickstart", {}, seed=5).seed == 5
    assert study.configure("quickstart", {}).train.batch_size == 64


def test_levels_share_out_all_captions(config, clips, model):
    truth = study.find_truth(config, "test")
    result = evaluate(model, clips.dataset, config, store=clips.store, progress=False)
    control = study.shuffled_frames(model, clips.dataset, config, clips.store)
    assert control.stamp["frame_order"] == 2
    assert not np.array_equal(control.similarity, result.similarity)
    table = study.level_table(result, control, truth)
    np.testing.assert_array_equal(table.loc["all", ["low", "high"]], result.intervals["t2v"]["R@1"])
    assert list(table.index) == ["all", "1 objects", "2 motion", "3 order"]
    assert table["captions"].iloc[1:].sum() == table["captions"]["all"] == len(clips)
    weighted = (table["R@1"] * table["captions"]).iloc[1:].sum() / len(clips)
    assert weighted == pytest.approx(result.metrics["t2v"]["R@1"])
    assert (table["low"] <= table["R@1"]).all()
    assert (table["R@1"] <= table["high"]).all()
    assert list(study.level_table(result, control, {}).index) == ["all"]
    assert "n = 12" in study.level_lines(table).splitlines()[0]


def test_uniform_stages_change_the_logit(config, clips, model):
    clip = study.read_clip(clips, 0)
    table = uniform_attention.uniform_stages(model, clip, clips.dataset, config, clips.store)
    assert len(table) == 1 + 6
    assert table["logit"].iloc[1:].nunique() > 1
    assert not np.isclose(table["logit"]["video_word_softmax"], table["logit"]["as it is"])


@pytest.mark.parametrize("mask_padding", [False, True])
def test_a_uniform_softmax_is_uniform_over_what_takes_part(config, mask_padding):
    head = dataclasses.replace(config.head, mask_padding=mask_padding)
    model = study.new_model(dataclasses.replace(config, head=head)).eval()
    words, frames = int(config.max_words), int(config.max_frames)
    text, video = (
        TokenSet(torch.randn(2, 16), torch.randn(2, length, 16), torch.arange(length) < torch.tensor(real))
        for length, real in ((words, [[3], [5]]), (frames, [[2], [4]]))
    )
    kept = {}
    for name in uniform_attention.softmax_taps(model):
        over_words = "over words" in tap_names(model)[name]
        with uniform_attention.uniform(model, name):
            hook = model.get_submodule(name).register_forward_hook(
                lambda tap, inputs, output, name=name: kept.update({name: (inputs[0], output)})
            )
            model.similarity(text, video)
            hook.remove()
        own, flat = kept[name]
        assert not torch.allclose(own, flat)
        torch.testing.assert_close(flat.sum(-1), torch.ones_like(flat[..., 0]))
        mask = text.mask[:, None] if over_words else video.mask[None]
        while mask.ndim < flat.ndim:
            mask = mask.unsqueeze(2)
        real = mask.expand_as(flat) if mask_padding else torch.ones_like(flat, dtype=torch.bool)
        assert ((flat > 0) == real).all()
        assert len(flat[1, 1][real[1, 1]].unique()) == 1
    assert len(kept) == 6
    with (
        pytest.raises(ConfigError, match=r"no tap 'head\.frame_softmx'"),
        uniform_attention.uniform(model, "head.frame_softmx"),
    ):
        pass


@pytest.mark.parametrize("preset", ["quickstart-wti", "quickstart-clip2video", "quickstart-glscl"])
def test_uniform_attention_is_xclips(preset, config, clips):
    other = study.new_model(study.configure(preset, {}, smoke=True))
    message = r"uniform attention needs a model with head\.name=xclip"
    name = next(iter(tap_names(other)), "")
    with pytest.raises(ConfigError, match=message), uniform_attention.uniform(other, name):
        pass
    with pytest.raises(ConfigError, match=message):
        uniform_attention.uniform_stages(other, study.read_clip(clips, 0), clips.dataset, config, clips.store)


def test_uniform_stages_encode_once(config, clips, model, monkeypatch):
    rows = []
    encode_video = model.encode_video
    monkeypatch.setattr(
        model, "encode_video", lambda video, mask: rows.append(len(video)) or encode_video(video, mask)
    )
    clip = study.read_clip(clips, 3)
    table = uniform_attention.uniform_stages(model, clip, clips.dataset, config, clips.store)
    assert sum(rows) == len(clips)
    monkeypatch.undo()
    result = evaluate(model, clips.dataset, config, store=clips.store, progress=False)
    assert table["logit"]["as it is"] == pytest.approx(result.similarity[3, 3])
    assert table["R@1"]["as it is"] == result.metrics["t2v"]["R@1"]


def test_best_leads_and_worst_is_behind(config, clips, model):
    result = evaluate(model, clips.dataset, config, store=clips.store, progress=False)
    best, worst = study.best_and_worst(result)
    ranks = result.ranks["t2v"]
    assert ranks[best] <= ranks[worst]
    found = study.retrieved(clips, result, worst, count=2)
    assert found["ranks"][:2] == [1, 2]
    assert found["scores"] == sorted(found["scores"], reverse=True)
    place = [clip.video_id for clip in found["clips"]].index(found["truth"])
    assert found["ranks"][place] == ranks[worst]
    assert found["query"] == result.captions[worst]


def test_examples_show_pairs(config, clips):
    truth = study.find_truth(config, "test")
    shown = [truth[clip.video_id] for clip in study.examples(clips, truth)]
    assert [clip.level for clip in shown] == [1, 2, 2, 3, 3]
    assert shown[1].group == shown[2].group
    assert shown[3].group == shown[4].group
    assert len(study.examples(clips, {})) == 4


def test_a_broken_clip_is_named(config, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    settings = dataclasses.replace(config.data, dataset="folder", root=str(tmp_path))
    clips = study.open_clips(
        study.open_split(dataclasses.replace(config, data=settings), "test"),
        dataclasses.replace(config, data=settings),
    )
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        study.read_clip(clips, 0)
    with pytest.raises(DatasetError, match="no caption 1; test has captions 0 to 0"):
        study.read_clip(clips, 1)
    assert study.examples(clips, {}) == []


def test_own_videos_have_no_truth(config, capsys):
    settings = dataclasses.replace(config.data, dataset="folder")
    assert study.find_truth(dataclasses.replace(config, data=settings), "test") == {}
    assert "carries no word-frame truth" in capsys.readouterr().out


def test_a_checkpoint_brings_its_own_sizes(config, model, tmp_path):
    save_model(model, tmp_path)
    other = study.configure("quickstart", {"max_frames": 5, "head.temperature": 0.5})
    loaded, resolved = study.open_model(tmp_path, other)
    assert resolved.model == loaded.config == model.config
    assert resolved.data == other.data
    assert loaded.origin == Origin(str(tmp_path / "model.safetensors"))


def test_without_a_checkpoint_it_says_so(config, capsys):
    first, _ = study.open_model("", config)
    again, _ = study.open_model(None, config)
    assert first.origin == Origin("none: untrained (towers: random weights)")
    assert "untrained" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_training_on_what_is_tested_is_said(config, tmp_path, capsys):
    """Own videos without a column `split` belong to every split."""
    from tests.videos import write_video

    write_video(tmp_path / "a.mp4", 8)
    own = dataclasses.replace(config.data, dataset="folder", root=str(tmp_path))
    study.open_training_splits(dataclasses.replace(config, data=own))
    assert "1 of the 1 videos of 'test' are in 'train' too" in capsys.readouterr().out
