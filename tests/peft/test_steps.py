"""Row norms once per optimizer step, and transformers' Trainer with the callback."""

import contextlib
import copy
import logging

import peft
import pytest
import torch
import transformers
from torch import nn

import dora_mm
from dora_mm.peft import FusePeft, fixed_norms, formula
from tests.peft.models import adapted, computed, example, fused, train
from tests.shared.reference import relative_error


@pytest.fixture
def norms(monkeypatch):
    """The norms that were computed."""
    found = []

    def counted(*given):
        found.append(given)
        return row_norms(*given)

    row_norms = formula.row_norms
    monkeypatch.setattr("dora_mm.peft.formula.row_norms", counted)
    return found


# --- the context -----------------------------------------------------------------------------------------------------


def test_norms_are_computed_once(norms):
    ours, x = fused(adapted("Linear", 2)), example("Linear")
    expected = computed(ours, x)
    assert len(norms) == 2
    norms.clear()
    with fixed_norms(ours):
        for _ in range(3):
            assert all(map(torch.equal, computed(ours, x), expected))
    assert len(norms) == 2
    computed(ours, x)
    assert len(norms) == 4


def test_training_takes_no_norms_of_an_evaluation(norms):
    """Which may run with averages that are written to `.data`, and back, as diffusers' EMAModel does."""
    ours, x = fused(adapted("Linear")), example("Linear")
    expected, weight = computed(ours, x), ours.base_model.model.layer.lora_B["0"].weight
    norms.clear()
    with fixed_norms(ours):
        assert all(map(torch.equal, computed(ours, x), expected))
        own = weight.detach().clone()
        weight.data.copy_(own * 3)
        with torch.inference_mode():
            assert torch.equal(ours.eval()(x), fused(copy.deepcopy(ours))(x))
        weight.data.copy_(own)
        ours.train()
        for _ in range(2):
            assert all(map(torch.equal, computed(ours, x), expected))
    assert len(norms) == 4  # of which one is the copy's


@pytest.mark.parametrize("change", ["A", "B", "magnitude", "weight", "scaling", "bias"])
def test_a_pass_sees_what_was_changed_inside(change):
    ours, x = fused(adapted("Linear")), example("Linear")
    layer = ours.base_model.model.layer
    layer.base_layer.bias.data.fill_(0.5)
    with fixed_norms(ours), torch.no_grad():
        ours(x)
        if change == "scaling":
            layer.set_scale("0", 3.0)
        elif change == "bias":
            layer.base_layer.bias.mul_(-3)
        else:
            modules = {"A": layer.lora_A["0"], "B": layer.lora_B["0"], "weight": layer.base_layer}
            modules["magnitude"] = layer.lora_magnitude_vector["0"]
            modules[change].weight.mul_(1.5)
        inside = ours(x)
    assert torch.equal(inside, ours(x))


@pytest.mark.parametrize("way", [lambda p: p.data.mul_(1.1), lambda p: p.copy_(p * 1.1)], ids=[".data", "copy_"])
def test_a_warning_says_that_parameters_changed_inside(way, caplog):
    ours, x = fused(adapted("Linear")), example("Linear")
    with caplog.at_level(logging.WARNING), fixed_norms(ours):
        ours(x)
        with torch.no_grad():
            way(ours.base_model.model.layer.lora_B["0"].weight)
    assert caplog.messages == [
        "adapters changed while their row norms were kept: close fixed_norms before optimizer.step()"
    ]
    caplog.clear()
    with fixed_norms(ours):
        ours(x)
    assert caplog.messages == []


@pytest.mark.parametrize("is_fused", [False, True])
def test_an_optimizer_inside_is_said(is_fused, caplog):
    ours, x = fused(adapted("Linear")), example("Linear")
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], fused=is_fused)
    with caplog.at_level(logging.WARNING), fixed_norms(ours):
        ours(x).square().mean().backward()
        optimizer.step()
    assert len(caplog.messages) == 1


def test_an_error_inside_closes_it(norms):
    ours, x = fused(adapted("Linear")), example("Linear")
    with pytest.raises(RuntimeError), fixed_norms(ours):
        ours(x[..., :3])
    norms.clear()
    ours(x)
    assert len(norms) == 1


def test_layers_of_pefts_own_and_adapters_that_are_not_active_are_left_out(norms):
    model = fused(adapted("Linear", 2))
    model.base_model.set_adapter(["1"])
    with fixed_norms(model):
        model(example("Linear"))
        assert len(norms) == 1
    with fixed_norms(nn.Linear(2, 2)):
        pass


# --- the Trainer -----------------------------------------------------------------------------------------------------


def tiny_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=60, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    settings = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), settings)


def rows(count=64):
    drawn = torch.Generator().manual_seed(1)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 60, (count, 12), generator=drawn)]


