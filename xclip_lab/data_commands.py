"""What `xclip-lab data ...` does. Imports are inside, as in `commands`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from xclip_lab.atomic import check_writable
from xclip_lab.commands import with_shortcuts
from xclip_lab.errors import ConfigError, DatasetError


def generate(arguments: Namespace) -> None:
    """Make captioned clips."""
    from xclip_lab.config import load_config
    from xclip_lab.runs import prepare_data

    overrides = {f"data.generate.{key}": value for key, value in arguments.overrides.items()}
    if arguments.root is not None:
        overrides["data.root"] = arguments.root
    config = load_config("quickstart", overrides)
    prepare_data(config)
    print(f"clips in {config.data.root}")


def check(arguments: Namespace) -> None:
    """What of a dataset is there, and whether its protocol can be run with it."""
    from xclip_lab.check import check as look

    if arguments.out and Path(arguments.out).is_dir():
        raise ConfigError(f"--out {arguments.out} is a folder; name the JSON file in it")
    place = Path(arguments.out).parent if arguments.out else "runs/data_check"
    check_writable(place, " for the report (--out)")
    report = look(
        arguments.name,
        arguments.root,
        arguments.protocol,
        videos=arguments.videos,
        family=arguments.family,
        split=arguments.split,
        open_videos=arguments.probe,
        workers=arguments.workers,
    )
    print(report)
    print(f"saved as {report.save(arguments.out or Path('runs/data_check', f'{report.slug}.json'))}")
    if not report.runnable:
        raise DatasetError(report.closing)


def prepare(arguments: Namespace) -> None:
    """Decode the videos of a dataset once, into the store or into files."""
    from xclip_lab import study
    from xclip_lab.config import load_config
    from xclip_lab.prepare import prepare as decode

    if arguments.to is not None:
        return _export(arguments)
    if arguments.fps is not None or arguments.short_side is not None or arguments.out is not None:
        raise ConfigError(
            "--fps, --short-side and --out belong to files: say which by --to frames or --to video"
        )
    config = load_config(*_dataset(arguments, {"data.store": arguments.store}))
    if config.data.store is None:
        raise ConfigError("no folder for the frames; name it by --store DIR")
    print(f"decoded frames go to {config.data.store}", flush=True)
    report = decode(study.open_splits(config, arguments.split), config, _workers(arguments))
    print(report)
    _complain_of(report.failed)
    print(f"next: any command on this data with --data.store {config.data.store}")


def _export(arguments: Namespace) -> None:
    """The videos of a dataset as folders of frames, or as small copies."""
    from xclip_lab import study
    from xclip_lab.config import load_config
    from xclip_lab.export import export, names

    if arguments.out is None or arguments.store is not None:
        raise ConfigError(f"--to {arguments.to} writes files: name their folder by --out DIR, and no --store")
    config = load_config(*_dataset(arguments, {}))
    samples = [s for dataset in study.open_splits(config, arguments.split) for s in dataset.samples]
    found = {s.video_id: s.path for s in samples if s.path is not None}
    if config.data.dataset == "folder":
        found = names(found.values(), Path(config.data.videos or config.data.root))
    report = export(
        found, arguments.out, arguments.to, arguments.fps, arguments.short_side, _workers(arguments)
    )
    print(report)
    missing = {s.video_id: "no file" for s in samples if s.path is None}
    _complain_of(missing | report.failed)


def _dataset(arguments: Namespace, shortcuts: Mapping[str, str | None]) -> tuple[str, dict[str, str]]:
    """A preset and overrides for a dataset that is named by itself or by a preset."""
    from xclip_lab.config import presets as all_presets

    name = arguments.name
    if (name is None) == (arguments.preset is None):
        raise ConfigError("name a dataset, such as msrvtt, or a preset by --preset")
    places = {"data.dataset": name, "data.root": arguments.root, "data.videos": arguments.videos}
    usual = f"xclip-{name}-b32"
    preset = arguments.preset or (usual if usual in all_presets() else "xclip-folder-b32")
    return preset, with_shortcuts(arguments, {**places, **shortcuts})


def _workers(arguments: Namespace) -> int:
    from xclip_lab.workers import usable_cores

    if arguments.workers is not None and arguments.workers < 0:
        raise ConfigError(f"--workers {arguments.workers} is not a number of processes")
    return usable_cores() if arguments.workers is None else arguments.workers


def _complain_of(failed: Mapping[str, str]) -> None:
    if failed:
        video, reason = next(iter(failed.items()))
        raise DatasetError(
            f"{len(failed)} videos are missing or cannot be read, such as {video}: {reason}. The others are "
            "done; xclip-lab data check says what is missing"
        )
