"""What the tests of scoring share: four images with references and predictions, CIDEr by hand, a stand-in for Java."""

import math
import os
import shutil
from collections import Counter

import pytest

from captioning.profiles import ROOT

COURSE_DATA = ROOT.parent / "shared" / "data" / "hw3_2023"
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
BOTH_TOKENIZERS = [pytest.param("ptb-java", marks=needs_java), "ptb"]

REFERENCES = {
    "a": ["a red ball on a table", "the red ball lies on the table", "a ball"],
    "b": ["two green cubes beside a red ball", "green cubes"],
    "c": ["a dog runs on the grass", "a dog on the grass", "the dog runs", "a brown dog runs fast on grass", "dog"],
    "d": ["a man with a red hat", "a man wears a hat on the street"],
}
PREDICTIONS = {
    "d": "a man on a horse",
    "c": "a dog a dog a dog runs on the grass",  # repeats itself: clipping
    "b": "two green cubes",
    "a": "a red ball on a table on a table in a room with a dog and a man",  # far too long: the length penalty
}


PAPERS_GOOD = {
    "image1": "an orange cat and a grey cat are lying together.",
    "image2": "a black dog wearing headphones looks at the camera as an orange cat walks in the background.",
}
PAPERS_BAD = {
    "image1": "a calico cat and a white cat are lying together.",
    "image2": "a black dog wearing a hat looks at the camera as a tabby walks in the background.",
}
PAPERS_REFERENCES = {  # the example that Hessel et al. 2021 publish with their code
    "image1": [
        "two cats are sleeping next to each other.",
        "a grey cat is cuddling with an orange cat on a blanket.",
        "the orange cat is happy that the black cat is close to it.",
    ],
    "image2": [
        "a dog is wearing ear muffs as it lies on a carpet.",
        "a black dog and an orange cat are looking at the photographer.",
        "headphones are placed on a dogs ears.",
    ],
}

STEMS = [f"im{i}" for i in range(7)]
WORDS = ["a red ball", "two cubes", "a dog on grass", "", "A man, with a hat!", "word " * 50, "a red ball on a table"]
CAPTIONS = dict(zip(STEMS, WORDS, strict=True))  # by image of the fixture `images`


def annotation_content(references=REFERENCES, suffix=".png"):
    images = [{"id": 100 + i, "file_name": stem + suffix} for i, stem in enumerate(references)]
    pairs = [(100 + i, caption) for i, captions in enumerate(references.values()) for caption in captions]
    annotations = [{"id": i, "image_id": image, "caption": caption} for i, (image, caption) in enumerate(pairs)]
    return {"images": images, "annotations": annotations[::-1]}  # nothing may depend on the order of the file


def plain_cider(references, predictions, sigma=6.0):
    """CIDEr-D written down from Vedantam et al. 2015, section 8, for captions of plain lower-case words."""

    def grams(text, n):
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    scores = {}
    for key, candidate in predictions.items():
        total = 0.0
        for n in range(1, 5):
            frequency = Counter(g for refs in references.values() for g in {g for r in refs for g in grams(r, n)})
            idf = {g: math.log(len(references) / count) for g, count in frequency.items()}

            def weigh(text, n=n, idf=idf):
                return {g: count * idf.get(g, math.log(len(references))) for g, count in grams(text, n).items()}

            hyp = weigh(candidate)
            for reference in references[key]:
                ref = weigh(reference)
                norms = math.hypot(*hyp.values()) * math.hypot(*ref.values())
                overlap = sum(min(hyp[g], ref[g]) * ref[g] for g in hyp.keys() & ref.keys())
                # pycocoevalcap counts bigrams, one fewer than words, and none in captions of no word
                delta = sum(grams(candidate, 2).values()) - sum(grams(reference, 2).values())
                similarity = overlap / norms if norms else 0.0
                total += similarity * math.exp(-(delta**2) / (2 * sigma**2)) / (4 * len(references[key]))
        scores[key] = 10 * total
    return scores


def stub_java(folder, monkeypatch, script, interpreter="/bin/sh"):
    """Put a `java` on the PATH that runs ``script`` instead."""
    folder.mkdir()
    (folder / "java").write_text(f"#!{interpreter}\n{script}\n")
    (folder / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
