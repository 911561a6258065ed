"""Published checkpoint files on the command line: evaluated, started from, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import xclip_lab
from tests.unit.test_cli import CLIPS, SETTINGS, SIZES, options, refused
from xclip_lab import save_official, study
from xclip_lab.__main__ import main
from xclip_lab.config import load_config
from xclip_lab.errors import ConfigError
from xclip_lab.families import FAMILIES
from xclip_lab.model import RetrievalModel
from xclip_lab.result import Result

OF_THE_TOWERS = {key: value for key, value in SETTINGS.items() if key.startswith("towers.")}
REST = {key: value for key, value in SETTINGS.items() if key not in OF_THE_TOWERS} | {
    "evaluation.bootstrap": 0
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("official") / "clips"
    assert main(["data", "generate", "--root", str(root), *options(CLIPS)]) == 0
    return root


@pytest.fixture(scope="module")
def config(clips):
    return load_config("quickstart", SETTINGS | {"data.root": str(clips), "evaluation.bootstrap": 0})


def saved(config, folder: Path, **changes) -> Path:
    """What the official code would have saved: a state dict under its names."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    model = study.new_model(load_config("quickstart", SETTINGS | {"seed": 5} | changes))
    file = folder / "pytorch_model.bin.4"
    save_official(model, file)
    return file


@pytest.fixture(scope="module")
def file(config, tmp_path_factory) -> Path:
    return saved(config, tmp_path_factory.mktemp("published"))


def evaluate(file: Path, clips: Path, *words: str, **changes) -> list[str]:
    """Without the towers' sizes, which are the file's."""
    settings = (
        REST | {"data.root": str(clips)} | {key.replace("__", "."): value for key, value in changes.items()}
    )
    command = ["evaluate", "--official", str(file), "--family", "xclip", "--preset", "quickstart"]
    return [*command, *options(settings), *words]


def train(clips: Path, run_dir: Path, *words: str, **changes) -> list[str]:
    """One step that changes next to nothing."""
    settings = SETTINGS | {"data.root": str(clips), "train.max_steps": 1, "optim.lr": 1e-12}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return ["train", "--preset", "quickstart", "--run-dir", str(run_dir), *options(settings), *words]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / "last" / "model.safetensors")


def started_from(run_dir: Path, state: dict[str, torch.Tensor]) -> bool:
    found = weights(run_dir)
    return found.keys() == state.keys() and all(
        torch.allclose(found[key], value, atol=1e-8) for key, value in state.items()
    )


def test_a_published_file_is_evaluated_as_its_model(file, clips, config, tmp_path, capsys):
    assert main(evaluate(file, clips, "--out", str(tmp_path))) == 0
    assert f"checkpoint {file} (official xclip)" in capsys.readouterr().out
    found = Result.load(tmp_path)
    model = study.new_model(load_config("quickstart", SETTINGS | {"seed": 5})).eval()
    expected = xclip_lab.evaluate(model, study.open_split(config, "test"), config, progress=False)
    np.testing.assert_allclose(found.similarity, expected.similarity, rtol=1e-5, atol=1e-5)
    assert found.stamp["checkpoint"] == f"{file} (official xclip)"
    assert found.stamp["selection_split"] == "unknown"


