"""Score captions with CIDEr (Vedantam et al. 2015) and CLIPScore (Hessel et al. 2021): a library and a command line.

CIDEr asks how far a caption says what people said of the image, each n-gram weighed by how rare it is among all the
references; CLIPScore asks CLIP how well the caption fits the picture and needs no reference. Both give one number an
image, and their means are what is reported:

    python evaluate.py --pred_file pred.json --images_root images/val --annotation_file val.json
    CIDEr: 0.8844035428513431 | CLIPScore: 0.6921499633789062
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import pickle
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from profiles import PROFILES
from runtime import (
    BAD_INPUT,
    PARTIAL,
    FlagParser,
    command,
    import_guarded,
    pick_device,
    setup_logging,
    write_json,
)

log = logging.getLogger(__name__)

METRICS = {"cider": "CIDEr", "clipscore": "CLIPScore"}  # what --metrics takes and what the results call it, in order
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
TOKENIZER = "Stanford CoreNLP 3.4.1 PTBTokenizer, lower-cased, punctuation dropped"
PTB_OPTIONS = ("-preserveLines", "-lowerCase", "-encoding", "utf-8")  # pycocoevalcap's, with the encoding said aloud
CLIPSCORE_WEIGHT = 2.5  # w of Hessel et al. 2021, equation 1


# ---------------------------------------------------------------------------------------------------------- the files


@dataclass(frozen=True)
class Annotations:
    """The references and the picture of every image of a COCO-style file, keyed by file name without extension."""

    references: dict[str, list[str]]
    file_names: dict[str, str]


def load_annotations(annotation_file: str | os.PathLike) -> Annotations:
    """Read ``images[{id, file_name}]`` and ``annotations[{image_id, caption}]`` from a JSON file.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not of that form, two images share a stem or an id, an image has no reference, or a
            reference is empty or belongs to no image.
    """
    content = _load_object(annotation_file)
    stems, file_names = {}, {}
    for image in _records(annotation_file, content, "images", {"id": int, "file_name": str}):
        stem = Path(image["file_name"]).stem
        if stem in file_names:
            names = f"{file_names[stem]!r} and {image['file_name']!r}"
            raise ValueError(f"{annotation_file}: {names} share the stem {stem!r}, which must name one image")
        if image["id"] in stems:
            raise ValueError(f"{annotation_file}: two images have the id {image['id']}")
        stems[image["id"]], file_names[stem] = stem, image["file_name"]

    references: dict[str, list[str]] = {stem: [] for stem in file_names}
    for record in _records(annotation_file, content, "annotations", {"image_id": int, "caption": str}):
        if record["image_id"] not in stems:
            raise ValueError(f"{annotation_file}: a caption belongs to no listed image: id {record['image_id']}")
        stem, caption = stems[record["image_id"]], record["caption"]
        if not caption.strip():
            raise ValueError(f"{annotation_file}: image {stem!r} has an empty reference; remove or fill it")
        references[stem].append(_unicode(annotation_file, stem, caption))
    bare = [stem for stem, captions in references.items() if not captions]
    if bare or not references:
        raise ValueError(f"{annotation_file}: {len(bare)} of {len(references)} images have no reference: {_some(bare)}")
    return Annotations(references, file_names)


def load_references(annotation_file: str | os.PathLike) -> dict[str, list[str]]:
    """Return ``{file name without extension: [captions]}`` of a COCO-style file; see ``load_annotations``."""
    return load_annotations(annotation_file).references


def load_predictions(pred_file: str | os.PathLike) -> dict[str, str]:
    """Read one flat JSON object ``{file name without extension: caption}``; an empty caption is legal.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not such an object, or names an image twice.
    """
    predictions = _load_object(pred_file)
    for stem, caption in predictions.items():
        if not isinstance(caption, str):
            raise ValueError(f"{pred_file}: {stem!r} must map to one caption (a string), not {type(caption).__name__}")
        _unicode(pred_file, stem, caption)
    return predictions


def check_keys(references: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what is missing and what is extra, unless both have the same keys."""
    missing = [key for key in references if key not in predictions]
    extra = [key for key in predictions if key not in references]
    if missing or extra:
        raise ValueError(
            "predictions and annotations must name the same images: "
            f"{len(missing)} missing from the predictions{_listed(missing)}, "
            f"{len(extra)} extra in the predictions{_listed(extra)}"
        )


