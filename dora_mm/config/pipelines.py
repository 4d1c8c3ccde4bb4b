"""The config schema of every pipeline, by the name that a config's `pipeline` key gives."""

from dora_mm.config import comparing, images, pictures, vl
from dora_mm.config.schema import PipelineConfig

SCHEMAS: dict[str, type[PipelineConfig]] = {
    "train_diffusion": images.TrainDiffusionConfig,
    "sample": pictures.JobConfig,
    "grid": pictures.GridConfig,
    "eval_diffusion": pictures.EvalDiffusionConfig,
    "eval_style": pictures.EvalStyleConfig,
    "extract_features": vl.ExtractFeaturesConfig,
    "train_vl": vl.TrainVLConfig,
    "eval_vl": vl.EvalVLConfig,
    "compare": comparing.CompareConfig,
}
