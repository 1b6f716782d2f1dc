"""evaluate.py: exact scores against independent computations, and a clear line for everything that can go wrong."""

import csv
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from captioning.cli import BAD_INPUT, PARTIAL
from captioning.data.annotations import find_images
from captioning.imports import import_guarded
from captioning.profiles import ROOT
from captioning.scoring import clipscore as clip_module
from captioning.scoring import coco_metrics, evaluator, ptb, tokenizers

COURSE_DATA = ROOT.parent / "shared" / "data" / "hw3_2023"
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="CIDEr's tokenizer needs Java")

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


def annotation_content(references=REFERENCES, suffix=".png"):
    images = [{"id": 100 + i, "file_name": stem + suffix} for i, stem in enumerate(references)]
    pairs = [(100 + i, caption) for i, captions in enumerate(references.values()) for caption in captions]
    annotations = [{"id": i, "image_id": image, "caption": caption} for i, (image, caption) in enumerate(pairs)]
    return {"images": images, "annotations": annotations[::-1]}  # nothing may lean on the order of the file


@pytest.fixture(autouse=True)
def caches_of_their_own(tmp_path_factory, monkeypatch):
    """Keep what one test caches from the others and from the repository."""
    for name, profile in evaluate.PROFILES.items():
        monkeypatch.setitem(evaluate.PROFILES, name, replace(profile, cache=str(tmp_path_factory.mktemp("cache"))))


@pytest.fixture
def files(tmp_path):
    """Return ``write(predictions, annotations) -> argv`` for the two required flags."""

    def write(predictions=PREDICTIONS, annotations=None):
        (tmp_path / "pred.json").write_text(json.dumps(predictions))
        (tmp_path / "val.json").write_text(json.dumps(annotation_content() if annotations is None else annotations))
        return ["--pred_file", str(tmp_path / "pred.json"), "--annotation_file", str(tmp_path / "val.json")]

    return write


# -------------------------------------------------------------------------------------------------------------- CIDEr


@pytest.mark.parametrize("flag", ["--cache", "--no-cache"])
def test_references_kept_between_runs_change_no_score(files, tmp_path, monkeypatch, flag):
    argv = [*files(), "--metrics", "cider,bleu,rouge", "--tokenizer", "ptb", flag]
    tokenized, tokenize = [], ptb.tokenize
    monkeypatch.setattr(ptb, "tokenize", lambda captions: tokenized.append(len(captions)) or tokenize(captions))
    found = []
    for run in range(2):
        out = tmp_path / f"{run}.json"
        assert evaluate.main([*argv, "--per-image", str(out)]) == 0
        found.append(out.read_bytes())
    assert found[0] == found[1]
    kept = list((Path(evaluate.PROFILES["full"].cache) / "references").glob("*"))
    assert len(kept) == (flag == "--cache")
    references, predictions = tokenized[:2]
    assert tokenized[2:] == ([predictions] if flag == "--cache" else [references, predictions])


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


@needs_java
def test_cider_equals_an_independent_implementation():
    expected = plain_cider(REFERENCES, PREDICTIONS)
    mean, scores = evaluator.cider(REFERENCES, PREDICTIONS)
    assert scores == pytest.approx(expected, abs=1e-12)
    assert mean == pytest.approx(sum(expected.values()) / 4, abs=1e-12)
    assert len({round(score, 3) for score in scores.values()}) == 4, "the example must tell the images apart"


