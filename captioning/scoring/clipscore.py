"""CLIPScore and RefCLIPScore (Hessel et al. 2021): how well a caption fits its picture, as CLIP sees it."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from captioning.checkpoints import names_in_safetensors, read_state_dict, transformers_config
from captioning.clip_names import openai_names, trained_with_quick_gelu
from captioning.data.annotations import check_keys
from captioning.data.images import load_image
from captioning.device import pick_device
from captioning.files import sha256_of
from captioning.imports import import_guarded
from captioning.messages import first_sentence, one_line, some
from captioning.profiles import PROFILES

log = logging.getLogger(__name__)

PRECISIONS = ("auto", "fp32", "fp16", "bf16")
LONG = ("truncate", "mean")  # what becomes of captions beyond CLIP's context
CLIPSCORE_WEIGHT = 2.5  # w of Hessel et al. 2021, equation 1


class ClipScorer:
    """A CLIP model with its own preprocessing and tokenizer, loaded once and kept in eval mode.

    Args:
        model: an open_clip model name, or a folder with ``open_clip_config.json`` and the weights beside it.
        weights: an open_clip tag, or what ``read_state_dict`` reads, in the layout of open_clip, OpenAI or
            transformers; None for a folder.
        device: where it runs; None picks one.
        precision: ``fp32``, ``fp16``, ``bf16``, or ``auto``: fp16 on CUDA, as OpenAI's package runs it, else fp32.
        long: what becomes of captions whose tokens, with start and end, do not fit the context (OpenAI's: 77):
            ``truncate`` cuts them, as OpenAI's package does; ``mean`` takes them in windows (:meth:`encode_texts`).

    Raises:
        FileNotFoundError: the folder has no configuration, or ``weights`` is neither a tag nor a file.
        ValueError: the model is unknown, its activation is not the one that the weights were trained with, the
            weights cannot be loaded, or open_clip is not installed. It never falls back to random weights.
    """

    def __init__(
        self,
        model: str = PROFILES["full"].clip_model,
        weights: str | None = PROFILES["full"].clip_weights,
        device: torch.device | None = None,
        precision: str = "auto",
        long: str = LONG[0],
    ) -> None:
        for flag, value, known in (("--precision", precision, PRECISIONS), ("--clip-long", long, LONG)):
            if value not in known:
                raise ValueError(f"{flag} {value}: use one of {', '.join(known)}")
        self.model_name, self.weights = model, weights
        self.device = device or pick_device()
        self.precision = precision if precision != "auto" else "fp16" if self.device.type == "cuda" else "fp32"
        open_clip = _import_open_clip()
        name = _resolve_clip(open_clip, model, weights)
        with _explained(model, weights), tempfile.TemporaryDirectory() as folder:
            self.model, self.preprocess = open_clip.create_model_from_pretrained(
                name, _readable(weights, folder), precision=self.precision, device=self.device
            )
            self.tokenizer = open_clip.get_tokenizer(name)  # truncates at the model's context length, OpenAI's at 77
        self.long = long
        self.model.eval().requires_grad_(False)
        self.input_dtype = open_clip.get_input_dtype(self.precision)

    @property
    def description(self) -> dict[str, str | None]:
        """What made the numbers: model, weights, device, precision, and what becomes of long captions."""
        return {
            "clip_model": self.model_name,
            "clip_weights": self.weights,
            "device": str(self.device),
            "precision": self.precision,
            "clip_long": self.long,
            "clip_sha256": self.fingerprint,
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights: of their file where it is local and the only candidate, else of the state dict."""
        file = Path(self.weights or self.model_name)
        if file.is_dir():
            files = [path for path in file.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth")]
            file = files[0] if len(files) == 1 else file
        if file.is_file():
            return f"file:{sha256_of(file)}"
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return f"state_dict:{digest.hexdigest()}"

    def truncated(self, captions: Iterable[str]) -> list[int]:
        """Return the indices of the captions whose tokens, with start and end, do not fit the model's context."""
        captions = list(captions)
        context = self.tokenizer(captions[:1]).shape[1]
        longest = max((len(caption.encode()) for caption in captions), default=0) + 3  # a token is at least a byte
        tokens = self.tokenizer(captions, context_length=longest)  # (n, longest)
        padding = tokens[:, -1:]
        return torch.nonzero((tokens[:, context:] != padding).any(dim=1)).flatten().tolist()

    def load_image(self, path: str | os.PathLike) -> torch.Tensor:
        """Return the preprocessed pixels ``(3, size, size)`` of an image; errors as ``data.images.load_image``."""
        return self.preprocess(load_image(path))

    @torch.inference_mode()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return unit-length features ``(n, dim)`` in float32 for preprocessed pixels ``(n, 3, size, size)``."""
        features = self.model.encode_image(pixels.to(self.device, self.input_dtype))
        return F.normalize(features.float(), dim=-1)  # float32 first: fp16 would round the norm

    @torch.inference_mode()
    def encode_texts(self, captions: Sequence[str]) -> torch.Tensor:
        """Return unit-length features ``(n, dim)`` in float32 for captions as they are, without any prefix.

        By ``mean``, the n tokens of a caption that does not fit are cut into ceil(n / r) windows of successive tokens,
        whose lengths differ by at most one, where r is the context less start and end (OpenAI's: 75); each window is
        encoded as a caption is; and the caption's feature is the mean of the windows' unit-length features, scaled to
        unit length. Captions that fit are encoded as ever.
        """
        features = self._encode_tokens(self.tokenizer(list(captions)))
        for index in self.truncated(captions) if self.long == "mean" else ():
            features[index] = F.normalize(self._encode_tokens(self._windows(captions[index])).mean(dim=0), dim=-1)
        return features

    def _encode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.model.encode_text(tokens.to(self.device)).float(), dim=-1)

    def _windows(self, caption: str) -> torch.Tensor:
        """Return the windows of a caption that does not fit, as rows of tokens ``(windows, context)``.

        What tokenizers put around a caption's own tokens differs, and is read off this caption as a whole and cut.
        """
        whole, empty = self.tokenizer([caption, ""], context_length=len(caption.encode()) + 3)
        (cut,) = self.tokenizer([caption])
        start, padding = _same_at_start(whole, empty), whole[-1]
        room = _same_at_start(whole, cut) - start
        end = cut[start + room :]
        last = int((whole != padding).nonzero().max()) + 1
        own = whole[start : last if padding == end[-1] else last - len(end)]
        rows = padding.repeat(math.ceil(len(own) / room), len(cut))
        for row, piece in zip(rows, own.tensor_split(len(rows)), strict=True):
            filled = torch.cat([cut[:start], piece, end])
            row[: len(filled)] = filled
        return rows


def _same_at_start(one: torch.Tensor, other: torch.Tensor) -> int:
    """Return how many elements two rows have in common before the first that differs."""
    size = min(len(one), len(other))
    return int((one[:size] == other[:size]).long().cumprod(dim=0).sum())


def clipscore(
    scorer: ClipScorer,
    image_paths: Mapping[str, str | os.PathLike],
    captions: Mapping[str, str],
    batch_size: int = 64,
    prefix: str = "",
) -> dict[str, float]:
    """Return ``{key: 2.5 * max(cos(image, prefix + caption), 0)}`` in the order of ``image_paths``.

    Raises:
        OSError: an image is missing or must not be read.
        ValueError: the keys differ, an image cannot be decoded, or a score is not finite.
    """
    check_keys(image_paths, captions)
    images = image_features(scorer, list(image_paths.values()), batch_size)
    texts = text_features(scorer, [captions[key] for key in image_paths], batch_size, prefix)
    return named_scores("CLIPScore", image_paths, clip_scores(images, texts))


def image_features(scorer: ClipScorer, paths: Sequence[str | os.PathLike], batch_size: int = 64) -> torch.Tensor:
    """Return unit-length features ``(n, dim)`` of image files, float32 on the CPU; errors as ``clipscore``."""
    from tqdm import tqdm

    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        pixels = _ahead(pool, scorer.load_image, batches)
        shown = tqdm(pixels, "images", len(batches), disable=None)
        return torch.cat([scorer.encode_images(torch.stack(images)).cpu() for images in shown])


def text_features(scorer: ClipScorer, captions: Sequence[str], batch_size: int = 64, prefix: str = "") -> torch.Tensor:
    """Return unit-length features ``(n, dim)`` of ``prefix + caption``, float32 on the CPU."""
    texts = [prefix + caption for caption in captions]
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    return torch.cat([scorer.encode_texts(batch).cpu() for batch in batches])


def clip_scores(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Return ``2.5 * max(cos, 0)`` of each row of ``images`` with that of ``texts``, both ``(n, dim)``: ``(n,)``."""
    return CLIPSCORE_WEIGHT * (images * texts).sum(dim=-1).clamp(min=0)


def ref_clip_scores(
    scores: torch.Tensor, texts: torch.Tensor, references: torch.Tensor, counts: Sequence[int]
) -> torch.Tensor:
    """Return RefCLIPScore ``(n,)``: the harmonic mean of CLIPScore and the best cosine with a reference, at least 0.

    Args:
        scores: CLIPScores ``(n,)``.
        texts: features of the captions ``(n, dim)``.
        references: features of all references, image by image ``(sum(counts), dim)``.
        counts: how many references each image has.

    Where both terms are 0 their harmonic mean, 0/0 in the formula, is taken as its limit 0.
    """
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    cosines = (texts[owners] * references).sum(dim=-1)
    best = torch.zeros_like(scores).scatter_reduce(0, owners, cosines, "amax")  # starts at 0: max(cos, 0)
    total = scores + best
    return 2 * scores * best / total.where(total != 0, torch.ones_like(total))


def named_scores(metric: str, keys: Iterable[str], scores: torch.Tensor) -> dict[str, float]:
    """Return ``{key: score}``, or raise ValueError where a score is not finite."""
    named = dict(zip(keys, scores.tolist(), strict=True))
    lost = [key for key, score in named.items() if not math.isfinite(score)]
    if lost:
        raise ValueError(f"{len(lost)} {metric}s are not a number ({some(lost)}): try --precision fp32")
    return named


def _ahead(
    pool: ThreadPoolExecutor, load: Callable[[Any], Any], batches: Sequence[Sequence[Any]]
) -> Iterator[list[Any]]:
    """Yield every batch loaded, while the next one is being loaded, and no more than that to bound memory."""
    pending = pool.map(load, batches[0]) if batches else iter(())
    for following in [*batches[1:], []]:
        loaded = list(pending)
        pending = pool.map(load, following)
        yield loaded


def _import_open_clip() -> ModuleType:
    try:
        return import_guarded("open_clip")
    except ModuleNotFoundError as error:
        raise ValueError(f"CLIPScore needs open_clip ({error}): run pip install -r requirements.txt") from error


def _resolve_clip(open_clip: ModuleType, model: str, weights: str | None) -> str:
    """Return open_clip's name for ``model`` after refusing what open_clip would silently accept."""
    if Path(model).is_dir():
        if not (Path(model) / "open_clip_config.json").is_file():
            theirs = transformers_config(model).get("model_type") == "clip"
            hint = "; give transformers' CLIP as --clip-weights, and its open_clip name here" if theirs else ""
            raise FileNotFoundError(f"--clip-model {model}: the folder has no open_clip_config.json{hint}")
        if weights is not None:
            raise ValueError(f"--clip-weights {weights}: a folder ({model}) brings its own weights; leave the flag out")
        return f"local-dir:{model}"
    if model not in open_clip.list_models():
        raise ValueError(
            f"--clip-model {model}: neither a folder nor a model that open_clip knows, such as ViT-B-32-quickgelu"
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights is None:
        raise ValueError(f"--clip-model {model} needs --clip-weights: a file, or one of {some(tags, 20)}")
    tag = open_clip.get_pretrained_cfg(model, weights)
    if not tag and not Path(weights).exists():
        raise FileNotFoundError(
            f"--clip-weights {weights}: no such file, and no tag of {model}: {some(tags, 20)}; run "
            "`bash hw3_download.sh p2`, or take --profile micro for the micro world"
        )
    _check_activation(open_clip, model, weights, tag)
    return model


def _check_activation(open_clip: ModuleType, model: str, weights: str, tag: Mapping[str, Any]) -> None:
    """Refuse GELU for weights trained with QuickGELU: open_clip only warns, and not even that for a local file."""
    twin = model.removesuffix("-quickgelu") if model.endswith("-quickgelu") else f"{model}-quickgelu"
    runs = bool(open_clip.get_model_config(model).get("quick_gelu", False))
    trained = tag.get("quick_gelu", runs) if tag else trained_with_quick_gelu(weights)
    if twin not in open_clip.list_models() or trained == runs:
        return
    if trained is not None:
        names = {True: "QuickGELU", False: "GELU"}
        raise ValueError(
            f"--clip-model {model} runs {names[runs]} and the weights {weights} were trained with {names[trained]}, "
            f"which gives wrong scores: use --clip-model {twin}"
        )
    if not runs:
        log.warning("%s runs GELU; if %s holds OpenAI's weights, scores are wrong: use %s", model, weights, twin)


def _readable(weights: str | None, folder: str) -> str | None:
    """Return ``weights``, or a file in ``folder`` with the same tensors where open_clip may not know their form."""
    from safetensors.torch import save_file

    if weights is None or not Path(weights).exists() or Path(weights).suffix in (".npz", ".npy"):
        return weights  # a model folder's own, a tag, or big_vision's
    state = openai_names(read_state_dict(weights))
    if Path(weights).suffix == ".safetensors" and state.keys() == names_in_safetensors(weights):
        return weights
    for of_archive in ("input_resolution", "context_length", "vocab_size"):  # OpenAI's archives describe themselves
        state.pop(of_archive, None)
    file = Path(folder) / "clip.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    return str(file)


@contextmanager
def _explained(model: str, weights: str | None) -> Iterator[None]:
    """Turn what open_clip raises while it loads a model into one line with a remedy, and mute its own log."""
    from safetensors import SafetensorError

    muted = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    except (RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        # Of torch's refusals only the first sentence: the rest is how to run a pickle's code all the same.
        why = first_sentence(error) if "weights_only" in str(error) else one_line(str(error))
        raise ValueError(
            f"CLIP weights {weights or model} cannot be loaded for {model}: {why}; run `bash "
            "hw3_download.sh` where there is a network, give a local file as --clip-weights, or take --profile micro "
            "for the micro world"
        ) from error
    finally:
        logging.disable(muted)
