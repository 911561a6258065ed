"""Every benchmark is found by its name, from any folder."""

import re
import sys

import pytest

from xclip_lab.bench import benchmarks, run
from xclip_lab.errors import UserError

SMALL = {
    "scores": ["--size", "40", "--large", "50", "--repeats", "1"],
    "aosm": ["--batch", "6", "--repeats", "1"],
    "heads": ["--videos", "20", "--batch", "6", "--steps", "2"],
    "cached_gradients": ["--batch", "3", "--chunk", "2"],
    "scoring_cost": ["--size", "4"],
    "search": ["--sizes", "30", "--width", "16"],
    "full_gallery": ["--texts", "60", "--videos", "20", "--sample", "5"],
}


@pytest.mark.parametrize("name", sorted(benchmarks().keys() - {"explorer"}))  # that brings Jupyter along
def test_each_tells_its_options(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(name, ["--help"])
    assert ended.value.code == 0
    usage, _, text = capsys.readouterr().out.partition("\n\n")
    assert usage.startswith(f"usage: xclip-lab bench {name} ")
    description = text.partition("\n\noptions:")[0]
    assert f"\n    xclip-lab bench {name}" in description
    assert set(re.findall(r"--\w+", usage)) <= set(re.findall(r"--\w+", description))


@pytest.mark.parametrize("name", SMALL)
def test_each_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("xclip_lab.bench.sys.argv", ["bench"])
    run(name, SMALL[name])
    assert (tmp_path / "runs" / "bench" / f"{name}.json").exists()
    assert "NOT" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("aosm", ["--batch", "0"], r"^aosm: argument --batch: '0' is no number from 1 on; --help tells"),
        ("first_decode", ["--videos", "/nope"], r"^first_decode: argument --videos: /nope: no such folder"),
        ("first_decode", ["--videos", "."], r"pip install opencv-python-headless"),
        ("frame_store", [], r"pip install opencv-python-headless"),
        ("heads", ["--batch", "1"], r"^heads: --batch: from 2 on"),
        ("heads", ["--batch", "8", "--videos", "4"], r"as many as --videos; --help tells"),
        ("cached_gradients", ["--batch", "1"], r"^cached_gradients: --batch: the loss of fewer than 2"),
        ("ledger_effects", ["."], r"^\.: no run of quickstart with seed 0; notebook 70_compare makes them"),
    ],
)
def test_what_cannot_be_measured_is_one_line(name, given, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "cv2", None)  # as if it were not installed
    with pytest.raises(UserError, match=told) as refused:
        run(name, given)
    assert "\n" not in str(refused.value)
