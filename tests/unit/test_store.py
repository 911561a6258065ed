"""The decode-once store: the same frames, once, whoever asks, and nothing lost."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.training import train_tiny
from tests.videos import write_video
from xclip_lab import Sample, load_config, load_dataset, store
from xclip_lab.batching import make_loader
from xclip_lab.clips import Clip, ClipDataset, load_frames, preload
from xclip_lab.config import save_config
from xclip_lab.errors import DatasetError, UserError
from xclip_lab.prepare import prepare
from xclip_lab.store import ClipStore


@pytest.fixture
def folder(tmp_path):
    """Three videos, one with two captions, one with two stretches."""
    root = tmp_path / "videos"
    root.mkdir()
    for name in ("a", "b", "c"):
        write_video(root / f"{name}.mp4", 50)
    rows = ["a.mp4,first,,", "a.mp4,second,,", "b.mp4,third,,", "c.mp4,fourth,0,1", "c.mp4,fifth,1,2"]
    (root / "clips.csv").write_text("video,caption,start,end\n" + "\n".join(rows) + "\n")
    return root


def config_of(folder, **overrides):
    settings = {"data.root": str(folder), "data.store": str(folder.parent / "store"), "data.workers": 0}
    small = {"max_frames": 4, "towers.pretrained": None, "data.sampler": "uniform"}
    return load_config("xclip-folder-b32", settings | small | overrides)


def clips_of(config):
    dataset = load_dataset("folder", "train", config.data.root)
    return ClipDataset(dataset, config, unique_videos=True)


def no_decoding():
    return mock.patch("xclip_lab.clips.load_frames", side_effect=AssertionError("decoded once more"))


def test_what_comes_back_is_what_was_decoded(folder):
    config = config_of(folder)
    first = [clips_of(config)[index] for index in range(4)]
    with no_decoding():
        again = [clips_of(config)[index] for index in range(4)]
    for one, other, sample in zip(first, again, clips_of(config).samples, strict=True):
        assert isinstance(other, Clip)
        pixels, timestamps, decoder = load_frames(sample, config, 224)
        for clip in (one, other):
            torch.testing.assert_close(clip.pixels, pixels, atol=0, rtol=0)
            torch.testing.assert_close(clip.timestamps, timestamps, atol=0, rtol=0)
            assert clip.decoder == decoder
    assert [round(25 * seconds.item()) for seconds in again[3].timestamps] == [28, 34, 40, 46]


def test_jpeg_is_smaller_and_nearly_the_same(folder):
    exact, config = clips_of(config_of(folder)), config_of(folder, **{"data.store_format": "jpeg"})
    clips_of(config)[0]
    with no_decoding():
        kept = clips_of(config)[0]
    difference = (kept.pixels.float() - exact[0].pixels.float()).abs()
    assert 0 < difference.mean() < 3
    sizes = [c.kept.path(c.samples[0]).stat().st_size for c in (clips_of(config), exact)]
    assert sizes[0] < sizes[1] / 8


def test_frames_are_found_by_content_and_by_how_they_were_chosen(folder, monkeypatch):
    config = config_of(folder)
    clips = clips_of(config)
    kept, sample = clips.kept, clips.samples[0]
    place = kept.path(sample)
    moved = dataclasses.replace(sample, path=shutil.copy(sample.path, folder / "moved.mp4"))
    assert kept.path(moved) == place
    for key, value in [("max_frames", 3), ("data.sampler", "glscl"), ("data.feature_framerate", 2)]:
        assert clips_of(config_of(folder, **{key: value})).kept.path(sample) != place
    assert ClipStore(config.data, 4, 112).path(sample) != place
    monkeypatch.setattr(store, "_versions", lambda: {"decord": "another"})
    assert clips_of(config).kept.path(sample) != place
    monkeypatch.undo()
    write_video(sample.path, 30)  # the same name, another content
    os.utime(sample.path, ns=(1, time.time_ns() + 10**9))
    assert kept.path(sample) != place


def test_a_frame_that_is_rewritten_in_its_folder(folder):
    frames = folder / "frames" / "d"
    frames.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (40, 40), (60 * number, 0, 0)).save(frames / f"{number}.png")
    kept = clips_of(config_of(folder)).kept
    sample = Sample("d", "x", path=frames)
    place = kept.path(sample)
    assert kept.path(sample) == place
    Image.new("RGB", (40, 40), (0, 99, 0)).save(frames / "1.png")
    rewritten = kept.path(sample)
    assert rewritten != place
    (frames.parent / "prepared.json").write_text('{"fps": 1}')
    assert kept.path(sample) not in (place, rewritten)


def test_a_store_that_can_only_be_read(folder, tmp_path):
    config = config_of(folder)
    clips = clips_of(config)
    expected = clips[0].pixels
    moved = shutil.copytree(folder, tmp_path / "moved")
    elsewhere = ClipDataset(load_dataset("folder", "train", moved), config, unique_videos=True)
    with mock.patch("xclip_lab.store.write_bytes", side_effect=PermissionError(13, "Permission denied")):
        assert torch.equal(elsewhere[0].pixels, expected)


def test_jittered_training_frames_are_not_kept(folder):
    write_video(folder / "long.mp4", 1000)
    (folder / "clips.csv").write_text("video,caption\nlong.mp4,x\n")
    config = config_of(folder, **{"data.sampler": "clip2video", "data.frame_jitter": True, "max_frames": 6})
    dataset = load_dataset("folder", "train", folder)
    training = ClipDataset(dataset, config, training=True)
    drawn = []
    for training.epoch in range(3):
        drawn.append(training[0].timestamps.tolist())
    assert drawn[0] != drawn[1] != drawn[2]
    still = ClipDataset(dataset, config)
    assert still[0].timestamps.tolist() not in drawn
    with no_decoding():
        assert isinstance(ClipDataset(dataset, config)[0], Clip)


def test_a_damaged_entry_is_decoded_again(folder):
    config = config_of(folder)
    clips = clips_of(config)
    expected = clips[0].pixels
    place = clips.kept.path(clips.samples[0])
    for damage in (b"", place.read_bytes()[:500], b"\0" * 900):
        place.write_bytes(damage)
        torch.testing.assert_close(clips_of(config)[0].pixels, expected, atol=0, rtol=0)
        assert place.stat().st_size > 900


def test_a_disk_that_is_full(folder):
    config = config_of(folder)
    full = OSError(errno.ENOSPC, "No space left on device", "somewhere")
    with mock.patch("xclip_lab.store.write_bytes", side_effect=full):
        assert isinstance(clips_of(config)[0], UserError)
        with pytest.raises(DatasetError, match="No space left on device; make room"):
            next(iter(make_loader(clips_of(config), None, 2)))
        with pytest.raises(DatasetError, match=r"make room .*\(data\.store\)"):
            prepare([clips_of(config).dataset], config, workers=0, progress=False)


def test_prepare_decodes_each_clip_once_and_reports(folder):
    (folder / "b.mp4").write_bytes(b"no video")
    config = config_of(folder)
    dataset = load_dataset("folder", "train", folder)
    report = prepare([dataset, dataset], config, workers=2, progress=False)
    assert (report.decoded, report.found, list(report.failed)) == (3, 0, ["b.mp4"])
    assert str(folder / "b.mp4") in report.failed["b.mp4"]
    assert report.bytes > 3 * 4 * 3 * 224 * 224
    assert "KiB a clip" in str(report)
    lost = dataclasses.replace(
        dataset, samples=[*dataset.samples, *(Sample(name, "no file") for name in "xyz")]
    )
    assert set(prepare([lost], config, workers=0, progress=False).failed) == {"b.mp4", "x", "y", "z"}
    failures = json.loads((folder.parent / "store" / "failures.json").read_text())
    assert set(failures) == {"b.mp4", "x", "y", "z"}
    again = prepare([dataset], config, workers=0, progress=False)
    assert (again.decoded, again.found, again.bytes) == (0, 3, report.bytes)
    with no_decoding():
        assert isinstance(clips_of(config)[2], Clip)


def test_a_kill_loses_nothing(folder):
    """Killed at any moment, all that was finished is kept and nothing broken is left."""
    for number in range(30):
        write_video(folder / f"v{number:02}.mp4", 60 + number)
    rows = [f"v{number:02}.mp4,caption {number}" for number in range(30)]
    (folder / "clips.csv").write_text("video,caption\n" + "\n".join(rows) + "\n")
    config = config_of(folder, **{"data.workers": 2})
    save_config(config, folder / "config.yaml")
    command = [sys.executable, "-m", "xclip_lab", "data", "prepare", "--preset", str(folder / "config.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    place = Path(config.data.store) / "clips"
    deadline = time.monotonic() + 120
    while len(list(place.glob("*/[!.]*"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)  # the workers notice
    kept = len(list(place.glob("*/[!.]*")))
    assert 4 <= kept < 30
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{30 - kept} clips decoded" in done.stdout
    assert f"{kept} were there already" in done.stdout
    clips = clips_of(config)
    for index in (0, 29):
        expected = load_frames(clips.samples[index], config, 224).pixels
        torch.testing.assert_close(clips[index].pixels, expected, atol=0, rtol=0)


def test_training_from_the_store_is_training_from_the_files(tmp_path):
    losses = []
    for overrides in ({}, {"data.store": str(tmp_path / "store")}, {"data.store": str(tmp_path / "store")}):
        result = train_tiny(tmp_path / f"run{len(losses)}", overrides)
        losses.append([row["loss"] for row in result.history])
    assert losses[0] == losses[1] == losses[2]


def test_frames_in_memory_come_from_the_store(folder):
    config = config_of(folder)
    clips = clips_of(config)
    expected = [clips[index].pixels for index in range(4)]
    with no_decoding():
        kept = preload(clips_of(config), progress=False)
    for pixels, (found, _) in zip(expected, kept.clips.values(), strict=True):
        np.testing.assert_array_equal(pixels, found)
