"""Every benchmark is found by its name, from any folder."""

import pytest

from xclip_lab.bench import benchmarks, run
from xclip_lab.errors import UserError

SMALL = {
    "scores": ["--size", "40", "--large", "50", "--repeats", "1"],
    "aosm": ["--batch", "6", "--repeats", "1"],
    "heads": ["--videos", "20", "--batch", "6", "--steps", "2"],
    "cached_gradients": ["--batch", "3", "--chunk", "2"],
    "full_gallery": ["--texts", "60", "--videos", "20", "--sample", "5"],
}


@pytest.mark.parametrize(
    "name", [name for name in benchmarks() if name != "explorer"]
)  # brings Jupyter along
def test_each_tells_its_options(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(name, ["--help"])
    assert ended.value.code == 0
    assert f"xclip-lab bench {name}" in capsys.readouterr().out


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
    ],
)
def test_wrong_options_are_one_line(name, given, told):
    with pytest.raises(UserError, match=told) as refused:
        run(name, given)
    assert "\n" not in str(refused.value)
