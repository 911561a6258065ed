"""Own videos found by words: what is kept, what is ranked, and what a person is told."""

import shutil

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.unit.test_cli import refused
from tests.unit.training import tiny_config
from tests.videos import picture, write_video
from xclip_lab import clips, search
from xclip_lab.__main__ import main
from xclip_lab.errors import CheckpointError, ConfigError, DatasetError
from xclip_lab.evaluation import score
from xclip_lab.heads import interactions
from xclip_lab.model import RetrievalModel
from xclip_lab.tokens import TokenSet

SHADES = {"black": 20, "grey": 120, "white": 240}


@pytest.fixture
def folder(tmp_path):
    """A video a shade, one of them further down, and a file that is none."""
    place = tmp_path / "own"
    (place / "more").mkdir(parents=True)
    for name, shade in SHADES.items():
        path = place / ("more" if name == "white" else "") / f"{name}.mp4"
        write_video(path, [np.full((32, 32, 3), shade, np.uint8)] * 8, rate=4)
    (place / "notes.mp4").write_text("no video")
    return place


@pytest.fixture
def opened(folder, tmp_path):
    """Opens the folder's library with a tiny model, without a bar."""

    def again(model=None, **overrides):
        config = tiny_config({"head.name": "xclip", **overrides})
        torch.manual_seed(0)
        model = model or RetrievalModel(config.model).eval()
        return search.open_library(folder, model, config, tmp_path / "index", progress=False)

    return again


def planted(library, videos, **changes):
    """The library with other features: `videos [V, F, D]` are the frames."""
    pooled = normalize(normalize(videos, dim=-1).mean(1), dim=-1)
    names = [f"v{row}" for row in range(len(videos))]
    seconds = torch.arange(float(videos.shape[1])).expand(len(videos), -1)
    parts = dict(vars(library)) | {"videos": names, "paths": names, "timestamps": seconds}
    parts["video"] = TokenSet(pooled, videos, torch.ones(videos.shape[:2], dtype=torch.int64))
    return search.Library(**{key: of for key, of in parts.items() if key[0] != "_"} | changes)


def counted_decoding(monkeypatch):
    """The files that are decoded from now on."""
    real, seen = clips.load_frames, []
    monkeypatch.setattr(
        clips, "load_frames", lambda sample, *rest: seen.append(sample) or real(sample, *rest)
    )
    return seen


def test_the_order_is_the_head_s_and_the_best_frame_is_the_one_like_the_sentence(opened):
    library = opened(**{"head.name": "clip4clip", "temporal.agg_module": "meanP"})
    sentence = normalize(library.encode("red circle").pooled[0], dim=0)
    noise = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    noise = normalize(noise - (noise @ sentence)[:, None] * sentence, dim=-1)  # nothing of the sentence in it
    like_it = noise + torch.linspace(0, 3, 40)[:, None] * sentence
    found = planted(library, torch.stack([noise, like_it], dim=1)).search("red circle", top=4)
    assert [hit.video for hit in found.hits] == ["v39", "v38", "v37", "v36"]
    assert [hit.rank for hit in found.hits] == [1, 2, 3, 4]
    assert all(hit.best(1) == [1.0] for hit in found.hits)
    assert "all 40 videos scored" in found.scoring


def test_x_clips_frames_are_those_that_aosm_attends_to(opened):
    library = opened()
    text = library.encode("red circle left")
    frames = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(2))
    chosen = planted(library, frames)
    with search.recorded(library.model, ["head.sentence_to_frame_softmax"]) as cache:
        library.model.similarity(text, chosen.video)
    weights = cache["head.sentence_to_frame_softmax"][0].detach()
    found = chosen.search("red circle left", top=3)
    assert found.weighed_by.startswith("attention")
    for hit in found.hits:
        np.testing.assert_allclose(hit.weights, weights[int(hit.video[1:])], rtol=1e-5)
        assert hit.best(1) == [float(weights[int(hit.video[1:])].argmax())]


