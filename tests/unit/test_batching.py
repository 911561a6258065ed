"""Batches of real files: order, padding, worker processes, broken files, frames in memory."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.videos import write_video
from xclip_lab import clips as clips_module
from xclip_lab.batching import Batch, epoch_order, make_loader
from xclip_lab.clips import ClipDataset, preload
from xclip_lab.config import load_config
from xclip_lab.datasets import load_dataset
from xclip_lab.errors import DatasetError, VideoError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six videos of 4 to 14 frames with two captions each."""
    root = tmp_path_factory.mktemp("videos")
    rows = ["video,caption"]
    for number in range(6):
        write_video(root / f"v{number}.mp4", 4 + 2 * number, rate=10)
        rows += [f"v{number}.mp4,caption {number} {word}" for word in ("one", "two")]
    (root / "clips.csv").write_text("\n".join(rows))
    return root


def clips_of(folder, unique_videos=False, **overrides):
    config = load_config("quickstart", {"data.dataset": "folder", "data.workers": 0, **overrides})
    return ClipDataset(load_dataset("folder", "train", folder), config, unique_videos=unique_videos)


def collected(loader):
    batches = list(loader)
    return {
        "index": torch.cat([batch.index for batch in batches]).tolist(),
        "video": torch.cat([batch.video for batch in batches]),
    }


def test_a_batch(folder):
    clips = clips_of(folder)
    batch = next(iter(make_loader(clips, [0, 11], 2)))
    assert batch.video.shape == (2, 8, 3, 64, 64)
    assert batch.video.dtype == torch.uint8
    assert batch.token_ids.shape == batch.text_mask.shape == (2, 24)
    assert batch.video_ids == ["v0.mp4", "v5.mp4"]
    assert batch.index.tolist() == [0, 11]
    assert batch.video_mask.tolist() == [[1] * 4 + [0] * 4, [1] * 8]  # 4 frames, and 8 of 14
    assert batch.video[0, :4].any()
    assert not batch.video[0, 4:].any()
    np.testing.assert_allclose(batch.timestamps[0, :4], np.arange(4) / 10, atol=1e-6)
    assert len(batch) == 2
    moved = batch.to("meta")
    assert moved.video.device.type == moved.index.device.type == "meta"
    assert moved.video_ids == batch.video_ids


def test_unique_videos_come_once_in_the_order_of_the_gallery(folder):
    clips = clips_of(folder, unique_videos=True)
    ids = [video_id for batch in make_loader(clips, None, 4) for video_id in batch.video_ids]
    assert ids == clips.dataset.videos
    assert len(clips) == 6


def test_worker_processes_change_nothing(folder):
    clips = clips_of(folder, **{"data.frame_order": 2})
    order = epoch_order(len(clips), 0, 3)
    alone = collected(make_loader(clips, order, 5, epoch=3, workers=0))
    spread = collected(make_loader(clips, order, 5, epoch=3, workers=2))
    assert alone["index"] == spread["index"] == order
    assert torch.equal(alone["video"], spread["video"])


def test_shuffled_frames_depend_on_epoch_and_place_only(folder):
    clips = clips_of(folder, **{"data.frame_order": 2})
    whole = collected(make_loader(clips, list(range(12)), 4, epoch=1))
    tail = collected(make_loader(clips, list(range(8, 12)), 4, epoch=1))
    assert torch.equal(whole["video"][8:], tail["video"])
    later = collected(make_loader(clips, list(range(12)), 4, epoch=2))
    assert not torch.equal(whole["video"], later["video"])
    plain = collected(make_loader(clips_of(folder), list(range(12)), 4))
    for shuffled, ordered in zip(whole["video"], plain["video"], strict=True):
        assert sorted(frame.sum().item() for frame in shuffled) == sorted(f.sum().item() for f in ordered)


@pytest.mark.parametrize("sampler", ["uniform", "official"])
def test_the_configured_sampler_is_used(folder, sampler):
    overrides = {"data.sampler": sampler, "data.feature_framerate": 5, "max_frames": 3}
    clip = clips_of(folder, **overrides)[10]
    wanted = {"uniform": [2, 7, 11], "official": [0, 6, 12]}[sampler]
    np.testing.assert_allclose(clip.timestamps, np.array(wanted) / 10, atol=1e-6)


@pytest.fixture
def with_broken(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "v3.mp4").write_bytes((tmp_path / "v3.mp4").read_bytes()[:700])
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_stops_with_one_clear_error(with_broken, workers):
    with pytest.raises(VideoError) as caught:
        list(make_loader(clips_of(with_broken), None, 4, workers=workers))
    assert type(caught.value) is VideoError
    assert str(with_broken / "v3.mp4") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_skipped_and_counted_when_told(with_broken, workers):
    loader = make_loader(clips_of(with_broken, **{"data.on_error": "skip"}), None, 2, workers=workers)
    assert [i for batch in loader for i in batch.index.tolist()] == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]
    assert list(loader.broken) == ["v3.mp4"]
    assert "v3.mp4" in loader.broken["v3.mp4"]


