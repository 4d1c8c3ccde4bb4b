"""The documents: links lead somewhere, commands name configs and keys that exist, and the examples run."""

import re
from pathlib import Path

import pytest

from dora_mm.cli.commands import take_prompts_file
from dora_mm.cli.parser import build_parser
from dora_mm.config import load_config
from dora_mm.config.adapter import ImageAdapterConfig, VLAdapterConfig
from dora_mm.config.models import starts
from dora_mm.config.pipelines import SCHEMAS
from dora_mm.config.report import all_keys
from samples.build.__main__ import BUILDERS
from samples.build.schema import SCHEMAS as BUILD_SCHEMAS
from tests.documented.texts import DOCS, FENCE, ROOT, commands, text_of

DOCUMENTS = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "CODE_OF_CONDUCT.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "samples").rglob("*.md")),
]
LONG = 12_000  # characters
LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"")
BUILD = "python -m samples.build "


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- links -----------------------------------------------------------------------------------------------------------


def links(text: str) -> list[str]:
    """The targets of all links and images, of which those in code do not count."""
    prose = re.sub(r"`(?:[^`\n]|\n(?!\n))*`", "`code`", FENCE.sub("", text))
    return [one or other for one, other in LINK.findall(prose)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings, and those that are written out."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return set(re.findall(r"<a id=\"([^\"]+)\">", text)) | {
        re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def broken_link(document: Path, target: str) -> str | None:
    """What is wrong with a link of a document, or None."""
    if re.match(r"https?://|mailto:", target):
        return None
    path, _, anchor = target.partition("#")
    file = (document.parent / path).resolve() if path else document
    if not file.is_relative_to(ROOT):
        return f"{target} leaves the repository"
    if not file.exists():
        return f"{target} does not exist"
    if anchor and file.suffix == ".md" and anchor not in anchors(text_of(file)):
        return f"{target}: no heading makes #{anchor}"
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links(document):
    found = [broken_link(document, target) for target in links(text_of(document))]
    assert [problem for problem in found if problem] == []


def test_wrong_links_are_found(tmp_path):
    assert links("[a](b.md#c) ![d](e.png) `[no](code.md)`\n```\n[nor](here.md)\n```\n") == ["b.md#c", "e.png"]
    assert links("[`a\nb`](c.md) (`d`)") == ["c.md"]
    readme = ROOT / "README.md"
    assert broken_link(readme, "docs/layer.md#the-formula") is None
    assert broken_link(readme, "https://arxiv.org/abs/2402.09353") is None
    for wrong in ("docs/lair.md", "docs/layer.md#the-formulae", "../elsewhere.md"):
        assert broken_link(readme, wrong)


def test_the_program_names_pages_that_exist():
    """Messages, comments of the config's keys and heads of configs."""
    files = [file for room in ("dora_mm", "pipelines", "configs") for file in (ROOT / room).rglob("*.*")]
    texts = [text_of(file) for file in files if file.suffix in (".py", ".yaml", ".js")]
    pages = {page for text in texts for page in re.findall(r"\bdocs/[\w/]+\.md", text)}
    assert "docs/install.md" in pages
    assert [page for page in pages if not (ROOT / page).exists()] == []


# --- what a page looks like ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if not path.is_relative_to(ROOT / "samples")], ids=named
)
def test_lines_are_short(document):
    """Below 125 characters; tables and code count no line."""
    prose = [line for line in FENCE.sub("", text_of(document)).splitlines() if not line.startswith(("|", "!["))]
    assert [line for line in prose if len(line) >= 125] == []


@pytest.mark.parametrize("document", DOCS, ids=named)
def test_long_pages_begin_with_their_chapters(document):
    """In order, before the first of them; and so does each other page that has such links."""
    head, *chapters = re.split(r"^## ", FENCE.sub("", text_of(document)), flags=re.MULTILINE)
    linked = [links(paragraph) for paragraph in head.split("\n\n") if ") · [" in " ".join(paragraph.split())]
    expected = [f"#{anchor}" for chapter in chapters for anchor in anchors(f"# {chapter.splitlines()[0]}")]
    assert linked == ([expected] if chapters and (linked or len(text_of(document)) > LONG) else [])


# --- commands --------------------------------------------------------------------------------------------------------


