"""Captions to CLIP's token ids, as the official loaders do it, and which word each token came from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import regex
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from xclip_lab.errors import ConfigError

_START, _END = "<|startoftext|>", "<|endoftext|>"
_SHORTEST, _LONGEST = 2, 77  # the two marks; CLIP's positions


class ClipTokenizer(SimpleTokenizer):
    """OpenAI's byte pair encoding. open_clip spells the two special marks otherwise; a caption that holds one
    of them literally must give its id, as in OpenAI's code."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder |= {_START: self.sot_token_id, _END: self.eot_token_id}
        self.cache = {_START: _START, _END: _END}
        self.pat = regex.compile(
            r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE,
        )


@cache
def tokenizer() -> ClipTokenizer:
    """The tokenizer, built at the first call."""
    return ClipTokenizer()


def check_vocabulary(size: int) -> None:
    """See to it that a model with `size` token embeddings has one for every token.

    Raises:
        ConfigError: it has fewer than the tokenizer has tokens.
    """
    needed = tokenizer().vocab_size
    if size < needed:
        raise ConfigError(
            f"towers.architecture.vocab_size: {size} is less than the {needed} tokens of CLIP's tokenizer; "
            f"set it to {needed}, or leave it out"
        )


def tokenize(captions: str | Sequence[str], max_words: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask of captions: start mark, tokens, end mark, then padding with id 0.

    A caption that is too long keeps its first `max_words - 1` entries and then the end mark.

    Args:
        captions: B captions (one string counts as one caption). max_words: W, 2 to 77.

    Returns:
        ids int64 `[B, W]`, mask int64 `[B, W]` (1 = real).

    Raises:
        ValueError: `max_words` out of bounds. TypeError: a caption that is no string.

    >>> ids, mask = tokenize(["a red circle"], 6)
    >>> ids.tolist(), mask.tolist()
    ([[49406, 320, 736, 7117, 49407, 0]], [[1, 1, 1, 1, 1, 0]])
    """
    if not _SHORTEST <= max_words <= _LONGEST:
        raise ValueError(f"max_words {max_words} is not within {_SHORTEST} to {_LONGEST}")
    captions = [captions] if isinstance(captions, str) else captions
    for row, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(f"caption {row} is {caption!r} ({type(caption).__name__}), not a string")
    ids = torch.zeros(len(captions), max_words, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    bpe = tokenizer()
    for row, caption in enumerate(captions):
        tokens = [bpe.sot_token_id, *bpe.encode(caption)][: max_words - 1]
        tokens.append(bpe.eot_token_id)
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


def caption_words(caption: str) -> list[str]:
    """The words of a caption as the tokenizer sees them: cleaned, lower case, split at white space."""
    return tokenizer().clean_fn(caption).split()


def token_words(caption: str, max_words: int) -> list[int]:
    """For each of the `max_words` positions of `tokenize`, the index of its word in `caption_words(caption)`;
    -1 for the marks and for padding.

    >>> token_words("a red circle", 6)
    [-1, 0, 1, 2, -1, -1]
    """
    bpe = tokenizer()
    words = [index for index, word in enumerate(caption_words(caption)) for _ in bpe.encode(word)]
    words = [-1, *words][: max_words - 1]
    return words + [-1] * (max_words - len(words))


def token_texts(token_ids: Sequence[int]) -> list[str]:
    """What each token reads, for axis labels; padding reads as an empty string."""
    bpe = tokenizer()
    marks = {0: "", bpe.sot_token_id: "[start]", bpe.eot_token_id: "[end]"}
    return [marks[token] if token in marks else bpe.decode([token]).strip() for token in map(int, token_ids)]
