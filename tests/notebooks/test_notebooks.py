"""Each notebook in a process of its own, with tiny sizes; what it writes and prints."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from tests.shared import needs_shared, shared
from tests.videos import write_video
from xclip_lab import Result
from xclip_lab.metrics import METRICS
from xclip_lab.runs import NOTEBOOKS, execute_notebook

NAMES = ["00_quickstart", "10_data", "20_train", "30_evaluate", "40_ablation", "50_attention", "60_explore"]
NAMES += ["70_compare"]
PARAMETERS = {"preset", "seed", "run_dir", "overrides", "smoke"}
ATTENTION, OF_TRUTH = {"clip", "maps", "patches", "measures", "removal"}, {"classes"}


def run(name: str, folder: Path, overrides: dict | None = None, **parameters) -> str:
    """Execute a notebook with `smoke=True` into `folder` and return all that it printed."""
    parameters = {"run_dir": str(folder), "smoke": True, "overrides": overrides or {}} | parameters
    executed = execute_notebook(name, parameters, folder, progress=False)
    cells = nbformat.read(executed, as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def figures(run_dir: Path) -> set[str]:
    """The names of the figures, each of which is there as PDF and as PNG."""
    files = list((run_dir / "figures").iterdir())
    assert all(file.stat().st_size > 1000 for file in files)
    names = {suffix: {file.stem for file in files if file.suffix == suffix} for suffix in (".pdf", ".png")}
    assert names[".pdf"] == names[".png"]
    return names[".png"]


def check_metrics(run_dir: Path) -> None:
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert list(metrics) == ["t2v", "v2t"]
    for values in metrics.values():
        assert list(values) == list(METRICS)
        assert all(math.isfinite(value) for value in values.values())


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> dict:
    return {"data.root": str(tmp_path_factory.mktemp("data") / "clips")}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, generated) -> tuple[Path, str]:
    """The run folder of a quickstart, and what it printed."""
    run_dir = tmp_path_factory.mktemp("quickstart") / "run"
    return run_dir, run("00_quickstart", run_dir, generated)


@pytest.fixture(scope="module")
def own_videos(tmp_path_factory) -> dict:
    """Six videos, captioned by their names; the smoke model takes 4 to a batch."""
    root = tmp_path_factory.mktemp("own")
    for number, name in enumerate(["a_dog", "two-cats", "a $5 bill & $6", "eine_Straße", "rain", "снег"]):
        write_video(root / f"{name}.mp4", frames=10 + number)
    return {"data.dataset": "folder", "data.root": str(root)}


@pytest.mark.parametrize("name", NAMES)
def test_is_plain(name):
    """One cell of plain parameters, nothing executed, no logic."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == notebook.cells[-1].cell_type == "markdown"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    [parameters] = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assigned = ast.parse(parameters.source).body
    assert all(isinstance(line, ast.Assign) for line in assigned)
    given = {line.targets[0].id: ast.literal_eval(line.value) for line in assigned}
    assert given.keys() >= PARAMETERS
    assert not given["smoke"]
    for cell in code:
        tree = ast.parse(cell.source.replace("%matplotlib inline\n", ""))
        logic = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.If, ast.Try)
        assert not any(isinstance(node, logic) for node in ast.walk(tree))


def test_quickstart(quickstart):
    run_dir, printed = quickstart
    check_metrics(run_dir)
    assert figures(run_dir) == {"clips", "training", "ranks", "levels", "pointing", "aosm"}
    assert (run_dir / "checkpoints/best/model.safetensors").is_file()
    assert (run_dir / "config.yaml").is_file()
    for line in ("R@1 all", "R@1 1 objects", "R@1 2 motion", "R@1 3 order", "with its frames shuffled"):
        assert line in printed
    for line in (
        "trained ",
        "frames shuffled ",
        "untrained ",
        "shuffled truth ",
        "pairs a second",
        "sum to the logit",
        "chance",
    ):
        assert line in printed


def test_quickstart_again_does_not_train_again(quickstart, generated):
    run_dir, _ = quickstart
    before = (run_dir / "checkpoints/best/model.safetensors").stat()
    metrics = (run_dir / "metrics.json").read_text()
    run("00_quickstart", run_dir, generated)
    assert (run_dir / "checkpoints/best/model.safetensors").stat() == before
    assert (run_dir / "metrics.json").read_text() == metrics


