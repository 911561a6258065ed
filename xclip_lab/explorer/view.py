"""What the explorer shows, as HTML fragments and figures. Values stand in `title`, so hovering shows them."""

from __future__ import annotations

from base64 import b64encode
from functools import cache, partial
from html import escape
from math import ceil

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure

from xclip_lab import plots
from xclip_lab.drawing import DARK, MIDDLE, SIMILARITY_MAP, WEIGHT_MAP
from xclip_lab.explorer.gallery import Detail, Film, Gallery
from xclip_lab.synthetic import ClipTruth

_BROADEST, _WIDTH, _NARROWEST = 28, 260, 9  # of a column, of a matrix, of a column: pixels
_WORD, _LETTER = 68, 6  # the column of words, a letter: pixels
_STEPS = 64  # of a scale of colours

STYLE = f"""<style>
.xl-row {{padding:3px 6px;border-left:5px solid transparent;line-height:17px;font-size:12px}}
.xl-own {{border-left-color:{DARK}}}
.xl-on {{background:rgba(217,200,95,.3)}}
.xl-line {{white-space:nowrap;overflow:hidden;text-overflow:ellipsis}}
.xl-tag {{background:{DARK};color:#fff;border-radius:3px;padding:0 5px;margin:0 3px}}
.xl-panel .widget-html-content {{min-width:0}}
.xl-strip {{overflow:hidden}}
.xl-strip img {{height:52px;width:auto;max-width:none}}
.xl-none {{display:block;height:52px;background:#999}}
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
.xl-map img {{width:100%;max-width:none;height:auto;display:block}}
.xl-map .xl-none {{height:24px}}
.xl-map td.xl-true {{box-shadow:inset 0 0 0 1px #fff,inset 0 0 0 2px #000}}
.xl-map td.xl-time {{text-align:left;overflow:visible}}
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
    film = gallery.film(video)
    classes = "xl-row" + " xl-own" * own + " xl-on" * chosen
    tag = '<span class="xl-tag">own video</span>' if own else ""
    caption = escape(gallery.captions[video])
    return (
        f'<div class="{classes}" data-video="{escape(video)}">'
        f'<div class="xl-line" title="{escape(video)}: {caption}"><b>{rank}</b>&ensp;'
        f'<span class="xl-score" title="similarity">{score:.3f}</span> {tag}&ensp;{caption}</div>'
        f'<div class="xl-strip">{_strip(film.short, film)}</div></div>'
    )


def _strip(file: bytes, film: Film) -> str:
    if not file:
        return f'<span class="xl-none" title="{escape(film.reason)}"></span>'
    told = f"{len(film.timestamps)} frames, {film.timestamps[0]:.1f} to {film.timestamps[-1]:.1f} s"
    return f'<img src="data:image/jpeg;base64,{b64encode(file).decode()}" title="{told}" alt="{told}">'


def detail(caption: str, found: Detail, film: Film, own_frames: np.ndarray | None = None) -> str:
    """The maps of a pair beside each other, each with the frames above their columns, and what adds up.

    Args:
        caption: the video's. own_frames: bool `[W, F]`, what each token speaks of; it is outlined.
    """
    draw, maps = partial(_map, found, film, own_frames), ""
    if found.matrix is not None:
        maps += draw("(a) word-frame similarity", found.matrix, SIMILARITY_MAP)
    if found.explanation is not None:
        of = found.explanation
        limits = (0.0, float(max(of.over_frames.max(), of.over_words.max())))
        maps += draw("(b) stage 1, over frames", of.over_frames, WEIGHT_MAP, limits, rows=of.word_weights)
        maps += draw("(c) stage 1, over words", of.over_words, WEIGHT_MAP, limits, columns=of.frame_weights)
    note = f"{film.reason}: its frames are not shown" if film.reason else ""
    return (
        f'<div class="xl-why"><b>why this video</b>&ensp;{escape(caption)}</div>{message(note, note=True)}'
        f'<div class="xl-maps">{maps}'
        f"<div><b>(d) {escape(found.note)}</b>{_parts(found)}</div></div>"
    )


def _map(
    found: Detail,
    film: Film,
    own_frames: np.ndarray | None,
    title: str,
    values: np.ndarray,
    colours: str,
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
    times = ["" if np.isnan(time) else f"{time:.1f}" for time in film.timestamps]
    own = np.zeros(values.shape, bool) if own_frames is None else own_frames
    body = ""
    for row, token in enumerate(found.tokens):
        cells = "".join(
            f'<td{" class=xl-true" if own[row, place] else ""} style="background:{shown[steps[row, place]]}" '
            f'title="{escape(token)}, {times[place]} s: {values[row, place]:.4f}"></td>'
            for place in range(frames)
        )
        bar = "" if rows is None else _bar("bar", escape(token), rows[row], "100%")
        body += f'<tr><td class="xl-word" title="{escape(token)}">{escape(token)}</td>{cells}{bar}</tr>'
    step = ceil((max(map(len, times)) + 1) * _LETTER / width)  # columns that a time needs
    one = "" if step == 1 else " class=xl-time"
    foot = "".join(
        f"<td colspan={min(step, frames - place)}{one}>{times[place]}</td>"
        for place in range(0, frames, step)
    )
    under = ""
    if columns is not None:
        bars = (_bar("up", f"{time} s", weight, "32px") for weight, time in zip(columns, times, strict=True))
        under = f'<tr><td class="xl-word">stage 2</td>{"".join(bars)}</tr>'
    last = '<col style="width:56px">' if rows is not None else ""
    over = "<th>stage 2</th>" if rows is not None else ""
    scale = ",".join([*shown[:: _STEPS // 8], shown[-1]])
    return (
        f'<div class="xl-map" data-map="{title[1]}"><b>{title}</b><table>'
        f"<colgroup><col style=width:{_WORD}px>{f'<col style=width:{width}px>' * frames}{last}</colgroup>"
        f"<tr><td></td><th colspan={frames}>{_strip(film.file, film)}</th>{over}</tr>"
        f"{body}{under}"
        f'<tr><td class="xl-word">time (s)</td>{foot}</tr></table>'
        f'<div style="margin-left:{_WORD}px;width:{width * frames}px"><div class="xl-scale" '
        f'style="background:linear-gradient(90deg,{scale})"></div>'
        f'<span>{low:.2f}</span><span style="float:right">{high:.2f}</span></div></div>'
    )


def _bar(kind: str, where: str, weight: float, length: str) -> str:
    """A weight of the second stage as a cell; `length` is that of the bar at weight 1."""
    style = f"{'width' if kind == 'bar' else 'height'}:calc({min(1, max(0, weight)):.2f}*{length})"
    return f'<td class="xl-{kind}" title="{where}, stage 2: {weight:.4f}"><i style="{style}"></i></td>'


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


def own_frames(found: Detail, truth: ClipTruth | None, film: Film) -> np.ndarray | None:
    """Bool `[W, F]`: what the truth of a generated clip says; None where it says nothing."""
    if truth is None or found.explanation is None or film.reason:
        return None
    own = truth.at(film.timestamps)
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
