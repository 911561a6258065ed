"""Evaluation on real video files with a tiny model."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xclip_lab import atomic
from xclip_lab.checkpoint import load_model, save_model
from xclip_lab.clips import ClipDataset, preload
from xclip_lab.config import RunConfig, load_config, save_config
from xclip_lab.datasets.base import Sample, VideoTextDataset
from xclip_lab.encoding import Texts, encode_texts
from xclip_lab.errors import CheckpointError, ConfigError, DatasetError, UserError
from xclip_lab.evaluation import evaluate, score, video_clusters
from xclip_lab.live_bytes import LiveBytes
from xclip_lab.metrics import METRICS, BlockedRanks, MetricError, metrics_of, ranks, retrieval_metrics
from xclip_lab.model import Origin, RetrievalModel, create_model, evaluating
from xclip_lab.parallel import in_threads
from xclip_lab.result import Result, ResultError
from xclip_lab.scoring import scored
from xclip_lab.stats import recall_intervals
from xclip_lab.tokens import TokenSet

TINY = {
    "max_words": 8,
    "max_frames": 4,
    "towers.architecture": {
        "embed_dim": 16,
        "image_size": 32,
        "patch_size": 16,
        "vision_width": 16,
        "vision_layers": 1,
        "vision_heads": 1,
        "text_width": 16,
        "text_layers": 1,
        "text_heads": 1,
    },
    "temporal.layers": 1,
    "data.workers": 0,
    "data.preload": False,
    "evaluation.batch_size": 2,
    "evaluation.block_size": 3,
    "evaluation.bootstrap": 50,
}
CAPTIONS = [
    "a red circle",
    "a red disc",
    "a blue square moves up",
    "a dog",
    "a green triangle",
    "stars",
    "rain",
]
VIDEO_OF = ["v0", "v0", "v1", "v2", "v2", "v3", "v4"]


def write_clip(path: Path, seed: int) -> None:
    """Twelve frames of slowly changing coloured tiles."""
    generator = np.random.default_rng(seed)
    first, last = generator.integers(256, size=(2, 4, 4, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        for step in np.linspace(0, 1, 12):
            tiles = ((1 - step) * first + step * last).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(tiles.repeat(8, axis=0).repeat(8, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> VideoTextDataset:
    root = tmp_path_factory.mktemp("clips")
    for number in range(5):
        write_clip(root / f"v{number}.mp4", number)
    samples = [
        Sample(video, caption, path=root / f"{video}.mp4")
        for video, caption in zip(VIDEO_OF, CAPTIONS, strict=True)
    ]
    return VideoTextDataset("tiles", "test", root, samples)


def configured(**overrides) -> RunConfig:
    return load_config(
        "quickstart", TINY | {key.replace("__", "."): value for key, value in overrides.items()}
    )


@pytest.fixture(scope="module")
def model() -> RetrievalModel:
    torch.manual_seed(0)
    return create_model(configured()).eval()


@pytest.fixture(scope="module")
def result(model, dataset) -> Result:
    before, model.origin = model.origin, Origin("runs/x", "val")
    try:
        return evaluate(model, dataset, configured(), progress=False)
    finally:
        model.origin = before


def without_files(dataset: VideoTextDataset, tmp_path: Path, gone: str, broken: str) -> VideoTextDataset:
    """The same annotations with one file absent and one that is no video."""
    (tmp_path / "broken.mp4").write_bytes(b"this is not a video" * 50)
    paths = {gone: tmp_path / "absent.mp4", broken: tmp_path / "broken.mp4"}
    samples = [
        dataclasses.replace(sample, path=paths.get(sample.video_id, sample.path))
        for sample in dataset.samples
    ]
    return dataclasses.replace(dataset, samples=samples)


def random_features(seed: int, rows: int, tokens: int) -> TokenSet:
    generator = torch.Generator().manual_seed(seed)
    return TokenSet(
        torch.randn(rows, 16, generator=generator),
        torch.randn(rows, tokens, 16, generator=generator),
        torch.ones(rows, tokens, dtype=torch.int64),
    )


def test_it_is_what_the_model_says_ranked(model, dataset, result):
    clips = preload(ClipDataset(dataset, configured(), unique_videos=True), progress=False).clips
    pixels = torch.stack([clips[name][0] for name in dataset.videos])
    with torch.no_grad():
        video = model.encode_video(pixels, torch.ones(5, 4, dtype=torch.int64))
        by_hand = model.similarity(encode_texts(model, CAPTIONS, 7), video).numpy()
    np.testing.assert_allclose(result.similarity, by_hand, rtol=1e-4, atol=1e-4)
    assert result.similarity.dtype == np.float32
    assert result.text_to_video.tolist() == [0, 0, 1, 2, 2, 3, 4]
    assert result.metrics == retrieval_metrics(result.similarity, result.text_to_video)
    for side, expected in ranks(result.similarity, result.text_to_video).items():
        np.testing.assert_array_equal(result.ranks[side], expected)


def test_intervals_hold_every_metric_and_enclose_it_mostly(result):
    for side in ("t2v", "v2t"):
        assert list(result.intervals[side]) == list(METRICS)
        assert all(low <= high for low, high in result.intervals[side].values())
        low, high = result.intervals[side]["MnR"]
        assert low <= result.metrics[side]["MnR"] <= high


def test_frames_from_memory_give_the_same(model, dataset, result):
    config = configured()
    store = preload(ClipDataset(dataset, config, unique_videos=True), progress=False)
    again = evaluate(model, dataset, config, store=store, progress=False)
    np.testing.assert_array_equal(again.similarity, result.similarity)


def test_every_text_and_video_is_encoded_once(model, dataset, monkeypatch):
    rows = {"encode_text": 0, "encode_video": 0}

    def counting(name):
        encode = getattr(model, name)

        def counted(values, mask):
            rows[name] += len(values)
            return encode(values, mask)

        return counted

    for name in rows:
        monkeypatch.setattr(model, name, counting(name))
    evaluate(model, dataset, configured(evaluation__block_size=1), progress=False)
    assert rows == {"encode_text": 7, "encode_video": 5}


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 1000))
def test_blocks_do_not_change_the_scores(model, texts, videos, block_size, seed):
    text, video = random_features(seed, texts, 8), random_features(seed + 1, videos, 4)
    with torch.no_grad():
        whole = model.similarity(text, video)
    torch.testing.assert_close(score(model, text, video, block_size), whole, rtol=1e-4, atol=1e-4)


def test_the_head_never_sees_more_than_one_block(model):
    seen = []
    hook = model.head.register_forward_pre_hook(
        lambda head, inputs: seen.append([len(part) for part in inputs])
    )
    try:
        score(model, random_features(0, 11, 8), random_features(1, 7, 4), block_size=4)
    finally:
        hook.remove()
    assert len(seen) == 6
    assert max(max(sizes) for sizes in seen) == 4


def test_the_batch_size_does_not_change_the_result(model, dataset, result):
    other = evaluate(model, dataset, configured(evaluation__batch_size=5), progress=False)
    np.testing.assert_allclose(other.similarity, result.similarity, rtol=1e-4, atol=1e-4)


def test_modes_are_restored_and_no_gradient_is_kept(model, dataset, result):
    model.train()
    model.clip.eval()
    before = {name: module.training for name, module in model.named_modules()}
    try:
        again = evaluate(model, dataset, configured(), progress=False)
        after = {name: module.training for name, module in model.named_modules()}
    finally:
        model.eval()
    assert after == before
    np.testing.assert_array_equal(again.similarity, result.similarity)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_restored_after_an_error(model, dataset, tmp_path):
    model.train()
    try:
        with pytest.raises(DatasetError):
            evaluate(model, without_files(dataset, tmp_path, "v1", "v3"), configured(), progress=False)
        assert model.training
    finally:
        model.eval()


def test_shuffled_frames_are_repeatable_and_stamped(model, dataset, result):
    first, second, other = (
        evaluate(model, dataset, configured(data__frame_order=2, seed=seed), progress=False)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.similarity, second.similarity)
    assert not np.allclose(first.similarity, result.similarity, atol=1e-6)
    assert not np.allclose(first.similarity, other.similarity, atol=1e-6)
    assert (first.stamp["frame_order"], result.stamp["frame_order"]) == (2, 0)


def test_missing_videos_are_refused_with_count_names_and_reason(model, dataset, tmp_path):
    damaged = without_files(dataset, tmp_path, "v1", "v3")
    with pytest.raises(DatasetError, match=r"1 video: v1;.*allow_missing is 0.*absent\.mp4: no such file"):
        evaluate(model, damaged, configured(), progress=False)
    with pytest.raises(DatasetError, match=r"2 videos: v1, v3;.*allow_missing is 1"):
        evaluate(model, damaged, configured(evaluation__allow_missing=1), progress=False)


def test_allowed_missing_videos_leave_with_their_captions_and_are_stamped(model, dataset, tmp_path, result):
    damaged = without_files(dataset, tmp_path, "v0", "v3")
    found = evaluate(model, damaged, configured(evaluation__allow_missing=2), progress=False)
    assert found.stamp["missing_videos"] == ["v0", "v3"]
    assert found.videos == ["v1", "v2", "v4"]
    assert found.rows.tolist() == [2, 3, 4, 6]
    assert found.captions == [CAPTIONS[row] for row in found.rows]
    assert found.text_to_video.tolist() == [0, 1, 1, 2]
    expected = result.similarity[[2, 3, 4, 6]][:, [1, 2, 4]]
    np.testing.assert_allclose(found.similarity, expected, rtol=1e-4, atol=1e-4)
    assert "left out: 2 videos: v0, v3" in str(found)


def test_nothing_left_is_refused_whatever_is_allowed(model, tmp_path):
    gone = VideoTextDataset(
        "gone", "test", tmp_path, [Sample("a", "x"), Sample("b", "y", path=tmp_path / "b.mp4")]
    )
    with pytest.raises(DatasetError, match=r"2 videos: a, b \(all there are\)"):
        evaluate(model, gone, configured(evaluation__allow_missing=9), progress=False)
    with pytest.raises(DatasetError, match="no captions"):
        evaluate(model, VideoTextDataset("none", "test", tmp_path, []), configured(), progress=False)


def test_weights_that_are_not_finite_are_an_error_that_names_the_row(model, dataset):
    kept = model.logit_scale.data.clone()
    model.logit_scale.data.fill_(torch.nan)
    try:
        with pytest.raises(MetricError, match="row 0, column 0"):
            evaluate(model, dataset, configured(), progress=False)
    finally:
        model.logit_scale.data.copy_(kept)


def test_no_config_means_the_defaults_and_the_lengths_are_the_models(model, dataset):
    found = evaluate(model, dataset, progress=False)
    assert (found.stamp["max_words"], found.stamp["max_frames"]) == (8, 4)
    assert (found.stamp["sampler"], found.stamp["ties"]) == ("official", "pessimistic")


def test_the_stamp_says_how_it_came_about(result):
    stamp = result.stamp
    assert stamp["checkpoint"] == "runs/x"
    assert (stamp["dataset"], stamp["split"], stamp["protocol"]) == ("tiles", "test", None)
    assert (stamp["selection_split"], stamp["post_processing"], stamp["ties"]) == (
        "val",
        "none",
        "pessimistic",
    )
    assert (stamp["sampler"], stamp["max_frames"], stamp["max_words"]) == ("uniform", 4, 8)
    assert (stamp["dtype"], stamp["device"], stamp["missing_videos"]) == ("float32", "cpu", [])
    assert torch.__version__.startswith(stamp["versions"]["torch"])
    assert stamp["decoders"] == {"indexed": 5}
    assert stamp["intervals"] == {"draws": 50, "clusters": "video"}


@pytest.mark.parametrize("similarity", ["memory", "none"])
@pytest.mark.parametrize("ties", ["pessimistic", "official"])
def test_a_subset_is_ranked_in_the_full_gallery(model, dataset, result, ties, similarity):
    settings = configured(evaluation__ties=ties, evaluation__similarity=similarity)
    found = evaluate(model, dataset, settings, progress=False)
    chosen = np.array([True, False, True, True, False, False, True])
    expected = metrics_of(
        ranks(result.similarity, found.text_to_video, ties)["t2v"][chosen], ties == "official"
    )
    assert found.subset(chosen)[0] == expected
    assert found.subset(np.ones(7, dtype=bool)) == (found.metrics["t2v"], found.intervals["t2v"])
    with pytest.raises(MetricError, match="each of 7 captions"):
        found.subset([True, False])
    with pytest.raises(MetricError, match="no ranks"):
        found.subset(np.zeros(7, dtype=bool))


def test_no_intervals_where_none_are_asked_for_or_possible(model, dataset):
    without = evaluate(model, dataset, configured(evaluation__bootstrap=0), progress=False)
    assert without.intervals == {}
    assert without.stamp["intervals"] is None
    assert without.subset(np.ones(7, dtype=bool))[1] == {}
    for captions in (1, 2):
        single = dataclasses.replace(dataset, samples=dataset.samples[:captions])
        alone = evaluate(model, single, configured(), progress=False)
        assert alone.intervals == {}
        assert alone.stamp["intervals"] is None
        assert alone.metrics["t2v"]["R@1"] == 100.0
        assert "R@1" in str(alone)


def test_the_two_videos_of_a_pair_are_drawn_together(model, dataset, result):
    paired = dataclasses.replace(dataset, groups=np.array([7, 7, 7, 3, 3, 3, 5]))
    assert video_clusters(dataset).tolist() == [0, 1, 2, 3, 4]
    assert video_clusters(paired).tolist() == [7, 7, 3, 3, 5]
    found = evaluate(model, paired, configured(), progress=False)
    assert found.stamp["intervals"] == {"draws": 50, "clusters": "pair"}
    clusters = np.array([7, 7, 7, 3, 3, 3, 5])
    assert found.intervals["t2v"] == recall_intervals(found.ranks["t2v"], clusters, 50, found.stamp["seed"])
    expected = recall_intervals(found.ranks["v2t"], [7, 7, 3, 3, 5], 50, found.stamp["seed"])
    assert found.intervals["v2t"] == expected
    assert found.metrics == result.metrics
    last = np.arange(7) > 2
    ranks_of_last = found.ranks["t2v"][last]
    assert found.subset(last)[1] == recall_intervals(ranks_of_last, clusters[last], 50, found.stamp["seed"])
    assert found.subset(np.arange(7) < 3)[1] == {}


@pytest.mark.parametrize("ties", ["pessimistic", "mean", "official"])
def test_what_is_saved_is_loaded(model, dataset, tmp_path, ties):
    found = evaluate(model, dataset, configured(evaluation__ties=ties), progress=False)
    found.save(tmp_path / "deep" / "folder")
    again = Result.load(tmp_path / "deep" / "folder")
    for field in dataclasses.fields(Result):
        old, new = getattr(found, field.name), getattr(again, field.name)
        if field.name == "entries":
            np.testing.assert_equal(new, old)
        elif isinstance(old, np.ndarray):
            np.testing.assert_array_equal(old, new)
            assert old.dtype == new.dtype
        else:
            assert old == new
    assert str(again) == str(found)


def test_the_files_of_a_result(result, tmp_path):
    result.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gallery.json",
        "intervals.json",
        "metrics.json",
        "similarity.npy",
        "stamp.json",
    ]
    assert json.loads((tmp_path / "metrics.json").read_text()) == result.metrics
    assert np.load(tmp_path / "similarity.npy").dtype == np.float32


@pytest.mark.parametrize("module", [atomic, sys.modules["xclip_lab.result"]])
def test_a_full_disk_is_one_clear_error_and_leaves_what_was_there(result, tmp_path, monkeypatch, module):
    result.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "sync", full)
    with pytest.raises(ResultError, match="No space left on device"):
        result.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_one_clear_error(result, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResultError, match="file: File exists; choose another place for the result") as caught:
        result.save(tmp_path / "file")
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("name", ["metrics.json", "gallery.json", "similarity.npy"])
def test_a_missing_or_damaged_result_is_named(result, tmp_path, name):
    result.save(tmp_path)
    (tmp_path / name).write_bytes(b"{")
    with pytest.raises(ResultError, match="damaged"):
        Result.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ResultError, match=f"{name} is missing"):
        Result.load(tmp_path)


def test_it_prints_values_and_intervals(result):
    printed = str(result)
    assert "7 captions, 5 videos" in printed
    low, high = result.intervals["v2t"]["MnR"]
    assert f"{result.metrics['v2t']['MnR']:.2f}  [{low:.2f}, {high:.2f}]" in printed
    assert all(any(line.startswith(name) for line in printed.splitlines()) for name in METRICS)


def test_bars_are_shown_only_when_wanted(model, dataset, capfd):
    evaluate(model, dataset, configured(), progress=False)
    assert capfd.readouterr().err == ""
    evaluate(model, dataset, configured(), progress=True)
    assert "encode videos" in capfd.readouterr().err


def test_without_a_config_frames_are_taken_as_in_training(dataset, tmp_path):
    """A checkpoint in a run folder brings the run's sampler; the stamp names the file and who chose it."""
    torch.manual_seed(0)
    trained_with = configured(data__frame_order=1)
    checkpoint = tmp_path / "checkpoints" / "best"
    checkpoint.mkdir(parents=True)
    save_model(create_model(trained_with), checkpoint)
    save_config(trained_with, tmp_path / "config.yaml")
    (checkpoint / "stamp.json").write_text('{"selection_split": "val"}')
    result = evaluate(load_model(tmp_path), dataset, progress=False)
    assert (result.stamp["sampler"], result.stamp["frame_order"]) == ("uniform", 1)
    assert result.stamp["checkpoint"] == str(checkpoint / "model.safetensors")
    assert result.stamp["selection_split"] == "val"
    (checkpoint / "stamp.json").write_text("")
    with pytest.raises(CheckpointError, match=r"stamp.json is damaged"):
        load_model(tmp_path)


