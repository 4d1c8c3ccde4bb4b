"""The config schema of every pipeline, by the name that a config's `pipeline` key gives."""

from collections.abc import Iterator, Mapping
from importlib import import_module

from dora_mm.config.schema import PipelineConfig


class _Schemas(Mapping[str, type[PipelineConfig]]):
    """Schemas that are imported when they are asked for: commands without a config start without pydantic's work."""

    def __init__(self, **places: str):
        self._places = places

    def __getitem__(self, name: str) -> type[PipelineConfig]:
        module, _, schema = self._places[name].partition(".")
        return getattr(import_module(f"dora_mm.config.{module}"), schema)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


SCHEMAS: Mapping[str, type[PipelineConfig]] = _Schemas(
    train_diffusion="images.TrainDiffusionConfig",
    sample="pictures.JobConfig",
    grid="pictures.GridConfig",
    eval_diffusion="pictures.EvalDiffusionConfig",
    eval_style="pictures.EvalStyleConfig",
    extract_features="vl.ExtractFeaturesConfig",
    train_vl="vl.TrainVLConfig",
    eval_vl="vl.EvalVLConfig",
    compare="comparing.CompareConfig",
)
