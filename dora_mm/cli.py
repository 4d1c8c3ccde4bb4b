"""The command line, dora-mm. Commands run recipes in `pipelines/`; large packages are imported only by those."""

import argparse
import contextlib
import errno
import inspect
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from dora_mm import __version__

if TYPE_CHECKING:
    from dora_mm.recipes import Recipes

OURS = ("dora_mm", "samples")  # the top-level packages of our own code; samples/build exists in a checkout only
DEFAULTS_OF_JOBS = "configs/sdxl/jobs.yaml"
GOES_ON = ("train", "sample", "grid")  # the commands that can be resumed
BASE = "the model: a folder, a single-file checkpoint or a hub name"
AXIS = "the axis of the magnitudes, where their shape does not say it"
DONE, USER_ERROR, INTERRUPTED, TERMINATED = 0, 2, 130, 143  # a bug leaves its traceback, and Python exits with 1

# Errors that a user can fix: a full or read-only disk, an exceeded quota, missing permissions, a path too long.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM; a KeyboardInterrupt, so that code which saves its state on Ctrl-C does so here, too."""


def main(argv: Sequence[str] | None = None, recipes: "Recipes | None" = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments after the program's name; None: those of the process.
        recipes: The recipes that configs may name; None: those of `pipelines/`.

    Returns:
        The exit code: 0 done, 2 a user's mistake (one message on standard error), 130 and 143 interrupted.
    """
    arguments = _parser().parse_args(argv)
    arguments.recipes = recipes
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        _check_encoding(argv)
        with _sigterm_raises():
            arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `head`, say, has read enough; at its end Python would write the rest once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as interruption:
        terminated = isinstance(interruption, Terminated)
        print(f"dora-mm: {'terminated' if terminated else 'interrupted'}", file=sys.stderr)
        return TERMINATED if terminated else INTERRUPTED
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"dora-mm: {message}", file=sys.stderr)
        return USER_ERROR
    return DONE


def _check_encoding(argv: Sequence[str] | None) -> None:
    for argument in sys.argv[1:] if argv is None else argv:
        try:
            argument.encode()
        except UnicodeEncodeError:  # bytes that are not UTF-8 arrive as lone surrogates, which no file of ours can hold
            raise ValueError(f"the argument {argument!r} is not valid UTF-8") from None


def user_message(error: Exception) -> str | None:
    """The message for an error that the user can fix; None for a bug, which keeps its traceback."""
    for cause in _causes(error):
        if "No space left on device" in str(cause):  # safetensors and torch wrap it in other errors
            return f"the disk is full: free some space, then run again (train: with --resume RUN_DIR) ({cause})"
    if isinstance(error, OSError) and error.errno in _DISK:
        return f"{error.filename or 'a file'} cannot be written or read: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name and not _is_ours(error.name):
        extras = "eval,optim,track,vl"  # all extras that commands use
        return f"the package {error.name} is missing: pip install 'dora_mm[{extras}]'"
    if isinstance(error, ValueError) and _raised_by_us(error):
        return str(error)
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dora-mm",
        description="Fine-tune diffusion and vision-language models with DoRA.",
        epilog="A config's first key, `pipeline:`, names the recipe. Exit codes: 0 done, 2 a user's mistake (one "
        "message on standard error), 130 and 143 interrupted with the state saved, 1 a bug.",
    )
    parser.add_argument("--version", action="version", version=f"dora_mm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_config_commands(commands)
    command = commands.add_parser("gallery", help="make one page of all pictures of runs, to look at in a browser")
    command.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run directory with pictures")
    command.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        help="default: gallery in the run, or for several runs a numbered folder in runs/gallery",
    )
    command.set_defaults(run=_run_gallery)
    command = commands.add_parser(
        "inspect", help="list the contents of an adapter file, or the parts of a model that can be adapted"
    )
    command.add_argument(
        "path", metavar="PATH|MODEL", help="an adapter file, folder or run; a PNG; a model folder or hub name"
    )
    command.add_argument("--targets", metavar="NAME", help="a target map; default: that of the model")
    command.add_argument("--base", metavar="MODEL", help="of an adapter, to show what its shapes do not say")
    command.add_argument("--json", action="store_true", help="of an adapter, print JSON")
    command.set_defaults(run=_run_inspect)
    _add_file_commands(commands)
    command = commands.add_parser("ask", help="ask a model about images, without and with an adapter")
    _add_model(command)
    command.add_argument("images", metavar="IMAGE", nargs="+", help="an image file")
    command.add_argument("question", metavar="QUESTION", help="asked as it is")
    command.add_argument("--adapter", metavar="FOLDER", help="a run directory or an adapter's folder")
    command.add_argument("--max-new-tokens", metavar="N", type=_positive, help="the longest answer; default: 256")
    command.set_defaults(run=_run_ask)
    command = commands.add_parser(
        "bench", help="compare the speed and memory of DoRA with other implementations on this machine"
    )
    extent = command.add_mutually_exclusive_group()
    for name, what in (("quick", "only single layers, in under two minutes"), ("all", "all ranks")):
        extent.add_argument(f"--{name}", action="store_const", const=name, dest="extent", help=what)
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 is the default on a GPU")
    command.add_argument(
        "--output", metavar="FOLDER", help="the folder of results; default: a numbered folder in runs/bench"
    )
    command.set_defaults(run=_run_bench, extent="default")
    return parser


def _add_config_commands(commands: Any) -> None:
    """The commands whose argument is a config."""
    for name, what in (
        ("train", "train an adapter, or a small base model"),
        ("sample", "draw images for the prompts of a job"),
        ("grid", "draw a labelled grid of what two settings do"),
        ("eval", "evaluate a model and its adapter, or compare methods"),
        ("features", "compute the features of a vision tower once, for later trainings"),
    ):
        command = commands.add_parser(name, help=what, description=f"{what.capitalize()}, according to a config.")
        goes_on = name in GOES_ON
        metavar, kinds = ("JOBS|CONFIG", ", or a job: .csv, .tsv, .jsonl, .txt") if name == "sample" else ("CONFIG", "")
        command.add_argument("config", metavar=metavar, nargs="?" if goes_on else None, help=f"a YAML file{kinds}")
        command.add_argument(
            "--set",
            metavar="KEY=VALUE",
            action="extend",
            nargs="+",
            default=[],
            dest="overrides",
            help="override values of the config, such as train.steps=100; repeatable",
        )
        if goes_on:
            command.add_argument("--resume", metavar="RUN_DIR", type=Path, help="go on with a run that was stopped")
        if name == "sample":
            command.add_argument(
                "--config", metavar="CONFIG", dest="job_config", help="the settings that JOBS leaves out"
            )
            command.add_argument("--replay", metavar="PNG", type=Path, help="draw an image again as its file says")
        if name == "train":
            command.add_argument(
                "--dry-run", action="store_true", help="only print what would be trained, and what data would be read"
            )
        defaults = {"resume": None, "dry_run": False, "job_config": None, "replay": None}
        command.set_defaults(run=_run_sample if name == "sample" else _run_pipeline, command=name, **defaults)


def _add_file_commands(commands: Any) -> None:
    """The commands that make other files from adapters and models, or judge them."""
    command = commands.add_parser("merge", help="merge an adapter into its model, and save that for other programs")
    _add_model(command)
    command.add_argument("adapter", metavar="ADAPTER", help="a run directory, an adapter's folder or its file")
    command.add_argument("out", metavar="OUT", help="the new folder")
    command.set_defaults(run=_run_merge)
    _add_convert(commands.add_parser("convert", help="write an adapter in the form of another tool"))
    command = commands.add_parser("verify", help="show what other tools compute from an adapter file")
    command.add_argument("file", metavar="FILE", help="an adapter file of any tool, its folder or run directory")
    command.add_argument("--tool", metavar="NAME", default="all", help="a tool, or all; default: all")
    command.add_argument("--base", metavar="MODEL", required=True, help=BASE)
    command.add_argument("--axis", choices=("out", "in"), help=AXIS)
    command.add_argument("--json", action="store_true", help="print JSON, with every module")
    command.set_defaults(run=_run_verify)
    command = commands.add_parser("extract", help="make an adapter from a model and its base model")
    for name, what in (("tuned", "the fine-tuned model"), ("base", "the model that it was fine-tuned from")):
        command.add_argument(
            name, metavar=name.upper(), help=f"{what}: a folder, a single-file checkpoint or a hub name"
        )
    command.add_argument("out", metavar="OUT", help="a new file that ends in .safetensors, or a new folder")
    command.add_argument("--rank", metavar="R", type=_positive, required=True, help="of the adapter")
    command.add_argument("--to", metavar="TARGET", help="as in convert; default: diffusers, or peft for a single model")
    command.set_defaults(run=_run_extract)


def _add_convert(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="IN", help="an adapter file of any tool, its folder or run directory")
    command.add_argument("out", metavar="OUT", help="a file that ends in .safetensors, or a folder")
    command.add_argument("--to", metavar="TARGET", required=True, help="peft, diffusers, kohya, comfy, diff, lora, ...")
    command.add_argument("--base", metavar="MODEL", help=BASE)
    command.add_argument("--axis", choices=("out", "in"), help=AXIS)
    command.add_argument("--strength", metavar="T", type=float, default=1.0, help="becomes strength 1 in the new file")
    command.add_argument("--rank", metavar="R", type=_positive, help="of target lora, or of a new fit")
    command.add_argument("--energy", metavar="SHARE", type=float, help="of the update to keep in target lora")
    command.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the new tensors")
    command.add_argument(
        "--allow-lossy", action="store_true", help="write it even where the tool computes something else from it"
    )
    command.set_defaults(run=_run_convert)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a folder of save_pretrained or a hub name")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights")
    command.add_argument("--revision", metavar="R", help="a commit, branch or tag of a hub model; default: main")


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def _run_sample(arguments: argparse.Namespace) -> None:
    from dora_mm.recipes import PIPELINES

    if arguments.replay is None:
        take_job(arguments)
        _run_pipeline(arguments)
        return
    if arguments.config or arguments.resume or any(not text.startswith("output=") for text in arguments.overrides):
        raise ValueError("--replay takes nothing but --set output=FOLDER: the image says all else")
    output = arguments.overrides[-1].partition("=")[2] if arguments.overrides else None
    PIPELINES.load("sample_sdxl").replay(arguments.replay, output=output)


def take_job(arguments: argparse.Namespace) -> None:
    """Puts the config of a job file in its place, and the file into the overrides; a config stays as it is.

    Args:
        arguments: The parsed arguments of `sample`; they are changed.

    Raises:
        ValueError: A config is given twice.
    """
    from dora_mm.config import run_name

    job = arguments.config
    if job is not None and Path(job).suffix.lower() not in (".yaml", ".yml"):
        given = {"prompts_file": job, "name": run_name(job)}
        arguments.config = arguments.job_config or DEFAULTS_OF_JOBS
        if arguments.resume is not None and arguments.job_config is None:
            arguments.config = None  # the run's own
            del given["name"]
        # not as ASCII: YAML reads the two escapes of an emoji as two characters
        texts = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]
        arguments.overrides = [*texts, *arguments.overrides]
    elif arguments.job_config is not None:
        raise ValueError("--config belongs to a job file: dora-mm sample JOBS.csv --config CONFIG")


def _run_pipeline(arguments: argparse.Namespace) -> None:
    from dora_mm.config import load_config
    from dora_mm.config.paths import check_paths
    from dora_mm.recipes import PIPELINES

    recipes = arguments.recipes or PIPELINES
    if arguments.resume is not None:
        config = _config_of_run(arguments.resume, arguments.config, arguments.overrides, recipes)
    elif arguments.config is None:
        what = "JOBS or a CONFIG" if arguments.command == "sample" else "a CONFIG"
        raise ValueError(f"{arguments.command} needs {what} before --set, or --resume RUN_DIR")
    else:
        config = load_config(arguments.config, arguments.overrides, recipes.schemas)
    if config.command != arguments.command:
        if arguments.config is None:
            command = f"dora-mm {config.command}"
            advice = f"{command} --resume {arguments.resume}" if config.command in GOES_ON else "it cannot be resumed"
            raise ValueError(f"--resume {arguments.resume}: the run is one of {command}: {advice}")
        raise ValueError(f"{arguments.config} needs another command: dora-mm {config.command} {arguments.config}")
    if not (arguments.dry_run and config.dry_run_lists_missing):
        check_paths(config, new_run=arguments.resume is None)
    pipeline = recipes.load(config.pipeline).main
    if not arguments.dry_run:
        pipeline(config, resume=arguments.resume)
    elif "dry_run" not in inspect.signature(pipeline).parameters:
        raise ValueError(f"--dry-run: the recipe {config.pipeline} does not support it")
    else:
        pipeline(config, dry_run=True)


def _config_of_run(run: Path, given: str | None, overrides: list[str], recipes: "Recipes"):
    """The config that a run goes on with: its own or the given one, with the overrides as far as they are allowed."""
    from dora_mm.config import load_config
    from dora_mm.config.resuming import check_changes, nearest_run

    saved = run / "config.yaml"
    if not saved.is_file():
        raise ValueError(f"--resume {run} is not a run directory: it has no config.yaml{nearest_run(run)}")
    config = load_config(given or saved, overrides, recipes.schemas)
    check_changes(run, load_config(saved, schemas=recipes.schemas), config)
    return config


def _run_gallery(arguments: argparse.Namespace) -> None:
    from dora_mm.recipes import PIPELINES

    PIPELINES.load("gallery").main(arguments.runs, output=arguments.output)


def _run_inspect(arguments: argparse.Namespace) -> None:
    from dora_mm.config import resolve_model
    from dora_mm.recipes import PIPELINES

    resolve_model(arguments.path, "PATH|MODEL")  # before anything large is imported
    settings = {"targets": arguments.targets, "base": arguments.base, "as_json": arguments.json}
    PIPELINES.load("inspect_model").main(arguments.path, **settings)


def _run_merge(arguments: argparse.Namespace) -> None:
    from dora_mm.config import resolve_path
    from dora_mm.recipes import PIPELINES

    _check_model(arguments)
    resolve_path(arguments.adapter, "ADAPTER")
    settings = {"dtype": arguments.dtype, "revision": arguments.revision}
    PIPELINES.load("merge").main(arguments.model, arguments.adapter, arguments.out, **settings)


def _run_convert(arguments: argparse.Namespace) -> None:
    from dora_mm.recipes import PIPELINES

    names = ("base", "axis", "strength", "rank", "energy", "dtype", "allow_lossy")
    settings = {name: getattr(arguments, name) for name in names}
    PIPELINES.load("convert").main(arguments.source, arguments.out, arguments.to, **settings)


def _run_extract(arguments: argparse.Namespace) -> None:
    from dora_mm.recipes import PIPELINES

    settings = {"rank": arguments.rank, "to": arguments.to}
    PIPELINES.load("extract").main(arguments.tuned, arguments.base, arguments.out, **settings)


def _run_verify(arguments: argparse.Namespace) -> None:
    from dora_mm.recipes import PIPELINES

    settings = {"axis": arguments.axis, "as_json": arguments.json}
    PIPELINES.load("verify").main(arguments.file, arguments.tool, arguments.base, **settings)


def _run_ask(arguments: argparse.Namespace) -> None:
    from dora_mm.config import resolve_path
    from dora_mm.recipes import PIPELINES

    _check_model(arguments)
    for image in arguments.images:
        resolve_path(image, "IMAGE")
    if arguments.adapter is not None:
        resolve_path(arguments.adapter, "--adapter")
    names = ("adapter", "max_new_tokens", "dtype", "revision")
    settings = {name: getattr(arguments, name) for name in names}
    PIPELINES.load("ask").main(arguments.model, arguments.images, arguments.question, **settings)


def _check_model(arguments: argparse.Namespace) -> None:
    """Checks MODEL and --revision before anything large is imported."""
    from dora_mm.config import find_path, resolve_model

    resolve_model(arguments.model, "MODEL")
    if arguments.revision is not None and (find_path(arguments.model) or not arguments.revision):
        raise ValueError(f"--revision is a commit, branch or tag of a hub model: leave it out for {arguments.model}")


def _run_bench(arguments: argparse.Namespace) -> None:
    from dora_mm.recipes import PIPELINES

    PIPELINES.load("bench").main(arguments.extent, dtype=arguments.dtype, output=arguments.output)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _raised_by_us(error: Exception) -> bool:
    """Only our own code checks for users' mistakes, so a ValueError that a library raises is a bug."""
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return _is_ours(frame.f_globals.get("__name__", ""))


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in OURS