def test_scores_on_the_disk_are_those_in_memory(model, dataset, result):
    found = evaluate(model, dataset, configured(evaluation__similarity="disk"), progress=False)
    assert isinstance(found.similarity, np.memmap)
    assert np.array_equal(found.similarity, result.similarity)
    assert found.metrics == result.metrics


def test_a_disk_that_does_not_take_the_scores(model, dataset, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with pytest.raises(DatasetError, match=r"/nowhere/.* evaluation.similarity=none"):
        evaluate(model, dataset, configured(evaluation__similarity="disk"), progress=False)


def test_the_backend_is_chosen_and_stamped(model, dataset, result):
    assert result.stamp["backend"] == "blocked"
    found = evaluate(model, dataset, configured(), backend="formula", progress=False)
    assert found.stamp["backend"] == "formula"
    np.testing.assert_allclose(found.similarity, result.similarity, rtol=1e-4, atol=1e-4)
    assert model.head.config.backend == "auto"
    with pytest.raises(ConfigError, match="backend: 'fast' is not one of auto, formula, blocked, triton"):
        evaluate(model, dataset, configured(), backend="fast", progress=False)


def test_ranks_in_blocks_are_those_of_the_whole(model, monkeypatch):
    monkeypatch.setattr("xclip_lab.scoring._TEXTS", 4)
    text, video, index = random_features(0, 11, 8), random_features(1, 7, 4), np.arange(11) % 7
    found = BlockedRanks(index, 7, keep=2)
    for rows, scores in scored(model, text, video):
        found.add(scores, rows.start)
    whole = score(model, text, video)
    for side, expected in ranks(whole, index).items():
        assert np.array_equal(found.ranks()[side], expected)
    assert np.array_equal(found.top, whole.topk(2).indices)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("size", [3, 5])
def test_captions_meet_the_same_batches_whatever_rows_are_asked_for(model, size, stored, monkeypatch):
    """So several processes, and any block, give the very features of one process."""
    captions = [f"caption {row}" for row in range(11)]
    words = random_features(0, 11, 8).tokens
    clips = SimpleNamespace(texts=lambda rows: (words[rows], torch.ones(len(rows), 8, dtype=torch.int64)))
    batches, real = [], model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda ids, mask: batches.append(ids[0]) or real(ids, mask))
    rows = np.arange(11)
    text = Texts.stored(model, clips, rows, size) if stored else Texts.of(model, captions, size)
    whole, starts = text[0:11], [first.tolist() for first in batches]
    text[0:1]
    batches.clear()
    for rows in (slice(0, 4), slice(4, 7), slice(7, 11), slice(10, 11)):
        assert torch.equal(text[rows].tokens, whole.tokens[rows])
    assert [first.tolist() for first in batches] == starts[1:]  # each once, one after the other


