"""Where a training starts: adapters that it cannot go on with."""

import peft
import pytest

from dora_mm.adapting.initial import load_initial_folder
from dora_mm.adapting.networks import TrainedNetworks
from dora_mm.config.adapter import VLAdapterConfig
from tests.shared.vl.small_vl_bart import small_vl_bart


def test_a_weight_that_was_trained_apart_from_what_the_model_ties_to_it_is_refused(tmp_path):
    model = small_vl_bart()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["shared"])
    peft.get_peft_model(small_vl_bart(), config).save_pretrained(tmp_path)
    adapter = VLAdapterConfig.model_validate({"rank": 2, "init_from": str(tmp_path)})
    with pytest.raises(ValueError, match=r"shared\.weight apart from what this model ties to it, .* dora-mm merge"):
        load_initial_folder(TrainedNetworks({"model": model}, extra={"model": []}), adapter, {})
