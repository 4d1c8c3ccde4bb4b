"""The recipes: scripts in a folder of their own, loaded by their place.

A recipe is never imported by a bare name such as `pipelines.train_sdxl`, so a folder named `pipelines` in the user's
current directory, or an installed package of that name, cannot take its place.
"""

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from dora_mm.config.pipelines import SCHEMAS
from dora_mm.config.schema import PipelineConfig

PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Recipes:
    """A folder of recipes and what their configs may say.

    Args:
        folder: holds `<name>.py` for every recipe, each with a function `main(config, *, resume=None)`.
        schemas: the config schema of each recipe that a config's `pipeline` key can name.
        package: the package that the loaded modules belong to, as in `dora_mm.pipelines.train_sdxl`.
    """

    folder: Path
    schemas: Mapping[str, type[PipelineConfig]]
    package: str

    def load(self, name: str) -> ModuleType:
        """Loads the recipe `name`, or returns the module that was loaded before.

        Raises:
            ModuleNotFoundError: The folder has no such recipe.
        """
        module_name = f"{self.package}.{name}"
        if module_name in sys.modules:
            return sys.modules[module_name]
        file = self.folder / f"{name}.py"
        spec = importlib.util.spec_from_file_location(module_name, file) if file.is_file() else None
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(f"there is no recipe {file}", name=module_name)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
        return module


def _pipelines_folder() -> Path:
    """`pipelines/`, which the wheel carries inside the package and a checkout beside it."""
    inside = PACKAGE / "pipelines"
    return inside if inside.is_dir() else PACKAGE.parent / "pipelines"


PIPELINES = Recipes(_pipelines_folder(), SCHEMAS, "dora_mm.pipelines")
