"""VL-BART (Cho et al. 2021, arXiv 2102.02779): BART whose encoder reads pictures beside text.

    text            layernorm_embedding(tokens + positions)                   (B, L, E)
    visual tokens   LN(Linear(features)) + LN(Linear(box)) + image + object   (B, N S, E), beside the text
    dropout, encoder layers, and a decoder that attends to both

B batch, L text tokens, N pictures (2 in NLVR2), S visual tokens a picture (36; 64 frames of a video), D feature
channels, E width. Grid features have no boxes: all four corners and the area are 0, so that term is a learned constant.
The object embedding of token i is the token embedding of `<vis_extra_id_i>`.
"""

# pyright: reportArgumentType=false, reportReturnType=false
# transformers annotates numbers and tokens of a config as None or anything.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart.modeling_bart import BartEncoder, shift_tokens_right
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

NUM_SENTINELS = 100  # <extra_id_i> of the text, and as many <vis_extra_id_i>
SENTINELS = tuple(f"<{kind}_{i}>" for kind in ("extra_id", "vis_extra_id") for i in reversed(range(NUM_SENTINELS)))
BOX = 5  # x1, y1, x2, y2, area
MAX_LOGITS = 2**26  # of a pass over candidates: 256 MB, and as much again for the loss


class VLInputs(NamedTuple):
    """What the encoder reads. The mask is 0 for padding of the text and of the visual tokens (S' after pooling)."""

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor  # (B, L + N S')
    visual_features: Tensor  # (B, N, S, D)


@strict
class VLBartConfig(BartConfig):
    """BartConfig with what VL-BART adds. vocab_size counts the 200 sentinels, which stand last."""

    model_type = "vl_bart"

    feature_dim: int = 2048  # channels of a visual token
    pooled_side: int | None = (
        6  # a grid is max-pooled to this side; None: visual tokens are taken as they come (frames)
    )
    max_images: int = 2

    def validate_visual(self) -> None:
        """Called when one is made, as `strict` has it."""
        for name in ("feature_dim", "pooled_side", "max_images"):
            value = getattr(self, name)
            frames = name == "pooled_side" and value is None
            if not frames and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


class VisualEmbedding(nn.Module):
    """Features of pictures as tokens of the encoder."""

    def __init__(self, config: VLBartConfig):
        super().__init__()
        width = config.d_model
        self.pooled_side = config.pooled_side
        self.feature_embedding = nn.Sequential(nn.Linear(config.feature_dim, width), nn.LayerNorm(width))
        self.box_embedding = nn.Sequential(nn.Linear(BOX, width), nn.LayerNorm(width))
        self.image_embedding = nn.Embedding(config.max_images, width)

    def forward(self, features_BNSD: Tensor, token_embedding: Tensor) -> Tensor:
        """(B, N S', E), S' the tokens after pooling; `token_embedding` (V, E) ends in the visual sentinels."""
        pooled = self.pool(features_BNSD.to(token_embedding.dtype))
        pictures, tokens = pooled.shape[1:3]
        order = token_embedding[-tokens:].flip(0) if tokens <= NUM_SENTINELS else None
        if order is None or pictures > self.image_embedding.num_embeddings:
            raise ValueError(f"VL-BART reads {pictures} x {tokens} visual tokens at most "
                             f"{self.image_embedding.num_embeddings} x {NUM_SENTINELS}.")  # fmt: skip
        images = self.image_embedding.weight[:pictures, None]
        boxes = self.box_embedding(pooled.new_zeros(BOX))
        return (self.feature_embedding(pooled) + boxes + images + order).flatten(1, 2)

    def pool(self, features_BNSD: Tensor) -> Tensor:
        """Each picture's square grid, max-pooled by itself."""
        if self.pooled_side is None:
            return features_BNSD
        batch, pictures, tokens, _ = features_BNSD.shape
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"{tokens} visual tokens are no square grid, which pooling to {self.pooled_side} needs.")
        grid = features_BNSD.flatten(0, 1).mT.unflatten(2, (side, side))
        pooled = F.adaptive_max_pool2d(grid, self.pooled_side)
        return pooled.flatten(2).mT.unflatten(0, (batch, pictures))


class JointEncoder(BartEncoder):
    """BART's encoder over text and visual tokens, side by side. Visual tokens get no positions."""

    def __init__(self, config: VLBartConfig):
        super().__init__(config)
        self.visual_embedding = VisualEmbedding(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, visual_features: Tensor, **kwargs: Any
    ) -> BaseModelOutput:
        """input_ids (B, L); attention_mask (B, L + N S), 0 for padding; visual_features (B, N, S, D)."""
        embedded = self.embed_tokens(input_ids)
        text = self.layernorm_embedding(embedded + self.embed_positions(input_ids))
        visual = self.visual_embedding(visual_features, self.embed_tokens.weight)
        hidden = F.dropout(torch.cat([text, visual], dim=1), self.dropout, self.training)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden, attention_mask=attention_mask)
        for layer in self.layers:
            hidden = layer(hidden, mask, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden)


