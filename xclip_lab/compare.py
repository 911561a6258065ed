"""Runs beside each other: recalls by level, tests of every pair, and what one finds and another misses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from xclip_lab import study
from xclip_lab.checkpoint import load_model
from xclip_lab.clips import ClipDataset
from xclip_lab.cost import scoring_cost
from xclip_lab.entries import Entry, check_trainings
from xclip_lab.errors import CheckpointError
from xclip_lab.metrics import ranks
from xclip_lab.paired import (
    LEVEL,
    detectable_paired,
    detectable_unpaired,
    holm,
    paired_test,
    recall_margin,
    seed_test,
)
from xclip_lab.result import Result
from xclip_lab.stats import cluster_mean_interval
from xclip_lab.synthetic import ClipTruth

Seeds = Result | Sequence[Result]
"""The result of one training, or of several that differ in the seed only."""
_DASH = "\u2013"


def _check(results: Mapping[str, Seeds]) -> dict[str, list[Result]]:
    """Each side as a list, once all are known to answer the same question."""
    lists = {name: [side] if isinstance(side, Result) else list(side) for name, side in results.items()}
    check_trainings(lists)
    return lists


def _ranks(result: Result) -> np.ndarray:
    """`[T]`, one a caption and ties against it, whatever the result's own way with ties.

    Raises:
        ResultError: a result without scores that has another way with ties.
    """
    if result.stamp["ties"] == "pessimistic":
        return result.ranks["t2v"]
    return ranks(result.similarity, result.text_to_video)["t2v"]


def _hits(results: Sequence[Result]) -> np.ndarray:
    """Bool `[seeds, T]`: the caption's video comes first."""
    return np.stack([_ranks(result) == 1 for result in results])


def pairwise(results: Mapping[str, Seeds]) -> pd.DataFrame:
    """Text-to-video R@1 of every two models on the same captions, tested.

    With several seeds, a caption's hits are averaged over them: difference, interval and `p` speak of other
    captions put to these very trainings; `p_seeds` of other trainings.

    Returns:
        A row a pair: `a`, `b`, their `R@1 a`, `R@1 b` (percent); `difference` (a - b, points) with its 95%
        interval `low`, `high`, not corrected; `queries`, `discordance`, `detectable`, `p` and `p_mcnemar` as
        `PairedTest`; `seeds a`, `seeds b`, how many; `sd_a`, `sd_b`, `share` and `p_seeds` as `SeedTest`;
        `p_holm`, `p_seeds_holm`, corrected for all pairs; `verdict`, in words.

    Raises:
        DatasetError: results of unlike protocols or galleries. MetricError: fewer than two videos.
    """
    sides = _check(results)
    hits = {name: _hits(side) for name, side in sides.items()}
    rows = [
        {"a": a, "b": b} | _row(hits[a], hits[b], _query_clusters(sides[a][0]))
        for a, b in itertools.combinations(sides, 2)
    ]
    table = pd.DataFrame(rows)
    if rows:
        table["p_holm"], table["p_seeds_holm"] = holm(table["p"]), holm(table["p_seeds"])
        table["verdict"] = [_verdict(row) for row in table.to_dict("records")]
    return table


def _query_clusters(result: Result) -> np.ndarray:
    return result.clusters[result.text_to_video]


