"""Frozen dataclasses for everything a run can be told, and the one way into them: `load_config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from xclip_lab.atomic import write_text
from xclip_lab.consistency import check_names, check_together, refuse_head_as_agg_module
from xclip_lab.datasets.base import Family
from xclip_lab.errors import ConfigError
from xclip_lab.heads import HEADS
from xclip_lab.preset_files import preset_values
from xclip_lab.preset_files import presets as presets
from xclip_lab.ranges import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    UnitIntervalBelowOne,
)
from xclip_lab.validation import build, check, leaf_names, merge, nest, plain, unknown_key

SelectionMetric = Literal[
    "t2v/R@1", "t2v/R@5", "t2v/R@10", "t2v/R@50", "t2v/MdR", "t2v/MnR", "t2v/Rsum",
    "v2t/R@1", "v2t/R@5", "v2t/R@10", "v2t/R@50", "v2t/MdR", "v2t/MnR", "v2t/Rsum",
]  # fmt: skip


@dataclass(frozen=True)
class TowerSizes:
    """Sizes of a CLIP ViT that open_clip has no name for."""

    embed_dim: PositiveInt = 512
    image_size: PositiveInt = 224
    patch_size: PositiveInt = 32
    vision_width: PositiveInt = 768
    vision_layers: PositiveInt = 12
    vision_heads: PositiveInt = 12
    text_width: PositiveInt = 512
    text_layers: PositiveInt = 12
    text_heads: PositiveInt = 8
    context_length: PositiveInt = 77
    vocab_size: PositiveInt = 49408
    quick_gelu: bool = True


@dataclass(frozen=True)
class TowersConfig:
    """CLIP's two towers.

    `name` is a ViT that open_clip knows (`ViT-B-32-quickgelu`), or null with `architecture` given.
    `pretrained` is an open_clip tag (`openai`), a file (OpenAI's archive, a state dict, safetensors, a whole
    retrieval model) or null for random weights. `freeze_layer_num`: -1 trains everything, 0 freezes
    embeddings and stems, n also the first n blocks of both towers (official). `freeze_conv1` also freezes the
    patch embedding, whatever else trains (GLSCL). `linear_patch` `3d` embeds patches over three frames
    (CLIP4Clip); officially it switches freezing off, which `freeze_with_3d_patch` repairs (ledger 11).
    `mask_padded_words` hides padded words from the text tower's attention (GLSCL). `mask_padded_frames`
    blackens padded frames before the 3D patch reaches into them (ledger 19). `precision` `fp16` keeps the
    towers' matrices in half precision as the official runs do (ledger 6).
    """

    name: str | None = "ViT-B-32-quickgelu"
    architecture: TowerSizes | None = None
    pretrained: str | None = "openai"
    gradient_checkpointing: bool = False
    freeze_layer_num: int = -1
    freeze_conv1: bool = False
    linear_patch: Literal["2d", "3d"] = "2d"
    freeze_with_3d_patch: bool = False
    mask_padded_words: bool = False
    mask_padded_frames: bool = False
    precision: Literal["fp32", "fp16"] = "fp32"


@dataclass(frozen=True)
class TemporalConfig:
    """What runs over a video's frames: `agg_module` and the number of its transformer layers.

    `temporal_proj` is what `tdb` makes of a difference of frames. `mask_differences` hides the difference
    with a padded frame, which officially counts (ledger 4). `mixed_head_masks` repeats CLIP2Video's
    slip: with two attention heads or more a video takes masks of others in its batch (ledger 3).
    """

    agg_module: Literal["meanP", "seqLSTM", "seqTransf", "tdb"] = "seqTransf"
    layers: PositiveInt = 4
    temporal_proj: Literal["default", "sigmoid_mlp", "sigmoid_selfA"] = "sigmoid_selfA"
    mask_differences: bool = False
    mixed_head_masks: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """All that `create_model` needs. `head` is the dataclass of the head that `head.name` names."""

    towers: TowersConfig
    temporal: TemporalConfig
    head: Any
    max_words: PositiveInt = 32
    max_frames: PositiveInt = 12


@dataclass(frozen=True)
class GenerateConfig:
    """Generated clips (see `xclip_lab.synthetic`). `size` is the side in pixels, `level_shares` the share of
    the levels 1 to 4; clips of level 4 have three times `frames`. Things move every `hold` frames: a sampler
    that takes one frame of each `hold` then sees the same set of pictures in both clips of a pair."""

    train_clips: PositiveInt = 2000
    val_clips: NonNegativeInt = 0
    test_clips: PositiveInt = 200
    size: PositiveInt = 64
    frames: PositiveInt = 16
    hold: PositiveInt = 2
    fps: PositiveFloat = 8.0
    level_shares: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (
        1.0,
        1.0,
        1.0,
        0.0,
    )
    seed: Seed = 0


@dataclass(frozen=True)
class DataConfig:
    """Which clips, and how frames are taken from them.

    `root` is where the annotations lie, `videos` where the videos or folders of frames do (null: below
    `root`), `family` whose official loader's rules hold (null: whatever any of them accepts; see
    `datasets.Source`). `captions` `one` draws one caption of each video an epoch in place of all its pairs.
    `allow_overlap` videos of validation and test may be among the training videos; a result says how many.

    `sampler` `official` (CLIP4Clip's and X-CLIP's) and `glscl` take `feature_framerate` frames a second,
    `clip2video` of 5 a second one in `feature_framerate`; then `slice_framepos` (0 head, 1 tail, 2 uniform)
    cuts them to `max_frames` (ledger 8). `uniform` takes `max_frames` evenly spaced in time.
    `frame_order`: 0 as is, 1 reversed, 2 shuffled. `frame_jitter` moves training frames at random
    (CLIP2Video), `augment` changes their pixels (GLSCL).

    `on_error` `skip` leaves out broken videos and counts them. `preload` decodes every video once, before the
    first step, and keeps it in memory as uint8. `store` is a folder that keeps decoded frames for all runs
    (`xclip_lab.store`): `raw`, or in a tenth of the room and not quite the same as `jpeg`. `features` is a
    folder of the towers' outputs (`xclip-lab embed`): the towers stay as they are, what follows them trains.
    `group_batches` keeps captions that differ in one respect only (generated pairs) in one batch, as hard
    negatives. `generate` says how generated clips are made.
    """

    dataset: str = "folder"
    root: str = "data"
    videos: str | None = None
    protocol: str | None = None
    family: Family | None = None
    captions: Literal["all", "one"] = "all"
    train_split: str = "train"
    val_split: str | None = "val"
    test_split: str = "test"
    allow_overlap: NonNegativeInt = 0
    sampler: Literal["official", "clip2video", "glscl", "uniform"] = "official"
    feature_framerate: PositiveInt = 1
    slice_framepos: Literal[0, 1, 2] = 2
    frame_order: Literal[0, 1, 2] = 0
    frame_jitter: bool = False
    augment: Literal["none", "randaugment"] = "none"
    workers: NonNegativeInt = 2
    on_error: Literal["raise", "skip"] = "raise"
    preload: bool = False
    store: str | None = None
    store_format: Literal["raw", "jpeg"] = "raw"
    features: str | None = None
    group_batches: bool = False
    generate: GenerateConfig = field(default_factory=GenerateConfig)


@dataclass(frozen=True)
class OptimConfig:
    """`official` is BertAdam with all its oddities, as the papers ran it; `modern` is AdamW with
    correct decay groups, bias correction and a cosine that starts after the warm-up.

    `lr` is for new modules; what lies in CLIP's towers gets `lr * coef_lr`. `schedule_epochs` is how many
    epochs the schedule is laid out for, null for those that are trained; GLSCL's code always has 5, and its
    rate rises again in a longer run (ledger 10).
    """

    recipe: Literal["official", "modern"] = "official"
    lr: PositiveFloat = 1e-4
    coef_lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.2
    warmup_proportion: ClosedUnitInterval = 0.1
    schedule_epochs: PositiveInt | None = None
    beta1: UnitIntervalBelowOne = 0.9
    beta2: UnitIntervalBelowOne = 0.98
    eps: PositiveFloat = 1e-6
    max_grad_norm: PositiveFloat = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """The loop. `batch_size` pairs a step, in `accumulate` parts whose gradients are averaged (the official
    accumulation: negatives come from one part only). `max_steps` ends early. `select` is the metric that
    chooses the best checkpoint, on `data.val_split`. `checkpoint_every` and `log_every` count steps.

    `tower_chunk` pairs at a time pass the towers in each process; null: all, or, where the free memory does
    not hold the activations of so many, as many as it holds. In chunks each pair passes twice, and the
    gradients are the same but for rounding (`xclip_lab.cached`). `precision` `bf16` is autocast of the
    towers and of the transformers that are added to them; all else and the weights stay float32.

    With torchrun `batch_size` is that of all processes together, and `gather_gradients` `exact` gives what
    one process would with the whole batch; `official` gives the towers 1 / processes of it (ledger 7).

    `init` gives the model other weights to start from than `towers.pretrained`: all of its own, from a run
    folder, a checkpoint of ours or an official file (`pytorch_model.bin.N`).
    """

    epochs: PositiveInt = 5
    batch_size: PositiveInt = 128
    accumulate: PositiveInt = 1
    tower_chunk: PositiveInt | None = None
    max_steps: PositiveInt | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    gather_gradients: Literal["exact", "official"] = "exact"
    init: str | None = None
    select: SelectionMetric = "t2v/R@1"
    checkpoint_every: PositiveInt = 500
    log_every: PositiveInt = 10
    device: str = "auto"


@dataclass(frozen=True)
class EvaluationConfig:
    """`batch_size` clips are encoded at once; `block_size` texts and videos scored at once (null: what suits
    the head). `similarity` is where the matrix of all scores is kept: `auto` takes the disk for one that
    needs more than a quarter of the free memory; with `none` a result has ranks, metrics and each caption's
    first ten videos alone. `bootstrap` draws give the intervals. `allow_missing` videos may be absent or
    unreadable; the result then says so.

    `rerank` puts a re-ranked result beside the raw one. `dual_softmax` uses all evaluated queries at once, at
    `rerank_temperature`. `qb_norm` uses another split's captions and videos, `query_bank` (null:
    `data.train_split`), which must never contain what is evaluated; `qb_beta` is its inverse temperature, and
    it acts on what at least `qb_theta` queries of the bank find among their first `qb_k`. Both temperatures
    are for cosines: where a similarity carries CLIP's scale, that is divided out first.
    """

    batch_size: PositiveInt = 32
    block_size: PositiveInt | None = None
    similarity: Literal["auto", "memory", "disk", "none"] = "auto"
    ties: Literal["pessimistic", "optimistic", "mean", "official"] = "pessimistic"
    bootstrap: NonNegativeInt = 1000
    allow_missing: NonNegativeInt = 0
    rerank: Literal["none", "dual_softmax", "qb_norm"] = "none"
    rerank_temperature: PositiveFloat = 0.01
    query_bank: str | None = None
    qb_beta: PositiveFloat = 20.0
    qb_k: PositiveInt = 1
    qb_theta: PositiveInt = 1


@dataclass(frozen=True)
class RunConfig:
    """Everything of a run, resolved. `max_words` and `max_frames` as in the papers."""

    preset: str
    seed: Seed
    max_words: PositiveInt
    max_frames: PositiveInt
    towers: TowersConfig
    temporal: TemporalConfig
    head: Any
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    evaluation: EvaluationConfig

    @property
    def model(self) -> ModelConfig:
        """The part that `create_model` takes."""
        return ModelConfig(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(ModelConfig)}
        )

    def with_model(self, model: ModelConfig) -> RunConfig:
        """The same run with the model part of another config, such as that of a loaded checkpoint."""
        return dataclasses.replace(
            self, **{f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
        )


_DEFAULT_HEAD = "xclip"
_SECTIONS = {
    "towers": TowersConfig,
    "temporal": TemporalConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "evaluation": EvaluationConfig,
}
_SCALARS: dict[str, tuple[Any, Any]] = {
    "seed": (Seed, 0),
    "max_words": (PositiveInt, 32),
    "max_frames": (PositiveInt, 12),
}


def load_config(preset: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The resolved configuration of a run.

    Args:
        preset: a preset's name, or the path of a YAML file (such as a run's `config.yaml`).
        overrides: dotted keys to values, such as `{"head.temperature": 0.1}`. Another `head.name` than the
            preset's starts from that head's defaults: the preset's settings of its own head fall away. Its
            `towers` and `temporal` stay, with what its own method switches on there (`Head.official`).

    Raises:
        ConfigError: unknown preset, key or value; says which, what is allowed and the nearest right spelling.

    >>> load_config("quickstart", {"head.temperature": 0.1}).head.temperature
    0.1
    """
    if not isinstance(overrides, Mapping | None):
        raise ConfigError(
            f"overrides: {overrides!r} is not allowed (expected dotted keys to values, as a dict)"
        )
    values, name = preset_values(preset)
    over: dict[str, Any] = {}
    for key, value in (overrides or {}).items():
        over = merge(over, nest(str(key), value))
    if _head_name(over) not in (None, _head_name(values) or _DEFAULT_HEAD):
        values.pop("head", None)
    config = config_from_dict(merge(values, over), name)
    check_names(config, over)
    return config