@needs_java
def test_cider_of_the_clipscore_papers_example():
    """The example and the figures that Hessel et al. 2021 publish with their code, by the same tokenizer and scorer."""
    references = {
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
    good = {
        "image1": "an orange cat and a grey cat are lying together.",
        "image2": "a black dog wearing headphones looks at the camera as an orange cat walks in the background.",
    }
    bad = {
        "image1": "a calico cat and a white cat are lying together.",
        "image2": "a black dog wearing a hat looks at the camera as a tabby walks in the background.",
    }
    assert round(evaluator.cider(references, good)[0], 4) == 0.5637
    assert round(evaluator.cider(references, bad)[0], 4) == 0.2790


@pytest.mark.parametrize("tokenizer", [pytest.param("ptb-java", marks=needs_java), "ptb"])
def test_cider_of_the_courses_predictions(tokenizer):
    """The published figure, and pycocoevalcap's own score of every image, by both tokenizers."""
    if not COURSE_DATA.is_dir():
        pytest.skip("the course's validation references are not part of the project")
    from pycocoevalcap.cider.cider import Cider

    references = evaluate.load_references(COURSE_DATA / "val.json")
    predictions = evaluate.load_predictions(COURSE_DATA / "pred.json")
    mean, scores = evaluator.cider(references, predictions, tokenizer)
    assert len(scores) == 1789
    assert mean == pytest.approx(0.9265429320858402, abs=1e-12)
    tokens = tokenizers.ptb_tokenize(references, tokenizer)
    candidates = tokenizers.ptb_tokenize({key: [predictions[key]] for key in references}, tokenizer)
    theirs = Cider().compute_score(tokens, candidates)[1]
    assert list(scores.values()) == pytest.approx(theirs.tolist(), abs=1e-12)


@needs_java
def test_cider_repeats_itself_and_ignores_the_order_of_the_files():
    """A CiderScorer used twice accumulates document frequencies; training scores every epoch."""
    first = evaluator.cider(REFERENCES, PREDICTIONS)
    assert evaluator.cider(REFERENCES, PREDICTIONS) == first
    mean, scores = evaluator.cider(dict(reversed(REFERENCES.items())), PREDICTIONS)
    assert (mean, scores) == (pytest.approx(first[0], abs=1e-12), pytest.approx(first[1], abs=1e-12))


@needs_java
def test_one_image_scores_zero_with_a_warning(caplog):
    assert evaluator.cider({"a": ["a red ball"]}, {"a": "a red ball"}) == (0.0, {"a": 0.0})
    assert "single image" in caplog.text


@needs_java
def test_cider_refuses_references_without_words():
    with pytest.raises(ValueError, match="1 images have none: b"):
        evaluator.cider({"a": ["a ball"], "b": ["...", "?"]}, {"a": "a ball", "b": "a cube"})


NASTY = [
    "Hello (there), 3,000 DOGS don't wait... for U.S. cats!",
    '"quoted" & `ticked` — it\'s 1/2 of http://x.com',
    "",
    "Été naïve café",
    "gonna smile 😀 now",
    "*NL* is no line end; <img src='a b'> is no tag",
    "",
]


@needs_java
def test_ptb_tokens_by_hand():
    tokens = tokenizers.ptb_tokenize({"x": NASTY[:4], "y": NASTY[4:]})
    assert tokens["x"][0] == "hello -lrb- there -rrb- 3,000 dogs do n't wait for u.s. cats"
    assert tokens["x"][2:] == ["", "été naïve café"]
    assert tokens["y"][0] == "gon na smile now"
    assert len(tokens["x"]) == 4
    assert len(tokens["y"]) == 3


@needs_java
def test_ptb_tokens_equal_the_packages():
    from pycocoevalcap.tokenizer import ptbtokenizer

    if not os.access(Path(ptbtokenizer.__file__).parent, os.W_OK):
        pytest.skip("the package's own tokenizer writes to its folder")
    captions = {"x": NASTY[:3], "y": [*NASTY[3:], "end"]}
    expected = ptbtokenizer.PTBTokenizer().tokenize({k: [{"caption": c} for c in v] for k, v in captions.items()})
    assert tokenizers.ptb_tokenize(captions) == expected


@needs_java
@pytest.mark.parametrize("space", ["\r", "\n", "\r\n", "\x0b", "\x0c", "\x85", "\u2028", "\u2029", "\t  "])
def test_odd_white_space_moves_no_caption_to_another_image(space):
    """Java ends lines at characters that Python's join leaves alone: every later caption shifted by one image."""
    captions = {"a": [f"one{space}two"], "b": [f"three{space}"], "c": [f"{space}four"], "d": ["five"]}
    assert tokenizers.ptb_tokenize(captions) == {"a": ["one two"], "b": ["three"], "c": ["four"], "d": ["five"]}


def stub_java(folder, monkeypatch, script):
    folder.mkdir()
    (folder / "java").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("cat >/dev/null; echo no memory >&2; exit 1", "exited with 1 .*no memory"),
        ("exit 1", "exited with 1"),  # does not even read its input
        ("cat; exit 1", "exited with 1 and returned 2 of 2 lines"),
        ("cat >/dev/null; echo one line", "returned 1 of 2 lines"),
    ],
)
def test_a_failing_java_gives_no_score(tmp_path, monkeypatch, script, message):
    """pycocoevalcap's tokenizer turns a Java that exits with 1 into ``{0: ['']}`` without an error."""
    stub_java(tmp_path / "bin", monkeypatch, script)
    with pytest.raises(ChildProcessError, match=message):
        tokenizers.ptb_tokenize({"a": ["one"], "b": ["two"]})


def test_without_java_its_tokenizer_fails_clearly_and_leaves_no_file(tmp_path, monkeypatch):
    """pycocoevalcap's tokenizer finds that there is no Java only after writing a temporary file, and leaves it."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    folder = Path(ptbtokenizer.__file__).parent
    before = sorted(folder.iterdir())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="install a Java runtime"):
        evaluator.cider(REFERENCES, PREDICTIONS, "ptb-java")
    assert sorted(folder.iterdir()) == before


def test_without_java_the_pure_tokenizer_is_the_default(tmp_path, monkeypatch):
    """A missing Java is by far the most common failure of this field's evaluators."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tokenizers.pick_tokenizer() == "ptb"
    expected = plain_cider(REFERENCES, PREDICTIONS)
    assert evaluator.cider(REFERENCES, PREDICTIONS)[1] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("missing", [None, "pycocoevalcap"])
@needs_java
def test_javas_tokenizer_is_the_default_where_its_jar_is(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert tokenizers.pick_tokenizer() == ("ptb" if missing else "ptb-java")
    assert tokenizers.pick_tokenizer("ptb") == "ptb"
    with pytest.raises(ValueError, match="--tokenizer spacy"):
        tokenizers.pick_tokenizer("spacy")


# ---------------------------------------------------------------------------------------------------------- CLIPScore

STEMS = [f"im{i}" for i in range(7)]
WORDS = ["a red ball", "two cubes", "a dog on grass", "", "A man, with a hat!", "word " * 50, "a red ball on a table"]
CAPTIONS = dict(zip(STEMS, WORDS, strict=True))
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # OpenAI's


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP in open_clip's folder format; patch dropout shows at once whether it runs in train mode."""
    open_clip = import_guarded("open_clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    config["vision_cfg"]["patch_dropout"] = 0.5
    torch.manual_seed(2)
    model = open_clip.model.CLIP(**config)
    for parameter in model.visual.parameters():  # the default initialisation hardly looks at the image
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Seven pictures of smooth noise: landscape and portrait, colour, grey and transparent, JPEG and PNG."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i, stem in enumerate(STEMS):
        noise = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        picture = noise.resize((80, 50) if i % 2 else (40, 90), Image.Resampling.BICUBIC)
        picture.convert({3: "L", 4: "RGBA"}.get(i, "RGB")).save(folder / f"{stem}.png")
    return folder


@pytest.fixture(scope="module")
def paths(images):
    return {stem: images / f"{stem}.png" for stem in STEMS}


@pytest.fixture(scope="module")
def scorer(clip_folder):
    return evaluate.ClipScorer(str(clip_folder), None, torch.device("cpu"))


def plain_pixels(path, size=32):
    """Bicubic resize of the shorter side, centre crop, RGB, normalise: OpenAI's preprocessing, ``(3, size, size)``."""
    picture = Image.open(path)
    width, height = picture.size
    scale = size / min(width, height)
    picture = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)).convert("RGB")) / 255
    return torch.tensor(((pixels - MEAN) / STD).transpose(2, 0, 1), dtype=torch.float32)


