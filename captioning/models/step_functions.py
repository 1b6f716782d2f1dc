"""What the search calls for each new token: over a shared prefix, and compiled with fixed shapes."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from typing import Any

import torch
import torch.nn.functional as F

from decoder import (
    Decoder,
    KVCache,
)


class SharedPrefix:
    """The step function that ``search`` calls for each new token, over projected images that are read once.

    The cache holds the prefix once an image; beams lie behind it and see their own history by a mask.

    Args:
        decoder: LoRA is best merged.
        prefix: projected image tokens (B, P, C).
        beam_size: live beams an image.
        max_new_tokens: longest caption.

    Raises:
        ValueError: prefix and caption do not fit into the decoder's context.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, prefix: torch.Tensor, beam_size: int, max_new_tokens: int) -> None:
        self.decoder, self.count = decoder, prefix.shape[1]
        room = decoder.config.n_positions - self.count
        if max_new_tokens > room:
            raise ValueError(f"--max-new-tokens {max_new_tokens}: behind {self.count} image tokens only {room} fit")
        self.cache = decoder.new_cache(len(prefix), self.count + beam_size * max_new_tokens)
        decoder(prefix, torch.arange(self.count), cache=self.cache)

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, K, V) behind the newest tokens (B, K), each of which sees its ancestors (B, K, n)."""
        position = torch.tensor([self.count + ancestors.shape[2] // tokens.shape[1] - 1])
        mask = F.pad(ancestors, (self.count, 0), value=True)[:, None]  # (B, 1, K, P + slots)
        hidden = self.decoder(self.decoder.embed(tokens), position, mask, self.cache)
        return self.decoder.logits(hidden)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these images alone, by place in the batch (n,)."""
        self.cache.keep(rows)


class SlotCache(KVCache):
    """A KV cache that can also be written at given slots and read whole, so that shapes never change.

    Its arguments are those of ``KVCache``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slots: torch.Tensor | None = None  # (T,) where the next tokens go; None: behind the filled ones
        for buffer in self.keys + self.values:
            buffer.zero_()  # masked numbers are multiplied by zero, and NaN would stay NaN
            torch._dynamo.mark_static_address(buffer)  # written in place: CUDA graphs must not copy them

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put k, v (B, nh, T, hs) at ``slots`` and return everything, (B, nh, S_max, hs); without slots as ever."""
        if self.slots is None:
            return super().write(layer, k, v)
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.slots, k.to(keys.dtype))
        values.index_copy_(2, self.slots, v.to(values.dtype))
        return keys, values


class CompiledSteps:
    """Step functions for ``search``, compiled once and used for batch after batch.

    Args:
        decoder: LoRA merged; its weights may be cast and packed (``packing.prepare_decoder``).
        batch_size: most images at once.
        prefix: image tokens P.
        beam_size: live beams K an image.
        max_new_tokens: longest caption L.
        backend: of ``torch.compile``.

    Raises:
        ValueError: prefix and caption do not fit into the decoder's context, or there is no compiler.
    """

    @torch.no_grad()
    def __init__(
        self,
        decoder: Decoder,
        batch_size: int,
        prefix: int,
        beam_size: int,
        max_new_tokens: int,
        backend: str = "inductor",
    ) -> None:
        device = decoder.wte.weight.device
        if backend == "inductor":
            check_compiler(device)
        if prefix + max_new_tokens > decoder.config.n_positions:
            room = decoder.config.n_positions - prefix
            raise ValueError(f"--max-new-tokens {max_new_tokens}: behind {prefix} image tokens only {room} fit")
        self.decoder, self.count, self.beams = decoder, prefix, beam_size
        length = prefix + beam_size * max_new_tokens
        like = decoder.new_cache(1, 1).keys[0]  # its type under autocast
        self.cache = SlotCache(decoder.config, batch_size, length, device, like.dtype)
        self.tokens = torch.zeros(batch_size, beam_size, dtype=torch.long, device=device)  # (B, K)
        self.mask = torch.zeros(batch_size, 1, beam_size, length, dtype=torch.bool, device=device)  # (B, 1, K, S_max)
        self.mask[..., :prefix] = True
        self.positions = torch.arange(prefix, prefix + max_new_tokens, device=device)  # (L,)
        self.position = self.positions[:1].clone()
        self.slots = torch.arange(beam_size, device=device)  # (K,)
        mode = "reduce-overhead" if backend == "inductor" and device.type == "cuda" else None
        self._compiled = torch.compile(self._step, fullgraph=True, dynamic=False, backend=backend, mode=mode)

    @torch.no_grad()
    def begin(self, prefix: torch.Tensor) -> CompiledSteps:
        """Read up to B projected images (n, P, C), and return the step function of their captions."""
        images, rows = len(prefix), len(self.mask)
        if images > rows or prefix.shape[1] != self.count:
            raise ValueError(f"compiled for {rows} images of {self.count} tokens, not {tuple(prefix.shape[:2])}")
        filled = torch.cat((prefix, prefix[-1:].expand(rows - images, -1, -1)))
        self.cache.length, self.cache.slots = 0, None
        self.decoder(filled, torch.arange(self.count), cache=self.cache)
        self.mask[..., self.count :] = False
        return self

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        """Return the logits (n, K, V) behind the newest tokens (n, K), each of which sees its ancestors (n, K, s)."""
        images, slots = len(tokens), ancestors.shape[2]
        step = slots // self.beams - 1
        self.tokens[:images] = tokens
        self.mask[:images, 0, :, self.count : self.count + slots] = ancestors
        self.position.copy_(self.positions[step : step + 1])
        torch.arange(self.count + slots - self.beams, self.count + slots, out=self.slots)
        self.cache.slots = self.slots
        return self._compiled(self.tokens, self.position, self.mask)[:images]

    def _step(self, tokens: torch.Tensor, position: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        decoder = self.decoder
        x = decoder.embed(tokens) + decoder.wpe(position)
        for block in decoder.h:
            x = block(x, mask, self.cache, None, x.shape[1])
        return decoder.logits(decoder.ln_f(x))


def check_compiler(device: torch.device) -> None:
    """Raise ValueError where ``torch.compile`` has nothing to compile with."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("--compile needs triton on a GPU: install it, or leave --compile out")
    if device.type != "cuda" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ValueError(
            "--compile needs a C++ compiler (g++, or the one that CXX names); install one, or leave it out"
        )