def test_a_batch_that_does_not_fit_is_one_line(model, dataset, monkeypatch):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    for tower in ("encode_video", "encode_text"):
        with monkeypatch.context() as patch:
            patch.setattr(RetrievalModel, tower, full)
            with pytest.raises(ConfigError, match=r"batch_size: 4 at a .*; try 2"):
                evaluate(model, dataset, configured(evaluation__batch_size=4), progress=False)


def test_few_texts_meet_many_videos_at_a_time(monkeypatch):
    """As many pairs at once as of many texts, to a bound; measured is only what somebody asked for."""
    model = create_model(configured(head__name="glscl")).eval()
    shapes = []
    monkeypatch.setattr("xclip_lab.scoring._VIDEOS", 500)
    monkeypatch.setattr("xclip_lab.scoring.workers_on", lambda device: 1)
    monkeypatch.setattr("xclip_lab.scoring._check_block", lambda *_: pytest.fail("nothing was asked for"))
    monkeypatch.setattr(
        model, "similarity", lambda *of: shapes.append(tuple(map(len, of))) or torch.zeros(*map(len, of))
    )
    for texts, expected in ((1, [(1, 500), (1, 100)]), (16, [(16, 256), (16, 256), (16, 88)])):
        shapes.clear()
        score(model, random_features(0, texts, 8), random_features(1, 600, 4))
        assert shapes == expected
    shapes.clear()
    score(model, random_features(0, 2, 8), random_features(1, 40, 4), block_size=16)
    assert shapes == [(2, 16), (2, 16), (2, 8)]