class VLBart(BartForConditionalGeneration):
    """`save_pretrained` and `from_pretrained` are transformers'."""

    config: Any  # whose numbers are annotated as None or anything
    config_class = VLBartConfig
    _tied_weights_keys = BartForConditionalGeneration._tied_weights_keys

    def __init__(self, config: VLBartConfig):
        super().__init__(config)
        self.model.encoder = JointEncoder(config)
        self.post_init()  # ties the new encoder's tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_features: Tensor | None = None,
        *,
        encoder_outputs: BaseModelOutput | None = None,
        **kwargs: Any,
    ) -> Any:
        """As BART's. attention_mask (B, L + N S) covers text and visual tokens, for the decoder as well."""
        if encoder_outputs is None:
            assert input_ids is not None
            assert attention_mask is not None
            assert visual_features is not None
            encoder_outputs = self.model.encoder(input_ids, attention_mask, visual_features)
        return super().forward(attention_mask=attention_mask, encoder_outputs=encoder_outputs, **kwargs)

    @torch.no_grad()
    def answer_ids(
        self,
        inputs: VLInputs,
        *,
        beams: int = 1,
        max_length: int = 20,
        allowed: Callable[[int, Tensor], list[int]] | None = None,
    ) -> Tensor:
        """(B, <= max_length) token ids, decoded greedily or by beams; `allowed` is `prefix_allowed_tokens_fn`."""
        encoded = self.model.encoder(*inputs)
        settings = GenerationConfig(
            num_beams=beams,
            max_length=min(max_length, self.config.max_position_embeddings),
            do_sample=False,
            early_stopping=beams > 1,
            **special_tokens(self.config),
        )
        found = cast(Any, self).generate(  # of GenerationMixin, whose stub hides it
            generation_config=settings,
            encoder_outputs=encoded,
            attention_mask=inputs.attention_mask,
            prefix_allowed_tokens_fn=allowed,
        )
        assert isinstance(found, Tensor)
        return found

    @torch.no_grad()
    def next_logits(self, inputs: VLInputs, decoder_ids: Sequence[int]) -> Tensor:
        """(B, V) logits of the token after this beginning of every answer."""
        ids = inputs.input_ids.new_tensor([list(decoder_ids)]).expand(len(inputs.input_ids), -1)
        return self(*inputs, decoder_input_ids=ids, use_cache=False).logits[:, -1]

    @torch.no_grad()
    def rank_candidates(self, inputs: VLInputs, candidates: Tensor, max_logits: int = MAX_LOGITS) -> Tensor:
        """(B, C) log likelihoods of the candidate targets (C, T), padded, with one pass of the encoder.

        max_logits: the decoder takes as many candidates at a time as have so many logits, and one at least.
        """
        encoded = self.model.encoder(*inputs).last_hidden_state
        config = self.config
        decoder_ids = shift_tokens_right(candidates, config.pad_token_id, config.decoder_start_token_id)
        chunk = max(1, max_logits // (candidates.shape[1] * config.vocab_size))
        scores = []
        for hidden, mask in zip(encoded, inputs.attention_mask, strict=True):
            parts = []
            for start in range(0, len(candidates), chunk):
                ids, targets = decoder_ids[start : start + chunk], candidates[start : start + chunk]
                logits = self(
                    attention_mask=mask.expand(len(ids), -1),
                    encoder_outputs=BaseModelOutput(last_hidden_state=hidden.expand(len(ids), -1, -1)),
                    decoder_input_ids=ids,
                    use_cache=False,
                ).logits
                parts.append(token_log_likelihood(logits, targets, config.pad_token_id).sum(-1))
            scores.append(torch.cat(parts))
        return torch.stack(scores)


def special_tokens(config: VLBartConfig) -> dict[str, Any]:
    """What decoding begins, ends and pads with, as GenerationConfig names it. What is too long is ended."""
    names = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
    return {**{name: getattr(config, name) for name in names}, "forced_eos_token_id": config.eos_token_id}


def token_log_likelihood(logits_BTV: Tensor, targets_BT: Tensor, pad: int) -> Tensor:
    """(B, T), 0 where the target is padding."""
    losses = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=pad, reduction="none")
    return -losses.view(targets_BT.shape)


# --- which parameters train beside adapters --------------------------------------------------------------------------


def extra_trainable_parameters(model: VLBart, trains: Sequence[str]) -> dict[str, nn.Parameter]:
    """Parameters by name, of these groups.

    visual_embedding; biases and norms (scales) of BART itself; embeddings (tokens, which lm_head shares, positions).
    """
    norms = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.LayerNorm)}

    def group(name: str) -> str | None:
        if ".visual_embedding." in name:
            return "visual_embedding"
        if name.endswith(".bias"):
            return "biases"
        if name in norms:
            return "norms"
        return "embeddings" if name == "model.shared.weight" or ".embed_positions." in name else None

    return {name: parameter for name, parameter in model.named_parameters() if group(name) in trains}
