"""Encodes what SDXL reads: prompts, sizes (micro-conditioning) and images. No other file does this.

A prompt of any length is cut into chunks that fit the text encoders: 75 tokens in SDXL, with one token before and one
after them. The chunks are encoded separately and their embeddings joined, as A1111, ComfyUI and kohya do.

Words may have weights, as in A1111: the embeddings of their tokens are multiplied, and then all of a chunk by one
number that gives them the mean that they had, of each encoder.

A `model` here is anything with the parts of SDXL as attributes: an `SDXL`, or diffusers' own pipeline.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers.utils.torch_utils import get_module_execution_device

from dora_mm.data.syntax import Chunks, WeightedText, Wording
from dora_mm.models.images.new_tokens import NewTokens
from dora_mm.models.images.vae import posterior_of

Token = tuple[int, float]  # the id, and the weight
COMMA_TOKENS = 20  # a chunk ends after a comma among its last 20 tokens, as in A1111; kohya cuts at the 75th token
LONGEST_CHUNK = 1024  # tokens; those of SDXL have 77


def num_chunks(model: Any, prompt: Wording) -> int:
    """The number of chunks that a prompt takes; one for up to 75 tokens, and for the empty prompt."""
    return max(len(_chunks(model, tokenizer, prompt)) for tokenizer in _tokenizers(model))


def tokenize(
    model: Any, prompts: Sequence[Wording], num_chunks: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenizes prompts for both text encoders; the two tokenizers pad differently.

    A chunk ends after the last comma of its last 20 tokens, or else between two words.

    Args:
        model: The model, or its pipeline, whose tokenizers are used.
        prompts: B prompts of any length.
        num_chunks: The number of chunks N; shorter prompts are filled up with chunks of the empty prompt, as in A1111.
            None takes that of the longest prompt.

    Returns:
        Token ids (B, N L) for text encoder 1 and for text encoder 2; L is the tokenizer's maximum length, 77 in SDXL.
        Those of new tokens are negative (see `NewTokens`).

    Raises:
        ValueError: A prompt has more than `num_chunks` chunks; or the tokenizers have no common length of a chunk.
    """
    tokenizers = _tokenizers(model)
    chunks = [[_chunks(model, tokenizer, prompt) for prompt in prompts] for tokenizer in tokenizers]
    longest = max(len(each) for of_one in chunks for each in of_one)
    if num_chunks is not None and longest > num_chunks:
        raise ValueError(f"A prompt has {longest} chunks of tokens, and only {num_chunks} are asked for.")
    count = num_chunks or longest
    ids, ids_2 = (
        torch.tensor([[token for token, _ in _padded(tokenizer, each, count)] for each in of_one])
        for tokenizer, of_one in zip(tokenizers, chunks, strict=True)
    )
    return ids, ids_2


def _tokenizers(model: Any) -> tuple[Any, Any]:
    """Both tokenizers, which have one length of a chunk; a length without room for a token would never end."""
    tokenizers = (model.tokenizer, model.tokenizer_2)
    lengths = [tokenizer.model_max_length for tokenizer in tokenizers]
    if len(set(lengths)) > 1 or not all(isinstance(each, int) and 2 < each <= LONGEST_CHUNK for each in lengths):
        raise ValueError(
            f"model.path: the tokenizers of {tokenizers[0].name_or_path} and {tokenizers[1].name_or_path} have a "
            f"model_max_length of {lengths[0]!r:.30} and {lengths[1]!r:.30} in tokenizer_config.json: SDXL has 77 "
            "in both"
        )
    return tokenizers


def _chunks(model: Any, tokenizer: Any, prompt: Wording) -> list[list[Token]]:
    """The tokens of a prompt in chunks, without those before and after each; one empty chunk for no tokens."""
    parts: Chunks = (((prompt, 1.0),),) if isinstance(prompt, str) else prompt
    new_tokens = getattr(model, "new_tokens", None)  # diffusers' pipeline has none
    return [chunk for pieces in parts for chunk in _chunks_of_part(tokenizer, pieces, new_tokens)]


