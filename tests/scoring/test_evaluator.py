"""evaluator.py: scores against independent computations, and metrics that fail beside others that do not."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from scoring_examples import (
    BOTH_TOKENIZERS,
    CAPTIONS,
    COURSE_DATA,
    PAPERS_BAD,
    PAPERS_GOOD,
    PAPERS_REFERENCES,
    PREDICTIONS,
    REFERENCES,
    STEMS,
    plain_cider,
)

from captioning.data.annotations import Annotations, load_predictions, load_references
from captioning.scoring import evaluator
from captioning.scoring.evaluator import METRICS, Evaluator, Metric, cider, evaluate_predictions, parse_metrics
from captioning.scoring.tokenizers import ptb_tokenize


@pytest.mark.parametrize("tokenizer", BOTH_TOKENIZERS)
def test_cider_equals_an_independent_implementation(tokenizer):
    expected = plain_cider(REFERENCES, PREDICTIONS)
    mean, scores = cider(REFERENCES, PREDICTIONS, tokenizer)
    assert scores == pytest.approx(expected, abs=1e-12)
    assert mean == pytest.approx(sum(expected.values()) / 4, abs=1e-12)
    assert len({round(score, 3) for score in scores.values()}) == 4, "the example must tell the images apart"


@pytest.mark.parametrize("tokenizer", BOTH_TOKENIZERS)
def test_cider_of_the_clipscore_papers_example(tokenizer):
    """The example and the figures that Hessel et al. 2021 publish with their code, by the same tokenizer and scorer."""
    assert round(cider(PAPERS_REFERENCES, PAPERS_GOOD, tokenizer)[0], 4) == 0.5637
    assert round(cider(PAPERS_REFERENCES, PAPERS_BAD, tokenizer)[0], 4) == 0.2790


@pytest.mark.parametrize("tokenizer", BOTH_TOKENIZERS)
def test_cider_of_the_courses_predictions(tokenizer):
    """The published figure, and pycocoevalcap's own score of every image, by both tokenizers."""
    if not COURSE_DATA.is_dir():
        pytest.skip("the course's validation references are not part of the project")
    from pycocoevalcap.cider.cider import Cider

    references = load_references(COURSE_DATA / "val.json")
    predictions = load_predictions(COURSE_DATA / "pred.json")
    mean, scores = cider(references, predictions, tokenizer)
    assert len(scores) == 1789
    assert mean == pytest.approx(0.9265429320858402, abs=1e-12)
    tokens = ptb_tokenize(references, tokenizer)
    candidates = ptb_tokenize({key: [predictions[key]] for key in references}, tokenizer)
    theirs = Cider().compute_score(tokens, candidates)[1]
    assert list(scores.values()) == pytest.approx(theirs.tolist(), abs=1e-12)


def test_cider_repeats_itself_and_ignores_the_order_of_the_files():
    """A CiderScorer used twice accumulates document frequencies; training scores every epoch."""
    first = cider(REFERENCES, PREDICTIONS, "ptb")
    assert cider(REFERENCES, PREDICTIONS, "ptb") == first
    mean, scores = cider(dict(reversed(REFERENCES.items())), PREDICTIONS, "ptb")
    assert (mean, scores) == (pytest.approx(first[0], abs=1e-12), pytest.approx(first[1], abs=1e-12))


def test_one_image_scores_zero_with_a_warning(caplog):
    assert cider({"a": ["a red ball"]}, {"a": "a red ball"}, "ptb") == (0.0, {"a": 0.0})
    assert "single image" in caplog.text


def test_cider_refuses_references_without_words():
    with pytest.raises(ValueError, match="1 images have none: b"):
        cider({"a": ["a ball"], "b": ["...", "?"]}, {"a": "a ball", "b": "a cube"}, "ptb")


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
    annotations = Annotations(references, {stem: f"{stem}.png" for stem in STEMS})
    metrics = ["refclipscore", "clipscore"]
    result = evaluate_predictions(CAPTIONS, annotations, metrics, images, lambda: scorer)
    scores = result.per_image["CLIPScore"]
    expected = plain_ref_clipscore(scorer, scores, CAPTIONS, references)
    assert min(scores.values()) == 0 < max(scores.values())
    assert result.per_image["RefCLIPScore"] == pytest.approx(expected, abs=1e-6)
    assert list(result.means) == ["CLIPScore", "RefCLIPScore"]


