"""`make gallery`: the notebooks as pages that need nothing from elsewhere."""

import subprocess
import sys
from pathlib import Path

import pytest

from xclip_lab.runs import NOTEBOOKS

SCRIPT = NOTEBOOKS.parent / "scripts" / "gallery.py"


@pytest.mark.slow
def test_every_page_is_there_and_stands_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--smoke", "--out", "gallery"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    gallery = Path(tmp_path, "gallery")
    index = (gallery / "index.html").read_text()
    for name in ("00_quickstart", "10_data", "20_train", "30_evaluate", "50_attention"):
        page = (gallery / f"{name}.html").read_text()
        assert "data:image/png;base64," in page
        assert 'src="http' not in page
        assert "widget-view" not in page
        assert f'href="{name}.html"' in index
    assert "the numbers mean nothing" in index
