"""Token ids equal the official loaders'."""

from __future__ import annotations

import json

import pytest

from tests.parity.golden import Golden
from tests.shared import golden_paths
from xclip_lab.text import caption_words, token_words, tokenize

FILES = golden_paths("tokens.npz")


@pytest.mark.parametrize("width", [12, 32, 77])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ids_and_masks(path, width):
    sentences = json.loads(path.with_suffix(".json").read_text())["sentences"]
    golden = Golden(path)
    ids, mask = tokenize(sentences, width)
    assert ids.tolist() == golden[f"ids_{width}"].tolist()
    assert mask.tolist() == golden[f"mask_{width}"].tolist()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_words_cover_the_tokens(path):
    for sentence in json.loads(path.with_suffix(".json").read_text())["sentences"]:
        _, mask = tokenize(sentence, 77)
        words = token_words(sentence, 77)
        tokens = int(mask.sum())
        assert words[0] == -1
        assert set(words[tokens:]) <= {-1}
        if tokens < 77:
            assert words[1 : tokens - 1] == sorted(words[1 : tokens - 1])
            assert set(words[1 : tokens - 1]) == set(range(len(caption_words(sentence))))
