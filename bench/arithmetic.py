"""What an image costs in operations and bytes, computed from the models' shapes: no model is built.

A multiplication and its addition are two operations. Attention counts as dense products, whether or not a mask hides a
part of them, as ``torch.utils.flop_counter`` counts; norms, activations and softmax are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

BF16 = 2  # bytes a number
BEAMS, TOKENS = 5, 30  # of a search, wherever its costs are given


@dataclass(frozen=True)
class Vit:
    """A vision transformer: its tokens (CLS and patches), and numbers of a patch."""

    tokens: int
    width: int
    depth: int
    patch_numbers: int  # 3 colours x patch x patch
    hidden: int = 0  # width of the MLP; 0: four times the width

    @property
    def block(self) -> int:
        """Weights of one block."""
        return 4 * self.width**2 + 2 * self.width * (self.hidden or 4 * self.width)

    @property
    def weights(self) -> int:
        """Weights of the blocks, of the patches and of the positions."""
        return self.depth * self.block + (self.patch_numbers + self.tokens) * self.width

    @property
    def operations(self) -> float:
        """Of one image."""
        linear = 2 * self.tokens * self.block
        return self.depth * (linear + attention(self.tokens, self.tokens, self.width)) + (
            2 * (self.tokens - 1) * self.patch_numbers * self.width
        )


@dataclass(frozen=True)
class Decoder:
    """A language model of ``layers`` blocks; ``block`` is the number of weights of one."""

    layers: int
    width: int
    vocabulary: int
    block: int

    @property
    def weights(self) -> int:
        """Weights that a step reads: blocks and output layer."""
        return self.layers * self.block + self.width * self.vocabulary

    def read(self, tokens: int, seen: int) -> float:
        """Operations of ``tokens`` new tokens that attend to ``seen``, without the output layer."""
        return self.layers * (2 * tokens * self.block + attention(tokens, seen, self.width))

    def logits(self, tokens: int) -> float:
        """Operations of the output layer."""
        return 2 * tokens * self.width * self.vocabulary

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one token in 16 bits."""
        return 2 * self.layers * self.width * BF16


def attention(rows: float, columns: float, width: int) -> float:
    """Operations of both products of an attention of all heads together."""
    return 4 * rows * columns * width


def gpt2(layers: int, width: int, vocabulary: int) -> Decoder:
    """A GPT-2: q, k, v and output of the attention, and an MLP four times as wide."""
    return Decoder(layers, width, vocabulary, 12 * width**2)


VIT_L14 = Vit(257, 1024, 24, 588)
GPT2_SMALL = gpt2(12, 768, 50257)
VIT_L14_336 = Vit(577, 1024, 24, 588)
PRESETS = {  # encoders of p2_train.py's settings
    "best-336": VIT_L14_336,
    "best-h": Vit(257, 1280, 32, 588),
    "best-g": Vit(257, 1664, 48, 588, 8192),
}
LLAVA_TOWER = replace(VIT_L14_336, depth=23)  # LLaVA takes the second to last layer
LLAMA_7B = Decoder(32, 4096, 32064, 4 * 4096**2 + 3 * 4096 * 11008)


