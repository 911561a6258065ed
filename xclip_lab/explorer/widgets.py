"""The explorer: runs, queries, filters and what they find, in a notebook. Standard ipywidgets only."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ipywidgets as ipw
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure

from xclip_lab import plots, runs, study
from xclip_lab.atomic import write_text
from xclip_lab.checkpoint import load_model
from xclip_lab.config import RunConfig
from xclip_lab.datasets import VideoTextDataset
from xclip_lab.distributed import resolve_device
from xclip_lab.drawing import save_figure
from xclip_lab.errors import ConfigError, UserError
from xclip_lab.explorer import view
from xclip_lab.explorer.gallery import Gallery, QueryError, check_query, open_gallery
from xclip_lab.explorer.panel import Panel, reason, told
from xclip_lab.synthetic import ClipTruth, load_truth

UNTRAINED = "untrained"
_NONE = "(none)"


class Explorer(ipw.VBox):
    """Which videos does a run find for a query, and why? Show it as the last line of a cell.

    What cannot be opened or answered is told in the place of the answer; nothing is raised.

    Args:
        run: a run folder, a checkpoint folder or a file; empty for a model fresh from `config`.
        other: a second one, to stand beside it; empty for none.
        config: which captions and videos (`study.configure`); None for those of the first run.
        split: None for `data.test_split`. root: a folder of runs to choose from.
        out: where figures and settings are saved; None for `explore/` in `root`.
    """

    def __init__(
        self,
        run: str | Path = "",
        other: str | Path = "",
        *,
        config: RunConfig | None = None,
        split: str | None = None,
        root: str | Path = "runs",
        out: str | Path | None = None,
    ) -> None:
        self.config, self.split = config, split
        self.out = Path(out or Path(root) / "explore")
        self.dataset: VideoTextDataset | None = None
        self.truth: dict[str, ClipTruth] = {}
        self.asked: str | None = None
        self.chosen: str | None = None
        self.opened: dict[str, Gallery] = {}
        self._filling = False
        self.panels = [Panel(self.refresh, self.choose) for _ in range(2)]
        super().__init__(self._controls([str(run) or UNTRAINED, str(other) or _NONE], Path(root)))
        self.add_class("xl-explorer")
        if get_ipython() is not None:  # the cell shows the explorer only once it is open
            display(self.progress)
        self.open_runs()

    def _controls(self, chosen: Sequence[str], root: Path) -> list[ipw.Widget]:
        known = [f"{root / run.name}" for run in runs.list_runs(root)] if root.is_dir() else []
        names = list(dict.fromkeys([*(name for name in chosen if name != _NONE), *known]))
        half, full = {"width": "49%"}, {"width": "98%"}
        self.run_box = ipw.Dropdown(description="run", options=names, value=chosen[0], layout=half)
        self.beside_box = ipw.Dropdown(
            description="beside", options=[_NONE, *names], value=chosen[1], layout=half
        )
        self.query = ipw.Text(
            description="query", placeholder="type what a video shows", continuous_update=False, layout=full
        )
        self.captions = ipw.Select(description="captions", rows=4, layout={"width": "64%"})
        self.failures = ipw.Checkbox(description="failures: a run does not find it first", indent=False)
        self.disagreements = ipw.Checkbox(description="disagreements: only one of two does", indent=False)
        self.save_figures = ipw.Button(description="save figures")
        self.save_settings = ipw.Button(description="save settings")
        self.message = ipw.HTML()
        self.progress = ipw.FloatProgress(description="encode", max=1.0, layout={**full, "display": "none"})
        for box in (self.run_box, self.beside_box):
            box.observe(lambda _: self.open_runs(), "value")
        self.query.observe(lambda _: self.ask(), "value")
        self.captions.observe(lambda _: self._take_caption(), "value")
        for box in (self.failures, self.disagreements):
            box.observe(lambda _: self.filter(), "value")
        self.save_figures.on_click(lambda _: self.export_figures())
        self.save_settings.on_click(lambda _: self.export_settings())
        buttons = ipw.HBox([self.save_figures, self.save_settings])
        side = ipw.VBox([self.failures, self.disagreements, buttons], layout={"width": "34%"})
        return [
            ipw.HTML(view.STYLE),
            ipw.HBox([self.run_box, self.beside_box]),
            self.query,
            ipw.HBox([self.captions, side]),
            self.progress,
            self.message,
            ipw.HBox(self.panels, layout={"align_items": "flex-start"}),
        ]

    @property
    def active(self) -> list[tuple[Panel, Gallery]]:
        """The runs that are open."""
        return [(panel, panel.gallery) for panel in self.panels if panel.gallery is not None]

    def open_runs(self) -> None:
        """Open the runs that the boxes name; one that is broken says so in its own column."""
        for panel, name in zip(self.panels, (self.run_box.value, self.beside_box.value), strict=True):
            panel.layout.display = "none" if name == _NONE else "flex"
            panel.drop()
            if name != _NONE:
                self._open(panel, name)
        self.disagreements.disabled = len(self.active) < 2
        self.filter()

    def _open(self, panel: Panel, name: str) -> None:
        try:
            if name not in self.opened:
                self.opened[name] = self._gallery(name)
            panel.take(self.opened[name])
        except (UserError, OSError) as error:
            panel.drop(f"{name}: {reason(error)}")
        finally:
            self.progress.layout.display = "none"

    def _gallery(self, name: str) -> Gallery:
        if name != UNTRAINED:
            model = load_model(name)
        elif self.config is not None:
            model = study.new_model(self.config).eval()
        else:
            raise ConfigError("an untrained model needs a config, as study.configure gives it")
        config = self.config or model.origin.run
        if config is None:
            raise ConfigError("it lies in no run folder; give a config, as study.configure gives it")
        if self.dataset is None:
            split = self.split or config.data.test_split
            self.truth = load_truth(config.data.root, split) if config.data.dataset == "synthetic" else {}
            self.dataset = study.open_split(config, split)
        self.progress.layout.display = "flex"
        model.to(resolve_device(config.train.device))
        return open_gallery(name, model, self.dataset, config, self._advance)

    def _advance(self, share: float) -> None:
        self.progress.value = share

    @told
    def filter(self) -> None:
        """Offer the captions that pass the filters, and ask the first of them unless a query stands there."""
        kept = self._passing()
        self._filling = True
        self.captions.options = kept
        self._filling = False
        if self.active and not kept:
            self._show_nothing()
            raise QueryError("no caption passes the filters; untick one")
        filtered = self.failures.value or self.disagreements.value
        if kept and (not self.query.value or (filtered and self.query.value not in kept)):
            self.query.value = kept[0]
        elif self.active:
            self._ask()
        else:
            self._show_nothing()

    def _passing(self) -> list[str]:
        galleries = [gallery for _, gallery in self.active]
        kept = list(dict.fromkeys(s.caption for s in galleries[0].dataset.samples)) if galleries else []
        if self.failures.value or self.disagreements.value:
            self.message.value = view.message("all captions are ranked, once for each run ...", True)
        if self.failures.value:
            kept = [caption for caption in kept if any(caption in gallery.missed for gallery in galleries)]
        if self.disagreements.value and len(galleries) == 2:
            one, two = (gallery.missed for gallery in galleries)
            kept = [caption for caption in kept if (caption in one) != (caption in two)]
        self.message.value = ""
        return kept

    def _take_caption(self) -> None:
        if not self._filling and self.captions.value:
            self.query.value = self.captions.value

    @told
    def ask(self) -> None:
        """Answer the query that stands in its box."""
        self._ask()

    def _ask(self) -> None:
        query = self.query.value.strip()
        self._filling = True
        self.captions.value = query if query in self.captions.options else None
        self._filling = False
        try:
            check_query(query)
        except QueryError:
            self._show_nothing()
            raise
        self.asked, self.chosen = query, None
        self.refresh()

    def _show_nothing(self) -> None:
        self.asked = self.chosen = None
        for panel in self.panels:
            panel.scores = None
            panel.show("", None, self.truth)

    @told
    def refresh(self, only: Panel | None = None) -> None:
        """Score the query anew, as the sliders stand: of all runs, or of the one whose sliders moved."""
        if self.asked is None:
            return
        for panel in [only] if only else [panel for panel, _ in self.active]:
            panel.rank(self.asked)
        if self.chosen is None:
            self.chosen = next((panel.order[0] for panel, _ in self.active if panel.order), None)
        self._show(only)

    @told
    def choose(self, video: str) -> None:
        """Look into the logit of a video."""
        self.chosen = video
        self._show()

    def _show(self, only: Panel | None = None) -> None:
        for panel in [only] if only else self.panels:
            panel.show(self.asked or "", self.chosen, self.truth)

    def figures(self) -> dict[str, Figure]:
        """What is on the screen, by the names that `export_figures` saves it under: each run's ranking and,
        for heads with AOSM, how the logit of the chosen video comes about.

        Raises:
            QueryError: nothing is on the screen.
        """
        drawn: dict[str, Figure] = {}
        for number, (panel, gallery) in enumerate(self.active, 1):
            if self.asked is None or self.chosen is None or panel.scores is None:
                continue
            name = _file_name(f"{self.asked[:40]} {number} {Path(gallery.name).name}")
            drawn[f"{name}_ranking"] = view.ranking_figure(gallery, self.asked, panel.scores)
            truth = self.truth.get(self.chosen) if gallery.own_video.get(self.asked) == self.chosen else None
            if gallery.explainable(panel.settings) and self.chosen in gallery.column:
                found = gallery.explain(self.asked, self.chosen, panel.settings)
                drawn[f"{name}_{_file_name(self.chosen)}"] = plots.aosm_figure(found, truth)
        if not drawn:
            raise QueryError("there is nothing on the screen to save; open a run and ask a query first")
        return drawn

    def export_figures(self) -> list[Figure]:
        """Save `figures` as PDF and PNG, and say where. None where the message says why there is none."""
        return self._export_figures() or []

    @told
    def _export_figures(self) -> list[Figure]:
        drawn = self.figures()
        for name, figure in drawn.items():
            save_figure(figure, self.out, name)
        self.message.value = view.message(f"saved in {self.out}, as PDF and PNG: {', '.join(drawn)}", True)
        return list(drawn.values())

    @told
    def export_settings(self) -> None:
        """Save what is asked, chosen and set as JSON, and say where."""
        path = self.out / f"{_file_name((self.asked or 'nothing asked')[:40])}.json"
        self.out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(self.state(), indent=2) + "\n")
        self.message.value = view.message(f"saved: {path}", True)

    def state(self) -> dict[str, Any]:
        """What is asked, chosen and set, as plain values."""
        data = self.dataset
        return {
            "query": self.asked,
            "video": self.chosen,
            "dataset": None
            if data is None
            else {"name": data.name, "split": data.split, "root": str(data.root)},
            "filters": {"failures": self.failures.value, "disagreements": self.disagreements.value},
            "runs": [
                {"run": gallery.name, "checkpoint": gallery.model.origin.checkpoint, **asdict(panel.settings)}
                for panel, gallery in self.active
            ],
        }


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text).strip("-.")