def _row(hits_a: np.ndarray, hits_b: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
    test = paired_test(hits_a, hits_b, clusters)
    recalls_a, recalls_b = 100.0 * hits_a.mean(1), 100.0 * hits_b.mean(1)
    seeds = seed_test(recalls_a, recalls_b, test.error)
    return {
        "R@1 a": recalls_a.mean(),
        "R@1 b": recalls_b.mean(),
        "difference": test.difference.value,
        "low": test.difference.low,
        "high": test.difference.high,
        "queries": test.queries,
        "discordance": test.discordance,
        "detectable": test.detectable,
        "p": test.p,
        "p_mcnemar": test.p_mcnemar,
        "seeds a": len(hits_a),
        "seeds b": len(hits_b),
        "sd_a": seeds.sd_a,
        "sd_b": seeds.sd_b,
        "share": seeds.share,
        "p_seeds": seeds.p,
    }


def _verdict(row: Mapping[str, Any]) -> str:
    if not row["p_holm"] < LEVEL:
        return f"no difference shown; one below {row['detectable']:.1f} points could be missed"
    better = f"{row['a'] if row['difference'] > 0 else row['b']} finds more"
    trained = f"{row['seeds a']} + {row['seeds b']} trainings"
    if row["p_seeds_holm"] < LEVEL:
        return f"{better}, over the seeds too ({trained})"
    if min(row["seeds a"], row["seeds b"]) == 1:
        return f"{better}, as trained here; one training a side says nothing of others"
    return f"{better}, as trained here; {trained} do not show that others would"


def shown(tests: pd.DataFrame) -> Styler:
    """`pairwise` for a reader: p-values as one writes them, and no column in which nothing is known."""
    rows = [
        {
            "pair (a \u2212 b)": f"{row['a']} \u2212 {row['b']}",
            "difference [95%]": f"{row['difference']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]",
            "McNemar p": p_text(row["p_mcnemar"]),
            "p": p_text(row["p"]),
            "Holm p": p_text(row["p_holm"]),
            "SD of seeds a": _or_dash(row["sd_a"], ".1f"),
            "b": _or_dash(row["sd_b"], ".1f"),
            "share": _or_dash(row["share"], ".0%"),
            "p over seeds": p_text(row["p_seeds"]),
            "verdict": row["verdict"],
        }
        for row in tests.to_dict("records")
    ]
    table = pd.DataFrame(rows)
    table = table.loc[:, (table != _DASH).any()]
    style = table.style.format(escape="html").hide(axis="index").set_properties(**{"text-align": "left"})
    style = style.set_properties(subset=list(table.columns[1:-1]), **{"white-space": "nowrap"})
    return style.set_table_styles([{"selector": "th", "props": "text-align: left"}])


def p_text(p: float) -> str:
    """A p-value in three decimals.

    >>> p_text(0.0301), p_text(1e-9)
    ('0.030', '< 0.001')
    """
    return "< 0.001" if p < 0.001 else _or_dash(p, ".3f")


def _or_dash(value: float, how: str) -> str:
    return _DASH if math.isnan(value) else format(value, how)


def sensitivity(tests: pd.DataFrame) -> pd.DataFrame:
    """How small a difference of R@1 could be seen, here and with the 1,000 queries of MSR-VTT 1k-A.

    Args:
        tests: of `pairwise`.

    Returns:
        A row a gallery: `queries` (here the median over pairs of the independent ones), `R@1` (here the mean,
        there X-CLIP's published one), `margin` (half its 95% interval), the least detectable difference in
        points of two models on the same queries that disagree on 10, 20 or 40% of them (`paired 10%` ...),
        and of two recalls from unlike sources (`unpaired`).
    """
    here = tests["queries"].median(), tests[["R@1 a", "R@1 b"]].to_numpy().mean()
    rows = {}
    for name, (queries, recall) in {"this gallery": here, "MSR-VTT 1k-A": (1000.0, 46.1)}.items():
        rows[name] = {"queries": queries, "R@1": recall, "margin": recall_margin(recall, queries)}
        rows[name] |= {f"paired {share}%": detectable_paired(queries, share) for share in (10, 20, 40)}
        rows[name] |= {"unpaired": detectable_unpaired(queries, recall)}
    return pd.DataFrame.from_dict(rows, orient="index")


def disagreements(a: Result, b: Result) -> pd.DataFrame:
    """The captions whose video exactly one of two models puts first; first those that the other misses most.

    Returns:
        Indexed by the caption's row: `right` (`a` or `b`), `rank_a`, `rank_b`, `caption`, `video`, and
        `instead`, the video that the other model puts first.

    Raises:
        DatasetError: results of unlike protocols or galleries.
    """
    _check({"a": a, "b": b})
    rank_a, rank_b = _ranks(a), _ranks(b)
    rows = np.flatnonzero((rank_a == 1) != (rank_b == 1))
    rows = rows[np.argsort(-np.maximum(rank_a, rank_b)[rows], kind="stable")]
    right = np.where(rank_a[rows] == 1, "a", "b")
    columns = [
        _first_other(b if side == "a" else a, row) for side, row in zip(right, rows.tolist(), strict=True)
    ]
    return pd.DataFrame(
        {
            "right": right,
            "rank_a": rank_a[rows],
            "rank_b": rank_b[rows],
            "caption": [a.captions[row] for row in rows],
            "video": [a.videos[a.text_to_video[row]] for row in rows],
            "instead": [a.videos[column] for column in columns],
        },
        index=rows,
    )


def _first_other(result: Result, row: int) -> int:
    """The best column of a caption beside its own video's (ties stand before that)."""
    own = result.text_to_video[row]
    if result.top is not None:
        return int(result.top[row][result.top[row] != own][0])
    others = result.similarity[row].copy()
    others[own] = -np.inf
    return int(others.argmax())


def table(entries: Mapping[str, Entry], clips: ClipDataset | None) -> pd.DataFrame:
    """A row a model and level: text-to-video R@1 in the full gallery, and what scoring costs.

    All answer the same captions, so the gain over the first one is paired: caption by caption. The intervals
    are bootstrapped over clips, with each caption's hits averaged over the seeds. They say what other
    captions would give, not what other seeds would: for that stand `seed_min` and `seed_max`.

    Args:
        clips: of `open_clips`; generated ones know their levels.

    Returns:
        Columns `method`, `level` (`all` first), `captions`, `seeds`; `R@1` with its 95% interval `low`,
        `high`, and its range over seeds; `gain`, `gain_low`, `gain_high` over the first one, in points;
        `gmac` (of 1,000 texts with 1,000 videos, after the towers) and `parameters` (beside the towers), NaN
        without a checkpoint.
    """
    truth = study.find_truth(clips.config, clips.dataset.split) if clips else {}
    rows: list[dict[str, Any]] = []
    reference: np.ndarray | None = None
    for name, entry in entries.items():
        hits = 100.0 * _hits(entry.results)
        reference = hits.mean(0) if reference is None else reference
        of_entry = {"method": name, "seeds": len(hits), **_size(entry)}
        rows += [of_entry | row for row in _level_rows(entry.results[0], truth, hits, reference)]
    return pd.DataFrame(rows)


def _size(entry: Entry) -> dict[str, float]:
    try:
        model = load_model(entry.run_dir or "")
    except CheckpointError:
        return {"gmac": math.nan, "parameters": math.nan}
    of_towers = sum(parameter.numel() for parameter in model.clip.parameters())
    everything = sum(parameter.numel() for parameter in model.parameters())
    return {"gmac": scoring_cost(model).gmac(1000, 1000), "parameters": everything - of_towers}


def _level_rows(
    result: Result, truth: Mapping[str, ClipTruth], hits: np.ndarray, reference: np.ndarray
) -> Iterator[dict[str, Any]]:
    """R@1 of all captions and of each level, from the `hits [seeds, captions]` of one model, in percent."""
    clusters = _query_clusters(result)
    for name, chosen in study.level_groups(result, truth).items():
        own, by_seed = hits[:, chosen].mean(0), hits[:, chosen].mean(1)
        recall = cluster_mean_interval(own, clusters[chosen])
        gain = cluster_mean_interval(own - reference[chosen], clusters[chosen])
        yield {
            "level": name,
            "captions": int(chosen.sum()),
            "R@1": recall.value,
            "low": recall.low,
            "high": recall.high,
            "seed_min": by_seed.min(),
            "seed_max": by_seed.max(),
            "gain": gain.value,
            "gain_low": gain.low,
            "gain_high": gain.high,
        }
