"""MSVD (Chen and Dolan, ACL 2011)."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from xclip_lab.datasets.base import DATASETS, PROTOCOLS, Known, Protocol, Source, VideoTextDataset
from xclip_lab.datasets.files import LISTS, Lists, assemble
from xclip_lab.datasets.reading import REMEDY, asked_for, listed_entry, of_kind, read_ids, texts_of
from xclip_lab.errors import AbsentError, DatasetError

_CAPTIONS = "raw-captions.pkl"
_KNOWN = {"train": Known(1200, 48_774), "val": Known(100, 4290), "test": Known(670, 27_763)}

PROTOCOLS["msvd"] = {
    "standard": Protocol(_KNOWN, {split: (f"{split}_list.txt", _CAPTIONS) for split in _KNOWN}),
}
LISTS["msvd"] = Lists(lambda source, files: read_ids(files[0]))


@DATASETS.register("msvd")
def msvd(source: Source) -> VideoTextDataset:
    """Read MSVD: every caption of a video, in training and in testing, in the order of the split's list.

    Raises:
        DatasetError: missing or malformed files, a listed video without captions, no such protocol or split.
    """
    protocol, (list_file, captions_file) = asked_for("msvd", source)
    captions = read_captions(captions_file)
    pairs = []
    listed = read_ids(list_file)
    for video in listed:
        entry, where = listed_entry(captions, video, captions_file, list_file)
        lists = of_kind(entry, list, where)
        pairs += [(video, " ".join(texts_of(words, where))) for words in lists]
    return assemble("msvd", protocol, source, pairs, listed=listed)


def read_captions(path: Path) -> dict[str, Any]:
    """The pickle of id -> list of word lists. Nothing but dicts, lists and strings is read from it: a pickle
    may call any function when it is loaded.

    Raises:
        AbsentError: no such file. DatasetError: damaged, or it asks for anything else.
    """
    try:
        data = _Plain(io.BytesIO(path.read_bytes()), encoding="utf-8").load()
    except FileNotFoundError as error:
        raise AbsentError(f"{path}: no such file; {REMEDY}") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # a damaged pickle may end in any of them
        raise DatasetError(f"{path}: not a pickle of dicts, lists and strings ({error}); {REMEDY}") from error
    return of_kind(data, dict, str(path))


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
