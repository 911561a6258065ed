"""Generated clips on disk: the files, the reader, interruption, refusals."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from xclip_lab.config import GenerateConfig
from xclip_lab.datasets import load_dataset
from xclip_lab.datasets.synthetic import video_path
from xclip_lab.errors import ConfigError, DatasetError
from xclip_lab.synthetic import generate, load_truth
from xclip_lab.synthetic.plan import plan
from xclip_lab.synthetic.render import encode, render

SMALL = GenerateConfig(train_clips=30, val_clips=0, test_clips=12, level_shares=(1, 1, 1, 1))
LARGER = GenerateConfig(train_clips=600, test_clips=2)
SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from xclip_lab.config import GenerateConfig
from xclip_lab.synthetic import generate
generate(GenerateConfig(train_clips=600, test_clips=2), sys.argv[1], workers=2, progress=False)
"""


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("generated") / "small"
    generate(SMALL, root, progress=False)
    return root


def test_the_same_configuration_gives_the_same_bytes(small, tmp_path):
    generate(dataclasses.replace(SMALL), tmp_path / "again", workers=1, progress=False)
    assert contents(tmp_path / "again") == contents(small)
    generate(dataclasses.replace(SMALL, seed=5), tmp_path / "other", progress=False)
    other = contents(tmp_path / "other")
    assert all(other[name] != content for name, content in contents(small).items())


def test_files_are_h264_and_hold_the_drawn_frames(small):
    for clip in plan(SMALL, "test"):
        path = video_path(small, clip.video_id)
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            assert container.streams.video[0].average_rate == SMALL.fps
        decoded, drawn = decode(path), render(clip, SMALL.size, SMALL.hold)
        assert decoded.shape == drawn.shape == (clip.frames, 64, 64, 3)
        assert np.abs(decoded.astype(int) - drawn).mean() < 4


def test_reader_and_truth_agree(small):
    dataset = load_dataset("synthetic", "test", small)
    truth = load_truth(small, "test")
    assert len(dataset) == SMALL.test_clips
    assert dataset.videos == list(truth)
    for sample, group in zip(dataset.samples, dataset.groups, strict=True):
        assert sample.path.is_file()
        assert truth[sample.video_id].group == group
        assert truth[sample.video_id].words == sample.caption.split()
    members = np.bincount(dataset.groups)
    levels = {truth[name].group: truth[name].level for name in dataset.videos}
    assert all(members[group] == (2 if level in (2, 3) else 1) for group, level in levels.items())


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_resume_after_a_kill(tmp_path, stop):
    root = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(root)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(root.glob("videos/train-*.mp4"))) < 40:
        assert process.poll() is None, "ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(stop)
    assert process.wait(30) != 0
    kept = {path: path.stat().st_mtime_ns for path in root.glob("videos/*.mp4") if path.name[0] != "."}
    assert 40 <= len(kept) < 600
    assert all(len(decode(path)) == 16 for path in list(kept)[-5:])
    with pytest.raises(DatasetError, match=r"generating was interrupted.*xclip-lab data generate --root"):
        load_dataset("synthetic", "train", root)

    generate(LARGER, root, progress=False)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(load_dataset("synthetic", "train", root)) == 600
    assert not list(root.rglob(".tmp-*"))
    for clip in [*plan(LARGER, "train")][:60]:
        content = encode(render(clip, LARGER.size, LARGER.hold), LARGER.fps)
        assert video_path(root, clip.video_id).read_bytes() == content


def test_a_complete_folder_is_left_alone_and_a_lost_clip_made_again(small):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*") if path.is_file()}
    generate(SMALL, small, progress=False)
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*") if path.is_file()} == before
    lost, emptied = video_path(small, "train-000003"), video_path(small, "train-000004")
    contents_before = contents(small)
    lost.unlink()
    emptied.write_bytes(b"")
    generate(SMALL, small, progress=False)
    assert contents(small) == contents_before


def test_another_configuration_is_refused(small):
    with pytest.raises(DatasetError, match=rf"{small}.*fps=8\.0.*fps=4\.0"):
        generate(dataclasses.replace(SMALL, fps=4.0), small, progress=False)


def test_impossible_sizes_leave_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="different clips do not exist"):
        generate(dataclasses.replace(SMALL, test_clips=5_000, level_shares=(0, 0, 0, 1)), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "holiday.mp4").write_bytes(b"mine")
    with pytest.raises(DatasetError, match="holiday"):
        generate(SMALL, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.mp4"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_full_disk(tmp_path):
    root = tmp_path / "full"
    config = dataclasses.replace(SMALL, train_clips=6, test_clips=4)
    generate(config, root, progress=False)
    video_path(root, "train-000002").unlink()
    (root / "videos" / ".tmp-train-000002.mp4").symlink_to("/dev/full")
    with pytest.raises(DatasetError, match="No space left on device; make room"):
        generate(config, root, progress=False)
    assert not video_path(root, "train-000002").exists()
    generate(config, root, progress=False)
    assert len(decode(video_path(root, "train-000002"))) >= 16


def test_not_generated_yet(tmp_path):
    with pytest.raises(
        DatasetError, match=r"no split 'vla'; did you mean 'val'\? \(there are train, val, test"
    ):
        load_dataset("synthetic", "vla", tmp_path)
    with pytest.raises(DatasetError, match="xclip-lab data generate --root"):
        load_dataset("synthetic", "train", tmp_path)


def test_damaged_annotations(small, tmp_path):
    (tmp_path / "train.jsonl").write_text((small / "train.jsonl").read_text()[:-40])
    with pytest.raises(DatasetError, match=r"train\.jsonl is damaged"):
        load_dataset("synthetic", "train", tmp_path)