@pytest.mark.parametrize("head", ["xclip", "glscl", "wti"])
def test_scores_are_the_model_s(opened, head):
    library = opened(**{"head.name": head, "towers.mask_padded_words": head == "glscl"})
    found = library.search("blue star", top=9)
    expected = score(library.model, library.encode("blue star"), library.video)[0]
    assert [hit.score for hit in found.hits] == sorted(expected.tolist(), reverse=True)
    assert {hit.video: hit.score for hit in found.hits} == dict(
        zip(library.videos, expected.tolist(), strict=True)
    )


def test_a_shortlist_is_the_nearest_and_a_wide_one_changes_nothing(opened):
    frames = torch.randn(60, 2, 8, generator=torch.Generator().manual_seed(3))
    library = planted(opened(), frames)
    exact = library.search("red star", top=60)
    wide = library.search("red star", top=10, exact_up_to=59, shortlist=60)
    assert [(hit.video, hit.score) for hit in wide.hits] == [
        (hit.video, hit.score) for hit in exact.hits[:10]
    ]
    narrow = library.search("red star", top=3, exact_up_to=59, shortlist=7)
    cosines = library.video.pooled @ library.encode("red star").pooled[0]
    nearest = {f"v{row}" for row in cosines.topk(7).indices.tolist()}
    expected = [hit.video for hit in exact.hits if hit.video in nearest][:3]
    assert [hit.video for hit in narrow.hits] == expected
    assert (narrow.shortlist, exact.shortlist) == (7, None)
    assert "nearest 7" in narrow.scoring


def test_only_new_and_changed_videos_are_decoded_and_gone_ones_dropped(opened, folder, monkeypatch):
    first = opened()
    assert first.videos == ["black.mp4", "grey.mp4", "more/white.mp4"]
    assert first.embedded == 3
    assert list(first.broken) == ["notes.mp4"]
    decoded = counted_decoding(monkeypatch)
    again = opened()
    assert again.embedded == 0
    assert {sample.path.name for sample in decoded} <= {"notes.mp4"}  # it may have been mended
    assert again.videos == first.videos
    assert torch.equal(again.video.tokens, first.video.tokens)
    assert torch.equal(again.timestamps, first.timestamps)

    shutil.move(folder / "grey.mp4", folder / "more" / "moved.mp4")
    write_video(folder / "black.mp4", 8)
    (folder / "notes.mp4").unlink()
    decoded.clear()
    changed = opened()
    assert [sample.path.name for sample in decoded] == ["black.mp4"]
    assert changed.videos == ["black.mp4", "more/moved.mp4", "more/white.mp4"]
    assert torch.equal(changed.video.tokens[1], first.video.tokens[1])
    assert not torch.equal(changed.video.tokens[0], first.video.tokens[0])
    kept = list((folder.parent / "index").glob("*/videos/*/*"))
    assert len(kept) == 3

    decoded.clear()
    kept[0].write_bytes(b"cut off")
    assert opened().embedded == 1


def test_another_model_or_sampler_never_gets_these_features(opened):
    opened()
    assert opened(**{"data.sampler": "official"}).embedded == 3
    other = RetrievalModel(tiny_config({"head.name": "xclip"}).model).eval()
    with torch.no_grad():
        other.head.frame_logit_weight.mul_(2)
    assert opened(other).embedded == 3


def test_features_without_what_the_head_adds_to_them_are_made_anew(opened, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(interactions.WeightedTokenInteractionHead, "_weigh", lambda head, of, *_: of)
        assert opened(**{"head.name": "wti"}).embedded == 3
    library = opened(**{"head.name": "wti"})
    assert library.embedded == 3
    assert len(library.search("red").hits) == 3


def test_a_stop_in_the_middle_goes_on(opened, monkeypatch):
    real, calls = RetrievalModel.encode_video, []

    def stops(model, video, mask):
        calls.append(len(video))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, video, mask)

    monkeypatch.setattr(RetrievalModel, "encode_video", stops)
    with pytest.raises(KeyboardInterrupt):
        opened(**{"evaluation.batch_size": 2})
    library = opened(**{"evaluation.batch_size": 2})
    assert library.embedded < len(library) == 3


def test_each_of_equal_broken_files_is_named(opened, folder):
    shutil.copy(folder / "notes.mp4", folder / "more" / "again.mp4")
    for name, reason in opened().broken.items():
        assert str(folder / name) in reason