def test_captions_beyond_the_context_are_counted(scorer, images, caplog):
    assert scorer.truncated(["word " * 75, "word " * 76, "", "x", "é " * 75, "ü " * 90]) == [1, 5]
    captions = {**CAPTIONS, "im2": "word " * 100}
    annotations = Annotations({stem: ["a"] for stem in STEMS}, {stem: f"{stem}.png" for stem in STEMS})
    result = evaluate_predictions(captions, annotations, ["clipscore"], images, lambda: scorer)
    assert result.counts == {"references": 7, "empty": 1, "truncated": 1}
    assert "1 captions are longer than CLIP's context and were cut for it: im2" in caplog.text


def test_images_are_looked_for_before_clip_is_loaded(tmp_path):
    annotations = Annotations({"a": ["a ball"]}, {"a": "a.jpg"})
    result = evaluate_predictions(
        {"a": "x"}, annotations, ["clipscore"], tmp_path, make_scorer=lambda: pytest.fail("a slow load for nothing")
    )
    assert "a.jpg" in result.errors["CLIPScore"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")]
)
def test_a_partial_run_survives_running_out_of_memory(tmp_path, error):
    def exhausted():
        raise error

    (tmp_path / "a.jpg").touch()
    annotations = Annotations({"a": ["a ball"]}, {"a": "a.jpg"})
    result = Evaluator(annotations, tmp_path, exhausted, tokenizer="ptb").evaluate({"a": "x"})
    assert (result.means, result.errors) == ({"CIDEr": 0.0}, {"CLIPScore": str(error)})


@pytest.mark.parametrize("name", ["two words.png", "übung 猫.webp", "a.b.c.JPEG", "v1.0.tar.bmp"])
def test_names_with_spaces_dots_and_unicode_and_any_suffix(tmp_path, scorer, name):
    Image.new("RGB", (40, 40)).save(tmp_path / name)
    stem = Path(name).stem
    for annotated in (name, f"{stem}.jpg"):  # also where the annotations name another suffix
        annotations = Annotations({stem: ["a ball"]}, {stem: annotated})
        result = evaluate_predictions({stem: "x"}, annotations, ["clipscore"], tmp_path, lambda: scorer)
        assert not result.errors


ALPHABET = Annotations(REFERENCES, {stem: f"{stem}.png" for stem in REFERENCES})


def test_a_metric_that_is_not_finite_is_no_score(monkeypatch, caplog):
    monkeypatch.setattr(evaluator, "rouge_l", lambda *_: (float("nan"), [1.0, float("nan"), 1.0, 1.0]))
    result = Evaluator(ALPHABET, tokenizer="ptb").evaluate(PREDICTIONS, ["rouge", "cider"])
    assert list(result.means) == ["CIDEr"]
    assert "ROUGE-L not computed: ROUGE-L of 1 images is not a finite number: b" in caplog.text


def test_a_metric_is_a_function_of_a_context_that_returns_scores_and_origin(monkeypatch):
    def word_counts(context):
        counts = [float(len(caption.split())) for caption in context.words[1].values()]
        return context.on_words((sum(counts), counts))

    monkeypatch.setitem(evaluator.METRICS, "words", Metric(("Words",), word_counts))
    result = Evaluator(ALPHABET, tokenizer="ptb").evaluate(PREDICTIONS, ["words"])
    assert result.means == {"Words": 18 + 3 + 10 + 5}
    assert result.per_image == {"Words": {"a": 18, "b": 3, "c": 10, "d": 5}}
    assert list(result.made_by) == ["tokenizer"]
    assert result.made_by["tokenizer"].startswith("ptb: pure Python")


def test_what_made_no_number_is_not_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = Evaluator(ALPHABET, tokenizer="ptb-java").evaluate(PREDICTIONS, ["cider"])
    assert (result.made_by, result.origin(), list(result.errors)) == ({}, "", ["CIDEr"])


@pytest.mark.parametrize(("text", "metrics"), [("all", [*METRICS][:-1]), ("ROUGE, cider", ["cider", "rouge"])])
def test_metrics_by_name_in_one_order(text, metrics):
    assert parse_metrics(text) == metrics
    assert parse_metrics("all", boxes=True) == [*METRICS] and [*METRICS][-1] == "chair"


def test_the_package_exports_what_a_library_is_used_for():
    import captioning.scoring

    for name in ("ClipScorer", "Evaluation", "Evaluator", "cider", "cider_d", "clipscore", "ptb_tokenize"):
        assert callable(getattr(captioning.scoring, name)), name
    assert captioning.scoring.cider is cider
