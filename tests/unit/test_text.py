"""What the tokenizer refuses; its numbers are compared in the parity tests."""

import math

import pytest

from xclip_lab.errors import ConfigError
from xclip_lab.text import check_vocabulary, tokenize


@pytest.mark.parametrize("max_words", [-1, 0, 1, 78])
def test_lengths_out_of_bounds(max_words):
    with pytest.raises(ValueError, match=f"max_words {max_words} is not within 2 to 77"):
        tokenize("a dog", max_words)


@pytest.mark.parametrize("max_words", [2, 77])
def test_lengths_in_bounds(max_words):
    ids, mask = tokenize("a dog", max_words)
    assert ids.shape == mask.shape == (1, max_words)
    assert ids[0, 0] == 49406


@pytest.mark.parametrize("caption", [None, math.nan, 3, b"a dog"])
def test_captions_that_are_none(caption):
    with pytest.raises(TypeError, match=r"caption 1 is .*, not a string"):
        tokenize(["a dog", caption], 8)


def test_vocabulary():
    check_vocabulary(49408)
    check_vocabulary(50000)
    with pytest.raises(ConfigError, match=r"towers\.architecture\.vocab_size: 49407 is less than the 49408"):
        check_vocabulary(49407)
