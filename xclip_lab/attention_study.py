"""Attention as a study: every map of every model, every measure, baselines and controls, with intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from xclip_lab import attention_scores as scores
from xclip_lab import study
from xclip_lab.attention import Explanation, explain
from xclip_lab.attention_maps import BASELINES, Pair, PairMaps, each_pair, pair_maps
from xclip_lab.clips import Clip, FrameStore
from xclip_lab.config import RunConfig
from xclip_lab.datasets import VideoTextDataset
from xclip_lab.errors import ConfigError
from xclip_lab.evaluation import video_clusters
from xclip_lab.model import RetrievalModel, evaluating
from xclip_lab.pointing import CONTENT_CLASSES
from xclip_lab.stats import Interval, cluster_mean_interval
from xclip_lab.synthetic import ClipTruth

OF_TRUTH = {"pointing": scores.pointing, "mass": scores.mass, "precision_recall": scores.precision_recall}
SHUFFLED = "shuffled truth"
COLUMNS = ["model", "map", "measure", "word_class", "removed", "value", "low", "high", "n"]


def attention_study(
    models: Mapping[str, RetrievalModel],
    dataset: VideoTextDataset,
    truth: Mapping[str, ClipTruth],
    config: RunConfig,
    store: FrameStore | None = None,
    most: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Score all maps (`attention_maps.maps_of`) of all models on the matching pairs of a split.

    Measures, of 0 to 1 where nothing else is said:

    - `pointing`, `mass`, `precision_recall`: of each word's row against the frames that the word speaks of
      (`attention_scores`), by word class, and for the `content` classes together. Order and function words
      have no frames of their own; they are held against those of the clause that they introduce. `mass` is
      for weights only.
    - `padding`: the share of the attention on padded words or frames.
    - `emphasis`: of weights over words, by class, and of the two `marks`; 1 is the share that the class has
      of the tokens.
    - `insertion`, `deletion`: whether the logit rises as the frames that the map puts first come, and falls
      as they go (taken out as if the clip had never had them); 0 the worst order, 1 the best.
    - `insertion_curve`, `deletion_curve`: the logit less that of the whole clip, after so many frames were
      `removed`; in units of the logit.
    - `stability`: rank correlation with the same map of the first model, -1 to 1.

    Args:
        models: by name; the first is also scored against a truth laid over the frames in random order, as
            the model `<name>, shuffled truth`. truth: by video id; without any, what needs none is scored.
        store: frames decoded before. most: the first so many captions; None for all.

    Returns:
        Tidy: model, map, measure, word_class (`all` where words play no part), removed (of the curves),
        value, low and high (95%, clustered by video pair; NaN with one pair), n values. What is not defined
        for a map has no row.

    Raises:
        ConfigError: no model.
    """
    if not models:
        raise ConfigError("attention_study needs a model")
    groups = None if dataset.groups is None else dataset.groups[:most]
    dataset = dataclasses.replace(dataset, samples=dataset.samples[:most], groups=groups)
    clusters = dict(zip(dataset.videos, video_clusters(dataset).tolist(), strict=True))
    tables = []
    reference: list[PairMaps] = []
    for name, model in models.items():
        batches = pair_maps(model, dataset, config, store)
        seen = list(tqdm(batches, f"attention of {name}", unit="batch", disable=not progress, leave=False))
        rows = [row for pair in each_pair(seen, dataset) for row in _pair_rows(model, pair, truth)]
        tables.append(_summary(rows, clusters).assign(model=name))
        if not reference:
            reference = seen
            shuffled = [row for pair in each_pair(seen, dataset) for row in _truth_rows(pair, truth, True)]
            tables.append(_summary(shuffled, clusters).assign(model=f"{name}, {SHUFFLED}"))
        else:
            pairs = zip(each_pair(reference, dataset), each_pair(seen, dataset), strict=False)
            rows = [row for first, second in pairs for row in _stability_rows(first, second)]
            tables.append(_summary(rows, clusters).assign(model=name))
    return pd.concat(tables, ignore_index=True)[COLUMNS]


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """Whether maps point at the truth: the interval of a map's accuracy on content words lies above that of
    the uniform map, and its value is at least 1.5 times as high.

    Args:
        table: of `attention_study`.

    Returns:
        A row a model and map: `pointing`, `low`, `high`, `chance`, `points`; none without truth.
    """
    found = table[(table["measure"] == "pointing") & (table["word_class"] == "content")]
    found = found.set_index(["model", "map"])[["value", "low", "high"]].rename(columns={"value": "pointing"})
    uniform = found["pointing"][found.index.get_level_values("map") == "uniform"].droplevel("map")
    found["chance"] = uniform.reindex(found.index.get_level_values("model")).to_numpy()
    found["points"] = (found["low"] > found["chance"]) & (found["pointing"] >= 1.5 * found["chance"])
    return found[found.index.get_level_values("map") != "uniform"]


