"""What the explorer shows, as HTML fragments and figures. Values stand in `title`, so hovering shows them."""

from __future__ import annotations

from functools import cache
from html import escape

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure

from xclip_lab import plots
from xclip_lab.drawing import DARK, MIDDLE, SIMILARITY_MAP, WEIGHT_MAP
from xclip_lab.explorer.gallery import Detail, Gallery, Thumbnails
from xclip_lab.synthetic import ClipTruth

_FRAMES = 6  # of a video in the list; the detail shows all
_BROADEST, _WIDTH, _NARROWEST = 28, 260, 9  # of a column, of a matrix, of a column: pixels
_WORD = 68  # the column of words, pixels
_STEPS = 64  # of a scale of colours

STYLE = f"""<style>
.xl-row {{padding:3px 6px;border-left:5px solid transparent;line-height:17px;font-size:12px}}
.xl-own {{border-left-color:{DARK}}}
.xl-on {{background:rgba(217,200,95,.3)}}
.xl-line {{white-space:nowrap;overflow:hidden;text-overflow:ellipsis}}
.xl-tag {{background:{DARK};color:#fff;border-radius:3px;padding:0 5px;margin:0 3px}}
.xl-strip img,.xl-none {{width:52px;height:52px;margin-right:2px;display:inline-block;vertical-align:top}}
.xl-none {{background:#999}}
.xl-message {{border-left:5px solid #b3261e;padding:4px 8px;font-size:13px;line-height:18px;
  white-space:normal;background:rgba(179,38,30,.08)}}
.xl-message.xl-note {{border-color:{MIDDLE};background:rgba(124,138,143,.12)}}
.xl-message:empty {{display:none}}
.xl-maps {{display:flex;flex-wrap:wrap;gap:14px 16px;align-items:flex-start;line-height:15px;
  font-size:12px}}
.xl-map table {{border-collapse:collapse;table-layout:fixed;width:auto;margin:2px 0}}
.xl-map td,.xl-map th {{padding:0;border:0;background:none;overflow:hidden;white-space:nowrap;
  text-align:center;font-weight:normal;font-size:11px;height:16px;line-height:16px}}
.xl-map td.xl-word {{text-align:right;padding-right:5px;text-overflow:ellipsis}}
.xl-map img,.xl-map .xl-none {{width:100%;margin:0;height:auto;aspect-ratio:1;display:block}}
.xl-map td.xl-true {{box-shadow:inset 0 0 0 1px #fff,inset 0 0 0 2px #000}}
.xl-map td.xl-bar {{text-align:left;padding-left:5px}}
.xl-map td.xl-up {{height:36px;vertical-align:top;padding:2px 2px 0}}
.xl-bar i,.xl-up i {{display:block;background:{DARK}}}
.xl-bar i {{height:10px}}
.xl-scale {{height:8px;margin:2px 0}}
.xl-parts td {{padding:1px 8px 1px 0;font-size:12px;background:none;text-align:left}}
.xl-parts td.xl-number {{text-align:right;font-variant-numeric:tabular-nums}}
.xl-parts td.xl-span {{width:260px;position:relative}}
.xl-parts i {{position:absolute;top:3px;height:11px;background:{MIDDLE}}}
.xl-parts tr:last-child i {{background:{DARK}}}
.xl-parts tr:last-child td {{font-weight:bold;border-top:1px solid {MIDDLE}}}
</style>"""


def message(text: str, note: bool = False) -> str:
    """A line for the reader; an empty text takes no room."""
    return (
        f'<div class="xl-message{" xl-note" if note else ""}" role="status">{escape(text)}</div>'
        if text
        else ""
    )


