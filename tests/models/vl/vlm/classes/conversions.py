"""What PEFT takes of adapters of vision-language models that were converted for it or extracted."""

import warnings
from pathlib import Path

import torch
from peft import PeftModel

import dora_mm
from dora_mm.adapting.networks import adapt
from dora_mm.config.adapter import VLAdapterConfig
from dora_mm.core import adapted_layers
from dora_mm.formats.commands.convert import convert
from dora_mm.formats.commands.extract import extract
from dora_mm.models.vl.vlm.family import VLM
from tests.shared.reference import randomize
from tests.shared.vl.equalities import CLOSE, EXAMPLES, EXPERTS, batch_of, losses, opened

WAYS = ("peft", "lora", "extract")  # the targets of `convert` that PEFT reads, and `extract`


def adapted(base: Path) -> VLM:
    """A tiny model with random adapters in all its parts but routed experts, of which PEFT has no DoRA."""
    vlm = opened(base)
    parts = [part for part in vlm.target_maps["model"].parts if part not in EXPERTS]
    config = VLAdapterConfig.model_validate({"rank": 2, "parts": parts})
    adapt(vlm.networks, vlm.target_maps, config, seed=0, backend="torch")
    for seed, layer in enumerate(adapted_layers(vlm.model).values()):
        randomize(layer, seed=seed)
    return vlm


def conversions(base: Path, images: Path, scratch: Path) -> tuple[int, dict[str, int | str]]:
    """Writes the adapter of a class for PEFT in each of WAYS, and loads what was written in PEFT.

    Args:
        base: The folder of a tiny model.
        images: The folder of the pictures of EXAMPLES.
        scratch: An empty folder.

    Returns:
        The number of adapted modules; and by way the number that PEFT takes, after it was seen to compute with them
        what our model does, or why nothing was written.
    """
    vlm = adapted(base)
    count, batch = len(adapted_layers(vlm.model)), batch_of(vlm, images, EXAMPLES)
    expected = losses(vlm, batch)
    dora_mm.save_adapter(vlm.networks, scratch / "native", format="native")
    dora_mm.merge(vlm.model, keep_base=False)
    dora_mm.remove(vlm.model)
    vlm.model.save_pretrained(scratch / "tuned")
    theirs, found = opened(base), {}
    model = theirs.model
    for way in WAYS:
        try:
            write(way, base, scratch)
        except ValueError as error:
            found[way] = str(error)
            continue
        model = in_peft(model, scratch / way, way)
        found[way] = sum(name.endswith(f".lora_A.{way}.weight") for name, _ in model.named_parameters())
        torch.testing.assert_close(losses(theirs, batch), expected, **CLOSE)
    return count, found


def write(way: str, base: Path, scratch: Path) -> None:
    if way == "extract":
        done = extract(scratch / "tuned", base, scratch / way, rank=2)
        assert done.overall < 1e-3
        if done.left_out:
            raise ValueError(f"left out: {', '.join(map(str, done.left_out))}")
    else:  # a LoRA that keeps everything
        convert(scratch / "native", scratch / way, to=way, base=base, **({"energy": 1.0} if way == "lora" else {}))


def in_peft(model, folder: Path, name: str) -> PeftModel:
    """A model, or one that PEFT has already, with the adapter of a folder, which alone is active."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys")  # so PEFT says what it leaves out
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, folder, name)
        model.load_adapter(folder, name)
        model.set_adapter(name)
        return model