def overview(table: pd.DataFrame) -> pd.DataFrame:
    """A row a model and map, a column a measure: content words, or all where words play no part. NaN where a
    measure is not defined for a map."""
    rows = table[table["word_class"].isin(["content", "all"]) & ~table["measure"].str.endswith("_curve")]
    return rows.pivot_table("value", ["model", "map"], "measure", sort=False)


def report(table: pd.DataFrame) -> str:
    """What the numbers say, in lines: which maps point, and whether the first model's best one is better than
    the baselines. A difference counts where the 95% intervals lie apart."""
    lines = []
    found = verdicts(table)
    for model in found.index.unique("model"):
        rows = found.loc[model]
        for points, verdict in ((True, "points at the truth"), (False, "does not point")):
            names = [
                f"{name} {row['pointing']:.2f}" for name, row in rows[rows["points"] == points].iterrows()
            ]
            lines.append(f"{model}: {verdict}: {', '.join(names) or 'none'}")
        lines[-1] += f" (chance {rows['chance'].iloc[0]:.2f})"
    first = table[table["model"] == table["model"].iloc[0]]
    for measure in ("pointing", "deletion"):
        rows = first[(first["measure"] == measure) & first["word_class"].isin(["content", "all"])]
        rows = rows.set_index("map")
        own = rows["value"].drop(list(BASELINES), errors="ignore")
        if len(own):
            best = rows.loc[own.idxmax()]
            against = [f"{_against(best, rows.loc[name])} {name}" for name in BASELINES if name in rows.index]
            lines.append(f"{measure}: {own.idxmax()} {best['value']:.2f} {', '.join(against)}")
    return "\n".join(lines)


def _against(one: pd.Series, other: pd.Series) -> str:
    higher, lower = one["low"] > other["high"], one["high"] < other["low"]
    verdict = "is above" if higher else "is below" if lower else "is not told apart from"
    return f"{verdict} {other['value']:.2f} of"


def models_to_compare(
    model: RetrievalModel, config: RunConfig, others: Sequence[str | Path] = ()
) -> dict[str, RetrievalModel]:
    """What a study of one model takes: the model, the same method trained with other seeds, the same weights
    with padding masked where the head can, and a model fresh from its config as a control.

    Args:
        others: checkpoints, as `study.open_model` takes them.

    Raises:
        CheckpointError: as `study.open_model`.
    """
    models = {"this model": model}
    models |= {Path(other).name: study.open_model(other, config)[0] for other in others}
    masked = with_masked_padding(model)
    if masked is None:
        print("head.mask_padding: this head has no such switch, or has it on; no faithful model beside it")
    else:
        models["padding masked"] = masked
    return models | {"untrained": study.untrained_model(config).to(next(model.parameters()).device).eval()}


