"""docs/vlm_classes.md: which of transformers' classes for images and text train here, as tried on tiny models.

`python -m tests.documented.vlm_classes` writes it; a slow test compares each row.
"""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES as PROCESSORS

from dora_mm.config.models import VLMModelConfig
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.models.vl.vlm.image_limits import limits_of
from dora_mm.models.vl.vlm.saved_limits import write_limits
from tests.shared.data.video_rows import reads_videos, write_visuals
from tests.shared.vl import tiny_vlm as tiny
from tests.shared.vl.equalities import EXAMPLES, batch_of, learned_parts, losses, opened
from tests.shared.vl.rarest_models import UNTRAINED

PAGE = Path(__file__).parents[2] / "docs" / "vlm_classes.md"
BLIP_VQA = "blip (questions)"  # the type of another class, too
ALIASES = {"shieldgemma2": "gemma3", "glmga": "glm46v", "pp_chart2table": "got_ocr2"}  # types that one class serves
BUILT_AS = {"blip": "blip_caption", "blip-2": "blip2", "minicpmv4_6": "minicpm_v", BLIP_VQA: "blip_vqa"} | {
    kind: f"whole_{kind.removesuffix('_moe')}" for kind in ("qwen2_5_omni", "qwen3_omni_moe")
}


def classes() -> dict[str, str]:
    """The classes that read images and text and write text, by type: what transformers lists as such, and the others.

    The others are those of its multimodal language models that read images, most of which hear alone, and the one of
    two classes of BLIP that answers questions.
    """
    others = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.items() - MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
    seeing = {kind: name for kind, name in others if sees(transformers.CONFIG_MAPPING[kind])}
    asked = {BLIP_VQA: MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES["blip"]}
    return dict(sorted((dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) | seeing | asked).items()))


def sees(config: Any) -> bool:
    """Whether a class of configs has one of a tower for images in it."""
    inner = getattr(config, "sub_configs", {})
    return "vision_config" in inner or any(map(sees, inner.values()))


def inputs_of(kind: str) -> list[str]:
    return list(inspect.signature(getattr(transformers, CLASSES[kind]).forward).parameters)


def processor_of(kind: str) -> list[str]:
    return list(getattr(transformers, PROCESSORS[kind]).get_attributes())


def generates(kind: str) -> bool:
    return issubclass(getattr(transformers, CLASSES[kind]), transformers.GenerationMixin)


CLASSES = classes()
Reason = tuple[str, Callable[[str], bool]]
REASONS: dict[str, Reason] = {  # of types that no tiny model can show, each with what shows it
    "evolla": ("reads proteins, not images", lambda kind: "protein_tokenizer" in processor_of(kind)),
    "pi0": ("writes the movements of a robot, not text", lambda kind: not generates(kind)),
    "pi05": ("writes the movements of a robot, not text", lambda kind: not generates(kind)),
    "udop": ("needs the words of a page and their boxes", lambda kind: "bbox" in inputs_of(kind)),
    "mistral4": ("is a language model, without a tower", lambda kind: "pixel_values" not in inputs_of(kind)),
    "instructblipvideo": (
        "reads videos, not images",
        lambda kind: "image_processor" not in processor_of(kind),
    ),
    "vision-encoder-decoder": (
        "has no processor of its own, and reads no text",
        lambda kind: kind not in PROCESSORS and "input_ids" not in inputs_of(kind),
    ),
    "pix2struct": (
        "reads the question as a header drawn into the image; its text is the answer alone",
        lambda kind: "input_ids" not in inputs_of(kind),
    ),
    "pp_formulanet": (
        "reads images alone, without text",
        lambda kind: "text" not in required(getattr(transformers, PROCESSORS[kind]).__call__),
    ),
    "diffusion_gemma": ("fills in blocks of text by diffusion, not word by word", lambda kind: not generates(kind)),
}
REFUSED = {  # of types whose tiny model is refused, each with the message
    "got_ocr2": ("its processor takes images alone, and asks for their text itself", "Nested images are only support"),
    "fuyu": ("its processor loses a token of each image", "Mismatch in `image` token count"),
    "idefics": ("has no chat template; reads lists of texts and images", "has no chat template"),
    "kosmos-2.5": ("has no chat template; reads the text of a page, or its Markdown", "has no chat template"),
}
TRAINED = [kind for kind in CLASSES if kind not in (*ALIASES, *REASONS, *UNTRAINED)]
CLOCK = re.compile(r"\b(datetime|date|time)\b")
NOW = ("now", "utcnow", "today", "time", "time_ns")
GIVEN = {"strftime": 2, "localtime": 1, "gmtime": 1, "ctime": 1}  # the arguments with which these read no clock
LIMITS = {"image_size": 64, "min_pixels": 784, "max_pixels": 14_000, "max_tiles": 1}  # for the tiny models
HEAD = """# Which classes train

Of the {total} kinds of model that transformers {version} has for images and text in and text out, {count} train
here. Find yours by its `model_type`, which stands in the `config.json` of the model.

- **parts**: the names for `adapter.parts`.
- **videos**: yes for {videos} of them, which read [videos](vlm_data.md#images-and-videos).
- **limits of images**: the keys of `model` that make images smaller: `max_pixels`, `image_size` (the longer side) or
  `max_tiles`. Other keys are refused when the model is loaded.

How the table was made: `python -m tests.documented.vlm_classes` writes it from tiny models of random weights with their
real processors. For each class that trains, with adapters in all parts, tests show that

- a fresh adapter changes no bit;
- loss and gradients are those of autograd through the textbook formula;
- rows of a batch have the losses, gradients and answers that they have alone, rows with videos too;
- the merged model computes what the adapter does, and so does PEFT where it can load the adapter
  ([what it cannot](file_layouts.md#peft) is written in the native form);
- the parts that are named have gradients, and each limit of images works.

The list of transformers itself, image-text-to-text, lacks four of these kinds: Phi-4-multimodal, the Omni models, whose
thinkers train, and BLIP for questions.

Losses are computed from the hidden states of the tokens with loss alone, in chunks. These classes scale, cap, mask or
widen their logits, so they compute all logits of these tokens at once, which takes more [memory](vlm.md#memory):
`aya_vision`, `chameleon`, `cohere_compass`, `gemma3n`, `granite4_vision`, `granite_docling`, `hyperclovax_vision_v2`,
`inkling2`, `inkling2_loop`, `inkling_mm_model`, `mistral_large4`, `muse_glimmer`, `muse_spark`, `nemotron_h_omni`,
`paligemma`, and all whose config sets `final_logit_softcapping`.

No processor or tokenizer of transformers reads a clock in its own Python: the sources of all were searched. Chat
templates that ask for the day get [that of the run](vlm_data.md#the-day).

| type | class | trains | parts, or why not | videos | limits of images |
|---|---|---|---|---|---|
"""


