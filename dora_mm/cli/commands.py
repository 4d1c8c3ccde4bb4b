"""Implementation of the commands: checks that need no large package, and the call of a recipe."""

import inspect
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from dora_mm.cli.parser import RESUMABLE, build_parser
from dora_mm.config import find_path, load_config, resolve_adapter, resolve_model, resolve_path, run_name
from dora_mm.config.latest import ADAPTER, CHECKPOINT, IMAGES, LATEST, RUN, Wanted, numbered
from dora_mm.config.overridden import value_at
from dora_mm.config.paths import INDEX, check_exists, check_paths
from dora_mm.config.schema import PipelineConfig
from dora_mm.recipes import PIPELINES, Recipes
from dora_mm.registries.tools import EXPORT_FORMATS, no_entry
from dora_mm.train.resuming import check_changes, nearest_run, started_config
from dora_mm.utils.home import expanded
from dora_mm.utils.processes import num_started, started_together
from dora_mm.utils.shell import command_line, quoted

# The arguments that are paths, with what `runs/NAME/latest` has to have; those of `set` are in the types of configs
PATHS: dict[str | tuple[str, str], Wanted] = {
    **dict.fromkeys(("config", "prompts_config", "resume", "replay", "images", "data", "folder", "output"), RUN),
    **dict.fromkeys(("model", "base", "tuned"), RUN),
    **dict.fromkeys(("adapter", "source", "sources", "file", "path", "out", "runs"), ADAPTER),
    **{"predictions": RUN, "run": CHECKPOINT, ("gallery", "runs"): IMAGES, ("train", "resume"): CHECKPOINT},
}
WRITTEN = ("out", "output", "page")
AUTO = Path("auto")  # of --resume: the run in `output` where there is one, else a new one
GENERATION_DEFAULTS = "configs/sdxl/jobs.yaml"


def run(arguments: Namespace, recipes: Recipes | None = None) -> None:
    """Runs a command.

    Args:
        arguments: The parsed arguments.
        recipes: The recipes that configs may name; None: those of `pipelines/`.
    """
    number_paths(arguments)
    match arguments.command:
        case "sample" if arguments.replay is not None:
            _replay(arguments)
        case "sample":
            take_prompts_file(arguments)
            _run_config(arguments, recipes or PIPELINES)
        case "train" | "grid" | "eval" | "compare" | "features":
            _run_config(arguments, recipes or PIPELINES)
        case "inspect":
            if find_path(arguments.path) is None:
                resolve_model(arguments.path, "PATH|MODEL")
            _call("inspect_model", arguments)
        case "gallery":
            for run in arguments.runs:
                check_exists(run, "RUN")
            _call("gallery", arguments)
        case "merge":
            _check_model(arguments)
            _check_transformers(arguments)
            resolve_adapter(arguments.adapter, "ADAPTER")
            _call("merge", arguments)
        case "ask":
            _check_model(arguments)
            _check_files(arguments)
            _call("ask", arguments)
        case "caption":
            resolve_path(arguments.folder, "FOLDER")
            _check_model(arguments, "--model")
            _call("caption", arguments)
        case "convert":
            _check_target(arguments)
            resolve_adapter(arguments.source, "IN")
            _check_base(arguments)
            _call("convert", arguments)
        case "combine":
            _check_target(arguments)
            for source in arguments.sources:
                resolve_adapter(source, "A")
            _check_base(arguments)
            _call("combine", arguments)
        case "verify":
            resolve_adapter(arguments.file, "FILE")
            _check_base(arguments)
            _call("verify", arguments)
        case "completion":
            from dora_mm.cli.completion import script  # it imports shtab, which the base has not

            print(script(arguments.shell, build_parser()))
        case "import":
            _call("import_config", arguments)
        case "tune":
            resolve_path(arguments.config, "CONFIG")
            _call("tune", arguments)
        case "extract":
            resolve_model(arguments.tuned, "TUNED")
            resolve_model(arguments.base, "BASE")
            _call("extract", arguments)
        case other:
            _call(other, arguments)


def number_paths(arguments: Namespace) -> None:
    """Replaces `latest` by numbers in path arguments, in place.

    Raises:
        ValueError: No run has the wanted files.
    """
    for name, given in vars(arguments).items():
        wanted = PATHS.get((arguments.command, name)) or PATHS.get(name)
        if wanted and given is not None:
            paths = given if isinstance(given, list) else [given]
            found = [type(path)(numbered(str(path), wanted, new=name in WRITTEN)) for path in paths]
            setattr(arguments, name, found if isinstance(given, list) else found[0])


