"""COCO's other metrics by pycocoevalcap: BLEU and ROUGE-L in Python, METEOR and SPICE by its Java programs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from captioning.scoring.java import conversation, failure_message, find_java, folder_of, import_pycocoevalcap, run_java

METEOR_OPTIONS = ("-", "-", "-stdio", "-l", "en", "-norm")  # pycocoevalcap's
SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
START_SECONDS = 600.0  # METEOR reads its paraphrases for 12 s on an idle machine; a busy one may need minutes
SECONDS_A_CAPTION = 5.0

Tokens = Mapping[str, Sequence[str]]  # by image, its captions, each as tokens joined by single spaces
Scores = tuple[float, list[float]]  # of the corpus, and of the images in order


def bleu(references: Tokens, candidates: Mapping[str, str]) -> list[Scores]:
    """Return BLEU-1 to BLEU-4 (Papineni et al. 2002), closest reference length; a corpus' BLEU is no mean of images."""
    scorer = import_pycocoevalcap("bleu.bleu").Bleu(4)
    corpus, images = scorer.compute_score(*_paired(references, candidates), verbose=0)
    return [(float(score), [float(value) for value in values]) for score, values in zip(corpus, images, strict=True)]


def rouge_l(references: Tokens, candidates: Mapping[str, str]) -> Scores:
    """Return ROUGE-L (Lin 2004) with beta 1.2: best precision and best recall over an image's references."""
    mean, scores = import_pycocoevalcap("rouge.rouge").Rouge().compute_score(*_paired(references, candidates))
    return float(mean), [float(score) for score in scores]


def meteor(references: Tokens, candidates: Mapping[str, str]) -> Scores:
    """Return METEOR 1.5 (Denkowski and Lavie 2014), English; the corpus' score is no mean of images.

    Raises:
        FileNotFoundError: no Java.
        ChildProcessError: Java failed or did not answer.
        ValueError: pycocoevalcap is not installed, or its path has a space in it.
    """
    java = find_java("METEOR")
    package = import_pycocoevalcap("meteor.meteor")
    folder = folder_of(package)
    if " " in str(folder):
        raise ValueError(f"METEOR hangs in a path with a space ({folder}): install the suite in a path without one")
    command = [java, "-Xmx2G", "-jar", package.METEOR_JAR, *METEOR_OPTIONS]
    with conversation("METEOR", command, folder, _time_limit(candidates)) as ask:
        lines = []
        for image, caption in candidates.items():
            parts = [" ".join(text.replace("|||", " ").split()) for text in (*references[image], caption)]
            lines.append(ask("SCORE ||| " + " ||| ".join(parts), 1)[0])
        scores = [float(line) for line in ask("EVAL ||| " + " ||| ".join(lines), len(lines) + 1)]
    return scores[-1], scores[:-1]


def spice(references: Tokens, candidates: Mapping[str, str]) -> Scores:
    """Return SPICE (Anderson et al. 2016), the F score of scene graph tuples. Nothing is downloaded.

    Raises:
        FileNotFoundError: no Java, or the models of 384 MB are missing.
        ChildProcessError: Java failed or did not end.
        ValueError: pycocoevalcap is not installed.
    """
    java = find_java("SPICE")
    folder = folder_of(import_pycocoevalcap("spice"))
    missing = [name for name in SPICE_MODELS if not (folder / "lib" / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f'SPICE needs {" and ".join(missing)} in {folder / "lib"}: run `python -c "from pycocoevalcap.spice.'
            'get_stanford_models import get_stanford_models as get; get()"` where there is a network (384 MB)'
        )
    items = [{"image_id": image, "test": candidates[image], "refs": list(references[image])} for image in candidates]
    with tempfile.TemporaryDirectory() as name:  # several may run at once, and the package may be read-only
        given, cache, out = (Path(name) / part for part in ("in.json", "cache", "out.json"))
        given.write_text(json.dumps(items), encoding="utf-8")
        cache.mkdir()
        command = [java, "-Xmx8G", "-jar", "spice-1.0.jar", str(given), "-cache", str(cache), "-out", str(out)]
        limit = _time_limit(candidates)
        code, _, messages = run_java("SPICE", [*command, "-subset", "-silent"], folder, limit=limit)
        if code != 0:
            raise ChildProcessError(failure_message("SPICE", java, code, messages))
        results = json.loads(out.read_text(encoding="utf-8"))
    found = {item["image_id"]: float(item["scores"]["All"]["f"]) for item in results}
    scores = [found[image] for image in candidates]
    return sum(scores) / len(scores), scores


def _time_limit(candidates: Mapping[str, str]) -> float:
    return START_SECONDS + SECONDS_A_CAPTION * len(candidates)


def _paired(references: Tokens, candidates: Mapping[str, str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return both as pycocoevalcap wants them, in the order of ``candidates``."""
    return {key: list(references[key]) for key in candidates}, {key: [text] for key, text in candidates.items()}
