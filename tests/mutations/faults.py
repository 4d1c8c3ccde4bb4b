"""The faults: fragments of lines, each of which matters to a user, and the tests that must notice the change."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A change of one line.

    Attributes:
        name: Its name in the results.
        file: The file in dora_mm/.
        before: A fragment of a line, which is exactly once in the file.
        after: Its replacement.
        why: Who notices the fault, and how.
        test: The file that is run first; the rest of its room follows where that does not notice.
    """

    name: str
    file: str
    before: str
    after: str
    why: str
    test: str

    @property
    def room(self) -> str:
        """The folder of tests that must notice it: one of tests/, or of the largest folders there."""
        parts = self.test.split("/")
        return "/".join(parts[: 3 if parts[1] in ("models", "formats") else 2])


CORE = (
    Fault(
        "bf16 norm",
        "core/functional.py",
        "inner = torch.addmm(reduced_weight(W0, A), sB, A @ A.T, beta=2)",
        "inner = torch.addmm(reduced_weight(W0, A), sB, A @ A.T, beta=1)",
        "embeddings over a bf16 base are off by 0.046 instead of 0.0024: W0 A^T is taken once",
        "tests/core/test_functional.py",
    ),
    Fault(
        "cancelled rows",
        "core/functional.py",
        "CANCELLED = 1 / 4",
        "CANCELLED = 0.0",
        "rows whose update nearly cancels W0 get a norm without digits",
        "tests/core/test_functional.py",
    ),
    Fault(
        "rows of zeros",
        "core/functional.py",
        "gain.masked_fill_(norm == 0, 1)",
        "gain.masked_fill_(norm == 0, 0)",
        "rows of zeros, of which published weights have hundreds, never train",
        "tests/core/test_forms.py",
    ),
    Fault(
        "strength above 1",
        "core/functional.py",
        "W = torch.add(W0, W - W0, alpha=adapter.strength)",
        "W = torch.add(W0, W - W0, alpha=min(adapter.strength, 1))",
        "a merge at strength 1.5 is one at 1",
        "tests/core/test_merging.py",
    ),
    Fault(
        "rounding of merges",
        "core/functional.py",
        "lower += noise < quotient.sub_(lower)",
        "lower += quotient.sub_(lower) > 0.5",
        "a merge into bf16 loses most of a small update: it is rounded to nearest",
        "tests/core/test_merging.py",
    ),
    Fault(
        "exact norm",
        "core/functional.py",
        "rows.gain * dm / rows.norm)[:, None]",
        "dm / rows.norm)[:, None]",
        "`norm_grad: exact` trains along another gradient",
        "tests/core/test_forms.py",
    ),
    Fault(
        "streamed blocks that are done",
        "core/wrappers/streaming.py",
        "self._leave(other for other in others if direction > 0 or other.number > number)",
        "self._leave(other for other in others if direction > 0)",
        "the backward pass brings all blocks that wait to the GPU at once",
        "tests/core/wrappers/test_streaming.py",
    ),
    Fault(
        "streamed blocks that were merged",
        "core/wrappers/streaming.py",
        "            if storage._cdata in written:",
        "            if storage._cdata not in written:",
        "images of streamed models come without the adapter that was merged",
        "tests/core/wrappers/test_streaming.py",
    ),
    Fault(
        "experts that are kept whole",
        "core/wrappers/experts.py",
        "options = options._replace(keep_weight=False)",
        "options = options._replace(keep_weight=True)",
        "a step of a mixture keeps W(t) of every expert, and runs out of memory",
        "tests/core/wrappers/test_experts.py",
    ),
    Fault(
        "the order of batched experts",
        "core/wrappers/stand_in.py",
        "return self.product(x[order], GroupedOp(ends, each))[back]",
        "return self.product(x[order], GroupedOp(ends, each))[order]",
        "with experts_implementation batched_mm tokens get the outputs of others",
        "tests/core/wrappers/test_experts.py",
    ),
    Fault(
        "norms of experts",
        "core/wrappers/experts.py",
        "return torch.stack([row_norm(each) for each in W0])",
        "return torch.stack([row_norm(W0[0]) for each in W0])",
        "a fresh adapter of experts changes what the model computes",
        "tests/core/wrappers/test_experts.py",
    ),
    Fault(
        "shared experts",
        "targets/derived.py",
        "is_routed = isinstance(module, ExpertProjection) and not re.search(SHARED, below)",
        "is_routed = isinstance(module, ExpertProjection)",
        "parts text.mlp leaves Inkling's shared experts out",
        "tests/targets/test_vlm_maps.py",
    ),
    Fault(
        "large biases",
        "core/magnitude.py",
        "is_large = bias.abs() > large_bias(dtype) * mean_squares.sqrt()",
        "is_large = bias.abs() > torch.inf * mean_squares.sqrt()",
        "magnitudes over layers with large biases train along a gradient that has lost its digits",
        "tests/core/test_forms.py",
    ),
    Fault(
        "strength of the base's part",
        "core/steps.py",
        "part = gain if adapter.strength == 1 else 1 + adapter.strength * (gain - 1)",
        "part = gain",
        "strengths other than 1 scale the update alone",
        "tests/core/test_strength.py",
    ),
    Fault(
        "unmerge after a cast",
        "core/adapted.py",
        "base.data = base.data.to(self.weight.device, self.weight.dtype)",
        "base.data = base.data.to(self.weight.device)",
        "a model that was cast while merged raises an error in its next pass after unmerge",
        "tests/core/test_merging.py",
    ),
    Fault(
        "dropout in eval mode",
        "core/adapted.py",
        "spec.dropout if self.training else 0.0",
        "spec.dropout",
        "generated images and scores are noisy with adapter.dropout",
        "tests/core/test_dropout.py",
    ),
    Fault(
        "tied weights",
        "core/inject.py",
        "return trained | {id(layer.weight): layer.adaptation.trainable_before for layer in layers}",
        "return trained",
        "a second inject and remove freezes a weight that two modules share",
        "tests/core/test_inject.py",
    ),
    Fault(
        "steps between passes",
        "core/inference.py",
        "found = [STEPS.count()]",
        "found = [0]",
        "validation after a fused optimizer's step scores the weights of before",
        "tests/core/test_inference.py",
    ),
    Fault(
        "padding of embeddings",
        "core/ops.py",
        "padding_idx = -1 if self.padding_idx is None else self.padding_idx",
        "padding_idx = -1",
        "the padding token of an adapted embedding is trained",
        "tests/core/test_other_layers.py",
    ),
)

