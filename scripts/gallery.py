"""The notebooks as pages to read: executed on one quickstart run, as HTML with an index.

    python scripts/gallery.py [--run RUN] [--out runs/gallery] [--smoke]

Without a run the quickstart trains one, or finds that of an earlier call. 40_ablation and 70_compare train
many models: their latest executed copies in runs/ are taken, where there are some. 60_explore has no page: it
lives in the browser.
"""

from __future__ import annotations

import argparse
import html
import re
from datetime import date
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html

from xclip_lab import __version__, study
from xclip_lab.atomic import write_text
from xclip_lab.runs import execute_notebook, new_run_dir

OF_A_RUN = ("30_evaluate", "50_attention")
OF_MANY = ("40_ablation", "70_compare")
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>xclip_lab: notebooks</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; }}
article {{ display: grid; grid-template-columns: 17rem 1fr; gap: 1.5rem; padding: 1.5rem 0;
  border-top: 1px solid #ccc; }}
img {{ width: 100%; max-height: 13rem; object-fit: contain; object-position: top; }}
h2 {{ margin: 0; font-size: 1.15rem; }} p {{ margin: .4rem 0; }} footer {{ color: #666; font-size: .9rem; }}
@media (max-width: 40rem) {{ article {{ grid-template-columns: 1fr; }} }}
</style>
<h1>xclip_lab: notebooks, executed</h1>
{articles}
<footer>xclip_lab {version}, {today}; run: {run}. {note}</footer></html>
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", help="a finished quickstart; else made in runs/")
    parser.add_argument("--out", default="runs/gallery", type=Path, help="the folder of the pages")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, meaningless numbers")
    arguments = parser.parse_args()
    config = study.configure("quickstart", {}, smoke=arguments.smoke)
    run = str(arguments.run or new_run_dir(config, arguments.out if arguments.smoke else "runs"))
    executed = arguments.out / "executed"
    given: dict[str, dict[str, Any]] = {"00_quickstart": {"run_dir": run}, "10_data": {}}
    given |= {"20_train": {"run_dir": run}} | {name: {"checkpoint": run} for name in OF_A_RUN}
    pages = []
    for name, parameters in given.items():
        print(f"{name} ...", flush=True)
        parameters["smoke"] = arguments.smoke
        pages.append(write_page(execute_notebook(name, parameters, executed, progress=False), arguments.out))
    pages += [write_page(path, arguments.out) for name in OF_MANY if (path := latest(name)) is not None]
    note = "Tiny sizes: the numbers mean nothing." if arguments.smoke else ""
    articles = "\n".join(article for _, article in sorted(pages))
    told = {"version": __version__, "today": date.today().isoformat(), "run": html.escape(run), "note": note}
    write_text(arguments.out / "index.html", PAGE.format(articles=articles, **told))
    print(f"open {arguments.out / 'index.html'}")


def latest(name: str) -> Path | None:
    """The executed copy of a notebook that was written last."""
    return max(Path("runs").glob(f"*/{name}.ipynb"), key=lambda path: path.stat().st_mtime, default=None)


def write_page(executed: Path, out: Path) -> tuple[str, str]:
    """The page of an executed notebook; its name, and what the index says of it."""
    notebook = nbformat.read(executed, as_version=4)
    for cell in notebook.cells:  # what notebooks write there are progress bars
        cell.pop("attachments", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_shown(output)]
    notebook.metadata.pop("widgets", None)
    # Nothing is fetched from elsewhere: the pages have no formulas and no widgets.
    body, _ = HTMLExporter(mathjax_url="", require_js_url="", mermaid_js_url="").from_notebook_node(notebook)
    write_text(out / f"{executed.stem}.html", body)
    return executed.stem, article(executed.stem, notebook)


def is_shown(output: Any) -> bool:
    bar = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return not bar and output.get("name") != "stderr"


def article(name: str, notebook: Any) -> str:
    """The title and the first paragraph of a notebook, with the last figure in it."""
    title, opening = notebook.cells[0].source.split("\n\n")[:2]
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    figures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    picture = f'<img alt="" src="data:image/png;base64,{figures[-1].strip()}">' if figures else ""
    link = f'<a href="{name}.html">{html.escape(re.sub("^# ", "", title))}</a>'
    return f"<article><div>{picture}</div><div><h2>{link}</h2>{markdown2html(opening)}</div></article>"


if __name__ == "__main__":
    main()
