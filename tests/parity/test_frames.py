"""Which frames are read: the numbers of the official loaders, and their frames of real files."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.shared import golden_path, needs_golden
from xclip_lab import sampling, video
from xclip_lab.preprocess import normalise, preprocess

pytestmark = needs_golden("frames_clip4clip.json")


def golden(table, file="frames_clip4clip.json"):
    return json.loads(golden_path(file).read_text())[table]


def official(case):
    """What the sampler gives for a golden case, in the words of the golden file."""
    try:
        indices = sampling.official_indices(
            case["frame_count"], case["fps"], case["feature_framerate"], case.get("start"), case.get("end")
        )
    except ValueError:
        return "raises"
    if "max_frames" in case:
        places = sampling.slice_positions(len(indices), case["max_frames"], case["slice_framepos"])
        indices = [indices[place] for place in places]
        shuffler = np.random.RandomState(case.get("np_seed", 0))
        indices = sampling.order_frames(indices, case.get("frame_order", 0), shuffler)
    return indices


def expected(case):
    wanted = case["indices"]
    if case.get("loader") == "DiDeMo_DataLoader" and case["start"] < 0:
        assert wanted == []  # DiDeMo's loader swallows what the others raise
        return "raises"
    return "raises" if isinstance(wanted, str) else wanted


def assert_all_match(cases, ours):
    wrong = [case for case in cases if ours(case) != expected(case)]
    assert len(cases) > 10
    assert not wrong, f"{len(wrong)} of {len(cases)}: {wrong[:3]} gave {[ours(case) for case in wrong[:3]]}"


@pytest.mark.parametrize("table", ["decode", "decode_start_end", "loader", "loader_start_end"])
def test_official_sampler(table):
    assert_all_match(golden(table), official)


@needs_golden("frames_glscl.json")
def test_glscl_sampler():
    def ours(case):
        frame_rate = case["video_framerate"]
        try:
            indices = sampling.glscl_indices(
                case["frame_count"], case["fps"], frame_rate, case["start"], case["end"]
            )
        except ValueError:
            return "raises"
        places = sampling.slice_positions(len(indices), case["max_frames"], 2)
        return [indices[place] for place in places]

    assert_all_match(golden("decord_loader", "frames_glscl.json"), ours)


@needs_golden("frames_glscl.json")
def test_glscl_reads_didemo_and_activitynet_with_the_official_sampler():
    cases = golden("cv2_loader_start_end", "frames_glscl.json")
    assert {case["loader"] for case in cases} == {"DiDeMoDataset", "ActivityNetDataset"}
    assert_all_match(cases, lambda case: official(case | {"feature_framerate": case["framerate"]}))


@needs_golden("frames_clip2video.json")
def test_clip2video_sampler():
    """Its test-time frames of a folder with so many files."""

    def ours(case):
        count = case["n_files"]
        files = tuple(Path(f"{number}.jpg") for number in range(count))
        times = np.arange(count) / 5
        folder = video.VideoInfo(Path("a"), count, 5.0, count / 5, 8, 8, 0, "frames", times, files)
        return video.frame_indices(folder, "clip2video", case["max_frames"], case["feature_framerate"])

    assert_all_match(golden("eval", "frames_clip2video.json"), ours)


@needs_golden("frames_clip2video.json")
def test_clip2video_jitters_its_training_frames():
    """Its training frames, number for number from the same random state."""

    def positions(case):
        files = sampling.strided_positions(case["n_files"], case["feature_framerate"])
        return files, sampling.slice_positions(len(files), case["max_frames"], 2)

    def ours(case):
        files, places = positions(case)
        moved = sampling.jitter_positions(places, np.random.RandomState(case["np_seed"]))
        return [files[place] for place in moved]

    cases = golden("train", "frames_clip2video.json")
    assert_all_match(cases, ours)
    moved = [case for case in cases if [positions(case)[0][p] for p in positions(case)[1]] != case["indices"]]
    assert len(moved) > 20
    for case in moved:
        places = sampling.jitter_positions(positions(case)[1], np.random.default_rng(case["np_seed"]))
        assert places == sorted(set(places))
        assert (places[0], places[-1]) == (0, len(positions(case)[0]) - 1)


def test_slice_table():
    for case in golden("slice_table"):
        positions = sampling.slice_positions(case["extracted"], case["max_frames"], case["slice_framepos"])
        assert positions == case["positions"], case


def frame_number(frame):
    """The number that the ten bars of a golden video spell, the lowest bit on the left."""
    columns = frame.mean(axis=(0, 2))
    bars = [part.mean() > 127 for part in np.array_split(columns, 10)]
    return sum(bit << place for place, bit in enumerate(bars))


@needs_golden("realvideo_clip4clip.json")
@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_frames_of_real_files(decoder):
    if decoder == "decord":
        pytest.importorskip("decord")
    for case in json.loads(golden_path("realvideo_clip4clip.json").read_text()):
        info = video.probe(golden_path("videos", case["video"] + ".mp4"))
        indices = video.frame_indices(
            info, "official", case["max_frames"], case["feature_framerate"], case["slice_framepos"]
        )
        assert indices == case["indices"], case
        decode = {"decord": video._decode_decord, "pyav": video._decode_pyav}[decoder]
        frames = decode(info, np.asarray(indices))
        assert [frame_number(frame) for frame in frames] == case["indices"]


@needs_golden("realvideo_glscl.json")
def test_glscl_frames_of_real_files():
    cases = json.loads(golden_path("realvideo_glscl.json").read_text())
    for case in cases:
        info = video.probe(golden_path("videos", case["video"] + ".mp4"))
        stretch = {"start": case["start"], "end": case["end"]}
        indices = video.frame_indices(info, "glscl", case["max_frames"], case["video_framerate"], **stretch)
        assert indices == case["indices"], case
    assert len(cases) == 12


@needs_golden("realvideo_clip4clip_pixels.npz")
def test_pixels_of_a_real_file():
    golden_pixels = np.load(golden_path("realvideo_clip4clip_pixels.npz"))
    meta = json.loads(str(golden_pixels["meta"]))
    path = golden_path("videos", meta["video"] + ".mp4")
    info = video.probe(path)
    indices = video.frame_indices(
        info, "official", meta["max_frames"], meta["framerate"], meta["slice_framepos"]
    )
    ours = normalise(preprocess(video.read_frames(path, indices).frames, meta["size"])).numpy()
    mask = golden_pixels["video_mask"][0]
    assert len(ours) == mask.sum()
    theirs = golden_pixels["video"][0, :, 0]
    np.testing.assert_allclose(ours, theirs[: len(ours)], atol=1e-5)
    assert not theirs[len(ours) :].any()  # padded after normalising
