"""60_explore in JupyterLab in a real browser: what is on the screen is what the package computes.

Screenshots go to the folder that XCLIP_LAB_SCREENSHOTS names, else to the test's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.browser import lab
from xclip_lab import create_model, load_model, study
from xclip_lab.checkpoint import save_model
from xclip_lab.config import save_config
from xclip_lab.explorer import Gallery, Settings, open_gallery, trained_settings
from xclip_lab.heads.xclip import CONTRASTS
from xclip_lab.runs import prepare_data

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(lab.missing()), reason=lab.missing() or "all there")]

QUERY = "a red circle moves right"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips and two runs, one of them broken; `runs/whole` ranks otherwise at another temperature."""
    folder = tmp_path_factory.mktemp("explore")
    config = study.configure("quickstart", overrides(folder), smoke=True)
    prepare_data(config, progress=False)
    torch.manual_seed(0)
    model = create_model(config).eval()
    with torch.no_grad():
        for value in model.head.parameters():
            value += 0.3 * torch.randn_like(value)
    for name in ("whole", "broken"):
        place = folder / "runs" / name / "checkpoints" / "last"
        place.mkdir(parents=True)
        save_config(config, folder / "runs" / name / "config.yaml")
        save_model(model, place)
    (folder / "runs/broken/checkpoints/last/model.safetensors").write_bytes(b"no model")
    return folder


def overrides(folder: Path) -> dict:
    return {"data.root": str(folder / "clips"), "data.generate.test_clips": 40}


@pytest.fixture(scope="module")
def gallery(folder) -> Gallery:
    config = study.load_config(folder / "runs/whole/config.yaml")
    model = load_model(folder / "runs/whole")
    return open_gallery("whole", model, study.open_split(config, "test"), config)


@pytest.fixture(scope="module")
def address(folder):
    with lab.served(folder) as address:
        yield address


@pytest.fixture
def page():
    with lab.browser() as page:
        yield page


@pytest.fixture
def opened(folder, address, page):
    """60_explore with the whole run, all cells run."""
    return open_notebook(folder, address, page, "whole")


def open_notebook(folder: Path, address: str, page, run: str):
    parameters = {"checkpoint": str(folder / "runs" / run), "root": str(folder / "runs"), "smoke": True}
    parameters |= {"overrides": overrides(folder), "run_dir": str(folder / "out")}
    lab.run_all(page, address, lab.prepare("60_explore", folder, parameters))
    page.locator(".xl-explorer").wait_for()
    return page


def picture(page, folder: Path, name: str) -> None:
    place = Path(os.environ.get("XCLIP_LAB_SCREENSHOTS", folder / "screenshots"))
    place.mkdir(parents=True, exist_ok=True)
    page.locator(".xl-explorer").screenshot(path=place / f"{name}.png")


def ranking(page) -> list[tuple[str, str]]:
    """Video ids and scores as they stand on the screen."""
    rows = page.locator(".xl-row:visible").evaluate_all(
        "rows => rows.map(row => [row.dataset.video, row.querySelector('.xl-score').innerText])"
    )
    return [(video, score) for video, score in rows]


def heat_map(page, which: str) -> np.ndarray:
    """The values that hovering over the cells of a map shows."""
    cells = page.locator(f'.xl-map[data-map="{which}"] td[style]').evaluate_all(
        "cells => cells.map(cell => cell.title)"
    )
    return np.array([float(cell.rsplit(" ", 1)[1]) for cell in cells])


def assert_shows(
    page, gallery: Gallery, settings: Settings, chosen: str | None = None, place: int = 0
) -> str:
    """The ranking, and the maps and contributions of the chosen video (or else of the `place`-th), are those
    of a model that is built with the settings. Returns that video."""
    head = dataclasses.replace(gallery.model.config.head, temperature=settings.temperature)
    built = create_model(dataclasses.replace(gallery.model.config, head=head)).eval()
    built.load_state_dict(gallery.model.state_dict())
    expected = dataclasses.replace(gallery, model=built)
    scores = expected.scores(QUERY, settings)
    order = np.argsort(-scores, kind="stable")[:8]
    wanted = [(gallery.dataset.videos[column], f"{scores[column]:.3f}") for column in order]
    assert ranking(page) == wanted
    chosen = chosen or wanted[place][0]
    explained = expected.explain(QUERY, chosen, settings)
    maps = {"a": explained.similarity, "b": explained.over_frames, "c": explained.over_words}
    for which, values in maps.items():
        shown = heat_map(page, which)
        assert shown.shape == values.ravel().shape
        np.testing.assert_allclose(shown, values.ravel(), atol=1e-4)
    parts = page.locator("tr[data-part]").evaluate_all(
        "rows => rows.map(row => [row.dataset.part, row.cells[1].innerText])"
    )
    contributions = {name: f"{value:+.3f}" for name, value in explained.contributions.items()}
    assert dict(parts) == {**contributions, "logit": f"{explained.logit:.3f}"}
    return chosen


