"""One run on the screen: its settings, its ranking of the query, and what made the chosen video's logit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from html import escape
from typing import Any

import ipywidgets as ipw
import numpy as np

from xclip_lab.errors import UserError, disk_remedy
from xclip_lab.explorer import view
from xclip_lab.explorer.gallery import Gallery, unread
from xclip_lab.explorer.settings import Settings, trained_settings
from xclip_lab.synthetic import ClipTruth

SHOWN = 8
"""Videos of a ranking that are shown; the query's own comes last where it is not among them."""
_SLIDER = {"style": {"description_width": "116px"}, "layout": {"width": "330px"}}


def told(action: Callable[..., Any]) -> Callable[..., Any]:
    """What a widget calls: an error of the user's becomes a message, where a traceback would be lost."""

    @wraps(action)
    def call(self: Any, *args: Any) -> Any:
        self.message.value = ""
        try:
            return action(self, *args)
        except Exception as error:
            self.message.value = view.message(reason(error))
            if not isinstance(error, UserError | OSError):
                raise

    return call


def reason(error: Exception) -> str:
    """An error as it stands in a message."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}; {disk_remedy(error)}"
    return f"a fault of the explorer's own, please report it: {type(error).__name__}: {error}"


class Panel(ipw.VBox):
    """A run's column.

    Args:
        changed: called with the panel when a setting has changed. pick: called with the id of a video that
            was clicked.
    """

    def __init__(self, changed: Callable[[Panel], None], pick: Callable[[str], None]) -> None:
        self.changed, self.pick = changed, pick
        self.gallery: Gallery | None = None
        self.scores: np.ndarray | None = None
        self.order: list[str] = []
        self.shown: list[str] = []
        self.weights: dict[str, ipw.FloatSlider] = {}
        self.title, self.message, self.head = ipw.HTML(), ipw.HTML(), ipw.HTML()
        self.temperature = ipw.FloatLogSlider(
            description="temperature", min=-3, max=1, step=0.02, readout_format=".3g", **_SLIDER
        )
        self.temperature.observe(self._slid, "value")
        self.reset = ipw.Button(description="as trained", layout={"width": "100px"})
        self.reset.on_click(
            lambda _: self.set(trained_settings(self.gallery.model)) if self.gallery else None
        )
        self.sliders = ipw.Box(layout={"flex_flow": "row wrap"})
        self.picks = [ipw.Button(description="why", layout={"width": "56px"}) for _ in range(SHOWN + 1)]
        for place, button in enumerate(self.picks):
            button.add_class("xl-pick")
            button.on_click(lambda _, place=place: self.pick(self.shown[place]))
        self.rows = [ipw.HTML(layout={"flex": "1 1 0", "min_width": "0"}) for _ in self.picks]
        self.lines = [ipw.HBox(pair) for pair in zip(self.picks, self.rows, strict=True)]
        self.detail = ipw.HTML(layout={"flex": "100 1 420px", "min_width": "0"})
        found = ipw.VBox([self.head, *self.lines], layout={"flex": "1 0 420px", "margin": "0 12px 0 0"})
        below = ipw.Box([found, self.detail], layout={"flex_flow": "row wrap", "align_items": "flex-start"})
        children = [self.title, self.sliders, self.message, below]
        super().__init__(children, layout={"flex": "1 1 0", "min_width": "0"})
        self.add_class("xl-panel")

    def take(self, gallery: Gallery) -> None:
        """Take another run, with its own settings."""
        self.gallery = gallery
        settings = trained_settings(gallery.model)
        self.weights = {
            name: ipw.FloatSlider(description=name, min=0, max=1, step=0.05, **_SLIDER)
            for name in settings.weights
        }
        self._place(settings)
        for slider in self.weights.values():
            slider.observe(self._slid, "value")
        has = [] if settings.temperature is None else [self.temperature]
        changeable = [*has, *self.weights.values()]
        self.sliders.children = [*changeable, self.reset] if changeable else []
        self.title.value = f'<b class="xl-run">{escape(gallery.name)}</b>' + view.message(
            _left_out(gallery), True
        )

    def drop(self, why: str = "") -> None:
        """Show no run, and why."""
        self.gallery, self.scores, self.order, self.sliders.children = None, None, [], []
        self.title.value, self.message.value = "", view.message(why)

    @property
    def settings(self) -> Settings:
        """As the sliders stand."""
        has = self.temperature in self.sliders.children
        weights = {name: slider.value for name, slider in self.weights.items()}
        return Settings(self.temperature.value if has else None, weights)

    def set(self, settings: Settings) -> None:
        """Move the sliders: one change, whatever their number."""
        self._place(settings)
        self.changed(self)

    def _place(self, settings: Settings) -> None:
        changed, self.changed = self.changed, lambda _: None
        try:
            if settings.temperature is not None:
                exponent = math.log10(settings.temperature)
                self.temperature.min = min(self.temperature.min, exponent)
                self.temperature.max = max(self.temperature.max, exponent)
                self.temperature.value = settings.temperature
            for name, weight in settings.weights.items():
                self.weights[name].value = weight
        finally:
            self.changed = changed

    def _slid(self, _: Any) -> None:
        self.changed(self)

    @told
    def rank(self, query: str) -> None:
        """Score the gallery anew: `scores [V]`, and `order`, the best first; none after an error."""
        assert self.gallery is not None
        self.scores, self.order = None, []
        self.scores = self.gallery.scores(query, self.settings)
        videos = self.gallery.dataset.videos
        self.order = [videos[place] for place in np.argsort(-self.scores, kind="stable")]
        self.message.value = view.message(unread(query, self.gallery.model.config.max_words), note=True)

    def show(self, query: str, chosen: str | None, truth: Mapping[str, ClipTruth]) -> None:
        """Bring the ranking and the chosen video onto the screen; nothing where there is no ranking."""
        gallery, scores = self.gallery, self.scores
        if gallery is None or scores is None:
            self.shown, self.head.value, self.detail.value = [], "", ""
        else:
            own = gallery.own_video.get(query)
            self.shown = list(dict.fromkeys([*self.order[:SHOWN], *([own] if own else [])]))
            rank = f"own video at rank {gallery.rank(scores, own)} of" if own else "typed query;"
            self.head.value = f'<div class="xl-head">{rank} {len(scores)} videos</div>'
            for place, (row, video) in enumerate(zip(self.rows, self.shown, strict=False)):
                number = place + 1 if place < SHOWN else self.order.index(video) + 1
                score = float(scores[gallery.column[video]])
                row.value = view.result_row(gallery, video, number, score, video == own, video == chosen)
            self.detail.value = self._why(gallery, query, chosen, truth)
        for place, line in enumerate(self.lines):
            line.layout.display = "flex" if place < len(self.shown) else "none"

    def _why(self, gallery: Gallery, query: str, chosen: str | None, truth: Mapping[str, ClipTruth]) -> str:
        if chosen not in gallery.column:
            return view.message(f"{chosen} is not among the videos of this run", True)
        found = gallery.detail(query, chosen, self.settings)
        film = gallery.film(chosen)
        of_pair = truth.get(chosen) if gallery.own_video.get(query) == chosen else None
        return view.detail(gallery.captions[chosen], found, film, view.own_frames(found, of_pair, film))


def _left_out(gallery: Gallery) -> str:
    missing = [video for video in gallery.broken if video not in gallery.column]
    if not missing:
        return ""
    return f"{len(missing)} of the videos cannot be read and are left out: {gallery.broken[missing[0]]}"