def _call(recipe: str, arguments: Namespace) -> None:
    """Calls a recipe with the arguments, which have the names of its parameters."""
    given = {name: value for name, value in vars(arguments).items() if name != "command"}
    PIPELINES.load(recipe).main(**given)


def _check_model(arguments: Namespace, key: str = "MODEL") -> None:
    found = resolve_model(arguments.model, key)
    if arguments.revision is not None and (find_path(arguments.model) or not arguments.revision):
        raise ValueError(f"--revision is a commit, branch or tag of a hub model: leave it out for {arguments.model}")
    _check_hub(found, arguments.revision, key)


def _check_hub(model: str, revision: str | None, key: str) -> None:
    """Checks before anything large is imported that a hub model can be had."""
    from dora_mm.models.hub import check_hub

    check_hub(model, revision, key=key)


def _check_parts(config: Any, source: str) -> None:
    """Checks before anything large is imported that a config is for the family of its image model."""
    from dora_mm.models.images.parts_of_family import check_parts

    check_parts(config.adapter, config.model, source)


def _check_transformers(arguments: Namespace) -> None:
    """Merging writes models of transformers; those of diffusers are converted."""
    found = find_path(arguments.model)
    if found is not None and (found.is_file() or (found / INDEX).is_file()):
        kind = "a single file" if found.is_file() else "a model of diffusers"
        raise ValueError(
            f"MODEL: {arguments.model} is {kind}, and merge writes folders of transformers: dora-mm convert "
            f"{quoted(arguments.adapter)} {quoted(arguments.out)} --to merged --base {quoted(arguments.model)}"
        )


def _check_target(arguments: Namespace) -> None:
    if arguments.to not in EXPORT_FORMATS:
        raise ValueError(no_entry("export format", arguments.to, f"one of {', '.join(EXPORT_FORMATS)}"))


def _check_base(arguments: Namespace) -> None:
    if arguments.base is not None:
        resolve_model(arguments.base, "--base")


def _check_files(arguments: Namespace) -> None:
    for image in arguments.images:
        resolve_path(image, "IMAGE")
    if arguments.adapter is not None:
        resolve_adapter(arguments.adapter, "--adapter")


# --- commands with a config ------------------------------------------------------------------------------------------


def _replay(arguments: Namespace) -> None:
    if arguments.config or arguments.resume or any(not text.startswith("output=") for text in arguments.overrides):
        raise ValueError("--replay takes nothing but --set output=FOLDER: the image says all else")
    output = arguments.overrides[-1].partition("=")[2] if arguments.overrides else None
    PIPELINES.load("sample").replay(arguments.replay, output=output)


def take_prompts_file(arguments: Namespace) -> None:
    """Replaces a prompts file by its config, and adds the file to the overrides; a config stays as it is.

    Args:
        arguments: The parsed arguments of `sample`; they are changed.

    Raises:
        ValueError: A config is given twice.
    """
    prompts_file = arguments.config
    if prompts_file is not None and Path(prompts_file).suffix.lower() not in (".yaml", ".yml"):
        given: dict[str, Any] = {"prompts_file": prompts_file, "name": run_name(prompts_file), "prompts": []}
        arguments.config = arguments.prompts_config or GENERATION_DEFAULTS
        if arguments.resume is not None and arguments.prompts_config is None:
            arguments.config = None  # the run's own
            del given["name"]
        # not as ASCII: YAML reads the two escapes of an emoji as two characters
        texts = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]
        arguments.overrides = [*texts, *arguments.overrides]
    elif prompts_file is None and arguments.overrides and arguments.resume is None and arguments.prompts_config is None:
        arguments.config = GENERATION_DEFAULTS  # the overrides have the prompts
    elif arguments.prompts_config is not None:
        raise ValueError("--config belongs to a prompts file: dora-mm sample JOBS.csv --config CONFIG")


