"""The papers' largest evaluation, MSR-VTT full: 59,800 texts, 2,990 videos, every rank, no whole matrix.

    xclip-lab bench full_gallery [--texts 59800] [--videos 2990] [--sample 100] [--folder DIR]

X-CLIP's scores of random features (width 512, 32 words, 12 frames) that lie on the disk in float16 and are
mapped into memory. Time and peak memory are of everything from the stored features on, the temporal
transformer included; the peak counts what the process itself holds, not the pages of the mapped files. The
first texts, `--sample`, are ranked once more from a dense matrix by the formula as it reads.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from benchmarks.measure import Machine, Options, Row, folder, held, report
from benchmarks.models import FRAMES, WIDTH, WORDS, encode, words_of, xclip_model
from xclip_lab.metrics import BlockedRanks, ranks
from xclip_lab.model import RetrievalModel, computed_by
from xclip_lab.scoring import score, scored
from xclip_lab.tokens import TokenSet

CHUNK, ANONYMOUS = 1000, "RssAnon"  # without the pages of mapped files


class StoredTexts:
    """Texts as float16 words on the disk; a block of them is read when it is asked for."""

    def __init__(self, path: Path, rows: slice = slice(None)) -> None:
        self.path, self.rows = path, rows
        self.words = np.load(path, mmap_mode="r")[rows]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, rows: slice) -> TokenSet:
        words = torch.from_numpy(self.words[rows].astype(np.float32))
        return TokenSet(words.mean(1), words, torch.ones(words.shape[:2], dtype=torch.int64))


def main() -> None:
    parser = Options(__doc__, texts=59_800, videos=2_990, sample=100)
    parser.add_argument("--folder", type=folder, help="for the features, about 2 GB; else a temporary one")
    arguments = parser.parse_args()
    machine, model = Machine.measured(), xclip_model()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        texts, videos = arguments.texts, arguments.videos
        frames, words = store(Path(place), texts, videos)
        truth = np.arange(texts) % videos
        before = held(ANONYMOUS)
        began = time.perf_counter()
        with Peak() as peak:
            mask = torch.ones(videos, FRAMES, dtype=torch.int64)
            video = encode(model, torch.from_numpy(np.load(frames).astype(np.float32)), mask)
            found = BlockedRanks(truth, videos)
            for rows, block in scored(model, StoredTexts(words), video, progress=True):
                found.add(block, rows.start)
        seconds = time.perf_counter() - began
        floor = 2 * texts * videos * WORDS * FRAMES * WIDTH / machine.product
        row = Row(f"{texts:,} x {videos:,}", seconds, floor=floor, peak=peak.most - before)
        report("full_gallery", "MSR-VTT full, ranks of random features", machine, [row])
        same = compare(model, words, video, truth, found.ranks()["t2v"], arguments.sample)
        verdict = "the same as" if same else "NOT those of"
        print(f"{seconds / 60:.1f} minutes; ranks of {arguments.sample} texts {verdict} the dense way")


def store(folder: Path, texts: int, videos: int) -> tuple[Path, Path]:
    """Write `frames.npy [V, F, D]` and `words.npy [T, W, D]`, whose words speak of their video's frames."""
    frames, words = folder / "frames.npy", folder / "words.npy"
    generator = torch.Generator().manual_seed(0)
    all_frames = torch.randn(videos, FRAMES, WIDTH, generator=generator)
    np.save(frames, all_frames.half().numpy())
    written = open_memmap(words, mode="w+", dtype=np.float16, shape=(texts, WORDS, WIDTH))
    for start in range(0, texts, CHUNK):
        own = all_frames[torch.arange(start, min(start + CHUNK, texts)) % videos]
        written[start : start + CHUNK] = words_of(own, 0.1, generator).half().numpy()
    written.flush()
    return frames, words


def compare(
    model: RetrievalModel, words: Path, video: TokenSet, truth: np.ndarray, found: np.ndarray, sample: int
) -> bool:
    """Whether the first texts have the same ranks from a whole matrix by the formula."""
    rows = slice(0, sample)
    with computed_by(model, "formula"):
        dense = score(model, StoredTexts(words, rows)[rows], video)
    return bool((ranks(dense, truth[rows])["t2v"] == found[rows]).all())


class Peak:
    """The most that the process held within the block, looked at ten times a second."""

    def __enter__(self) -> Peak:
        self.most, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.most = max(self.most, held(ANONYMOUS))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    main()
