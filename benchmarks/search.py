"""A query against a library: how long it takes, and what the shortlist loses of the exact ranking.

    xclip-lab bench search [--width 512] [--sizes 1000 5000 50000]
    xclip-lab bench search --run RUN

With random features of X-CLIP's sizes (32 words, 12 frames; a query is one of the videos seen through noise)
the time is what a person waits for; the naive way is the exact search. What a shortlist loses depends on the
model: `--run` takes a trained one, all generated clips of its run as the library and every fourth of its test
captions as a query.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from torch.nn.functional import normalize

from benchmarks.measure import Machine, Options, Row, count, report
from benchmarks.models import FRAMES, config_of
from xclip_lab import load_dataset, load_model
from xclip_lab.config import load_config
from xclip_lab.model import create_model
from xclip_lab.search import EXACT_UP_TO, SHORTLIST, Library, open_library
from xclip_lab.tokens import TokenSet

TOP, QUERIES = 10, 5
EXACT = {"exact_up_to": 10**9}


class Planted(Library):
    """A library whose queries are numbers: that video's frames with noise, as words."""

    def encode(self, query: str) -> TokenSet:
        frames, words = self.video.tokens[int(query)], self.model.config.max_words
        chosen = frames[torch.arange(words) % len(frames)]
        noisy = chosen + 3 * chosen.norm(dim=-1).mean() / chosen.shape[-1] ** 0.5 * torch.randn_like(chosen)
        return TokenSet(noisy.mean(0)[None], noisy[None], torch.ones(1, words, dtype=torch.int64))


def main() -> None:
    parser = Options(__doc__, width=512)
    parser.add_argument("--sizes", type=count, nargs="+", default=[1000, 5000, 50000], help="videos")
    parser.add_argument("--run", help="a run on generated clips")
    arguments = parser.parse_args()
    machine = Machine.measured()
    if arguments.run is None:
        rows = [planted(size, arguments.width) for size in arguments.sizes]
    else:
        rows = trained(arguments.run)
    report("search", "A query, by a shortlist and exactly", machine, rows)


def planted(size: int, width: int) -> Row:
    library = random_library(size, width)
    queries = [str(number) for number in torch.linspace(0, size - 1, QUERIES).long().tolist()]
    exact, of_exact = timed(library, queries, **EXACT)
    short, of_short = timed(library, queries, exact_up_to=0)
    note = f"{shared(of_exact, of_short):.0%} of the exact top {TOP} in it"
    note += "" if size > EXACT_UP_TO else "; so few are searched exactly"
    return Row(f"{size:,} videos, shortlist of {SHORTLIST}", short, exact, note=note)


def trained(run: str) -> list[Row]:
    data = load_config(Path(run, "config.yaml")).data
    library = open_library(Path(data.root, "videos"), load_model(run))
    captions = [sample.caption for sample in load_dataset(data.dataset, "test", data.root).samples][::4]
    exact, of_exact = timed(library, captions, **EXACT)
    print(f"{len(captions)} captions of {run}")
    rows = []
    for shortlist in (50, 100, 200, SHORTLIST, 1000):
        took, found = timed(library, captions, exact_up_to=0, shortlist=shortlist)
        first = sum(a[0] == b[0] for a, b in zip(of_exact, found, strict=True)) / len(captions)
        note = f"{shared(of_exact, found):.1%} of the exact top {TOP} in it, the same first for {first:.1%}"
        rows.append(Row(f"{len(library):,} videos, shortlist of {shortlist}", took, exact, note=note))
    return rows


def random_library(size: int, width: int) -> Library:
    config = config_of("xclip", "meanP", embed_dim=width)
    torch.manual_seed(0)
    frames = torch.randn(size, FRAMES, width) + torch.randn(size, 1, width)  # a video's frames are alike
    pooled = normalize(normalize(frames, dim=-1).mean(1), dim=-1)
    video = TokenSet(pooled, frames, torch.ones(size, FRAMES, dtype=torch.int64))
    names = [f"v{number}" for number in range(size)]
    seconds = torch.arange(float(FRAMES)).expand(size, -1)
    paths = [Path(name) for name in names]
    return Planted(create_model(config).eval(), config, names, paths, video, seconds, {}, 0)


def timed(library: Library, queries: list[str], **how: int) -> tuple[float, list[list[str]]]:
    """Seconds a query (the median), and the first videos of each."""
    taken, found = [], []
    library.search(queries[0], **how)
    for query in queries:
        torch.manual_seed(len(found))
        began = time.perf_counter()
        hits = library.search(query, TOP, **how).hits
        taken.append(time.perf_counter() - began)
        found.append([hit.video for hit in hits])
    return statistics.median(taken), found


def shared(one: list[list[str]], other: list[list[str]]) -> float:
    return statistics.mean(len(set(a) & set(b)) / len(a) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main()