def plain_clipscore(folder, paths, captions):
    """2.5 * max(cos, 0) one pair at a time in float64 at the end, on a model put together by hand."""
    open_clip = import_guarded("open_clip")
    model = open_clip.model.CLIP(**json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]).eval()
    model.load_state_dict(torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True))
    cosines = {}
    for stem, path in paths.items():
        with torch.no_grad():
            image = model.encode_image(plain_pixels(path)[None])[0].double().numpy()
            text = model.encode_text(open_clip.tokenize([captions[stem]]))[0].double().numpy()
        cosines[stem] = float(image @ text / np.sqrt((image @ image) * (text @ text)))
    return cosines, {stem: 2.5 * max(cosine, 0) for stem, cosine in cosines.items()}


def test_clipscore_equals_an_independent_computation(clip_folder, paths, scorer):
    cosines, expected = plain_clipscore(clip_folder, paths, CAPTIONS)
    assert min(cosines.values()) < 0 < max(cosines.values()), "the example must reach both sides of the clamp"
    scores = evaluate.clipscore(scorer, paths, CAPTIONS, batch_size=3)
    assert list(scores) == STEMS
    assert scores == pytest.approx(expected, abs=1e-6)


def test_clipscore_depends_neither_on_order_nor_on_batch_size(paths, scorer):
    whole = evaluate.clipscore(scorer, paths, CAPTIONS, batch_size=64)
    backwards = dict(reversed(paths.items()))
    for size in (1, 2, 7):
        assert evaluate.clipscore(scorer, backwards, CAPTIONS, batch_size=size) == pytest.approx(whole, abs=1e-6)


def test_clipscore_belongs_to_the_pair(paths, scorer):
    right = evaluate.clipscore(scorer, paths, CAPTIONS)
    swapped = evaluate.clipscore(scorer, paths, {**CAPTIONS, "im0": CAPTIONS["im2"], "im2": CAPTIONS["im0"]})
    assert [stem for stem in STEMS if right[stem] != pytest.approx(swapped[stem], abs=1e-4)] == ["im0", "im2"]


def test_captions_are_truncated_at_the_context_length(scorer):
    shorter, cut, longer = scorer.encode_texts(["word " * 74, "word " * 75, "word " * 200])  # 75 + start + end = 77
    assert torch.allclose(cut, longer, atol=1e-6)
    assert not torch.allclose(shorter, cut, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_scores_are_close_and_normalised_in_float32(clip_folder, paths, scorer, precision):
    half = evaluate.ClipScorer(str(clip_folder), None, torch.device("cpu"), precision)
    pixels = torch.stack([half.load_image(path) for path in paths.values()])
    for features in (half.encode_texts(list(CAPTIONS.values())), half.encode_images(pixels)):
        assert features.dtype == torch.float32
        assert features.norm(dim=-1).tolist() == pytest.approx([1.0] * 7, abs=1e-6), "fp16 would round the norm"
    exact, close = (evaluate.clipscore(s, paths, CAPTIONS) for s in (scorer, half))
    assert close == pytest.approx(exact, abs=0.03)
    assert close != exact


def test_precision_follows_the_device(clip_folder, scorer):
    assert (scorer.precision, scorer.model.training) == ("fp32", False)
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())
    with pytest.raises(ValueError, match="--precision fp8"):
        evaluate.ClipScorer(str(clip_folder), None, torch.device("cpu"), "fp8")


def test_a_score_that_is_no_number_is_an_error(paths, scorer, monkeypatch):
    monkeypatch.setattr(scorer, "encode_texts", lambda captions: torch.full((len(captions), 8), float("nan")))
    with pytest.raises(ValueError, match=r"7 CLIPScores are not a number .*--precision fp32"):
        evaluate.clipscore(scorer, paths, CAPTIONS)


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"no picture"])
def test_a_corrupt_image_is_named(tmp_path, paths, scorer, damage):
    broken = tmp_path / "broken.png"
    broken.write_bytes(damage(paths["im0"].read_bytes()))
    with pytest.raises(ValueError, match=r"broken\.png: not a readable image"):
        evaluate.clipscore(scorer, {**paths, "im0": broken}, CAPTIONS)


def test_openai_weights_are_refused_for_a_gelu_model(files, images, capsys, caplog):
    """open_clip runs ViT-B-32 + openai with GELU and a mere warning: published scores were wrong because of it."""
    argv = [*files(), "--images_root", str(images), "--clip-model", "ViT-B-32", "--clip-weights", "openai"]
    assert scored(argv, annotations_of=STEMS) == BAD_INPUT
    assert "use --clip-model ViT-B-32-quickgelu" in caplog.text
    assert capsys.readouterr().out == ""


