"""Loading saved models and plain BARTs; folders that are damaged or belong to another kind of model."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_mm.config.models import VLBartModelConfig
from dora_mm.models.vl.vl_bart.answering import restricted_to
from dora_mm.models.vl.vl_bart.loading import empty_vl_bart, load_vl_bart, save_vl_bart
from dora_mm.models.vl.vl_bart.text import decode, encode_targets
from tests.shared.vl.small_vl_bart import DIM, small_bart, small_inputs, small_tokenizer, small_vl_bart


def test_a_saved_model_is_loaded_bit_for_bit(tmp_path):
    model, tokenizer = small_vl_bart(), small_tokenizer()
    save_vl_bart(model, tokenizer, tmp_path / "model")
    loaded, loaded_tokenizer = load_vl_bart(
        VLBartModelConfig(family="vl_bart", path=str(tmp_path / "model")), DIM, seed=3
    )
    assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert loaded.lm_head.weight is loaded.model.shared.weight is loaded.model.encoder.embed_tokens.weight
    assert not any(p.requires_grad for p in loaded.parameters())


def test_saving_in_half_precision_does_not_change_the_model(tmp_path):
    model = small_vl_bart()
    save_vl_bart(model, small_tokenizer(), tmp_path / "model", torch.float16)
    assert model.dtype == torch.float32
    loaded, _ = load_vl_bart(VLBartModelConfig(family="vl_bart", path=str(tmp_path / "model")), DIM, seed=0)
    torch.testing.assert_close(loaded.model.shared.weight, model.model.shared.weight.half().float())


@pytest.fixture
def bart_folder(tmp_path):
    bart = small_bart()
    bart.save_pretrained(tmp_path / "bart")
    small_tokenizer().save_pretrained(tmp_path / "bart")
    return tmp_path / "bart"


def test_a_plain_bart_keeps_its_weights_and_the_rest_is_drawn_from_the_seed(bart_folder):
    config = VLBartModelConfig(family="vl_bart", path=str(bart_folder))
    (one, tokenizer), (same, _), (other, _) = (load_vl_bart(config, DIM, seed) for seed in (1, 1, 2))
    known = len(tokenizer) - 200
    assert torch.equal(one.model.shared.weight, same.model.shared.weight)
    assert torch.equal(one.model.shared.weight[:known], other.model.shared.weight[:known])
    assert not torch.equal(one.model.shared.weight[known:], other.model.shared.weight[known:])
    assert one.model.shared.weight[known:].std() > 0


def repeats(ids: torch.Tensor) -> bool:
    """Whether three tokens in a row occur twice in an answer."""
    rows = [[token for token in row if token != 1] for row in ids.tolist()]
    return any(
        len(set(triples)) < len(triples) for row in rows for triples in [list(zip(row, row[1:], row[2:], strict=False))]
    )


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_barts_rule_against_repetitions_is_inherited(bart_folder, tmp_path, file):
    """facebook/bart-base has it in its config.json, in the old way; its beams and lengths are not inherited."""
    config = VLBartModelConfig(family="vl_bart", path=str(bart_folder))
    inputs = small_inputs(["is there a red cat?", "what color is the bus?", "two dogs?"])
    for settings in ({"beams": 1}, {"beams": 3}):
        assert repeats(load_vl_bart(config, DIM, seed=0)[0].eval().answer_ids(inputs, max_length=40, **settings))

    saved = json.loads((bart_folder / file).read_text())
    (bart_folder / "generation_config.json").unlink()
    inherited = {"no_repeat_ngram_size": 3, "num_beams": 4, "early_stopping": True, "max_length": 30}
    (bart_folder / file).write_text(json.dumps(saved | inherited))
    model, tokenizer = load_vl_bart(config, DIM, seed=0)
    assert model.generation_config.num_beams is None
    save_vl_bart(model, tokenizer, tmp_path / "saved")
    again, _ = load_vl_bart(VLBartModelConfig(family="vl_bart", path=str(tmp_path / "saved")), DIM, seed=0)
    for settings in ({"beams": 1}, {"beams": 3}):
        ids = model.eval().answer_ids(inputs, max_length=40, **settings)
        assert ids.shape[1] > 30
        assert not repeats(ids)
        assert torch.equal(again.eval().answer_ids(inputs, max_length=40, **settings), ids)
    only = encode_targets(tokenizer, "tvc", ["two dogs two dogs two dogs two dogs"], max_positions=1024)
    assert repeats(only)
    assert decode(tokenizer, model.answer_ids(inputs, max_length=40, allowed=restricted_to(only, model.config))) == [
        "two dogs two dogs two dogs two dogs"
    ] * len(inputs.input_ids)


def test_random_weights_need_only_the_config(bart_folder):
    drawn, _ = load_vl_bart(VLBartModelConfig(family="vl_bart", path=str(bart_folder), random=True), DIM, seed=0)
    loaded, _ = load_vl_bart(VLBartModelConfig(family="vl_bart", path=str(bart_folder)), DIM, seed=0)
    assert drawn.model.shared.weight.shape == loaded.model.shared.weight.shape
    assert not torch.equal(drawn.model.decoder.layers[0].fc1.weight, loaded.model.decoder.layers[0].fc1.weight)


def test_an_empty_model_has_the_shapes_of_the_loaded_one(bart_folder):
    config = VLBartModelConfig(family="vl_bart", path=str(bart_folder))
    with torch.device("meta"):
        empty = empty_vl_bart(config, DIM)
    loaded, tokenizer = load_vl_bart(config, DIM, seed=0)
    shapes = {name: p.shape for name, p in loaded.named_parameters()}
    shared = shapes.pop("model.shared.weight")
    assert {n: p.shape for n, p in empty.named_parameters() if n != "model.shared.weight"} == shapes
    assert shared[0] == len(tokenizer)


def pickle_weights(folder) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "is a t5"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "BART tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"123"), "cannot be loaded"),
        (pickle_weights, "no file named model.safetensors"),
    ],
)
def test_missing_and_damaged_files_are_reported(bart_folder, damage, message):
    damage(bart_folder)
    with pytest.raises(ValueError, match=f"^model.path: {bart_folder} .*{message}"):
        load_vl_bart(VLBartModelConfig(family="vl_bart", path=str(bart_folder)), DIM, seed=0)


@pytest.fixture
def saved(tmp_path):
    """A saved VL-BART for image features."""
    save_vl_bart(small_vl_bart(), small_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def both_ways(config: VLBartModelConfig, feature_dim: int = DIM):
    """The two ways to build the model: as a dry run does, and loaded."""
    return partial(empty_vl_bart, config, feature_dim), partial(load_vl_bart, config, feature_dim, seed=0)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": "sixteen"}, "config.json.*'d_model' expected int"),
        ({"pooled_side": "six"}, "config.json.*pooled_side must be .* at least 1, not 'six'"),
        ({"pooled_side": 0}, "pooled_side must be .* at least 1, not 0"),
        ({"encoder_attention_heads": 3}, "embed_dim must be divisible by num_heads"),
        ({"encoder_attention_heads": 0}, "no model can be built|cannot be loaded"),
        ({"max_position_embeddings": 2}, "has positions for 2 tokens"),
        ({"pad_token_id": 9999}, "has pad_token_id 9999 in its config.json"),
    ],
)
def test_an_impossible_config_is_an_error_for_its_path(saved, random, changes, message):
    change_config(saved, **changes)
    for make in both_ways(VLBartModelConfig(family="vl_bart", path=str(saved), random=random)):
        with pytest.raises(ValueError, match=f"^model.path: {saved} .*({message})"):
            make()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 32}, r"has a model\.\S+ of shape \(\S+ 16\), and its config.json needs \(\S+ 32\)"),
        ({"encoder_layers": 3}, r"it lacks model\.encoder\.layers\.2.* and 15 more weights"),
        ({"encoder_layers": 1}, r"has weights of layers that its config.json lacks \(model\.encoder\.layers\.1"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_an_error_without_other_output(saved, capfd, changes, message):
    change_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        load_vl_bart(VLBartModelConfig(family="vl_bart", path=str(saved)), DIM, seed=0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(saved, value):
    weights = load_file(saved / "model.safetensors")
    weights["model.decoder.layers.1.fc1.bias"][3] = value
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.path: .* model\.decoder\.layers\.1\.fc1\.bias .* not finite"):
        load_vl_bart(VLBartModelConfig(family="vl_bart", path=str(saved)), DIM, seed=0)


@pytest.mark.parametrize("kind", ["bart_folder", "saved"])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_other_generation_settings_of_the_folder_change_no_answer(request, kind, file):
    folder = request.getfixturevalue(kind)
    config = VLBartModelConfig(family="vl_bart", path=str(folder))
    inputs = small_inputs(["is there a red cat?", "two dogs?"])
    expected = load_vl_bart(config, DIM, seed=0)[0].eval().answer_ids(inputs)
    settings = json.loads((folder / file).read_text())
    settings |= {"forced_bos_token_id": 0, "min_length": 15, "num_beams": 3}
    (folder / file).write_text(json.dumps(settings))
    assert torch.equal(load_vl_bart(config, DIM, seed=0)[0].eval().answer_ids(inputs), expected)


def test_generate_works_on_a_loaded_model(saved):
    model, _ = load_vl_bart(VLBartModelConfig(family="vl_bart", path=str(saved)), DIM, seed=0)
    inputs = small_inputs(["is there a red cat?"])
    settings = {"max_length": 10, "do_sample": False, "num_beams": 1}
    assert torch.equal(model.eval().generate(**inputs._asdict(), **settings), model.answer_ids(inputs, max_length=10))


def test_a_model_for_other_features_is_refused(saved):
    for make in both_ways(VLBartModelConfig(family="vl_bart", path=str(saved)), 9):
        with pytest.raises(ValueError, match=r"model\.path: .* 8 channels, .*vision gives 9"):
            make()


@pytest.mark.parametrize(("kind", "other"), [("image", "video"), ("video", "image")])
def test_a_saved_model_of_the_other_kind_is_refused(tmp_path, kind, other):
    save_vl_bart(small_vl_bart(kind), small_tokenizer(), tmp_path)
    for make in both_ways(VLBartModelConfig(family="vl_bart", path=str(tmp_path), visual=other)):
        with pytest.raises(ValueError, match=f"model.path: .*{kind} features, .*model.visual is {other}"):
            make()
    for visual in (kind, None):
        for make in both_ways(VLBartModelConfig(family="vl_bart", path=str(tmp_path), visual=visual)):
            built = make()
            model = built[0] if isinstance(built, tuple) else built
            assert (model.config.pooled_side is None) == (kind == "video")


def test_a_plain_bart_reads_images_by_default(bart_folder):
    sides = []
    for visual in (None, "image", "video"):
        model, _ = load_vl_bart(VLBartModelConfig(family="vl_bart", path=str(bart_folder), visual=visual), DIM, seed=0)
        sides.append(model.config.pooled_side)
    assert sides == [6, 6, None]