@dataclass(frozen=True)
class CaptionerShape:
    """Encoder, linear projector, decoder; LoRA of ``rank`` on every linear layer and, with ``head``, on the output.

    The decoder gets averages of ``pool`` x ``pool`` patches, beside CLS.
    """

    encoder: Vit = VIT_L14
    decoder: Decoder = GPT2_SMALL
    rank: int = 32
    head: bool = True
    pool: int = 1

    @property
    def prefix(self) -> int:
        """Image tokens that the decoder gets."""
        return 1 + (self.encoder.tokens - 1) // self.pool**2

    @property
    def feature_bytes(self) -> int:
        """Of one image in the feature cache."""
        return self.prefix * self.encoder.width * BF16

    @property
    def trained(self) -> int:
        """Trained parameters of a GPT-2: LoRA of every linear layer and the output, and the projector with its bias."""
        d = self.decoder
        lora = d.layers * self.rank * d.width * ((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1))  # in and out
        head = self.rank * (d.width + d.vocabulary) if self.head else 0
        return lora + head + (self.encoder.width + 1) * d.width

    @property
    def project(self) -> float:
        """Operations of the projector."""
        return 2 * self.prefix * self.encoder.width * self.decoder.width

    def attended(self, caption_tokens: int, captions: int = 5) -> float:
        """Operations of attention in the packed sequence: all rows to the prefix, each caption's to its own.

        In the last layer the prefix's rows are left out: nothing reads them.
        """
        d, prefix, own = self.decoder, self.prefix, caption_tokens / captions
        rows = d.layers * attention(prefix + caption_tokens, prefix, d.width) - attention(prefix, prefix, d.width)
        return rows + d.layers * captions * attention(own, own, d.width)

    def train(self, caption_tokens: int, captions: int = 5) -> float:
        """Operations of a step an image, forward and backward, with ``caption_tokens`` packed after its prefix.

        Frozen weights get no gradient, so their layers cost once more backward; LoRA and attention twice more. Past its
        keys and values the last layer has the captions' rows only.
        """
        d, prefix = self.decoder, self.prefix
        first = d.layers * (prefix + caption_tokens)  # rows of c_attn, in all layers together
        others = first - prefix  # rows of c_proj, c_fc and the MLP's c_proj
        c_attn = 3 * d.width**2
        lora = 2 * self.rank * d.width * (first * (1 + 3) + others * ((1 + 1) + (1 + 4) + (4 + 1)))  # in and out
        if self.head:
            lora += 2 * caption_tokens * self.rank * (d.width + d.vocabulary)
        attended = self.attended(caption_tokens, captions)
        frozen = 2 * (first * c_attn + others * (d.block - c_attn)) + d.logits(caption_tokens)
        return 2 * frozen + 3 * (attended + lora) + 2 * self.project

    def search(self, beams: int, tokens: int) -> float:
        """Operations of captioning an encoded image: prefix read once, then ``tokens`` steps of ``beams`` beams."""
        d, prefix = self.decoder, self.prefix
        steps = sum(d.read(beams, prefix + beams * t) for t in range(1, tokens + 1))
        return self.project + d.read(prefix, prefix) + steps + tokens * d.logits(beams)

    def search_bytes(self, beams: int, tokens: int, batch: int) -> float:
        """Bytes that searching moves an image, in batches of ``batch``: weights and cache once a step, and no more."""
        d, prefix = self.decoder, self.prefix
        cache = sum(d.cache_bytes * (prefix + beams * t) for t in range(1, tokens + 1))
        return cache + (tokens + 1) * d.weights * BF16 / batch

    def scst(self, samples: int, tokens: int, caption_tokens: int, captions: int = 5) -> float:
        """Operations of a self-critical step an image: draw, and learn from the draw and the captions in one pass."""
        return self.search(samples, tokens) + self.train(samples * (tokens + 1) + caption_tokens, samples + captions)

    def explain(self, beams: int, tokens: int) -> float:
        """Operations of captioning an image and feeding the caption again for its maps."""
        d, prefix = self.decoder, self.prefix
        again = d.read(prefix, prefix) + d.read(tokens + 1, prefix + tokens + 1) + d.logits(tokens + 1)
        return self.encoder.operations + self.search(beams, tokens) + self.project + again


def llava_operations(prompt: int, tokens: int) -> tuple[float, float, float]:
    """Operations of LLaVA-1.5-7B an image: vision tower, reading ``prompt`` text tokens with the image, answering."""
    projector = 2 * 576 * (1024 * 4096 + 4096**2)
    read = LLAMA_7B.read(576 + prompt, 576 + prompt) + LLAMA_7B.logits(1)
    steps = sum(LLAMA_7B.read(1, 576 + prompt + t) for t in range(1, tokens)) + (tokens - 1) * LLAMA_7B.logits(1)
    return LLAVA_TOWER.operations + projector, read, steps


def llava_bytes(prompt: int, tokens: int, batch: int) -> float:
    """Bytes that answering moves an image: 16-bit weights once a step of ``batch`` images, and the cache."""
    cache = sum(LLAMA_7B.cache_bytes * (576 + prompt + t) for t in range(1, tokens))
    return cache + tokens * LLAMA_7B.weights * BF16 / batch
