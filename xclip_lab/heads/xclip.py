from dataclasses import dataclass

from xclip_lab.heads.base import HEADS, Head


@dataclass(frozen=True)
class XClipConfig:
    name: str = "xclip"
    temperature: float = 0.01


@HEADS.register("xclip")
class XClipHead(Head):
    config_class = XClipConfig
