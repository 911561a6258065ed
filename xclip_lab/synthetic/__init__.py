"""Captioned clips made on the spot: real H.264 files whose every word knows the frames it speaks of.

`scenes` says what can happen in a clip, `captions` says it in words, `plan` chooses the clips of a split,
`render` draws and encodes one, `generate` writes them all and `truth` tells which word speaks of which frame.
"""

from xclip_lab.synthetic.generate import generate
from xclip_lab.synthetic.truth import ClipTruth, load_truth

__all__ = ["ClipTruth", "generate", "load_truth"]
