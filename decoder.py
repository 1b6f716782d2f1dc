"""GPT-2 (Radford et al., 2019) with LoRA (Hu et al., arXiv 2106.09685), read from top to bottom.

    DecoderConfig, LoraConfig        the shape of a GPT-2; which of its layers LoRA adapts, and how
    LoraLinear … FrozenLinear        the linear layers, with LoRA and without
    KVCache                          keys and values of earlier tokens
    Attention, MLP, Block, Decoder   the network
    mark_trainable … merge_lora      LoRA's tensors: train, save, load, and fold into the weights
    build_decoder … gpt2_state_dict  GPT-2 checkpoints in Hugging Face layout

The decoder knows nothing of images: it maps embeddings, positions and a mask to hidden states. Captioning is fast by
what is passed for the last two. Positions may restart and the mask may be any boolean pattern, so all captions of an
image share one prefix in training, and all beams share it in search, without copies.

Shapes in comments: B batch, T new tokens, S tokens attended to, C width, nh heads, hs = C / nh, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import loralib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioning.checkpoints import read_state_dict, transformers_config
from captioning.kernels.attention_mask import additive_mask
from captioning.kernels.attention_route import takes_packed
from captioning.kernels.casts import cast_frozen, lora_tensors, product_dtype_of
from captioning.kernels.frozen_linear import frozen_linear
from captioning.kernels.packed_attention import PackedAttention
from captioning.kernels.packing import Packing
from captioning.messages import some
from captioning.tensors import LinkedAttentions, copy_exactly

LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # the linear layers of a block, for LoRA to adapt

State = Mapping[str, Tensor]
Mask = Tensor | Packing | None


# ---- Configuration ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a GPT-2; the defaults are GPT-2 small (124 M parameters)."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        """Validate."""
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"decoder {field.name} must be positive, not {getattr(self, field.name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"decoder n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")

    @classmethod
    def from_state_dict(cls, state: State, n_head: int | None = None) -> DecoderConfig:
        """Infer the shape from a GPT-2 state dict in Hugging Face layout.

        The weights do not show the number of heads; it defaults to width / 64, as in every GPT-2 size.

        Raises:
            ValueError: the embeddings are missing, or the width is no multiple of 64 and ``n_head`` is not given.
        """
        state = _plain_keys(state)
        for name in ("wte.weight", "wpe.weight"):
            if name not in state or state[name].ndim != 2:
                raise ValueError(
                    f"the decoder weights hold no matrix {name!r} but {some(state)}; give a GPT-2 state dict"
                )
        vocab_size, n_embd = state["wte.weight"].shape
        if n_head is None and n_embd % 64:
            raise ValueError(f"decoder width {n_embd} is no multiple of 64, so give the number of heads (n_head)")
        n_layer = len({key.split(".")[1] for key in state if key.startswith("h.")})
        return cls(vocab_size, len(state["wpe.weight"]), n_embd, n_layer, n_embd // 64 if n_head is None else n_head)


@dataclass(frozen=True)
class LoraConfig:
    """Which layers get a low-rank update, and how: ``y = W x + (alpha / rank) B A x``.

    loralib's ``alpha`` defaults to 1, so the update is scaled by 1 / rank unless a larger one is given.
    """

    rank: int = 32
    alpha: float = 1.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEARS
    enable_lora: tuple[bool, ...] | None = None  # adapt only these three of query, key, value (MergedLinear)
    lm_head: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        object.__setattr__(self, "targets", tuple(self.targets))  # a list when read back from JSON
        if self.rank < 1:
            raise ValueError(f"--lora-rank must be at least 1, not {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"--lora-alpha must be a positive number, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--lora-dropout must be in [0, 1), not {self.dropout}")
        unknown = sorted(set(self.targets) - set(LINEARS))
        if unknown or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"--lora-targets {self.targets}: choose each of {', '.join(LINEARS)} at most once")
        if not self.targets and not self.lm_head:
            raise ValueError("--lora-targets names no layer and --lora-lm-head is off: nothing is left to adapt")
        if self.enable_lora is not None:
            object.__setattr__(self, "enable_lora", tuple(self.enable_lora))
            self._check_enable_lora(tuple(self.enable_lora))

    def _check_enable_lora(self, enable: tuple[bool, ...]) -> None:
        if len(enable) != 3 or not all(isinstance(on, bool) for on in enable):
            raise ValueError(f"--enable-lora wants three booleans (query, key, value), not {enable}")
        if not any(enable):
            raise ValueError("--enable-lora is false for query, key and value; leave attn.c_attn out instead")
        if "attn.c_attn" not in self.targets:
            raise ValueError("--enable-lora splits attn.c_attn, which --lora-targets does not name")

    @property
    def scaling(self) -> float:
        """The factor alpha / rank of every update."""
        return self.alpha / self.rank

    @property
    def layer_options(self) -> dict[str, Any]:
        """Arguments of loralib's layers.

        Their default ``merge_weights=True`` merges in ``eval()`` and un-merges in ``train()``: weights loaded after
        ``eval()`` would be ignored and the base would drift. Here only ``merge_lora`` merges.
        """
        return {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout, "merge_weights": False}


# ---- Linear layers ---------------------------------------------------------------------------------------------------


class LoraLinear(loralib.Linear):
    """loralib's Linear, its update added to the output by the product itself instead of in two more passes."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        x = x.to(product_dtype_of(x))  # once for both products
        rows = x.reshape(-1, x.shape[-1])
        out = frozen_linear(self, rows)
        if not self.merged:
            a, b = lora_tensors(self)
            low = _scaled(self.lora_dropout(rows) @ a.T, self.scaling)  # (rows, rank)
            out.addmm_(low.to(out.dtype), b.T.to(out.dtype))  # a new tensor that nothing else refers to
        return out.view(*x.shape[:-1], -1)