def test_quickstart_on_own_videos(own_videos, tmp_path):
    printed = run("00_quickstart", tmp_path, own_videos)
    check_metrics(tmp_path)
    assert figures(tmp_path) == {"clips", "training", "ranks", "levels", "aosm"}
    assert "carries no word-frame truth" in printed
    assert "1 objects" not in printed


def test_data(generated, tmp_path):
    printed = run("10_data", tmp_path, generated)
    assert figures(tmp_path) == {"captions", "durations", "frames", "overlap"}
    assert "evaluation can run\ntraining can run" in printed
    assert json.loads((tmp_path / "report.json").read_text())["runnable"]


def test_data_that_lacks_videos(tmp_path):
    """One test video of two is there, no training video: all is shown that can be."""
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_text(
        "key,vid_key,video_id,sentence\nret0,msr7,video7,bars that change\nret1,msr8,video8,more bars\n"
    )
    write_video(tmp_path / "video7.mp4")
    place = {"data.dataset": "msrvtt", "data.root": str(tmp_path)}
    printed = run("10_data", tmp_path / "run", place)
    assert figures(tmp_path / "run") == {"captions", "durations", "frames", "overlap"}
    assert "evaluation cannot run: 1 of 2 test videos are missing" in printed


def test_train(generated, tmp_path):
    printed = run("20_train", tmp_path, {**generated, "data.val_split": "test"})
    assert figures(tmp_path) == {"training"}
    assert (tmp_path / "checkpoints/best/model.safetensors").is_file()
    check_metrics(tmp_path)
    assert json.loads((tmp_path / "cost.json").read_text())["peak_memory_mib"] > 100
    assert "selection_split: test" in printed


