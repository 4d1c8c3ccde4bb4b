"""The folder of a new user, in which documented commands run: a checkout, and what the documents take for granted."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest.mock import patch

from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from dora_mm.cli import main
from dora_mm.cli.commands import AUTO, take_prompts_file
from dora_mm.cli.parser import build_parser
from dora_mm.config import find_path, load_config
from dora_mm.config.latest import LATEST, numbered
from dora_mm.config.paths import paths_in
from dora_mm.config.schema import PathKind, PipelineConfig, Section
from dora_mm.config.served import EvalServerConfig
from dora_mm.config.vl import ExtractFeaturesConfig
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.image_folder import ImageFolder
from dora_mm.data.vl.tables import open_table
from dora_mm.studies.campaigns.selection_metrics import StyleSimilarityMetric
from tests.documented import data, stand_ins
from tests.documented.cuts import cuts
from tests.documented.texts import DOCS, ROOT, blocks, configs, head_commands, text_of
from tests.shared.single_files import write_single_file

MANY = 50  # images; of more, features are computed only of those that are needed
WITH_CONFIG = ("train", "sample", "grid", "eval", "compare", "features", "tune")
INPUTS = (
    *("source", "sources", "model", "adapter", "file", "base", "tuned", "path", "folder", "images", "runs", "resume"),
    "replay",
)
STYLE = [
    ["train", "configs/sdxl/tiny_3d_icon.yaml", "--set", "adapter.method=lora", "output=build/lora"],
    ["convert", "build/lora", "style.safetensors", "--to", "kohya", "--base", "samples/tiny-sdxl"],
]
KOHYA = """
pretrained_model_name_or_path = "samples/tiny-sdxl"
train_data_dir = "my_images"
resolution = 64
network_dim = 4
max_train_steps = 2
"""
TUNED = ["convert", "runs/3d_icon/001", "build/tuned", "--to", "merged", "--allow-lossy", "--base", stand_ins.SDXL]


class Checkout:
    """A folder, which must be the current one, in which commands of the documents are run one after the other.

    Args:
        tiny_sdxl: A folder with a tiny SDXL.
        tiny_vlm: Gives the folders of tiny vision-language models by class.
    """

    def __init__(self, tiny_sdxl: Path, tiny_vlm: Callable[[str], Path]):
        self.tiny_sdxl, self.tiny_vlm = tiny_sdxl, tiny_vlm
        self.ours: set[str] = set()  # data files that were made here
        self.makers = makers()
        for name in ("samples", "configs"):
            Path(name).symlink_to(ROOT / name)

    def run(self, arguments: list[str]) -> int:
        """Runs a documented command, with what it needs made before and its size cut; returns its exit code."""
        parsed = build_parser().parse_args(arguments)
        config = None
        if parsed.command == "sample":
            take_prompts_file(parsed)
        if parsed.command in WITH_CONFIG and parsed.config:
            config = load_config(parsed.config, parsed.overrides)
            self.provide_all(config, dry_run=getattr(parsed, "dry_run", False))
        if parsed.command == "new" and parsed.data and not parsed.images:
            data.write_texts(Path(parsed.data))
        elif parsed.command == "new" and parsed.data:
            form = "preferences" if "pairs" in parsed.data else "chat"
            self._write_data(SourceConfig(format=form, file=parsed.data, images=parsed.images))
        for name in INPUTS:
            given = getattr(parsed, name, None)
            for path in given if isinstance(given, list) else [given] if given else []:
                if (name, path) != ("resume", AUTO):
                    self.provide(str(path))
        AcceleratorState._reset_state(reset_partial_state=True)
        with patch.object(StyleSimilarityMetric, "has_learned", return_value=True):  # nothing is, in two steps
            return main([*arguments, *self.cuts(arguments, config)])

    def cuts(self, arguments: list[str], config: PipelineConfig | None) -> list[str]:
        """What is appended to a command."""
        if isinstance(config, ExtractFeaturesConfig):
            overrides = self._few_images(config)
        elif config:
            overrides = cuts(config, self.ours.__contains__)
            overrides += [f"server.url={stand_ins.server()}"] if isinstance(config, EvalServerConfig) else []
        elif "--resume" in arguments and any(argument.startswith("train.steps=") for argument in arguments):
            before = load_config(Path(numbered(arguments[arguments.index("--resume") + 1])) / "config.yaml")
            overrides = [f"train.steps={before.model_dump()['train']['steps'] + 1}"]
        else:
            return []
        return ["--set", *overrides] if overrides else []

    # --- what commands need ------------------------------------------------------------------------------------------

    def provide_all(self, config: PipelineConfig, *, dry_run: bool = False) -> None:
        """Makes what a config names and is not there."""
        if isinstance(config, ExtractFeaturesConfig):
            missing = [folder for folder in config.images if find_path(folder) is None]
            names = images_of(self._readers(str(config.output))) if missing else []
            for number, folder in enumerate(missing):  # each has its share
                data.write_images(Path(folder), names[number :: len(missing)])
            return
        for source in sources_in(config):
            self._write_data(source)
        for key, kind, path in paths_in(config):
            if kind not in (PathKind.INPUT, PathKind.MODEL, PathKind.ADAPTER):
                continue
            if key.split("[")[0].endswith("features"):
                self._provide_features(path, config, dry_run=dry_run)
            elif key == "data.folder" and find_path(path) is None:
                data.write_captioned(Path(path))
            elif key == "base":
                self.provide_all(load_config(path))
            else:
                self.provide(path)

    def provide(self, name: str) -> None:
        """Makes a file or folder that is not there."""
        if find_path(numbered(name)) is not None:
            return
        path = Path(name)
        parts = path.parts
        if parts[:1] == ("runs",) and len(parts) > 2:
            self._make_run(Path(*parts[:2], "001" if parts[2] == LATEST else parts[2]))
        elif stand_ins.build(name, path, self.tiny_sdxl, self.tiny_vlm):
            pass
        elif name in ("my_images", "before"):
            data.write_captioned(path)
        elif name == "my_pairs":
            data.write_pairs_of_parquet(path)
        elif path.suffix == ".jpg":
            data.write_images(path.parent, [path.name])
        elif name == "jobs.csv":
            shown = [block for document in DOCS for block in blocks(text_of(document)) if block.startswith("prompt,")]
            path.write_text(shown[0])
        elif path.suffix == ".toml":
            self.provide("my_images")
            path.write_text(KOHYA)
        elif name == "style.safetensors":
            self._make_style(path)
        elif name == "my-model.safetensors":
            assert self.run(TUNED) == 0
            write_single_file(Path("build/tuned"), path)
        else:
            raise AssertionError(f"there is nothing to take the place of {name}")

    def _make_style(self, path: Path) -> None:
        """Makes a file as kohya's scripts write it, with an alpha that is half the rank."""
        for command in STYLE:
            assert self.run(command) == 0
        tensors = {key: t / 2 if key.endswith(".alpha") else t for key, t in load_file(path).items()}
        save_file(tensors, path)

    def _make_run(self, run: Path) -> None:
        """Makes a run by the command at the head of the config that it is named after, as often as its number says."""
        while not run.exists():
            assert self.run(self.makers[str(run.parent)]) == 0

    def _write_data(self, source: SourceConfig) -> None:
        """Writes the files of a source, and its images."""
        if find_path(source.file) is None:
            self.ours.add(source.file)
        if source.file not in self.ours:
            return
        data.write_source(source)
        if source.images:
            data.write_images(Path(source.images), images_of([source]))

    def _provide_features(self, folder: str, config: PipelineConfig, *, dry_run: bool) -> None:
        """Makes features by the documented command that writes this folder; where there is none, random ones."""
        if find_path(folder) is not None:
            return
        if folder in self.makers and not dry_run:
            assert self.run(self.makers[folder]) == 0
        else:
            dim = config.model_dump()["model"]["feature_dim"]
            data.write_features(Path(folder), images_of(sources_in(config)), dim)

    def _few_images(self, config: ExtractFeaturesConfig) -> list[str]:
        """Overrides with folders of the images that documented configs need features of, and with random weights."""
        names, few = images_of(self._readers(str(config.output))), []
        for number, folder in enumerate(map(find_path, config.images)):
            assert folder is not None
            files = sorted(path for path in folder.rglob("*.*") if path.is_file())
            if len(files) > MANY:
                find = ImageFolder(folder).find
                chosen = [folder / path for name in names if (path := find(name))] or files[: data.NUM_ROWS]
                folder = linked(chosen, Path("cut") / str(config.output) / str(number))
            few.append(str(folder))
        tower = config.vision.tower
        weights = [] if tower.startswith("timm/") else [f"vision.pretrained={stand_ins.tower_weights(tower)}"]
        return [f"images=[{', '.join(few)}]", "follow_links=true", *weights]

    def _readers(self, features: str) -> list[SourceConfig]:
        """The sources of all configs that read these features, written where they are missing."""
        found = []
        for path in configs():
            config = load_config(path)
            if features in features_of(config):
                for source in sources_in(config):
                    self._write_data(source)
                found += sources_in(load_config(path, cuts(config, self.ours.__contains__)))
        return found