class MergedLinear(loralib.MergedLinear):
    """loralib's MergedLinear (LoRA on some of the stacked query, key, value), computed without the full update.

    loralib multiplies out the (3C, C) matrix B A in every forward, which costs more than the layer itself; here the
    input goes through A and then B, as in loralib's Linear. The parameters and the result are the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        out = frozen_linear(self, x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        if not self.merged:
            lora_a, lora_b = lora_tensors(self)
            low = (self.lora_dropout(x) @ lora_a.T).chunk(sum(self.enable_lora), dim=-1)  # each (..., rank)
            for rows, a, b in zip(self.enabled_rows(), low, lora_b.chunk(len(low)), strict=True):
                out[..., rows] += _scaled(a @ b.T, self.scaling)
        return out

    def enabled_rows(self) -> list[slice]:
        """The rows of the weight (outputs of the layer) that each enabled group updates."""
        size = self.out_features // len(self.enable_lora)
        return [slice(i * size, (i + 1) * size) for i, on in enumerate(self.enable_lora) if on]


class FrozenLinear(nn.Linear):
    """A linear layer without LoRA: its weight and bias are not trained."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return frozen_linear(self, x)


def _linear(name: str, n_in: int, n_out: int, lora: LoraConfig | None) -> nn.Linear:
    if lora is None or name not in lora.targets:
        return FrozenLinear(n_in, n_out)
    if name == "attn.c_attn" and lora.enable_lora is not None:
        return MergedLinear(n_in, n_out, enable_lora=list(lora.enable_lora), **lora.layer_options)
    return LoraLinear(n_in, n_out, **lora.layer_options)


def _lora_layers(decoder: Decoder) -> Iterator[Any]:
    return (module for module in decoder.modules() if isinstance(module, loralib.LoRALayer))


def _scaled(x: Tensor, scaling: float) -> Tensor:
    return x if scaling == 1 else x * scaling


