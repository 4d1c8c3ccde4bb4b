"""Tiny models with random weights, in the places of models that documents name and that are not here."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

from safetensors.torch import save_file

from dora_mm.config import load_config
from dora_mm.config.models import VisionConfig
from dora_mm.config.vl import TrainVLConfig
from dora_mm.models.vl.towers import building as towers
from tests.shared.images import tiny_flux2_klein as klein
from tests.shared.images import tiny_krea2 as krea2
from tests.shared.images import tiny_qwen_image as qwen_image
from tests.shared.images import tiny_qwen_image_21 as qwen_image_21
from tests.shared.images import tiny_qwen_image_edit as qwen_image_edit
from tests.shared.images import tiny_sd3 as sd3
from tests.shared.images import tiny_z_image as z_image
from tests.shared.local_server import started
from tests.shared.vl import tiny_vlm as tiny
from tests.shared.vl.language_models import SHARES
from tests.shared.vl.recipe_models import MODELS
from tests.shared.vl.small_vl_bart import small_bart, small_tokenizer

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def build(name: str, folder: Path, tiny_sdxl: Path, tiny_vlm: Callable[[str], Path]) -> bool:
    """Puts a tiny model into the place of another one.

    Args:
        name: The hub name or path that a document uses.
        folder: Where the model belongs.
        tiny_sdxl: A folder with a tiny SDXL.
        tiny_vlm: Gives the folders of tiny vision-language models by class.

    Returns:
        Whether there is one of this name.
    """
    classes = vlm_classes()
    if name in classes:
        shutil.copytree(tiny_vlm(classes[name]), folder)
    elif name == SDXL:
        shutil.copytree(tiny_sdxl, folder)
    elif name == "madebyollin/sdxl-vae-fp16-fix":
        shutil.copytree(tiny_sdxl / "vae", folder)
    elif name == "Tongyi-MAI/Z-Image":
        z_image.build(folder)
    elif name == "black-forest-labs/FLUX.2-klein-base-4B":
        klein.build(folder)
    elif name == "black-forest-labs/FLUX.2-klein-4B":
        klein.build(folder, is_distilled=True)
    elif name == "Qwen/Qwen-Image":
        qwen_image.build(folder)
    elif name == "Qwen/Qwen-Image-Edit-2511":
        qwen_image_edit.build(folder, zero_cond_t=True)
    elif name == "Qwen/Qwen-Image-2.1":
        qwen_image_21.build(folder)
    elif name == "krea/Krea-2-Raw":
        krea2.build(folder)
    elif name == "krea/Krea-2-Turbo":
        krea2.build(folder, is_distilled=True)
    elif name == "stabilityai/stable-diffusion-3.5-medium":
        sd3.build(folder)
    elif name == "facebook/bart-base":
        tokenizer = small_tokenizer()
        small_bart(len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    else:
        return False
    return True


def tower_weights(name: str) -> Path:
    """A file in the current directory with random weights of a tower of open_clip; it is made once."""
    file = Path("build") / f"{name}.safetensors"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        save_file(towers.build(VisionConfig(tower=name, pretrained=None)).network.state_dict(), file)
    return file


def vlm_classes() -> dict[str, str]:
    """The name of a tiny model (tests/shared/vl/tiny_vlm.py) for each model that a recipe for questions trains."""
    found = {"build/tiny-vlm": "fast_vlm", "build/smollm2": "llama"}
    recipes = {f"configs/vlm/{recipe}.yaml": kind for recipe, kind in MODELS.items()}
    recipes |= {f"configs/llm/{recipe}.yaml": "llama" for recipe in SHARES}
    for recipe, kind in recipes.items():
        config = load_config(recipe)
        assert isinstance(config, TrainVLConfig)
        found[config.model.path] = kind
    assert set(found.values()) <= set(tiny.BUILDERS)
    return found


@cache
def server() -> str:
    """The address of a server of OpenAI's protocol."""
    return f"http://127.0.0.1:{started().server_port}/v1"
