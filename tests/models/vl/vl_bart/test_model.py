"""VL-BART against the equations and parameter counts of the paper, and against BART."""

import pytest
import torch
from torch.nn import functional as F
from transformers import BartConfig

from dora_mm import DoRASpec, adapter_parameters, inject
from dora_mm.adapting.networks import parameters_by_name
from dora_mm.models.vl.vl_bart.loading import BART_BASE, from_bart
from dora_mm.models.vl.vl_bart.model import SENTINELS, VLInputs
from dora_mm.models.vl.vl_bart.text import encode_targets
from tests.shared.vl.small_vl_bart import DIM, small_bart, small_inputs, small_tokenizer, small_vl_bart

QUESTIONS = ["is there a red cat?", "what color is the bus?"]


@pytest.mark.parametrize(
    ("visual", "feature_dim", "method", "extra_trainable", "trained", "total"),
    [
        ("image", 2048, "lora", ("visual_embedding", "biases"), 8_786_688, 148_234_752),
        ("image", 2048, "dora", ("visual_embedding", "biases", "norms"), 8_838_912, 148_262_400),
        ("video", 512, "lora", ("visual_embedding", "biases"), 7_607_040, 147_055_104),
        ("video", 512, "dora", ("visual_embedding", "biases"), 7_634_688, 147_082_752),
    ],
)
def test_parameter_counts_are_those_of_the_paper(visual, feature_dim, method, extra_trainable, trained, total):
    with torch.device("meta"):
        model = from_bart(BartConfig(**BART_BASE), 50_465, feature_dim, visual).requires_grad_(False)
        extra = parameters_by_name(model, extra_trainable)
        report = inject(model, "bart", DoRASpec(rank=128, alpha=128, method=method))
    assert report.num_modules == 36
    selected = {**adapter_parameters(model), **extra}
    assert sum(p.numel() for p in selected.values()) == trained
    assert sum(p.numel() for p in model.parameters()) == total


def test_the_encoder_follows_the_papers_equations():
    model = small_vl_bart().double()
    encoder, visual = model.model.encoder, model.model.encoder.visual_embedding
    inputs = small_inputs(QUESTIONS, images=2)
    features = inputs.visual_features.double()

    ids = inputs.input_ids
    tokens = model.model.shared.weight
    positions = encoder.embed_positions.weight[2 : 2 + ids.shape[1]]  # BART's own offset
    parts = [encoder.layernorm_embedding(tokens[ids] + positions)]
    linear, norm = visual.feature_embedding
    box_linear, box_norm = visual.box_embedding
    for image in range(2):
        grid = features[:, image].transpose(1, 2).reshape(2, DIM, 7, 7)
        pooled = F.adaptive_max_pool2d(grid, 6).reshape(2, DIM, 36).transpose(1, 2)
        embedded = norm(linear(pooled)) + box_norm(box_linear.bias) + visual.image_embedding.weight[image]
        objects = torch.stack([tokens[len(tokens) - 1 - i] for i in range(36)])
        parts.append(embedded + objects)
    hidden = torch.cat(parts, dim=1)
    mask = torch.zeros(inputs.attention_mask.shape, dtype=torch.double)
    mask.masked_fill_(inputs.attention_mask == 0, float("-inf"))
    for layer in encoder.layers:
        hidden = layer(hidden, mask[:, None, None].expand(-1, 1, hidden.shape[1], -1))

    found = encoder(ids, inputs.attention_mask, features).last_hidden_state
    not_padding = inputs.attention_mask.bool()
    torch.testing.assert_close(found[not_padding], hidden[not_padding], rtol=1e-10, atol=1e-10)


def test_object_order_is_the_visual_sentinels():
    tokenizer = small_tokenizer()
    assert tokenizer.convert_ids_to_tokens([len(tokenizer) - 1, len(tokenizer) - 36]) == [
        "<vis_extra_id_0>",
        "<vis_extra_id_35>",
    ]
    assert SENTINELS[0] == "<extra_id_99>"


def test_text_alone_is_encoded_as_in_bart():
    bart = small_bart()
    model = from_bart(bart, len(small_tokenizer()), DIM, "image").eval()
    inputs = small_inputs(["is there a red cat?"])
    length = inputs.input_ids.shape[1]
    text_mask = inputs.attention_mask.clone()
    text_mask[:, length:] = 0
    found = model.model.encoder(inputs.input_ids, text_mask, inputs.visual_features).last_hidden_state[:, :length]
    expected = bart.model.encoder(inputs.input_ids, inputs.attention_mask[:, :length]).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_padding_changes_no_answer():
    model = small_vl_bart()
    inputs = small_inputs(["is there?", "is there a red cat left of the bus?"])
    together = model.next_logits(inputs, [2, 0])
    length = int(inputs.attention_mask[0, : inputs.input_ids.shape[1]].sum())
    mask = torch.cat([inputs.attention_mask[:1, :length], inputs.attention_mask[:1, -36:]], dim=1)
    alone = model.next_logits(VLInputs(inputs.input_ids[:1, :length], mask, inputs.visual_features[:1]), [2, 0])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_the_decoder_does_not_see_masked_frames():
    model = small_vl_bart("video")
    inputs = small_inputs(QUESTIONS)
    frames = torch.randn(2, 1, 64, DIM)
    mask = torch.cat([inputs.attention_mask[:, :-36], torch.ones(2, 64, dtype=torch.long)], dim=1)
    mask[:, -30:] = 0
    changed = frames.clone()
    changed[:, :, -30:] = 5.0
    one, other = (model.next_logits(VLInputs(inputs.input_ids, mask, f), [2]) for f in (frames, changed))
    assert torch.equal(one, other)


