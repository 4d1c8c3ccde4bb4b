"""Imports go one way, as in docs/architecture.md, and `import dora_mm.core` imports nothing but torch."""

import ast
import re
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest

import dora_mm
from dora_mm.registries.vl_tasks import TASKS

ROOT = Path(__file__).parents[1]
ROWS = [  # each may import the rows above it and itself, but not its neighbours or the rows below
    {"utils", "core"},
    {"registries"},
    {"kernels", "targets", "config"},
    {"backend", "formats"},
    {"peft"},
    {"data"},
    {"models"},
    {"eval"},
    {"tasks", "adapting", "sampling"},
    {"train"},
    {"preview", "studies"},
    {"pipelines", "cli", "recipes"},
    {"testing"},
]
ROW_OF = {package: number for number, row in enumerate(ROWS) for package in row}
ENTRY_POINTS = {"dora_mm/__init__.py", "dora_mm/__main__.py"}  # they resolve names lazily, and may import anything
SOURCES = sorted(p for folder in ("dora_mm", "pipelines") for p in (ROOT / folder).rglob("*.py"))
FAMILIES = re.compile(r"sdxl|vl_bart|vlbart|\bvl\b|\beyes\b|unet|tokenizer", re.IGNORECASE)
ROOMS_WITHOUT_FAMILIES = ("tasks", "adapting", "eval", "sampling", "train", "preview", "studies", "pipelines")
VL_FAMILIES = re.compile(r"vl_bart|vlbart|[\"']vlm[\"']|models\.vlm", re.IGNORECASE)
IMAGE_FAMILIES = re.compile(r"sdxl|z[-_ ]?image|klein|qwen_image|Qwen-Image|krea|\bsd3|StableDiffusion3", re.IGNORECASE)
MAY_NAME_IMAGE_FAMILIES = (  # their own files, data about architectures and files, and examples
    *("dora_mm/targets/", "dora_mm/formats/", "dora_mm/config/", "dora_mm/cli/", "dora_mm/__init__.py"),
    *("dora_mm/models/images/sdxl/", "dora_mm/models/images/z_image.py", "dora_mm/models/images/flux2_klein.py"),
    *("dora_mm/models/images/qwen_image", "dora_mm/models/images/krea2.py", "dora_mm/models/images/sd3.py"),
    *("dora_mm/registries/image_families.py", "dora_mm/registries/target_maps.py"),
)
VL_TASKS = re.compile(rf"[\"']({'|'.join(TASKS)})[\"']")
MAY_NAME_VL_TASKS = (  # the records of tasks; and of formats and metrics, some of which have the name of a task
    *("dora_mm/registries/", "dora_mm/config/vl_data.py", "dora_mm/data/vl/readers/"),
    *("dora_mm/eval/vl/captions.py", "dora_mm/eval/vl/submissions.py"),  # a key of their files
    "dora_mm/eval/vl/predictions/reading.py",  # a key of other programs' files
    *("dora_mm/data/images/captions.py", "dora_mm/data/images/kohya_metadata.py", "dora_mm/cli/"),  # a key, a command
    *("dora_mm/train/resuming.py", "dora_mm/config/importing/vl_trainers.py"),  # a section of configs
    "dora_mm/testing/vl_family.py",  # the rows of its checks
)
OF_A_BARE_QUESTION = re.compile(r"question_task = .*")  # each family says which task it takes a question for


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def package_of(module: str) -> str:
    """The top-level package of a module of ours: `dora_mm.formats.tools.native` is in formats.

    Public names such as `dora_mm.inject` count as formats: they import core, targets, backend and formats.
    """
    top, _, rest = module.partition(".")
    name = top if top == "pipelines" else rest.split(".")[0]
    return "formats" if name in dora_mm.__all__ else name