def _load_object(path: str | os.PathLike) -> dict[str, Any]:
    """Return the JSON object in ``path``; a repeated key, which ``json`` would silently resolve, is an error."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
    except ValueError as error:  # bad JSON, bad UTF-8, a repeated key
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold one JSON object, not a {type(content).__name__}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} stands there twice")
    return content


def _records(path: Any, content: dict[str, Any], name: str, kinds: dict[str, type]) -> list[dict[str, Any]]:
    records = content.get(name)
    if not isinstance(records, list):
        raise ValueError(f"{path}: needs a list {name!r} of objects with {' and '.join(kinds)}")
    for number, record in enumerate(records):
        for key, kind in kinds.items():
            if not isinstance(record, dict) or not isinstance(record.get(key), kind):
                raise ValueError(f"{path}: {name}[{number}] needs {key!r} as {kind.__name__}")
    return records


def _unicode(path: Any, stem: str, caption: str) -> str:
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}: a caption of {stem!r} holds half a surrogate pair, which is no text") from error
    return caption


def _some(items: Iterable[object], limit: int = 5) -> str:
    items = [str(item) for item in items]
    return ", ".join(items[:limit]) + (", …" if len(items) > limit else "")


def _one_line(text: str, limit: int = 300) -> str:
    return " ".join(text.split())[:limit]


def _listed(items: Sequence[object]) -> str:
    return f" ({_some(items)})" if items else ""


# -------------------------------------------------------------------------------------------------------------- CIDEr


def ptb_tokenize(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Tokenize ``{key: captions}`` as COCO's evaluation does: Penn Treebank tokens, lower case, no punctuation.

    The same jar, options and punctuation list as pycocoevalcap's ``PTBTokenizer``, but fed through a pipe: nothing is
    written to the package's folder. White space is normalised first, since Java counts ``\\r``, U+2028 and their like
    as line ends, and every later caption would move to the wrong image. Returns tokens joined by single spaces.

    Raises:
        FileNotFoundError: no Java on the PATH.
        ChildProcessError: Java failed, or gave back another number of lines than it got.
        ValueError: pycocoevalcap is not installed.
    """
    java = shutil.which("java")
    if java is None:
        raise FileNotFoundError(
            "CIDEr needs Java for its tokenizer and there is no `java` on the PATH: install a Java runtime "
            "(Debian: apt-get install default-jre-headless; conda: conda install openjdk) or use --metrics clipscore"
        )
    ptb = _import_pycocoevalcap("tokenizer.ptbtokenizer")
    jar = Path(ptb.__file__).with_name(ptb.STANFORD_CORENLP_3_4_1_JAR)
    lines = [" ".join(caption.split()) for group in captions.values() for caption in group]
    run = subprocess.run(
        [java, "-cp", jar.name, "edu.stanford.nlp.process.PTBTokenizer", *PTB_OPTIONS],
        input="".join(line + "\n" for line in lines).encode(),
        cwd=jar.parent,  # and a bare jar name: -cp would split a path at its colons
        capture_output=True,
        check=False,
    )
    tokenized = run.stdout.decode().split("\n")[:-1]
    if run.returncode != 0 or len(tokenized) != len(lines):
        raise ChildProcessError(
            f"the PTB tokenizer failed: {java} exited with {run.returncode} and returned {len(tokenized)} of "
            f"{len(lines)} lines ({_one_line(run.stderr.decode(errors='replace'))}); check that `java -version` works"
        )
    results = iter(tokenized)
    return {key: [_drop_punctuation(next(results), ptb.PUNCTUATIONS) for _ in group] for key, group in captions.items()}


