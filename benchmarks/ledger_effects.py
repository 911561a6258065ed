"""How far each switch of the ledger moves logits and R@1 of models trained on the generated clips.

    xclip-lab bench ledger_effects runs/compare [--epochs 6]

Takes the runs of `70_compare` (the first seed of each method) and evaluates the same weights on the same
test clips on both sides of a switch: once with all frames, where no video has padding, and once with a
quarter to three quarters of each video's frames, so that videos differ in length. Two rows need a model that
is not among them, which is trained first (`--epochs`): mixed head masks show with two attention heads only,
doubled frames with seqLSTM. What only a training can show is not measured here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Options, folder
from xclip_lab import study
from xclip_lab.checkpoint import load_model
from xclip_lab.clips import ClipDataset, FrameStore, preload
from xclip_lab.config import load_config, model_config_from_dict, to_dict
from xclip_lab.errors import UserError
from xclip_lab.evaluation import evaluate
from xclip_lab.grid import load_grid
from xclip_lab.model import RetrievalModel
from xclip_lab.result import Result
from xclip_lab.train import fit

MIX = load_grid("methods").overrides
"""The clips and the length of training that `70_compare` has."""
TWO_HEADS = {"towers.architecture.embed_dim": 128, "towers.architecture.text_width": 128}


@dataclass(frozen=True)
class Switch:
    """A row of the ledger: the preset of a model trained the official way, the setting that is repaired."""

    row: str
    preset: str
    key: str
    official: bool = False
    settings: dict[str, Any] = field(default_factory=dict)  # of a training of its own


MIXED, LSTM = "temporal.mixed_head_masks", {"temporal.agg_module": "seqLSTM"}
SWITCHES = (
    Switch("1", "quickstart", "head.mask_padding"),
    Switch("3", "quickstart-clip2video", MIXED, True, {**TWO_HEADS, MIXED: True}),
    Switch("4", "quickstart-clip2video", "temporal.mask_differences"),
    Switch("14", "quickstart-glscl", "head.mask_padding"),
    Switch("14 seqLSTM", "quickstart-glscl", "head.mask_padding", settings=LSTM),
    Switch("text mask", "quickstart-glscl", "towers.mask_padded_words"),
)


def main() -> None:
    parser = Options(__doc__, epochs=6)
    parser.add_argument("runs", type=folder, help="the run_dir of 70_compare")
    arguments = parser.parse_args()
    runs = [run_of(switch, arguments.runs) for switch in SWITCHES]
    data = load_config("quickstart", MIX)
    test = study.open_split(data, "test")
    whole = preload(ClipDataset(test, data), progress=False)
    stores = {"all frames": whole, "some frames": shortened(whole)}
    print(f"{'row':<18}{'clips':<13}{'R@1 official':>13}{'repaired':>10}{'logits moved by':>17}")
    for switch, run in zip(SWITCHES, runs, strict=True):
        if switch.settings:
            train(switch, run, arguments.epochs)
        model = load_model(run)
        for name, store in stores.items():
            sides = [
                evaluate(with_setting(model, switch.key, value), test, data, store=store, progress=False)
                for value in (switch.official, not switch.official)
            ]
            report(switch.row, name, *sides)


def run_of(switch: Switch, runs: Path) -> Path:
    """The first seed's run of the comparison, or a place of its own where the row needs another model."""
    if switch.settings:
        return runs / f"ledger_{switch.row.replace(' ', '_')}"
    wanted = load_config(switch.preset, MIX).model
    for path in sorted(runs.glob("*_s0_*/config.yaml")):
        if load_config(path).model == wanted:
            return path.parent
    raise UserError(f"{runs}: no run of {switch.preset} with seed 0; notebook 70_compare makes them")


def train(switch: Switch, run_dir: Path, epochs: int) -> None:
    config = load_config(switch.preset, {**MIX, **switch.settings, "train.epochs": epochs})
    fit(study.new_model(config), config, study.open_split(config, "train"), run_dir, progress=False)


def shortened(store: FrameStore) -> FrameStore:
    """The same videos with a quarter to three quarters of their frames, evenly spaced, drawn by seed 0."""
    draw = np.random.default_rng(0)
    clips = {}
    for video, (pixels, timestamps) in store.clips.items():
        count = int(draw.integers(len(pixels) // 4, 3 * len(pixels) // 4, endpoint=True))
        kept = torch.linspace(0, len(pixels) - 1, count).round().long()
        clips[video] = (pixels[kept], timestamps[kept])
    return dataclasses.replace(store, clips=clips)


def with_setting(model: RetrievalModel, key: str, value: bool) -> RetrievalModel:
    """The same weights under another setting of the model."""
    values, (section, name) = to_dict(model.config), key.split(".")
    values[section][name] = value
    changed = RetrievalModel(model_config_from_dict(values), load_pretrained=False)
    changed.load_state_dict(model.state_dict())
    return changed.eval()


def report(row: str, clips: str, official: Result, repaired: Result) -> None:
    moved = np.abs(official.similarity - repaired.similarity)
    cells = [result.metrics["t2v"]["R@1"] for result in (official, repaired)]
    print(
        f"{row:<18}{clips:<13}{cells[0]:>13.1f}{cells[1]:>10.1f}"
        f"{np.median(moved):>9.2g} to {moved.max():.2g}",
        flush=True,
    )


if __name__ == "__main__":
    main()
