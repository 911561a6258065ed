"""What a run writes, what it selects, and what it refuses."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import pickle
import shutil
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.unit.training import (
    BATCH,
    PAIRS,
    STEPS,
    NoisyModel,
    after_step,
    assert_same,
    disk_full,
    film,
    frames_of,
    outcome,
    real_processes,
    tiny_config,
    tiny_dataset,
    train_tiny,
)
from xclip_lab import clips, load_config, load_model, train
from xclip_lab.batching import Loader, epoch_order, make_loader
from xclip_lab.clips import ClipDataset, FrameStore
from xclip_lab.config import to_dict
from xclip_lab.errors import ConfigError, TrainingError
from xclip_lab.evaluation import evaluate
from xclip_lab.model import RetrievalModel
from xclip_lab.resume import run_lock
from xclip_lab.step import Stepper
from xclip_lab.train import fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    return train_tiny(run_dir)


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """Eight pairs whose videos are real files."""
    return film(tiny_dataset(8, "val"), tmp_path_factory.mktemp("videos"))


def train_broken(run_dir, dataset=None, overrides=None, loss=None):
    config, dataset = tiny_config(overrides), dataset or tiny_dataset()
    model = NoisyModel(config.model)
    if loss is not None:
        model.loss = loss
    return fit(model, config, dataset, run_dir, store=frames_of(dataset), progress=False)


def test_run_folder(run):
    names = {path.name for path in run.run_dir.iterdir()}
    assert names >= {"config.yaml", "versions.json", "history.jsonl", "tensorboard", "checkpoints"}
    assert to_dict(load_config(run.run_dir / "config.yaml")) == to_dict(tiny_config())
    versions = json.loads((run.run_dir / "versions.json").read_text())
    assert versions["torch"] == version("torch")
    assert len(versions["data"]["train"]) == 64


def test_history_has_each_step_once_with_its_parts(run):
    assert [row["step"] for row in run.history] == list(range(1, STEPS + 1))
    assert [row["epoch"] for row in run.history] == [1] * 5 + [2] * 5
    for row in run.history:
        assert row["loss"] == pytest.approx(row["contrastive_loss"])
        assert {"lr", "logit_scale", "grad_norm", "seconds", "pairs_per_second", "wait"} <= set(row)
    board = EventAccumulator(str(run.run_dir / "tensorboard")).Reload()
    losses = [event.value for event in board.Scalars("train/loss")]
    assert losses == pytest.approx([row["loss"] for row in run.history])


def test_the_share_of_an_epoch_that_waits_for_data_is_recorded(tmp_path, monkeypatch):
    clock = [0.0]
    read, make = Loader.in_place, Stepper.make

    def reads(self):
        for batch in read(self):
            clock[0] += 3
            yield batch

    def steps(self, *given):
        clock[0] += 1
        return make(self, *given)

    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Loader, "in_place", reads)
    monkeypatch.setattr(Stepper, "make", steps)
    assert [row["wait"] for row in train_tiny(tmp_path / "run").history] == [0.75] * STEPS


def test_without_validation_the_last_is_the_best(run):
    assert run.stamp == {
        "step": STEPS,
        "total_steps": STEPS,
        "epoch": 2,
        "selection_split": None,
        "selection_metric": "last",
        "selection_value": None,
    }
    assert run.checkpoint.resolve() == (run.run_dir / "checkpoints/last").resolve()


def test_training_learns(tmp_path):
    result = train_tiny(tmp_path, {"train.epochs": 60, "train.log_every": 10, "train.checkpoint_every": 500})
    assert result.history[0]["loss"] > 1.0  # ln 4 = 1.39 is chance
    assert result.history[-1]["loss"] < 0.5


def test_max_steps_ends_the_run_and_its_schedule(tmp_path):
    result = train_tiny(tmp_path, {"train.max_steps": 7})
    assert result.steps == 7
    assert result.history[-1]["lr"] < 0.1 * max(row["lr"] for row in result.history)


def test_parts_average_their_gradients(tmp_path):
    config, dataset = tiny_config({"train.max_steps": 1, "train.accumulate": 2}), tiny_dataset()
    store, model = frames_of(dataset), NoisyModel(config.model)
    model.dropout.p = 0.0
    order = epoch_order(len(dataset), config.seed, epoch=0)[:BATCH]
    parts = list(make_loader(ClipDataset(dataset, config, store=store), order=order, batch_size=BATCH // 2))
    expected = sum(model.loss(part)["loss"] for part in parts) / 2
    expected.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    row = fit(model, config, dataset, tmp_path, store=store, progress=False).history[0]
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_bf16_keeps_float32_weights(tmp_path):
    train_tiny(tmp_path, {"train.precision": "bf16", "train.max_steps": 2})
    weights = outcome(tmp_path)["weights"]
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert_not_same(weights, train_weights(tmp_path / "fp32", {"train.max_steps": 2}))


def train_weights(run_dir, overrides):
    train_tiny(run_dir, overrides)
    return outcome(run_dir)["weights"]


def assert_not_same(found, other):
    with pytest.raises(AssertionError):
        assert_same(found, other)


def test_logit_scale_is_clamped(tmp_path):
    config, dataset = tiny_config(), tiny_dataset()
    model = NoisyModel(config.model)
    with torch.no_grad():
        model.logit_scale.fill_(4.8)
    result = fit(model, config, dataset, tmp_path, store=frames_of(dataset), progress=False)
    assert result.history[0]["logit_scale"] == pytest.approx(math.log(100), abs=1e-6)


def test_frozen_parameters_stay(tmp_path):
    config, dataset = tiny_config({"towers.freeze_layer_num": 0, "train.max_steps": 2}), tiny_dataset()
    model = NoisyModel(config.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, config, dataset, tmp_path, store=frames_of(dataset), progress=False)
    after = model.state_dict()
    assert torch.equal(after["clip.token_embedding.weight"], before["clip.token_embedding.weight"])
    assert not torch.equal(after["clip.text_projection"], before["clip.text_projection"])


def test_videos_from_files_and_validation(tmp_path, filmed):
    """Decoding in workers and validation by `evaluate`, and both again after a stop within an epoch."""
    overrides = {"data.workers": 1, "train.checkpoint_every": 1, "evaluation.bootstrap": 0}

    def go(run_dir):
        torch.set_num_threads(1)
        config = tiny_config(overrides)
        torch.manual_seed(0)
        model = NoisyModel(config.model)
        return fit(model, config, filmed, run_dir, val=filmed, progress=False), model, config

    result, model, config = go(tmp_path / "whole")
    with after_step(3, disk_full), pytest.raises(TrainingError):
        go(tmp_path / "parted")
    go(tmp_path / "parted")
    assert_same(outcome(tmp_path / "parted"), outcome(tmp_path / "whole"))
    assert result.stamp["selection_split"] == "val"
    assert result.stamp["selection_metric"] == "t2v/R@1"
    model.eval()
    recall = evaluate(model, filmed, config, progress=False).metrics["t2v"]["R@1"]
    assert result.history[-1]["val/t2v/R@1"] == recall


def test_preloading_decodes_each_video_once(tmp_path, filmed, monkeypatch):
    reads = []
    real = clips.video.read_frames_and_decoder

    def counted(path, *args, **kwargs):
        reads.append(path.name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(clips.video, "read_frames_and_decoder", counted)
    overrides = {"data.preload": True, "train.epochs": 3, "evaluation.bootstrap": 0}
    config = tiny_config(overrides)
    val = dataclasses.replace(filmed, samples=filmed.samples[:3])
    result = fit(NoisyModel(config.model), config, filmed, tmp_path, val=val, progress=False)
    assert sum("val/t2v/R@1" in row for row in result.history) == 3
    assert sorted(reads) == sorted([s.path.name for s in filmed.samples + val.samples])


def scripted(values):
    """Stands for `evaluate` where a test must decide what validation finds."""
    remaining = iter(values)

    def evaluate(*args, **kwargs):
        value = next(remaining)
        return mock.Mock(metrics={"t2v": {"R@1": value, "MdR": value}, "v2t": {}})

    return evaluate


@pytest.mark.parametrize(("select", "best"), [("t2v/R@1", 2), ("t2v/MdR", 3)])
def test_validation_selects(tmp_path, monkeypatch, select, best):
    monkeypatch.setattr(train, "evaluate", scripted([20.0, 40.0, 10.0, 40.0]))
    overrides = {"train.epochs": 4, "train.select": select, "data.allow_overlap": 4}
    result = train_tiny(tmp_path, overrides, val=tiny_dataset(4, "val"))
    assert result.stamp["epoch"] == best
    assert result.stamp["step"] == 5 * best
    assert result.stamp["selection_split"] == "val"
    folders = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert folders == {"last", "best", f"step-{5 * best:08d}", "step-00000020"}


def test_best_checkpoint_loads_without_its_training_code(tmp_path):
    config, dataset = tiny_config({"train.max_steps": 2}), tiny_dataset()
    model = RetrievalModel(config.model)
    fit(model, config, dataset, tmp_path, store=frames_of(dataset), progress=False)
    assert_same(dict(load_model(tmp_path).state_dict()), dict(model.state_dict()))


def test_other_config_is_refused(run):
    with pytest.raises(
        TrainingError, match=r"optim\.lr \(0\.001 there, 0\.002 here\), seed \(0 there, 3 here\)"
    ):
        train_tiny(run.run_dir, {"optim.lr": 0.002, "seed": 3})


def test_other_samples_are_refused(run):
    with pytest.raises(TrainingError, match="other train samples"):
        train_broken(run.run_dir, tiny_dataset(23))


def test_nan_loss_names_step_and_part(tmp_path):
    config = tiny_config()
    model, calls = NoisyModel(config.model), iter(range(100))
    real = model.loss

    def loss(batch, gather):
        parts = real(batch, gather)
        extra = torch.tensor(math.nan if next(calls) == 3 else 0.0)
        return {**parts, "loss": parts["loss"] + extra, "extra_loss": extra}

    model.loss = loss
    dataset = tiny_dataset()
    with pytest.raises(TrainingError, match=r"extra_loss is nan at step 4.*checkpoint in .*last is good"):
        fit(model, config, dataset, tmp_path, store=frames_of(dataset), progress=False)
    weights = outcome(tmp_path)["weights"]
    assert all(value.isfinite().all() for value in weights.values())


def test_gradient_that_is_not_finite_names_the_parameter(tmp_path):
    config, dataset = tiny_config(), tiny_dataset()
    model = NoisyModel(config.model)
    model.clip.text_projection.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match=r"gradient of clip\.text_projection is not finite at step 1"):
        fit(model, config, dataset, tmp_path, store=frames_of(dataset), progress=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"train.batch_size": 64},
            "22 training pairs do not fill one batch of 64; set train.batch_size to at most 22",
        ),
        ({"train.batch_size": 60, "train.accumulate": 4}, "at most 20"),
        ({"train.device": "cuda:99"}, "train.device: 'cuda:99' cannot be used here"),
    ],
)
def test_refused_settings(tmp_path, overrides, message):
    with pytest.raises(TrainingError, match=message):
        train_tiny(tmp_path / "run", overrides)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_whose_record_is_gone(tmp_path):
    train_tiny(tmp_path, {"train.max_steps": 1})
    (tmp_path / "history.jsonl").unlink()
    with pytest.raises(TrainingError, match=r"history\.jsonl is gone, and the checkpoint counts on it; put"):
        train_tiny(tmp_path, {"train.max_steps": 1})


def with_broken(dataset, *broken):
    store = frames_of(dataset)
    left = {name: clip for name, clip in store.clips.items() if name not in broken}
    return FrameStore(left, {name: f"{name}: damaged" for name in broken})


def go_on_error_skip(run_dir, broken_places, overrides=None, stop_after=None):
    """Train with the videos at some places of the first epoch's order broken."""
    torch.set_num_threads(1)
    config, dataset = tiny_config({"data.on_error": "skip", **(overrides or {})}), tiny_dataset()
    order = epoch_order(len(dataset), config.seed, epoch=0)
    broken = [dataset.samples[order[place]].video_id for place in broken_places]
    torch.manual_seed(config.seed)
    model = NoisyModel(config.model)
    store = with_broken(dataset, *broken)
    if stop_after is not None:
        with after_step(stop_after, disk_full), pytest.raises(TrainingError):
            fit(model, config, dataset, run_dir, store=store, progress=False)
        return None
    return fit(model, config, dataset, run_dir, store=store, progress=False)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_broken_videos_move_no_other_pair(tmp_path, accumulate):
    """Step 2 of the first epoch loses all its pairs, step 3 one and step 4 a whole half."""
    overrides = {"train.accumulate": accumulate}
    broken = [4, 5, 6, 7, 9, 12, 13]
    result = go_on_error_skip(tmp_path / "whole", broken, overrides)
    assert result.steps == STEPS
    assert [row["pairs"] for row in result.history[:5]] == [4, 0, 3, 2, 4]
    assert "loss" not in result.history[1]
    assert len(result.broken) == len(broken)
    for stop in (2, 3, 4):
        go_on_error_skip(tmp_path / f"{stop}", broken, overrides, stop_after=stop)
        go_on_error_skip(tmp_path / f"{stop}", broken, overrides)
        assert_same(outcome(tmp_path / f"{stop}"), outcome(tmp_path / "whole"))