def scored(argv, annotations_of, metrics="clipscore"):
    """Call main with the annotation and prediction files of ``argv`` rewritten for the images ``annotations_of``."""
    pred, annotations = Path(argv[1]), Path(argv[3])
    pred.write_text(json.dumps({stem: CAPTIONS[stem] for stem in annotations_of}))
    references = {stem: [f"a {stem} ball", "a cube"] for stem in annotations_of}
    annotations.write_text(json.dumps(annotation_content(references)))
    return evaluate.main([*argv, "--metrics", metrics, "--device", "cpu"])


def test_openai_weights_in_a_local_file_are_refused_or_warned_of(tmp_path, caplog):
    """With a local file open_clip does not even warn."""
    open_clip = import_guarded("open_clip")
    named, unnamed = tmp_path / "vit_b_32.OpenAI.safetensors", tmp_path / "weights.safetensors"
    for file in (named, unnamed):
        file.touch()
    with pytest.raises(ValueError, match="ViT-B-32-quickgelu"):
        clip_module._resolve_clip(open_clip, "ViT-B-32", str(named))
    assert clip_module._resolve_clip(open_clip, "ViT-B-32-quickgelu", str(named)) == "ViT-B-32-quickgelu"
    assert not caplog.records
    assert clip_module._resolve_clip(open_clip, "ViT-B-32", str(unnamed)) == "ViT-B-32"
    assert "use ViT-B-32-quickgelu" in caplog.text
    assert clip_module._resolve_clip(open_clip, "ViT-B-32", "laion2b_s34b_b79k") == "ViT-B-32"


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("ViT-B-32-quickgelu", "opanai", "no such file, and no tag of ViT-B-32-quickgelu: openai"),
        ("ViT-B-32-quickgelu", "missing.safetensors", "no such file"),
        ("ViT-B-32-quickgelu", None, "needs --clip-weights"),
        ("ViT-B-33", "openai", "neither a folder nor a model that open_clip knows"),
        ("FOLDER", "openai", "brings its own weights"),
        ("EMPTY", None, "no open_clip_config.json"),
    ],
)
def test_unknown_models_and_weights_are_refused(tmp_path, clip_folder, model, weights, message):
    model = {"FOLDER": str(clip_folder), "EMPTY": str(tmp_path)}.get(model, model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate.ClipScorer(model, weights, torch.device("cpu"))


def test_an_unreachable_hub_gives_one_line_with_a_remedy(monkeypatch, caplog):
    open_clip = import_guarded("open_clip")

    def offline(*_args, **_kwargs):
        raise FileNotFoundError("offline,\nsays the hub")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    with pytest.raises(ValueError, match=r"openai cannot be loaded .*offline, says the hub.*hw3_download") as caught:
        evaluate.ClipScorer("ViT-B-32-quickgelu", "openai", torch.device("cpu"))
    assert "\n" not in str(caught.value)
    assert not caplog.records, "open_clip's own log would repeat it"
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.parametrize("weights", [None, b"", b"garbage", b"\x80\x02garbage"])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_missing_or_broken_weights_never_become_random_ones(tmp_path, clip_folder, weights, suffix):
    """open_clip's create_model goes on with random weights and a warning."""
    shutil.copy(clip_folder / "open_clip_config.json", tmp_path)
    if weights is not None:
        (tmp_path / f"open_clip_model.{suffix}").write_bytes(weights)
    with pytest.raises(ValueError, match="cannot be loaded"):
        evaluate.ClipScorer(str(tmp_path), None, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------- RefCLIPScore, prompts


def plain_ref_clipscore(scorer, scores, captions, references):
    expected = {}
    for stem, score in scores.items():
        text, *others = scorer.encode_texts([captions[stem], *references[stem]]).double()
        best = max(0.0, *(float(text @ other) for other in others))
        expected[stem] = 2 / (1 / score + 1 / best) if score and best else 0.0
    return expected


def test_ref_clipscore_equals_its_definition_and_is_never_nan(images, scorer):
    """Hessel et al. 2021, equation 2; upstream divides 0 by 0 where picture and references both do not fit."""
    references = {stem: ["a red ball", f"{stem} on a table", "cubes"][: 1 + k % 3] for k, stem in enumerate(STEMS)}
    annotations = evaluate.Annotations(references, {stem: f"{stem}.png" for stem in STEMS})
    metrics = ["refclipscore", "clipscore"]
    result = evaluator.evaluate_predictions(CAPTIONS, annotations, metrics, images, lambda: scorer)
    scores = result.per_image["CLIPScore"]
    expected = plain_ref_clipscore(scorer, scores, CAPTIONS, references)
    assert min(scores.values()) == 0 < max(scores.values())
    assert result.per_image["RefCLIPScore"] == pytest.approx(expected, abs=1e-6)
    assert list(result.means) == ["CLIPScore", "RefCLIPScore"]


def test_ref_clipscore_of_zero_and_zero():
    one = torch.eye(2)
    found = clip_module.ref_clip_scores(torch.tensor([0.0, 2.5]), one, torch.stack([-one[0], one[0], one[1]]), [1, 2])
    assert found.tolist() == [0.0, pytest.approx(2 * 2.5 / 3.5)]


def test_the_prompt_stands_before_every_caption(images, paths, scorer, files, clip_folder, capsys):
    prompt = "A photo depicts "
    expected = evaluate.clipscore(scorer, paths, {stem: prompt + caption for stem, caption in CAPTIONS.items()})
    assert evaluate.clipscore(scorer, paths, CAPTIONS, prefix=prompt) == pytest.approx(expected, abs=1e-6)
    argv = [*files(), "--images_root", str(images), "--clip-model", str(clip_folder), "--clip-prompt", prompt]
    assert scored(argv, STEMS) == 0
    assert float(capsys.readouterr().out.split()[1]) == pytest.approx(np.mean([*expected.values()]), abs=1e-6)


def test_captions_beyond_the_context_are_counted(scorer, images, caplog):
    assert scorer.truncated(["word " * 75, "word " * 76, "", "x", "é " * 75, "ü " * 90]) == [1, 5]
    captions = {**CAPTIONS, "im2": "word " * 100}
    annotations = evaluate.Annotations({stem: ["a"] for stem in STEMS}, {stem: f"{stem}.png" for stem in STEMS})
    result = evaluator.evaluate_predictions(captions, annotations, ["clipscore"], images, lambda: scorer)
    assert result.counts == {"references": 7, "empty": 1, "truncated": 1}
    assert "1 captions are longer than CLIP's context and were cut for it: im2" in caplog.text


def test_the_weights_are_named_by_their_hash(clip_folder, scorer, tmp_path):
    file = clip_folder / "open_clip_pytorch_model.bin"
    assert scorer.fingerprint == f"file:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    shutil.copytree(clip_folder, tmp_path / "twice")
    shutil.copy(file, tmp_path / "twice" / "other.bin")  # which one was loaded is not plain from outside
    twice = evaluate.ClipScorer(str(tmp_path / "twice"), None, torch.device("cpu"))
    assert twice.fingerprint.startswith("state_dict:")
    with torch.no_grad():
        twice.model.visual.proj.mul_(2)
    before = twice.__dict__.pop("fingerprint")
    assert twice.fingerprint != before


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (224, 224), (100, 37), (1001, 224)])
def test_open_clips_preprocessing_gives_the_original_packages_pixels(size):
    """Bicubic resize on PIL, centre crop, OpenAI's mean and deviation, at 224: what ``clip.load`` does."""
    open_clip = import_guarded("open_clip")
    config = open_clip.get_pretrained_cfg("ViT-B-32-quickgelu", "openai")
    names = {"mean", "std", "interpolation", "resize_mode"} & config.keys()
    preprocess = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(size=224, **{name: config[name] for name in names}), is_train=False
    )
    noise = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    pixels = preprocess(picture)
    path = io.BytesIO()
    picture.save(path, "PNG")
    path.seek(0)
    assert torch.allclose(pixels, plain_pixels(path, 224), atol=1e-6)
    assert open_clip.get_model_config("ViT-B-32-quickgelu")["quick_gelu"]