def _chunks_of_part(
    tokenizer: Any, pieces: Sequence[WeightedText], new_tokens: NewTokens | None
) -> Iterator[list[Token]]:
    """The chunks of what stands between two BREAKs."""
    ids, words, weights = [], [], []

    def take(found: list[int], of_words: Sequence[int], weight: float) -> None:
        first = words[-1] + 1 if words else 0
        ids.extend(found)
        words.extend(first + word for word in of_words)
        weights.extend([weight] * len(found))

    for full_text, weight in pieces:
        for text, behind in new_tokens.pieces(full_text) if new_tokens else [(full_text, [])]:
            encoded = tokenizer(text, add_special_tokens=False, verbose=False)
            take(encoded.input_ids, encoded.word_ids(), weight)
            take(behind, [0] * len(behind), weight)
    size, comma = tokenizer.model_max_length - 2, tokenizer.convert_tokens_to_ids(",</w>")
    while len(ids) > size:
        end = _end_of_chunk(ids, words, size, comma)
        yield list(zip(ids[:end], weights[:end], strict=True))
        ids, words, weights = ids[end:], words[end:], weights[end:]
    yield list(zip(ids, weights, strict=True))


def _end_of_chunk(ids: list[int], words: list[int], size: int, comma: int) -> int:
    """The index to cut at: after a comma close to the end, else between words, else (in one long word) `size`."""
    commas = (end for end in range(size, max(size - COMMA_TOKENS, 0), -1) if ids[end - 1] == comma)
    gaps = (end for end in range(size, 0, -1) if words[end] != words[end - 1])
    return next(commas, 0) or next(gaps, size)


def _padded(tokenizer: Any, chunks: list[list[Token]], count: int) -> list[Token]:
    """The tokens of `count` chunks, each with those before and after it, and padded to the maximum length."""
    size, padding = tokenizer.model_max_length - 2, tokenizer.pad_token_id
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    filled = [*chunks, *([[]] * (count - len(chunks)))]
    after = [(end, 1.0), *[(padding, 1.0)] * size]
    return [token for chunk in filled for token in ((start, 1.0), *chunk, *after[: size + 1 - len(chunk)])]


