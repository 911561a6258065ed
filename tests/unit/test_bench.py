"""Every benchmark is found by its name, from any folder."""

import pytest

from xclip_lab.bench import benchmarks, run


@pytest.mark.parametrize(
    "name", [name for name in benchmarks() if name != "explorer"]
)  # brings Jupyter along
def test_each_tells_its_options(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(name, ["--help"])
    assert ended.value.code == 0
    assert f"xclip-lab bench {name}" in capsys.readouterr().out