def test_greedy_answers_are_the_likeliest_tokens():
    model = small_vl_bart()
    inputs = small_inputs(QUESTIONS)
    found = model.answer_ids(inputs, max_length=8)
    ids = torch.tensor([[2], [2]])
    for _ in range(7):
        logits = model(*inputs, decoder_input_ids=ids, use_cache=False).logits[:, -1]
        following = logits.argmax(-1)
        done = (ids[:, 1:] == 2).any(1) if ids.shape[1] > 1 else torch.zeros(2, dtype=torch.bool)
        ids = torch.cat([ids, following.masked_fill(done, 1)[:, None]], dim=1)
    ids[:, -1] = torch.where((ids[:, 1:-1] == 2).any(1), 1, 2)  # the end token is forced at the maximum length
    assert torch.equal(found, ids[:, : found.shape[1]])


@pytest.mark.parametrize("beams", [1, 4])
def test_transformers_own_generate_takes_the_features(beams):
    model = small_vl_bart()
    inputs = small_inputs(QUESTIONS)
    ours = model.answer_ids(inputs, beams=beams, max_length=10)
    theirs = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        visual_features=inputs.visual_features,
        max_length=10,
        do_sample=False,
        num_beams=beams,
        early_stopping=beams > 1,
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_candidates_are_ranked_by_their_likelihood(rows):
    model = small_vl_bart()
    inputs = small_inputs(QUESTIONS)
    candidates = encode_targets(small_tokenizer(), "vqa", ["yes", "no", "two dogs", "a red cat"], max_positions=1024)
    sizes = []
    hook = model.lm_head.register_forward_hook(lambda _module, _inputs, logits: sizes.append(logits.numel()))
    limit = rows * candidates.shape[1] * model.config.vocab_size
    found = model.rank_candidates(inputs, candidates, max_logits=limit)
    assert max(sizes) == limit
    hook.remove()
    for row in range(2):
        single = VLInputs(*(t[row : row + 1] for t in inputs))
        for column, ids in enumerate(candidates):
            ids = ids[ids != 1]
            logits = model(*single, labels=ids[None]).logits[0]
            expected = F.log_softmax(logits, -1).gather(1, ids[:, None]).sum()
            torch.testing.assert_close(found[row, column], expected, rtol=1e-4, atol=1e-4)


def test_a_candidate_is_scored_even_if_its_logits_exceed_the_limit():
    model, inputs = small_vl_bart(), small_inputs(QUESTIONS)
    candidates = encode_targets(small_tokenizer(), "vqa", ["yes", "no"], max_positions=1024)
    expected = model.rank_candidates(inputs, candidates)
    torch.testing.assert_close(model.rank_candidates(inputs, candidates, max_logits=1), expected, rtol=1e-4, atol=1e-4)


def test_features_that_are_not_a_square_grid_are_refused():
    inputs = small_inputs(QUESTIONS)
    with pytest.raises(ValueError, match="50 visual tokens .*square grid"):
        small_vl_bart().next_logits(inputs._replace(visual_features=torch.randn(2, 1, 50, DIM)), [2])


def test_gradients_reach_everything_that_trains():
    model = small_vl_bart().requires_grad_(False).train()
    inject(model, "bart", DoRASpec(rank=2), parts=("text.qv", "text.ko", "text.mlp", "cross.qv", "cross.ko"))
    trained = parameters_by_name(model, ("visual_embedding", "biases", "norms"))
    for parameter in trained.values():
        parameter.requires_grad_()
    trained |= adapter_parameters(model)
    with torch.no_grad():
        for name, parameter in trained.items():
            if name.endswith("lora_B"):
                parameter.normal_()
    inputs = small_inputs(QUESTIONS, images=2)
    model(
        *inputs, labels=encode_targets(small_tokenizer(), "vqa", ["yes", "two dogs"], max_positions=1024)
    ).loss.backward()
    without_gradient = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    # k's bias shifts all scores of a query equally; boxes are zero, and so is the initial bias of their linear layer
    boxes = [f"model.encoder.visual_embedding.box_embedding.{layer}.weight" for layer in (0, 1)]
    assert [name for name in without_gradient if "k_proj.bias" not in name] == boxes