TASKS = (
    Fault(
        "weights of folders",
        "tasks/diffusion.py",
        "total = (weights * each).sum()",
        "total = each.sum()",
        "`data.folders.weight` has no effect on the gradient",
        "tests/tasks/test_diffusion.py",
    ),
    Fault(
        "Min-SNR of v",
        "tasks/diffusion.py",
        '(snr if prediction == "epsilon" else snr + 1)',
        "snr",
        "models that predict v train with the weights of others, infinite at the last step",
        "tests/tasks/test_diffusion.py",
    ),
    Fault(
        "outside of masks",
        "tasks/diffusion.py",
        "change.mean(dim=1), 1 - counts)",
        "change.mean(dim=1), counts)",
        "`data.mask.outside: base` preserves what it should train",
        "tests/tasks/test_masked_loss.py",
    ),
    Fault(
        "dropped captions",
        "tasks/image_batches.py",
        "< self.config.caption_dropout).tolist()",
        "> self.config.caption_dropout).tolist()",
        "`data.caption_dropout: 0.1` drops 90 % of the captions",
        "tests/tasks/test_image_batches.py",
    ),
    Fault(
        "reference of preferences",
        "tasks/preferences.py",
        "return -by_answer(sums) - reference.to(sums.device), by_answer(counts)",
        "return -by_answer(sums), by_answer(counts)",
        "preferences are trained without a reference, so that the model drifts",
        "tests/tasks/test_preferences.py",
    ),
    Fault(
        "weight of preservation",
        "tasks/preservation.py",
        "preserved_weight=self.config.weight * self._ratio(step)",
        "preserved_weight=self.config.weight",
        "`preserve.weight` counts more or less with the number of class images",
        "tests/tasks/test_preservation.py",
    ),
)

