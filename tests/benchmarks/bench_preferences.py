"""Which caption of a pair a model finds likelier, before and after the training of configs/vlm/preference_demo.yaml.

    python -m tests.benchmarks.bench_preferences RUN

Prints the share of the 120 held-out pairs whose right caption is the likelier one, of the embedded model alone and with
the run's adapter, and their paired difference, with 95 % intervals over images, of which each has one pair. Of the
accuracy of a validation, too: the share whose right caption gained more than the wrong one.
"""

import sys
from pathlib import Path

import numpy as np

from dora_mm import formats
from dora_mm.adapting.files import load_trained
from dora_mm.config import load_config
from dora_mm.config.vl import TrainVLConfig
from dora_mm.data.vl.splits import open_validation
from dora_mm.eval.statistics import mean_ci, share_ci
from dora_mm.eval.vl.confidence_intervals import points
from dora_mm.models.vl.families import load_vl_model
from dora_mm.tasks.preferences import KeptReference


def main(run: Path) -> None:
    config = load_config(run / "config.yaml")
    assert isinstance(config, TrainVLConfig)
    model = load_vl_model(config.model, config.vision, seed=config.seed, device="cpu")
    splits = open_validation(config.data, config.evaluate, model)

    def margins() -> np.ndarray:
        """Log-probability of the right caption less that of the wrong one, of each pair (N, 1)."""
        found = KeptReference()
        found.compute(model, splits, config.evaluate.batch_size, on_bad_data="stop")
        chosen, rejected = found.state_dict()["log_probabilities"].numpy().T
        return (chosen - rejected)[:, None]

    before = margins()
    load_trained(model, formats.adapter_folder(run), backend=config.backend)
    after = margins()
    share = (before > 0).astype(float), (after > 0).astype(float)
    for name, values in (("before", share[0]), ("after", share[1]), ("gained more", (after > before).astype(float))):
        print(f"{name:<12} {points(share_ci(values))}")
    print(f"{'difference':<12} {points(mean_ci(share[1] - share[0]))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