def test_bad_queries_are_refused_in_a_line(opened):
    library = opened()
    for query, told in {
        "  ": "is empty",
        "red " * 7: "7 tokens, of which the model reads 6",
        "caf\udce9": "no text",
    }.items():
        with pytest.raises(ConfigError, match=told):
            library.search(query)
    with pytest.raises(ConfigError, match="top: 0"):
        library.search("red", top=0)


def test_values_that_are_not_finite_are_refused(opened):
    library = opened()
    library.video.pooled[1] = torch.nan
    for exact_up_to in (5, 2):
        with pytest.raises(CheckpointError, match="not finite"):
            library.search("red", exact_up_to=exact_up_to)
    with torch.no_grad():
        library.model.clip.visual.proj.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        opened(library.model)


def test_folders_without_a_video(tmp_path):
    config = tiny_config()
    model = RetrievalModel(config.model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no video in it"):
        search.open_library(tmp_path / "empty", model, config, tmp_path / "index")
    with pytest.raises(DatasetError, match="cannot be listed"):
        search.open_library(tmp_path / "none", model, config, tmp_path / "index")
    (tmp_path / "empty" / "text.mp4").write_text("text")
    with pytest.raises(DatasetError, match=r"none of its 1 files can be read as a video.*text\.mp4"):
        search.open_library(tmp_path / "empty", model, config, tmp_path / "index", progress=False)


def test_the_contact_sheet_shows_the_frames_that_answered(tmp_path, opened, monkeypatch):
    library = opened(**{"max_frames": 8, "head.name": "maxsim"})
    path = write_video(tmp_path / "counted.mp4", 8, rate=4)
    hit = search.Hit(1, "counted.mp4", path, 0.5, np.arange(8) / 4, np.array([0, 1, 0, 9, 0, 5, 0, 0.0]))
    assert hit.best(3) == [0.75, 1.25, 0.25]
    figure = search.Found("a query", [hit], 1, None, "attention").show(frames=3)
    shown = [axis.images[0].get_array() for axis in figure.axes]
    for image, number in zip(shown, (1, 3, 5), strict=True):
        assert np.abs(image.astype(int) - picture(number)).mean() < 8
    assert [axis.get_xlabel() for axis in figure.axes] == [
        "0:00.2  (1.00)",
        "0:00.8  (9.00)",
        "0:01.2  (5.00)",
    ]
    outlined = [axis.spines["top"].get_visible() for axis in figure.axes]
    assert outlined == [False, True, False]
    assert library.search("red").show().axes


def test_command(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"embed_dim": 8, "image_size": 32, "vision_width": 16, "text_width": 8, "vision_heads": 1}
    sizes |= {"text_heads": 1, "vision_layers": 1, "text_layers": 1}
    tiny = [word for key, size in sizes.items() for word in (f"--towers.architecture.{key}", str(size))]
    tiny += ["--temporal.layers", "1", "--max_frames", "2", "--data.workers", "0", "--train.device", "cpu"]
    command = ["search", str(folder), "a red circle", "--preset", "quickstart", *tiny, "--top", "2"]
    assert "is empty" in refused(capsys, *command[:2], " ", *command[3:])
    assert "top: 0 is not allowed" in refused(capsys, *command, "--top", "0")
    assert "none: no such folder" in refused(capsys, "search", "none", "a dog")
    assert not (tmp_path / "data").exists(), "refused before a video is embedded"
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "3 videos, 3 of them embedded now" in told
    assert "left out: " in told
    assert "notes.mp4" in told
    rows = [line.split() for line in told.splitlines() if ".mp4  " in line]
    assert [row[0] for row in rows] == ["1", "2"]
    assert {file.suffix for file in (tmp_path / "runs/search").iterdir()} == {".png", ".pdf"}
    assert main(command) == 0
    assert "3 videos, 0 of them embedded now" in capsys.readouterr().out
    assert "no checkpoint in runs/none" in refused(capsys, "search", str(folder), "a", "--run", "runs/none")


def test_without_weights_it_says_how_to_name_a_file(folder, tmp_path, capsys, monkeypatch):
    def no_network(config):
        raise OSError("no route")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", no_network)
    line = refused(capsys, "search", str(folder), "a dog", "--index", str(tmp_path / "index"))
    assert "--towers.pretrained FILE" in line
    assert "--run RUN" in line