TRAIN = (
    Fault(
        "uneven micro-batches",
        "train/loop.py",
        "correction = (micro_batches * expected / total.divisor).item() if micro_batches > 1 else 1.0",
        "correction = 1.0",
        "accumulated gradients depend on how rows fall into micro-batches",
        "tests/train/test_resume.py",
    ),
    Fault(
        "numbers of micro-batches",
        "train/loop.py",
        "number = step * micro_batches + micro",
        "number = step + micro",
        "with accumulation every batch is trained several times, and the last ones never",
        "tests/train/test_run.py",
    ),
    Fault(
        "interrupted validation",
        "train/loop.py",
        'self.interrupted = state_dict["interrupted"]',
        "self.interrupted = False",
        "a run that was stopped while it validated has one row of scores less",
        "tests/train/test_validation.py",
    ),
    Fault(
        "first steps of the average",
        "train/weights.py",
        "decay = min(self.decay, (1 + step) / (10 + step))",
        "decay = self.decay",
        "the average of a short training is nearly the fresh adapter",
        "tests/train/test_weights.py",
    ),
    Fault(
        "rate of B",
        "train/optim.py",
        "rate *= config.b_lr_ratio",
        "rate *= 1",
        "`optimizer.b_lr_ratio` has no effect",
        "tests/train/test_optim.py",
    ),
    Fault(
        "end of the schedule",
        "train/schedule.py",
        "step - self.warmup, self.steps - self.warmup)",
        "step - self.warmup, self.steps)",
        "with a warm-up the rate does not reach 0",
        "tests/train/test_schedule.py",
    ),
)

SAMPLING = (
    Fault(
        "strength of a second adapter",
        "sampling/generating.py",
        'load(path, strength, f"adapter {number}")',
        'load(path, weights[0][1], f"adapter {number}")',
        "a row with two adapters loads both at the first one's strength",
        "tests/sampling/test_second_adapters.py",
    ),
    Fault(
        "cells of a grid",
        "sampling/contact_sheets.py",
        "rows = [images[start : start + width] for start in range(0, len(images), width)]",
        "rows = [images[start :: len(row_labels)] for start in range(len(row_labels))]",
        "a grid shows images under labels of others",
        "tests/sampling/test_grids.py",
    ),
    Fault(
        "order of seeds",
        "sampling/image_sampler.py",
        "manual_seed(seed) for seed in seeds]",
        "manual_seed(seed) for seed in sorted(seeds)]",
        "seeds 5, 2, 9 of one batch give each other's images",
        "tests/sampling/test_sampling.py",
    ),
    Fault(
        "order of prompts",
        "sampling/image_sampler.py",
        "return [images[index] for index in range(len(items))]",
        "return list(images.values())",
        "images of long and short prompts change places",
        "tests/sampling/test_sampling.py",
    ),
    Fault(
        "strength by part",
        "sampling/strengths.py",
        '{"": 1.0, **dict(strength)}.items()',
        "strength",
        "a strength by part that is scaled leaves the parts without a number at 1",
        "tests/sampling/test_batch.py",
    ),
)

