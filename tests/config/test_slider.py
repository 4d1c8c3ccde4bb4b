"""What a config of a slider refuses, each in a sentence."""

import pytest
from pydantic import ValidationError

from dora_mm.config.models import validated
from dora_mm.config.slider import TrainSliderConfig

SLIDER = {"plus": "old", "minus": "young", "neutral": "a person"}


def config_of(**changes):
    values = {
        "pipeline": "train_slider",
        "name": "test",
        "model": {"path": "samples/tiny-sdxl"},
        "adapter": {"rank": 2},
        "slider": SLIDER,
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1, "batch_size": 2, "gradient_accumulation_steps": 3},
    }
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        values[section] = {**values[section], leaf: value} if leaf else value
    return validated(TrainSliderConfig, values)


def test_each_strength_is_a_micro_batch():
    assert config_of().train_by_strength.gradient_accumulation_steps == 6
    assert config_of(slider__strengths=[2, 1, -1]).train_by_strength.gradient_accumulation_steps == 9


PAIRS = {"images": {"plus": "samples/lego", "minus": "samples/lego_flat"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slider": [SLIDER, SLIDER]}, "one adapter holds one slider: train each of them in a run of its own"),
        ({"slider": {"plus": "old"}}, "give plus and minus, the captions of both sides, or images"),
        ({"slider__minus": "old"}, "plus and minus are the same caption: nothing would move"),
        ({"slider__neutral": "a {thing}"}, "neutral contains {thing}: give things"),
        ({"slider__things": ["cat"]}, "plus must contain {thing} once, for things"),
        ({"slider__strengths": [1, 2]}, "strengths needs one above 0 and one below"),
        ({"slider__strengths": [1, 0, -1]}, "and none of 0, which is the base model"),
        ({"slider__strengths": [1, 1, -1]}, "strengths names one twice"),
        ({"slider": {**PAIRS, "eta": 2.0}}, "eta has no effect with images: leave it out"),
        ({"slider": {**PAIRS, "plus": "old"}}, "plus has no effect with images: leave it out"),
        ({"adapter__method": "full"}, "adapter.method full has no strength, which is what a slider moves"),
        ({"adapter__parts": ["text_encoder.attn"]}, "a slider is trained in the denoiser alone"),
        ({"adapter__init_from": "x.safetensors"}, "one adapter holds one slider, which starts from a fresh adapter"),
        ({"train__compile": True}, "train.compile is not for sliders, whose strength changes within a step"),
        ({"sample": {"prompts": ["a"], "images": ["a.png"]}}, "images has no effect: the grid of a slider"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValidationError) as error:
        config_of(**changes)
    assert message in str(error.value)