def clock_readers() -> list[str]:
    """The calls in transformers' processors and tokenizers that read a clock."""
    folder = Path(transformers.__file__).parent
    kinds = ("processing", "tokenization", "image_processing", "video_processing", "feature_extraction")
    files = [file for kind in kinds for file in (*folder.glob(f"{kind}*.py"), *folder.glob(f"models/*/{kind}*.py"))]
    return [call for file in files for call in clock_calls(file)]


def clock_calls(file: Path) -> list[str]:
    """The calls in a Python file that read a clock; strftime, localtime and gmtime do so where they get no time."""
    text = file.read_text(encoding="utf-8")
    if not CLOCK.search(text):
        return []
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            reads = name in NOW or len(node.args) < GIVEN.get(name, 0)
            if reads and CLOCK.search(ast.unparse(node.func)):
                found.append(f"{file.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def required(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def page() -> str:
    """The text of the page; it takes some two minutes."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [row_of(kind, Path(folder)) for kind in CLASSES]
    count = sum("| yes |" in row for row in rows)
    videos = sum(map(takes_videos, rows))
    numbers = {"total": len(CLASSES), "version": transformers.__version__, "count": count, "videos": videos}
    return HEAD.format(**numbers) + "\n".join(rows) + "\n"


def takes_videos(row: str) -> bool:
    """Whether a row of the table has a yes under "videos"."""
    return re.search(r"\| yes \| [^|]* \|$", row) is not None


def row_of(kind: str, folder: Path) -> str:
    """The row of a type, after its tiny model has shown what is in it.

    Args:
        kind: A key of CLASSES.
        folder: For the tiny model, its adapter and images.
    """
    own = ALIASES.get(kind, kind)
    if own in REASONS:
        text, shown = REASONS[own]
        assert shown(own), f"{own} {text}, it is said, and that is not so"
    else:
        text = refusal(own, folder) if own in UNTRAINED else listed(tried(own, folder))
    trains = "no" if own in REASONS or own in UNTRAINED else "yes"
    limits = listed(limits_by(own, folder)) if trains == "yes" else ""
    videos = "yes" if trains == "yes" and reads_videos(built(named(own), folder), images_in(folder)) else ""
    return f"| `{kind}` | `{CLASSES[kind]}` | {trains} | {text} | {videos} | {limits} |"


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def limits_by(kind: str, folder: Path) -> list[str]:
    """The keys of the `model` section that limit the images of a type, after a row was read with each."""
    base, found = built(named(kind), folder), []
    vlm = opened(base)
    for key in limits_of(vlm.rows.processor, vlm.model_config):
        limited = VLM(VLMModelConfig.model_validate({"path": str(base), key: LIMITS[key]}))
        assert losses(limited, batch_of(limited, images_in(folder), EXAMPLES[:1])).isfinite().all(), key
        copy = shutil.copytree(base, folder / "limited" / base.name, dirs_exist_ok=True)
        assert write_limits(copy, limited.config), key
        found.append(key)
    return found


def images_in(folder: Path) -> Path:
    images = folder / "pictures"
    if not images.exists():
        images.mkdir()
        write_visuals(images)
    return images


def named(kind: str) -> str:
    """The name of the tiny model of a type."""
    return BUILT_AS.get(kind, kind)


def built(name: str, folder: Path) -> Path:
    base = folder / name
    return base if base.exists() else tiny.build(name, base)


def tried(kind: str, folder: Path) -> list[str]:
    """The parts of a type's tiny model that have gradients, after all its equalities were checked."""
    with tempfile.TemporaryDirectory() as scratch:
        return learned_parts(built(named(kind), folder), images_in(folder), Path(scratch))


def refusal(kind: str, folder: Path) -> str:
    """Why a type's tiny model does not train, after its row was refused."""
    text, message = REFUSED[kind]
    with pytest.raises(ValueError, match=re.escape(message)):
        batch_of(opened(built(kind, folder)), images_in(folder), EXAMPLES)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
