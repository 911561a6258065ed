"""The command line: `xclip-lab` or `python -m xclip_lab`. Reads arguments; `commands` does what they say."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import NoReturn

from xclip_lab import __version__, commands, data_commands
from xclip_lab.errors import DISK_ERRORS, ConfigError, UserError, disk_remedy
from xclip_lab.registry import did_you_mean

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
_KEYS = "Every key of the configuration is an option as well, such as --head.temperature 0.1."
_INTERRUPTED = "interrupted; give the same command again to go on"
_DISK = {*DISK_ERRORS, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for bad input and 130 for Ctrl-C, each with one line."""
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
        sys.stdout.flush()
    except UserError as error:
        return _complain(str(error))
    except KeyboardInterrupt as error:
        print(f"xclip-lab: {error if str(error) else _INTERRUPTED}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has left; nothing may be written to it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in _DISK:
            raise
        place = f"{error.filename}: " if error.filename else ""
        return _complain(f"{place}{error.strerror}; {disk_remedy(error)} and start again")
    return 0


def _complain(line: str) -> int:
    print(f"xclip-lab: error: {line}", file=sys.stderr)
    return BAD_INPUT


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser with errors in one line; where `overrides` is set, config keys are options too."""

    def __init__(self, prog: str, description: str, example: str, overrides: bool = False) -> None:
        super().__init__(
            prog=prog,
            description=textwrap.fill(description, 100),
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.overrides = overrides
        self.declared: set[str] = {"-h", "--help"}
        self.commands: dict[str, _Parser] = {}
        self._group: argparse._SubParsersAction[_Parser] | None = None

    def add_command(
        self,
        name: str,
        run: Callable[[argparse.Namespace], None] | None,
        summary: str,
        details: str = "",
        *,
        example: str,
        overrides: bool = False,
    ) -> _Parser:
        """A subcommand: `run` is called with the arguments."""
        if self._group is None:
            self._group = self.add_subparsers(title="commands", metavar="COMMAND", required=True)
        text = f"{summary[0].upper()}{summary[1:]}. {details}"
        parser = self._group.add_parser(
            name, help=summary, description=text, example=example, overrides=overrides
        )
        parser.set_defaults(run=run)
        self.commands[name] = parser
        return parser

    def add_argument(self, *args, **settings):
        action = super().add_argument(*args, **settings)
        if action.option_strings and hasattr(self, "declared"):
            self.declared |= set(action.option_strings)
        return action

    def parse_known_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        found: dict[str, str] = {}
        if self.commands and args and args[0].startswith("-") and args[0] not in self.declared:
            self.error(f"unknown option {args[0]}{did_you_mean(args[0], self.declared)}")
        command = next((arg for arg in args if not arg.startswith("-")), None)
        if self.commands and command is not None and command not in self.commands:
            guess = did_you_mean(command, self.commands)
            raise UserError(f"unknown command {command!r}{guess} (known: {', '.join(self.commands)})")
        if self.overrides:
            args, found = split_overrides(args, self.declared)
        namespace, rest = super().parse_known_args(args, namespace)
        if self.overrides:
            namespace.overrides = found
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def split_overrides(args: Sequence[str], declared: set[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--key value` and `--key=value` out of `args` wherever `--key` is not a declared option.

    Raises:
        ConfigError: a key without a value.

    >>> split_overrides(["runs/x", "--data.root", "clips", "--split=val"], {"--split"})
    (['runs/x', '--split=val'], {'data.root': 'clips'})
    """
    rest: list[str] = []
    overrides: dict[str, str] = {}
    waiting = iter(args)
    for arg in waiting:
        option, equals, value = arg.partition("=")
        if not option.startswith("--") or option in declared:
            rest.append(arg)
            continue
        if not equals:
            value = next(waiting, "--")
        if value.startswith("--"):
            raise ConfigError(f"{option} needs a value: {option} VALUE")
        overrides[option.removeprefix("--").replace("-", "_")] = value
    return rest, overrides


def _parser() -> _Parser:
    parser = _Parser(
        prog="xclip-lab",
        description="A workbench for CLIP-based video-text retrieval.",
        example="xclip-lab quickstart",
    )
    parser.add_argument("--version", action="version", version=f"xclip-lab {__version__}")

    quickstart = parser.add_command(
        "quickstart",
        commands.quickstart,
        "make clips, train X-CLIP on them, evaluate, draw its attention",
        "Runs the notebook 00_quickstart and keeps it, its figures and numbers in the run folder. "
        "Without --run-dir the same settings always mean the same folder, and a finished run in it is not "
        f"trained again. {_KEYS}",
        overrides=True,
        example="xclip-lab quickstart --seed 1",
    )
    quickstart.add_argument("--seed", metavar="N", help="seed of the model, the order and the dropout")
    _add_run_dir(quickstart)

    train = parser.add_command(
        "train",
        commands.train,
        "train a model, or go on with a run that was stopped",
        f"Ctrl-C finishes the step and saves; the same command goes on from there. {_KEYS}",
        overrides=True,
        example="xclip-lab train --preset quickstart --train.epochs 3 --run-dir runs/short",
    )
    train.add_argument("--preset", required=True, help="a name of `xclip-lab presets`, or a YAML file")
    train.add_argument(
        "--init",
        metavar="FILE",
        help="weights to start from (train.init): a run folder, a checkpoint or an official file",
    )
    train.add_argument("--family", metavar="F", help="of the official file, checked against the preset")
    _add_run_dir(train)

    evaluate = parser.add_command(
        "evaluate",
        commands.evaluate,
        "retrieval metrics of a run or checkpoint",
        "With --preset and no run, a fresh model: the numbers mean nothing, but the path through your own "
        "videos is tried. Keys of data and evaluation are options as well, such as --data.root clips.",
        overrides=True,
        example="xclip-lab evaluate runs/short --split test\n"
        "  xclip-lab evaluate runs/short --rerank qb_norm --query-bank train\n"
        "  xclip-lab evaluate --preset xclip-folder-b32 --data.root clips\n"
        "  torchrun --nproc-per-node 2 -m xclip_lab evaluate runs/short\n"
        "  xclip-lab evaluate --official pytorch_model.bin.4 --family xclip --preset xclip-folder-b32 "
        "--data.root clips",
    )
    evaluate.add_argument("run_or_checkpoint", nargs="?", metavar="RUN", help="a run folder or a checkpoint")
    evaluate.add_argument(
        "--preset", help="settings, for a fresh model, an official file or a checkpoint outside a run folder"
    )
    evaluate.add_argument("--split", help="train, val or test (the default is data.test_split)")
    evaluate.add_argument(
        "--rerank",
        metavar="METHOD",
        help="put a re-ranked result beside the raw one: dual_softmax or qb_norm (evaluation.rerank)",
    )
    evaluate.add_argument(
        "--query-bank",
        metavar="SPLIT",
        help="whose statistics qb_norm uses (evaluation.query_bank); else data.train_split",
    )
    evaluate.add_argument(
        "--backend",
        metavar="B",
        help="who computes AOSM: formula, blocked, triton (a GPU), triton-fp16 (features rounded) or auto; "
        "else the model's own",
    )
    evaluate.add_argument("--official", metavar="FILE", help="a published checkpoint (pytorch_model.bin.N)")
    evaluate.add_argument("--family", metavar="F", help="whose it is: clip4clip, xclip, clip2video or glscl")
    evaluate.add_argument(
        "--migrate",
        action="store_true",
        help="cut its matrices to the preset's max_words and max_frames, or pad them with the identity",
    )
    evaluate.add_argument(
        "--out",
        metavar="DIR",
        help="where the result goes; else RUN/evaluation/SPLIT, of the run's own test split with its "
        "metrics.json in RUN as well, or a folder of its own in runs/",
    )

    data = parser.add_command(
        "data", None, "check or make data", example="xclip-lab data generate --root data/generated/small"
    )
    check = data.add_command(
        "check",
        data_commands.check,
        "tell what of a dataset is there, and what its protocol still needs",
        "Reads the annotations, and of every video the first frame and the last (about ten videos a second "
        "and core; --no-probe opens none); a table goes to the screen, all of it as JSON to a file. Exit "
        "code 2 if by that an evaluation or a training cannot be run.",
        example="xclip-lab data check msrvtt --root data/msrvtt --videos data/msrvtt/videos",
    )
    check.add_argument("name", metavar="NAME", help="a dataset, such as msrvtt, folder or synthetic")
    check.add_argument("--root", required=True, metavar="DIR", help="where the annotation files lie")
    check.add_argument("--protocol", metavar="P", help="one of the dataset's protocols; else its usual one")
    check.add_argument("--videos", metavar="DIR", help="where the videos lie; else below the annotations")
    check.add_argument("--family", metavar="F", help="whose rules for files hold: clip4clip, xclip, ...")
    check.add_argument("--split", metavar="S", help="this split alone: test is what an evaluation needs")
    check.add_argument(
        "--no-probe", dest="probe", action="store_false", help="look for the videos only, open none"
    )
    check.add_argument("--workers", type=int, metavar="N", help="processes that open videos; else one a core")
    check.add_argument(
        "--out", metavar="FILE", help="the JSON file; else runs/data_check/<dataset>-<protocol>.json"
    )
    prepare = data.add_command(
        "prepare",
        data_commands.prepare,
        "decode every video once, for all runs",
        "The frames that a preset's runs look at go to the folder --store (data.store), where they all find "
        "them. With --to the videos are written as files: `frames`, CLIP2Video's folder of JPEGs a video, or "
        f"`video`, CLIP4Clip's small copies. Interrupted, the same command goes on. {_KEYS}",
        overrides=True,
        example="xclip-lab data prepare --preset xclip-msrvtt-b32 --store data/store\n"
        "  xclip-lab data prepare msvd --root data/msvd --to frames --fps 5 --out data/msvd-frames\n"
        "  xclip-lab data prepare msvd --root data/msvd --to video --fps 3 --short-side 224 --out data/small",
    )
    prepare.add_argument("name", nargs="?", metavar="NAME", help="a dataset, such as msrvtt or folder")
    prepare.add_argument("--preset", help="in place of NAME: a name of `xclip-lab presets`, or a YAML file")
    prepare.add_argument("--root", metavar="DIR", help="where the annotations lie (data.root)")
    prepare.add_argument("--videos", metavar="DIR", help="where the videos lie, if elsewhere (data.videos)")
    prepare.add_argument("--store", metavar="DIR", help="where the frames go (data.store)")
    prepare.add_argument("--to", choices=("frames", "video"), help="write files in place of a store")
    prepare.add_argument("--out", metavar="DIR", help="where the files go")
    prepare.add_argument("--fps", type=float, metavar="N", help="frames a second in the files")
    prepare.add_argument("--workers", type=int, metavar="N", help="processes; else one a core")
    prepare.add_argument("--short-side", type=int, metavar="N", help="their short side in pixels")
    prepare.add_argument("--split", action="append", help="only this split; may be given several times")

    generate = data.add_command(
        "generate",
        data_commands.generate,
        "make captioned clips",
        "Options are the keys of data.generate: train_clips, val_clips, test_clips, size, frames, hold, fps, "
        "level_shares, seed. Interrupted, the same command goes on.",
        overrides=True,
        example="xclip-lab data generate --root data/generated/small --train_clips 200 --test_clips 50",
    )
    generate.add_argument("--root", metavar="DIR", help="where the clips go; else the quickstart's place")

    embed = parser.add_command(
        "embed",
        commands.embed,
        "store what the towers make of captions and frames, so that heads train in minutes",
        "Of a run, a checkpoint or, with --preset, of towers as they come. Interrupted, the same command "
        f"goes on. {_KEYS}",
        overrides=True,
        example="xclip-lab embed --preset xclip-msrvtt-b32 --out data/features/msrvtt\n"
        "  xclip-lab train --preset xclip-msrvtt-b32 --data.features data/features/msrvtt",
    )
    embed.add_argument("run_or_checkpoint", nargs="?", metavar="RUN", help="a run folder or a checkpoint")
    embed.add_argument("--preset", help="settings, and the towers where no RUN is named")
    embed.add_argument("--out", metavar="DIR", required=True, help="where the features go")
    embed.add_argument("--split", action="append", help="only this split; may be given several times")
    embed.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of what is stored")

    search = parser.add_command(
        "search",
        commands.search,
        "find own videos by words",
        "Embeds the videos of a folder once, captions are not needed, and ranks them for the query; a table "
        "of the best goes to the screen, their frames to a figure. Of a video the model sees at most "
        "max_frames frames. Without --run, --official or --preset: OpenAI's CLIP and the mean of the frames. "
        "Keys of data are options as well.",
        overrides=True,
        example='xclip-lab search holiday "a dog runs" --run runs/my-run\n'
        '  xclip-lab search holiday "a dog runs" --towers.pretrained ViT-B-32.pt',
    )
    search.add_argument("folder", metavar="FOLDER", help="of videos; folders in it are looked through too")
    search.add_argument("query", metavar="QUERY", help="a sentence")
    search.add_argument("--run", dest="run_or_checkpoint", metavar="RUN", help="a run folder or a checkpoint")
    search.add_argument("--preset", help="settings, for an official file or towers as they come")
    search.add_argument("--official", metavar="FILE", help="a published checkpoint (pytorch_model.bin.N)")
    search.add_argument("--family", metavar="F", help="whose it is: clip4clip, xclip, clip2video or glscl")
    search.add_argument("--migrate", action="store_true", help="as of `xclip-lab evaluate`")
    search.add_argument("--top", type=int, default=5, metavar="N", help="how many videos to show (5)")
    search.add_argument(
        "--index", default="data/libraries", metavar="DIR", help="where features are kept (data/libraries)"
    )
    search.add_argument(
        "--out", default="runs/search", metavar="DIR", help="where the figure goes (runs/search)"
    )

    sweep = parser.add_command(
        "sweep",
        commands.sweep,
        "fill a table of a paper, or a grid of your own, with runs",
        "Each cell is an executed notebook in a process of its own; finished ones are never run again, and a "
        "failed one does not stop the others. Without --preset the grids of the package run on generated "
        f"clips. {_KEYS}",
        overrides=True,
        example="xclip-lab sweep xclip-contrasts --workers 2\n"
        "  xclip-lab sweep xclip-contrasts --preset xclip-msrvtt-b32 --dry-run\n"
        "  xclip-lab sweep my_grid.yaml --slurm --partition gpu --hours 12",
    )
    sweep.add_argument("grid", metavar="GRID", help="xclip-contrasts and the like, or a YAML file")
    sweep.add_argument("--preset", help="in place of the grid's: the same cells with its data and towers")
    sweep.add_argument("--seeds", metavar="N,N", help="in place of the grid's, such as 0,1,2")
    sweep.add_argument(
        "--run-dir", default="runs/ablation", metavar="DIR", help="the folder of all cells (runs/ablation)"
    )
    sweep.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="cells at a time; else one a GPU, or one a core, at most four",
    )
    sweep.add_argument("--dry-run", action="store_true", help="list the cells and the table as it stands")
    sweep.add_argument("--smoke", action="store_true", help="tiny sizes, two rows, meaningless numbers")
    sweep.add_argument("--slurm", action="store_true", help="run the cells as jobs of a Slurm cluster")
    sweep.add_argument("--partition", metavar="P", help="of the cluster")
    sweep.add_argument("--cpus", type=int, metavar="N", help="cores of a job (8)")
    sweep.add_argument("--gpus", type=int, metavar="N", help="GPUs of a job (1)")
    sweep.add_argument("--hours", type=float, metavar="N", help="after which a job is ended (24)")

    runs = parser.add_command("runs", commands.runs, "list runs", example="xclip-lab runs")
    runs.add_argument("root", nargs="?", default="runs", metavar="ROOT", help="the folder of run folders")

    bench = parser.add_command(
        "bench",
        commands.bench,
        "measure a hot path",
        "Without a name, lists what can be measured. Where there is a naive way to compare with, it runs in "
        "the same process; `xclip-lab bench NAME --help` tells what is measured how, and the options.",
        example="xclip-lab bench scores",
    )
    bench.add_argument("name", nargs="?", metavar="NAME", help="scores, aosm and the like")
    bench.add_argument("rest", nargs="...", metavar="...", help="options of that benchmark")

    parser.add_command(
        "presets",
        commands.presets,
        "list presets",
        "Paper R@1 is what the authors state (text to video, nothing re-ranked), no result of ours. Batch, "
        "epochs, words and frames are those of the script or command that a preset stands for, but for the "
        "marked ones. `xclip-lab train --preset NAME --KEY VALUE` changes a value.",
        example="xclip-lab presets",
    )
    return parser


def _add_run_dir(parser: _Parser) -> None:
    parser.add_argument("--run-dir", metavar="DIR", help="the run's folder; else runs/<date>_<preset>_<hash>")


if __name__ == "__main__":
    sys.exit(main())