def trained(folder, model, callbacks=(), **settings):
    """The losses of the steps, after a training of `model`."""
    given = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "learning_rate": 1e-2}
    given |= {"logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(output_dir=str(folder), **given | settings)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows(), eval_dataset=rows(8), callbacks=list(callbacks)
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_the_trainer(tmp_path, norms, capsys):
    """Losses equal PEFT's, norms are computed once per step and layer, and the adapter loads in plain PEFT."""
    theirs, ours = tiny_llama(), tiny_llama()
    layers = sum(name.endswith("lora_B.default.weight") for name, _ in ours.named_parameters())
    expected = trained(tmp_path, theirs)
    assert norms == []
    callback = FusePeft()
    found = trained(tmp_path, ours, [callback])
    assert len(norms) == 6 * layers == 6 * 14
    assert found == pytest.approx(expected, abs=2e-4)
    assert expected[-1] < expected[0]
    assert len(callback.report.fused) == layers
    assert "DoRA runs fused in 14 layers (2 q_proj, 2 k_proj" in capsys.readouterr().out
    ours.save_pretrained(tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(tiny_llama().unload(), tmp_path / "adapter")
    ids = rows(2)[0]["input_ids"][None]
    assert relative_error(plain(ids).logits, ours(ids).logits) < 1e-5


def test_an_evaluation_computes_norms_once(tmp_path, norms, caplog):
    """And the best model, which is loaded at the end, is no change that is warned of."""
    ours = tiny_llama()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, ours, [FusePeft()], load_best_model_at_end=True, **settings)
    assert len(norms) == (6 + 3) * 14  # of six steps, and of three evaluations
    assert [record for record in caplog.records if record.name.startswith("dora_mm")] == []


def test_inference_keeps_norms_until_a_parameter_changes(norms):
    ours, x = fused(adapted("Linear", 2)).eval(), example("Linear")
    twin = copy.deepcopy(ours)
    dora_mm.unfuse_peft(twin)
    for context in (torch.no_grad(), torch.inference_mode(), torch.no_grad()):
        with context:
            assert relative_error(ours(x), twin(x)) < 1e-6
    assert len(norms) == 2
    for change in (lambda p: p.mul_(1.5), lambda p: setattr(p, "data", p * 2)):
        for model in (ours, twin):
            with torch.no_grad():
                change(model.base_model.model.layer.lora_B["0"].weight)
        with torch.no_grad():
            assert relative_error(ours(x), twin(x)) < 1e-6
    assert len(norms) == 4


@pytest.mark.parametrize("replace", ["data", "parameter"])
def test_memory_that_is_taken_again_is_no_sign_of_the_same_numbers(replace):
    """An allocator gives what was freed to the next tensor of that size."""
    ours, x = fused(adapted("Linear")).eval(), example("Linear")
    module = ours.base_model.model.layer.lora_B["0"]
    for number in range(6):
        drawn = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(number))
        if replace == "data":
            module.weight.data = drawn
        else:
            del module.weight
            module.weight = nn.Parameter(drawn)
        del drawn
        with torch.no_grad():
            assert torch.equal(ours(x), copy.deepcopy(ours)(x))


def test_norms_that_inference_mode_has_computed_serve_training():
    ours, x = fused(adapted("Linear")), example("Linear")
    expected = computed(ours, x)
    with fixed_norms(ours):
        with torch.inference_mode():
            ours(x)
        assert all(map(torch.equal, computed(ours, x), expected))


def test_several_processes_keep_nothing_in_inference(norms, monkeypatch):
    """FSDP2 gathers parameters into the same memory in each pass."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    ours, x = fused(adapted("Linear")).eval(), example("Linear")
    with torch.no_grad():
        for _ in range(3):
            ours(x)
    assert len(norms) == 3


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("is_fixed", [False, True])
def test_a_step_of_an_optimizer_between_passes_has_an_effect(is_fixed, how):
    """torch's fused optimizers change no version. Within `fixed_norms` a warning says that the step is."""
    ours, x = fused(adapted("Linear")), example("Linear")
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.1, **how)
    with fixed_norms(ours) if is_fixed else contextlib.nullcontext():
        ours(x).square().mean().backward()
        with torch.no_grad():
            ours.eval()(x)
            optimizer.step()
            assert relative_error(ours(x), copy.deepcopy(ours)(x)) < 1e-6


def test_a_pass_of_training_forgets_norms_since_trainers_may_write_to_data():
    ours, x = fused(adapted("Linear")), example("Linear")
    with torch.no_grad():
        ours.eval()(x)
    ours.base_model.model.layer.lora_B["0"].weight.data.mul_(2)
    ours.train()(x)
    with torch.no_grad():
        assert relative_error(ours.eval()(x), copy.deepcopy(ours)(x)) < 1e-6


def test_a_training_that_ends_within_a_step_leaves_nothing_behind(tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    ours, callback = tiny_llama(), FusePeft()
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, ours, [callback, Stop()])
    train(ours, seed=3)
    twin = copy.deepcopy(ours)
    dora_mm.unfuse_peft(twin)
    ids = rows(2)[0]["input_ids"][None]
    assert relative_error(ours(ids).logits, twin(ids).logits) < 1e-5
    assert len(trained(tmp_path, ours, [callback])) == 6


def test_a_model_without_adapters_is_refused_when_training_begins(tmp_path):
    with pytest.raises(ValueError, match="found no layer with a LoRA of PEFT"):
        trained(tmp_path, tiny_llama().unload(), [FusePeft()])
