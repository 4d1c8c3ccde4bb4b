"""docs/vlm_classes.md: which of transformers' image-text-to-text classes train here, as tried on tiny models.

`python -m tests.documented.vlm_classes` writes it; the slow tests compare.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

from dora_mm.adapting.networks import adapt
from dora_mm.config.adapter import VLAdapterConfig
from dora_mm.config.models import VLMModelConfig
from dora_mm.core.targets import match_modules
from dora_mm.data.vl.example import Example
from dora_mm.models.vlm.family import VLM
from dora_mm.targets import map_of
from tests.models.vlm import tiny
from tests.models.vlm.vlm_rows import write_pictures

PAGE = Path(__file__).parents[2] / "docs" / "vlm_classes.md"
ALIASES = {"shieldgemma2": "gemma3", "glmga": "glm46v"}  # types of config that one class serves
REASONS = {
    "evolla": "reads proteins, not images",
    "pi0": "writes the movements of a robot, not text",
    "udop": "needs the words of a page and their boxes",
    "mistral4": "is a language model, without a tower",
    "instructblipvideo": "reads videos, which are refused here",
    "vision-encoder-decoder": "has no processor of its own, and reads no text",
    "pix2struct": "reads the question as a header drawn into the image; its text is the answer alone",
    "pp_formulanet": "reads images alone, without text",
    "diffusion_gemma": "fills in blocks of text by diffusion, not word by word",
}
EXAMPLES = (
    Example("1", ("wide.png",), "What colour is it?", ("red",), (1.0,)),
    Example("2", ("tall.png",), "Is there a dog in the picture?", ("no",), (1.0,)),
)
HEAD = """# Which classes train

Of the {total} types of model that transformers {version} has for images and text in and text out, {count} train
here. This table is written by `python -m tests.documented.vlm_classes` from tiny models of random weights with their
real processors: a fresh adapter of all parts changes no bit, rows of a batch have the loss that they have alone, and
the parts that are named learn. The others have a reason; "not tried" means that there is no such tiny model yet,
and gives what the [derived map](targets.md#derived-maps) takes of a model of the sizes that its config has by default.

| type | class | trains | parts, or why not |
|---|---|---|---|
"""


def page() -> str:
    """The text of the page; it takes a minute or two."""
    with tempfile.TemporaryDirectory() as folder:
        trained = dict(_trained(Path(folder)))
    trained |= {alias: trained[name] for alias, name in ALIASES.items()}
    rows = [
        f"| `{kind}` | `{name}` | {'yes' if kind in trained else 'no'} | {trained.get(kind) or why_not(kind, name)} |"
        for kind, name in CLASSES.items()
    ]
    found = {"total": len(CLASSES), "version": transformers.__version__}
    return HEAD.format(count=len(set(CLASSES) & set(trained)), **found) + "\n".join(rows) + "\n"


def _trained(folder: Path) -> Iterator[tuple[str, str]]:
    """The type of each tiny model that trains, and its parts."""
    pictures = folder / "pictures"
    pictures.mkdir()
    write_pictures(pictures)
    for name in tiny.BUILDERS:
        vlm = VLM(VLMModelConfig(path=str(tiny.build(name, folder / name))))
        yield vlm.model_config.model_type, ", ".join(f"`{part}`" for part in check(vlm, str(pictures)))


def check(vlm: VLM, pictures: str) -> list[str]:
    """Takes two steps of a model with adapters in all parts, and returns the parts, all of which have learned."""
    batch = vlm.batch("vqa", EXAMPLES, pictures, [("red", 1.0), ("no", 1.0)])
    before = losses(vlm, batch)
    alone = [losses(vlm, vlm.batch("vqa", [e], pictures, [(e.answers[0], 1.0)])) for e in EXAMPLES]
    torch.testing.assert_close(torch.cat(alone), before, rtol=1e-4, atol=1e-4)
    parts = list(vlm.target_maps["model"].parts)
    config = VLAdapterConfig.model_validate({"rank": 2, "parts": parts})
    trained = adapt(vlm.networks, vlm.target_maps, config, seed=0, backend="torch")
    assert torch.equal(losses(vlm, batch), before)
    for _ in range(2):
        vlm.loss(batch, torch.Generator()).backward()
    paths = {name.removeprefix("model.").rpartition(".")[0] for name, p in trained.parameters.items() if _learns(p)}
    learned = {module.part for module in trained.reports["model"].modules if module.path in paths}
    return [part for part in parts if part in learned]


def _learns(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


@torch.no_grad()
def losses(vlm: VLM, batch) -> torch.Tensor:
    return torch.cat([vlm.network.row_losses(inputs, labels)[0] for inputs, labels, _ in batch.groups])


def why_not(kind: str, name: str) -> str:
    """Why a class does not train, or that it was not tried."""
    if kind in REASONS:
        return REASONS[kind]
    try:
        with torch.device("meta"):
            model = getattr(transformers, name)(transformers.CONFIG_MAPPING[kind]())
        targets = map_of(model)
    except Exception as error:  # configs fail in any way
        return f"not tried; no model of its default config: {type(error).__name__}"
    taken = match_modules(model, targets)
    return f"not tried; {len(taken):,} modules in {', '.join(f'`{part}`' for part in targets.parts)}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