# -------------------------------------------------------------------------------------------------------- files, CLI


@needs_java
def test_the_script_prints_one_line_and_imports_nothing_of_clip(files):
    code = (
        "import sys, evaluate; code = evaluate.main(sys.argv[1:]);"
        "assert not {'open_clip', 'timm', 'PIL', 'torchvision', 'decoder', 'captioner'} & sys.modules.keys();"
        "sys.exit(code)"
    )
    argv = [*files(), "--metrics", "cider", "--no-cache"]  # which would lie in the repository
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == f"I captioning: tokenizer ptb-java: {tokenizers.TOKENIZERS['ptb-java']}\n"
    assert done.stdout == f"CIDEr: {evaluator.cider(REFERENCES, PREDICTIONS)[0]}\n"


@needs_java
def test_both_metrics_and_both_files(tmp_path, files, images, paths, clip_folder, scorer, capsys):
    out, rows = tmp_path / "out" / "scores.json", tmp_path / "out" / "rows.json"
    argv = [*files(), "--images-root", str(images), "--clip-model", str(clip_folder), "--batch_size", "2"]
    argv += ["--json", str(out), "--per_image", str(rows)]
    assert scored(argv, STEMS, metrics="clipscore, CIDEr") == 0
    result, per_image = json.loads(out.read_text()), json.loads(rows.read_text())

    expected = evaluate.clipscore(scorer, paths, CAPTIONS)
    assert result["CLIPScore"] == pytest.approx(np.mean(list(expected.values())), abs=1e-6)
    assert capsys.readouterr().out == f"CIDEr: {result['CIDEr']} | CLIPScore: {result['CLIPScore']}\n"
    assert (result["images"], result["metrics"], result["errors"]) == (7, ["CIDEr", "CLIPScore"], {})
    assert (result["device"], result["precision"], result["clip_model"]) == ("cpu", "fp32", str(clip_folder))
    assert {"torch", "open_clip_torch", "pycocoevalcap"} <= result["versions"].keys()
    assert "3.4.1" in result["tokenizer"]

    order = [row["CLIPScore"] for row in per_image.values()]
    assert order == sorted(order, reverse=True) != sorted(order)
    assert {stem: row["caption"] for stem, row in per_image.items()} == CAPTIONS
    assert {stem: row["CLIPScore"] for stem, row in per_image.items()} == pytest.approx(expected, abs=1e-6)
    assert np.mean([row["CIDEr"] for row in per_image.values()]) == pytest.approx(result["CIDEr"])