def features_of(config: PipelineConfig) -> list[str]:
    """The features that a config reads; a comparison those of its base if it names none."""
    values = config.model_dump()
    own = [path for section in ("vision", "questions") for path in (values.get(section) or {}).get("features", ())]
    return own or (features_of(load_config(values["base"])) if isinstance(values.get("base"), str) else [])


def images_of(sources: Iterable[SourceConfig]) -> list[str]:
    """The names of the images of all rows."""
    tables = [open_table(each, Path("cut/tables"), on_bad_data="stop", check_images=False) for each in sources]
    return sorted({name for table in tables for name in table.images()})


def linked(files: Iterable[Path], folder: Path) -> Path:
    """A folder of links to files, which may be there already."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        link = folder / file.name
        if not link.is_symlink():
            link.symlink_to(file.absolute())
    return folder


def makers() -> dict[str, list[str]]:
    """The documented commands that make something which others need, by its folder."""
    found = {}
    for path in configs():
        for arguments in head_commands(text_of(path)):
            parsed = build_parser().parse_args(arguments)
            if parsed.command == "sample":
                take_prompts_file(parsed)
            config = load_config(ROOT / parsed.config, parsed.overrides)
            folder = config.output if isinstance(config, ExtractFeaturesConfig) else f"runs/{config.name}"
            found.setdefault(folder, arguments)
    return found


def sources_in(section: Section) -> Iterator[SourceConfig]:
    """All sources of data of a config."""
    if isinstance(section, SourceConfig):
        yield section
        return
    for name in type(section).model_fields:
        value = getattr(section, name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Section):
                yield from sources_in(item)
