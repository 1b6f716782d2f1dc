"""Everything between files and tensors: images, annotations, the tokenizer, packed batches, the feature cache.

A training sequence holds one image and all of its captions, ``[prefix | caption 1 | … | caption k]``. Every caption
attends to the prefix and to itself only, and its positions restart after the prefix, so one pass gives exactly the
losses and gradients of k separate ones. The prefix comes from a frozen encoder and is read from disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from captioning.cli import write_json, write_text
from captioning.distributed import ALONE, Processes
from captioning.files import read_json

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
END_OF_TEXT = "<|endoftext|>"  # GPT-2 begins and ends every text with it
IGNORED = -100  # the label that torch's cross_entropy passes over
MAX_IMAGE_BYTES = 512 * 2**20  # Pillow's limit on pixels leaves honest images below this
# A draft keeps at least so many times the pixels a side that the model gets. Scaled down from there to the model's
# size, photographs (20 of COCO's, at sizes that make drafts possible) differ from those decoded whole by at most 5 of
# 255 levels and by 0.7 in an image's mean; tests hold generated pictures to 8 and 1. With a factor of 2 it is 20 and 2.
DRAFT_FACTOR = 4
NAMED = 5  # a message about many files or ids names so many of them


# ---------------------------------------------------------------------------------------------------------- images


def list_images(folder: str | os.PathLike) -> list[Path]:
    """Return the images directly in ``folder`` (jpg, jpeg, png, webp in any letter case), sorted by name.

    Hidden files are passed over: macOS writes ``._name.jpg`` beside ``name.jpg``, and it holds no picture.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no image, two images with one stem, which is what predictions are keyed by, or a name that
            is not valid Unicode.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images")
    # A dangling link counts as an image, so that reading it fails by name instead of dropping it in silence.
    images = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and not path.is_dir()
    )
    if not images:
        raise ValueError(f"{folder}: no image here; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    odd = [repr(path.name) for path in images if not _is_text(path.name)]
    if odd:  # results are written as UTF-8, and would fail at the end of the work
        raise ValueError(f"{folder}: names that are not valid Unicode: {_some(odd)}; rename them")
    _refuse_shared_stems(folder, images)
    return images


def load_image(path: str | os.PathLike, draft: int | None = None) -> Image.Image:
    """Return the image at ``path`` as 8-bit RGB, upright: EXIF rotation applied, first frame, transparency on white.

    With ``draft`` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where its shorter side stays at least ``draft``
    pixels, which takes a fraction of the time for big photographs. Only where both sides divide evenly: else the
    picture would be stretched by a part of a pixel. ``DRAFT_FACTOR`` says how close the pixels come.

    Raises:
        OSError: the file is missing or must not be read.
        ValueError: the file is empty, truncated, damaged, no image, of a kind without a plain meaning in 8 bits
            (floating point), or so large that Pillow takes it for a decompression bomb; or no plain file.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # a named pipe would be waited for, for ever
        raise ValueError(f"{path}: not a plain file; replace it or take it out")
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"{path}: larger than {MAX_IMAGE_BYTES / 1e6:.0f} MB; scale it down or take it out")
    return decode_image(path.read_bytes(), path, draft)  # apart from decoding: a missing file is no damaged one


def decode_image(encoded: bytes, name: object, draft: int | None = None) -> Image.Image:
    """Return the image in ``encoded``, the content of an image file, as :func:`load_image` does.

    Raises:
        ValueError: as :func:`load_image`; ``name`` says which one.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if draft and image.format == "JPEG":
                _decode_smaller(image, draft)
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        reason = "of no known image format" if encoded else "empty"
        raise ValueError(f"{name}: the file is {reason}; replace it or take it out") from error
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow raises each of these for damaged files, SyntaxError for PNG and EXIF among them.
        raise ValueError(f"{name}: cannot be read as an image ({error}); replace it or take it out") from error


def _decode_smaller(image: Image.Image, shorter: int) -> None:
    """Let a JPEG that is not decoded yet be decoded at the smallest even share of its size that ``shorter`` allows."""
    width, height = image.size
    for share in (8, 4, 2):
        if min(width, height) >= share * shorter and width % share == 0 and height % share == 0:
            image.draft(None, (width // share, height // share))
            return


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own convert clips at 255 and leaves an almost white picture; keep the high byte as libpng does.
        grey = np.clip(np.asarray(image), 0, 65535).astype(np.uint16) >> 8  # (H, W)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _refuse_shared_stems(where: object, paths: Iterable[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in paths:
        other = seen.setdefault(path.stem, path)
        if other is not path:
            raise ValueError(
                f"{where}: {other.name} and {path.name} share the name without ending, by which predictions are "
                "keyed; rename or remove one"
            )


def _some(items: Sequence[object]) -> str:
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return ", ".join(str(item) for item in items[:NAMED]) + more


# ----------------------------------------------------------------------------------------------------- annotations


@dataclass(frozen=True)
class Sample:
    """One image and its reference captions, white space normalised."""

    image_id: int
    path: Path
    captions: tuple[str, ...]


def load_annotations(annotation_file: str | os.PathLike, images_root: str | os.PathLike | None) -> list[Sample]:
    """Return the samples of a COCO-style caption file in the file's order.

    Args:
        annotation_file: JSON, ``{"images": [{id, file_name}], "annotations": [{id, image_id, caption}]}``.
        images_root: the folder that file names are relative to; with None no image needs to exist, and paths are
            the bare file names (scoring by references alone).

    Raises:
        FileNotFoundError: the file is missing, or images that it names are missing under ``images_root``.
        ValueError: it is no JSON, has another structure, names an image twice or one that it does not list, has two
            images with one stem, an image without captions, or an empty caption.
    """
    file = Path(annotation_file)
    content = read_json(file)
    images = _records(file, content, "images", {"id": int, "file_name": str})
    annotations = _records(file, content, "annotations", {"image_id": int, "caption": str})
    root = Path() if images_root is None else Path(images_root)
    paths = _image_paths(file, images, root)
    if images_root is not None:
        missing = [path.name for path in paths.values() if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{root}: {len(missing)} of the {len(paths)} images that {file} names are not there: {_some(missing)}; "
                "point --images_root (or --data) to the right folder, or complete the download"
            )
    captions = _captions_by_image(file, annotations, paths)
    return [Sample(image_id, path, tuple(captions[image_id])) for image_id, path in paths.items()]


def load_split(data_dir: str | os.PathLike, split: str) -> list[Sample]:
    """Return the samples of ``data_dir/<split>.json`` with their images in ``data_dir/images/<split>/``.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_annotations`.
    """
    file = Path(data_dir) / f"{split}.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; `bash hw3_download.sh data` makes hw3_data, `python -m microworld.scenes` others"
        )
    return load_annotations(file, Path(data_dir) / "images" / split)


def _records(file: Path, content: Any, name: str, kinds: dict[str, type]) -> list[dict[str, Any]]:
    records = content.get(name) if isinstance(content, dict) else None
    if not isinstance(records, list) or not records:
        raise ValueError(f'{file}: no list "{name}" with something in it; expected COCO-style captions')
    for number, record in enumerate(records):
        for field, kind in kinds.items():
            value = record.get(field) if isinstance(record, dict) else None
            if not _is_int(value) if kind is int else not _is_text(value):
                wanted = "an integer" if kind is int else "a text in valid Unicode"
                raise ValueError(f'{file}: "{name}"[{number}] needs "{field}" as {wanted}, not {value!r:.80}')
    return records


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)  # JSON can hold half of a character


def _image_paths(file: Path, images: list[dict[str, Any]], root: Path) -> dict[int, Path]:
    paths: dict[int, Path] = {}
    for image in images:
        if image["id"] in paths:
            raise ValueError(f"{file}: image id {image['id']} stands there twice; ids must be unique")
        if not image["file_name"].strip():
            raise ValueError(f"{file}: image id {image['id']} has an empty file_name")
        paths[image["id"]] = root / image["file_name"]
    _refuse_shared_stems(file, paths.values())
    return paths


def _captions_by_image(file: Path, annotations: list[dict[str, Any]], paths: dict[int, Path]) -> dict[int, list[str]]:
    captions: dict[int, list[str]] = {image_id: [] for image_id in paths}
    unknown = sorted({a["image_id"] for a in annotations} - paths.keys())
    if unknown:
        raise ValueError(f'{file}: captions for image ids that "images" does not list: {_some(unknown)}')
    empty = []
    for number, annotation in enumerate(annotations):
        caption = " ".join(annotation["caption"].split())
        if not caption:
            empty.append(annotation.get("id", f"number {number}"))
        captions[annotation["image_id"]].append(caption)
    if empty:
        raise ValueError(f"{file}: empty captions in annotations {_some(empty)}; write or remove them")
    bare = [f"{paths[image_id].name} (id {image_id})" for image_id, texts in captions.items() if not texts]
    if bare:
        raise ValueError(f"{file}: images without a caption: {_some(bare)}; caption or remove them")
    return captions


# ------------------------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """GPT-2's byte-level BPE, read from ``encoder.json`` and ``vocab.bpe`` (Radford et al. 2019).

    Equal to ``transformers.GPT2TokenizerFast`` with one exception on purpose: the characters ``<|endoftext|>`` inside
    a text are ordinary characters and never the special token, so no caption can end a sequence in its middle.

    Attributes:
        eos_id: id of ``<|endoftext|>``, which is BOS too.
        vocab_size: number of ids, 0 to ``vocab_size - 1``.

    Raises:
        FileNotFoundError: ``folder`` lacks one of the two files.
        ValueError: the files are damaged or do not belong together.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        vocab_file, merges_file = Path(folder) / "encoder.json", Path(folder) / "vocab.bpe"
        for file in (vocab_file, merges_file):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file}: missing; a tokenizer is a folder with encoder.json and vocab.bpe; GPT-2's comes with "
                    "`bash hw3_download.sh p2`"
                )
        vocab = _read_vocab(vocab_file)
        merges = _read_merges(merges_file, vocab)
        self.eos_id = vocab[END_OF_TEXT]
        self.vocab_size = len(vocab)
        self._tokenizer = _byte_level(tokenizers.models.BPE(vocab=vocab, merges=merges))

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; no special id is added, and none can come out of the text."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids`` without ``<|endoftext|>`` and without white space at its ends.

        Bytes that are no UTF-8, as of a character cut in half, become U+FFFD.

        Raises:
            ValueError: an id is outside of the vocabulary (a decoder with a larger one made it).
        """
        ids = [int(i) for i in ids]
        strange = [i for i in ids if not 0 <= i < self.vocab_size]
        if strange:
            raise ValueError(f"token ids {_some(strange)} are not in this vocabulary of {self.vocab_size}")
        return self._tokenizer.decode([i for i in ids if i != self.eos_id], skip_special_tokens=False).strip()


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | os.PathLike) -> Tokenizer:
    """Train a byte-level BPE on ``texts``, write ``encoder.json`` and ``vocab.bpe`` to ``folder`` and load them.

    The same texts give the same files. All 256 bytes are in the vocabulary, so every text can be encoded, and
    ``<|endoftext|>`` is the last id, as in GPT-2. Where the texts hold too few repeated pairs, the vocabulary stays
    smaller than asked, and a warning says so.

    Raises:
        ValueError: ``vocab_size`` is below 257, the 256 bytes and the end of text.
    """
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"a vocabulary of {vocab_size} is too small; byte-level BPE needs {len(alphabet) + 1} or more")
    trained = _byte_level(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    vocab[END_OF_TEXT] = len(vocab)
    if len(vocab) < vocab_size:
        logger.warning("the texts give a vocabulary of %d, not of the %d asked for", len(vocab), vocab_size)
    folder = Path(folder)
    write_json(folder / "encoder.json", vocab, indent=None)
    write_text(folder / "vocab.bpe", "\n".join(["#version: 0.2", *map(" ".join, model["merges"])]) + "\n")
    return Tokenizer(folder)


def _byte_level(model: tokenizers.models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits by GPT-2's regex
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _read_vocab(file: Path) -> dict[str, int]:
    vocab = read_json(file)
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    if not ids or not all(map(_is_int, ids)) or sorted(ids) != list(range(len(ids))):
        raise ValueError(f"{file}: not a vocabulary; expected one object of tokens with the ids 0 to its size less 1")
    missing = [token for token in (END_OF_TEXT, *tokenizers.pre_tokenizers.ByteLevel.alphabet()) if token not in vocab]
    if missing:
        raise ValueError(f"{file}: not GPT-2's kind of vocabulary; it lacks {_some(missing)}")
    return vocab


def _read_merges(file: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # not splitlines: tokens hold no newline but odd spaces
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error})") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or any(token not in vocab for token in (*pair, "".join(pair))):
            raise ValueError(f"{file}: line {number} ({line!r:.80}) merges no two tokens of the encoder.json beside it")
        merges.append(pair)
    return merges


# ------------------------------------------------------------------------------------------------ training sequences


def encode_captions(samples: Sequence[Sample], tokenizer: Tokenizer, max_tokens: int) -> list[list[list[int]]]:
    """Return the token ids of every caption of every sample, without BOS and EOS.

    Raises:
        ValueError: a caption has more than ``max_tokens`` tokens. Cutting it would teach the model to stop in the
            middle of a sentence.
    """
    encoded = [[tokenizer.encode(caption) for caption in sample.captions] for sample in samples]
    for sample, captions in zip(samples, encoded, strict=True):
        for number, tokens in enumerate(captions, start=1):
            if len(tokens) > max_tokens:
                raise ValueError(
                    f"{sample.path.name}: caption {number} has {len(tokens)} tokens, more than {max_tokens}; shorten "
                    f"it or raise the limit: {sample.captions[number - 1][:60]!r}"
                )
    return encoded


@dataclass
class PackedBatch:
    """Captions of B images, those of one image one after another in a row; tensors are (B, S) long, slots apart.

    Attributes:
        inputs: ``BOS tokens`` of every caption, then padding.
        targets: ``tokens EOS`` of every caption, -100 on padding.
        positions: 0, 1, … anew for every caption; the model adds the length of the prefix.
        segments: number of the caption from 1 on, 0 on padding. A token sees its own segment and the prefix.
        slots: (B, k, T), where in the row the tokens of each caption stand, -1 behind its end; None if nobody knows.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    slots: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Return the batch on ``device``."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return PackedBatch(*(None if t is None else t.to(device, non_blocking=non_blocking) for t in tensors))

    def behind_prefix(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return positions (B, P+S) and mask (B, 1, P+S, P+S) of ``[prefix of count tokens | captions]``."""
        return self.positions_behind(count), self.mask_behind(count)

    def positions_behind(self, count: int) -> torch.Tensor:
        """Return the positions (B, P+S) of ``[prefix of count tokens | captions]``."""
        prefix = torch.arange(count, device=self.positions.device).expand(len(self.positions), -1)
        return torch.cat([prefix, self.positions + count], 1)

    def mask_behind(self, count: int) -> torch.Tensor:
        """Return where a token may look in ``[prefix of count tokens | captions]``: bool (B, 1, P+S, P+S)."""
        # The prefix is segment 0 and padding is segment -1, so that "same segment or prefix" is one comparison.
        padding = torch.where(self.segments == 0, -1, self.segments)
        segments = torch.nn.functional.pad(padding, (count, 0))  # (B, P+S)
        total = segments.shape[1]
        causal = torch.ones(total, total, dtype=torch.bool, device=segments.device).tril()
        related = (segments[:, None, :] == segments[:, :, None]) | (segments[:, None, :] == 0)
        return (related & causal)[:, None]


def pack_captions(batch: Sequence[Sequence[Sequence[int]]], eos_id: int, pad_to_multiple: int = 1) -> PackedBatch:
    """Pack ``batch[image][caption]`` (token ids without specials) into rows of one common length S.

    Args:
        batch: captions of B images.
        eos_id: BOS and EOS at once. It also fills the padding, where segment 0 and target -100 keep it unseen.
        pad_to_multiple: S is rounded up to a multiple of this, for fewer distinct shapes.

    Raises:
        ValueError: the batch is empty, an image has no caption, or ``pad_to_multiple`` is below 1.
    """
    if not batch or not all(batch):
        raise ValueError("every image of a batch needs at least one caption, and a batch at least one image")
    if pad_to_multiple < 1:
        raise ValueError(f"pad_to_multiple is {pad_to_multiple}; it must be 1 or more")
    longest = max(sum(len(caption) + 1 for caption in captions) for captions in batch)
    length = -(-longest // pad_to_multiple) * pad_to_multiple
    shape = (len(batch), length)
    inputs, targets = np.full(shape, eos_id, np.int64), np.full(shape, IGNORED, np.int64)  # (B, S)
    positions, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)  # (B, S)
    grid = max(map(len, batch)), max(len(caption) + 1 for captions in batch for caption in captions)
    slots = np.full((len(batch), *grid), -1, np.int64)  # (B, k, T)
    for row, captions in enumerate(batch):
        start = 0
        for number, caption in enumerate(captions, start=1):
            span = slice(start, start + len(caption) + 1)
            inputs[row, span] = [eos_id, *caption]
            targets[row, span] = [*caption, eos_id]
            positions[row, span] = np.arange(len(caption) + 1)
            segments[row, span] = number
            slots[row, number - 1, : len(caption) + 1] = np.arange(span.start, span.stop)
            start = span.stop
    return PackedBatch(*map(torch.from_numpy, (inputs, targets, positions, segments, slots)))


class CaptionDataset(torch.utils.data.Dataset):
    """Items ``(index of the image, its captions as token lists)``.

    With ``captions_per_image`` an epoch shows that many captions of an image (all, where it has fewer): epochs walk
    round a fixed shuffled order of the image's captions, so each is shown equally often. What an epoch shows depends
    on ``seed``, the epoch and the index only, not on the order of access or on the number of workers.

    Raises:
        ValueError: ``captions_per_image`` is below 1.
    """

    def __init__(
        self, captions: Sequence[Sequence[list[int]]], captions_per_image: int | None = None, seed: int = 0
    ) -> None:
        if captions_per_image is not None and captions_per_image < 1:
            raise ValueError(f"--captions-per-image {captions_per_image}: must be 1 or more, or left out for all")
        self._captions = captions
        self._per_image = captions_per_image
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the captions of ``epoch``; call it before a data loader starts its workers."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._captions)

    def __getitem__(self, index: int) -> tuple[int, list[list[int]]]:
        """Return ``index`` and the captions that this epoch shows of the image."""
        captions = self._captions[index]
        if self._per_image is None or self._per_image >= len(captions):
            return index, list(captions)
        order = np.random.default_rng((self._seed, index)).permutation(len(captions))
        first = self._epoch * self._per_image
        return index, [captions[order[(first + i) % len(order)]] for i in range(self._per_image)]

    def lengths(self) -> list[int]:
        """Return the packed length of every item in this epoch, for :func:`length_grouped_batches`."""
        return [sum(len(caption) + 1 for caption in self[index][1]) for index in range(len(self))]


def length_grouped_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return batches of indices of like length, every index once, in an order drawn from ``seed`` and ``epoch``.

    Indices are shuffled, then sorted by length within pools of 32 batches only, so that a batch has little padding
    and yet other members in every epoch.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: must be 1 or more")
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    lengths = np.asarray(lengths)
    pool_size = 32 * batch_size
    batches = []
    for start in range(0, len(order), pool_size):
        pool = order[start : start + pool_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + batch_size].tolist() for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def shuffle_captions(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Deal all captions of each image to another image: the blind baseline, which can learn the language only.

    The images form one random cycle, and each hands its captions to the next, so none keeps its own.

    Raises:
        ValueError: there are fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError(f"captions of {len(samples)} image(s) cannot be dealt to other images; two are needed")
    order = np.random.default_rng(seed).permutation(len(samples))
    shuffled = list(samples)
    for giver, taker in zip(order, np.roll(order, -1), strict=True):
        shuffled[taker] = replace(samples[taker], captions=samples[giver].captions)
    return shuffled


# --------------------------------------------------------------------------------------------------- feature cache


class FeatureCache:
    """Encoder tokens of a list of images, computed once, then memory-mapped.

    One folder per key holds ``features.bin`` (rows of N x D numbers), ``rows.sha256`` (line i: digest of the image
    file that row i was made from, and the row's CRC-32, checked whenever a cache is opened) and ``key.json``. Rows are
    found by the *content* of image files, so a changed image is encoded anew, a renamed or copied one is not, and
    splits share a folder. A row is listed only after it is on disk, so a killed build goes on where it stopped. One
    run builds at a time (a POSIX file lock), all its processes in parallel; another one waits, then finds the rows.
    Images beyond the limit of its size are encoded whenever they are asked for, and rounded as the cached ones are.
    """

    def __init__(
        self,
        file: Path,
        rows: np.ndarray,
        shape: tuple[int, int],
        dtype: torch.dtype,
        encode: Callable[[list[int]], torch.Tensor] | None = None,
    ) -> None:
        self._arguments = (file, rows, shape, dtype, encode)
        self._rows = rows  # (images,), row in the file of each image; -1 for those that are not in it
        self._encode = encode
        whole, kind = (int(rows.max()) + 1, *shape), _numpy_dtype(dtype)
        self._features = np.memmap(file, kind, mode="r", shape=whole) if whole[0] else np.empty(whole, kind)

    @classmethod
    def open(
        cls,
        root: str | os.PathLike,
        key: dict[str, str],
        paths: Sequence[Path],
        shape: tuple[int, int],
        encode: Callable[[list[Path]], torch.Tensor],
        dtype: torch.dtype = torch.float16,
        batch_size: int = 16,
        progress: bool = True,
        limit: float = math.inf,
        processes: Processes = ALONE,
    ) -> FeatureCache:
        """Open the cache of ``paths`` under ``root``, encoding what is not yet there.

        Args:
            root: parent of the caches of all keys.
            key: whatever else decides the features: encoder name, hash of its weights, transform, …
            paths: the images; ``cache[i]`` belongs to ``paths[i]``.
            shape: (N, D) of one image's features.
            encode: maps b paths to (b, N, D) on any device.
            dtype: float16 or float32 on disk.
            batch_size: the largest b.
            progress: show a bar where stderr is a terminal.
            limit: bytes; images for which the folder has no room below it are not cached.
            processes: those that open it together; ``root`` must be one folder for all of them.

        Raises:
            FileNotFoundError: an image is missing.
            ValueError: no paths, a batch size below 1, an unsupported dtype, too little disk space, or features of
                the wrong shape or out of the range of ``dtype``.
        """
        if not paths:
            raise ValueError("a feature cache needs at least one image")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        row_bytes = int(np.prod(shape)) * _numpy_dtype(dtype).itemsize
        identity = {"key": key, "shape": list(shape), "dtype": str(dtype), "format": 2}
        folder = Path(root) / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        digests = processes.spread(_digest, paths)

        def begin() -> tuple[dict[str, int], list[tuple[str, Path]]]:
            row_of = _recover_rows(folder, identity, row_bytes)
            missing = {digest: path for digest, path in zip(digests, paths, strict=True) if digest not in row_of}
            room = int(max(0, min(limit / row_bytes - len(row_of), len(missing))))
            if room < len(missing):
                logger.warning(
                    "feature cache %s: %d images are beyond its limit of %.1f GB and are encoded every time",
                    folder,
                    len(missing) - room,
                    limit / 1e9,
                )
            _check_disk(folder, room, len(set(digests)), row_bytes)
            return row_of, list(missing.items())[:room]

        with _locked(folder) if processes.first else contextlib.nullcontext():
            row_of, missing = processes.from_first(begin)
            started = time.perf_counter()
            share = processes.share([missing[i : i + batch_size] for i in range(0, len(missing), batch_size)])
            batches = _shown(share, progress and processes.first)
            added = processes.together(lambda: _build_rows(folder, batches, encode, shape, dtype))
            for rows in processes.gather(added):
                row_of |= rows
        processes.together(lambda: _check_seen(folder, len(row_of) * row_bytes))
        if missing:
            work = ("cache", len(missing), time.perf_counter() - started)  # what bench/measured.py collects
            logger.info("feature cache: %d images encoded in %.1f s", *work[1:], extra={"work": work})
        rows = np.array([row_of.get(digest, -1) for digest in digests])

        def encode_rest(indices: list[int]) -> torch.Tensor:
            return _encode_checked(encode, [Path(paths[i]) for i in indices], shape, dtype)

        rest = encode_rest if rows.min() < 0 else None  # a closure, which would keep a whole cache from being pickled
        return cls(folder / "features.bin", rows, tuple(shape), dtype, rest)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return a copy of the features of one image: (N, D)."""
        return self.gather([index])[0]

    def gather(self, indices: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Return a copy of the features of ``indices``: (B, N, D).

        Raises:
            IndexError: an index is outside of the list of images.
        """
        indices = np.asarray(indices, dtype=np.int64)
        rows = self._rows[indices]
        cached = rows >= 0
        if cached.all():
            return torch.from_numpy(np.asarray(self._features[rows]))
        found = np.empty((len(rows), *self._features.shape[1:]), self._features.dtype)
        found[cached] = self._features[rows[cached]]
        found[~cached] = self._encode(indices[~cached].tolist()).numpy()
        return torch.from_numpy(found)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the place of the features and not the features: a data loader's worker maps the file anew."""
        return FeatureCache, self._arguments


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"features are cached as torch.float16 or torch.float32, not as {dtype}")
    return np.dtype(str(dtype).removeprefix("torch."))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    import fcntl  # POSIX only; the other parts of this module run anywhere

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when the process dies
        yield


def _recover_rows(folder: Path, identity: dict[str, Any], row_bytes: int) -> dict[str, int]:
    """Return {digest: row} of what a cache folder holds; drop unfinished rows, and everything where it is damaged."""
    features, listing, key_file = folder / "features.bin", folder / "rows.sha256", folder / "key.json"
    if not features.exists() and not listing.exists():
        return _new_cache(folder, identity)
    try:
        stale = read_json(key_file) != identity
    except (FileNotFoundError, ValueError):
        stale = True
    if stale:
        logger.warning("feature cache %s is stale: its key.json is not this encoder's; building it anew", folder)
        return _new_cache(folder, identity)
    lines = listing.read_bytes().split(b"\n")[:-1] if listing.exists() else []  # a torn last line has no newline
    parts = [re.fullmatch("([0-9a-f]{64}) ([0-9a-f]{8})", line.decode("ascii", "replace")) for line in lines]
    row_of = {part[1]: row for row, part in enumerate(parts) if part}
    size, expected = features.stat().st_size if features.exists() else -1, len(lines) * row_bytes
    if size < expected or len(row_of) < len(lines) or not _rows_are_whole(features, row_bytes, parts):
        logger.warning("feature cache %s is damaged (%d bytes for %d rows); building it anew", folder, size, len(lines))
        return _new_cache(folder, identity)
    if size > expected:
        logger.warning("feature cache %s: dropping %d bytes of unfinished rows", folder, size - expected)
        os.truncate(features, expected)
    if listing.exists():
        os.truncate(listing, sum(len(line) + 1 for line in lines))
    return row_of


def _rows_are_whole(features: Path, row_bytes: int, parts: list[re.Match]) -> bool:
    with features.open("rb") as file:
        return all(zlib.crc32(file.read(row_bytes)) == int(part[2], 16) for part in parts)


def _new_cache(folder: Path, identity: dict[str, Any]) -> dict[str, int]:
    for name in ("key.json", "rows.sha256", "features.bin"):
        (folder / name).unlink(missing_ok=True)  # not truncated: another process may still have the old file mapped
    (folder / "features.bin").touch()
    write_json(folder / "key.json", identity)
    return {}


def _check_disk(folder: Path, missing: int, wanted: int, row_bytes: int) -> None:
    needed, free = missing * row_bytes, shutil.disk_usage(folder).free
    logger.info(
        "feature cache %s: %d of %d images to encode, %.1f MB to write, %.1f GB free on that disk",
        folder,
        missing,
        wanted,
        needed / 1e6,
        free / 1e9,
    )
    if needed > free:
        raise ValueError(
            f"{folder}: the features of {missing} images need {needed / 1e9:.3f} GB, and {free / 1e9:.3f} GB are free; "
            "free some space or choose another folder with --cache"
        )


def _check_seen(folder: Path, size: int) -> None:
    """Make sure that what other processes wrote is there in this one's file system too."""
    file = folder / "features.bin"
    if (file.stat().st_size if file.exists() else -1) < size:
        raise ValueError(
            f"{folder}: a process does not see the features that the others wrote; choose a folder with "
            "--cache that all machines share"
        )


def _build_rows(
    folder: Path,
    batches: Iterable[list[tuple[str, Path]]],
    encode: Callable[[list[Path]], torch.Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> dict[str, int]:
    """Encode and store batches of (digest, image); return {digest: row}."""
    _check_seen(folder, 0)
    added = {}
    for batch in batches:
        features = _encode_checked(encode, [path for _, path in batch], shape, dtype)
        first = _append_rows(folder, [digest for digest, _ in batch], features.numpy())
        added |= {digest: first + i for i, (digest, _) in enumerate(batch)}
    return added


def _digest(path: str | os.PathLike) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _shown(batches: Sequence[list[Any]], progress: bool) -> Iterator[list[Any]]:
    with tqdm(total=sum(map(len, batches)), desc="encoding", unit="image", disable=None if progress else True) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def _encode_checked(
    encode: Callable[[list[Path]], torch.Tensor], paths: list[Path], shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    features = encode(paths).detach()
    if features.shape != (len(paths), *shape):
        raise ValueError(f"the encoder gave features {tuple(features.shape)}, not {(len(paths), *shape)}")
    stored = features.to(dtype).cpu()  # (b, N, D)
    finite = stored.isfinite().all(dim=2).all(dim=1)  # (b,)
    if not finite.all():
        names = [path for path, good in zip(paths, finite.tolist(), strict=True) if not good]
        raise ValueError(f"features not finite in {dtype}: {_some(names)}; cache in float32, or check the encoder")
    return stored


def _append_rows(folder: Path, digests: Sequence[str], features: np.ndarray) -> int:
    """Append rows (b, N, D) to a cache that several processes build; return the number of the first one."""
    import fcntl

    stored, listing, row_bytes = folder / "features.bin", folder / "rows.sha256", features[0].nbytes
    lines = [f"{digest} {zlib.crc32(row):08x}\n" for digest, row in zip(digests, features, strict=True)]
    with stored.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        listing.touch()
        count = listing.stat().st_size // len(lines[0])
        # What a process left that died in between: rows that are not listed, half of a line.
        os.truncate(stored, count * row_bytes)
        os.truncate(listing, count * len(lines[0]))
        # Order matters: a row that is listed must be on disk, whenever the process dies.
        _append(stored, features.tobytes())
        _append(listing, "".join(lines).encode())
    return count


def _append(file: Path, content: bytes) -> None:
    with file.open("ab") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