@needs_java
def test_per_image_without_clipscore_is_sorted_by_cider(tmp_path, files):
    assert evaluate.main([*files(), "--metrics", "cider", "--per_image", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    scores = evaluator.cider(REFERENCES, PREDICTIONS)[1]
    assert list(rows) == sorted(scores, key=scores.get, reverse=True)
    assert rows["d"] == {"CIDEr": scores["d"], "caption": PREDICTIONS["d"]}


def test_when_java_is_asked_for_and_missing_clipscore_is_still_computed(
    tmp_path, files, images, clip_folder, monkeypatch, capsys, caplog
):
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "scores.json"
    argv = [*files(), "--images_root", str(images), "--clip-model", str(clip_folder), "--json", str(out)]
    assert scored([*argv, "--tokenizer", "ptb-java"], STEMS, metrics="cider,clipscore") == PARTIAL
    result = json.loads(out.read_text())
    assert capsys.readouterr().out == f"CLIPScore: {result['CLIPScore']}\n"
    assert "CIDEr" not in result
    assert "Java" in result["errors"]["CIDEr"]
    assert "CIDEr not computed: --tokenizer ptb-java needs Java" in caplog.text


def test_with_nothing_computed_there_is_no_output(tmp_path, files, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = [*files(), "--metrics", "cider,meteor,spice", "--tokenizer", "ptb-java"]
    assert evaluate.main([*argv, "--json", str(tmp_path / "scores.json")]) == BAD_INPUT
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "scores.json").exists()


@needs_java
def test_without_images_cider_is_still_computed(tmp_path, files, capsys, caplog):
    root = ["--images_root", str(tmp_path)]
    for argv, message in [([], "--images_root is needed"), (root, "4 of 4 images are not there (a.png, b.png")]:
        assert evaluate.main([*files(), *argv]) == PARTIAL
        assert capsys.readouterr().out.startswith("CIDEr: ")
        assert message in caplog.text


def test_images_are_looked_for_before_clip_is_loaded(tmp_path):
    annotations = evaluate.Annotations({"a": ["a ball"]}, {"a": "a.jpg"})
    result = evaluator.evaluate_predictions(
        {"a": "x"}, annotations, ["clipscore"], tmp_path, make_scorer=lambda: pytest.fail("a slow load for nothing")
    )
    assert "a.jpg" in result.errors["CLIPScore"]


def test_a_partial_run_survives_running_out_of_memory(tmp_path, monkeypatch):
    def exhausted():
        raise torch.OutOfMemoryError("CUDA out of memory")

    (tmp_path / "a.jpg").touch()
    annotations = evaluate.Annotations({"a": ["a ball"]}, {"a": "a.jpg"})
    result = evaluator.evaluate_predictions({"a": "x"}, annotations, images_root=tmp_path, make_scorer=exhausted)
    assert (result.means, result.errors) == ({"CIDEr": 0.0}, {"CLIPScore": "CUDA out of memory"})


@needs_java
def test_an_empty_prediction_is_scored_with_a_warning(files, caplog, capsys):
    assert evaluate.main([*files({**PREDICTIONS, "b": " "}), "--metrics", "cider"]) == 0
    assert "1 of 4 predicted captions are empty: b" in caplog.text
    assert capsys.readouterr().out.startswith("CIDEr: ")
    assert evaluator.cider(REFERENCES, {**PREDICTIONS, "b": ""})[1]["b"] == 0


def test_missing_and_extra_predictions_are_both_named(files, capsys):
    predictions = dict.fromkeys("abc", "x") | {f"e{i}.png": "x" for i in range(9)}
    assert evaluate.main([*files(predictions), "--metrics", "cider"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert "1 missing from the predictions (d)" in error
    assert "9 extra in the predictions (e0.png, e1.png, e2.png, e3.png, e4.png and 4 more)" in error


@pytest.mark.parametrize(("predicted", "message"), [("a", "1 missing .*\\(b\\)"), ("abc", "1 extra .*\\(c\\)")])
def test_one_missing_or_one_extra_prediction_is_enough(predicted, message):
    with pytest.raises(ValueError, match=message):
        evaluate.check_keys({"a": ["x"], "b": ["y"]}, dict.fromkeys(predicted, "x"))


def without(content, name):
    return {key: value for key, value in content.items() if key != name}


def changed(name, index, **fields):
    content = annotation_content()
    content[name][index] = {**content[name][index], **fields}
    return content


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([], "must hold one JSON object, not a list"),
        (without(annotation_content(), "images"), "needs a list 'images'"),
        (without(annotation_content(), "annotations"), "needs a list 'annotations'"),
        (changed("images", 1, file_name=7), "images[1] needs 'file_name' as non-empty text"),
        (changed("images", 1, id="x"), "images[1] needs 'id' as an integer"),
        (changed("annotations", 2, caption=None), "annotations[2] needs 'caption' as non-empty text"),
        (changed("annotations", 2, image_id=5), "captions of image ids that 'images' does not list: 5"),
        (changed("annotations", 2, caption=" \n"), "annotations[2] needs 'caption' as non-empty text"),
        (
            changed("annotations", 2, caption="x \ud83d"),
            r"non-empty text in valid Unicode, not 'x \ud",
        ),
        (changed("images", 1, file_name="a.jpg"), "a.png and a.jpg share the name 'a' without suffix"),
        (changed("images", 1, id=100), "two images have the id 100"),
        (annotation_content({**REFERENCES, "e": []}), "1 of 5 images have no caption: e"),
        ({"images": [], "annotations": []}, "needs a list 'images'"),
    ],
)
def test_wrong_annotations_are_named(files, capsys, annotations, message):
    assert evaluate.main(files(annotations=annotations)) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "val.json: " in error
    assert message in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["a caption"]', "must hold one JSON object, not a list"),
        ('{"a": ["a caption"]}', "'a' must map to one caption (a string), not list"),
        ('{"a": "x", "b": "y", "a": "z"}', "the key 'a' occurs twice"),
        ('{"a": "\\ud83d"}', "'a' holds half a surrogate pair"),
        ('{"a": ', "Expecting value"),
    ],
)
def test_wrong_predictions_are_named(files, capsys, text, message):
    argv = files()
    Path(argv[1]).write_text(text)
    assert evaluate.main(argv) == BAD_INPUT
    assert "pred.json: " in (error := capsys.readouterr().err)
    assert message in error