# ---- The network -----------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of every layer, allocated once at a fixed size and written by position.

    Only the slots below ``length`` are ever read, so setting ``length`` back forgets what came after: one prefix can
    serve several searches. For inference: it keeps the numbers of k and v, not the way they were computed.

    Args:
        config: shape of the decoder.
        batch_size: rows B.
        max_length: slots S_max a row.
        device: where the buffers are.
        dtype: their type; under autocast the autocast type, which ``Decoder.new_cache`` chooses.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (batch_size, config.n_head, max_length, config.n_embd // config.n_head)  # (B, nh, S_max, hs)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.max_length = max_length
        self.length = 0

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k, v (B, nh, T, hs) after the filled slots; return all keys and values so far, (B, nh, length + T, hs).

        ``length`` is left to the decoder, which increases it when all layers have written.

        Raises:
            ValueError: no room for T more tokens, or another batch size than the cache was made for.
        """
        end = self.length + k.shape[2]
        if end > self.max_length:
            raise ValueError(f"the KV cache holds {self.max_length} tokens and {end} are needed; allocate a longer one")
        if k.shape[0] != self.keys[layer].shape[0]:  # copying a batch of 1 would silently broadcast
            raise ValueError(f"the KV cache has {self.keys[layer].shape[0]} rows and the input has {k.shape[0]}")
        self.keys[layer][:, :, self.length : end] = k.detach()
        self.values[layer][:, :, self.length : end] = v.detach()
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these (n,), which move to the front of the same memory; only what is filled is copied."""
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                buffer[: len(rows), :, : self.length] = buffer[rows, :, : self.length]
                buffers[layer] = buffer[: len(rows)]


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: DecoderConfig, layer: int, lora: LoraConfig | None) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.c_attn = _linear("attn.c_attn", config.n_embd, 3 * config.n_embd, lora)
        self.c_proj = _linear("attn.c_proj", config.n_embd, config.n_embd, lora)

    def forward(
        self, x: Tensor, mask: Mask, cache: KVCache | None, attentions: list[Tensor] | None, last: int
    ) -> Tensor:
        """Map (B, T, C) to the last rows, (B, last, C); the arguments are those of ``Decoder.forward``."""
        new = x.shape[1]
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, nh, hs)
        if isinstance(mask, Packing):
            if cache is None and attentions is None and takes_packed(qkv, mask):
                captions_only = last == new - mask.n_prefix
                return self.c_proj(PackedAttention.apply(qkv, mask, captions_only)[:, -last:])
            mask = mask.mask if attentions is not None else mask.additive(qkv.dtype)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        if last < new:
            q, mask = q[:, :, -last:], _last_rows(mask, last, x)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)  # (B, nh, S, hs)
        if attentions is None:
            if mask is not None and mask.dtype != torch.bool:
                mask = mask.to(q.dtype)  # never float32 beside bfloat16, which some kernels misread silently
            # A single query sees all that is cached; is_causal would align it with the first key instead of the last.
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and new > 1)
        else:
            if not isinstance(attentions, LinkedAttentions):
                k, v = k.detach(), v.detach()  # the gradient of a row's weights comes from that row's output only
            weights = attention_weights(q, k, mask)  # (B, nh, T, S)
            attentions.append(weights)
            y = weights.to(v.dtype) @ v
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, nh, T, hs) -> (B, T, C)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Return softmax(scale q k^T) in float32, which no fused kernel returns: (B, nh, T, S), rows sum to 1.

    Without a mask the T queries are the last ones and see causally; ``scale`` defaults to 1 / sqrt(hs). Where gradients
    are on, the result requires one even when no weight does, so that a loss can be traced back to it.
    """
    scores = (q @ k.transpose(-2, -1)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is None:
        mask = _causal(q.shape[-2], k.shape[-2], q.device)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.requires_grad_() if torch.is_grad_enabled() else weights


def _causal(rows: int, total: int, device: torch.device) -> Tensor:
    """What the last rows of a sequence see of it, bool (rows, total): all up to themselves."""
    return torch.ones(rows, total, dtype=torch.bool, device=device).tril(total - rows)


def _last_rows(mask: Tensor | None, last: int, x: Tensor) -> Tensor:
    """Return what the last rows of x (B, T, C) may see, a mask broadcastable to (B, 1, last, T)."""
    if mask is None:
        return _causal(last, x.shape[1], x.device)
    return mask if mask.shape[-2] == 1 else mask[..., -last:, :]


class MLP(nn.Module):
    """The feed-forward half of a block."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None) -> None:
        super().__init__()
        self.c_fc = _linear("mlp.c_fc", config.n_embd, 4 * config.n_embd, lora)
        self.c_proj = _linear("mlp.c_proj", 4 * config.n_embd, config.n_embd, lora)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2 has the tanh form, not erf


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: DecoderConfig, layer: int, lora: LoraConfig | None) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer, lora)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config, lora)

    def forward(
        self, x: Tensor, mask: Mask, cache: KVCache | None, attentions: list[Tensor] | None, last: int
    ) -> Tensor:
        """Map (B, T, C) to the last rows, (B, last, C); the arguments are those of ``Decoder.forward``."""
        x = x[:, x.shape[1] - last :] + self.attn(self.ln_1(x), mask, cache, attentions, last)
        return x + self.mlp(self.ln_2(x))


