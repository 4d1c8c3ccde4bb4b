"""TRL's SFTTrainer with the one line: a language model and a vision-language model, trained as TRL trains them.

TRL is no dependency of the tests: `make test-slow` puts it into build/trl.
"""

import copy

import numpy as np
import peft
import pytest
import transformers
from PIL import Image

from dora_mm.peft import FusePeft, fuse
from tests.shared.reference import relative_error
from tests.shared.vl import chat_models, vocabularies
from tests.shared.vl.sizes import text_config

pytestmark = pytest.mark.slow
STEPS = 20


def language_model():
    tokenizer = vocabularies.llama3(eos_token="<|begin_of_text|>", pad_token="<|begin_of_text|>")
    config = transformers.LlamaConfig(**text_config(tokenizer, "llama"))
    rows = [{"text": f"What is {n} and {n + 1}? It is {2 * n + 1}."} for n in range(40)]
    return transformers.LlamaForCausalLM(config), tokenizer, rows


def vision_language_model():
    model, processor = chat_models.llava()
    drawn = np.random.default_rng(0)
    rows = []
    for number in range(40):
        image = Image.fromarray(drawn.integers(0, 255, (28, 28, 3), dtype=np.uint8))
        prompt = [{"role": "user", "content": f"How many? {number}"}]
        rows.append(
            {"images": [image], "prompt": prompt, "completion": [{"role": "assistant", "content": str(number)}]}
        )
    return model, processor, rows


def trained(folder, model, processor, rows, callbacks, **settings):
    """The losses of all steps, and the model that TRL made of a copy of `model`."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    arguments = trl.SFTConfig(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        max_length=None, disable_tqdm=True, **settings,
    )  # fmt: skip
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "v_proj", "down_proj"])
    trainer = trl.SFTTrainer(
        copy.deepcopy(model), args=arguments, train_dataset=datasets.Dataset.from_list(rows), callbacks=callbacks,
        processing_class=processor, peft_config=config,
    )  # fmt: skip
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], trainer.model


@pytest.mark.parametrize("kind", [language_model, vision_language_model])
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": False}], ids=["checkpointing", "none"])
def test_losses_equal_pefts_and_the_adapter_loads_in_plain_peft(kind, settings, tmp_path):
    transformers.set_seed(0)
    model, processor, rows = kind()
    expected, theirs = trained(tmp_path, model, processor, rows, [], **settings)
    callback = FusePeft()
    found, ours = trained(tmp_path, model, processor, rows, [callback], **settings)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=2e-3)
    assert expected[-1] < 0.9 * expected[0]
    assert len(callback.report.fused) >= 6
    assert callback.report.stock == callback.report.at_times == {}
    ours.save_pretrained(tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()
    assert list(fuse.fused_of(plain)) == []
    given = processor(text="How many? 7", return_tensors="pt")
    outputs = [m.eval()(**given).logits for m in (plain, ours, theirs)]
    assert relative_error(outputs[0], outputs[1]) < 1e-5
    assert relative_error(outputs[1], outputs[2]) < 2e-2  # rounding, after twenty steps of Adam
