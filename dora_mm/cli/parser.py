"""The commands and their arguments. All but those that take a config name them as their recipes name parameters."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from dora_mm import __version__
from dora_mm.registries.image_families import IMAGE_FAMILIES
from dora_mm.registries.tools import EXPORT_FORMATS, TOOLS, other_tools
from dora_mm.registries.vl_tasks import scored_titles
from dora_mm.utils.dtypes import full_name
from dora_mm.utils.processes import reports_end

RESUMABLE = ("train", "sample", "grid")
BASE = "the model: a folder, a single-file checkpoint or a hub name"
SHELLS = ("bash", "zsh", "fish", "powershell")
CAPTION_PROMPT = "Describe the image in one sentence."
DTYPES = ("float32", "bfloat16", "float16")
DTYPE_OF_MODEL = "that of the model's config"
AXIS = "the axis of the magnitudes, where their shape does not say it"


class CommandParser(argparse.ArgumentParser):
    """A parser that knows those of its commands by name."""

    commands: Mapping[str, argparse.ArgumentParser] = MappingProxyType({})

    def error(self, message: str) -> NoReturn:
        """Ends the program with the usage and a message, which one of several processes prints."""
        if not reports_end():
            self.exit(2)
        super().error(message)


def build_parser() -> CommandParser:
    """The parser of the command line; it puts the name of the command into `command`."""
    parser = CommandParser(
        prog="dora-mm",
        description="Fine-tune diffusion and vision-language models with DoRA.",
        epilog="A config's first key, `pipeline:`, names the recipe. Exit codes: 0 done, 2 a user's mistake (one "
        "message on standard error), 130 and 143 interrupted with the state saved, 1 a bug.",
    )
    parser.add_argument("--version", action="version", version=f"dora_mm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    for name, what in (
        ("train", "train an adapter, or a small base model"),
        ("sample", "generate images for the prompts of a job"),
        ("grid", "draw a labelled grid of what two settings do"),
        ("eval", "evaluate a model and its adapter"),
        ("compare", "compare methods, each tuned, by many trainings"),
        ("features", "compute the features of a vision tower once, for later trainings"),
    ):
        _add_config_command(commands, name, what)
    for add in (
        _add_example,
        _add_new,
        _add_import,
        _add_gallery,
        _add_inspect,
        _add_merge,
        _add_convert,
        _add_combine,
        _add_verify,
        _add_extract,
        _add_average,
        _add_analyse,
        _add_tune,
        _add_score,
        _add_ask,
        _add_caption,
        _add_unpack,
    ):
        add(commands)
    commands.add_parser("configs", help="list the packaged configs, with what each is for")
    schema = commands.add_parser("schema", help="print the JSON schema of config files, for editors")
    schema.add_argument("--output", metavar="FILE", type=Path, help="write it to a file instead")
    shells = commands.add_parser("completion", help="print a script with which a shell completes commands and keys")
    shells.add_argument("shell", choices=SHELLS, help='eval "$(dora-mm completion bash)" in ~/.bashrc')
    _add_check(commands)
    parser.commands = commands.choices
    return parser


def _add_config_command(commands: Any, name: str, what: str) -> None:
    command = commands.add_parser(name, help=what, description=f"{what.capitalize()}, according to a config.")
    metavar, kinds = (
        ("JOBS|CONFIG", ", or a job: .csv, .tsv, .xlsx, .jsonl, .txt") if name == "sample" else ("CONFIG", "")
    )
    nargs = "?" if name in RESUMABLE else None
    command.add_argument("config", metavar=metavar, nargs=nargs, help=f"a YAML file{kinds}")
    _add_overrides(command)
    if name in RESUMABLE:
        auto = "; auto: the one in `output`, which is started if it does not exist" if name == "train" else ""
        command.add_argument("--resume", metavar="RUN_DIR", type=Path, help=f"go on with a run that was stopped{auto}")
    if name == "sample":
        command.add_argument(
            "--config", metavar="CONFIG", dest="prompts_config", help="the settings that JOBS leaves out"
        )
        command.add_argument("--replay", metavar="PNG", type=Path, help="generate an image again as its file says")
    if name == "train":
        command.add_argument(
            "--dry-run", action="store_true", help="only print what would be trained, and what data would be read"
        )
        command.add_argument(
            "--decode", action="store_true", help="with --dry-run: decode all images, and name those that are broken"
        )
    if name == "compare":
        command.add_argument("--dry-run", action="store_true", help="only print what would be trained")
        command.add_argument(
            "--report", action="store_true", help="train nothing: report the trainings that have been finished"
        )
    command.set_defaults(resume=None, dry_run=False, decode=False, report=False)


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="extend",
        nargs="+",
        default=[],
        dest="overrides",
        help="override values of the config, such as train.steps=100; repeatable",
    )


def _add_check(commands: Any) -> None:
    command = commands.add_parser(
        "check", help="show the GPU, the installed packages, what is missing, and which recipe fits"
    )
    command.add_argument(
        "--report", action="store_true", help="print versions and the GPU for a bug report, in Markdown"
    )
    command.add_argument(
        "--config", metavar="CONFIG", help="with --report: also this config, without paths, names and texts of yours"
    )


def _add_example(commands: Any) -> None:
    command = commands.add_parser("example", help="write a small random model and eight images, to try commands on")
    command.add_argument("out", metavar="FOLDER", help="a new folder; nothing is downloaded")


def _add_new(commands: Any) -> None:
    command = commands.add_parser("new", help="write a config for your own images, and name the commands that follow")
    command.add_argument(
        "family", metavar="FAMILY", help=f"what is trained: {', '.join(IMAGE_FAMILIES.built_in)} or vlm"
    )
    command.add_argument(
        "name",
        metavar="NAME",
        help="of the new config and its runs; beside NAME.yaml are its prompts, or of vlm NAME_eval.yaml",
    )
    folder = "your images, with or without captions; of vlm the folder from which the paths in --data start"
    command.add_argument("--images", metavar="FOLDER", help=folder)
    command.add_argument(
        "--references",
        metavar="FOLDER",
        nargs="+",
        default=(),
        help="of a model that edits: what each image is made of, under its file name",
    )
    command.add_argument("--data", metavar="FILE", help="of vlm: your conversations, as JSON, JSON lines or Parquet")
    command.add_argument("--model", metavar="MODEL", help=f"{BASE}; default: the recipe's")
    command.add_argument(
        "--vram", metavar="GB", type=_above_zero, help="memory of the GPU that will train; default: of the one here"
    )
    _add_follow_links(command)


def _add_follow_links(command: Any) -> None:
    command.add_argument("--follow-links", action="store_true", help="also links that lead out of a folder of images")


def _add_import(commands: Any) -> None:
    command = commands.add_parser(
        "import", help="write a config from one of kohya's scripts, ai-toolkit, OneTrainer, LLaMA-Factory, ..."
    )
    trainers = "kohya's TOML or command line, ai-toolkit, OneTrainer, LLaMA-Factory, ms-swift, axolotl"
    command.add_argument("file", metavar="FILE", type=Path, help=f"the config of another trainer: {trainers}")
    command.add_argument("--output", metavar="CONFIG", help="the new file; default: the name of FILE, as .yaml here")


def _add_gallery(commands: Any) -> None:
    command = commands.add_parser("gallery", help="make one page of all images of runs, to look at in a browser")
    command.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="one with images, or a folder of runs, such as runs"
    )
    command.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        help="default: gallery in the run, or for several runs a numbered folder in runs/gallery",
    )


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser(
        "inspect", help="list the contents of an adapter file, or the parts of a model that can be adapted"
    )
    command.add_argument(
        "path", metavar="PATH|MODEL", help="an adapter file, folder or run; a PNG; a model folder, file or hub name"
    )
    command.add_argument(
        "--targets", metavar="NAME", help="a target map, or re: and a pattern of modules; default: the map of the model"
    )
    command.add_argument("--base", metavar="MODEL", help="of an adapter, to show what its shapes do not say")
    command.add_argument("--json", action="store_true", dest="as_json", help="of an adapter, print JSON")
    command.add_argument("--header", action="store_true", help="of an adapter, leave its values unread")
    command.add_argument(
        "--set-metadata",
        metavar="KEY=VALUE",
        action="extend",
        nargs="+",
        dest="metadata",
        help="of an adapter, write into its header: title, author, description, license, trigger_words, tags, ... (of "
        "ModelSpec), ss_..., and the hashes of sites; KEY= takes an entry out",
    )
    command.add_argument("--out", metavar="NEW", help="with --set-metadata: a new file; default: PATH itself")


def _add_merge(commands: Any) -> None:
    command = commands.add_parser("merge", help="merge an adapter into its model, and save that for other programs")
    _add_model(command)
    command.add_argument("adapter", metavar="ADAPTER", help="a run directory, an adapter's folder or its file")
    command.add_argument("out", metavar="OUT", help="the new folder")


def _add_convert(commands: Any) -> None:
    command = commands.add_parser("convert", help="write an adapter in the form of another tool")
    _list_in_help(command, "export formats", lambda: {name: record.title for name, record in EXPORT_FORMATS.items()})
    command.add_argument("source", metavar="IN", help="an adapter file of any tool, its folder or run directory")
    command.add_argument("out", metavar="OUT", help="a file that ends in .safetensors, or a folder")
    command.add_argument("--to", metavar="TARGET", required=True, help="one of those below")
    command.add_argument("--base", metavar="MODEL", help=f"{BASE}; default: that of the header, where it is here")
    command.add_argument("--axis", choices=("out", "in"), help=AXIS)
    command.add_argument("--strength", metavar="T", type=float, default=1.0, help="becomes strength 1 in the new file")
    _add_written(command)


def _add_combine(commands: Any) -> None:
    command = commands.add_parser("combine", help="write the sum of several adapters as one")
    _list_in_help(command, "export formats", lambda: {name: record.title for name, record in EXPORT_FORMATS.items()})
    command.add_argument(
        "sources",
        metavar="A",
        nargs="+",
        help="two or more: adapter files of any tool, folders, run directories",
    )
    command.add_argument("out", metavar="OUT", help="a file that ends in .safetensors, or a folder")
    command.add_argument("--weights", metavar="W", type=float, nargs="+", help="of each adapter; default: 1")
    command.add_argument("--to", metavar="TARGET", required=True, help="one of those below")
    command.add_argument("--base", metavar="MODEL", help=f"{BASE}; default: that of the headers, where it is here")
    command.add_argument("--axis", choices=("out", "in"), help=AXIS)
    _add_written(command)


def _add_written(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rank", metavar="R", type=_positive, help="at most: the closest adapter of this rank")
    command.add_argument("--energy", metavar="SHARE", type=float, help="of plain LoRA: what to keep, such as 0.99")
    command.add_argument(
        "--spectral",
        metavar="SHARE",
        type=float,
        help="of plain LoRA: the share of its norm that may be lost, such as 0.05",
    )
    command.add_argument("--dtype", type=full_name, choices=DTYPES, help="of the new tensors")
    command.add_argument(
        "--allow-lossy", action="store_true", help="write it even where the tool computes something else from it"
    )


def _add_verify(commands: Any) -> None:
    command = commands.add_parser("verify", help="show what other tools compute from an adapter file")
    _list_in_help(command, "tools", lambda: {name: TOOLS[name].title for name in other_tools()})
    command.add_argument("file", metavar="FILE", help="an adapter file of any tool, its folder or run directory")
    command.add_argument("--tool", metavar="NAME", default="all", help="one of those below, or all; default: all")
    command.add_argument("--base", metavar="MODEL", help=f"{BASE}; default: that of the header, where it is here")
    command.add_argument("--axis", choices=("out", "in"), help=AXIS)
    command.add_argument("--json", action="store_true", dest="as_json", help="print JSON, with every module")


def _add_average(commands: Any) -> None:
    command = commands.add_parser("average", help="average the adapters of a training's checkpoints")
    command.add_argument("run", metavar="RUN", type=Path, help="a run directory, with train.keep_checkpoints above 1")
    command.add_argument("--last", metavar="N", type=_positive, help="how many of the newest; default: all")


def _add_analyse(commands: Any) -> None:
    command = commands.add_parser("analyse", help="show how training changed lengths and directions of the weights")
    what = "a run, a campaign, an adapter file or a fine-tuned model"
    command.add_argument("runs", metavar="RUN", nargs="+", help=f"{what}; one method against another: several")
    command.add_argument("--base", metavar="MODEL", help=f"{BASE}; default: that of each run's config")
    command.add_argument("--modules", metavar="PATTERN", help="a regular expression for the names of modules")
    command.add_argument("--output", metavar="FOLDER", help="a new folder; default: a numbered one in runs/analysis")


def _add_tune(commands: Any) -> None:
    command = commands.add_parser("tune", help="find a learning rate, and a rank, for a training, by shorter ones")
    command.add_argument("config", metavar="CONFIG", help="the config of the training")
    rates = "the learning rates; default: half decades around that of the config"
    command.add_argument("--rates", metavar="RATE", type=float, nargs="+", help=rates)
    ranks = "the ranks; default: that of the config"
    command.add_argument("--ranks", metavar="R", type=_positive, nargs="+", help=ranks)
    command.add_argument(
        "--selection-metric",
        choices=("score", "held_out"),
        default="score",
        help="score: likeness to the training images, or that of the answers; held_out: the held-out loss",
    )
    clip = "an open_clip model that judges images; default: the embedded encoder"
    command.add_argument("--clip-model", metavar="MODEL", help=clip)
    command.add_argument("--output", metavar="FOLDER", help="one that exists goes on; default: runs/NAME_tune")
    command.add_argument("--dry-run", action="store_true", help="only print what would be trained")
    _add_overrides(command)


def _add_extract(commands: Any) -> None:
    command = commands.add_parser("extract", help="make an adapter from a model and its base model")
    for name, what in (("tuned", "the fine-tuned model"), ("base", "the model that it was fine-tuned from")):
        command.add_argument(
            name, metavar=name.upper(), help=f"{what}: a folder, a single-file checkpoint or a hub name"
        )
    command.add_argument("out", metavar="OUT", help="a new file that ends in .safetensors, or a new folder")
    command.add_argument("--rank", metavar="R", type=_positive, required=True, help="of the adapter")
    command.add_argument("--to", metavar="TARGET", help="as in convert; default: diffusers, or peft for a single model")


def _add_score(commands: Any) -> None:
    command = commands.add_parser("score", help="score predictions of any program by the rule of a suite")
    _list_in_help(command, "suites", scored_titles)
    command.add_argument(
        "predictions",
        metavar="PREDICTIONS",
        nargs="+",
        help="ours, VLMEvalKit's .xlsx, lmms-eval's samples, or .json, .jsonl, .csv, .tsv with an id and an answer; "
        "further ones are compared with the first",
    )
    command.add_argument("--suite", metavar="NAME", help="one of those below, or a suite's .yaml; default: theirs")
    command.add_argument("--data", metavar="FILE", help="the questions with their answers; default: those in the files")
    command.add_argument(
        "--format",
        metavar="NAME",
        dest="form",
        help="the format of --data, one of those in brackets below; default: by the content of the file",
    )
    command.add_argument("--annotations", metavar="FILE", help="the answers, of --data that has a file for them")
    command.add_argument("--split", metavar="NAME", help="of --data that has several")
    command.add_argument("--partial", action="store_true", help="leave out rows that only one side has")
    thoughts = "score what a model thought before an answer as a part of it"
    command.add_argument("--keep-thoughts", action="store_true", help=thoughts)
    precise = "also say how many answers an interval of +- POINTS takes"
    command.add_argument("--precision", metavar="POINTS", type=_above_zero, help=precise)
    command.add_argument(
        "--page", metavar="HTML", type=Path, help="write a page of all answers, of two files with changes"
    )
    command.add_argument("--images", metavar="FOLDER", help="the images, for --page, which shows none without")
    _add_follow_links(command)
    notation = "the model that wrote the boxes of --suite refcoco; default: shares, 1,000 or pixels, by their form"
    command.add_argument("--boxes", metavar="MODEL", help=notation)
    command.add_argument("--to", choices=("vlmevalkit", "lmms-eval"), help="write them for this tool, to --out")
    command.add_argument("--out", metavar="FILE", type=Path, help="a new file")


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _add_ask(commands: Any) -> None:
    command = commands.add_parser("ask", help="ask a model about images, without and with an adapter")
    _add_model(command, f"that of the adapter's run, else {DTYPE_OF_MODEL}")
    command.add_argument("images", metavar="IMAGE", nargs="*", help="or a video; none: a question of text alone")
    help_text = "asked as it is; with --adapter, in the prompt of its training"
    command.add_argument("question", metavar="QUESTION", help=help_text)
    command.add_argument("--then", metavar="QUESTION", action="append", default=[], help="asked next; may be repeated")
    command.add_argument("--system", metavar="TEXT", help="the system turn; default: that of the run's conversations")
    command.add_argument("--adapter", metavar="FOLDER", help="a run directory or an adapter's folder")
    longest = "the longest answer; default: 256, or that of the run's task"
    command.add_argument("--max-new-tokens", metavar="N", type=_positive, help=longest)


def _add_caption(commands: Any) -> None:
    command = commands.add_parser("caption", help="caption the images of a folder that have none, by a model")
    command.add_argument("folder", metavar="FOLDER", help="the images; captions go into its metadata.jsonl")
    _add_follow_links(command)
    command.add_argument("--model", metavar="MODEL", required=True, help="a folder of save_pretrained or a hub name")
    command.add_argument("--prompt", metavar="TEXT", default=CAPTION_PROMPT, help=f"default: {CAPTION_PROMPT}")
    command.add_argument("--max-new-tokens", metavar="N", type=_positive, help="the longest caption; default: 256")
    command.add_argument("--batch-size", metavar="N", type=_positive, default=1, help="images together; default: 1")
    _add_weights(command)


def _add_unpack(commands: Any) -> None:
    command = commands.add_parser("unpack", help="write rows of Parquet files as a folder of images with captions")
    command.add_argument("source", metavar="IN", help="a file, or a folder of files as the hub has them")
    command.add_argument("out", metavar="OUT", help="a new folder, which data.folder reads")
    command.add_argument("--image", metavar="COLUMN", help="the images; default: image, target, edited_image, ...")
    command.add_argument("--text", metavar="COLUMN", help="the captions; default: text, prompt, instruction, ...")
    references = "what each image is made of, for models that edit; default: references, cond_image, source, ..."
    command.add_argument("--references", metavar="COLUMN", nargs="+", default=(), help=references)
    command.add_argument("--split", metavar="NAME", help="the split of a folder, where it has several")


def _add_model(command: argparse.ArgumentParser, dtype: str = DTYPE_OF_MODEL) -> None:
    command.add_argument("model", metavar="MODEL", help="a folder of save_pretrained or a hub name")
    _add_weights(command, dtype)


def _add_weights(command: argparse.ArgumentParser, dtype: str = DTYPE_OF_MODEL) -> None:
    command.add_argument("--dtype", type=full_name, choices=DTYPES, help=f"of the weights; default: {dtype}")
    command.add_argument("--revision", metavar="R", help="a commit, branch or tag of a hub model; default: main")


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def _list_in_help(command: argparse.ArgumentParser, title: str, names: Callable[[], Mapping[str, str]]) -> None:
    """Adds names to the help of a command: they are listed when it is shown, since other packages add to them."""
    arguments = command.format_help

    def format_help() -> str:
        listed = names()
        width = max(map(len, listed))
        return "\n".join([f"{arguments()}\n{title}:", *(f"  {name:<{width}}  {listed[name]}" for name in listed), ""])

    command.format_help = format_help
