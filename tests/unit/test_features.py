"""The feature store: what the towers gave, again, and heads that train on it as on pixels."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from tests.unit.training import film, tiny_config, tiny_dataset
from xclip_lab import evaluate, fit, load_model
from xclip_lab.batching import make_loader
from xclip_lab.clips import ClipDataset
from xclip_lab.errors import ConfigError, DatasetError
from xclip_lab.features import StoredClips, embed
from xclip_lab.model import RetrievalModel
from xclip_lab.optim import freeze_towers

HEADS = {
    "xclip": {},
    "clip4clip": {"head.name": "clip4clip"},
    "tightTransf": {"head.name": "tightTransf", "temporal.agg_module": "meanP"},
    "clip2video": {"head.name": "clip2video", "temporal.agg_module": "tdb"},
    "glscl": {"head.name": "glscl", "towers.mask_padded_words": True},
    "wti": {"head.name": "wti"},
    "xclip under the 3D patch": {"towers.linear_patch": "3d"},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return film(tiny_dataset(9), tmp_path_factory.mktemp("videos"))


def fresh(config):
    torch.manual_seed(0)
    return RetrievalModel(config.model)


@pytest.mark.parametrize("overrides", HEADS.values(), ids=HEADS)
def test_every_head_sees_what_the_towers_gave(dataset, tmp_path, overrides):
    sizes = {"towers.architecture.embed_dim": 64}  # what the added transformers need
    config = tiny_config({"head.name": "xclip", **sizes, **overrides})
    model = fresh(config).eval()
    embed(model, dataset, config, tmp_path, progress=False)
    stored = dataclasses.replace(config, data=dataclasses.replace(config.data, features=str(tmp_path)))
    one = next(iter(make_loader(ClipDataset(dataset, config), [5, 2, 7], 3)))
    other = next(iter(make_loader(StoredClips(model, dataset, stored), [5, 2, 7], 3)))
    assert other.video.ndim == 3
    assert other.video_ids == one.video_ids
    for name, value in model.loss(one).items():
        torch.testing.assert_close(model.loss(other)[name], value, atol=1e-5, rtol=1e-5)
    raw, from_store = evaluate(model, dataset, config), evaluate(model, dataset, stored)
    np.testing.assert_allclose(from_store.similarity, raw.similarity, atol=1e-5)


def test_a_stored_caption_is_encoded_once_however_small_the_blocks(dataset, tmp_path, monkeypatch):
    config = tiny_config({"evaluation.block_size": 2, "data.features": str(tmp_path), "head.name": "glscl"})
    model = fresh(config)
    embed(model, dataset, config, tmp_path, progress=False)
    encode, rows = model.encode_text, []
    monkeypatch.setattr(model, "encode_text", lambda *of: rows.append(len(of[0])) or encode(*of))
    evaluate(model, dataset, config, progress=False)
    assert sum(rows) == len(dataset)


def test_a_head_trains_on_them_as_on_pixels_with_the_towers_frozen(dataset, tmp_path):
    config = tiny_config({"train.epochs": 3, "evaluation.bootstrap": 0})
    model = fresh(config)
    embed(model, dataset, config, tmp_path / "features", progress=False)
    stored = dataclasses.replace(
        config, data=dataclasses.replace(config.data, features=str(tmp_path / "features"))
    )
    frozen = fresh(config)
    freeze_towers(frozen.named_parameters())
    on_pixels = fit(frozen, config, dataset, tmp_path / "pixels", val=dataset, progress=False)
    on_features = fit(model, stored, dataset, tmp_path / "run", val=dataset, progress=False)
    losses = [[row["loss"] for row in result.history] for result in (on_pixels, on_features)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert losses[0][-1] != losses[0][0]
    before, after = fresh(config).state_dict(), load_model(tmp_path / "run").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("head.") for name in moved)
    assert {name for name in moved if name.startswith("clip.")} <= {"clip.logit_scale"}


def test_half_precision_and_a_stop_in_the_middle(dataset, tmp_path, monkeypatch):
    config = tiny_config({"evaluation.batch_size": 2})
    model = fresh(config).eval()
    whole = embed(model, dataset, config, tmp_path / "whole", progress=False)
    real, calls = model.frame_features, []

    def stops(video, mask):
        calls.append(len(video))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(video, mask)

    monkeypatch.setattr(model, "frame_features", stops)
    with pytest.raises(KeyboardInterrupt):
        embed(model, dataset, config, tmp_path / "parted", progress=False)
    with pytest.raises(ConfigError, match="not finished"):
        StoredClips(model, dataset, _at(config, tmp_path / "parted"))
    parted = embed(model, dataset, config, tmp_path / "parted", progress=False)
    assert calls == [2, 2, 2, 2, 2, 1]  # what was done is not done again, but for the stopped batch
    for name in ("words", "frames", "text_mask", "video_mask"):
        np.testing.assert_array_equal(np.load(parted / f"{name}.npy"), np.load(whole / f"{name}.npy"))
    half = embed(model, dataset, config, tmp_path / "half", "fp16", progress=False)
    assert np.load(half / "frames.npy").dtype == np.float16
    np.testing.assert_allclose(np.load(half / "frames.npy"), np.load(whole / "frames.npy"), atol=2e-3)


def test_what_does_not_fit_is_refused(dataset, tmp_path):
    config = tiny_config()
    model = fresh(config).eval()
    with pytest.raises(ConfigError, match="xclip-lab embed"):
        StoredClips(model, dataset, _at(config, tmp_path / "nothing"))
    embed(model, dataset, config, tmp_path, progress=False)
    torch.manual_seed(1)
    with pytest.raises(ConfigError, match="other towers"):
        StoredClips(RetrievalModel(config.model), dataset, _at(config, tmp_path))
    other = dataclasses.replace(config.data, sampler="official")
    with pytest.raises(ConfigError, match="sampler uniform, not official"):
        StoredClips(model, dataset, _at(dataclasses.replace(config, data=other), tmp_path))
    fewer = dataclasses.replace(dataset, samples=dataset.samples[:4])
    with pytest.raises(ConfigError, match="other captions"):
        StoredClips(model, fewer, _at(config, tmp_path))
    with pytest.raises(ConfigError, match="other captions"):
        fit(model, _at(config, tmp_path), fewer, tmp_path / "run", progress=False)
    with pytest.raises(ConfigError, match="other towers"):
        embed(RetrievalModel(config.model), dataclasses.replace(dataset, split="val"), config, tmp_path)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "val").exists()
    seeing = _at(tiny_config({"towers.mask_padded_words": True}), tmp_path)
    with pytest.raises(ConfigError, match=r"towers\.mask_padded_words False, not True"):
        StoredClips(fresh(seeing), dataset, seeing)
    frames = tmp_path / "train" / "frames.npy"
    content = frames.read_bytes()
    for damage in (content[:500], content + b"more", b""):
        frames.write_bytes(damage)
        with pytest.raises(ConfigError, match=r"frames\.npy is"):
            StoredClips(model, dataset, _at(config, tmp_path))
        with pytest.raises(ConfigError, match=r"frames\.npy is"):
            embed(model, dataset, config, tmp_path, progress=False)
        assert frames.read_bytes() == damage
    frames.write_bytes(content)
    note = tmp_path / "train" / "split.json"
    note.write_text(note.read_text()[:20])
    with pytest.raises(ConfigError, match="damaged"):
        StoredClips(model, dataset, _at(config, tmp_path))


def test_an_unreadable_video_is_named_or_counted(dataset, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    samples = [dataclasses.replace(dataset.samples[0], path=broken), *dataset.samples[1:]]
    dataset = dataclasses.replace(dataset, samples=samples)
    config = tiny_config()
    model = fresh(config).eval()
    with pytest.raises(DatasetError, match=r"broken\.mp4"):
        embed(model, dataset, config, tmp_path / "strict", progress=False)
    config = tiny_config({"evaluation.allow_missing": 1, "data.on_error": "skip"})
    place = embed(model, dataset, config, tmp_path / "lenient", progress=False)
    assert list(json.loads((place / "split.json").read_text())["broken"]) == ["v0"]
    stored = _at(config, tmp_path / "lenient")
    assert evaluate(model, dataset, stored).stamp["missing_videos"] == ["v0"]
    shutil.copy(dataset.samples[1].path, broken)  # mended
    embed(model, dataset, config, tmp_path / "lenient", progress=False)
    assert evaluate(model, dataset, stored).stamp["missing_videos"] == []
    frames = np.load(place / "frames.npy")
    np.testing.assert_array_equal(frames[0], frames[1])


def _at(config, folder):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, features=str(folder)))
