"""New tokens of SDXL against a few lines of plain torch, and against diffusers' own loader of embeddings."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from dora_mm.adapting.new_tokens import add_tokens, check_tokens
from dora_mm.config.images import TokenConfig
from dora_mm.formats.tokens import write_token_file
from dora_mm.models.images.components import Components
from dora_mm.models.images.new_tokens import check_rows
from dora_mm.models.images.sdxl import encoding
from dora_mm.models.images.z_image import ZImage

PROMPT = "a TOK icon, in the style of TOK's TOKYO"
WEIGHTED = ((("a TOK icon", 1.3), (" of TOK", 1.0)),)


def with_tokens(model, **tokens):
    add_tokens({word: TokenConfig(**settings) for word, settings in tokens.items()}, model, seed=0)
    return model


def by_hand(model, prompt, encoder, tokenizer, rows):
    """The last but one hidden states and the state at the end of the text, with a longer table for the same ids."""
    count, embedding = len(rows), encoder.get_input_embeddings()
    first = embedding.num_embeddings
    ids = [tokenizer.bos_token_id]
    for number, piece in enumerate(prompt):
        ids += [*range(first, first + count)] if number else []
        ids += tokenizer(piece, add_special_tokens=False).input_ids
    end = len(ids)
    ids += [tokenizer.eos_token_id]
    ids += [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids))
    extended = torch.cat([embedding.weight, rows])
    text = getattr(encoder, "text_model", encoder)
    states = extended[torch.tensor([ids])] + text.embeddings.position_embedding.weight[: len(ids)]
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)[None, None]
    found = [states]
    for layer in text.encoder.layers:
        output = layer(found[-1], mask)
        found.append(output[0] if isinstance(output, tuple) else output)
    return found[-2], text.final_layer_norm(found[-1])[:, end]


def test_rows_are_looked_up_and_the_pooled_embedding_is_that_of_the_end(tiny):
    with_tokens(tiny, TOK={"count": 3})
    embeddings, pooled = encoding.encode_prompts(tiny, [PROMPT])
    pieces = ["a", "icon, in the style of", "'s TOKYO"]
    rows = tiny.new_tokens.by_word()["TOK"]
    one, _ = by_hand(tiny, pieces, tiny.text_encoder, tiny.tokenizer, rows["clip_l"])
    two, end = by_hand(tiny, pieces, tiny.text_encoder_2, tiny.tokenizer_2, rows["clip_g"])
    torch.testing.assert_close(embeddings, torch.cat([one, two], dim=-1))
    torch.testing.assert_close(pooled, tiny.text_encoder_2.text_projection(end))


def test_only_the_rows_get_a_gradient_and_the_tables_keep_their_bits(tiny):
    tables = {t: tiny.token_table(t).weight.clone() for t in tiny.token_tables}
    with_tokens(tiny, TOK={}, sks={"count": 1})
    for rows in tiny.new_tokens.parameters():
        rows.requires_grad_()
    embeddings, pooled = encoding.encode_prompts(tiny, ["a TOK icon", "a bus"])
    (embeddings.square().sum() + pooled.sum()).backward()
    grads = {key: rows.grad for key, rows in tiny.new_tokens.rows.items()}
    assert all(grads[f"TOK/{table}"].norm(dim=1).all() for table in tables)
    assert not any(grads[f"sks/{table}"].any() for table in tables)
    assert all(
        network.get_input_embeddings().weight.grad is None for network in (tiny.text_encoder, tiny.text_encoder_2)
    )
    assert all(tiny.token_table(t).weight.equal(before) for t, before in tables.items())


def test_other_prompts_and_words_that_are_off_have_the_same_bits(tiny):
    before = encoding.encode_prompts(tiny, [PROMPT, "a TOKYO bus"])
    with_tokens(tiny, TOK={})
    with tiny.new_tokens.off():
        after = encoding.encode_prompts(tiny, [PROMPT, "a TOKYO bus"])
    assert all(one.equal(two) for one, two in zip(before, after, strict=True))
    (alone,) = tiny.encode_prompts(["a TOKYO bus"])
    tiny.new_tokens.clear()
    (bare,) = tiny.encode_prompts(["a TOKYO bus"])
    assert all(alone[name].equal(bare[name]) for name in bare)


def test_tokens_of_a_word_stay_in_one_chunk_and_share_its_weight(tiny):
    with_tokens(tiny, TOK={"count": 2})
    size = tiny.tokenizer.model_max_length - 2
    filler = next(w for w in ("a", "b", "c") if len(tiny.tokenizer(w, add_special_tokens=False).input_ids) == 1)
    ids, _ = encoding.tokenize(tiny, [" ".join([filler] * (size - 1)) + " TOK"])
    first, second = ids.split(size + 2, dim=1)
    assert not (first < 0).any()
    assert second[0, 1:3].tolist() == [-1, -2]
    heavy = tiny.encode_for_sampling(WEIGHTED, None)["prompt_embeds"]
    plain = tiny.encode_for_sampling("a TOK icon of TOK", None)["prompt_embeds"]
    assert not torch.equal(heavy, plain)


def test_random_rows_are_as_long_as_the_tables_and_drawn_for_each_word(tiny):
    with_tokens(tiny, TOK={"count": 4}, sks={"count": 4})
    for table in tiny.token_tables:
        rows = tiny.new_tokens.by_word()["TOK"][table]
        wanted = tiny.token_table(table).weight.norm(dim=1).mean()
        torch.testing.assert_close(rows.norm(dim=1), wanted.expand(4))
        assert not rows.equal(tiny.new_tokens.by_word()["sks"][table])


def test_rows_start_as_words(tiny):
    with_tokens(tiny, TOK={"init": "a bus"})
    (new,) = tiny.encode_prompts(["see TOK here"])
    with tiny.new_tokens.off():
        (words,) = tiny.encode_prompts(["see a bus here"])
    assert all(new[name].equal(words[name]) for name in words)


def test_diffusers_loads_the_file_and_reads_the_same_prompts(tiny, tiny_folder, tmp_path):
    with_tokens(tiny, TOK={"count": 3})
    write_token_file(tmp_path, tiny.new_tokens.by_word())
    rows = load_file(tmp_path / "TOK.safetensors")
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_folder)
    for table, number in (("clip_l", ""), ("clip_g", "_2")):
        networks = {name: getattr(pipe, f"{name}{number}") for name in ("text_encoder", "tokenizer")}
        pipe.load_textual_inversion(rows[table], token=["<s0>", "<s1>", "<s2>"], **networks)
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    theirs, _, pooled, _ = pipe.encode_prompt(
        "a <s0><s1><s2> icon, in the style of <s0><s1><s2>", do_classifier_free_guidance=False
    )
    ours = tiny.encode_for_sampling("a TOK icon, in the style of TOK", None)
    torch.testing.assert_close(ours["prompt_embeds"], theirs)
    torch.testing.assert_close(ours["pooled_prompt_embeds"], pooled)


def test_a_family_without_tables_is_refused_by_its_name():
    with pytest.raises(ValueError, match="tokens: Z-Image has no new tokens here: leave TOK a plain word"):
        check_tokens({"TOK": TokenConfig()}, ZImage(Components.of()), [], None)


def test_rows_of_another_model_or_of_two_adapters_are_refused(tiny):
    rows = {table: torch.ones(2, width) for table, width in tiny.token_widths.items()}
    check_rows({"TOK": rows}, tiny.token_widths, Path("file"))
    for wrong, message in (
        ({"clip_l": rows["clip_l"]}, "for clip_l; this model has clip_l, clip_g"),
        (rows | {"clip_g": torch.ones(2, 99)}, r"are \(2, 99\) for clip_g, not \(2, 32\)"),
        ({"clip_l": torch.ones(()), "clip_g": rows["clip_g"]}, r"are \(\) for clip_l, not \(0, 16\)"),
        (rows | {"clip_g": torch.ones(1, 32)}, r"are \(1, 32\) for clip_g, not \(2, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            check_rows({"TOK": wrong}, tiny.token_widths, Path("file"))
    tiny.new_tokens.add("TOK", rows)
    tiny.new_tokens.add("TOK", rows)  # the same file twice
    with pytest.raises(ValueError, match="two adapters have the new token TOK"):
        tiny.new_tokens.add("TOK", {table: 2 * values for table, values in rows.items()})


@pytest.mark.parametrize(
    ("word", "settings", "message"),
    [
        ("a", {}, "a is a token of the model already"),
        ("TOK", {"init": "a bus", "count": 1}, "count is 1: leave count out"),
        ("TOK", {"init": " "}, "has 0 tokens, so nothing can start as it"),
    ],
)
def test_refusals(tiny, word, settings, message):
    with pytest.raises(ValueError, match=message):
        with_tokens(tiny, **{word: settings})
