"""What ``inference.search`` calls for each new token: over a shared prefix, and compiled with fixed shapes.

The prefix, an image's projected tokens, is read once into a KV cache, one row an image. Slot K t + k after it belongs
to beam k's token of step t and is never moved: ``ancestors`` says which slots a beam's own history is in, and is the
attention mask. So beams share the prefix and nothing is copied when they branch.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

import torch
import torch.nn.functional as F

from decoder import Decoder, KVCache


class StepFunction:
    """The step function of a batch of images; its cache holds P + K L slots an image and is read as far as it is full.

    Args:
        decoder: LoRA is best merged.
        prefix: projected image tokens (B, P, C), read at once.
        beam_size: live beams K an image.
        max_new_tokens: longest caption L.

    Raises:
        ValueError: prefix and caption do not fit into the decoder's context.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, prefix: torch.Tensor, beam_size: int, max_new_tokens: int) -> None:
        self.decoder, self.n_prefix = decoder, prefix.shape[1]
        _check_room(decoder, self.n_prefix, max_new_tokens)
        self.cache = decoder.new_cache(len(prefix), self.n_prefix + beam_size * max_new_tokens)
        # Checked above and there already: positions that came from the CPU would wait for the device at every step.
        self.positions = torch.arange(self.n_prefix + max_new_tokens, device=prefix.device)
        decoder(prefix, self.positions[: self.n_prefix], cache=self.cache)

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, K, V) after the newest tokens (B, K), each of which sees its ancestors (B, K, n)."""
        decoder, beams = self.decoder, tokens.shape[1]
        position = self.n_prefix + ancestors.shape[2] // beams - 1
        mask = F.pad(ancestors, (self.n_prefix, 0), value=True)[:, None]  # (B, 1, K, P + n)
        x = decoder.embed(tokens) + decoder.wpe(self.positions[position : position + 1])
        hidden = decoder.blocks(x, mask, self.cache)
        self.cache.length += beams
        return decoder.logits(hidden)

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all images but these, by place in the batch (n,)."""
        self.cache.keep(rows)


class StaticCache(KVCache):
    """A KV cache that can also be written at given slots and read as a whole, so that shapes never change.

    Its arguments are those of ``KVCache``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slots: torch.Tensor | None = None  # (T,) where the next tokens go; None: after the filled ones
        for buffer in self.keys + self.values:
            buffer.zero_()  # masked numbers are multiplied by zero, and NaN would stay NaN
            torch._dynamo.mark_static_address(buffer)  # written in place: CUDA graphs must not copy them

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put k, v (B, nh, T, hs) at ``slots`` and return everything, (B, nh, S_max, hs); without slots as KVCache."""
        if self.slots is None:
            return super().write(layer, k, v)
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.slots, k.to(keys.dtype))
        values.index_copy_(2, self.slots, v.to(values.dtype))
        return keys, values


class CompiledStepFunction:
    """A step function of fixed shapes, compiled once and used for one batch after another.

    All inputs of the compiled step live in buffers: ``tokens`` (B, K), ``mask`` (B, 1, K, P + K L), ``position`` (1,)
    and ``cache.slots`` (K,). A smaller batch fills the first rows, and the rest is computed and thrown away.

    Args:
        decoder: LoRA merged; its weights may be cast (``inference_weights.prepare_decoder`` without reordering).
        batch_size: most images B at once.
        n_prefix: image tokens P.
        beam_size: live beams K an image.
        max_new_tokens: longest caption L.
        backend: of ``torch.compile``.
        graphs: on CUDA, record each step as a graph, which is started at once.

    Raises:
        ValueError: prefix and caption do not fit into the decoder's context, or there is no compiler.
    """

    @torch.no_grad()
    def __init__(
        self,
        decoder: Decoder,
        batch_size: int,
        n_prefix: int,
        beam_size: int,
        max_new_tokens: int,
        backend: str = "inductor",
        graphs: bool = True,
    ) -> None:
        device = decoder.wte.weight.device
        if backend == "inductor":
            check_compiler(device)
        _check_room(decoder, n_prefix, max_new_tokens)
        self.decoder, self.n_prefix, self.beam_size = decoder, n_prefix, beam_size
        length = n_prefix + beam_size * max_new_tokens
        dtype = decoder.new_cache(1, 1).keys[0].dtype  # autocast's, where it is on
        self.cache = StaticCache(decoder.config, batch_size, length, device, dtype)
        self.tokens = torch.zeros(batch_size, beam_size, dtype=torch.long, device=device)
        self.mask = torch.zeros(batch_size, 1, beam_size, length, dtype=torch.bool, device=device)
        self.mask[..., :n_prefix] = True
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.slots = torch.arange(beam_size, device=device)
        mode = "reduce-overhead" if graphs and backend == "inductor" and device.type == "cuda" else None
        self._compiled = torch.compile(self._step, fullgraph=True, dynamic=False, backend=backend, mode=mode)

    @torch.no_grad()
    def begin(self, prefix: torch.Tensor) -> CompiledStepFunction:
        """Read up to B projected images (n, P, C), and return the step function of their captions."""
        images, rows = len(prefix), len(self.mask)
        if images > rows or prefix.shape[1] != self.n_prefix:
            raise ValueError(f"compiled for {rows} images of {self.n_prefix} tokens, not {tuple(prefix.shape[:2])}")
        filled = torch.cat((prefix, prefix[-1:].expand(rows - images, -1, -1)))
        self.cache.length, self.cache.slots = 0, None
        self.decoder(filled, torch.arange(self.n_prefix, device=prefix.device), cache=self.cache)
        self.mask[..., self.n_prefix :] = False
        return self

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        """Return the logits (n, K, V) after the newest tokens (n, K), each of which sees its ancestors (n, K, s)."""
        images, end = len(tokens), self.n_prefix + ancestors.shape[2]
        self.tokens[:images] = tokens
        self.mask[:images, 0, :, self.n_prefix : end] = ancestors
        self.position.fill_(self.n_prefix + ancestors.shape[2] // self.beam_size - 1)
        torch.arange(end - self.beam_size, end, out=self.slots)
        self.cache.slots = self.slots
        return self._compiled(self.tokens, self.position, self.mask)[:images]

    def _step(self, tokens: torch.Tensor, position: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        decoder = self.decoder
        x = decoder.embed(tokens) + decoder.wpe(position)
        return decoder.logits(decoder.blocks(x, mask, self.cache))


def _check_room(decoder: Decoder, n_prefix: int, max_new_tokens: int) -> None:
    room = decoder.config.n_positions - n_prefix
    if max_new_tokens > room:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: after {n_prefix} image tokens only {room} fit")


def check_compiler(device: torch.device) -> None:
    """Raise ValueError where ``torch.compile`` has nothing to compile with."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("--compile needs triton on a GPU: install it, or leave --compile out")
    if device.type != "cuda" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ValueError(
            "--compile needs a C++ compiler (g++, or the one that CXX names); install one, or leave it out"
        )