def explain_if_possible(model: RetrievalModel, clip: Clip) -> Explanation | None:
    """`attention.explain`; None, and a line that says so, for a model whose logit is not taken apart."""
    try:
        return explain(model, clip)
    except ConfigError as error:
        print(f"left out: {error}")
        return None


def with_masked_padding(model: RetrievalModel) -> RetrievalModel | None:
    """The same weights in a model whose head leaves padding out; None where a head has no such switch or has
    it on already."""
    head = model.config.head
    if getattr(head, "mask_padding", True):
        return None
    config = dataclasses.replace(model.config, head=dataclasses.replace(head, mask_padding=True))
    masked = RetrievalModel(config, load_pretrained=False)
    masked.load_state_dict(model.state_dict())
    masked.origin = model.origin
    return masked.to(next(model.parameters()).device).eval()


def word_frames(classes: list[str], own: np.ndarray) -> np.ndarray:
    """Bool `[n_words, F]`: a content word's own frames; of an order or function word those of the clause that
    it introduces, which are those of the next content word."""
    found = own.copy()
    for word in reversed(range(len(classes) - 1)):
        if classes[word] not in CONTENT_CLASSES:
            found[word] = found[word + 1]
    return found


class _Row(NamedTuple):
    video_id: str
    map: str
    measure: str
    word_class: str
    removed: int
    value: float


def _pair_rows(model: RetrievalModel, pair: Pair, truth: Mapping[str, ClipTruth]) -> Iterator[_Row]:
    yield from _truth_rows(pair, truth)
    yield from _weight_rows(pair, truth)
    if pair.frames > 1:
        yield from _removal_rows(model, pair)


def _truth_rows(pair: Pair, truth: Mapping[str, ClipTruth], shuffled: bool = False) -> Iterator[_Row]:
    """Measures against the truth, of the words that have frames and not all."""
    if pair.video_id not in truth:
        return
    about = truth[pair.video_id]
    own = about.at(pair.timestamps)
    if shuffled:
        own = own[:, np.random.default_rng(pair.place).permutation(pair.frames)]
    own = word_frames(about.classes, own)[: pair.words.max() + 1]
    scored = np.flatnonzero(own.any(1) & ~own.all(1))
    for name, found in pair.seen.maps.items():
        if found.axes == "words":
            continue
        rows = pair.word_rows(name)[scored]
        padded = np.pad(own[scored], ((0, 0), (0, rows.shape[1] - pair.frames)))
        for measure, function in OF_TRUTH.items():
            if measure == "mass" and not found.over:
                continue
            # Of a share padding is a part; the rest is among the real frames.
            args = (rows, padded) if measure == "mass" else (rows[:, : pair.frames], own[scored])
            values = function(*args)
            for word, value in zip(scored, values, strict=True):
                yield _Row(pair.video_id, name, measure, about.classes[word], 0, value)


def _weight_rows(pair: Pair, truth: Mapping[str, ClipTruth]) -> Iterator[_Row]:
    """Where weights lie, whatever the frames show: on padding, on which class of words."""
    tokens = pair.tokens
    for name, found in pair.seen.maps.items():
        if not found.over:
            continue
        share = scores.padding_share(pair.values(name), tokens, pair.frames, found.over)
        yield _Row(pair.video_id, name, "padding", "all", 0, share)
        if found.axes != "words" or pair.video_id not in truth:
            continue
        classes = np.array([*truth[pair.video_id].classes, "marks"])[pair.words[:tokens]]
        weights = pair.values(name)[:tokens, 0]
        for word_class in np.unique(classes):
            of_class = classes == word_class
            emphasis = weights[of_class].sum() / weights.sum() / of_class.mean()
            yield _Row(pair.video_id, name, "emphasis", str(word_class), 0, emphasis)


