"""Configs of other trainers as configs of dora_mm.

The names of keys are in `dora_mm.registries.other_trainers`. Here is what a table of names cannot say: defaults that
differ, keys that become several, and values in other units.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from dora_mm.config.importing import ai_toolkit, kohya, onetrainer, vl_trainers
from dora_mm.config.importing.foreign import Foreign, read_foreign
from dora_mm.config.importing.translation import Translation

TRANSLATORS: Mapping[str, Callable[[Foreign, Translation], None]] = {
    "kohya": kohya.translate,
    "ai-toolkit": ai_toolkit.translate,
    "onetrainer": onetrainer.translate,
    "llama-factory": vl_trainers.translate_llama_factory,
    "ms-swift": vl_trainers.translate_ms_swift,
    "axolotl": vl_trainers.translate_axolotl,
}


def translate(path: Path) -> Translation:
    """The config of another trainer in our words.

    Args:
        path: A config file of the trainer, or a text file with its command line.

    Raises:
        ValueError: The file cannot be read, or is of no known trainer.
    """
    foreign = read_foreign(path)
    translation = Translation(foreign.trainer)
    TRANSLATORS[foreign.trainer](foreign, translation)
    translation.finish(foreign)
    return translation


__all__ = ["TRANSLATORS", "Translation", "translate"]
