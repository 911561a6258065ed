"""The README shows what is there."""

import re

from tests.shared import ROOT

README = (ROOT / "README.md").read_text()


def test_pictures_and_links_exist():
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert "docs/images/aosm.png" in targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