PUBLISHED = {
    # What a file of the preset's family has otherwise than the preset, and what its training was told.
    "xclip-folder-b32": ({"temporal.layers": 2, "max_words": 8, "max_frames": 2}, {"temperature": 0.05}),
    "clip4clip-folder-b32": ({"towers.linear_patch": "3d"}, {"agg_module": "seqLSTM"}),
    "clip4clip-tight-folder-b32": ({"head.layers": 2, "head.positions": 40}, {}),
    "clip2video-folder-b32": ({"head.centers": 7}, {"center_weight": 0.2, "mixed_head_masks": False}),
    "glscl-folder-b32": ({"head.queries": 12, "head.layers": 2}, {"temp": 1.5, "query_share": 0}),
}
TEMPORAL = ("agg_module", "mixed_head_masks")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("preset", PUBLISHED)
def test_every_familys_file_under_its_preset(preset, precision, clips, tmp_path, capsys):
    """Sizes, patch and precision are the file's, and the command line gives what `load_official` does."""
    sizes, told = PUBLISHED[preset]
    told_keys = {f"{'temporal' if key in TEMPORAL else 'head'}.{key}": told[key] for key in told}
    lengths = {key: size for key, size in sizes.items() if key.startswith("max_")}
    small = {f"towers.architecture.{name}": size for name, size in SIZES.items()} | sizes | told_keys
    small |= {"towers.name": None, "towers.pretrained": None, "towers.precision": precision}
    model = study.new_model(load_config(preset, small | {"seed": 5}))
    file, family = tmp_path / "pytorch_model.bin.4", preset.split("-")[0]
    save_official(model, file)

    data = {"data.dataset": "synthetic", "data.root": clips, "data.workers": 0, "evaluation.bootstrap": 0}
    settings = data | told_keys | lengths | {"train.device": "cpu"}
    command = ["evaluate", "--official", str(file), "--family", family, "--preset", preset]
    assert main([*command, "--out", str(tmp_path / "out"), *options(settings)]) == 0
    found = Result.load(tmp_path / "out")
    assert found.stamp["towers_precision"] == precision

    loaded = xclip_lab.load_official(file, family, **told)
    towers = dataclasses.replace(loaded.config.towers, precision=precision)
    same = RetrievalModel(dataclasses.replace(loaded.config, towers=towers)).eval()
    same.load_state_dict(loaded.state_dict())
    config = load_config(preset, data | {"data.root": str(clips)})
    expected = xclip_lab.evaluate(same, study.open_split(config, "test"), config, progress=False)
    np.testing.assert_allclose(found.similarity, expected.similarity, rtol=1e-5, atol=1e-5)
    assert np.ptp(found.similarity) > 1e-3


def test_what_is_given_must_be_what_the_file_has(file, clips, capsys):
    line = refused(capsys, *evaluate(file, clips, towers__precision="fp16", optim__recipe="official"))
    assert f"towers.precision: fp16 was given but {file} has fp32; leave it out" in line
    line = refused(capsys, *evaluate(file, clips, temporal__layers=3))
    assert f"temporal.layers: 3 was given but {file} has 1" in line


def test_how_the_towers_run_is_not_the_files_to_tell(config, clips, tmp_path):
    file, found = saved(config, tmp_path, max_words=24), {}
    for hidden in (True, False):
        changes = {"towers__mask_padded_words": hidden, "towers__gradient_checkpointing": True}
        assert main(evaluate(file, clips, "--out", str(tmp_path), max_words=24, **changes)) == 0
        found[hidden] = Result.load(tmp_path).similarity
    assert not np.allclose(found[True], found[False], atol=1e-4)


def test_the_parts_that_the_preset_has_otherwise_are_listed(clips, tmp_path, capsys):
    small = {f"towers.architecture.{name}": size for name, size in SIZES.items()}
    small |= {"towers.name": None, "towers.pretrained": None, "head.center_proj": "plain"}
    save_official(study.new_model(load_config("clip2video-folder-b32", small)), tmp_path / "plain.bin")
    command = ["evaluate", "--official", str(tmp_path / "plain.bin"), "--family", "clip2video"]
    command += ["--preset", "clip2video-folder-b32", "--data.dataset", "synthetic", "--data.root", str(clips)]
    assert "plain.bin does not fit the model; missing: actionClip." in refused(capsys, *command)
    line = refused(capsys, *command, "--head.center_proj", "None")
    assert "unexpected: emb_center, weight_center" in line


