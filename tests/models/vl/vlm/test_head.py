"""Losses by the hidden states of target tokens alone, beside those of all logits that a class returns."""

import inspect
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as LANGUAGE_MODELS

from dora_mm.models.vl.vlm import head
from dora_mm.models.vl.vlm.encoding import IGNORED
from dora_mm.models.vl.vlm.head import TargetLosses, chunked_losses, cross_entropy, head_of, target_logits
from tests.documented.vlm_classes import ALIASES, CLASSES, PAGE, REASONS, built, images_in, named
from tests.shared.data.vlm_rows import write_images
from tests.shared.peaks import peak_bytes
from tests.shared.vl.equalities import EXAMPLES, batch_of, opened
from tests.shared.vl.rarest_models import UNTRAINED

TRAINED = [kind for kind in CLASSES if kind not in (*ALIASES, *REASONS, *UNTRAINED)]
BY_MECHANISM = {  # whether the head computes losses
    "llava": True,
    "gemma3n": False,  # caps its logits
    "chameleon": False,  # overwrites some of them
    "git": True,  # has columns of images in front
    "florence2": True,  # has a decoder of its own
    "t5gemma2": True,
    "blip_vqa": True,
    "blip_caption": True,
    "nemotron_h_omni": False,  # widens them; its language model has the head
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("pictures"))


def losses_of_all_logits(vlm, inputs, labels):
    """By what the class returns of its own accord: with labels, or for the whole text."""
    form, model = vlm.network.form, vlm.model
    if type(form).__name__ == "OwnDecoder":
        logits, targets = model(**inputs, labels=labels, use_cache=False).logits, labels
    else:
        logits, targets = form.logits(model, inputs, labels)[:, -labels.shape[1] :][:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2).double(), targets, ignore_index=IGNORED, reduction="none")
    return losses.sum(-1)


def prepared(base, images):
    """A model all of whose weights have gradients, in float64 where its class computes in that, and a batch."""
    vlm = opened(base)
    batch = batch_of(vlm, images, EXAMPLES)
    vlm.model.requires_grad_(True).double()
    try:
        with torch.no_grad():
            for inputs, labels in in_dtype_of(vlm, batch):
                losses_of_all_logits(vlm, inputs, labels)
    except RuntimeError:  # products of experts and some filters are float32
        vlm.model.float()
    return vlm, in_dtype_of(vlm, batch)


def in_dtype_of(vlm, batch):
    dtype = vlm.model.dtype
    return [
        ({n: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for n, v in inputs.items()}, labels)
        for inputs, labels, _ in batch.groups
    ]


def check(base, images, monkeypatch) -> bool:
    """Compares losses and gradients, whole and in chunks of three tokens; returns whether the head computed them."""
    vlm, groups = prepared(base, images)
    values = list(vlm.model.parameters())
    precision = 1e-12 if vlm.model.dtype == torch.float64 else 2e-6
    for size in (head.CHUNK, 3 * head_of(vlm.model).out_features):
        monkeypatch.setattr(head, "CHUNK", size)
        losses = TargetLosses(vlm.network.form, vlm.model)
        known = losses.in_chunks
        for inputs, labels in groups:
            weights = torch.linspace(1, 2, len(labels), dtype=torch.float64)
            expected = losses_of_all_logits(vlm, inputs, labels)
            wanted = torch.autograd.grad((expected * weights).sum(), values, allow_unused=True)
            found, counts = losses(inputs, labels)
            gradients = torch.autograd.grad((found * weights).sum(), values, allow_unused=True)
            torch.testing.assert_close(found.double(), expected, rtol=precision, atol=0)
            assert torch.equal(counts, (labels != IGNORED).sum(-1))
            largest = max(float(g.norm()) for g in wanted if g is not None)
            for ours, theirs in zip(gradients, wanted, strict=True):
                assert (ours is None) == (theirs is None)
                assert ours is None or (ours - theirs).norm() <= precision * largest
        assert losses.in_chunks == known, "it was not known that the class goes on with its logits"
    return known


FAST = ("llava", "chameleon", "git", "florence2")
MECHANISMS = [pytest.param(*m, marks=() if m[0] in FAST else pytest.mark.slow) for m in BY_MECHANISM.items()]


