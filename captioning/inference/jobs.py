"""What each of the two models does to images: the captions of the scripts, of the Python call and of the page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from captioning.data.ranked import Ranked
from captioning.data.tokenizer import Tokenizer
from captioning.device import autocast
from captioning.inference.batches import Job
from captioning.inference.captions import caption_features
from captioning.inference.encode import Encoded, StreamEncoder
from captioning.inference.wording import Wording
from captioning.models.captioner import Captioner
from captioning.models.llava import Llava
from captioning.models.step_functions import CompiledStepFunction


@dataclass(frozen=True)
class Search:
    """How captions are searched.

    Attributes:
        beam_size: live beams; 1 is greedy search.
        max_new_tokens: longest caption in tokens.
        wording: what captions may not say.
        n_best: return captions as ``Ranked``, with their scores and this many best of the beams; 0: as plain text.
        length_penalty, rule: of the captioner's search (``caption_features``); LLaVA has neither.
    """

    beam_size: int
    max_new_tokens: int
    wording: Wording = field(default_factory=Wording)
    n_best: int = 0
    length_penalty: float = 1.0
    rule: str | None = None


def captioner_job(
    captioner: Captioner,
    tokenizer: Tokenizer,
    search: Search,
    precision: str = "auto",
    draft: int | None = None,
    compiled_batch: int | None = None,
) -> Job:
    """Return what the captioner does to images.

    Args:
        captioner: its weights are prepared for ``precision``.
        tokenizer: the decoder's.
        search: how captions are searched.
        precision: as for ``device.autocast``.
        draft: as for ``data.images.load_image``.
        compiled_batch: compile the decoding steps for batches of up to this many images.
    """
    encoder, steps = StreamEncoder(captioner, precision), None
    if compiled_batch:
        with autocast(captioner.device, precision):
            sizes = (compiled_batch, captioner.n_prefix, search.beam_size, search.max_new_tokens)
            steps = CompiledStepFunction(captioner.decoder, *sizes)
    how = (search.beam_size, search.max_new_tokens, search.length_penalty, steps, search.rule, search.wording)

    def caption(encoded: list[Encoded]) -> list[str]:
        with autocast(captioner.device, precision):
            return caption_features(captioner, tokenizer, encoder.gather(encoded), *how, search.n_best)

    if works_beside(captioner.device):
        return Job(captioner.transform, caption, draft, encoder.encode)
    return Job(captioner.transform, lambda pixels: caption(encoder.encode(pixels)), draft)


def works_beside(device: torch.device) -> bool:
    """Whether encoding the next batch can go on while this program decodes one: on a CPU they would share the cores."""
    return device.type == "cuda"


def llava_job(model: Llava, prompt: str, search: Search) -> Job:
    """Return what LLaVA does to images with a prompt. Raises ValueError where an answer would not fit after it."""
    from PIL import Image

    any_image = Image.new("RGB", (336, 336))  # an image's size does not change how many tokens it has
    model.check_room(model.row(any_image, prompt), search.max_new_tokens)
    sizes, options = (search.beam_size, search.max_new_tokens), search.wording.for_generate()

    def caption(rows: list[Any]) -> list[str]:
        if not search.n_best:
            return [model.text(tokens) for tokens in model.generate(rows, *sizes, options=options)]
        found = model.ranked(rows, *sizes, search.n_best, options)
        return [Ranked((model.text(tokens), score) for tokens, score in answers) for answers in found]

    return Job(lambda image: model.row(image, prompt), caption)