class Decoder(nn.Module):
    """GPT-2 with random weights, and LoRA where ``lora`` says; parameter names are those of GPT-2 checkpoints.

    The output layer is tied to ``wte``. With ``lora.lm_head`` it is a LoRA layer on the same weight, until a merge
    gives it a weight of its own: merged in place, the update would leak into the input embeddings.
    """

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.lora = lora
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer, lora) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head: nn.Linear | None = None
        if lora is not None and lora.lm_head:
            self.lm_head = LoraLinear(config.n_embd, config.vocab_size, bias=False, **lora.layer_options)
            self.lm_head.weight = self.wte.weight
        init_weights(self)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings (B, T, C) of ids (B, T); positions are added by ``forward``."""
        return self.wte(ids)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Mask = None,
        cache: KVCache | None = None,
        attentions: list[Tensor] | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Return the hidden states (B, T, C) after the last layer norm.

        Args:
            x: embeddings (B, T, C), of tokens or projected image patches.
            positions: long (T,) or (B, T); checked on the CPU, and elsewhere by the caller, as it would take a wait.
            mask: bool, broadcastable to (B, 1, T, S), True where a query may look; every query must see something.
                None is causal. S counts the cached tokens first, then the T new ones. Or a ``Packing``, which is
                faster than its mask where the device has a kernel for it.
            cache: keys and values of earlier tokens; those of x are appended to it.
            attentions: a list to be filled with every layer's attention weights (B, nh, T, S), float32. Slower than
                the fused kernel, and equal to it but for rounding.
            last: return only that many last rows, (B, last, C), and spare the others' work in the last block.

        Raises:
            ValueError: a position beyond the context, a mask that is not boolean, or a full cache.
        """
        if positions.device.type == "cpu":
            self.check_position(int(positions.max()))
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            raise ValueError(f"the attention mask must be boolean (True = visible), not {mask.dtype}")
        new, past = x.shape[1], 0 if cache is None else cache.length
        if mask is None and past and new > 1:
            mask = _causal(new, past + new, x.device)
        x = self.blocks(x + self.wpe(positions.to(x.device)), mask, cache, attentions, last)
        if cache is not None:
            cache.length += new
        return x

    def check_position(self, last: int) -> None:
        """Raise ValueError where a position is beyond the context."""
        if last >= self.config.n_positions:
            raise ValueError(
                f"position {last} is beyond the decoder's context of {self.config.n_positions} tokens; "
                "use shorter captions (--max-new-tokens) or fewer image tokens"
            )

    def blocks(
        self,
        x: Tensor,
        mask: Mask,
        cache: KVCache | None = None,
        attentions: list[Tensor] | None = None,
        last: int | None = None,
    ) -> Tensor:
        """``forward`` after the positions are added and checked: all blocks and the last layer norm."""
        new = x.shape[1]
        last = new if last is None else last
        if isinstance(mask, Tensor) and attentions is None:
            mask = additive_mask(mask, product_dtype_of(x))
        for block in self.h[:-1]:
            x = block(x, mask, cache, attentions, new)
        x = self.h[-1](x, mask, cache, attentions, last if cache is None and attentions is None else new)
        return self.ln_f(x[:, x.shape[1] - last :])

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., V) of hidden states (..., C); expensive, so call it on caption positions only."""
        return frozen_linear(self.wte, hidden) if self.lm_head is None else self.lm_head(hidden)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache on the decoder's device, of autocast's type where autocast is on, else of the weights'."""
        weight = self.wte.weight
        return KVCache(self.config, batch_size, max_length, weight.device, product_dtype_of(weight))

    @property
    def merged(self) -> bool:
        """Whether ``merge_lora`` has folded the updates into the weights."""
        return any(layer.merged for layer in _lora_layers(self))


