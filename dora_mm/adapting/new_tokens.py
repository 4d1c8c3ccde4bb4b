"""New tokens of a training: where their rows start, up to which step they are trained, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dora_mm.adapting.networks import TrainedNetworks
from dora_mm.config.adapter import EACH_TEXT_ENCODER, AdapterConfig
from dora_mm.config.images import CaptionConfig, ImageTrainConfig, TokenConfig
from dora_mm.config.paths import resolve_path
from dora_mm.data.images.folder import CaptionedImage, contains_word
from dora_mm.data.images.wording import all_unchanged
from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.tokens import BUNDLE
from dora_mm.models.images.image_model import ImageModel
from dora_mm.models.images.new_tokens import check_rows, read_tokens
from dora_mm.utils.randomness import generator

NUM_TOKENS = 2  # of a word, where a config does not say how many
Configs = Mapping[str, TokenConfig]


def check_tokens(
    tokens: Configs,
    model: type[ImageModel] | ImageModel,
    images: Sequence[CaptionedImage],
    captions: CaptionConfig | None,
) -> None:
    """Checks that words can be new tokens, and that captions have them: others would never be trained.

    Args:
        tokens: The `tokens` section.
        model: The model, or its class.
        images: The images that are trained on.
        captions: The `data.captions` section.

    Raises:
        ValueError: The family has no new tokens, or no caption has a word.
    """
    if tokens and not model.token_tables:
        raise ValueError(f"tokens: {model.title} has no new tokens here: leave {next(iter(tokens))} a plain word")
    texts = [text for image in images for text in all_unchanged(image, captions)]
    for word in tokens:
        if not any(contains_word(text, word) for text in texts):
            raise ValueError(f"tokens: no caption has the word {word}, so it would never be trained: {texts[0]!r}")


def start_tokens(
    tokens: Configs,
    model: ImageModel,
    images: Sequence[CaptionedImage],
    captions: CaptionConfig | None,
    seed: int,
) -> None:
    """Checks and adds the new tokens of a config: see `check_tokens` and `add_tokens`."""
    check_tokens(tokens, model, images, captions)
    add_tokens(tokens, model, seed)


def add_tokens(tokens: Configs, model: ImageModel, seed: int) -> None:
    """Gives a model the new tokens of a config, where they start.

    Args:
        tokens: The `tokens` section.
        model: The model, whose text encoders are not adapted yet.
        seed: Rows without `init` are sampled from the seed, their word and their table.

    Raises:
        ValueError: A word is a token already, or the words that one starts as are not as many.
    """
    for word, config in tokens.items():
        rows = {table: _start(word, config, model, table, seed) for table in model.token_tables}
        model.new_tokens.add(word, {table: values.to(model.device) for table, values in rows.items()})


def _start(word: str, config: TokenConfig, model: ImageModel, table: str, seed: int) -> Tensor:
    """The rows (N, D) that a word starts as, in float32."""
    tokenizer = model.components[model.token_tables[table].replace("text_encoder", "tokenizer")]
    if {word, f"{word}</w>"} & tokenizer.get_vocab().keys():
        raise ValueError(
            f"tokens: {word} is a token of the model already: take a word that it does not know, such as TOK"
        )
    weight = model.token_table(table).weight.detach().float()
    if config.init is not None:
        ids = tokenizer(config.init, add_special_tokens=False).input_ids
        if len(ids) != (config.count or max(len(ids), 1)):
            wanted = f"and count is {config.count}: leave count out" if ids else "so nothing can start as it"
            raise ValueError(f"tokens.{word}: init {config.init!r} has {len(ids)} tokens, {wanted}")
        return weight[ids].clone()
    stream = generator(seed, 0, f"new token {word} of {table}")
    normal = torch.randn(config.count or NUM_TOKENS, weight.shape[1], generator=stream)
    length = weight.norm(dim=1).mean().cpu()
    return normal * (length / normal.norm(dim=1, keepdim=True))


def train_tokens(tokens: Configs, model: ImageModel, trained: TrainedNetworks) -> None:
    """Makes the rows of new tokens trainable, in addition to the adapters."""
    rows = model.new_tokens.by_word()
    for word, config in tokens.items():
        for table, parameter in rows[word].items():
            name = f"{BUNDLE}{word}.{table}"  # as files call it, since checkpoints are files of adapters
            parameter.requires_grad_()
            trained.parameters[name] = parameter
            if config.lr:
                trained.rates[name] = config.lr


def token_networks(tokens: Configs, model: ImageModel) -> dict[str, nn.Module]:
    """The module with the embedding rows of new tokens, by name; empty without new tokens."""
    return {"new_tokens": model.new_tokens} if tokens else {}


def load_initial_tokens(tokens: Configs, model: ImageModel, config: AdapterConfig) -> None:
    """Starts new tokens as the rows in `adapter.init_from`, as far as it has them.

    Args:
        tokens: The `tokens` section.
        model: The model, with the new tokens.
        config: The `adapter` section.

    Raises:
        ValueError: The file has new tokens that the config does not train, or another number of them.
    """
    assert config.init_from is not None
    file = AdapterFile(resolve_path(config.init_from, "adapter.init_from"))
    found, own = read_tokens(file), model.new_tokens.by_word()
    for word, rows in found.items():
        count = len(next(iter(rows.values())))
        if word not in tokens:
            raise ValueError(
                f"adapter.init_from: {file.path} has the new token {word}: set tokens={{{word}: {{count: {count}}}}}"
            )
        check_rows({word: rows}, model.token_widths, file.path)
        if count != model.new_tokens.counts[word]:
            raise ValueError(
                f"adapter.init_from: {file.path} has {count} rows of {word}: set tokens.{word}.count={count}"
            )
        for table, values in rows.items():
            own[word][table].data.copy_(values)


def stopping(config: ImageTrainConfig, trained: Mapping[str, nn.Parameter]) -> Callable[[int], None] | None:
    """A callback before each step that freezes new tokens and text encoders after their last step; None: not needed.

    Without a gradient no optimizer changes a parameter, not even by weight decay.

    Args:
        config: The `train` section.
        trained: The trained parameters by name.
    """
    last = {BUNDLE: config.stop_tokens_after, EACH_TEXT_ENCODER: config.stop_text_encoders_after}
    stops = {
        parameter: steps
        for name, parameter in trained.items()
        for start, steps in last.items()
        if steps is not None and name.startswith(start)
    }

    def freeze(step: int) -> None:
        for parameter, steps in stops.items():
            parameter.requires_grad_(step < steps)

    return freeze if stops else None


def tokens_lines(tokens: Configs, model: ImageModel, config: ImageTrainConfig, rate: float) -> list[str]:
    """A line of the dry run on the new tokens; none without."""
    found = []
    for word, rows in model.new_tokens.by_word().items():
        size = sum(values.numel() * values.element_size() for values in rows.values())
        tables = " and ".join(f"{values.shape[1]} of {table}" for table, values in rows.items())
        start = tokens[word].init
        about = f"start as {start!r}" if start else "start at random"
        until = f", trained for {config.stop_tokens_after:,} steps" if config.stop_tokens_after else ""
        found.append(
            f"tokens    {word}: {model.new_tokens.counts[word]} new tokens x ({tables}), {size:,} bytes, "
            f"lr {tokens[word].lr or rate:.4g}, {about}{until}"
        )
    return found
