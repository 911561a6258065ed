"""How fast the explorer answers in the browser: from the kernel's callback to the painted output.

    xclip-lab bench explorer [--videos 1000] [--run RUN] [--folder DIR]

A gallery of generated clips and an X-CLIP of the quickstart's sizes (untrained, unless a run is named) in
60_explore, in JupyterLab and headless Chromium. Twenty interactions: for each of five queries its typing, a
move of the temperature, a click on a video and a move of a contrast's weight. Printed are the times from the
beginning of the kernel's callback until the browser has painted the last of its output, and from the event in
the browser, which has the way to the kernel in it. Needs `pip install -e ".[browser]"` and Chromium.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import nbformat

from benchmarks.measure import Options
from tests.browser import lab
from xclip_lab.errors import UserError

QUERIES = (
    "a red circle moves right",
    "a blue star grows",
    "first a green square shrinks, then a white heart moves up",
    "a yellow triangle turns clockwise",
    "an orange cross meets a purple circle",
)
# Each callback of the explorer ends with a message of its own, sent last: when it began (seconds since 1970).
STAMP = """
import time
from IPython.display import display
from ipywidgets import HTML
stamp = HTML()
stamp.add_class("stamp")
def stamped(action):
    def call(*arguments):
        began = time.time()
        action(*arguments)
        stamp.value = f"<i data-began={began}></i>"
    return call
panel = explorer.panels[0]
explorer._ask = stamped(explorer._ask)
panel.changed, panel.pick = stamped(panel.changed), stamped(panel.pick)
display(stamp)
"""
# Acts, waits for the message, for all pictures to be decoded and for the next paint; milliseconds since the
# callback began, and since the event.
TIMED = """async ([kind, argument]) => {
    const find = selector => document.querySelector('.xl-explorer ' + selector);
    const began = () => document.querySelector('.stamp [data-began]')?.dataset.began ?? '';
    const press = (handle, key) => handle.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
    const handles = document.querySelectorAll('.xl-panel .noUi-handle');
    const before = began(), event = Date.now();
    if (kind === 'query') {
        const box = find('input[type=text]');
        box.value = argument;
        for (const name of ['input', 'change']) box.dispatchEvent(new Event(name, {bubbles: true}));
    }
    if (kind === 'click') document.querySelectorAll('.xl-pick')[argument].click();
    if (kind === 'temperature') press(handles[0], 'ArrowRight');
    if (kind === 'contrast') press(handles[argument], 'ArrowLeft');
    while (began() === before) await new Promise(done => setTimeout(done, 1));
    const images = [...document.querySelectorAll('.xl-explorer img')];
    await Promise.all(images.map(image => image.decode().catch(() => 0)));
    await new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)));
    return [Date.now() - 1000 * Number(began()), Date.now() - event];
}"""


def main() -> None:
    parser = Options(__doc__, videos=1000)
    parser.add_argument("--run", default="", help="one with the quickstart's frames; else fresh weights")
    parser.add_argument("--folder", default="", help="where clips go and stay; else a temporary one")
    arguments = parser.parse_args()
    if reason := lab.missing():
        raise UserError(f"explorer: {reason}")
    with tempfile.TemporaryDirectory() as temporary:
        measure(arguments, Path(temporary))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    clips = arguments.folder or str(folder / "clips")
    overrides = {"data.root": clips, "data.generate": {"train_clips": 1, "test_clips": arguments.videos}}
    parameters = {"checkpoint": arguments.run, "overrides": overrides, "root": str(folder / "runs")}
    notebook = lab.prepare("60_explore", folder, parameters)
    content = nbformat.read(notebook, as_version=4)
    content.cells.append(nbformat.v4.new_code_cell(STAMP))
    nbformat.write(content, notebook)
    with lab.served(folder) as address, lab.browser() as page:
        lab.run_all(page, address, notebook, seconds=600)
        page.locator(".xl-row:visible").first.wait_for()
        page.evaluate(TIMED, ["query", "a first one, not counted"])
        acts = [("query", 0), ("temperature", 0), ("click", 2), ("contrast", 2)]
        found: dict[str, list[list[float]]] = {kind: [] for kind, _ in acts}
        for query in QUERIES:
            for kind, argument in acts:
                found[kind].append(page.evaluate(TIMED, [kind, query if kind == "query" else argument]))
        print(f"{page.locator('.xl-head').first.inner_text()}; {os.cpu_count()} cores")
    every = [pair for pairs in found.values() for pair in pairs]
    for kind, pairs in {**found, "all": every}.items():
        callback, event = (statistics.median(times) for times in zip(*pairs, strict=True))
        worst = max(time for time, _ in pairs)
        print(
            f"{kind:<12} {len(pairs):>2} times: median {callback:.0f} ms from the kernel's callback to the "
            f"painted output (slowest {worst:.0f}), {event:.0f} ms from the event in the browser"
        )


if __name__ == "__main__":
    main()