def test_a_large_block_does_not_encode_all_texts_before_it_is_refused(model, monkeypatch):
    monkeypatch.setattr("xclip_lab.scoring._TEXTS", 4)
    text, video = random_features(0, 11, 8), random_features(1, 7, 4)
    found = score(model, text, video, block_size=100)
    torch.testing.assert_close(found, score(model, text, video), rtol=1e-4, atol=1e-4)
    assert score(model, text, video[:0]).shape == (11, 0)
    monkeypatch.setattr("xclip_lab.scoring.free_memory", lambda device: 1)
    monkeypatch.setattr(model.head, "block_on", lambda device: (1, 1))
    asked = []

    class Watched:
        def __len__(self):
            return len(text)

        def __getitem__(self, rows):
            asked.append(rows)
            return text[rows]

    with pytest.raises(ConfigError, match="block_size: 4 texts x "):
        score(model, Watched(), video, block_size=100)
    assert asked == [slice(0, 4)]


def test_a_block_that_does_not_fit_is_one_line(model, monkeypatch):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(model, "similarity", full)
    for size, remedy in ((8, "try 4"), (1, "free some")):
        with pytest.raises(ConfigError, match=rf"block_size: {size} texts x {size} videos .*; {remedy}"):
            score(model, random_features(0, 11, 8), random_features(1, 9, 4), block_size=size)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("head", ["xclip", "maxsim", "tightTransf"])
