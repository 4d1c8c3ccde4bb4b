"""The config schema of every pipeline, by the name that a config's `pipeline` key gives."""

from dora_mm.config import sdxl, vl
from dora_mm.config.schema import PipelineConfig

SCHEMAS: dict[str, type[PipelineConfig]] = {
    "train_sdxl": sdxl.TrainSDXLConfig,
    "sample_sdxl": sdxl.SampleSDXLConfig,
    "grid_sdxl": sdxl.GridSDXLConfig,
    "eval_sdxl": sdxl.EvalSDXLConfig,
    "compare_sdxl": sdxl.CompareSDXLConfig,
    "extract_features": vl.ExtractFeaturesConfig,
    "train_vl": vl.TrainVLConfig,
    "eval_vl": vl.EvalVLConfig,
    "compare_vl": vl.CompareVLConfig,
}