def check_command(arguments: list[str], schemas: dict | None = None) -> None:
    """Parses a command as the program does, and loads its config with its overrides; paths in it need not exist.

    Raises:
        SystemExit: There is no such command or option.
        ValueError: There is no such config, or it does not accept an override.
    """
    parsed = build_parser().parse_args(arguments)
    if getattr(parsed, "command", None) == "sample":
        take_prompts_file(parsed)
    if config := getattr(parsed, "config", None):
        given = {"schemas": schemas} if schemas else {}
        loaded = load_config(ROOT / config, parsed.overrides, **given)
        wanted = "train" if parsed.command == "tune" else parsed.command  # it takes the config of a training
        if loaded.command != wanted:
            raise ValueError(f"{config} needs the command {loaded.command}, not {parsed.command}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands(document):
    found = commands(text_of(document))
    new = {f"{each[2]}.yaml": next(iter(starts()[each[1]].values())) for each in found if each[0] == "new"}
    new |= {f"{each[2]}_eval.yaml": "configs/vlm/eval_demo.yaml" for each in found if each[:2] == ["new", "vlm"]}
    new |= {f"{Path(each[1]).stem}.yaml": "configs/sdxl/demo.yaml" for each in found if each[0] == "import"}
    for arguments in found:
        check_command([new.get(each, each) for each in arguments])
    for arguments in commands(text_of(document), BUILD):
        if arguments not in [[name] for name in BUILDERS]:
            check_command(arguments, BUILD_SCHEMAS)


@pytest.mark.parametrize(
    "wrong",
    [
        "train configs/sdxl/demmo.yaml",
        "eval configs/sdxl/demo.yaml",
        "train configs/sdxl/demo.yaml --set train.stepps=3",
        "train configs/sdxl/demo.yaml --set train.steps=few",
        "train configs/sdxl/demo.yaml --dryrun",
    ],
)
def test_wrong_commands_are_found(wrong):
    (arguments,) = commands(f"```\ndora-mm {wrong}   # why\n```\n")
    with pytest.raises((ValueError, SystemExit)):
        check_command(arguments)


def test_the_documents_have_commands():
    found = [arguments for document in DOCUMENTS for arguments in commands(text_of(document))]
    assert {"train", "sample", "eval", "features", "inspect", "merge", "ask", "convert", "verify"} <= {
        arguments[0] for arguments in found
    }


def test_the_makefile_names_files_that_exist():
    named = re.findall(r"(?<![\w/$])(?:tests|samples|configs|dora_mm|pipelines)/[\w./-]+", text_of(ROOT / "Makefile"))
    assert "configs/sdxl/demo.yaml" in named
    assert [path for path in named if not (ROOT / path).exists()] == []


# --- examples --------------------------------------------------------------------------------------------------------


def examples(name: str) -> list:
    """The Python blocks of a document that need no finished run, each named after its line."""
    text = text_of(ROOT / "docs" / name)
    blocks = [(text.count("\n", 0, m.start(3)) + 1, m[3]) for m in FENCE.finditer(text) if m[2] == "python"]
    return [pytest.param(code, id=f"{name}:{line}") for line, code in blocks if '"runs/' not in code]


EXAMPLES = [block for page in ("layer.md", "formats.md", "file_layouts.md") for block in examples(page)]
# The blocks of peft.md go on with one model.
WITH_PEFT = pytest.param("\n".join(block.values[0] for block in examples("peft.md")), id="peft.md")


@pytest.mark.parametrize("code", [*EXAMPLES, WITH_PEFT])
def test_examples(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the files that an example writes
    exec(compile(code, "<example>", "exec"), {"__name__": "__main__"})


def test_every_chapter_of_the_layer_has_an_example():
    assert len(examples("layer.md")) >= 10


# --- keys ------------------------------------------------------------------------------------------------------------


def test_our_keys_for_those_of_other_trainers_exist():
    text = text_of(ROOT / "docs" / "coming_from.md")
    keys = {key for name in ("train_diffusion", "train_slider", "train_vl") for key in all_keys(SCHEMAS[name])}
    sections = {key.partition(".")[0] for key in keys}
    ours = [row.split(" | ", 1)[1] for row in text.splitlines() if row.startswith("| ") and " | here" not in row]
    named_keys = [name for cell in ours for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)", cell)]
    keys |= {*ImageAdapterConfig.known_parts(), *VLAdapterConfig.known_parts()}
    wrong = [name for name in named_keys if name.partition(".")[0] in sections and name not in keys]
    assert len(named_keys) > 80
    assert wrong == []
