"""How long generated clips take to make and to decode again.

    xclip-lab bench generate_clips [--clips 2000]

Prints seconds and clips a second; the aim is 2,000 clips made in under 60 s on two cores.
"""

from __future__ import annotations

import os
import tempfile
import time

from benchmarks.measure import Options
from xclip_lab.clips import ClipDataset, preload
from xclip_lab.config import load_config
from xclip_lab.datasets import load_dataset
from xclip_lab.synthetic import generate


def main() -> None:
    clips = Options(__doc__, clips=2000).parse_args().clips
    with tempfile.TemporaryDirectory() as root:
        overrides = {"data.generate.train_clips": clips, "data.root": root, "data.workers": os.cpu_count()}
        config = load_config("quickstart", overrides)
        start = time.perf_counter()
        generate(config.data.generate, root, progress=False)
        made = time.perf_counter()
        preload(ClipDataset(load_dataset("synthetic", "train", root), config), progress=False)
        decoded = time.perf_counter()
    total = clips + config.data.generate.test_clips
    print(f"{os.cpu_count()} cores, {config.data.generate.size} pixels, {config.data.generate.frames} frames")
    print(f"made    {total} clips in {made - start:.1f} s ({total / (made - start):.0f} a second)")
    print(f"decoded {clips} clips in {decoded - made:.1f} s ({clips / (decoded - made):.0f} a second)")


if __name__ == "__main__":
    main()