@cache
def imported(path: Path) -> set[str]:
    """All modules that a file imports, at the top or inside functions."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    found = set()
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def violation(module: str, target: str) -> str | None:
    """What is wrong with `module` importing `target`, two modules of ours."""
    here, there = package_of(module), package_of(target)
    if there not in ROW_OF:
        return None if there in ("", "__version__") else f"{there} has no row: add it to docs/architecture.md and here"
    if here == "pipelines" and there in ("pipelines", "cli", "recipes"):
        same = ".".join(module.split(".")[:2]) == ".".join(target.split(".")[:2])
        return None if same else "pipelines never import each other"
    if here == there or {here, there} == {"cli", "recipes"}:
        return None
    return None if ROW_OF[there] < ROW_OF[here] else f"{here} may not import {there}"


def test_the_document_has_the_same_rows():
    text = text_of(ROOT / "docs" / "architecture.md")
    (block,) = re.findall(r"```rows\n(.*?)```", text, re.DOTALL)
    assert [set(re.split(r",\s*", line.strip())) for line in block.splitlines()] == ROWS


@pytest.mark.parametrize(("room", "allowed"), [("train", set()), ("studies/campaigns", {"vl"})])
def test_training_names_no_family_of_models(room, allowed):
    """Campaigns know images from questions (the folders `vl`), and the loop not even that."""
    paths = (ROOT / "dora_mm" / room).rglob("*.py")
    found = {name_of(path): set(FAMILIES.findall(text_of(path))) - allowed for path in paths}
    assert found
    assert {name: names for name, names in found.items() if names} == {}


def test_only_three_recipes_import_studies():
    users = {name_of(path) for path in SOURCES if {"studies"} & {package_of(name) for name in imported(path)}}
    outside = {name for name in users if not name.startswith("dora_mm/studies/")}
    assert outside == {"pipelines/compare.py", "pipelines/analyse.py", "pipelines/tune.py"}


@pytest.mark.parametrize("room", ROOMS_WITHOUT_FAMILIES)
def test_what_serves_all_families_of_models_names_none(room):
    folder = ROOT / room if room == "pipelines" else ROOT / "dora_mm" / room
    files = [path for path in SOURCES if folder in path.parents]
    assert files
    assert {name_of(path): found for path in files if (found := VL_FAMILIES.findall(text_of(path)))} == {}


def test_only_its_own_files_name_a_family_of_image_models():
    files = [path for path in SOURCES if not name_of(path).startswith(MAY_NAME_IMAGE_FAMILIES)]
    assert files
    assert {name_of(path): found for path in files if (found := IMAGE_FAMILIES.findall(text_of(path)))} == {}


def test_only_its_record_names_a_task():
    files = [path for path in SOURCES if not name_of(path).startswith(MAY_NAME_VL_TASKS)]
    texts = {name_of(path): OF_A_BARE_QUESTION.sub("", text_of(path)) for path in files}
    assert texts
    assert {name: found for name, text in texts.items() if (found := VL_TASKS.findall(text))} == {}


def test_the_library_imports_nothing_that_only_a_checkout_has():
    for path in SOURCES:
        assert not {name for name in imported(path) if name.split(".")[0] in ("samples", "tests")}, path


def test_imports_go_one_way():
    wrong = {}
    for path in SOURCES:
        if name_of(path) in ENTRY_POINTS:
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert package_of(module) in ROW_OF, module
        ours = sorted(t for t in imported(path) if t.split(".")[0] in ("dora_mm", "pipelines"))
        wrong |= {(module, t): found for t in ours if (found := violation(module, t))}
    assert wrong == {}


def test_core_imports_torch_and_nothing_else():
    files = (path for path in SOURCES if name_of(path).startswith("dora_mm/core/"))
    outside = {name_of(p): {n.split(".")[0] for n in imported(p)} - sys.stdlib_module_names for p in files}
    assert outside
    assert {name: packages for name, packages in outside.items() if packages - {"torch", "dora_mm"}} == {}


def test_all_bars_are_of_one_kind():
    """So that nothing is silent without a terminal."""
    assert {name_of(path) for path in SOURCES if {"tqdm", "tqdm.tqdm"} & imported(path)} == {
        "dora_mm/utils/progress.py"
    }


UNPICKLES = re.compile(r"\btorch\.load\(|\bpickle\.loads?\(|\bjoblib\.load|allow_pickle=True|\bshelve\b|weights_only")


def test_one_reader_reads_pickles_and_nothing_is_unpickled():
    reader = "dora_mm/utils/pickles.py"
    assert {name_of(path) for path in SOURCES if {"pickle", "cloudpickle", "dill", "joblib"} & imported(path)} == {
        reader
    }
    assert [name_of(path) for path in SOURCES if UNPICKLES.search(text_of(path))] == []


CONNECTIONS = {"socket", "ssl", "http", "urllib3", "requests", "httpx", "aiohttp", "websockets", "smtplib", "ftplib"}


def test_only_the_client_of_a_named_server_opens_connections():
    """All else that is fetched is fetched by the hub's client, of models that are named."""
    opens = {
        name_of(path)
        for path in SOURCES
        if any(name.split(".")[0] in CONNECTIONS or name.startswith("urllib.request") for name in imported(path))
    }
    names_alone = {"dora_mm/models/opening.py", "dora_mm/utils/lock.py", "dora_mm/utils/partials.py"}
    assert opens - names_alone == {"dora_mm/models/vl/server.py", "dora_mm/models/vl/served_answers.py"}
    of_socket = {found for name in names_alone for found in re.findall(r"\bsocket\.(\w+)", text_of(ROOT / name))}
    assert of_socket == {"gaierror", "gethostname"}
    assert [name_of(path) for path in SOURCES if "send_telemetry" in text_of(path)] == []


