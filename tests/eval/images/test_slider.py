"""Scores of sliders: known positions on an axis, correlations as numpy's, and a control of equal norms."""

import numpy as np
import pytest
import torch

import dora_mm
from dora_mm import DoRASpec
from dora_mm.adapting.control import random_adapter
from dora_mm.core import adapted_layers, merge, remove
from dora_mm.eval.images import slider
from dora_mm.eval.statistics import ConfidenceInterval
from tests.shared import reference

STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)


def moved(amount, num_prompts=4, num_seeds=2, dim=8, noise=0.0):
    """Vectors whose first coordinate is `amount` times the strength, and those of both ends of the axis."""
    rng = np.random.default_rng(0)
    things = np.concatenate(
        [np.zeros((num_prompts, num_seeds, 1)), rng.normal(size=(num_prompts, num_seeds, dim - 1))], 2
    )
    first = np.eye(dim)[0]
    images = np.stack([things + amount * strength * first for strength in STRENGTHS])
    return images + noise * rng.normal(size=images.shape), things, (things + first, things - first)


def test_positions_are_those_on_the_axis():
    images, things, axis = moved(0.5)
    cells, summary = slider.score_slider(STRENGTHS, images, things, axis)
    wanted = np.broadcast_to(0.5 * np.array(STRENGTHS)[:, None, None], (5, 4, 2))
    np.testing.assert_allclose(cells[slider.ATTRIBUTE], wanted, atol=1e-12)
    np.testing.assert_allclose(cells[slider.LIKENESS][2], (things**2).sum(axis=-1))
    assert summary[slider.SLOPE].mean == pytest.approx(0.5)
    assert summary[slider.LINEARITY].mean == pytest.approx(1.0)


def test_the_axis_of_a_prompt_is_not_made_of_its_own_images():
    images, _, (plus, minus) = moved(0.5)
    before = slider.attributes(images, plus, minus)
    plus[1] += 100.0
    after = slider.attributes(images, plus, minus)
    np.testing.assert_allclose(after[:, 1], before[:, 1])
    assert not np.allclose(after[:, 0], before[:, 0])


def test_correlations_and_slopes_are_numpys():
    scores = np.random.default_rng(1).normal(size=(5, 3, 2))
    x = np.array(STRENGTHS)
    found, lines = slider.correlations(x, scores), slider.slopes(x, scores)
    for prompt in range(3):
        for seed in range(2):
            assert found[prompt, seed] == pytest.approx(np.corrcoef(x, scores[:, prompt, seed])[0, 1])
            assert lines[prompt, seed] == pytest.approx(np.polyfit(x, scores[:, prompt, seed], 1)[0])
    assert np.array_equal(slider.correlations(x, np.ones((5, 1, 1))), [[0.0]])


@pytest.mark.parametrize(
    ("own", "control", "said"),
    [
        ((0.3, 0.2, 0.4), (0.0, -0.1, 0.1), "The slider moves the attribute more than a random adapter"),
        ((0.3, 0.2, 0.4), (0.2, 0.1, 0.3), "a random adapter of equal norm may as well"),
        ((0.1, -0.1, 0.3), None, "No movement along the attribute can be told from none"),
        ((-0.3, -0.4, -0.2), None, "No movement along the attribute can be told from none"),
    ],
)
def test_conclusions(own, control, said):
    rows = [
        values and dict.fromkeys((slider.SLOPE, slider.LINEARITY), ConfidenceInterval(*values))
        for values in (own, control)
    ]
    assert said in slider.conclusion(*rows)


def test_the_control_has_the_norm_of_each_update(tiny, tmp_path):
    def updates(path):
        before = {name: layer.weight.clone() for name, layer in tiny.unet.named_modules() if name in paths}
        dora_mm.load_adapter({"unet": tiny.unet}, path)
        merge(tiny.unet)
        found = {name: tiny.unet.get_submodule(name).weight - before[name] for name in paths}
        dora_mm.unmerge(tiny.unet)
        remove(tiny.unet)
        return found

    dora_mm.inject(tiny.unet, tiny.target_maps["unet"], DoRASpec(rank=2), parts=["attn", "conv"])
    layers = adapted_layers(tiny.unet)
    for seed, layer in enumerate(layers.values()):
        reference.randomize(layer, seed=seed)
    paths = list(layers)
    trained = dora_mm.save_adapter({"unet": tiny.unet}, tmp_path / "trained")
    remove(tiny.unet)
    control = random_adapter({"unet": tiny.unet}, trained, tmp_path / "control")
    assert not adapted_layers_of(tiny.unet)
    own, random = updates(trained), updates(control)
    cosines = []
    for name in paths:
        assert float(random[name].norm()) == pytest.approx(float(own[name].norm()), rel=1e-3)
        cosines.append(float(torch.cosine_similarity(own[name].flatten(), random[name].flatten(), dim=0)))
    assert abs(np.mean(cosines)) < 0.05


def adapted_layers_of(network):
    return [name for name, _ in network.named_parameters() if "lora_" in name]