def test_a_block_that_fits_is_not_refused(head, workers, monkeypatch):
    """Whether its memory goes with the pairs, as a cross transformer's, or with the rows, as of tiles."""
    model = create_model(
        configured(head__name=head, temporal__agg_module="meanP" if head == "tightTransf" else "seqTransf")
    ).eval()
    monkeypatch.setattr("xclip_lab.scoring.workers_on", lambda device: workers)
    monkeypatch.setattr(model.head, "block_on", lambda device: (4, 4))
    text, video = random_features(0, 192, 8), random_features(1, 192, 4)

    def bytes_of(share):
        with LiveBytes() as live, evaluating(model):
            model.similarity(text, video[:share])
        return max(live.after)

    [needed] = in_threads(bytes_of, [192 // workers], workers)  # tiles in as many threads as a block has
    for factor, fits in ((2.1, True), (0.9, False)):
        free = factor * needed * workers
        monkeypatch.setattr("xclip_lab.scoring.free_memory", lambda device, free=free: free)
        with nullcontext() if fits else pytest.raises(ConfigError, match="do not fit into memory; try"):
            score(model, text, video, block_size=192)


def test_a_block_is_measured_before_it_is_scored(monkeypatch):
    """A number that is refused would not have fitted; the one that is named fits."""
    model = create_model(configured(head__name="tightTransf", temporal__agg_module="meanP")).eval()
    monkeypatch.setattr("xclip_lab.scoring.workers_on", lambda device: 1)
    text, video = random_features(0, 64, 8), random_features(1, 64, 4)
    monkeypatch.setattr("xclip_lab.scoring.free_memory", lambda device: 2**20)
    with pytest.raises(ConfigError) as refused:
        score(model, text, video, block_size=64)
    assert "64 texts x 64 videos at a time do not fit into memory; try " in str(refused.value)
    fits = int(str(refused.value).split()[-1])
    with LiveBytes() as live, evaluating(model):
        model.similarity(text[:fits], video[:fits])
    assert 2**19 < max(live.after) < 1.1 * 2**20


@pytest.mark.parametrize("ties", ["pessimistic", "mean", "official"])
def test_ranks_alone_are_those_of_the_scores(model, dataset, tmp_path, ties, monkeypatch):
    """`evaluation.similarity=none`: all but the scores, saved and loaded too; what needs them says so."""
    real = RetrievalModel.similarity  # rounded, so that there are ties
    monkeypatch.setattr(RetrievalModel, "similarity", lambda *given: real(*given).round())
    result, made = (
        evaluate(model, dataset, configured(evaluation__ties=ties, **how), progress=False)
        for how in ({}, {"evaluation__similarity": "none"})
    )
    result.save(tmp_path)  # is replaced
    for found in (made, Result.load(made.save(tmp_path))):
        assert (found.scores, found.metrics, found.intervals) == (None, result.metrics, result.intervals)
        np.testing.assert_equal(found.entries, result.entries)
        assert found.subset(np.arange(7) > 2) == result.subset(np.arange(7) > 2)
        assert np.array_equal(found.top, np.argsort(-result.similarity, axis=1, kind="stable"))
        with pytest.raises(ResultError, match=r"no scores, .* without evaluation.similarity=none"):
            found.similarity  # noqa: B018
    assert not (tmp_path / "similarity.npy").exists()
    assert Result.load(result.save(tmp_path)).top is None


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            {"similarity": "none", "rerank": "dual_softmax"},
            "none does not go with evaluation.rerank=dual_sof",
        ),
        (
            {"similarity": "disk", "rerank": "dual_softmax"},
            "disk does not go with evaluation.rerank=dual_sof",
        ),
        ({"rerank": "dual_softmax"}, "13 times over, do not fit into memory; leave evaluation.rerank out"),
        ({"similarity": "memory"}, "do not fit into memory; set it to auto, disk or none"),
    ],
)
def test_scores_that_memory_does_not_hold(model, dataset, monkeypatch, overrides, line):
    monkeypatch.setattr(
        "xclip_lab.memory.available_memory", lambda: 5 * 7 * 4 * (13 if overrides.get("rerank") else 1) - 1
    )
    with pytest.raises(ConfigError, match=line):
        evaluate(
            model,
            dataset,
            configured(**{f"evaluation__{k}": v for k, v in overrides.items()}),
            progress=False,
        )


def test_processes_of_one_machine_share_its_memory(model, dataset, monkeypatch):
    monkeypatch.setattr("xclip_lab.memory.available_memory", lambda: 4 * 5 * 7 * 4 * 2)
    for processes, kind in ((2, np.ndarray), (4, np.memmap)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        found = evaluate(model, dataset, configured(), progress=False)
        assert type(found.similarity) is kind


def test_a_bank_without_qb_norm_is_refused(model, dataset):
    with pytest.raises(ConfigError, match=r"evaluate\(bank=\) .* set evaluation.rerank=qb_norm"):
        evaluate(model, dataset, configured(), bank=dataset, progress=False)


def test_the_stamp_names_who_computed_it_in_the_end(model, dataset, monkeypatch):
    """Kernels that fail when they are first started have given way to tiles."""
    started = []

    def scored(*_):
        started.append(1)
        return torch.zeros(1, 1)

    monkeypatch.setattr(model, "similarity", scored)
    monkeypatch.setattr(model.head, "backend_on", lambda device: "blocked" if started else "triton")
    assert (
        evaluate(model, dataset, configured(evaluation__block_size=1), progress=False).stamp["backend"]
        == "blocked"
    )
