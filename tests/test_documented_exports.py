"""Every place of the pages, and of what the program prints, that says which tool reads which target of `convert`.

The tool is asked: `verify` judges an adapter with magnitudes in the form of the target.
"""

from functools import cache

import pytest

from dora_mm.formats.commands.convert import convert
from dora_mm.formats.commands.verify import verify
from dora_mm.formats.naming.known import rows
from dora_mm.formats.tools import tool_of
from dora_mm.registries.tools import EXPORT_FORMATS, TOOLS
from tests.documented.exports import NO_DORA, WHOLE, Claim, claims, tools_in
from tests.documented.texts import DOCS, ROOT, text_of
from tests.shared import toy

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
STATES = {name: toy.layer(name) for name in toy.UNET if "conv" not in name.path}  # which not every form holds
OPTIONS = {"lora": {"rank": 16}}
BOUND = 1e-2  # rounding to half precision is below it, and no tool that misreads a file


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """The error of every tool, by target, from files that are made when they are asked for."""
    folder = tmp_path_factory.mktemp("exports")
    source = toy.write_source(folder / "source.safetensors", STATES)

    @cache
    def of(target: str) -> dict[str, float]:
        out = folder / (target if target == "peft" else f"{target}.safetensors")
        done = convert(source, out, to=target, base=toy.base(), **OPTIONS.get(target, {}))
        return {verdict.tool: verdict.error for verdict in verify(done.files[0], base=toy.base())}

    return of


def reads(tool: str, target: str, errors) -> bool:
    if target == WHOLE or tool == NO_DORA:
        return target in (WHOLE, "lora")
    return errors(target)[tool] < BOUND


def wrong(reserve: Claim, errors) -> list[str]:
    """The tools of a claim that read none of its targets."""
    return [tool for tool in reserve.tools if not any(reads(tool, target, errors) for target in reserve.targets)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_named_tools_read_what_the_page_says(page, errors):
    found = [(reserve.text, wrong(reserve, errors)) for reserve in claims(text_of(page))]
    assert [reserve for reserve in found if reserve[1]] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_export_says_for_which_tool_it_is(page):
    assert [reserve.text for reserve in claims(text_of(page)) if "dora-mm " in reserve.text and not reserve.tools] == []


def test_claims_of_all_kinds_are_found():
    found = {page.name: claims(text_of(page)) for page in PAGES}
    assert {name for name, of_page in found.items() if of_page} >= {
        "README.md",
        "formats.md",
        "sdxl.md",
        "coming_from.md",
    }
    assert sum(len(of_page) for of_page in found.values()) >= 50


WRONG = """
**Can I draw in InvokeAI?**

```
$ dora-mm convert run new.safetensors --to kohya --base model
dora-mm convert run new.safetensors --to comfy --base model   # for ComfyUI and A1111
dora-mm convert run new.safetensors --to diff --base model   # for every web UI
```

| here | there |
|---|---|
| output for Forge | `dora-mm convert RUN OUT --to kohya` |
| `kohya` | LyCORIS and ComfyUI |

| tool | reads (`convert --to`) |
|---|---|
| diffusers | `diffusers`, `kohya`: ran |

Draw in reForge with `--to kohya`. In SD.Next it is `--to kohya`; vLLM takes `--to lora`;
SGLang `--to kohya`.
"""


def test_wrong_ones_are_found(errors):
    found = [(reserve.targets, wrong(reserve, errors)) for reserve in claims(WRONG)]
    assert len(found) == 11
    assert [(targets, tools) for targets, tools in found if tools] == [
        (("kohya",), ["invokeai"]),
        (("comfy",), ["invokeai", "a1111"]),
        (("kohya",), ["forge"]),
        (("kohya",), ["comfy"]),
        (("kohya",), ["diffusers"]),
        (("kohya",), ["comfy"]),
        (("kohya",), [NO_DORA]),
    ]


def test_what_the_program_prints(errors):
    """The help of `convert`, and the target that it names for a program."""
    for target, record in EXPORT_FORMATS.items():
        assert wrong(Claim(record.title, (target,), tools_in(record.title)), errors) == [], target
    of_sdxl = {row.tool for row in rows() if row.architecture in ("sdxl", "*")}  # musubi-tuner has others alone
    named = {tool: record.export_format for tool, record in TOOLS.items() if record.export_format}
    judged = {tool: target for tool, target in named.items() if tool_of(tool).table in ("", *of_sdxl)}
    assert named.keys() - judged.keys() == {"musubi"}
    assert all(reads(tool, target, errors) for tool, target in judged.items())
