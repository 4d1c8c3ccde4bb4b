"""The pipelines by the name that a config's first key gives."""

from dora_mm.config import schema, vl
from dora_mm.config.schema import PipelineConfig

SCHEMAS: dict[str, type[PipelineConfig]] = {
    "train_sdxl": schema.TrainSDXLConfig,
    "sample_sdxl": schema.SampleSDXLConfig,
    "pretrain_tiny": schema.PretrainTinyConfig,
    "fit_judge": schema.FitJudgeConfig,
    "eval_sdxl": schema.EvalSDXLConfig,
    "compare_sdxl": schema.CompareSDXLConfig,
    "extract_features": vl.ExtractFeaturesConfig,
    "train_vl_bart": vl.TrainVLBartConfig,
    "eval_vl": vl.EvalVLConfig,
    "compare_vl": vl.CompareVLConfig,
    "pretrain_tiny_vl": vl.PretrainTinyVLConfig,
}