@pytest.mark.parametrize(("name", "in_chunks"), MECHANISMS)
def test_losses_and_gradients_are_those_of_all_logits(name, in_chunks, tiny_vlm, images, monkeypatch):
    assert check(tiny_vlm(name), images, monkeypatch) == in_chunks


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINED)
def test_losses_and_gradients_of_every_class(kind, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "classes"
    folder.mkdir(exist_ok=True)
    page = PAGE.read_text(encoding="utf-8")
    (listed,) = re.findall(r"compute all logits of these tokens at once, .*?:\n(.*?)\n\n", page, re.S)
    assert check(built(named(kind), folder), images_in(folder), monkeypatch) == (f"`{kind}`" not in listed)


@pytest.mark.parametrize("name", ["llava_next", "florence2"])
def test_the_head_is_given_the_states_of_target_tokens_alone(name, tiny_vlm, images):
    """Rows with images of different sizes: it was given the union of their columns, or all of them."""
    vlm = opened(tiny_vlm(name))
    ((inputs, labels, _),) = batch_of(vlm, images, EXAMPLES).groups
    shapes = []
    head_of(vlm.model).register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    with torch.no_grad():
        logits, targets = target_logits(vlm.network.form, vlm.model, inputs, labels)
    num = int((labels != IGNORED).sum())
    assert shapes == [(1, num, head_of(vlm.model).in_features)]
    assert logits.shape == (num, head_of(vlm.model).out_features)
    assert torch.equal(targets, labels[labels != IGNORED])


@pytest.mark.parametrize("name", ["chameleon", pytest.param("granite4_vision", marks=pytest.mark.slow)])
def test_a_class_that_goes_on_with_its_logits_unknown_to_us_is_found_in_its_first_pass(
    name, tiny_vlm, images, monkeypatch
):
    vlm = opened(tiny_vlm(name))
    ((inputs, labels, _),) = batch_of(vlm, images, EXAMPLES).groups
    with torch.no_grad():
        expected = TargetLosses(vlm.network.form, vlm.model)(inputs, labels)[0]
        monkeypatch.setattr(head, "SHAPE_LOGITS", ())
        losses = TargetLosses(vlm.network.form, vlm.model)
        assert losses.in_chunks
        assert torch.equal(losses(inputs, labels)[0], expected)
    assert not losses.in_chunks


@pytest.mark.slow
def test_language_models_whose_logits_are_not_those_of_their_heads_are_known():
    """Told by the source of their classes: lines that assign logits, but what the head returns."""
    unknown = set()
    for kind, name in LANGUAGE_MODELS.items():
        source = inspect.getsource(getattr(transformers, name).forward)
        lines = re.findall(r"^ +logits(?:\[.*\])? = (.*)$", source, re.M)
        further = [line for line in lines if re.search(r"logits|\) [*/]|cap", line)]
        capped = "final_logit_softcapping" in source
        if further and not capped and kind not in head.SHAPE_LOGITS:
            unknown.add(kind)
    assert unknown == {"musicgen", "musicgen_melody", "prophetnet"}  # which are none that anybody asks


def test_memory_of_the_loss_is_that_of_a_chunk_of_logits(monkeypatch):
    """Of 100 tokens at a vocabulary of 152,000, 13 at a time: the logits, their softmax, and its gradient."""
    monkeypatch.setattr(head, "CHUNK", 1 << 21)
    torch.manual_seed(0)
    layer = nn.Linear(8, 152_000, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(100, 8, requires_grad=True), torch.randint(152_000, (100,))
    gradients = {}

    def step(loss):
        (gradients[loss],) = torch.autograd.grad(loss().sum(), hidden)

    in_chunks = lambda: chunked_losses(layer, hidden, targets)  # noqa: E731
    whole = lambda: cross_entropy(layer(hidden), targets)  # noqa: E731
    chunk = 4 * head.CHUNK
    assert peak_bytes(lambda: step(in_chunks)) < 4.1 * chunk
    assert peak_bytes(lambda: step(whole)) > 4 * 100 * 152_000 * 2
    torch.testing.assert_close(gradients[in_chunks], gradients[whole])