def init_weights(decoder: Decoder) -> None:
    """Fill the base weights at random as GPT-2 does, and leave LoRA's (loralib: A uniform, B zero).

    Normal with standard deviation 0.02; the layers that write to the residual stream get it divided by the square
    root of their number, 2 n_layer, so that the stream's variance does not grow with depth.
    """
    residual_std = 0.02 / math.sqrt(2 * decoder.config.n_layer)
    for name, parameter in _base_parameters(decoder):
        if parameter.ndim == 1:
            nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)  # layer norms' gain; all biases
        else:
            nn.init.normal_(parameter, std=residual_std if name.endswith("c_proj.weight") else 0.02)


# ---- LoRA's tensors --------------------------------------------------------------------------------------------------


def mark_trainable(decoder: Decoder) -> None:
    """Let gradients reach LoRA's parameters and nothing else of the decoder.

    Raises:
        ValueError: LoRA is merged already, so that training it would change nothing.
    """
    refuse_merged(decoder, "train LoRA")
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_("lora_" in name)


def lora_state_dict(decoder: Decoder) -> dict[str, Tensor]:
    """LoRA's tensors by parameter name (``h.0.attn.c_attn.lora_A``, …): what an adapter file keeps of the decoder."""
    return {name: p.detach() for name, p in decoder.named_parameters() if "lora_" in name}


def load_lora_state_dict(decoder: Decoder, state: State) -> None:
    """Copy LoRA's tensors into the decoder; names and shapes must match exactly.

    Raises:
        ValueError: LoRA is merged already, or the tensors belong to another LoRA layout.
    """
    refuse_merged(decoder, "load LoRA tensors")
    remedy = "build the decoder with the LoRA options (rank, targets, enable_lora, lm_head) that the adapter has"
    copy_exactly(lora_state_dict(decoder), state, "the adapter's LoRA tensors", remedy)


@torch.no_grad()
def merge_lora(decoder: Decoder) -> None:
    """Fold every update into its weight, in place, so that LoRA costs nothing any more; a second call does nothing.

    The sum is taken in float32 whatever the weights' type. There is no way back: rounding would drift.
    """
    cast_frozen(decoder, None)
    for layer in _lora_layers(decoder):
        if layer.merged:
            continue
        merged = _merged_weight(layer).to(layer.weight.dtype)
        if layer.weight is decoder.wte.weight:  # the output layer stops being tied, the embeddings stay as they are
            layer.weight = nn.Parameter(merged, requires_grad=False)
        else:
            layer.weight.copy_(merged)
        layer.merged = True


@contextlib.contextmanager
def merged_copies(decoder: Decoder) -> Iterator[None]:
    """Within, the decoder reads as if LoRA were merged, with copies of its weights in the type that products have.

    They are made now, so nothing is trained within. For searches during training: half the kernels a decode step.
    """
    layers = [layer for layer in _lora_layers(decoder) if not layer.merged]
    before, dtype = [getattr(layer, "cast_weight", None) for layer in layers], product_dtype_of(decoder.wte.weight)
    try:
        with torch.no_grad():
            for layer in layers:
                layer.cast_weight, layer.merged = _merged_weight(layer).to(dtype), True
        yield
    finally:
        for layer, copy in zip(layers, before, strict=True):
            layer.cast_weight, layer.merged = copy, False


def _merged_weight(layer: LoraLinear | MergedLinear) -> Tensor:
    """W + (alpha / rank) B A as a new float32 matrix (out, in)."""
    rows = layer.enabled_rows() if isinstance(layer, MergedLinear) else [slice(None)]
    merged = layer.weight.detach().to(torch.float32, copy=True)
    with torch.autocast(merged.device.type, enabled=False):  # which would round the product to bfloat16
        a, b = layer.lora_A.float().chunk(len(rows)), layer.lora_B.float().chunk(len(rows))
        for i, group in enumerate(rows):
            merged[group] += (b[i] @ a[i]) * layer.scaling
    return merged


def refuse_merged(decoder: Decoder, what: str) -> None:
    """Raise ValueError saying that ``what`` cannot be done if LoRA is merged."""
    if decoder.merged:
        raise ValueError(f"cannot {what} after merge_lora; build the decoder again, and merge last")


# ---- GPT-2 checkpoints -----------------------------------------------------------------------------------------------