def test_missing_files_and_wrong_flags_are_named(files, capsys):
    argv = files()
    for extra, message in [
        (["--pred_file", "nowhere.json"], "nowhere.json: no such file"),
        (["--metrics", "cider,blue"], "--metrics cider,blue: unknown"),
        (["--metrics", ""], "--metrics : unknown"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--device", "toaster"], "--device toaster"),
    ]:
        assert evaluate.main([*argv, *extra]) == BAD_INPUT
        assert message in capsys.readouterr().err


def test_references_keep_their_images_and_their_order(files):
    argv = files()
    expected = {stem: captions[::-1] for stem, captions in REFERENCES.items()}
    assert evaluate.load_references(argv[3]) == expected


# -------------------------------------------------------------------------------------------- what else main can write

EXAMPLES = ROOT / "examples"
EXPECTED = {"ptb-java": 1.417998065871006, "ptb": 1.417998065871006}  # the README's


def example(*flags, pred="predictions"):
    argv = ["--pred_file", EXAMPLES / f"{pred}.json", "--annotation_file", EXAMPLES / "references.json"]
    return [*map(str, argv), "--profile", "micro", "--device", "cpu", *map(str, flags)]


@pytest.mark.parametrize("tokenizer", [pytest.param("ptb-java", marks=needs_java), "ptb"])
def test_the_readmes_example_by_each_tokenizer(tokenizer, capsys):
    assert evaluate.main(example("--metrics", "cider", "--tokenizer", tokenizer)) == 0
    printed = capsys.readouterr()
    assert float(printed.out.removeprefix("CIDEr: ")) == pytest.approx(EXPECTED[tokenizer], abs=1e-8)


def test_everything_that_needs_no_java(tmp_path, capsys, monkeypatch):
    """All of the README's metrics but METEOR and SPICE, with every output, on a machine without Java."""
    monkeypatch.setenv("PATH", str(tmp_path))
    names = {"--json": "out.json", "--per_image": "rows.csv", "--html": "page.html"}
    outputs = [word for flag, name in names.items() for word in (flag, tmp_path / name)]
    argv = example("--images_root", EXAMPLES / "images", "--metrics", "all", "--bootstrap", 200, *outputs)
    argv += ["--compare", str(EXAMPLES / "weaker.json"), "--train-annotations", str(EXAMPLES / "references.json")]
    assert evaluate.main(argv) == PARTIAL
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["CIDEr"] == pytest.approx(EXPECTED["ptb"], abs=1e-8)
    assert result["CLIPScore"] == pytest.approx(1.3941642766, abs=1e-4)
    assert result["RefCLIPScore"] == pytest.approx(0.9045876638, abs=1e-4)
    assert result["BLEU-4"] == pytest.approx(0.2882621696, abs=1e-9)
    assert result["ROUGE-L"] == pytest.approx(0.5564914995, abs=1e-9)
    assert set(result["errors"]) == {"METEOR", "SPICE"}
    means = {"CIDEr", "CLIPScore", "RefCLIPScore", "ROUGE-L"}
    assert result["intervals"].keys() == result["comparison"].keys() == means
    assert result["comparison"]["CIDEr"]["wins"] == 6
    assert result["captions"]["vocabulary"] == 75
    assert result["references"]["captions"] == 96  # four of each of the 24 pictures
    assert result["tokenizer"].startswith("ptb: pure Python")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"CIDEr: {result['CIDEr']} | CLIPScore: {result['CLIPScore']} | RefCLIPScore: ")
    rows = list(csv.DictReader((tmp_path / "rows.csv").open(encoding="utf-8", newline="")))
    order = [float(row["CLIPScore"]) for row in rows]
    assert order == sorted(order, reverse=True)
    assert np.mean([float(row["CIDEr"]) for row in rows]) == pytest.approx(result["CIDEr"])
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<img ") == 24


def test_a_comparison_is_the_difference_of_two_runs(tmp_path, capsys):
    out = tmp_path / "out.json"
    scores = {}
    for name in ("predictions", "weaker"):
        assert evaluate.main(example("--metrics", "cider", "--tokenizer", "ptb", pred=name)) == 0
        scores[name] = float(capsys.readouterr().out.removeprefix("CIDEr: "))
    flags = ["--metrics", "cider", "--tokenizer", "ptb", "--compare", EXAMPLES / "weaker.json", "--json", out]
    assert evaluate.main(example(*flags)) == 0
    result = json.loads(out.read_text())["comparison"]["CIDEr"]
    assert result["difference"] == pytest.approx(scores["predictions"] - scores["weaker"])
    assert len(result["largest"]) == result["wins"] + result["losses"] == 6
    assert capsys.readouterr().out.count("\n") == 2 + 6


