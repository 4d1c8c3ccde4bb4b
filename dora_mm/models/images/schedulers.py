"""Schedulers by their usual names: which class of diffusers, and which settings beside the model's own.

Importing this module does not import diffusers, so that names can be checked early.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dora_mm.utils.messages import nearest

log = logging.getLogger(__name__)
NO_SIGMA_SCHEDULE = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
KARRAS = {**NO_SIGMA_SCHEDULE, "use_karras_sigmas": True}
DPM = {"solver_order": 2, "algorithm_type": "dpmsolver++"}
DPM_SDE = {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}
# The defaults of diffusers are for pixels in [-1, 1]. Latents are larger, and the last step ends at the first timestep.
LATENTS = {"clip_sample": False, "set_alpha_to_one": False}


@dataclass(frozen=True)
class Scheduler:
    """A class of diffusers with the settings that make it the scheduler of this name.

    Attributes:
        kind: The name of the class.
        title: What A1111 and Civitai call it.
        settings: They replace those of the model's scheduler; all others (betas, prediction type, spacing) stay.
    """

    kind: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)


# As in diffusers' table of A1111's names: https://huggingface.co/docs/diffusers/api/schedulers/overview
SCHEDULERS = {
    "euler": Scheduler("EulerDiscreteScheduler", "Euler", NO_SIGMA_SCHEDULE),
    "euler_a": Scheduler("EulerAncestralDiscreteScheduler", "Euler a"),
    "dpmpp_2m": Scheduler("DPMSolverMultistepScheduler", "DPM++ 2M", {**DPM, **NO_SIGMA_SCHEDULE}),
    "dpmpp_2m_karras": Scheduler("DPMSolverMultistepScheduler", "DPM++ 2M Karras", {**DPM, **KARRAS}),
    "dpmpp_2m_sde": Scheduler("DPMSolverMultistepScheduler", "DPM++ 2M SDE", {**DPM_SDE, **NO_SIGMA_SCHEDULE}),
    "dpmpp_2m_sde_karras": Scheduler("DPMSolverMultistepScheduler", "DPM++ 2M SDE Karras", {**DPM_SDE, **KARRAS}),
    "unipc": Scheduler("UniPCMultistepScheduler", "UniPC", NO_SIGMA_SCHEDULE),
    "ddim": Scheduler("DDIMScheduler", "DDIM", LATENTS),
    "lcm": Scheduler("LCMScheduler", "LCM", LATENTS),  # for models distilled to a few steps, and at most 50
}
OF_FLOWS = ("euler",)  # of models that predict a velocity: their own is Euler's method


def find_scheduler(name: str) -> Scheduler:
    """Returns the entry of SCHEDULERS.

    Raises:
        ValueError: There is no scheduler of this name.
    """
    if name not in SCHEDULERS:
        raise ValueError(
            f"There is no scheduler {name!r}{nearest(name, SCHEDULERS)}; there are {', '.join(SCHEDULERS)}."
        )
    return SCHEDULERS[name]


def make_scheduler(name: str, own: Any) -> Any:
    """Builds a scheduler for a model.

    Args:
        name: A name in SCHEDULERS.
        own: The model's own scheduler, of diffusers. Its config says what the model predicts and on which noise levels
            it was trained.

    Returns:
        A new scheduler of diffusers.

    Raises:
        ValueError: There is no scheduler of this name, or it is not for this model.
    """
    import diffusers

    found = find_scheduler(name)
    if _is_flow(own):
        if name not in OF_FLOWS:
            raise ValueError(f"{name} is not for models that predict a velocity; {', '.join(OF_FLOWS)} is")
        return own
    if found.settings.get("use_karras_sigmas") and own.config.get("rescale_betas_zero_snr"):
        log.warning(
            "%s spends most steps on noise alone with this model, whose last noise level has no signal; %s does not.",
            name,
            name.removesuffix("_karras"),
        )
    return getattr(diffusers, found.kind).from_config(own.config, **found.settings)


def changes_for(prediction: str, marked: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model's scheduler to change, for what the model predicts.

    Args:
        prediction: `model.prediction`: "auto" leaves it to the model's files.
        marked: What a single checkpoint says of its scheduler.

    Raises:
        ValueError: A single checkpoint says that its last noise level has no signal, but not what it predicts.
    """
    if prediction == "auto":
        if marked.get("rescale_betas_zero_snr") and "prediction_type" not in marked:
            raise ValueError(
                "its last noise level has no signal (ztsnr), and it does not say what it predicts: set "
                "model.prediction=v_prediction, or epsilon, which leaves the noise levels as they are"
            )
        return dict(marked)
    if prediction == "epsilon":  # which says nothing of the image where there is no signal
        return {"prediction_type": prediction, "rescale_betas_zero_snr": False}
    return {**marked, "prediction_type": prediction}


def title_of(scheduler: Any) -> str:
    """The A1111 name of a diffusers scheduler; the name of its class where A1111 has none."""
    name = OF_FLOWS[0] if _is_flow(scheduler) else scheduler_name(scheduler)
    return SCHEDULERS[name].title if name else type(scheduler).__name__


def scheduler_name(scheduler: Any) -> str | None:
    """The name in SCHEDULERS of a scheduler of diffusers, such as a model's own; None if it is none of them."""
    for name, known in SCHEDULERS.items():
        same_kind = type(scheduler).__name__ == known.kind
        if same_kind and all(scheduler.config.get(key) == value for key, value in known.settings.items()):
            return name
    return None


def _is_flow(scheduler: Any) -> bool:
    from dora_mm.models.images.noise import is_flow  # imports diffusers

    return is_flow(scheduler)
