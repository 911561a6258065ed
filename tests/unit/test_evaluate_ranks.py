"""Two real processes over gloo find what one finds, each with its share of the work."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from tests.unit.ranks import complaint, returned, run_ranks
from tests.unit.training import die, film, real_processes, tiny_config, tiny_dataset
from xclip_lab import create_model, evaluate, evaluation, scoring
from xclip_lab.datasets import VideoTextDataset
from xclip_lab.distributed import joined
from xclip_lab.features import embed

VIDEOS = 7


@pytest.fixture(scope="module")
def processes():
    context = real_processes()
    context.set_forkserver_preload([__name__])
    return context


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> VideoTextDataset:
    """Of four frames, every third of one."""
    folder, dataset = tmp_path_factory.mktemp("films"), tiny_dataset(12)
    whole = film(dataset, folder)
    film(dataclasses.replace(dataset, samples=dataset.samples[::3]), folder, frames=1)
    return whole


@pytest.fixture(scope="module")
def dataset(films) -> VideoTextDataset:
    """Eleven captions of seven videos."""
    samples = [dataclasses.replace(s, caption=f"{s.caption} again") for s in films.samples[:4]]
    return dataclasses.replace(films, split="test", samples=films.samples[:VIDEOS] + samples)


@pytest.fixture(scope="module")
def bank(films) -> VideoTextDataset:
    return dataclasses.replace(films, samples=films.samples[VIDEOS:])


def spoilt(dataset: VideoTextDataset, folder: Path) -> VideoTextDataset:
    """A file is absent from the first process's share, one of the second's is no video."""
    (folder / "broken.mp4").write_bytes(b"this is not a video" * 50)
    paths = {"v1": folder / "absent.mp4", "v6": folder / "broken.mp4"}
    samples = [dataclasses.replace(s, path=paths.get(s.video_id, s.path)) for s in dataset.samples]
    return dataclasses.replace(dataset, samples=samples)


def evaluated(dataset, bank, overrides: dict) -> tuple[dict, int]:
    """The result, and how many videos this process encoded."""
    with joined("cpu") as ranks, mock.patch.object(scoring, "_TEXTS", 2):
        config = tiny_config({"evaluation.batch_size": 2, **overrides})
        torch.manual_seed(0)
        model = create_model(config)
        encode, encoded = model.encode_video, 0

        def counting(video, mask):
            nonlocal encoded
            encoded += len(video)
            return encode(video, mask)

        model.encode_video = counting
        bank = bank if config.evaluation.rerank == "qb_norm" else None
        result = evaluate(model, dataset, config, bank=bank, ranks=ranks, progress=False)
        return vars(result), encoded


def assert_equal_results(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "reranked" and value is not None:
            assert_equal_results(vars(found[name]), vars(value))
        elif name in ("scores", "similarity_v2t") and value is not None:
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_equal(found[name], value)


@pytest.mark.parametrize(
    ("overrides", "shares"),
    [
        ({}, (4, 3)),
        ({"evaluation.similarity": "disk", "evaluation.block_size": 3}, (4, 3)),
        ({"evaluation.similarity": "none", "evaluation.ties": "official"}, (4, 3)),
        ({"evaluation.batch_size": 32}, (0, 7)),
        ({"temporal.mixed_head_masks": True, "towers.architecture.embed_dim": 128}, (4, 3)),
        ({"evaluation.rerank": "dual_softmax"}, (4, 3)),
        ({"evaluation.rerank": "qb_norm"}, (4 + 2, 3 + 3)),
        ({"head.name": "glscl"}, (4, 3)),
    ],
    ids=["plain", "disk", "none", "one batch", "batch mates", "dual softmax", "bank", "glscl"],
)
def test_two_processes_find_what_one_finds(processes, tmp_path, dataset, bank, overrides, shares):
    expected, all_of_them = evaluated(dataset, bank, overrides)
    assert run_ranks(processes, tmp_path, evaluated, dataset, bank, overrides) == [0, 0]
    for rank in (0, 1):
        found, encoded = returned(tmp_path, rank)
        assert_equal_results(found, expected)
        assert encoded == shares[rank]
    assert sum(shares) == all_of_them


def test_missing_videos_of_all_processes_count(processes, tmp_path, dataset):
    gaps = spoilt(dataset, tmp_path)
    expected, _ = evaluated(gaps, None, {"evaluation.allow_missing": 2})
    assert expected["stamp"]["missing_videos"] == ["v1", "v6"]
    assert run_ranks(processes, tmp_path, evaluated, gaps, None, {"evaluation.allow_missing": 2}) == [0, 0]
    assert_equal_results(returned(tmp_path, 1)[0], expected)
    assert run_ranks(processes, tmp_path, evaluated, gaps, None, {"evaluation.allow_missing": 1}) == [2, 2]
    assert "cannot read 2 videos: v1, v6; evaluation.allow_missing is 1" in complaint(tmp_path, 0)
    assert complaint(tmp_path, 1) == complaint(tmp_path, 0)


def test_stored_features_are_shared(processes, tmp_path, dataset):
    config = tiny_config()
    torch.manual_seed(0)
    embed(create_model(config), dataset, config, tmp_path / "features", progress=False)
    overrides = {"data.features": str(tmp_path / "features")}
    expected, _ = evaluated(dataset, None, overrides)
    assert run_ranks(processes, tmp_path, evaluated, dataset, None, overrides) == [0, 0]
    for rank, share in enumerate((4, 3)):
        found, encoded = returned(tmp_path, rank)
        assert_equal_results(found, expected)
        assert encoded == share


def evaluated_and_die(dataset) -> None:
    """The second process, once the videos are encoded."""
    if os.environ["RANK"] == "1":
        evaluation.scored = lambda *args: die()
    evaluated(dataset, None, {})


def test_a_process_that_dies_is_one_line(processes, tmp_path, dataset):
    assert run_ranks(processes, tmp_path, evaluated_and_die, dataset) == [2, -signal.SIGKILL]
    assert complaint(tmp_path, 0).startswith("another process of the run has ended (")
    assert len(complaint(tmp_path, 0).splitlines()) == 1


def evaluated_with_fewer(dataset) -> None:
    kept = len(dataset) - int(os.environ["RANK"])
    evaluated(dataclasses.replace(dataset, samples=dataset.samples[:kept]), None, {})


def evaluated_otherwise(dataset) -> None:
    evaluated(dataset, None, {"evaluation.qb_k": 1 + int(os.environ["RANK"])})


def test_processes_with_other_settings(processes, tmp_path, dataset):
    assert run_ranks(processes, tmp_path, evaluated_otherwise, dataset) == [2, 2]
    assert "process 1 has other settings than the first one" in complaint(tmp_path, 1)


def evaluated_until_terminated(dataset) -> None:
    """torchrun stops the first process while it encodes."""
    if os.environ["RANK"] == "0":
        evaluation.encode = lambda *args: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60)
    evaluated(dataset, None, {})


def test_a_process_that_is_stopped_ends_at_once_with_one_line(processes, tmp_path, dataset):
    assert run_ranks(processes, tmp_path, evaluated_until_terminated, dataset) == [2, 2]
    assert complaint(tmp_path, 0).startswith("stopped by SIGTERM")
    assert len(complaint(tmp_path, 0).splitlines()) == 1


def test_processes_with_other_data(processes, tmp_path, dataset):
    assert run_ranks(processes, tmp_path, evaluated_with_fewer, dataset) == [2, 2]
    assert "process 1 has other captions or videos than the first one" in complaint(tmp_path, 1)
    assert complaint(tmp_path, 0).startswith("another process of the run has ended (")