def test_without_out_each_file_has_a_folder_of_its_own(file, clips, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(evaluate(file, clips)) == 0
    [folder] = (tmp_path / "runs").iterdir()
    assert f"saved in runs/{folder.name}/evaluation/test" in capsys.readouterr().out
    assert folder.name.startswith("checkpoint_")


def test_what_shapes_cannot_tell_is_the_presets(file, clips, config, tmp_path):
    found = {}
    for temperature in (0.1, 5.0):
        words = ("--out", str(tmp_path), "--head.temperature", str(temperature))
        assert main(evaluate(file, clips, *words)) == 0
        found[temperature] = Result.load(tmp_path).similarity
    assert not np.allclose(found[0.1], found[5.0], atol=1e-3)
    mean = saved(config, tmp_path, temporal__agg_module="meanP")
    assert main(evaluate(mean, clips, "--out", str(tmp_path / "mean"), temporal__agg_module="meanP")) == 0


def test_another_agg_module_is_listed(file, clips, config, tmp_path, capsys):
    mean = saved(config, tmp_path, temporal__agg_module="meanP")
    line = refused(capsys, *evaluate(mean, clips))
    assert f"{mean} does not fit the model; missing: frame_position_embeddings.weight" in line
    assert "give a file of that family, and a preset with the temporal and head settings" in line
    line = refused(capsys, *evaluate(file, clips, temporal__agg_module="meanP"))
    assert "unexpected: frame_position_embeddings.weight" in line


def test_other_lengths_are_refused_and_migrate_on_request(file, clips, tmp_path, capsys):
    longer = {"max_words": 10, "max_frames": 3}
    line = refused(capsys, *evaluate(file, clips, **longer))
    assert f"{file} is for other lengths than max_words 10 and max_frames 3" in line
    assert "give --max_words 8 --max_frames 2, or --migrate" in line
    assert "--max_words 8, or --migrate" in refused(capsys, *evaluate(file, clips, max_words=10))
    assert main(evaluate(file, clips, "--migrate", "--out", str(tmp_path), **longer)) == 0
    stamp = Result.load(tmp_path).stamp
    assert (stamp["max_words"], stamp["max_frames"]) == (10, 3)


class Code:
    def __reduce__(self):
        return (print, ("this ran",))


def damaged(kind: str, file: Path, folder: Path) -> Path:
    """A copy of the file with one thing wrong."""
    state, copy = torch.load(file, weights_only=True), folder / "broken.bin"
    if kind == "missing":
        return copy
    if kind == "truncated":
        copy.write_bytes(file.read_bytes()[:2000])
    elif kind == "pickle":
        stream = io.BytesIO()
        pickle.dump({"clip.logit_scale": Code()}, stream)
        copy.write_bytes(stream.getvalue())
    else:
        key = "global_mat_weight"
        changed = {
            "mis-sized": state | {key: state[key][:-1]},
            "without a key": {name: value for name, value in state.items() if name != key},
            "another key": state | {"extra": state[key]},
            "no towers": {"extra": state[key]},
            "no state dict": [state[key]],
        }
        torch.save(changed[kind], copy)
    return copy


BROKEN = {
    "missing": "no checkpoint file {}; nothing is put in its place, give its path",
    "truncated": "{} is damaged or not a checkpoint: PytorchStreamReader failed",
    "pickle": "{} holds more than tensors and is not read, since that could run foreign code; save its",
    "mis-sized": "{} does not fit the model; of another size: global_mat_weight (7, 8) where",
    "without a key": "{} does not fit the model; missing: global_mat_weight",
    "another key": "{} does not fit the model; unexpected: extra",
    "no state dict": "{} holds a list, not a state dict; give a whole state dict, as the official",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_file_is_one_line_that_names_it(kind, file, clips, tmp_path, capsys):
    copy = damaged(kind, file, tmp_path)
    line = BROKEN[kind].format(copy)
    assert line in refused(capsys, *evaluate(copy, clips, "--out", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    found = refused(capsys, *train(clips, tmp_path / "run", "--init", str(copy)))
    assert line in found
    assert found.startswith("xclip-lab: error: train.init: ")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_file_without_towers_is_no_checkpoint(file, clips, tmp_path, capsys):
    copy = damaged("no towers", file, tmp_path)
    line = refused(capsys, *evaluate(copy, clips))
    assert f"{copy} is no xclip checkpoint: it has no 'word_logit_weight'; give a file of that family" in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--official F", "--official FILE needs --family F, whose code wrote it, and --preset P"),
        ("--official F --family xclip", "--official FILE needs --family F"),
        ("--official F --family xlcip --preset quickstart", "unknown family 'xlcip'; did you mean 'xclip'?"),
        ("run --official F", "evaluate either run or --official F, not both"),
        (
            "run --family xclip",
            "--family and --migrate belong to an official file: give it by --official FILE",
        ),
        ("run --migrate", "--family and --migrate belong to an official file"),
        (
            "--official F --family xclip --preset quickstart --towers.linear_patch 3d",
            "towers.linear_patch: the weights and shapes in F tell that; leave it out",
        ),
        (
            "--official F --family xclip --preset quickstart --towers.architecture.vision_width 64",
            "towers.architecture.vision_width: the weights and shapes in F tell that",
        ),
    ],
)
def test_options_that_do_not_go_together(words, line, clips, capsys):
    split = words.split()
    data = ["--data.root", str(clips)] if "--preset" in split else []
    assert line in refused(capsys, "evaluate", *split, *data)


@pytest.mark.parametrize("family", sorted(set(FAMILIES.names()) - {"xclip"}))
def test_a_family_that_is_not_the_presets(family, file, clips, tmp_path, capsys):
    line = f"--family {family}: the preset 'quickstart' has the head 'xclip'; give a preset of {family}"
    command = ["evaluate", "--official", str(file), "--family", family, "--preset", "quickstart"]
    assert line in refused(capsys, *command, *options(REST | {"data.root": str(clips)}))
    assert line in refused(capsys, *train(clips, tmp_path, "--init", str(file), "--family", family))


def test_a_family_without_a_file_to_start_from(clips, tmp_path, capsys):
    line = refused(capsys, *train(clips, tmp_path / "run", "--family", "xclip"))
    assert "--family xclip belongs to an official file that a training starts from: give it by --init" in line
    assert not (tmp_path / "run").exists()


def test_a_run_of_other_lengths_is_refused_with_the_way_to_change_them(clips, tmp_path, capsys):
    first = tmp_path / "first"
    assert main(train(clips, first)) == 0
    line = refused(capsys, *train(clips, tmp_path / "second", "--init", str(first), max_frames=3))
    assert f"{first} is for other lengths than max_frames 3: give --max_frames 2, or write one" in line
    assert f"save_official(load_model('{first}'), 'first.bin'), then save_official(load_official(" in line


def test_training_starts_from_an_official_file(file, clips, tmp_path):
    run_dir = tmp_path / "run"
    assert main(train(clips, run_dir, "--init", str(file), "--family", "xclip")) == 0
    model = study.new_model(load_config("quickstart", SETTINGS | {"seed": 5}))
    assert started_from(run_dir, model.state_dict())
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["init"] == str(file)


def test_training_starts_from_a_run(file, clips, tmp_path, capsys):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert main(train(clips, first, seed=9)) == 0
    assert main(train(clips, second, "--init", str(first))) == 0
    assert started_from(second, weights(first))
    checkpoint = first / "checkpoints" / "last" / "model.safetensors"
    assert main(train(clips, third, "--init", str(checkpoint))) == 0
    assert started_from(third, weights(first))
    line = refused(capsys, *train(clips, second, "--init", str(file)))
    assert "holds a run of another config: train.init (" in line


def test_training_from_another_model_is_refused(file, clips, config, tmp_path, capsys):
    mean = saved(config, tmp_path, temporal__agg_module="meanP")
    line = refused(capsys, *train(clips, tmp_path / "run", "--init", str(mean)))
    assert f"train.init: {mean} does not fit the model; missing: frame_position_embeddings.weight" in line
    assert "starts from all weights of the preset's own model" in line
    longer = refused(capsys, *train(clips, tmp_path / "run", "--init", str(file), max_words=10))
    assert f"{file} is for other lengths than max_words 10: give --max_words 8, or write one of" in longer
    assert (
        f"save_official(load_official('{file}', 'xclip', max_words=10, max_frames=2), 'other.bin')" in longer
    )
    line = refused(capsys, *train(clips, tmp_path / "run", "--init", str(tmp_path / "nowhere.safetensors")))
    assert f"no checkpoint in {tmp_path / 'nowhere.safetensors'}" in line


def test_a_control_of_a_started_model_is_untrained(file, config):
    """What must not point is fresh, whatever the training began with."""
    started = load_config("quickstart", SETTINGS | {"train.init": str(file)})
    assert study.new_model(started).origin.checkpoint == str(file)
    assert study.untrained_model(started).origin.checkpoint.startswith("none: untrained")


def test_a_model_that_did_not_start_there_is_not_trained(file, clips, tmp_path):
    """The run would record what is not so."""
    config = load_config("quickstart", SETTINGS | {"data.root": str(clips), "train.init": str(file)})
    train_set, _ = study.open_training_splits(config)
    with pytest.raises(
        ConfigError, match=r"train\.init: .* is not where the model's weights come from \(none"
    ):
        xclip_lab.fit(xclip_lab.create_model(config), config, train_set, tmp_path)