def test_pairs_of_unequal_parts_have_equal_weight(tmp_path):
    config, dataset = tiny_config({"train.accumulate": 2, "data.on_error": "skip"}), tiny_dataset()
    first = epoch_order(len(dataset), config.seed, epoch=0)[:BATCH]
    store, model = with_broken(dataset, dataset.samples[first[0]].video_id), NoisyModel(config.model)
    model.dropout.p = 0.0
    clips = ClipDataset(dataset, config, store=store)
    one, two = (model.loss(part)["loss"].item() for part in make_loader(clips, first, BATCH // 2))
    trainer = train.Trainer(model, config, dataset, tmp_path, None)
    row = train_one_step(trainer, clips)
    assert row["loss"] == pytest.approx((one + 2 * two) / 3, rel=1e-5)


def train_one_step(trainer, clips):
    trainer._paced_pairs = 0
    return trainer._train_step(next(trainer._epoch_batches(clips)))


def test_nothing_that_can_be_read(tmp_path):
    with pytest.raises(TrainingError, match=r"none of the training pairs up to step 5 can be read.*damaged"):
        go_on_error_skip(tmp_path, range(PAIRS))


def hold_lock(run_dir, ready, release):
    with run_lock(run_dir):
        ready.set()
        release.wait(60)


def test_two_processes_cannot_share_a_run(tmp_path):
    context = real_processes()
    ready, release = context.Event(), context.Event()
    other = context.Process(target=hold_lock, args=(tmp_path, ready, release))
    other.start()
    assert ready.wait(60)
    try:
        with pytest.raises(TrainingError, match="another process is training in"):
            train_tiny(tmp_path)
    finally:
        release.set()
        other.join()
    assert train_tiny(tmp_path, {"train.max_steps": 1}).steps == 1


def test_damaged_checkpoint_is_one_clear_error(tmp_path):
    train_tiny(tmp_path, {"train.max_steps": 2})
    for name, content in damages(tmp_path):
        file = tmp_path / name
        whole = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(TrainingError) as failed:
            train_tiny(tmp_path, {"train.max_steps": 2})
        message = str(failed.value)
        assert name.replace("last/stamp", "best/stamp") in message
        assert "put" in message
        assert f"move {tmp_path} aside or give another --run-dir" in message
        assert len(message.splitlines()) == 1
        assert "weights_only" not in message
        assert "miniz" not in message
        file.write_bytes(whole)
    assert train_tiny(tmp_path, {"train.max_steps": 2}).steps == 2


def damages(run_dir):
    """Files of a run, each with a content that it cannot have."""
    last = "checkpoints/last"
    state = torch.load(run_dir / last / "training.pt", weights_only=True)
    stamp = json.loads((run_dir / last / "stamp.json").read_text())
    states = [{"epoch": 3}, [1], {**state, "step": "2"}, {**state, "best": {}}]
    states += [{**state, "optimizer": {}}]
    yield f"{last}/model.safetensors", (run_dir / last / "model.safetensors").read_bytes()[:1000]
    whole = (run_dir / last / "training.pt").read_bytes()
    for content in (b"", whole[:1000], b"no checkpoint", pickle.dumps(Path("x")), *map(saved, states)):
        yield f"{last}/training.pt", content
    for content in ("", "{", "[]", "{}", json.dumps({**stamp, "step": None})):
        yield f"{last}/stamp.json", content.encode()
    for content in (b"", b"{}\n{}\n", b"\xff\n\n", b"[1]\n[2]\n"):
        yield "history.jsonl", content


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["history.jsonl", "checkpoints/last/training.pt"])
def test_a_run_that_has_lost_a_file_does_not_go_on(tmp_path, name):
    with after_step(4, disk_full), pytest.raises(TrainingError):
        train_tiny(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(TrainingError, match=rf"{name} .*move .* aside or give another --run-dir"):
        train_tiny(tmp_path)


def test_a_checkpoint_folder_that_is_gone_does_not_begin_anew(tmp_path):
    train_tiny(tmp_path, {"train.max_steps": 1})
    record = (tmp_path / "history.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints/step-00000001")
    with pytest.raises(TrainingError, match="step-00000001 is gone"):
        train_tiny(tmp_path, {"train.max_steps": 1})
    assert (tmp_path / "history.jsonl").read_text() == record


def test_a_run_copied_without_its_links(tmp_path):
    train_tiny(tmp_path / "run", {"train.max_steps": 1})
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(TrainingError, match="last is a folder and must be a link"):
        train_tiny(tmp_path / "copy", {"train.max_steps": 1})
    assert (tmp_path / "copy/checkpoints/step-00000001").is_dir()


def test_weights_of_another_shape_are_listed(tmp_path):
    train_tiny(tmp_path, {"train.max_steps": 1})
    file = tmp_path / "checkpoints/last/model.safetensors"
    weights = load_file(file)
    weights["extra"] = weights.pop("clip.ln_final.bias")
    weights["clip.text_projection"] = weights["clip.text_projection"][:, :3].contiguous()
    save_file(weights, file)
    with pytest.raises(TrainingError) as failed:
        train_tiny(tmp_path, {"train.max_steps": 1})
    for part in ("missing: clip.ln_final.bias", "unexpected: extra", "clip.text_projection (8, 3)"):
        assert part in str(failed.value)


def test_a_vocabulary_that_is_too_small(tmp_path):
    with pytest.raises(ConfigError, match=r"towers\.architecture\.vocab_size: 60 .*49408"):
        train_tiny(tmp_path, {"towers.architecture.vocab_size": 60})


def test_unwritable_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="file: File exists; choose another place for the run"):
        train_tiny(tmp_path / "file")


def test_disk_full_while_logging(tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        mock.patch("xclip_lab.history.json.dumps", full),
        pytest.raises(TrainingError, match=r"cannot write to .*: No space left on device"),
    ):
        train_tiny(tmp_path)