PEFT_ITSELF = {
    *("dora_mm/adapting/prefixes.py", "dora_mm/formats/tools/peft_loading.py"),
    "dora_mm/testing/vl_family.py",  # which compares with it
}


def test_only_its_room_knows_the_layers_of_peft():
    """The others import a model of it that takes prefixes, and ask what it takes of a file."""
    found = {name_of(p) for p in SOURCES if any(name.split(".")[0] == "peft" for name in imported(p))}
    assert {name for name in found if not name.startswith("dora_mm/peft/")} == PEFT_ITSELF
    ours = {name_of(p) for p in SOURCES if any(name.startswith("dora_mm.peft") for name in imported(p))}
    assert {name for name in ours if not name.startswith("dora_mm/peft/")} == {"dora_mm/__init__.py"}


@pytest.mark.parametrize(
    ("module", "target", "allowed"),
    [
        ("dora_mm.formats.tools.native", "dora_mm.core.layer", True),
        ("dora_mm.formats.tools.native", "dora_mm.formats.state", True),
        ("dora_mm.core.layer", "dora_mm.targets", False),
        ("dora_mm.models.images.sdxl.family", "dora_mm.data.images.folder", True),
        ("dora_mm.data.images.folder", "dora_mm.models.images.sdxl.family", False),
        ("dora_mm.models.images.sdxl.family", "dora_mm.eval.images.style", False),
        ("dora_mm.tasks.diffusion", "dora_mm.sampling.image_sampler", False),
        ("dora_mm.tasks.diffusion", "dora_mm.train.loop", False),
        ("dora_mm.train.loop", "dora_mm.studies.curves", False),
        ("dora_mm.preview.training", "dora_mm.studies.curves", False),
        ("pipelines.sample", "dora_mm.train.run", True),
        ("pipelines.sample", "pipelines.train_diffusion", False),
        ("dora_mm.train.loop", "pipelines.train_diffusion", False),
        ("dora_mm.formats.tools.native", "dora_mm.surprise", False),
        ("pipelines.sample", "dora_mm.inject", True),
        ("dora_mm.core.layer", "dora_mm.inject", False),
    ],
)
def test_violations_of_the_import_order_are_found(module, target, allowed):
    assert (violation(module, target) is None) == allowed


def run(code: str) -> str:
    code = textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_the_package_is_lazy_and_core_loads_neither_triton_nor_diffusers_nor_transformers():
    """`import dora_mm` loads neither torch nor anything of ours until a name is used.

    Of what core loads only what it adds counts, because torch may import triton. `new`, which looks at images, starts
    without diffusers, too.
    """
    assert run("""
        import sys, dora_mm
        print(*sorted(n for n in sys.modules if n == "torch" or n.startswith("dora_mm")))
        import torch
        before = set(sys.modules)
        import dora_mm.core
        added = {name.split(".")[0] for name in set(sys.modules) - before}
        print(*sorted(added & {"triton", "diffusers", "transformers", "peft", "safetensors", "accelerate"}))
        import pipelines.new
        print(*sorted({"diffusers", "transformers", "peft"} & set(sys.modules)))
        missing = [name for name in dora_mm.__all__ if not callable(getattr(dora_mm, name))]
        assert not missing, missing
        try:
            dora_mm.nothing
        except AttributeError as error:
            print(error)
    """).splitlines() == ["dora_mm", "", "", "module 'dora_mm' has no attribute 'nothing'"]


@pytest.mark.slow
def test_images_are_trained_and_drawn_without_extras():
    """What `pip install dora_mm` alone installs is enough for them, and for files of adapters."""
    assert (
        run("""
        import builtins
        found = builtins.__import__
        extras = {"scipy", "matplotlib", "timm", "pyarrow", "h5py", "openpyxl", "av", "schedulefree"}

        def import_(name, globals=None, locals=None, fromlist=(), level=0):
            own = (globals or {}).get("__name__", "").startswith(("dora_mm", "pipelines"))
            if own and level == 0 and name.partition(".")[0] in extras:
                raise ModuleNotFoundError(f"{globals['__name__']} imports {name}")
            return found(name, globals, locals, fromlist, level)

        builtins.__import__ = import_
        import pipelines.convert, pipelines.gallery, pipelines.grid, pipelines.inspect_model
        import pipelines.new, pipelines.sample, pipelines.train_diffusion, pipelines.verify
        """)
        == ""
    )
