"""The recipes: scripts in a separate folder, loaded by file path.

A recipe is never imported by a module name such as `pipelines.train_diffusion`, so a folder named `pipelines` in the
user's current directory, or an installed package of that name, cannot shadow it.
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
    """A folder of recipes, with the schemas of their configs.

    Attributes:
        folder: Holds `<name>.py` for every recipe, each with a function `main(config, *, resume=None)`.
        schemas: The config schema of each recipe that a config's `pipeline` key can name.
        package: The package that the loaded modules belong to, as in `dora_mm.pipelines.train_diffusion`.
    """

    folder: Path
    schemas: Mapping[str, type[PipelineConfig]]
    package: str

    def load(self, name: str) -> ModuleType:
        """Loads the recipe `name`, or returns its module if it is already loaded.

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
    """The folder `pipelines/`: inside the package in the wheel, next to the package in a checkout."""
    inside = PACKAGE / "pipelines"
    return inside if inside.is_dir() else PACKAGE.parent / "pipelines"


PIPELINES = Recipes(_pipelines_folder(), SCHEMAS, "dora_mm.pipelines")
