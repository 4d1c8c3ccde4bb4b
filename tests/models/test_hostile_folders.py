"""What a model's folder asks for beside itself: kernels, code, other models, places. None is fetched or run."""

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2  # what huggingface_hub 2 asks with
import huggingface_hub
import pytest
import transformers
from huggingface_hub import constants
from transformers import modeling_utils
from transformers.integrations import hub_kernels

from dora_mm.config.models import ModelConfig, VLMModelConfig
from dora_mm.formats.files import model_class
from dora_mm.formats.files.model_folder import ModelFolder
from dora_mm.models import opening as opening_file
from dora_mm.models.folders import empty_model, load_weights
from dora_mm.models.images.components import class_of
from dora_mm.models.images.families import load_image_model
from dora_mm.models.opening import opening
from dora_mm.models.vl.vlm.loading import load_processor, load_tokenizer, load_vlm
from dora_mm.utils import guards

KERNEL = "somebody/kernel"
NOTHING = httpx2.Response(404, headers={"X-Error-Code": "RepoNotFound"})
CODE = "raise SystemExit('code of the folder ran')\n"


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """The kernels that are fetched, by a package `kernels` that stands in for the real one."""
    names: list[str] = []

    def get_kernel(name: str, **_: Any) -> Any:
        names.append(name)
        return SimpleNamespace(flash_attn_varlen_func=lambda *_, **__: None)

    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=get_kernel))
    monkeypatch.setattr(hub_kernels, "get_kernel_hub", get_kernel, raising=False)
    for module in (hub_kernels, modeling_utils):
        monkeypatch.setattr(module, "is_kernels_available", lambda *_: True)
    monkeypatch.setattr(guards, "_kernels", set())
    return names


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The paths that are asked of the hub, which answers that there is nothing."""
    paths: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        paths.append(request.url.path)
        return NOTHING

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(opening_file, "check_hub", lambda *_, **__: None)
    huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(answer)))
    yield paths
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


@pytest.fixture
def folder(tiny_vlm, tmp_path) -> Path:
    return shutil.copytree(tiny_vlm("llava"), tmp_path / "model")


def edit(file: Path, change: Callable[[dict], Any]) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    change(content)
    file.write_text(json.dumps(content))


def load(folder: Path, **settings: Any) -> Any:
    import torch

    return load_vlm(VLMModelConfig(path=str(folder), dtype="float32", **settings), torch.device("cpu"))


HOSTILE: dict[str, Callable[[dict], Any]] = {
    "_attn_implementation": lambda config: config.update(_attn_implementation=KERNEL),
    "attn_implementation": lambda config: config.update(attn_implementation=KERNEL),
    "by part": lambda config: config.update(attn_implementation={"text_config": KERNEL, "vision_config": KERNEL}),
    "of a part": lambda config: config["text_config"].update(_attn_implementation=KERNEL),
    "of another part": lambda config: config["vision_config"].update(attn_implementation=f"{KERNEL}:function"),
    "by another name": lambda config: config.update(
        attribute_map={"colour": "_attn_implementation_internal"}, colour=KERNEL
    ),
    "internal": lambda config: config["text_config"].update(_attn_implementation_internal=KERNEL),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_config_fetches_no_kernel(folder, fetched, name):
    edit(folder / "config.json", HOSTILE[name])
    edit(folder / "generation_config.json", HOSTILE["attn_implementation"])
    model = load(folder)
    assert not model.use_kernels  # which transformers 5.25 switches on for every model, where the package is there
    assert model.config._attn_implementation == model.config.text_config._attn_implementation == "sdpa"
    empty_model(str(folder))
    model_class.empty_model(ModelFolder(folder))
    assert fetched == []


def test_the_key_of_the_run_counts_alone(folder, fetched):
    edit(folder / "config.json", HOSTILE["attn_implementation"])
    assert load(folder, attn_implementation="eager").config._attn_implementation == "eager"
    assert fetched == []
    load(folder, attn_implementation="another/kernel@main")
    assert set(fetched) == {"another/kernel"}


def test_a_kernel_that_the_run_names_is_fetched(fetched):
    guards.allow_kernels("another/kernel@main:function")
    with guards.guarded(""):
        hub_kernels.get_kernel("another/kernel")
        with pytest.raises(FileNotFoundError, match=f"the model asks for the kernel {KERNEL}, native code"):
            hub_kernels.get_kernel(KERNEL)
        with pytest.raises(FileNotFoundError):
            hub_kernels.get_kernel("kernels-community/flash-attn2")
        guards.allow_kernels("flash_attention_2")  # which transformers takes from there, where the package is missing
        hub_kernels.get_kernel("kernels-community/flash-attn2")
    assert fetched == ["another/kernel", "kernels-community/flash-attn2"]


def test_a_component_of_an_image_model_fetches_no_kernel(tiny_folder, tmp_path, fetched):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        edit(folder / name / "config.json", HOSTILE["attn_implementation"])
        edit(folder / name / "config.json", HOSTILE["_attn_implementation"])
    for empty in (False, True):
        assert load_image_model(ModelConfig(path=str(folder)), empty=empty).networks
    assert fetched == []


@pytest.mark.slow
def test_a_config_fetches_no_kernel_of_an_installed_package(folder, tmp_path):
    """In a process of its own, with a package of this name on the path."""
    package = tmp_path / "packages" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        textwrap.dedent(f"""
        from types import SimpleNamespace
        __version__ = "{transformers.utils.import_utils.KERNELS_MIN_VERSION}"
        def get_kernel(name, **_):
            raise SystemExit(f"fetched {{name}}")
        def use_kernel_forward_from_hub(name):
            return lambda kind: kind
        def use_kernelized_func(*names):
            return lambda kind: kind
        def __getattr__(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return SimpleNamespace()
        """)
    )
    (package / "layer").mkdir()
    (package / "layer" / "__init__.py").write_text("")
    (package / "layer" / "mode.py").write_text("Mode = object\n")
    edit(folder / "config.json", HOSTILE["_attn_implementation"])
    edit(folder / "config.json", HOSTILE["of a part"])
    lines = (
        "import torch, sys; from transformers.utils import is_kernels_available; assert is_kernels_available()",
        "from dora_mm.config.models import VLMModelConfig; from dora_mm.models.vl.vlm.loading import load_vlm",
        f"load_vlm(VLMModelConfig(path={str(folder)!r}, dtype='float32'), torch.device('cpu')); print('loaded')",
    )
    environment = {"PYTHONPATH": f"{package.parent}:{Path(guards.__file__).parents[2]}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "loaded", done.stderr[-500:]


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["tokenizer_config.json", "processor_config.json", "preprocessor_config.json"])
def test_an_auto_map_runs_no_code(folder, file, asked):
    classes: dict[str, Any] = dict.fromkeys(("AutoConfig", "AutoProcessor", "AutoImageProcessor"), "own.Own")
    classes["AutoTokenizer"] = ["own.Own", "own.Own"]
    (folder / "own.py").write_text(CODE)
    edit(folder / file, lambda config: config.update(auto_map=classes, processor_class="Own", tokenizer_class="Own"))
    for one in (lambda: load_processor(VLMModelConfig(path=str(folder))), lambda: load_tokenizer(str(folder), None)):
        with suppress(ValueError):  # some are refused, others loaded without it
            one()
    assert asked == []
    assert "own" not in sys.modules


def test_an_auto_map_of_a_model_and_its_own_generation_run_no_code(folder, asked):
    (folder / "custom_generate").mkdir()
    for file in ("own.py", "custom_generate/generate.py"):
        (folder / file).write_text(CODE)
    edit(folder / "config.json", lambda config: config.update(auto_map={"AutoModel": "own.Own", "AutoConfig": "own.O"}))
    edit(folder / "generation_config.json", lambda config: config.update(custom_generate=str(folder)))
    assert load(folder).can_generate()
    assert asked == []


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("library", ["own", "antigravity", "os"])
def test_a_library_that_an_index_names_is_not_imported(tiny_folder, tmp_path, monkeypatch, component, library):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    for place in (folder / component, tmp_path):
        (place / "own.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    edit(folder / "model_index.json", lambda index: index.update({component: [library, "system"]}))
    for empty in (False, True):
        with pytest.raises(ValueError, match=r"^model.path: "):
            _ = load_image_model(ModelConfig(path=str(folder)), empty=empty).networks
    with pytest.raises(ValueError, match=f"names {library}.system as its {component}, which is no network of"):
        class_of(ModelFolder(folder), component)
    assert not {"own", "antigravity"} & sys.modules.keys()


def test_a_class_that_an_index_names_as_code_is_not_run(tiny_folder, tmp_path, asked):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "own.py").write_text(CODE)
    edit(folder / "model_index.json", lambda index: index.update(_class_name=["own", "Own"]))
    with pytest.raises(ValueError, match=r"^model.path: the model_index.json of .* is damaged: it names no class"):
        load_image_model(ModelConfig(path=str(folder)))
    edit(folder / "model_index.json", lambda index: index.update(_class_name="StableDiffusionXLPipeline"))
    edit(folder / "unet" / "config.json", lambda config: config.update(auto_map={"AutoModel": "own.Own"}))
    assert load_image_model(ModelConfig(path=str(folder))).networks
    assert asked == []


def test_a_chat_template_includes_no_file(folder):
    for template in ("{% include 'config.json' %}", "{% import '/etc/passwd' as x %}{{ x }}", "{% extends 'a' %}"):
        (folder / "chat_template.jinja").write_text(template)
        processor = load_processor(VLMModelConfig(path=str(folder)))
        with pytest.raises(Exception, match="no loader for this environment"):
            processor.apply_chat_template([{"role": "user", "content": "?"}])


# --- other models and places ------------------------------------------------------------------------------------------


def audio(config: dict) -> None:
    named = {"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "somebody/model"}
    config.update(audio_tokenizer=named)


def test_a_processor_loads_no_model(folder, asked):
    edit(folder / "processor_config.json", audio)
    with pytest.raises(ValueError, match="the processor's files name a model to load, a DacModel, which is not done"):
        load_processor(VLMModelConfig(path=str(folder)))
    assert asked == []


def test_an_adapter_is_no_model(tmp_path, tiny_vlm, asked):
    folder = tmp_path / "adapter"
    folder.mkdir()
    edit(folder / "adapter_config.json", lambda config: config.update(base_model_name_or_path="somebody/model"))
    config = transformers.AutoConfig.from_pretrained(tiny_vlm("llava"))
    kind = transformers.LlavaForConditionalGeneration
    with pytest.raises(ValueError, match="is an adapter for 'somebody/model', and no model: name the model itself"):
        load_weights(kind, str(folder), config=config)
    assert asked == []


def test_names_of_other_repositories_are_not_asked_for(folder, asked):
    places = {"repo_path": "somebody/data", "class_info_file": "x.json", "_name_or_path": "somebody/model"}
    edit(folder / "config.json", lambda config: config.update(places, tokenizer_class="Own"))
    edit(folder / "tokenizer_config.json", lambda config: config.update(name_or_path="somebody/model"))
    load(folder)
    load_processor(VLMModelConfig(path=str(folder)))
    one_former = places | {"image_processor_type": "OneFormerImageProcessor", "num_text": 1}
    for file in ("processor_config.json", "preprocessor_config.json"):
        edit(folder / file, lambda config: config.update(one_former, image_processor=one_former))
    with pytest.raises(ValueError, match="^model.path: the processor of .* name something else of the hub"):
        load_processor(VLMModelConfig(path=str(folder)))
    assert asked == []


def test_of_the_hub_the_model_is_asked_for_and_nothing_else(asked):
    api = huggingface_hub.HfApi()
    refusal = "something else of the hub, which is not asked for: /api/models/one/other"
    with opening("one/model", "it cannot be loaded"):
        assert not api.repo_exists("one/model")
    with pytest.raises(ValueError, match=refusal), opening("one/model", "it cannot be loaded"):
        api.model_info("one/other")
    assert asked == ["/api/models/one/model"]
    with opening("ViT-B-32", "it cannot be loaded"):  # a name that a library knows, of which nobody knows the files
        assert not api.repo_exists("one/other")


def test_a_repository_that_was_renamed_is_asked_for(asked):
    moved = httpx2.Response(307, headers={"location": "/api/models/two/model"})
    huggingface_hub.set_client_factory(
        lambda: httpx2.Client(
            transport=httpx2.MockTransport(lambda it: moved if "/one/" in it.url.path else NOTHING),
            follow_redirects=True,
        )
    )
    with opening("one/model", "it cannot be loaded"):
        assert not huggingface_hub.HfApi().repo_exists("one/model")


# --- tokenizers -------------------------------------------------------------------------------------------------------


def split_by(pattern: str) -> Callable[[dict], Any]:
    pieces = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda tokenizer: tokenizer.update(pre_tokenizer=pieces)


def damaged_map(tokenizer: dict) -> None:
    tokenizer.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})


def test_a_tokenizer_that_panics_is_one_sentence(folder):
    """A panic of Rust is no Exception for Python."""
    edit(folder / "tokenizer.json", split_by("(a+)+$"))
    processor = load_processor(VLMModelConfig(path=str(folder)))
    with pytest.raises(ValueError, match=r"^the tokenizer.json of .* cannot read a text: Onig: .*retry-limit"):
        processor.tokenizer("a" * 30 + "b")
    with pytest.raises(ValueError, match=r"^the tokenizer.json of .* cannot read a text"):
        processor(text=["a" * 30 + "b"])
    edit(folder / "tokenizer.json", damaged_map)
    with pytest.raises(ValueError, match=r"^model.path: the processor of .* cannot be loaded: Precompiled"):
        load_processor(VLMModelConfig(path=str(folder)))
    with pytest.raises(ValueError, match=r"has no tokenizer: Precompiled"):
        load_tokenizer(str(folder), None)


@pytest.mark.parametrize("lengths", [(6, 77), (77, 6), (1, 1), (0, 0), (-5, -5), (10**30, 10**30)])
def test_the_tokenizers_of_an_image_model_have_one_length_of_a_chunk(tiny_folder, tmp_path, lengths):
    """Other lengths ended in an error of zip, or, without room for a token, never."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    for name, length in zip(("tokenizer", "tokenizer_2"), lengths, strict=True):
        edit(
            folder / name / "tokenizer_config.json",
            lambda config, length=length: config.update(model_max_length=length),
        )
    with pytest.raises(
        ValueError, match=r"^model.path: the tokenizers of .* have a model_max_length of .* SDXL has 77"
    ):
        load_image_model(ModelConfig(path=str(folder))).encode_prompts(["a red house beside a tree, and more"])
