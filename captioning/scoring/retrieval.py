"""Retrieved captions: an image's nearest of a datastore, found by CLIP (SmallCap, Ramos et al., arXiv 2209.15323)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from captioning.data.annotations import Sample
from captioning.data.datastore import COMMAND, Datastore, retrieved_row
from captioning.data.feature_cache import CacheSpec, FeatureCache
from captioning.data.images import load_image
from captioning.data.tokenizer import Tokenizer
from captioning.distributed import ALONE, Processes
from captioning.files import sha256_of
from captioning.profiles import ROOT, find
from captioning.scoring.clipscore import ClipScorer, text_features


class Retriever:
    """Finds an image's nearest captions, as token ids.

    Args:
        datastore: a file.
        tokenizer: the decoder's.
        captions: how many an image gets.
        length: in how many tokens.
        device: where CLIP runs.

    Raises:
        FileNotFoundError, ValueError: the datastore or its CLIP is missing, damaged, or not the one it was made with.
    """

    def __init__(
        self,
        datastore: str | os.PathLike,
        tokenizer: Tokenizer,
        captions: int,
        length: int,
        device: torch.device | None = None,
    ) -> None:
        self.datastore, self.tokenizer = Datastore.load(datastore), tokenizer
        self.captions, self.length = captions, length
        clip = self.datastore.clip
        weights = clip["clip_weights"]
        self.clip = ClipScorer(find(clip["clip_model"] or ""), find(weights) if weights else None, device)
        if self.clip.fingerprint != clip["clip_sha256"]:
            raise ValueError(
                f"--datastore {datastore}: was made with other weights of {clip['clip_model']} than those that are "
                f"here; make it again with {COMMAND}"
            )

    def prepare(self, image: Any) -> torch.Tensor:
        """Return a picture's pixels as CLIP takes them: (3, H, W)."""
        return self.clip.preprocess(image)

    def rows(self, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the token ids of B images' nearest captions, long (B, R), on the CPU."""
        return self._rows(self.clip.encode_images(torch.stack(list(pixels))))

    def rows_of(self, paths: Sequence[Path], cache: Path, processes: Processes = ALONE) -> torch.Tensor:
        """Return those of image files, which never get their own captions: long (n, R). CLIP's features are cached."""
        pixels = self.clip.preprocess(load_image(paths[0])).shape
        width = self.clip.encode_images(torch.zeros(1, *pixels)).shape[1]
        key = {"clip": self.clip.fingerprint, "transform": repr(self.clip.preprocess), "precision": self.clip.precision}
        spec = CacheSpec(cache, key, (1, width), torch.float32, batch_size=64)

        def encode(batch: list[torch.Tensor]) -> torch.Tensor:
            return self.clip.encode_images(torch.stack(batch))[:, None]

        features = FeatureCache.open(spec, paths, encode, processes, self.clip.load_image)
        return self._rows(features.gather(range(len(paths)))[:, 0], [sha256_of(path) for path in paths])

    def _rows(self, queries: torch.Tensor, images: Sequence[str] | None = None) -> torch.Tensor:
        nearest = self.datastore.nearest(queries, self.captions, images)
        encode, eos = self.tokenizer.encode, self.tokenizer.eos_id
        return torch.tensor([retrieved_row(list(map(encode, texts)), self.length, eos) for texts in nearest])


def retriever_of(
    retrieval: Any, tokenizer: Tokenizer, device: torch.device, datastore: str | os.PathLike | None = None
) -> Retriever | None:
    """Return what finds the captions that a captioner reads beside an image; None where it reads none.

    Args:
        retrieval: that of its ``CaptionerConfig``.
        tokenizer: the decoder's.
        device: where CLIP runs.
        datastore: None takes the one that the captioner was trained with.

    Raises:
        FileNotFoundError, ValueError: as ``Retriever``; also where a datastore is given that nobody reads, or none is
            and its file has changed since.
    """
    if retrieval is None:
        if datastore:
            raise ValueError(f"--datastore {datastore}: the adapter reads no retrieved captions; leave it out")
        return None
    found = Retriever(datastore or retrieval.datastore, tokenizer, retrieval.captions, retrieval.tokens, device)
    if not datastore and found.datastore.fingerprint != retrieval.datastore_hash:
        raise ValueError(
            f"{retrieval.datastore} is not the datastore that the adapter was trained with any more; "
            f"--datastore {retrieval.datastore} takes it all the same"
        )
    return found


def build(samples: Sequence[Sample], clip: ClipScorer) -> Datastore:
    """Return the datastore of all captions of ``samples``."""
    captions = [caption for sample in samples for caption in sample.captions]
    owners = [number for number, sample in enumerate(samples) for _ in sample.captions]
    description: dict[str, str | None] = {"clip_sha256": clip.fingerprint}
    for name, place in (("clip_model", clip.model_name), ("clip_weights", clip.weights)):
        description[name] = (
            place.removeprefix(f"{ROOT}/") if place else None
        )  # on another machine too, ``find`` then finds it
    return Datastore(
        captions,
        text_features(clip, captions).half(),
        torch.tensor(owners),
        [sha256_of(sample.path) for sample in samples],
        description,
    )
