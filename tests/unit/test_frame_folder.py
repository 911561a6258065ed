"""A folder of frames is a video."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from tests.videos import number_of, picture
from xclip_lab import sampling, video
from xclip_lab.errors import VideoError


def write_frames(folder, count=12, name="{:08d}.jpg", first=1, **options):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(picture(i)).save(folder / name.format(first + i), **options)
    return folder


def test_read_as_a_video_of_five_frames_a_second(tmp_path):
    folder = write_frames(tmp_path / "a")
    (folder / "notes.txt").write_text("no frame")
    (folder / "._00000001.jpg").write_text("no frame")
    os.mkfifo(folder / "00000000.jpg")
    (folder / "0.jpg").symlink_to("0.jpg")
    info = video.probe(folder)
    assert (info.frame_count, info.width, info.height, info.codec) == (12, 96, 64, "frames")
    assert (info.fps, info.duration) == (5.0, pytest.approx(2.4))
    (frames, timestamps), decoder = video.read_frames_and_decoder(folder, [11, 3, 3])
    assert decoder == "frames"
    assert [number_of(frame) for frame in frames] == [11, 3, 3]
    np.testing.assert_allclose(timestamps, [2.2, 0.6, 0.6])
    assert len(video.read_frames(folder, start=0.4, end=1.0).frames) == 3
    assert video.frame_indices(info, "uniform", 4) == [1, 4, 7, 10]
    assert video.frame_indices(info, "official", 12) == [0, 5, 10]
    assert video.frame_indices(info, "glscl", 12) == [0, 5, 10]


def test_clip2video_takes_the_files_as_they_are(tmp_path):
    info = video.probe(write_frames(tmp_path / "a", 11))
    assert video.frame_indices(info, "clip2video", 12) == list(range(11))
    strided = sampling.strided_positions(11, 2)
    assert video.frame_indices(info, "clip2video", 12, feature_framerate=2) == strided == [0, 2, 5, 7, 10]
    assert video.frame_indices(info, "clip2video", 3, feature_framerate=2) == [0, 5, 10]
    assert video.frame_indices(info, "clip2video", 12, start=1.0, end=1.6) == [5, 6, 7]


def test_numbers_in_names_are_numbers(tmp_path):
    folder = write_frames(tmp_path / "a", 12, name="img_{}.png", first=0)
    frames = video.read_frames(folder).frames
    np.testing.assert_array_equal(frames, [picture(i) for i in range(12)])


def test_the_rate_is_that_of_the_note(tmp_path):
    folder = write_frames(tmp_path / "a", 4)
    (tmp_path / "prepared.json").write_text(json.dumps({"fps": 2.5}))
    np.testing.assert_allclose(video.read_frames(folder).timestamps, [0, 0.4, 0.8, 1.2])
    for text in ("{}", "[]", '{"fps": 0}', '{"fps": "x"}', "no JSON"):
        (tmp_path / "prepared.json").write_text(text)
        with pytest.raises(VideoError, match=r"prepared\.json: no frame rate in it"):
            video.probe(folder)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1"])
def test_every_kind_of_image_is_read_as_rgb(tmp_path, mode):
    suffix = "jpg" if mode in ("L", "CMYK") else "png"
    Image.fromarray(picture(77)).convert(mode).save(tmp_path / f"1.{suffix}")
    frames = video.read_frames(tmp_path).frames
    assert frames.shape == (1, 64, 96, 3)
    assert number_of(frames[0]) == 77


def test_an_image_is_turned_as_it_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    write_frames(tmp_path / "a", 2, exif=exif)
    assert video.read_frames(tmp_path / "a").frames.shape == (2, 96, 64, 3)


def test_what_cannot_be_read_names_the_image(tmp_path):
    folder = write_frames(tmp_path / "a", 6)
    cut = folder / "00000003.jpg"
    cut.write_bytes(cut.read_bytes()[:-300])
    (folder / "00000004.jpg").write_text("words")
    Image.fromarray(picture(0, 64, 64)).save(folder / "00000005.jpg")
    assert len(video.read_frames(folder, [0, 1, 5]).frames) == 3  # only these are opened
    for index, message in [
        (2, "3.jpg: Pillow: (?i:.*truncated)"),
        (3, "4.jpg: Pillow: "),
        (4, "5.jpg: 64 x 64"),
    ]:
        with pytest.raises(VideoError, match=message):
            video.read_frames(folder, [0, index])
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((64, 96), 9000, np.uint16)).save(tmp_path / "deep" / "1.png")
    with pytest.raises(VideoError, match="more than 8 bits"):
        video.probe(tmp_path / "deep")
    for number in range(6):  # fewer than pictures are previews
        assert len(video.read_frames(folder, [0]).frames) == 1
        (folder / f"b{number}.MP4").touch()
    with pytest.raises(VideoError, match=r"a: pictures beside videos are no frames; .* such as b0.MP4"):
        video.probe(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="empty: a folder without a frame"):
        video.probe(tmp_path / "empty")
