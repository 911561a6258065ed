"""Writes a dataset of generated clips; an interrupted one is taken up where it stopped."""

from __future__ import annotations

import collections
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import av
import yaml
from tqdm.auto import tqdm

from xclip_lab import atomic
from xclip_lab.config import GenerateConfig, to_dict
from xclip_lab.datasets.base import SPLITS
from xclip_lab.datasets.synthetic import CONFIG_FILE, annotation_path, video_path
from xclip_lab.errors import DatasetError, writing
from xclip_lab.synthetic.plan import Clip, check, plan, video_ids
from xclip_lab.synthetic.render import encode, render

FORMAT = 1
"""To be raised when the same configuration begins to give other clips."""
_CLIPS_AT_ONCE = 256


def generate(
    config: GenerateConfig, root: str | Path, workers: int | None = None, progress: bool = True
) -> None:
    """Make the clips of `config` under `root` (layout: `xclip_lab.datasets.synthetic`).

    The same configuration always gives the same files. What a former call has finished is kept: a complete
    folder returns at once. A split's annotations are written after its last clip.

    Args:
        workers: threads; by default one a core. Drawing and encoding mostly run outside Python's lock.
        progress: show a bar.

    Raises:
        ConfigError: a configuration that no clips can be made of.
        DatasetError: `root` holds something else or clips of another configuration; full disk; no x264.
    """
    check(config)
    root = Path(root)
    try:
        with writing(root, " and start again: finished clips are kept"):
            _claim(config, root)
            _generate(config, root, workers or os.cpu_count() or 1, progress)
    except av.codec.codec.UnknownCodecError as error:
        raise DatasetError(
            "this PyAV cannot encode H.264 (no libx264); install the wheel: pip install av"
        ) from error


def _claim(config: GenerateConfig, root: Path) -> None:
    """Write the configuration into an empty folder, or find the same one there."""
    path = root / CONFIG_FILE
    wanted = {"format": FORMAT, **to_dict(config)}
    if path.is_file():
        try:
            found = yaml.safe_load(path.read_text())
        except yaml.YAMLError:
            found = None
        if not isinstance(found, dict):
            raise DatasetError(f"{path} is damaged; delete the folder, or name another root")
        for key in sorted({*wanted, *found}):
            if wanted.get(key) != found.get(key):
                raise DatasetError(
                    f"{root} holds clips made with {key}={found.get(key)}, not {key}={wanted.get(key)}; "
                    "delete the folder, or name another root"
                )
        return
    there = os.listdir(root) if root.is_dir() else []
    strangers = [name for name in there if not name.startswith(atomic.TEMPORARY)]
    if strangers:
        raise DatasetError(
            f"{root} holds {strangers[0]!r}, but no {CONFIG_FILE}; name an empty or new folder"
        )
    for split in ("val", "test"):  # refuses sizes that cannot be reached before anything is written
        collections.deque(plan(config, split), maxlen=0)
    root.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, yaml.safe_dump(wanted, sort_keys=False))


def _generate(config: GenerateConfig, root: Path, workers: int, progress: bool) -> None:
    splits = [split for split in SPLITS if video_ids(config, split)]
    videos = root / "videos"
    videos.mkdir(exist_ok=True)
    # An empty file is what a power cut may leave of one that was renamed but not yet on the disk.
    there = {entry.name for entry in os.scandir(videos) if entry.stat().st_size}
    missing = {
        split: {name for name in video_ids(config, split) if video_path(root, name).name not in there}
        for split in splits
    }
    to_do = [split for split in splits if missing[split] or not annotation_path(root, split).is_file()]
    if not to_do:
        return
    total = sum(len(video_ids(config, split)) for split in splits)
    make = partial(_make, root=root, size=config.size, hold=config.hold, fps=config.fps)
    bar = tqdm(
        total=total,
        initial=total - sum(map(len, missing.values())),
        desc="generating clips",
        unit="clip",
        disable=not progress,
    )
    threads = ThreadPoolExecutor(workers)
    try:
        for split in to_do:
            clips = (clip for clip in plan(config, split) if clip.video_id in missing[split])
            while batch := list(itertools.islice(clips, _CLIPS_AT_ONCE)):
                for _ in threads.map(make, batch):
                    bar.update()
            _write_annotations(config, root, split)
    finally:
        # After an error or Ctrl-C: the clips in hand are finished, the others are not begun.
        threads.shutdown(cancel_futures=True)
        bar.close()


def _make(clip: Clip, root: Path, size: int, hold: int, fps: float) -> None:
    path = video_path(root, clip.video_id)
    content = encode(render(clip, size, hold), fps)
    with atomic.replacing(path) as temporary:
        temporary.write_bytes(content)


def _write_annotations(config: GenerateConfig, root: Path, split: str) -> None:
    lines = (json.dumps(annotation(clip, config.fps)) for clip in plan(config, split))
    atomic.write_text(annotation_path(root, split), "".join(line + "\n" for line in lines))


def annotation(clip: Clip, fps: float) -> dict[str, Any]:
    """A clip's line in `<split>.jsonl`."""
    words = clip.words()
    return {
        "video_id": clip.video_id,
        "caption": " ".join(word.text for word in words),
        "level": clip.level,
        "group": clip.group,
        "frames": clip.frames,
        "fps": float(fps),
        "events": list(_events(clip)),
        "words": [
            [word.text, word.kind, [] if word.event is None else [list(clip.spans[clip.told[word.event]])]]
            for word in words
        ],
    }


def _events(clip: Clip) -> Iterator[dict[str, Any]]:
    for index, (event, span) in enumerate(zip(clip.events, clip.spans, strict=True)):
        yield {
            "things": [[thing.colour, thing.shape] for thing in event.action.things],
            "action": event.action.verb,
            "span": list(span),
            "told": index in clip.told,
        }
