"""The config schema of every pipeline, by the name that a config's `pipeline` key gives."""

from collections.abc import Iterator, Mapping
from importlib import import_module

from dora_mm.config.schema import PipelineConfig


class _Schemas(Mapping[str, type[PipelineConfig]]):
    """Schemas that are imported on first use: commands without a config start without pydantic's work."""

    def __init__(self, **import_paths: str):
        self._import_paths = import_paths

    def __getitem__(self, name: str) -> type[PipelineConfig]:
        module, _, schema = self._import_paths[name].partition(":")
        return getattr(import_module(f"dora_mm.{module}"), schema)

    def __iter__(self) -> Iterator[str]:
        return iter(self._import_paths)

    def __len__(self) -> int:
        return len(self._import_paths)


SCHEMAS: Mapping[str, type[PipelineConfig]] = _Schemas(
    train_diffusion="config.images:TrainDiffusionConfig",
    train_slider="config.slider:TrainSliderConfig",
    sample="config.generation:BatchGenerationConfig",
    grid="config.generation:GridConfig",
    eval_diffusion="config.generation:EvalDiffusionConfig",
    eval_edit="config.generation:EvalEditConfig",
    eval_style="config.generation:EvalStyleConfig",
    eval_slider="config.slider:EvalSliderConfig",
    extract_features="config.vl:ExtractFeaturesConfig",
    train_vl="config.vl:TrainVLConfig",
    eval_vl="config.vl:EvalVLConfig",
    eval_server="config.served:EvalServerConfig",
    compare="studies.config:CompareConfig",
    tune="studies.config:TuneConfig",
)