def test_a_stretch_without_a_frame_names_the_video(folder, tmp_path):
    table = tmp_path / "late.csv"
    table.write_text(f"video,caption,start,end\n{folder / 'v0.mp4'},late,50,60\n")
    for sampler in ("uniform", "official"):
        with pytest.raises(VideoError, match=r"v0\.mp4.*between 50 and 60 s.*lasts 0\.40 s"):
            list(make_loader(clips_of(table, **{"data.sampler": sampler}), None, 1))


def test_a_frame_rate_that_the_official_sampler_cannot_serve_names_the_remedy(folder):
    overrides = {"data.sampler": "official", "data.feature_framerate": 11}
    with pytest.raises(VideoError, match=r"v0\.mp4.*exceeds the 10 frames.*uniform"):
        list(make_loader(clips_of(folder, **overrides), None, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_frames_in_memory_are_the_frames_of_the_files(folder, workers):
    overrides = {"data.frame_order": 2, "data.workers": workers}
    decoded, kept = clips_of(folder, **overrides), clips_of(folder, **overrides)
    kept.store = preload(kept, progress=False)
    assert list(kept.store.clips) == kept.dataset.videos
    for epoch in (0, 1):
        loaders = [make_loader(clips, None, 4, epoch=epoch) for clips in (decoded, kept)]
        for ours, theirs in zip(*loaders, strict=True):
            for field in dataclasses.fields(Batch):
                mine, other = getattr(ours, field.name), getattr(theirs, field.name)
                assert mine == other if isinstance(mine, list) else torch.equal(mine, other), field.name


def test_preloading_broken_files(with_broken):
    with pytest.raises(VideoError, match="v3"):
        preload(clips_of(with_broken), progress=False)
    clips = clips_of(with_broken, **{"data.on_error": "skip"})
    clips.store = preload(clips, progress=False)
    assert list(clips.store.broken) == ["v3.mp4"]
    loader = make_loader(clips, None, 4)
    assert sum(len(batch) for batch in loader) == 10
    assert list(loader.broken) == ["v3.mp4"]


def test_preloading_more_than_fits_is_refused(folder, monkeypatch):
    monkeypatch.setattr(clips_module, "available_memory", lambda: 10**5)
    with pytest.raises(DatasetError, match=r"preload.*GiB.*preload=false"):
        preload(clips_of(folder), progress=False)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_memory", [False, True])
def test_every_other_clip_keeps_its_batch_where_one_is_broken(with_broken, workers, in_memory):
    clips = clips_of(with_broken, **{"data.on_error": "skip"})  # v3 is the samples 6 and 7
    if in_memory:
        clips.store = preload(clips, progress=False)

    def places(order, size):
        batches = list(make_loader(clips, order, size, workers=workers).in_place())
        return [None if batch is None else batch.index.tolist() for batch in batches]

    assert places(None, 2) == [[0, 1], [2, 3], [4, 5], None, [8, 9], [10, 11]]
    assert places([0, 6, 1, 7, 2], 2) == [[0], [1], [2]]
    assert places([7, 6, 0], 2) == [None, [0]]
    assert len(make_loader(clips, [7, 6, 0], 2)) == 2


def test_damage_found_once_is_not_overlooked_in_a_later_epoch(folder, tmp_path, monkeypatch):
    """Only a video that has passed is spared the second look."""
    looks = []
    real = clips_module.video.read_frames_and_decoder

    def watched(path, *args, verify, **kwargs):
        looks.append((path.name, verify))
        if path.name == "v3.mp4" and verify:
            raise VideoError("damaged")
        return real(path, *args, verify=verify, **kwargs)

    monkeypatch.setattr(clips_module.video, "read_frames_and_decoder", watched)
    clips = clips_of(folder, unique_videos=True, **{"data.on_error": "skip"})
    for epoch in (0, 1):
        looks.clear()
        loader = make_loader(clips, None, 2, epoch=epoch)
        assert sum(len(batch) for batch in loader) == 5
        assert list(loader.broken) == ["v3.mp4"]
        assert [verify for _, verify in looks] == [epoch == 0 or name == "v3.mp4" for name, _ in looks]


@pytest.mark.parametrize("workers", [0, 2])
def test_decoders_are_counted(with_broken, workers):
    write_video(with_broken / "v5.mp4", 8, rate=10, codec="gif", format="gif")
    clips = clips_of(with_broken, **{"data.on_error": "skip", "data.workers": workers})
    loader = make_loader(clips, None, 4)
    assert loader.decoders == {}
    list(loader)
    usual = {"indexed": 4, "pyav": 1}
    assert loader.decoders == usual  # five of six videos, though each has two captions
    clips.store = preload(clips, progress=False)
    assert clips.store.decoders == make_loader(clips, None, 4).decoders == usual


def test_epoch_order():
    order = epoch_order(100, seed=1, epoch=2)
    assert sorted(order) == list(range(100))
    assert order == epoch_order(100, seed=1, epoch=2)
    assert len({tuple(epoch_order(100, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_epoch_order_keeps_groups_together():
    groups = np.arange(60) % 20
    order = epoch_order(60, seed=0, epoch=0, groups=groups)
    assert sorted(order) == list(range(60))
    for start in range(0, 60, 3):
        assert len(set(groups[order[start : start + 3]])) == 1
    assert order != sorted(order, key=lambda i: groups[i])
