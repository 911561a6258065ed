"""A method of one's own: a config, a class and `forward`, and everything else works as it stands."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import normalize

from xclip_lab import create_model, evaluate, fit, load_config, load_dataset, load_model
from xclip_lab.attention import tap_names
from xclip_lab.errors import ConfigError
from xclip_lab.heads import HEADS, Head, HeadOutput, Tap
from xclip_lab.ranges import PositiveFloat
from xclip_lab.study import SMOKE
from xclip_lab.synthetic import generate


@dataclass(frozen=True)
class SoftestConfig:
    """`sharpness` of the soft maximum over frames."""

    name: str = "softest"
    sharpness: PositiveFloat = 5.0


class SoftestHead(Head):
    """The sentence looks for its frames."""

    config_class = SoftestConfig

    def __init__(self, config, width, max_words, max_frames):
        super().__init__(config, width, max_words, max_frames)
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.frame_softmax = Tap("[T, V, F]: over frames")

    def forward(self, text, video):
        sentences = normalize(text.pooled * self.weight, dim=-1)
        scores = torch.einsum("td,vfd->tvf", sentences, normalize(video.tokens, dim=-1))
        hidden = scores.masked_fill(video.mask == 0, -torch.inf)
        weights = self.frame_softmax((self.config.sharpness * hidden).softmax(-1))
        return HeadOutput((weights * scores).sum(-1), aux={"size_loss": 0.1 * self.weight.square().mean()})


@pytest.fixture
def registered():
    HEADS.register("softest")(SoftestHead)
    yield
    del HEADS._entries["softest"]


def test_a_head_from_outside_trains_and_is_evaluated(registered, tmp_path):
    clips = {"train_clips": 12, "test_clips": 4, "size": 32, "frames": 8}
    chosen = {"head.name": "softest", "head.sharpness": 3, "temporal.agg_module": "seqLSTM"}
    config = load_config(
        "quickstart", SMOKE | chosen | {"data.generate": clips, "data.root": str(tmp_path / "clips")}
    )
    generate(config.data.generate, config.data.root, workers=1, progress=False)
    train, test = (load_dataset("synthetic", split, config.data.root) for split in ("train", "test"))
    torch.manual_seed(0)
    model = create_model(config)
    taps = {name: axes for name, axes in tap_names(model).items() if name.startswith("head.")}
    assert taps == {"head.frame_softmax": "[T, V, F]: over frames"}
    run = fit(model, config, train, tmp_path / "run", progress=False)
    assert run.steps == 3
    row = run.history[-1]
    assert row["loss"] == pytest.approx(row["contrastive_loss"] + row["size_loss"])
    assert not torch.equal(model.head.weight, torch.ones(16))

    again = load_model(run.run_dir)
    assert again.config.head == SoftestConfig(sharpness=3)
    result, expected = (evaluate(m, test, config, progress=False) for m in (again, model))
    assert result.similarity.shape == (4, 4)
    assert (result.similarity == expected.similarity).all()
    with pytest.raises(ConfigError, match=r"unknown key 'head.sharpnes'; did you mean 'head.sharpness'"):
        load_config("quickstart", chosen | {"head.sharpnes": 1})


def test_it_is_gone_afterwards():
    with pytest.raises(ConfigError, match="unknown head 'softest'"):
        load_config("quickstart", {"head.name": "softest"})
