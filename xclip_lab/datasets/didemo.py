"""DiDeMo (Hendricks et al., ICCV 2017) for the retrieval of whole videos by paragraphs."""

from __future__ import annotations

from xclip_lab.datasets.base import DATASETS, PROTOCOLS, Family, Known, Protocol, Source, VideoTextDataset
from xclip_lab.datasets.files import LISTS, Ids, Lists, assemble, stem, whole
from xclip_lab.datasets.reading import asked_for, read_ids, read_list, text_at

# Moments were told of the first 30 seconds; the official loaders read from second 0 to second 31.
_SPAN = (0.0, 31.0)
_KNOWN = {"train": Known(8392, 8392), "val": Known(1065, 1065), "test": Known(1004, 1004)}

PROTOCOLS["didemo"] = {
    "standard": Protocol(_KNOWN, {split: (f"{split}_data.json", f"{split}_list.txt") for split in _KNOWN})
}


def _before_mp4(name: str) -> tuple[str, ...]:
    return (name.split(".mp4")[0],)


def _any(name: str) -> tuple[str, ...]:
    return (*whole(name), *_before_mp4(name), *stem(name))


# Ids hold the ending of the file that was uploaded (`.mov`, or a bare dot, or none); the families disagree on
# what the files at hand are called.
_IDS: dict[Family | None, Ids] = {"clip4clip": whole, "xclip": _before_mp4, "glscl": stem}
LISTS["didemo"] = Lists(lambda source, files: read_ids(files[1]), lambda family: _IDS.get(family, _any))


@DATASETS.register("didemo")
def didemo(source: Source) -> VideoTextDataset:
    """Read DiDeMo: all descriptions of a video joined to one caption, its first 31 seconds, in the order of
    the JSON. A listed video without a description is not in the dataset but in its `without_text`.

    Raises:
        DatasetError: missing or malformed files, no such protocol or split.
    """
    protocol, (data_file, list_file) = asked_for("didemo", source)
    listed = read_ids(list_file)
    wanted = frozenset(listed)
    told: dict[str, list[str]] = {}
    for number, entry in enumerate(read_list(data_file)):
        where = f"{data_file}, entry {number}"
        if (video := text_at(entry, "video", where)) in wanted:
            told.setdefault(video, []).append(text_at(entry, "description", where, blank=True))
    pairs = [(video, " ".join(texts)) for video, texts in told.items()]
    return assemble("didemo", protocol, source, pairs, listed=listed, spans=dict.fromkeys(told, _SPAN))
