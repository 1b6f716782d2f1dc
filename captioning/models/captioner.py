"""The captioner: frozen timm encoder, linear projector, GPT-2 with LoRA.

The sequence is ``[projected image tokens | BOS caption EOS]`` with one shared position index and causal attention, so
the image part, the prefix, does not depend on the caption. In training all captions of an image follow one prefix,
each sees the prefix and itself, and positions restart after the prefix (`Captioner.loss`). In search the prefix's keys
and values are computed once for all beams (`Captioner.step_function`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from captioning.kernels.attention_route import AUTO, MASK, PACKED, ROUTES, attention_route
from captioning.kernels.casts import cast_lora
from captioning.kernels.packed_attention import can_attend_packed
from captioning.kernels.packing import Packing
from captioning.models.encoder import build_encoder, build_transform
from captioning.models.step_functions import StepFunction
from captioning.tensors import LinkedAttentions, copy_exactly, difference, fingerprint, write_tensors
from decoder import (
    Decoder,
    LoraConfig,
    gpt2_state_dict,
    lora_state_dict,
    mark_trainable,
    merge_lora,
    refuse_merged,
)

ATTENTION = ROUTES  # how captions after one image attend in training
SEARCH_RULES = ("beam", "report")  # transformers' beam search; the report's own (inference.report_rule)


@dataclass(frozen=True)
class CaptionerConfig:
    """What rebuilds a captioner around a decoder; stored in every adapter file.

    Attributes:
        encoder: timm model name.
        encoder_kwargs: further arguments of ``timm.create_model``.
        encoder_weights: local file, None for timm's own weights, or ``random``.
        use_cls: whether the encoder's prefix tokens (CLS, registers) go to the decoder too.
        encoder_layer: which layer feeds the projector: -1 is the last, after its norm; -2 the one before, and so on.
        lora: the decoder's LoRA.
        encoder_hash, decoder_hash: fingerprints of the frozen weights that the adapter was trained on.
        search_rule: one of SEARCH_RULES, by which captions are searched unless another is asked for.
        pool: the decoder gets averages of so many x so many neighbouring patches; 1 is every patch.

    Raises:
        ValueError: there is no such search rule, or ``pool`` is below 1.
    """

    encoder: str
    encoder_kwargs: Mapping[str, Any] = field(default_factory=dict)
    encoder_weights: str | None = None
    use_cls: bool = True
    lora: LoraConfig = field(default_factory=LoraConfig)
    encoder_hash: str = ""
    decoder_hash: str = ""
    encoder_layer: int = -1
    search_rule: str = "beam"
    pool: int = 1

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise ValueError(f"pool {self.pool}: must be at least 1")
        if self.search_rule not in SEARCH_RULES:
            raise ValueError(f"search_rule {self.search_rule!r}: choose from {', '.join(SEARCH_RULES)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CaptionerConfig:
        """Rebuild the config from plain JSON values; raises ValueError for keys that it does not know."""
        try:
            values = dict(values)
            return cls(lora=LoraConfig(**values.pop("lora")), **values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the configuration of a captioner: {error}") from error


def pooled_grid(grid: Sequence[int], config: CaptionerConfig) -> tuple[int, int]:
    """Return rows and columns of an encoder's patches after pooling; ValueError where they cannot be divided so."""
    rows, columns = grid
    if rows % config.pool or columns % config.pool:
        fit = [str(n) for n in range(1, min(rows, columns) + 1) if rows % n == columns % n == 0]
        raise ValueError(
            f"--pool {config.pool}: does not divide the {rows} x {columns} patches of {config.encoder}; choose from "
            f"{', '.join(fit)}"
        )
    return rows // config.pool, columns // config.pool


def average(patches: torch.Tensor, grid: tuple[int, int], pool: int) -> torch.Tensor:
    """Return means of ``pool`` x ``pool`` neighbours: (B, rows * columns * pool^2, D), row by row, to ``grid``'s."""
    rows, columns = grid
    return patches.unflatten(1, (rows, pool, columns, pool)).mean((2, 4)).flatten(1, 2)


