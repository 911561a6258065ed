"""Run folders: where a run lies, what it needs before it starts, the notebooks in it, and a list of them."""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from xclip_lab.atomic import check_writable, write_text
from xclip_lab.config import RunConfig, config_from_dict, default_values, to_dict
from xclip_lab.errors import UserError, writing

if TYPE_CHECKING:
    import pandas as pd

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
METRICS = "metrics.json"
FAILED = "failed.txt"
"""Why the last try of a sweep's cell came to nothing, in its folder."""


class RunError(UserError):
    """A run folder that cannot be made or found, or a notebook that is missing or failed."""


@dataclass(frozen=True)
class RunSummary:
    """A line of `list_runs`: `state` in words, `data` as dataset, protocol and split of the `metrics`, which
    are `{"t2v": {"R@1": ...}, ...}` or empty."""

    name: str
    preset: str
    data: str
    state: str
    metrics: dict[str, dict[str, float]]


def config_hash(config: RunConfig) -> str:
    """Eight hexadecimal digits, the same for equal configs and in practice for no others.

    They are of what differs from the defaults, so that a version with more settings finds its runs again.
    """
    # Validated once more every number has its own type: a default may be written 1 where a file says 1.0.
    values = to_dict(config_from_dict(to_dict(config)))
    told = {"head": config.head.name, "beyond_defaults": _beyond(default_values(config.head.name), values)}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def _beyond(defaults: Any, values: dict[str, Any]) -> dict[str, Any]:
    """What of `values` is not a default."""
    found = {}
    for key, value in values.items():
        default = defaults.get(key) if isinstance(defaults, dict) else None
        if isinstance(value, dict):
            value, default = _beyond(default, value), {}
        if value != default:
            found[key] = value
    return found


def new_run_dir(config: RunConfig, root: str | Path = "runs") -> Path:
    """The folder of a run of `config`, not made yet: `<root>/<date>_<preset>_<hash>`.

    The hash is of the whole resolved config but `train.tower_chunk`, which may change; the date is the day
    the run began: the same command finds its run again on any later day, `fit` goes on with it, and no other
    config ever gets the same folder.

    Raises:
        RunError: the folder cannot be made or written; nothing is left there.
    """
    lasting = replace(config, train=replace(config.train, tower_chunk=None))
    root, name = Path(root), f"{config.preset}_{config_hash(lasting)}"
    begun = sorted(path for path in root.glob(f"????-??-??_{name}") if path.is_dir())
    run_dir = begun[-1] if begun else root / f"{datetime.date.today().isoformat()}_{name}"
    check_writable(run_dir, " for the run", RunError)
    return run_dir


def result_dir(
    checkpoint: str | Path | None, config: RunConfig, name: str, root: str | Path = "runs"
) -> Path:
    """Where a result goes, never a run folder itself; not made yet.

    Args:
        checkpoint: as `study.open_model` takes it. config: all that the result is made with.
        name: of the result, such as `evaluation/test`.

    Returns:
        `<run>/<name>` of a checkpoint in a run folder; else `<root>/checkpoint_<hash>/<name>` or, for an
        untrained model, `<root>/untrained_<hash>/<name>`, another one for each checkpoint and config.

    Raises:
        CheckpointError: no checkpoint there.
    """
    from xclip_lab.checkpoint import find_model_file, run_folder_of

    if not checkpoint:
        return Path(root) / f"untrained_{config_hash(config)}" / name
    file = find_model_file(checkpoint)
    key = f"{file.absolute()} {config_hash(config)}"
    elsewhere = Path(root) / f"checkpoint_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    return (run_folder_of(file) or elsewhere) / name


def evaluation_name(config: RunConfig, trained: RunConfig | None, split: str) -> str:
    """The name of an evaluation in a run's folder: `evaluation/test`, and one of its own on other data than
    the run's, so that no number takes another's place."""
    of_run, here = (
        [d.dataset, d.protocol, d.root, d.videos] for d in ((trained or config).data, config.data)
    )
    if of_run == here:
        return f"evaluation/{split}"
    place = "" if of_run[2:] == here[2:] else hashlib.sha256(repr(here).encode()).hexdigest()[:8]
    return "evaluation/" + "-".join(part for part in (here[0], here[1], split, place) if part)


def keep_metrics(result: Path, trained: RunConfig | None, used: RunConfig, split: str) -> None:
    """Where `result` is that of a run on its own test split by its own settings, in `<run>/evaluation/`, its
    metrics are those of the run: `<run>/metrics.json`. A result in the run's folder itself stays there."""
    run_dir = result.parent.parent
    by_its_own = trained == used and split == used.data.test_split
    if (
        by_its_own
        and result == run_dir / "evaluation" / split
        and _is_run(run_dir)
        and not has_result(run_dir)
    ):
        with writing(run_dir, " for the run", RunError):
            write_text(run_dir / METRICS, (result / METRICS).read_text())


def has_result(folder: Path) -> bool:
    """Whether a whole result lies in a folder, not its metrics alone (`keep_metrics`)."""
    return all((folder / name).is_file() for name in (METRICS, "stamp.json"))