def _removal_rows(model: RetrievalModel, pair: Pair) -> Iterator[_Row]:
    generator = np.random.default_rng(pair.place)
    names = [name for name, found in pair.seen.maps.items() if found.axes != "words"]
    orders = [scores.order_of(pair.word_rows(name).mean(0)[: pair.frames], generator) for name in names]
    result = scores.removal(_Logit(model, pair), orders)
    whole = result.kept[0, -1]
    for number, name in enumerate(names):
        yield _Row(pair.video_id, name, "insertion", "all", 0, result.insertion[number])
        yield _Row(pair.video_id, name, "deletion", "all", 0, result.deletion[number])
        for step in range(pair.frames):
            kept, removed = result.kept[number, -1 - step] - whole, result.removed[number, step] - whole
            yield _Row(pair.video_id, name, "insertion_curve", "all", step, kept)
            yield _Row(pair.video_id, name, "deletion_curve", "all", step, removed)


class _Logit:
    """The logit of a pair's caption with its clip as it would be with some of its frames only."""

    def __init__(self, model: RetrievalModel, pair: Pair) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.text = pair.seen.text[pair.row : pair.row + 1].to(self.device)
        self.features = pair.seen.features[pair.row].to(self.device)
        size = model.image_size
        blank = torch.zeros(1, 1, 3, size, size, device=self.device)
        with evaluating(model):  # a padded frame is zeros to the image tower
            self.padding = model.frame_features(blank, torch.zeros(1, 1, device=self.device))[0]

    def __call__(self, kept: np.ndarray) -> np.ndarray:
        """Bool `[K, F]` -> `[K]`: the frames that are kept move together, the rest becomes padding."""
        count, frames = len(kept), len(self.features)
        order = torch.from_numpy(np.argsort(~kept, axis=1, kind="stable")).to(self.device)
        mask = (
            torch.arange(frames, device=self.device) < torch.from_numpy(kept.sum(1)).to(self.device)[:, None]
        )
        moved = torch.nn.functional.pad(self.features[order], (0, 0, 0, frames - kept.shape[1]))
        video = torch.where(mask[..., None], moved, self.padding.expand(count, frames, -1))
        with evaluating(self.model):
            logits = self.model.similarity(self.text, self.model.encode_video(video, mask.long()))
        return logits[0].float().cpu().numpy()


def _stability_rows(first: Pair, second: Pair) -> Iterator[_Row]:
    """Rank correlations of the maps that two models have both."""
    if first.place != second.place:
        return
    for name in (name for name in first.seen.maps if name in second.seen.maps):
        if first.seen.maps[name].axes == "words":
            rows = [pair.values(name)[: pair.tokens, 0][None] for pair in (first, second)]
        else:
            rows = [pair.word_rows(name)[:, : pair.frames] for pair in (first, second)]
        if rows[0].shape == rows[1].shape:
            for value in scores.rank_correlation(rows[0], rows[1]):
                yield _Row(first.video_id, name, "stability", "all", 0, value)


def _summary(rows: list[_Row], clusters: Mapping[str, int]) -> pd.DataFrame:
    """Means with their intervals; `content` beside the classes."""
    frame = pd.DataFrame(rows, columns=list(_Row._fields))
    frame = frame[np.isfinite(frame["value"].to_numpy(float))]
    content = frame["word_class"].isin(CONTENT_CLASSES) & frame["measure"].isin(OF_TRUTH)
    frame = pd.concat([frame, frame[content].assign(word_class="content")])
    frame["cluster"] = frame["video_id"].map(clusters)
    keys = ["map", "measure", "word_class", "removed"]
    return pd.DataFrame(
        [
            dict(zip(keys, key, strict=True)) | _interval(group)._asdict() | {"n": len(group)}
            for key, group in frame.groupby(keys, sort=False)
        ],
        columns=[*keys, "value", "low", "high", "n"],
    )


def _interval(group: pd.DataFrame) -> Interval:
    if group["cluster"].nunique() < 2:
        return Interval(float(group["value"].mean()), np.nan, np.nan)
    return cluster_mean_interval(group["value"], group["cluster"])