def _drop_punctuation(line: str, punctuation: Sequence[str]) -> str:
    return " ".join(word for word in line.rstrip().split(" ") if word not in punctuation)


def _import_pycocoevalcap(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"pycocoevalcap.{module}")
    except ModuleNotFoundError as error:
        raise ValueError(f"CIDEr needs pycocoevalcap ({error}): run pip install -r requirements.txt") from error


def cider(references: Mapping[str, Sequence[str]], predictions: Mapping[str, str]) -> tuple[float, dict[str, float]]:
    """Return CIDEr-D, the mean over the images and ``{key: score}``: pycocoevalcap's ``Cider`` on PTB tokens.

    The document frequencies come from the references given, so scores of different image sets are not comparable, and
    a single image always scores 0. Values lie between 0 and 10 (Vedantam et al. 2015; n = 1..4, sigma = 6, clipped).

    Raises:
        FileNotFoundError, ChildProcessError: as ``ptb_tokenize``.
        ValueError: the keys differ, an image has no reference with a word in it, or pycocoevalcap is not installed.
    """
    check_keys(references, predictions)
    if len(references) == 1:
        log.warning("CIDEr of a single image is 0 by definition: every n-gram occurs in all (one) images")
    tokens = ptb_tokenize(references)
    wordless = [key for key, captions in tokens.items() if not any(captions)]
    if wordless or not tokens:
        raise ValueError(f"CIDEr needs references with words; {len(wordless)} images have none: {_some(wordless)}")
    candidates = ptb_tokenize({key: [predictions[key]] for key in references})
    mean, scores = _import_pycocoevalcap("cider.cider").Cider().compute_score(tokens, candidates)
    return float(mean), dict(zip(references, map(float, scores), strict=True))


# ---------------------------------------------------------------------------------------------------------- CLIPScore