def result_row(gallery: Gallery, video: str, rank: int, score: float, own: bool, chosen: bool) -> str:
    """A ranked video: its rank, score and caption above some of its frames."""
    place = gallery.column[video]
    classes = "xl-row" + " xl-own" * own + " xl-on" * chosen
    tag = '<span class="xl-tag">own video</span>' if own else ""
    caption = escape(gallery.captions[video])
    return (
        f'<div class="{classes}" data-video="{escape(video)}">'
        f'<div class="xl-line" title="{escape(video)}: {caption}"><b>{rank}</b>&ensp;'
        f'<span class="xl-score" title="similarity">{score:.3f}</span> {tag}&ensp;{caption}</div>'
        f'<div class="xl-strip">{_strip(gallery.thumbnails[place])}</div></div>'
    )


def _strip(small: Thumbnails) -> str:
    count = len(small.files)
    chosen = np.unique(np.linspace(0, count - 1, min(_FRAMES, count)).round().astype(int))
    return "".join(_frame(small, place) for place in chosen)


def _frame(small: Thumbnails, place: int) -> str:
    address = small.addresses[place]
    if not address:
        return f'<span class="xl-none" title="{escape(small.reason)}"></span>'
    time = f"{small.timestamps[place]:.2f} s"
    return f'<img src="{address}" title="{time}" alt="frame at {time}">'


def detail(caption: str, found: Detail, small: Thumbnails, own_frames: np.ndarray | None = None) -> str:
    """The maps of a pair beside each other, each with the frames above their columns, and what adds up.

    Args:
        caption: the video's. own_frames: bool `[W, F]`, what each token speaks of; it is outlined.
    """
    maps = ""
    if found.matrix is not None:
        maps += _map("(a) word-frame similarity", found, found.matrix, SIMILARITY_MAP, small, own_frames)
    if found.explanation is not None:
        of = found.explanation
        top = max(of.over_frames.max(), of.over_words.max())
        maps += _map(
            "(b) stage 1, over frames",
            found,
            of.over_frames,
            WEIGHT_MAP,
            small,
            own_frames,
            (0, top),
            rows=of.word_weights,
        )
        maps += _map(
            "(c) stage 1, over words",
            found,
            of.over_words,
            WEIGHT_MAP,
            small,
            own_frames,
            (0, top),
            columns=of.frame_weights,
        )
    note = f"{small.reason}: its frames are not shown" if small.reason else ""
    return (
        f'<div class="xl-why"><b>why this video</b>&ensp;{escape(caption)}</div>{message(note, note=True)}'
        f'<div class="xl-maps">{maps}'
        f"<div><b>(d) {escape(found.note)}</b>{_parts(found)}</div></div>"
    )


