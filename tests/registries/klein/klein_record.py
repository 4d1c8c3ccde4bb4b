"""What is known of FLUX.2 [klein] before anything is loaded, and its section of the config."""

from pydantic import PositiveInt

from dora_mm.config.models import ImageFamilyConfig
from dora_mm.registries.image_families import ImageFamily


class Flux2KleinConfig(ImageFamilyConfig):
    """What only FLUX.2 klein's models have."""

    max_tokens: PositiveInt = 512  # of a prompt in its chat template; text beyond is cut, shorter ones are filled up


FAMILY = ImageFamily(
    title="FLUX.2 klein",
    place="klein:Flux2Klein",
    section="klein_record:Flux2KleinConfig",
    pipeline="Flux2KleinPipeline",
)