class ClipScorer:
    """A CLIP model with its own preprocessing and tokenizer, loaded once and kept in eval mode.

    Args:
        model: an open_clip model name, or a folder with ``open_clip_config.json`` and the weights beside it.
        weights: an open_clip tag or a local file; None for a folder.
        device: where it runs; None picks one.
        precision: ``fp32``, ``fp16``, ``bf16``, or ``auto``: fp16 on CUDA, as OpenAI's package runs it, else fp32.

    Raises:
        FileNotFoundError: the folder has no configuration, or ``weights`` is neither a tag nor a file.
        ValueError: the model is unknown, its activation is not the one that the weights were trained with, the
            weights cannot be loaded, or open_clip is not installed. Random weights are never used.
    """

    def __init__(
        self,
        model: str = PROFILES["full"].clip_model,
        weights: str | None = PROFILES["full"].clip_weights,
        device: torch.device | None = None,
        precision: str = "auto",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"--precision {precision}: use one of {', '.join(PRECISIONS)}")
        self.model_name, self.weights = model, weights
        self.device = device or pick_device()
        self.precision = precision if precision != "auto" else "fp16" if self.device.type == "cuda" else "fp32"
        open_clip = _import_open_clip()
        name = _resolve_clip(open_clip, model, weights)
        with _explained(model, weights):
            self.model, self.preprocess = open_clip.create_model_from_pretrained(
                name, weights, precision=self.precision, device=self.device
            )
            self.tokenizer = open_clip.get_tokenizer(name)  # truncates at the model's context length, OpenAI's at 77
        self.model.eval().requires_grad_(False)
        self.input_dtype = open_clip.get_input_dtype(self.precision)

    @property
    def description(self) -> dict[str, str | None]:
        """What made the numbers: model, weights, device and precision."""
        return {
            "clip_model": self.model_name,
            "clip_weights": self.weights,
            "device": str(self.device),
            "precision": self.precision,
        }

    def load_image(self, path: str | os.PathLike) -> torch.Tensor:
        """Return the preprocessed pixels ``(3, size, size)`` of an image; EXIF orientation is ignored, as by OpenAI.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it cannot be decoded.
        """
        from PIL import Image

        try:
            with Image.open(path) as image:
                return self.preprocess(image)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
            raise ValueError(f"{path}: not a readable image ({error}); fetch or convert it again") from error

    @torch.inference_mode()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return unit-length features ``(n, dim)`` in float32 for preprocessed pixels ``(n, 3, size, size)``."""
        features = self.model.encode_image(pixels.to(self.device, self.input_dtype))
        return F.normalize(features.float(), dim=-1)  # float32 first: fp16 would round the norm

    @torch.inference_mode()
    def encode_texts(self, captions: Sequence[str]) -> torch.Tensor:
        """Return unit-length features ``(n, dim)`` in float32 for captions, taken as they are, without any prefix."""
        features = self.model.encode_text(self.tokenizer(list(captions)).to(self.device))
        return F.normalize(features.float(), dim=-1)


def clipscore(
    scorer: ClipScorer,
    image_paths: Mapping[str, str | os.PathLike],
    captions: Mapping[str, str],
    batch_size: int = 64,
) -> dict[str, float]:
    """Return ``{key: 2.5 * max(cos(image, caption), 0)}`` in the order of ``image_paths`` (Hessel et al. 2021).

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: the keys differ, an image cannot be decoded, or a score is not finite.
    """
    from tqdm import tqdm

    check_keys(image_paths, captions)
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: must be at least 1")
    keys, scores = list(image_paths), {}
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        pixels = _ahead(pool, scorer.load_image, [[image_paths[key] for key in batch] for batch in batches])
        for batch, images in tqdm(zip(batches, pixels, strict=True), "CLIPScore", len(batches), disable=None):
            image_features = scorer.encode_images(torch.stack(images))  # (n, dim)
            text_features = scorer.encode_texts([captions[key] for key in batch])  # (n, dim)
            cosine = (image_features * text_features).sum(dim=-1)  # (n,)
            scores.update(zip(batch, (CLIPSCORE_WEIGHT * cosine.clamp(min=0)).tolist(), strict=True))
    lost = [key for key, score in scores.items() if score != score]
    if lost:
        raise ValueError(f"{len(lost)} CLIPScores are not a number ({_some(lost)}): try --precision fp32")
    return scores


def _ahead(pool: ThreadPoolExecutor, load: Callable[[Any], Any], batches: list[list[Any]]) -> Iterator[list[Any]]:
    """Yield every batch loaded, while the next one (and no more: memory) is being loaded behind it."""
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
    """Return open_clip's name for ``model`` after ruling out whatever it would accept in silence."""
    if Path(model).is_dir():
        if not (Path(model) / "open_clip_config.json").is_file():
            raise FileNotFoundError(f"--clip-model {model}: the folder has no open_clip_config.json")
        if weights is not None:
            raise ValueError(f"--clip-weights {weights}: a folder ({model}) brings its own weights; leave the flag out")
        return f"local-dir:{model}"
    if model not in open_clip.list_models():
        raise ValueError(
            f"--clip-model {model}: neither a folder nor a model that open_clip knows, such as ViT-B-32-quickgelu"
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights is None:
        raise ValueError(f"--clip-model {model} needs --clip-weights: a file, or one of {_some(tags, 20)}")
    tag = open_clip.get_pretrained_cfg(model, weights)
    if not tag and not Path(weights).is_file():
        raise FileNotFoundError(f"--clip-weights {weights}: no such file, and no tag of {model}: {_some(tags, 20)}")
    _check_activation(open_clip, model, weights, tag)
    return model


def _check_activation(open_clip: ModuleType, model: str, weights: str, tag: Mapping[str, Any]) -> None:
    """Refuse GELU for weights trained with QuickGELU: open_clip merely warns, or is silent where they are a file."""
    twin = f"{model}-quickgelu"
    if open_clip.get_model_config(model).get("quick_gelu", False) or twin not in open_clip.list_models():
        return
    if tag.get("quick_gelu", False) or (not tag and "openai" in Path(weights).name.lower()):
        raise ValueError(
            f"--clip-model {model} runs GELU and the weights {weights} were trained with QuickGELU, which gives wrong "
            f"scores: use --clip-model {twin}"
        )
    if not tag:
        log.warning("%s runs GELU; if %s holds OpenAI's weights, scores are wrong: use %s", model, weights, twin)


@contextmanager
def _explained(model: str, weights: str | None) -> Iterator[None]:
    """Turn whatever open_clip raises while it loads a model into one line with a remedy, and mute its own log."""
    from safetensors import SafetensorError

    muted = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    except (RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(
            f"CLIP weights {weights or model} cannot be loaded for {model}: {_one_line(str(error))}; run `bash "
            "hw3_download.sh` where there is a network, give a local file as --clip-weights, or take --profile micro "
            "for the micro world"
        ) from error
    finally:
        logging.disable(muted)


# --------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Evaluation:
    """What was computed: the mean and the scores by image of every metric, and why another one has none."""

    images: int
    means: dict[str, float] = field(default_factory=dict)  # {"CIDEr": 0.88, "CLIPScore": 0.69}
    per_image: dict[str, dict[str, float]] = field(default_factory=dict)  # metric to {stem: score}
    errors: dict[str, str] = field(default_factory=dict)
    clip: dict[str, str | None] = field(default_factory=dict)  # ClipScorer.description of the scorer used

    def line(self) -> str:
        """The line that reports quote: ``CIDEr: 0.88… | CLIPScore: 0.69…``, every digit kept."""
        return " | ".join(f"{metric}: {mean}" for metric, mean in self.means.items())

    def ranking(self, predictions: Mapping[str, str]) -> dict[str, dict[str, float | str]]:
        """Return ``{stem: {metric: score, "caption": caption}}``, best CLIPScore (or else CIDEr) first."""
        leading = list(self.means)[-1]
        order = sorted(predictions, key=lambda stem: (-self.per_image[leading][stem], stem))
        return {
            stem: {**{metric: scores[stem] for metric, scores in self.per_image.items()}, "caption": predictions[stem]}
            for stem in order
        }

    def summary(self) -> dict[str, Any]:
        """Everything needed to quote the numbers: means, counts, model, device, precision, tokenizer, versions."""
        packages = ["torch", "torchvision", "open_clip_torch", "pillow"] if "CLIPScore" in self.means else []
        packages += ["pycocoevalcap"] if "CIDEr" in self.means else []
        return {
            **self.means,
            "images": self.images,
            "metrics": list(self.means),
            "errors": self.errors,
            **({"tokenizer": TOKENIZER} if "CIDEr" in self.means else {}),
            **self.clip,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        }


def evaluate_predictions(
    predictions: Mapping[str, str],
    annotations: Annotations,
    metrics: Sequence[str] = tuple(METRICS),
    images_root: str | os.PathLike | None = None,
    make_scorer: Callable[[], ClipScorer] = ClipScorer,
    batch_size: int = 64,
) -> Evaluation:
    """Score ``{stem: caption}`` by ``metrics``; a metric that cannot be computed is logged and does not stop the other.

    ``make_scorer`` is called only for CLIPScore and only once all images are known to exist.

    Raises:
        ValueError: predictions and annotations do not name the same images, or a metric is unknown.
    """
    wanted = parse_metrics(",".join(metrics))
    check_keys(annotations.references, predictions)
    empty = [stem for stem, caption in predictions.items() if not caption.strip()]
    if empty:
        log.warning("%d of %d predicted captions are empty: %s", len(empty), len(predictions), _some(empty))

    def score_cider() -> tuple[float, dict[str, float]]:
        return cider(annotations.references, predictions)

    def score_clip() -> tuple[float, dict[str, float]]:
        paths = _image_paths(annotations, images_root)
        scorer = make_scorer()
        result.clip.update(scorer.description)
        log.info("CLIPScore by %(clip_model)s on %(device)s in %(precision)s (fp16: other fourth digit)", result.clip)
        scores = clipscore(scorer, paths, predictions, batch_size)
        return sum(scores.values()) / len(scores), scores

    result = Evaluation(images=len(predictions))
    for metric in wanted:
        label = METRICS[metric]
        try:
            result.means[label], result.per_image[label] = {"cider": score_cider, "clipscore": score_clip}[metric]()
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            result.errors[label] = str(error)
            log.error("%s not computed: %s", label, error)
    return result


def _image_paths(annotations: Annotations, images_root: str | os.PathLike | None) -> dict[str, Path]:
    if images_root is None:
        raise ValueError("--images_root is needed for CLIPScore; give it or use --metrics cider")
    paths = {stem: Path(images_root) / name for stem, name in annotations.file_names.items()}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"--images_root {images_root}: {len(missing)} of {len(paths)} images are not there{_listed(missing)}"
        )
    return paths


def parse_metrics(text: str) -> list[str]:
    """Return the metrics in ``"cider,clipscore"``, in the order of ``METRICS``; ValueError for an unknown or no one."""
    wanted = {name.strip().lower() for name in text.split(",")}
    if not wanted <= METRICS.keys():
        raise ValueError(f"--metrics {text}: unknown; choose from {', '.join(METRICS)}, with a comma between")
    return [metric for metric in METRICS if metric in wanted]


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = FlagParser(description="Score captions with CIDEr and CLIPScore.")
    parser.add_argument("--pred-file", required=True, help="predictions: {file name without extension: caption}")
    parser.add_argument("--images-root", help="folder of the images; only CLIPScore needs it")
    parser.add_argument("--annotation-file", required=True, help="COCO-style references of exactly those images")
    parser.add_argument("--metrics", default=",".join(METRICS), help="which ones, with a comma between")
    parser.add_argument("--json", metavar="OUT", help="write the scores and what made them here")
    parser.add_argument("--per-image", metavar="OUT", help="write every image's scores here, best first")
    parser.add_argument("--clip-model", help="open_clip name, or folder with open_clip_config.json (the profile's)")
    parser.add_argument("--clip-weights", help="open_clip tag or file (the profile's; a folder has its own)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per CLIP forward pass")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="CLIP's; auto: fp16 on CUDA, else fp32")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="full", help="sets names and paths only")
    parser.add_argument("--verbose", action="store_true", help="log more")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Score a prediction file; return 0, 3 (``PARTIAL``) where one metric failed, 2 where none could be computed."""
    args = build_parser().parse_args(argv)
    setup_logging(args.verbose)
    metrics = parse_metrics(args.metrics)
    device = pick_device(args.device)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: must be at least 1")
    profile = PROFILES[args.profile]
    model = args.clip_model or profile.clip_model
    weights = args.clip_weights or (None if Path(model).is_dir() else profile.clip_weights)
    predictions = load_predictions(args.pred_file)
    result = evaluate_predictions(
        predictions,
        load_annotations(args.annotation_file),
        metrics,
        args.images_root,
        lambda: ClipScorer(model, weights, device, args.precision),
        args.batch_size,
    )
    if not result.means:
        return BAD_INPUT
    print(result.line())
    if args.json:
        write_json(args.json, result.summary())
    if args.per_image:
        write_json(args.per_image, result.ranking(predictions))
    return PARTIAL if result.errors else 0


if __name__ == "__main__":
    sys.exit(main())