def test_partial_scores_say_so_on_every_line(files, capsys, tmp_path):
    """CIDEr of a subset is not comparable with CIDEr of the whole."""
    predictions = {key: PREDICTIONS[key] for key in "abc"} | {"extra": "a cat"}
    argv = [*files(predictions), "--metrics", "cider", "--tokenizer", "ptb", "--json", str(tmp_path / "out.json")]
    assert evaluate.main(argv) == BAD_INPUT
    assert "--allow-partial" in capsys.readouterr().err
    assert evaluate.main([*argv, "--allow-partial", "--bootstrap", "10"]) == 0
    printed = capsys.readouterr()
    subset = {key: REFERENCES[key] for key in "abc"}
    mean = evaluator.cider(subset, {key: PREDICTIONS[key] for key in "abc"}, "ptb")[0]
    assert printed.out.startswith(f"CIDEr: {mean} | PARTIAL: 3 of 4 images\n")
    assert all("PARTIAL: 3 of 4 images" in line for line in printed.out.splitlines())
    assert json.loads((tmp_path / "out.json").read_text())["partial"] == "3 of 4 images"
    assert evaluate.main([*files({"x": "y"}), "--allow-partial"]) == BAD_INPUT


def test_partial_comparison_takes_what_all_files_name(files, tmp_path, capsys):
    (tmp_path / "other.json").write_text(json.dumps({key: PREDICTIONS[key] for key in "bcd"}))
    argv = [*files(PREDICTIONS), "--metrics", "cider", "--allow-partial", "--compare", str(tmp_path / "other.json")]
    assert evaluate.main([*argv, "--tokenizer", "ptb"]) == 0
    assert "PARTIAL: 3 of 4 images" in capsys.readouterr().out.splitlines()[1]


def test_an_extra_prediction_alone_is_partial_too(files, capsys):
    argv = [*files({**PREDICTIONS, "extra": "a cat"}), "--metrics", "cider", "--tokenizer", "ptb", "--allow-partial"]
    assert evaluate.main(argv) == 0
    assert "PARTIAL" not in capsys.readouterr().out, "every annotated image is scored"


@pytest.mark.parametrize("name", ["two words.png", "übung 猫.webp", "a.b.c.JPEG", "v1.0.tar.bmp"])
def test_names_with_spaces_dots_and_unicode_and_any_suffix(tmp_path, scorer, name):
    Image.new("RGB", (40, 40)).save(tmp_path / name)
    stem = Path(name).stem
    for annotated in (name, f"{stem}.jpg"):  # also where the annotations name another suffix
        annotations = evaluate.Annotations({stem: ["a ball"]}, {stem: annotated})
        result = evaluator.evaluate_predictions({stem: "x"}, annotations, ["clipscore"], tmp_path, lambda: scorer)
        assert not result.errors


def test_two_images_that_could_be_meant_are_refused(tmp_path):
    for suffix in ("png", "webp"):
        Image.new("RGB", (40, 40)).save(tmp_path / f"a.{suffix}")
    with pytest.raises(ValueError, match=r"a\.jpg is not there; a\.png and a\.webp could be meant"):
        find_images(evaluate.Annotations({"a": ["x"]}, {"a": "a.jpg"}), tmp_path)


def test_duplicate_caption_ids_are_named(files, capsys):
    """Padding of distributed runs repeats records, and CIDEr then counts them twice."""
    assert evaluate.main(files(annotations=changed("annotations", 0, id=0))) == BAD_INPUT
    assert "two captions have the id 0" in capsys.readouterr().err


def test_a_caption_id_that_is_a_list_is_named(files, capsys):
    """Found by mutating files at random: it ended in a TypeError, unhashable."""
    assert evaluate.main(files(annotations=changed("annotations", 0, id=[1]))) == BAD_INPUT
    assert "one of the captions has the id [1], which is neither number nor text" in capsys.readouterr().err


def test_a_metric_that_is_not_finite_is_no_score(monkeypatch, caplog, files, capsys):
    monkeypatch.setattr(coco_metrics, "rouge_l", lambda *_: (float("nan"), [1.0, float("nan"), 1.0, 1.0]))
    assert evaluate.main([*files(), "--metrics", "rouge,cider", "--tokenizer", "ptb"]) == PARTIAL
    assert capsys.readouterr().out.startswith("CIDEr: ")
    assert "ROUGE-L of 1 images is not a finite number" in caplog.text


def test_wrong_output_flags_are_refused_before_anything_is_scored(files, capsys):
    for flags, message in [
        (["--per_image", "rows.txt"], "--per-image rows.txt: must end in .json or .csv"),
        (["--html", "x.html"], "--html x.html: needs --images-root"),
        (["--bootstrap", "1"], "--bootstrap 1: must be at least 2"),
        (["--tokenizer", "nltk"], "--tokenizer nltk: use auto"),
        (["--train-annotations", "gone.json"], "gone.json: no such file"),
        (["--compare", "gone.json"], "gone.json: no such file"),
    ]:
        assert evaluate.main([*files(), "--metrics", "cider", *flags]) == BAD_INPUT
        assert message in capsys.readouterr().err


def test_several_evaluations_at_the_same_time(tmp_path):
    """pycocoevalcap's tokenizer writes its temporary file beside its jar."""
    flags = ("--metrics", "cider,rouge", "--no-cache", "--json", tmp_path / "out.json")
    command = [sys.executable, "evaluate.py", *example(*flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    runs = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(3)]
    assert len({run.communicate()[0] for run in runs}) == 1
    assert [run.returncode for run in runs] == [0, 0, 0]