def encode_tokens(model: Any, ids: torch.Tensor, ids_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes token ids with both text encoders, one chunk after the other.

    Args:
        model: The model, or its pipeline, whose text encoders are used.
        ids: Token ids for text encoder 1 (B, N L): N chunks of the tokenizer's maximum length, or one that is shorter.
        ids_2: Token ids for text encoder 2 (B, N L).

    Returns:
        The prompt embeddings (B, N L, D1 + D2), which are the penultimate hidden states of both encoders concatenated,
        and the pooled embedding (B, P), which is that of encoder 2 for the first chunk.
    """
    encoder, encoder_2 = model.text_encoder, model.text_encoder_2
    device, device_2 = get_module_execution_device(encoder), get_module_execution_device(encoder_2)
    embeddings, pooled = [], []
    length = model.tokenizer.model_max_length
    for chunk, chunk_2 in zip(ids.split(length, dim=1), ids_2.split(length, dim=1), strict=True):
        with (
            _with_new_tokens(model, encoder, "clip_l", chunk) as known,
            _with_new_tokens(model, encoder_2, "clip_g", chunk_2) as known_2,
        ):
            output = encoder(known.to(device), output_hidden_states=True)
            output_2 = encoder_2(known_2.to(device_2), output_hidden_states=True)
        embeddings.append(torch.cat([output.hidden_states[-2], output_2.hidden_states[-2]], dim=-1))
        pooled.append(output_2.text_embeds)
    return torch.cat(embeddings, dim=1), pooled[0]


def _with_new_tokens(model: Any, encoder: Any, table: str, ids: torch.Tensor) -> AbstractContextManager[torch.Tensor]:
    """A context in which an encoder looks up new tokens, too; it yields the ids to call the encoder with."""
    new_tokens = getattr(model, "new_tokens", None)
    return new_tokens.appended(encoder.get_input_embeddings(), table, ids) if new_tokens else nullcontext(ids)


def encode_prompts(
    model: Any, prompts: Sequence[Wording], num_chunks: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenizes and encodes prompts; takes what `tokenize` takes, and returns what `encode_tokens` returns."""
    return encode_tokens(model, *tokenize(model, prompts, num_chunks))


def _weigh(model: Any, embeddings: torch.Tensor, prompt: Chunks, num_chunks: int) -> torch.Tensor:
    """The embeddings (1, N L, D1 + D2) of a prompt with the weights of its words.

    Source: `EmphasisOriginal` in A1111 1.10, modules/sd_emphasis.py; the pooled embedding has no weights there, either.
    """
    width, length = model.text_encoder.config.hidden_size, model.tokenizer.model_max_length
    weighed = []
    for tokenizer, columns in (
        (model.tokenizer, embeddings[..., :width]),
        (model.tokenizer_2, embeddings[..., width:]),
    ):
        tokens = _padded(tokenizer, _chunks(model, tokenizer, prompt), num_chunks)
        weights = torch.tensor([weight for _, weight in tokens], device=columns.device)[None, :, None]
        chunks = zip(columns.float().split(length, dim=1), weights.split(length, dim=1), strict=True)
        weighed.append(torch.cat([_weighed(*chunk) for chunk in chunks], dim=1))
    return torch.cat(weighed, dim=-1).to(embeddings.dtype)


def _weighed(embeddings: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if (weights == 1).all():  # to the last bit
        return embeddings
    multiplied = embeddings * weights
    return multiplied * (embeddings.mean() / multiplied.mean())


def _encode_one(model: Any, prompt: Wording, num_chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings, pooled = encode_prompts(model, [prompt], num_chunks)
    return embeddings if isinstance(prompt, str) else _weigh(model, embeddings, prompt, num_chunks), pooled


@torch.no_grad()
def encode_for_pipeline(model: Any, prompt: Wording, negative_prompt: Wording | None = None) -> dict[str, torch.Tensor]:
    """Encodes one image's prompts as StableDiffusionXLPipeline takes them: `pipe(**encode_for_pipeline(...))`.

    The embeddings of a prompt and of a negative prompt are equally long: the shorter one is filled up with chunks of
    the empty prompt.

    Args:
        model: The model, or its pipeline.
        prompt: A prompt of any length, or its pieces with weights.
        negative_prompt: None is SDXL's zero embedding (`force_zeros_for_empty_prompt`); "" is the encoded empty text.

    Returns:
        `prompt_embeds` and `negative_prompt_embeds` (1, N L, D), `pooled_prompt_embeds` and
        `negative_pooled_prompt_embeds` (1, P). What other images of a batch have, with the same N, is concatenated.
    """
    given = [prompt] if negative_prompt is None else [prompt, negative_prompt]
    count = max(num_chunks(model, text) for text in given)
    encoded = [_encode_one(model, text, count) for text in given]
    embeddings, pooled = encoded[0]
    if negative_prompt is None:
        encoded.append((torch.zeros_like(embeddings), torch.zeros_like(pooled)))
    negative, negative_pooled = encoded[1]
    return {
        "prompt_embeds": embeddings,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": negative,
        "negative_pooled_prompt_embeds": negative_pooled,
    }


def time_ids(
    original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
) -> torch.Tensor:
    """SDXL's micro-conditioning of one image.

    Args:
        original_size: Height and width of the image before resizing, in pixels.
        crop_top_left: Top and left of the crop within the resized image, in pixels.
        target_size: Height and width of the crop, in pixels.

    Returns:
        The six numbers in this order (6,), float32.
    """
    return torch.tensor([*original_size, *crop_top_left, *target_size], dtype=torch.float32)


def encode_images(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The VAE's posterior for a batch of images.

    Args:
        model: The model whose VAE encodes.
        pixels: Images (B, 3, H, W) in [-1, 1].

    Returns:
        Mean and log-variance (B, C, h, w), float32.
    """
    posterior = posterior_of(model.vae, pixels)
    return posterior.mean.float(), posterior.logvar.float()


def normalize_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """(latents - mean) * scaling_factor / std; mean and std only where the VAE's config has them, per channel."""
    mean, std = (_per_channel(vae, name, latents) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        latents = (latents - mean) / std
    return latents * vae.config.scaling_factor


def denormalize_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Inverse of `normalize_latents`: the UNet's latents as the VAE decodes them."""
    mean, std = (_per_channel(vae, name, latents) for name in ("latents_mean", "latents_std"))
    latents = latents / vae.config.scaling_factor
    return latents * std + mean if mean is not None and std is not None else latents


def _per_channel(vae: Any, name: str, like: torch.Tensor) -> torch.Tensor | None:
    values: Any = getattr(vae.config, name, None)
    return None if values is None else torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