class Captioner(nn.Module):
    """Frozen encoder, trained projector, GPT-2 with LoRA.

    Args:
        config: what the captioner is made of; empty fingerprints are filled in, given ones are checked.
        decoder: the decoder, built with ``config.lora``.

    Raises:
        ValueError: the frozen weights are not those that ``config`` has the fingerprints of.
    """

    encoder: Any  # a timm VisionTransformer, whose attributes nn.Module does not declare

    def __init__(self, config: CaptionerConfig, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = build_encoder(config.encoder, config.encoder_weights, config.encoder_kwargs)
        self.transform = build_transform(self.encoder)
        self.decoder = decoder
        self.source: Path | None = None  # the adapter's file, where it has one
        self.attention = AUTO  # one of ATTENTION
        depth = len(self.encoder.blocks)
        if not -depth <= config.encoder_layer < 0:
            raise ValueError(f"--encoder-layer {config.encoder_layer}: {config.encoder} has layers -1 to -{depth}")
        self.grid = pooled_grid(self.encoder.patch_embed.grid_size, config)  # rows and columns of patches, as pooled
        self.n_patches = self.grid[0] * self.grid[1]
        self.n_dropped_tokens: int = 0 if config.use_cls else self.encoder.num_prefix_tokens
        self.feature_shape = (self.encoder.num_prefix_tokens + self.n_patches, self.encoder.num_features)  # (N, D)
        self.n_prefix = self.feature_shape[0] - self.n_dropped_tokens
        if self.n_prefix + 2 > decoder.config.n_positions:
            raise ValueError(
                f"--encoder {config.encoder}: {self.n_prefix} image tokens leave no room for a caption in the "
                f"decoder's context of {decoder.config.n_positions}; --pool 2 makes a quarter of them"
            )
        self.projector = nn.Linear(self.encoder.num_features, decoder.config.n_embd)
        self.config = self._with_fingerprints(config)
        mark_trainable(decoder)

    def _with_fingerprints(self, config: CaptionerConfig) -> CaptionerConfig:
        hashes: dict[str, Any] = {}
        for part, state in (("encoder", self.encoder.state_dict()), ("decoder", gpt2_state_dict(self.decoder))):
            wanted, found = getattr(config, f"{part}_hash"), fingerprint(state)
            if wanted not in ("", found):
                raise ValueError(f"the adapter was trained on another {part} {difference(wanted, found, state)}")
            hashes[f"{part}_hash"] = found
        return replace(config, **hashes)

    def train(self, mode: bool = True) -> Captioner:
        """Set the mode of projector and decoder; the frozen encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @property
    def device(self) -> torch.device:
        """The device of the trained parameters."""
        return self.projector.weight.device

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name: LoRA and projector, nothing else."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return all tokens of the encoder's last layer, after its norm: (B, 3, H, W) to (B, N, D).

        With another ``encoder_layer`` they are that layer's, as LLaVA takes them: without the final norm. With ``pool``
        patches are averaged here, before anything is stored, as the projector is linear: either order is the same.
        """
        tokens = self._tokens(pixels)
        if self.config.pool == 1:
            return tokens
        first = self.encoder.num_prefix_tokens
        return torch.cat([tokens[:, :first], average(tokens[:, first:], self.grid, self.config.pool)], 1)

    def _tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.config.encoder_layer == -1:
            return self.encoder.forward_features(pixels)
        ((patches, prefix),) = self.encoder.forward_intermediates(
            pixels,
            indices=[self.config.encoder_layer],
            norm=False,
            output_fmt="NLC",
            return_prefix_tokens=True,
            intermediates_only=True,
        )
        return torch.cat([prefix, patches], 1)

    def prefix(self, features: torch.Tensor) -> torch.Tensor:
        """Project encoder tokens (B, N, D) to the decoder's width: (B, P, C)."""
        return self.projector(features[:, self.n_dropped_tokens :])

    def loss(
        self, features: torch.Tensor, batch: Any, label_smoothing: float = 0.0, predict_bos: bool = False
    ) -> torch.Tensor:
        """Return the mean next-token loss over all captions of the images; EOS is learned.

        Args:
            features: encoder tokens (B, N, D).
            batch: ``data.PackedBatch`` of the images' captions, (B, S) each.
            label_smoothing: share of the target spread over the vocabulary.
            predict_bos: let the last image token predict BOS, once for each of the image's captions.
        """
        places = batch.places(predict_bos)
        logits, targets = self._predictions(features, batch, places, predict_bos)
        if not predict_bos:
            return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        # All captions of an image have one BOS to predict: the same prediction counts as often as there are captions.
        counts = torch.cat([batch.segments.amax(1, keepdim=True), batch.segments.clamp(max=1)], 1)  # (B, 1 + S)
        counts = counts.flatten()[places]
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
        return (losses * counts).sum() / counts.sum()

    def log_probs(self, features: torch.Tensor, batch: Any, vocab_size: int | None = None) -> torch.Tensor:
        """Return the log-probability of every target that is not padding, row by row: (n,).

        ``vocab_size`` leaves out the ids of a padded output layer from there on.
        """
        logits, targets = self._predictions(features, batch, batch.places())
        return -F.cross_entropy(logits[:, :vocab_size], targets, reduction="none")

    def _predictions(
        self, features: torch.Tensor, batch: Any, places: torch.Tensor, predict_bos: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 logits (n, V) and targets (n,) of all caption positions, row by row, BOS first if wanted."""
        targets = batch.targets
        if predict_bos:
            targets = torch.cat([batch.inputs[:, :1], targets], 1)  # every row of inputs begins with BOS
        with cast_lora(self.decoder):
            hidden = self.decoder(*self._packed_sequence(features, batch), last=targets.shape[1])  # (B, S or S + 1, C)
            kept = hidden.flatten(0, 1).index_select(0, places)  # the wide output layer runs on these only
            return self.decoder.logits(kept).float(), targets.flatten()[places]

    def _packed_sequence(
        self, features: torch.Tensor, batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | Packing]:
        """Return embeddings (B, P+S, C), positions (B, P+S) and mask of ``[prefix | captions]``."""
        prefix, n = self.prefix(features), self.n_prefix
        if batch.longest is not None:
            self.decoder.check_position(n + batch.longest - 1)
        x = torch.cat([prefix, self.decoder.embed(batch.inputs).to(prefix.dtype)], 1)
        positions = batch.positions_with_prefix(n)
        return x, positions, batch.mask_with_prefix(n) if batch.slots is None else self.packing(batch)

    def packing(self, batch: Any) -> Packing:
        """Return where the captions of a ``data.PackedBatch`` are, and how they attend."""
        n, length = self.n_prefix, batch.inputs.shape[1]
        return Packing(n, batch.slots, length, lambda: batch.mask_with_prefix(n), self.attention)

    def attention_route(self, asked: str, dtype: torch.dtype, batch: Any = None) -> str:
        """Return how captions attend from here on, ``packed`` or ``mask``.

        Args:
            asked: one of ATTENTION.
            dtype: of matrix products.
            batch: a ``data.PackedBatch`` on the captioner's device, of the shape for which ``auto`` is to be fast.

        Raises:
            ValueError: ``packed`` was asked for, and there is no kernel for it.
        """
        if asked == MASK:
            return MASK
        heads, width = self.decoder.config.n_head, self.decoder.config.n_embd
        if asked == AUTO:
            packing = None if batch is None else self.packing(batch)
            return attention_route(self.device, dtype, width // heads, packing, heads)
        if not can_attend_packed(self.device, dtype, width // heads):
            raise ValueError(
                f"--attention packed: no kernel for heads of {width // heads} in {dtype} on {self.device}; leave it out"
            )
        return PACKED

    @torch.no_grad()
    def step_function(self, features: torch.Tensor, beam_size: int, max_new_tokens: int) -> StepFunction:
        """Read the images (B, N, D) once and return the step function that ``search`` calls for each new token.

        Raises:
            ValueError: prefix and caption do not fit into the decoder's context.
        """
        return StepFunction(self.decoder, self.prefix(features), beam_size, max_new_tokens)

    @property
    def patch_columns(self) -> torch.Tensor:
        """Which positions of the prefix are image patches, as a CLS token is not: (n_patches,)."""
        return torch.arange(self.n_prefix - self.n_patches, self.n_prefix)

    def attend(
        self, features: torch.Tensor, tokens: Sequence[int], all_rows: bool = False, linked: bool = False
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Read one finished caption after its image and return where it looked.

        The image's rows take the fused path into the cache, and only the caption's rows the slow one, unless all are
        wanted. Where gradients are on, they flow from each row's logits to that row's weights, and to no other row's.

        Args:
            features: encoder tokens of one image, (1, N, D).
            tokens: BOS and the T ids of the caption.
            all_rows: return the rows of the whole sequence, S = P + T + 1.
            linked: with all rows, let gradients flow from row to row too.

        Returns:
            Attention weights (1, nh, T + 1 or S, S) of every layer, and the logits (T + 1, V) of the caption's rows.
        """
        ids = torch.tensor([list(tokens)], device=features.device)
        count, total = self.n_prefix, self.n_prefix + len(tokens)
        attentions: list[torch.Tensor] = LinkedAttentions() if linked else []
        prefix = self.prefix(features)
        if all_rows:
            x = torch.cat([prefix, self.decoder.embed(ids).to(prefix.dtype)], 1)
            hidden = self.decoder(x, torch.arange(total), attentions=attentions)[:, count:]
        else:
            with torch.no_grad():
                cache = self.decoder.new_cache(1, total)
                self.decoder(prefix, torch.arange(count), cache=cache)
            hidden = self.decoder(
                self.decoder.embed(ids), torch.arange(count, total), cache=cache, attentions=attentions
            )
        return attentions, self.decoder.logits(hidden)[0]

    def read_out(self, hidden: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        """Return what hidden states (n, C) of any layer say of ``tokens``: logits (n, T), from their vocabulary's mean.

        LoRA on the output layer must be merged.
        """
        weight = (self.decoder.lm_head or self.decoder.wte).weight
        return self.decoder.ln_f(hidden) @ (weight[list(tokens)] - weight.mean(0)).T

    def ask(self, prefix: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        """Read a caption after each of several prefixes (B, P, C); return the logits (B, T, V) that predict it.

        ``tokens`` are BOS and the T ids. Gradients flow from every row to the prefix.
        """
        ids = torch.tensor([list(tokens[:-1])], device=prefix.device)
        x = torch.cat([prefix, self.decoder.embed(ids).to(prefix.dtype).expand(len(prefix), -1, -1)], 1)
        return self.decoder.logits(self.decoder(x, torch.arange(x.shape[1]), last=ids.shape[1]))

    def merge(self) -> Captioner:
        """Fold LoRA into the decoder for inference; there is no way back."""
        merge_lora(self.decoder)
        return self.eval()

    # The adapter file: LoRA and projector tensors, and the config as JSON in the header.

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the adapter file."""
        state = {f"decoder.{k}": v for k, v in lora_state_dict(self.decoder).items()}
        state |= {f"projector.{k}": v for k, v in self.projector.state_dict().items()}
        return state

    def save_adapter(self, path: str | os.PathLike) -> None:
        """Write LoRA, projector and config to ``path`` (safetensors), atomically."""
        state = {k: v.float() for k, v in self.adapter_state().items()}
        write_tensors(path, state, {"captioner": json.dumps(asdict(self.config))})

    def load_adapter_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy an adapter's tensors; ValueError if LoRA is merged, or names and shapes do not match exactly."""
        refuse_merged(self.decoder, "load an adapter")
        remedy = "build the captioner with the encoder, decoder and LoRA options that the adapter was trained with"
        copy_exactly(self.adapter_state(), state, "the adapter does not fit this captioner", remedy)