_CONV1D = tuple(f"{name}.weight" for name in LINEARS)  # GPT-2 checkpoints store these (in, out)
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, which old checkpoints contain


def build_decoder(
    source: str | os.PathLike | State, lora: LoraConfig | None = None, n_head: int | None = None
) -> Decoder:
    """Build a decoder with the shape and weights of a GPT-2 state dict, and add LoRA.

    The state dict may be given as whatever ``read_state_dict`` reads. What weights do not show, heads and epsilon, is
    taken from transformers' ``config.json`` where one lies with them.

    Raises:
        FileNotFoundError, ValueError: see ``read_state_dict``, ``DecoderConfig.from_state_dict`` and ``load_gpt2``.
    """
    if isinstance(source, Mapping):
        return _build(source, lora, n_head, {})
    state = read_state_dict(source)
    try:
        return _build(state, lora, n_head, transformers_config(source))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _build(state: State, lora: LoraConfig | None, n_head: int | None, known: Mapping[str, Any]) -> Decoder:
    known = known if known.get("model_type") == "gpt2" else {}
    activation = known.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"config.json: activation_function {activation}, and the decoder computes GPT-2's gelu_new")
    shape = DecoderConfig.from_state_dict(state, n_head or known.get("n_head"))
    epsilon = known.get("layer_norm_epsilon", shape.layer_norm_epsilon)
    decoder = Decoder(replace(shape, layer_norm_epsilon=epsilon), lora)
    load_gpt2(decoder, state)
    return decoder


def load_gpt2(decoder: Decoder, state: State) -> None:
    """Copy a GPT-2 state dict in Hugging Face layout into the decoder's base weights; LoRA's stay as they are.

    A ``transformer.`` prefix, the causal-mask buffers and a tied ``lm_head.weight`` are accepted. Matrices of Conv1D
    layers are stored (in, out) and get transposed.

    Raises:
        ValueError: missing or unexpected keys, other shapes, an ``lm_head`` that is not tied, or LoRA merged already.
    """
    refuse_merged(decoder, "load base weights")
    cast_frozen(decoder, None)
    state = _plain_keys(state)
    head = state.pop("lm_head.weight", None)
    if head is not None and not ("wte.weight" in state and torch.equal(head, state["wte.weight"])):
        raise ValueError("lm_head.weight differs from wte.weight; the decoder ties them, as GPT-2 does")
    remedy = "give a GPT-2 state dict in Hugging Face layout (Conv1D weights as (in, out)) of the decoder's size"
    weights = {key: t.T if key.endswith(_CONV1D) and t.ndim == 2 else t for key, t in state.items()}
    copy_exactly(dict(_base_parameters(decoder)), weights, "the decoder weights", remedy)


def gpt2_state_dict(decoder: Decoder, untied: bool = False) -> dict[str, Tensor]:
    """The inverse of ``load_gpt2``: copies of the base weights in Hugging Face layout, without LoRA's tensors.

    After ``merge_lora`` the updates are part of the weights, so that a plain GPT-2 captions like the tuned decoder.
    With ``untied`` a merged output layer is included as ``lm_head.weight``, which ``load_gpt2`` does not take.

    Raises:
        ValueError: the output layer was merged, and without ``untied`` GPT-2's layout has no room for it.
    """
    if decoder.merged and decoder.lm_head is not None and not untied:
        raise ValueError("lm_head is no longer tied to wte after merge_lora; export the decoder before merging")
    return {
        name: (p.detach().T if name.endswith(_CONV1D) else p.detach()).clone(memory_format=torch.contiguous_format)
        for name, p in _base_parameters(decoder)
    }


def _base_parameters(decoder: Decoder) -> Iterator[tuple[str, nn.Parameter]]:
    # A tied lm_head.weight is wte.weight's own Parameter, and named_parameters lists it once, under wte.
    return ((name, p) for name, p in decoder.named_parameters() if "lora_" not in name)


def _plain_keys(state: State) -> dict[str, Tensor]:
    """Strip the prefix that GPT2LMHeadModel adds, and leave out the mask buffers."""
    plain = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    if len(plain) < len(state):
        raise ValueError("the decoder weights hold some keys twice, with and without the prefix 'transformer.'")
    return {key: tensor for key, tensor in plain.items() if not _MASK_BUFFER.fullmatch(key)}
