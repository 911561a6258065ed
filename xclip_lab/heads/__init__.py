"""Heads: how token sets of texts and videos become scores. Importing this fills the registry."""

from xclip_lab.heads import clip2video, clip4clip, glscl, interactions, xclip
from xclip_lab.heads.base import HEADS, Head, HeadOutput, Tap

__all__ = ["HEADS", "Head", "HeadOutput", "Tap", "clip2video", "clip4clip", "glscl", "interactions", "xclip"]