def test_ablation(generated, tmp_path):
    """Two rows on frozen towers, one of them again with its own; a second run finds all done."""
    wanted = {"grid": "xclip-contrasts", "workers": 2, "run_dir": str(tmp_path / "cells")}
    printed = run("40_ablation", tmp_path, generated, **wanted)
    assert "3 cells, 0 of them done before" in printed
    place = tmp_path / "cells" / "tables"
    assert figures(place) == {"xclip-contrasts"}
    rows = (place / "xclip-contrasts.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["row", "SV", "SF", "SV"]
    assert "other data" in rows[1]
    executed = sorted((tmp_path / "cells").glob("*/20_train.ipynb"))
    assert len(executed) == 4
    before = [path.stat().st_mtime_ns for path in executed]
    assert len((tmp_path / "cells" / "runs.csv").read_text().splitlines()) == 1 + 4
    assert "3 cells, 3 of them done before" in run("40_ablation", tmp_path, generated, **wanted)
    assert [path.stat().st_mtime_ns for path in executed] == before


def test_evaluate_a_run(quickstart, generated, tmp_path):
    run_dir, _ = quickstart
    printed = run("30_evaluate", tmp_path, generated, checkpoint=str(run_dir))
    check_metrics(tmp_path)
    assert figures(tmp_path) == {"ranks", "similarity", "success", "failure"}
    assert Result.load(tmp_path).metrics == Result.load(run_dir).metrics
    assert "untrained" not in printed


def test_results_lie_in_a_folder_of_their_own(quickstart, generated, own_videos, tmp_path, monkeypatch):
    """Without a run_dir: in the run's folder beside its own numbers, or, untrained, beside the runs."""
    run_dir, _ = quickstart
    before = {path: path.read_bytes() for path in [run_dir / "metrics.json", *run_dir.glob("figures/*")]}
    monkeypatch.chdir(tmp_path)
    for name in ("30_evaluate", "50_attention"):
        run(name, tmp_path, generated, checkpoint=str(run_dir), run_dir="")
    check_metrics(run_dir / "evaluation" / "test")
    assert figures(run_dir / "attention" / "test" / "0") == ATTENTION | OF_TRUTH | {"aosm"}
    assert {path: path.read_bytes() for path in before} == before
    printed = run("30_evaluate", tmp_path, own_videos, run_dir="")
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("untrained_")
    check_metrics(folder / "evaluation" / "test")
    assert "untrained" in printed
    result = Result.load(folder / "evaluation" / "test")
    assert set(result.captions) >= {"a dog", "two cats", "a $5 bill & $6", "снег"}
    assert "untrained" in result.stamp["checkpoint"]


def test_evaluate_one_video(tmp_path):
    (tmp_path / "own").mkdir()
    write_video(tmp_path / "own" / "a_dog.mp4")
    run("30_evaluate", tmp_path, {"data.dataset": "folder", "data.root": str(tmp_path / "own")})
    check_metrics(tmp_path)
    assert figures(tmp_path) == {"ranks", "similarity", "success", "failure"}
    assert Result.load(tmp_path).intervals == {}


@needs_shared("clips")
def test_evaluate_real_videos(tmp_path):
    clips = {"data.dataset": "folder", "data.root": str(shared("clips")), "data.workers": 2}
    run("30_evaluate", tmp_path, clips)
    check_metrics(tmp_path)
    result = Result.load(tmp_path)
    assert len(result.videos) == 24
    assert not result.stamp["missing_videos"]


def test_attention(quickstart, generated, tmp_path):
    """The run beside itself, as another seed would be: maps that are the same agree without remainder."""
    run_dir, _ = quickstart
    printed = run(
        "50_attention",
        tmp_path,
        generated,
        checkpoint=str(run_dir),
        other_checkpoints=[str(run_dir)],
        caption_index=1,
    )
    assert figures(tmp_path) == ATTENTION | OF_TRUTH | {"aosm"}
    for line in ("frame-word", "logit", "frame_softmax", "this model, shuffled truth", "untrained"):
        assert line in printed
    assert "this model: points at the truth: " in printed
    table = pd.read_csv(tmp_path / "attention.csv")
    assert set(table["model"]) >= {"this model", run_dir.name, "padding masked", "untrained"}
    stability = table[(table["measure"] == "stability") & (table["model"] == run_dir.name)]
    assert stability["value"].min() == pytest.approx(1)


def test_attention_of_another_head_on_own_videos(own_videos, tmp_path):
    printed = run("50_attention", tmp_path, own_videos, preset="quickstart-glscl")
    assert figures(tmp_path) == ATTENTION
    assert "left out: explain needs a model with head.name=xclip" in printed
    assert "left out: not X-CLIP" in printed
    assert "no truth about these clips" in printed
    measures = set(pd.read_csv(tmp_path / "attention.csv")["measure"])
    assert measures == {"padding", "insertion", "deletion", "insertion_curve", "deletion_curve", "stability"}


def test_explore(quickstart, generated, tmp_path):
    """A run beside an untrained model; the figure is that of the first query."""
    run_dir, _ = quickstart
    run("60_explore", tmp_path, generated, checkpoint=str(run_dir), other="untrained", root=str(tmp_path))
    names = {path.stem for path in tmp_path.glob("*.pdf")}
    assert names == {path.stem for path in tmp_path.glob("*.png")}
    assert len([name for name in names if name.endswith("_ranking")]) == 2
    assert len(names) == 4


def test_explore_own_videos(own_videos, tmp_path):
    run("60_explore", tmp_path, own_videos, root=str(tmp_path))
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_compare(generated, tmp_path):
    """Without runs it trains a grid; with runs named it compares those, and gives the same numbers."""
    printed = run("70_compare", tmp_path / "grid", generated)
    assert "2 models to train, 0 of them done before" in printed
    assert figures(tmp_path / "grid") >= {"levels", "differences", "cost"}
    rows = (tmp_path / "grid" / "compare.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 4  # methods, each with `all` and three levels
    runs = sorted(str(folder) for folder in (tmp_path / "grid").glob("quickstart_s0_*"))
    named = {"checkpoints": runs, "pair": ["CLIP4Clip seqTransf", "CLIP4Clip meanP"]}
    printed = run("70_compare", tmp_path / "named", **named)
    assert "only CLIP4Clip seqTransf (a): " in printed
    numbers = [
        (tmp_path / name / "pairs.csv").read_text().splitlines()[1].split(",") for name in ("grid", "named")
    ]
    assert abs(float(numbers[0][4])) == abs(float(numbers[1][4]))