def _map(
    title: str,
    found: Detail,
    values: np.ndarray,
    colours: str,
    small: Thumbnails,
    own_frames: np.ndarray | None,
    limits: tuple[float, float] | None = None,
    rows: np.ndarray | None = None,
    columns: np.ndarray | None = None,
) -> str:
    """A matrix `[W, F]` as a table; `rows [W]` and `columns [F]` are the weights of the second stage."""
    low, high = limits or (float(values.min()), float(values.max()))
    frames = values.shape[1]
    width = max(_NARROWEST, min(_BROADEST, _WIDTH // frames))
    shown = _colours(colours)
    steps = (Normalize(low, high)(values) * (_STEPS - 1)).round().filled(0).astype(int)
    times = ["" if np.isnan(time) else f"{time:.1f}" for time in small.timestamps]
    own = np.zeros(values.shape, bool) if own_frames is None else own_frames
    head = "".join(f"<th>{_frame(small, place)}</th>" for place in range(frames))
    body = ""
    for row, token in enumerate(found.tokens):
        cells = "".join(
            f'<td{" class=xl-true" if own[row, place] else ""} style="background:{shown[steps[row, place]]}" '
            f'title="{escape(token)}, {times[place]} s: {values[row, place]:.4f}"></td>'
            for place in range(frames)
        )
        bar = "" if rows is None else _bar(rows[row], token)
        body += f'<tr><td class="xl-word" title="{escape(token)}">{escape(token)}</td>{cells}{bar}</tr>'
    foot = "".join(f"<td>{time if width > 20 else ''}</td>" for time in times)
    weights = (
        ""
        if columns is None
        else "".join(_up(weight, time) for weight, time in zip(columns, times, strict=True))
    )
    under = f'<tr><td class="xl-word">stage 2</td>{weights}</tr>' if weights else ""
    last = '<col style="width:56px">' if rows is not None else ""
    over = "<th>stage 2</th>" if rows is not None else ""
    scale = ",".join([*shown[:: _STEPS // 8], shown[-1]])
    return (
        f'<div class="xl-map" data-map="{title[1]}"><b>{title}</b><table>'
        f"<colgroup><col style=width:{_WORD}px>{f'<col style=width:{width}px>' * frames}{last}</colgroup>"
        f"<tr><td></td>{head}{over}</tr>"
        f"{body}{under}"
        f'<tr><td class="xl-word">time (s)</td>{foot}</tr></table>'
        f'<div style="margin-left:{_WORD}px;width:{width * frames}px"><div class="xl-scale" '
        f'style="background:linear-gradient(90deg,{scale})"></div>'
        f'<span>{low:.2f}</span><span style="float:right">{high:.2f}</span></div></div>'
    )


def _bar(weight: float, token: str) -> str:
    return (
        f'<td class="xl-bar" title="{escape(token)}, stage 2: {weight:.4f}">'
        f'<i style="width:{100 * min(1, max(0, weight)):.0f}%"></i></td>'
    )


def _up(weight: float, time: str) -> str:
    return (
        f'<td class="xl-up" title="{time} s, stage 2: {weight:.4f}">'
        f'<i style="height:{32 * min(1, max(0, weight)):.0f}px"></i></td>'
    )


def _parts(found: Detail) -> str:
    """Each contribution begins where the one before ended; the last line is the logit. Of a head whose logit
    is no such sum the numbers alone."""
    adds_up = found.explanation is not None
    values = [*found.parts.values(), found.logit]
    starts = (
        np.append(np.cumsum([0.0, *found.parts.values()])[:-1], 0.0) if adds_up else np.zeros(len(values))
    )
    ends = starts + values
    low, high = min(0.0, ends.min()), max(0.0, ends.max())
    scale = 100 / ((high - low) or 1.0)
    lines = ""
    for name, value, start in zip([*found.parts, "logit"], values, starts, strict=True):
        left, width = scale * (min(start, start + value) - low), scale * abs(value)
        bar = f'<i style="left:{left:.1f}%;width:{width:.1f}%"></i>' if adds_up else ""
        number = f"{value:.3f}" if name == "logit" or not adds_up else f"{value:+.3f}"
        lines += (
            f'<tr data-part="{escape(name)}"><td>{escape(name)}</td><td class="xl-number">{number}</td>'
            f'<td class="xl-span">{bar}</td></tr>'
        )
    return f'<table class="xl-parts">{lines}</table>'


@cache
def _colours(name: str) -> list[str]:
    return [to_hex(colour) for colour in mpl.colormaps[name](np.linspace(0, 1, _STEPS))]


def own_frames(found: Detail, truth: ClipTruth | None, small: Thumbnails) -> np.ndarray | None:
    """Bool `[W, F]`: what the truth of a generated clip says; None where it says nothing."""
    if truth is None or found.explanation is None or small.reason:
        return None
    own = truth.at(small.timestamps)
    return np.array([own[word] if word >= 0 else np.zeros_like(own[0]) for word in found.explanation.words])


def ranking_figure(gallery: Gallery, query: str, scores: np.ndarray) -> Figure:
    """The first three videos of a ranking, and the query's own where it has one."""
    own = gallery.own_video.get(query)
    first = [gallery.dataset.videos[place] for place in np.argsort(-scores, kind="stable")[:3]]
    videos = list(dict.fromkeys([*first, *([own] if own else [])]))
    clips = [gallery.clip(gallery.captions[video], video) for video in videos]
    found = [float(scores[gallery.column[video]]) for video in videos]
    ranks = [gallery.rank(scores, video) for video in videos]
    return plots.retrieved_videos(query, clips, ranks, found, own or "")
