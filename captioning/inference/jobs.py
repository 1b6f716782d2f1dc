"""What each of the two models does to images: the captions of the scripts, of the Python call and of the page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from captioning.data.ranked import Ranked
from captioning.data.tokenizer import Tokenizer
from captioning.device import autocast, sent
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
        guidance: of the captioner's search (guidance.py).
        length_penalty, rule: of the captioner's search (``caption_features``); LLaVA has neither.
    """

    beam_size: int
    max_new_tokens: int
    wording: Wording = field(default_factory=Wording)
    n_best: int = 0
    length_penalty: float = 1.0
    rule: str | None = None
    guidance: float = 1.0


def captioner_job(
    captioner: Captioner,
    tokenizer: Tokenizer,
    search: Search,
    precision: str = "auto",
    draft: int | None = None,
    compiled_batch: int | None = None,
    retriever: Any = None,
) -> Job:
    """Return what the captioner does to images.

    Args:
        captioner: its weights are prepared for ``precision``.
        tokenizer: the decoder's.
        search: how captions are searched.
        precision: as for ``device.autocast``.
        draft: as for ``data.images.load_image``.
        compiled_batch: compile the decoding steps for batches of up to this many images.
        retriever: ``scoring.retrieval.Retriever`` of the captions that the captioner reads beside an image.
    """
    encoder, steps = StreamEncoder(captioner, precision), None
    if compiled_batch:
        with autocast(captioner.device, precision):
            rows = compiled_batch * (1 if search.guidance == 1 else 2)
            sizes = (rows, captioner.n_prefix, search.beam_size, search.max_new_tokens)
            steps = CompiledStepFunction(captioner.decoder, *sizes)
    how = (search.beam_size, search.max_new_tokens, search.length_penalty, steps, search.rule, search.wording)

    def prepare(image: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        return captioner.transform(image), retriever.prepare(image) if retriever else None

    def begin(prepared: list[tuple[torch.Tensor, Any]]) -> list[tuple[Encoded, torch.Tensor | None]]:
        pixels, others = zip(*prepared, strict=True)
        texts = retriever.rows(others) if retriever else [None] * len(pixels)
        return list(zip(encoder.encode(pixels), texts, strict=True))

    def caption(begun: list[tuple[Encoded, Any]]) -> list[str]:
        encoded, texts = zip(*begun, strict=True)
        text = sent(torch.stack(texts), captioner.device) if retriever else None
        with autocast(captioner.device, precision):
            return caption_features(
                captioner, tokenizer, encoder.gather(encoded), *how, search.n_best, search.guidance, text
            )

    if works_beside(captioner.device):
        return Job(prepare, caption, draft, begin)
    return Job(prepare, lambda prepared: caption(begin(prepared)), draft)


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