def ask(page, query: str) -> None:
    box = page.get_by_placeholder("type what a video shows")
    box.fill(query)
    box.press("Enter")


def eventually(check: Callable[[], Any], seconds: float = 60) -> Any:
    """What `check` returns as soon as it passes: a widget's answer has no end that could be waited for."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(AssertionError):
            return check()
        time.sleep(0.2)
    return check()


def test_query_click_and_temperature(opened, folder, gallery):
    page = opened
    settings = trained_settings(gallery.model)
    assert page.locator(".jp-OutputArea-output img").count() >= 2  # the figures of the last cell
    ask(page, QUERY)
    first = eventually(lambda: assert_shows(page, gallery, settings))
    before = ranking(page), heat_map(page, "b")
    picture(page, folder, "1_query")

    page.locator(".xl-pick:visible").nth(2).click()
    third = eventually(lambda: assert_shows(page, gallery, settings, place=2))
    assert third != first
    assert ranking(page) == before[0]
    assert not np.array_equal(heat_map(page, "b"), before[1])
    picture(page, folder, "2_clicked")
    page.locator(".xl-pick:visible").first.click()
    eventually(lambda: assert_shows(page, gallery, settings))

    handle = page.locator(".xl-panel:visible .noUi-handle").first
    handle.focus()
    handle.press("End")
    hot = Settings(10.0, dict.fromkeys(CONTRASTS, 1.0))
    eventually(lambda: assert_shows(page, gallery, hot, chosen=first))
    assert [video for video, _ in ranking(page)] != [video for video, _ in before[0]]
    assert np.abs(heat_map(page, "b") - before[1]).max() > 0.02
    picture(page, folder, "3_temperature")
    assert frames_stand_above_their_columns(page)
    assert not page.locator(".jp-OutputArea-output[data-mime-type*=error]").count()


def frames_stand_above_their_columns(page) -> bool:
    """The strip of square frames has as many as there are columns, and is as wide as they, in every map."""
    return page.evaluate(
        """() => [...document.querySelectorAll('.xl-map table')].every(table => {
            const cells = [...table.rows[1].querySelectorAll('td[style]')].map(cell =>
                cell.getBoundingClientRect());
            const strip = table.rows[0].querySelector('img');
            const box = strip.getBoundingClientRect(), last = cells[cells.length - 1];
            const count = strip.naturalWidth / strip.naturalHeight;
            return count === cells.length && Math.abs(box.left - cells[0].left) < 1
                && Math.abs(box.right - last.right) < 1;
        })"""
    )


def test_a_query_without_results_is_told(opened, folder):
    page = opened
    ask(page, "?!")
    page.get_by_text("the query has no words").wait_for()
    assert not page.locator(".xl-row:visible").count()
    picture(page, folder, "4_no_words")
    ask(page, QUERY)
    page.locator(".xl-row:visible").first.wait_for()
    assert not page.get_by_text("the query has no words").count()


def test_a_broken_run_is_told_and_another_can_be_picked(folder, address, page, gallery):
    open_notebook(folder, address, page, "broken")
    page.locator(".xl-message").get_by_text("is damaged or not a checkpoint").wait_for()
    assert not page.locator(".jp-OutputArea-output[data-mime-type*=error]").count()
    assert "Traceback" not in page.locator(".jp-Notebook").inner_text()
    picture(page, folder, "5_broken_run")
    page.locator(".xl-explorer select").first.select_option(str(folder / "runs" / "whole"))
    page.locator(".xl-row:visible").first.wait_for()
    ask(page, QUERY)
    eventually(lambda: assert_shows(page, gallery, trained_settings(gallery.model)))