IMAGES = (
    Fault(
        "guidance of Z-Image",
        "models/images/z_image.py",
        '"guidance_scale": guidance - 1',
        '"guidance_scale": guidance',
        "Z-Image's images are guided by one more than the config says",
        "tests/models/images/test_flow_families.py",
    ),
    Fault(
        "tokens of Z-Image",
        "models/images/z_image.py",
        '"max_sequence_length": self.settings.max_tokens,',
        '"max_sequence_length": 512,',
        "`model.z_image.max_tokens` has no effect: prompts are cut at 512",
        "tests/models/images/test_flow_families.py",
    ),
    Fault(
        "steps of klein",
        "models/images/flux2_klein.py",
        "self.patch, self.settings.shift_steps)",
        "self.patch, 50)",
        "`model.flux2_klein.shift_steps` has no effect on the noise that trainings draw",
        "tests/models/images/test_flow_families.py",
    ),
    Fault(
        "precision of the VAE",
        "models/images/vae.py",
        'upcast = dtype.itemsize < 4 and vae.config.get("force_upcast", True)',
        "upcast = False",
        "SDXL's VAE overflows in float16: black images, and latents that are not numbers",
        "tests/models/images/test_vae.py",
    ),
    Fault(
        "a single step",
        "models/images/noise.py",
        " or num_steps == 1:",
        ":",
        "a picture in one step is not a number where the scheduler has a shift_terminal",
        "tests/models/images/test_flow_families.py",
    ),
    Fault(
        "shift of Krea 2 Turbo",
        "models/images/krea2.py",
        "return MU_OF_TURBO",
        "return super().mu(num_tokens, num_steps)",
        "what is distilled draws with the noise levels of the base model",
        "tests/models/images/test_flow_families.py",
    ),
    Fault(
        "padding of prompts",
        "models/images/image_model.py",
        "    return text, mask",
        "    return text, None",
        "captions of a batch change each other: the denoiser reads what fills them up",
        "tests/models/images/test_flow_families.py",
    ),
)

FORMATS = (
    Fault(
        "rsLoRA",
        "formats/tools/peft_config.py",
        'return alpha * rank**0.5 if config.get("use_rslora") else alpha',
        'return alpha * config.get("r", rank) ** 0.5 if config.get("use_rslora") else alpha',
        "rank-stabilised files with a rank_pattern load at 5.66 for PEFT's 2.83",
        "tests/formats/tools/test_peft_settings.py",
    ),
    Fault(
        "alpha by pattern",
        "formats/tools/peft_config.py",
        'found = _of_module(config, "alpha_pattern", path, config.get("lora_alpha"))',
        'found = config.get("lora_alpha")',
        "files with an alpha_pattern load at another scaling than in PEFT",
        "tests/formats/tools/test_peft_settings.py",
    ),
    Fault(
        "adapters combined",
        "formats/algebra/exact.py",
        "e, change = e + t * (g - 1), change",
        "e, change = e + (g - 1), change",
        "dora-mm combine writes another adapter than the sum at these strengths",
        "tests/formats/commands/test_combine.py",
    ),
    Fault(
        "LyCORIS at a strength",
        "formats/tools/kohya.py",
        "return W if strength == 1 else update.V + strength * (W - update.V)",
        "return W if strength == 1 else update.W0 + strength * (W - update.W0)",
        "dora-mm verify calls a file right that kohya draws otherwise at strength 0.5",
        "tests/formats/tools/test_tools.py",
    ),
)

EVAL = (
    Fault(
        "accuracy of VQA",
        "eval/vl/vqa.py",
        "return min(10, 3 * answers.count(prediction)) / 10",
        "return min(3, answers.count(prediction)) / 3",
        "VQA v2 is higher than by the official script",
        "tests/eval/vl/test_vqa.py",
    ),
    Fault(
        "similarity of ANLS",
        "eval/vl/anls.py",
        "int((1 - LEAST) * length)",
        "length",
        "DocVQA is higher than on the evaluation site",
        "tests/eval/vl/test_metric_rules.py",
    ),
    Fault(
        "relaxed accuracy",
        "eval/vl/relaxed.py",
        "return abs(found - wanted) / abs(wanted) <= TOLERANCE",
        "return abs(found - wanted) <= TOLERANCE",
        "ChartQA counts numbers within 5 % as wrong",
        "tests/eval/vl/test_metric_rules.py",
    ),
    Fault(
        "variance over runs",
        "eval/statistics.py",
        "if S == 1 or not over_runs:",
        "if True:",
        "comparisons of trainings have intervals that are too narrow",
        "tests/eval/test_statistics.py",
    ),
)

FAULTS = (*CORE, *TASKS, *TRAIN, *SAMPLING, *IMAGES, *FORMATS, *EVAL)
