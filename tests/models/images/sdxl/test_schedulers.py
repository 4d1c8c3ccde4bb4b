"""Schedulers by name against plain diffusers."""

import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler

from dora_mm.models.images.schedulers import SCHEDULERS, find_scheduler, make_scheduler, scheduler_name
from dora_mm.models.images.sdxl.family import SDXL

# SDXL base 1.0's scheduler/scheduler_config.json
SDXL_BASE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
# The table of diffusers' documentation: https://huggingface.co/docs/diffusers/api/schedulers/overview
DOCUMENTED = {
    "euler": ("Euler", diffusers.EulerDiscreteScheduler, {}),
    "euler_a": ("Euler a", diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": ("DPM++ 2M", diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": ("DPM++ 2M Karras", diffusers.DPMSolverMultistepScheduler, KARRAS),
    "dpmpp_2m_sde": ("DPM++ 2M SDE", diffusers.DPMSolverMultistepScheduler, SDE),
    "dpmpp_2m_sde_karras": ("DPM++ 2M SDE Karras", diffusers.DPMSolverMultistepScheduler, KARRAS | SDE),
    "unipc": ("UniPC", diffusers.UniPCMultistepScheduler, {}),
    "ddim": ("DDIM", diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "lcm": ("LCM", diffusers.LCMScheduler, {"set_alpha_to_one": False}),
}


def draw(model: SDXL, scheduler, seeds):
    pipe = model.pipeline()
    pipe.scheduler = scheduler
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(
        ["a bus"] * len(seeds), num_inference_steps=3, generator=streams, output_type="np", height=64, width=64
    ).images


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    "own",
    [pytest.param(None, marks=pytest.mark.slow), SDXL_BASE],
    ids=["velocity, zero SNR", "SDXL base"],
)
def test_a_scheduler_draws_what_its_class_draws_in_plain_diffusers(tiny, name, own):
    if own is None:
        tiny.scheduler.register_to_config(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        )
    else:
        tiny.scheduler = EulerDiscreteScheduler.from_config(own)
    title, kind, settings = DOCUMENTED[name]
    ours = draw(tiny, make_scheduler(name, tiny.scheduler), [1, 2])
    assert np.isfinite(ours).all()
    assert np.array_equal(ours, draw(tiny, kind.from_config(tiny.scheduler.config, **settings), [1, 2]))
    alone = draw(tiny, make_scheduler(name, tiny.scheduler), [2])[0]
    assert np.abs(ours[1] - alone).max() < 1e-3  # noise that is added on the way comes from its own seed, too
    assert SCHEDULERS[name].title == title


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_the_model_was_trained_with_stays(name):
    trained = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "beta_end": 0.01,
        "use_exponential_sigmas": True,  # of another sampler: the name says how the noise levels are spaced
    }
    made = make_scheduler(name, EulerDiscreteScheduler.from_config(SDXL_BASE | trained))
    for key in ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing", "beta_end"):
        assert made.config[key] == trained[key]
    assert made.config.get("clip_sample", False) is False
    assert scheduler_name(made) == name


def test_schedulers_of_models_are_named():
    assert scheduler_name(EulerDiscreteScheduler.from_config(SDXL_BASE)) == "euler"
    assert scheduler_name(EDMEulerScheduler()) is None
    assert scheduler_name(EulerDiscreteScheduler(use_karras_sigmas=True)) is None


def test_karras_noise_levels_are_warned_of_where_they_fail(caplog):
    make_scheduler("dpmpp_2m_karras", EulerDiscreteScheduler.from_config(SDXL_BASE))
    assert not caplog.messages
    make_scheduler("dpmpp_2m_karras", EulerDiscreteScheduler(rescale_betas_zero_snr=True))
    assert "dpmpp_2m does not" in caplog.text


def test_a_wrong_name_is_corrected_without_importing_diffusers():
    with pytest.raises(ValueError, match="no scheduler 'dpmpp_2m_karas', did you mean 'dpmpp_2m_karras'"):
        find_scheduler("dpmpp_2m_karas")
    code = "import dora_mm.models.images.schedulers, sys; print('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