def _run_config(arguments: Namespace, recipes: Recipes) -> None:
    config = _config(arguments, recipes)
    if not arguments.dry_run:  # a dry run reports paths with all other problems: dora_mm.train.preflight
        check_paths(config, new_run=arguments.resume is None)
    model: Any = getattr(config, "model", None)
    if hasattr(model, "path") and arguments.resume is None and not arguments.dry_run:  # some make a new model
        _check_hub(resolve_model(model.path), model.revision, "model.path")
    if config.pipeline in ("train_diffusion", "train_slider") and arguments.resume is None:
        _check_parts(config, arguments.config)
    main = recipes.load(config.pipeline).main
    flags = {name: True for name in ("dry_run", "decode", "report") if getattr(arguments, name)}
    if arguments.decode and not arguments.dry_run:
        raise ValueError("--decode belongs to a dry run: dora-mm train CONFIG --dry-run --decode")
    for name in flags:
        if name not in inspect.signature(main).parameters:
            raise ValueError(f"--{name.replace('_', '-')}: the recipe {config.pipeline} does not support it")
    resumed = {"resume": arguments.resume} if arguments.resume is not None or not flags else {}
    main(config, **flags, **resumed)
    if arguments.dry_run and num_started() == 1:  # the command that started several processes is not known
        print(f"\n{_without_dry_run(arguments, config)}")


def _without_dry_run(arguments: Namespace, config: PipelineConfig) -> str:
    """A line with the command that starts, or resumes, what a dry run was of."""
    overrides = [_as_read(override, config) for override in arguments.overrides]
    words = [arguments.config] if arguments.config else []
    words += ["--resume", str(arguments.resume)] if arguments.resume else []
    words += ["--set", *overrides] if overrides else []
    return f"{'to go on' if arguments.resume else 'to start'}  dora-mm {config.command} {command_line(*words)}"


def _as_read(override: str, config: PipelineConfig) -> str:
    """An override, with the number of a run where it says `latest`."""
    key, _, text = override.partition("=")
    value = value_at(config.model_dump(mode="json"), key.split(".")) if LATEST in text else None
    return override if value is None else f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _config(arguments: Namespace, recipes: Recipes) -> PipelineConfig:
    """The config of a command; `--resume auto` becomes the run directory, or None where a new run starts."""
    run, given = arguments.resume, arguments.config
    if run == AUTO and arguments.command != "train":
        raise ValueError(f"--resume auto belongs to train: {arguments.command} goes on in its `output` without it")
    if run is not None and run != AUTO:
        saved = run / "config.yaml"
        if not saved.is_file():
            raise ValueError(f"--resume {quoted(run)} is not a run directory: it has no config.yaml{nearest_run(run)}")
        given = given or saved
    if given is None:
        what = "JOBS, a CONFIG, --set prompts=[...]" if arguments.command == "sample" else "a CONFIG before --set"
        raise ValueError(f"{arguments.command} needs {what}{'' if run else ', or --resume RUN_DIR'}")
    config = load_config(given, arguments.overrides, recipes.schemas)
    if config.command != arguments.command:
        raise ValueError(_needs_command(config.command, arguments))
    if run == AUTO:
        arguments.resume = _run_of(config)
    if arguments.resume is not None and config.changeable is not None:
        _check_resumed(config, arguments, recipes)
    return config


def _run_of(config: PipelineConfig) -> Path | None:
    """The run directory that `--resume auto` goes on with; None where it is still to be made.

    The main process looks, for all of them: on a network file system the others may see a new folder later.
    """
    output = getattr(config, "output", None)
    if output is None:
        raise ValueError("--resume auto needs the folder of the run, by which it is found again: --set output=FOLDER")
    run = expanded(output)
    return run if started_together().from_main((run / "config.yaml").is_file()) else None


def _check_resumed(config: PipelineConfig, arguments: Namespace, recipes: Recipes) -> None:
    """Checks that a run can go on with a config: its own or the given one, with the overrides."""
    run = arguments.resume
    before = started_config(run, recipes.schemas)
    if arguments.config is None:
        saved = run / "config.yaml"
        check_changes(f"{saved}, edited", before, load_config(saved, schemas=recipes.schemas))
    check_changes(f"--resume {quoted(run)}", before, config)


def _needs_command(name: str, arguments: Namespace) -> str:
    command = f"dora-mm {name}"
    if arguments.config is not None:
        return f"{arguments.config} needs another command: {command} {quoted(arguments.config)}"
    advice = f"{command} --resume {quoted(arguments.resume)}" if name in RESUMABLE else "it cannot be resumed"
    return f"--resume {quoted(arguments.resume)}: the run is one of {command}: {advice}"
