"""Videos written out for other programs: CLIP2Video's folders of JPEGs, CLIP4Clip's compressed copies."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Literal, get_args

import av
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from xclip_lab import atomic, sampling
from xclip_lab.errors import ConfigError, DatasetError, VideoError, first_few, writing
from xclip_lab.frame_folder import NOTE_FILE
from xclip_lab.video import VideoInfo, iterate_frames, probe
from xclip_lab.workers import watched

To = Literal["frames", "video"]
FAILURES_FILE = "failures.json"
# What CLIP2Video's and CLIP4Clip's scripts take: frames a second, the shorter side (None: as it is).
_DEFAULTS: dict[To, tuple[float, int | None]] = {"frames": (5.0, None), "video": (3.0, 224)}
_JPEG_QUALITY = 95  # about FFmpeg's best, which CLIP2Video's script asks for
_MAX_FRAMES = 1_000_000
_CLOCK_ERROR = 1e-4
_TIMEOUT_S = 600.0  # after which a decoder counts as stuck with a video


@dataclass
class Exported:
    """What `export` did: how many videos were written now, how many were there already, and which cannot be
    read, by name with the reason."""

    written: int = 0
    found: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.written} videos written, {self.found} were there already"]
        if self.failed:
            reasons = (f"{name}: {reason}" for name, reason in self.failed.items())
            lines.append(f"{len(self.failed)} videos cannot be read (all of them are in {FAILURES_FILE}):")
            lines.append("  " + first_few(reasons, "\n  "))
        return "\n".join(lines)


def export(
    videos: Mapping[str, Path],
    out: str | Path,
    to: To,
    fps: float | None = None,
    short_side: int | None = None,
    workers: int = 0,
    progress: bool = True,
) -> Exported:
    """Write videos to `out/NAME/00000001.jpg` and so on, or to `out/NAME.mp4`.

    Stopped at any moment it loses nothing: the same call goes on with what is missing. Beside the videos lie
    `prepared.json`, from which a folder's frame rate is read again, and `failures.json`. Videos below `out`
    are left out: an earlier call wrote them.

    Args:
        videos: by name, such as `video7010` or `movie/clip` (see `names`).
        to: `frames` or `video`. fps, short_side: as in `to_frames` and `to_video`, None for their defaults.
        workers: processes; 0 works in this one.

    Raises:
        ConfigError: another `to`, or an impossible rate or size. DatasetError: names that exclude each other,
            or `out` holds something else or cannot be written.
    """
    if to not in _DEFAULTS:
        raise ConfigError(f"to: {to!r} is not one of {', '.join(get_args(To))}")
    fps = _DEFAULTS[to][0] if fps is None else fps
    short_side = _DEFAULTS[to][1] if short_side is None else short_side
    _check(fps, short_side)
    out = Path(out)
    place = os.path.realpath(out)
    videos = {n: path for n, path in videos.items() if not Path(os.path.realpath(path)).is_relative_to(place)}
    targets = {name: out / (name if to == "frames" else f"{name}.mp4") for name in videos}
    _prepare(out, targets, {"to": to, "fps": fps, "short_side": short_side})
    to_do = [name for name, target in targets.items() if not target.exists()]
    report = Exported(found=len(videos) - len(to_do))
    jobs = [(to, videos[name], targets[name], fps, short_side) for name in to_do]
    bar = tqdm(desc=f"write {to}", total=len(jobs), unit="video", disable=not progress, smoothing=0.05)
    try:
        with bar, closing(watched(_export_one, jobs, workers, _TIMEOUT_S)) as outcomes:
            for number, outcome in outcomes:
                if isinstance(outcome.value, DatasetError):
                    raise outcome.value
                if outcome.error is not None:
                    report.failed[to_do[number]] = outcome.error
                    atomic.remove(_temporary(targets[to_do[number]]))
                report.written += outcome.error is None
                bar.update()
    except BaseException:
        for name in to_do:  # the workers were killed
            atomic.remove(_temporary(targets[name]))
        raise
    atomic.write_text(out / FAILURES_FILE, json.dumps(report.failed, indent=1) + "\n")
    return report


def names(paths: Iterable[Path], root: Path) -> dict[str, Path]:
    """Videos by their path below `root` without the suffix, as `export` wants them.

    Raises:
        DatasetError: two files that differ in their suffix alone.
    """
    by_name: dict[str, Path] = {}
    for path in dict.fromkeys(paths):
        below = Path(os.path.relpath(path, root))
        name = (below if path.is_dir() else below.with_suffix("")).as_posix()
        if name in by_name:
            raise DatasetError(f"{path} and {by_name[name]} would share the name {name!r}; rename one")
        by_name[name] = path
    return by_name


def to_frames(path: str | Path, folder: str | Path, fps: float = 5.0, short_side: int | None = None) -> int:
    """Write the frames that CLIP2Video's `ffmpeg -r FPS` takes of a video as `00000001.jpg` and so on.

    Returns:
        How many JPEGs were written.

    Raises:
        VideoError: the video cannot be read; then there is no folder. ConfigError: as in `export`.
    """
    info, folder = _probe(path, fps, short_side), Path(folder)
    places = _on_display(info, fps)
    if not info.files:
        frame_seconds = sampling.shown_for(info.timestamps, info.duration)
        places = sampling.folder_frames(info.timestamps, frame_seconds, fps)
    copies, number = Counter(places), 0
    with _written(folder) as temporary:
        temporary.mkdir()
        for index, pixels in iterate_frames(info, places):
            jpeg = BytesIO()  # into a file Pillow writes half where the disk takes no more, and says nothing
            _resized(pixels, _size(info, short_side)).save(jpeg, "JPEG", quality=_JPEG_QUALITY)
            for _ in range(copies[index]):
                number += 1
                (temporary / f"{number:08d}.jpg").write_bytes(jpeg.getbuffer())
    return number


def to_video(path: str | Path, file: str | Path, fps: float = 3.0, short_side: int | None = 224) -> int:
    """Write a small H.264 copy without sound: every `1 / fps` seconds the frame that is then on display.

    CLIP4Clip's script uses FFmpeg's defaults likewise, but squeezes a portrait into a landscape; here the
    aspect ratio stays.

    Returns:
        How many frames were written.

    Raises:
        VideoError: the video cannot be read, or not be written as H.264; then there is no file. ConfigError:
            as in `export`.
    """
    info, rate = _probe(path, fps, short_side), Fraction(fps).limit_denominator(1000)
    places = _on_display(info, fps)
    height, width = (max(2, side // 2 * 2) for side in _size(info, short_side))
    copies, number = Counter(places), 0
    with (
        _written(Path(file)) as temporary,
        av.open(os.path.abspath(temporary), "w", format="mp4") as container,
    ):
        stream = container.add_stream("libx264", rate=rate, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index, pixels in iterate_frames(info, places):
            frame = av.VideoFrame.from_image(_resized(pixels, (height, width)))
            frame.time_base = 1 / rate
            for _ in range(copies[index]):
                frame.pts = number
                container.mux(stream.encode(frame))
                number += 1
        container.mux(stream.encode())
    return number


def _export_one(job: tuple[To, Path, Path, float, int | None]) -> DatasetError | None:
    """Write one video; the error of a disk that cannot be written."""
    to, path, target, fps, short_side = job
    try:
        with writing(target, " and give the same command again: what is finished is kept"):
            if to == "frames":
                to_frames(path, target, fps, short_side)
            else:
                to_video(path, target, fps, short_side)
    except DatasetError as error:
        return None if target.exists() else error  # another machine was faster
    return None


def _check(fps: float, short_side: int | None) -> None:
    if not 0.001 <= fps <= 1000:
        raise ConfigError(f"fps: {fps:g} is not a number of frames a second from 0.001 to 1000")
    if short_side is not None and not 2 <= short_side <= 4096:
        raise ConfigError(f"short_side: {short_side} is not a number of pixels from 2 to 4096")


def _prepare(out: Path, targets: Mapping[str, Path], note: dict[str, object]) -> None:
    """Make the folders and leave the note in each, unless other things are there."""
    strange = [name for name in targets if Path(name).is_absolute() or {"", ".."} & {name, *Path(name).parts}]
    parents = {target.parent for target in targets.values()} | {out}
    strange += [name for name, target in targets.items() if target in parents]
    if strange:
        raise DatasetError(f"video {strange[0]!r} cannot be written below {out}: its name leads elsewhere")
    try:
        if (out / NOTE_FILE).is_file():
            before = json.loads((out / NOTE_FILE).read_text(encoding="utf-8"))
            if before != note:
                raise DatasetError(f"{out}: holds {before}, not {note}; choose another folder")
        elif out.is_dir() and any(out.iterdir()):
            raise DatasetError(f"{out}: holds other files; choose an empty folder")
        for parent in parents:
            parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(parent / NOTE_FILE, json.dumps(note) + "\n")
    except (OSError, ValueError) as error:
        raise DatasetError(f"{out}: cannot be used ({error}); choose another folder") from error


def _probe(path: str | Path, fps: float, short_side: int | None) -> VideoInfo:
    _check(fps, short_side)
    info = probe(path)
    if info.duration * fps > _MAX_FRAMES:
        raise VideoError(f"{path}: lasts {info.duration:.0f} s by its own word; too long to be written")
    return info


def _on_display(info: VideoInfo, fps: float) -> list[int]:
    """The frame that is shown at each `1 / fps` seconds."""
    times = np.arange(max(1, round(info.duration * fps))) / fps
    shown = np.searchsorted(info.timestamps, times + _CLOCK_ERROR, side="right") - 1
    return shown.tolist()


def _size(info: VideoInfo, short_side: int | None) -> tuple[int, int]:
    """Height and width with the shorter one as wanted."""
    shorter = min(info.height, info.width)
    wanted = shorter if short_side is None else short_side
    return info.height * wanted // shorter, info.width * wanted // shorter


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(pixels)
    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """Where to write what becomes `target` if all goes well, and is removed if not."""
    temporary = _temporary(target)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    atomic.remove(temporary)
    with atomic.replacing(target, temporary):
        yield temporary
        atomic.sync(temporary)
    atomic.sync(target.parent)


def _temporary(target: Path) -> Path:
    """Beside the target, another one on each machine; a digest, because names may be as long as a file's name
    can be."""
    name = os.fsencode(f"{platform.node()}/{target.name}")
    return target.with_name(atomic.TEMPORARY + hashlib.sha256(name).hexdigest()[:16])