def config_from_dict(values: Mapping[str, Any], preset: str = "custom") -> RunConfig:
    """Validate nested plain values into a RunConfig; what is not given keeps its default."""
    values = dict(values)
    preset = values.pop("preset", preset)
    sections = {key: values.pop(key, None) for key in [*_SECTIONS, "head"]}
    sections = {key: {} if value is None else value for key, value in sections.items()}
    scalars = {key: check(key, hint, values.pop(key, default)) for key, (hint, default) in _SCALARS.items()}
    everywhere = _all_keys()
    if values:
        raise unknown_key(next(iter(values)), [*_SECTIONS, "head", *_SCALARS], everywhere)
    refuse_head_as_agg_module(sections["temporal"])
    built = {key: build(cls, sections[key], key, everywhere) for key, cls in _SECTIONS.items()}
    head = _build_head(sections["head"], everywhere)
    config = RunConfig(preset=preset, head=head, **scalars, **built)
    check_together(config)
    return config


def model_config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from nested plain values, validated as `config_from_dict` does."""
    return config_from_dict(values).model


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain values; `config_from_dict` takes them back."""
    return plain(dataclasses.asdict(config))


def default_values(head: str) -> dict[str, Any]:
    """Every setting of a run with that head where none is given. They need not make sense together."""
    everywhere = _all_keys()
    sections = {key: to_dict(build(cls, {}, key, everywhere)) for key, cls in _SECTIONS.items()}
    scalars = {key: default for key, (_, default) in _SCALARS.items()}
    return {**scalars, **sections, "head": to_dict(_build_head({"name": head}, everywhere))}


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the resolved config as YAML, whole or not at all; `load_config(path)` reads it."""
    write_text(Path(path), yaml.safe_dump(to_dict(config), sort_keys=False))


def _head_name(values: Mapping[str, Any]) -> Any:
    """What nested values say of `head.name`, None where they say nothing."""
    head = values.get("head")
    return head.get("name") if isinstance(head, Mapping) else None


def _build_head(values: Any, everywhere: list[str]) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"head: {values!r} is not allowed (expected keys such as head.name)")
    name = check("head.name", str, values.get("name", _DEFAULT_HEAD))
    return build(HEADS[name].config_class, values, "head", everywhere)


def _all_keys() -> list[str]:
    keys = list(_SCALARS)
    for prefix, cls in _SECTIONS.items():
        keys += leaf_names(cls, prefix)
    for name in HEADS.names():
        keys += leaf_names(HEADS[name].config_class, "head")
    return keys
