"""Visual tokens that a tower computes."""

from pathlib import Path

import torch

from dora_mm.config.models import VisionConfig
from dora_mm.models.vl.vl_bart.visual_inputs import VisionEncoder

IMAGES = Path(__file__).parents[4] / "samples" / "vl" / "images"


def test_tokens_of_an_image_do_not_depend_on_its_batch(vision):
    """Or a resumed run, which has not encoded the images of the first steps, would not go on with the same bits."""
    names = sorted(path.name for path in IMAGES.glob("*.jpg"))[:32]
    one_by_one, together = VisionEncoder(VisionConfig(**vision)), VisionEncoder(VisionConfig(**vision))
    alone = torch.cat([one_by_one.encode([[name]], str(IMAGES)) for name in names])
    assert torch.equal(together.encode([[name] for name in names], str(IMAGES)), alone)
