"""LSMDC (Rohrbach et al., IJCV 2017): clips of films."""

from __future__ import annotations

from pathlib import Path

from xclip_lab.datasets.base import DATASETS, PROTOCOLS, Known, Protocol, Source, VideoTextDataset
from xclip_lab.datasets.files import LISTS, Lists, assemble
from xclip_lab.datasets.reading import REMEDY, asked_for, read_ids, read_text
from xclip_lab.errors import DatasetError

_COLUMNS = 6
_LEFT_OUT_BY_GLSCL = {
    "0017_Pianist_00.23.28.872-00.23.34.843",
    "0017_Pianist_00.30.36.767-00.30.38.009",
    "3064_SPARKLE_2012_01.41.07.000-01.41.11.793",
}

PROTOCOLS["lsmdc"] = {
    "standard": Protocol(
        {"train": Known(None, None), "val": Known(7408, None), "test": Known(1000, 1000)},
        {
            "train": ("LSMDC16_annos_training.csv",),
            "val": ("LSMDC16_annos_val.csv",),
            "test": ("LSMDC16_challenge_1000_publictect.csv",),
        },
    )
}


def _listed(source: Source, files: tuple[Path, ...]) -> list[str]:
    """The clips of `<split>_clip_ids.txt` where there is one, else of the table of sentences."""
    table = source.root / f"{source.split}_clip_ids.txt"
    ids = read_ids(table) if table.exists() else [clip for clip, _ in _pairs(files[0])]
    return [clip for clip in ids if clip not in _left_out(source)]


def _left_out(source: Source) -> set[str]:
    return _LEFT_OUT_BY_GLSCL if source.family == "glscl" else set()


LISTS["lsmdc"] = Lists(_listed)


@DATASETS.register("lsmdc")
def lsmdc(source: Source) -> VideoTextDataset:
    """Read LSMDC: a sentence a line, in the order of the file. A clip may have several. The family `glscl`
    leaves out three clips, as its official code does.

    Raises:
        DatasetError: missing or malformed files, no such protocol or split.
    """
    protocol, (file,) = asked_for("lsmdc", source)
    pairs = [pair for pair in _pairs(file) if pair[0] not in _left_out(source)]
    return assemble("lsmdc", protocol, source, pairs)


def _pairs(path: Path) -> list[tuple[str, str]]:
    """Clip id and sentence. Tabs alone separate the columns: a quote is part of the sentence."""
    pairs = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        cells = line.strip().split("\t")
        if cells == [""]:
            continue
        if len(cells) == _COLUMNS - 1 and line.lstrip().count("\t") == len(cells):
            cells.append("")  # a blank sentence: `strip` took the tab before it
        if len(cells) != _COLUMNS or not cells[0].strip():
            raise DatasetError(
                f"{path}, line {number}: not the six columns clip id, start and end aligned, start and end "
                f"extracted, sentence, separated by tabs: {line[:80]!r}; {REMEDY}"
            )
        pairs.append((cells[0], cells[-1]))
    return pairs