def prepare_data(config: RunConfig, progress: bool = True) -> None:
    """Make the generated clips that `config` asks for, unless they lie there. Other datasets are as they are.

    Raises:
        DatasetError: `data.root` holds clips of another configuration or cannot be written.
    """
    if config.data.dataset == "synthetic":
        from xclip_lab.synthetic import generate

        generate(config.data.generate, config.data.root, progress=progress)


def notebook_path(name: str) -> Path:
    """A notebook of the project, such as `00_quickstart`.

    Raises:
        RunError: no such notebook, or the package was installed without them.
    """
    path = NOTEBOOKS / f"{name}.ipynb"
    if not path.is_file():
        there = ", ".join(sorted(found.stem for found in NOTEBOOKS.glob("*.ipynb")))
        raise RunError(
            f"no notebook {name!r} in {NOTEBOOKS} (there are {there})"
            if there
            else f"the notebooks do not come with an installed package and there are none in {NOTEBOOKS}; "
            "clone the project and install it from there (make install)"
        )
    return path


def execute_notebook(
    name: str | Path, parameters: Mapping[str, Any], run_dir: str | Path, progress: bool = True
) -> Path:
    """Run a notebook in a process of its own and keep the executed copy in the run folder.

    Args:
        name: a notebook of the project, or the path of one. parameters: for its cell `parameters`.
        run_dir: the copy becomes `<run_dir>/<name>.ipynb`; it is saved after each cell.
        progress: pass on to the terminal what the notebook prints, and its progress bars.

    Returns:
        The executed copy.

    Raises:
        RunError: a cell failed or the kernel died; one line, and the copy that keeps the traceback. Or the
            folder cannot be made.
        KeyboardInterrupt: after Ctrl-C, which the running cell got first.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    from xclip_lab import engine

    source = Path(name) if Path(name).suffix == ".ipynb" else notebook_path(str(name))
    executed = Path(run_dir) / source.name
    with writing(executed.parent, " for the run", RunError):
        executed.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            source,
            executed,
            parameters=dict(parameters),
            kernel_name="python3",
            engine_name=engine.NAME,
            progress_bar=False,
            stdout_file=sys.stdout if progress else None,
            stderr_file=sys.stderr if progress else None,
        )
    except PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt(error.evalue) from None
        raise RunError(
            f"{_reason(error.ename, error.evalue)} (cell [{error.exec_count}] of {executed}, "
            "which keeps the traceback)"
        ) from None
    except DeadKernelError as error:
        raise RunError(
            "the process of the notebook died, as it does when the memory is full; "
            f"{executed} shows how far it got"
        ) from error
    return executed


def _reason(ename: str, evalue: str) -> str:
    """An exception of a notebook in one line; the package's own errors speak for themselves."""
    import xclip_lab.evaluation  # noqa: F401  (the errors of all layers below)

    known = {error.__name__ for error in _family(UserError)}
    text = " ".join(evalue.split())
    return text if ename in known else f"{ename}: {text}"


def _family(error: type[UserError]) -> Iterator[type[UserError]]:
    yield error
    for subclass in error.__subclasses__():
        yield from _family(subclass)


def list_runs(root: str | Path = "runs") -> list[RunSummary]:
    """The runs in `root` and in folders of it such as a sweep's, in the order of their names.

    A folder with a `config.yaml` is a run, or one where a cell of a sweep failed.

    Raises:
        RunError: no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise RunError(f"no folder {root}; a run makes it, or name the one that holds your runs")
    folders: list[Path] = []
    for path in sorted(root.glob("*/")):
        folders += [path] if _is_run(path) else filter(_is_run, sorted(path.glob("*/")))
    return [_summary(path, path.relative_to(root).as_posix()) for path in folders]


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.yaml", FAILED))


def collect(root: str | Path = "runs") -> pd.DataFrame:
    """Every run below `root` as a row of its settings, numbers, costs and stamp: see `collect.collect`."""
    from xclip_lab.collect import collect

    return collect(root)


def _summary(run_dir: Path, name: str) -> RunSummary:
    failed = run_dir / FAILED
    failure = f"failed: {failed.read_text(errors='replace').strip()}" if failed.is_file() else None
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        preset, epochs, data = config["preset"], config["train"]["epochs"], config["data"]
        split, told = data["test_split"], " ".join(filter(None, (data["dataset"], data.get("protocol"))))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        return RunSummary(name, "?", "?", failure or "config.yaml is damaged", {})
    stamp = read_json(run_dir / "checkpoints" / "last" / "stamp.json")
    state = failure or (_state(stamp, epochs) if stamp else "no checkpoint")
    place = run_dir if has_result(run_dir) else run_dir / "evaluation" / split
    return RunSummary(name, preset, f"{told} {split}", state, read_json(place / METRICS))


def _state(stamp: dict[str, Any], epochs: int) -> str:
    try:
        step, total, epoch = stamp["step"], stamp["total_steps"], stamp["epoch"]
    except (KeyError, TypeError):
        return "the checkpoint's stamp.json is damaged"
    return (
        f"finished, {step} steps" if step == total else f"epoch {epoch} of {epochs}, step {step} of {total}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it is not there or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
