"""Which adapters are named as those of another base model."""

import logging

from safetensors.torch import save_file

from dora_mm.config.models import ModelConfig
from dora_mm.sampling.model import warn_of_other_bases
from tests.shared import toy


def test_a_converted_file_has_the_name_of_its_base_alone(tiny_folder, tmp_path, caplog):
    source = toy.write_source(tmp_path / "a.safetensors", {toy.UNET[0]: toy.layer(toy.UNET[0])})
    tensors, _ = toy.read_tensors(source)
    for name, warned in ((tiny_folder.name, False), ("other-model", True)):
        save_file(tensors, source, metadata={"base_model": name})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warn_of_other_bases({"a": source}, ModelConfig(path=str(tiny_folder)))
        assert bool(caplog.records) == warned
