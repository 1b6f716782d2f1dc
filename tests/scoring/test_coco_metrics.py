"""coco_metrics.py and java.py: published figures, and Java programs that fail, hang or are missing."""

import os
import sys
import threading

import pytest
from scoring_examples import PAPERS_BAD, PAPERS_GOOD, PAPERS_REFERENCES, needs_java, stub_java

from captioning.scoring import coco_metrics
from captioning.scoring.coco_metrics import SPICE_MODELS, bleu, rouge_l, spice
from captioning.scoring.tokenizers import ptb_python


def tokens(candidates):
    references = {image: ptb_python(captions) for image, captions in PAPERS_REFERENCES.items()}
    return references, {image: ptb_python([caption])[0] for image, caption in candidates.items()}


def stub(folder, monkeypatch, script):
    """Put a `java` on the PATH that runs a Python script instead."""
    stub_java(folder, monkeypatch, f"import sys, time\n{script}", sys.executable)


@pytest.mark.parametrize(("candidates", "expected"), [(PAPERS_GOOD, 0.4280), (PAPERS_BAD, 0.3121)])
def test_rouge_l_of_the_clipscore_papers_example(candidates, expected):
    mean, scores = rouge_l(*tokens(candidates))
    assert round(mean, 4) == expected
    assert mean == pytest.approx(sum(scores) / 2)


def test_bleu_by_hand():
    references = {"a": ["the red dog runs on grass"], "b": ["a cat"]}
    scores = bleu(references, {"a": "the red dog sits", "b": "a cat"})
    brevity = 2.718281828459045 ** (1 - 8 / 6)  # 6 words against 8
    assert scores[0][0] == pytest.approx(5 / 6 * brevity, rel=1e-6)
    assert scores[1][0] == pytest.approx((5 / 6 * 3 / 4) ** 0.5 * brevity, rel=1e-6)
    assert scores[0][1][1] == pytest.approx(1, rel=1e-6)
    assert len(scores) == 4


def test_references_may_be_in_another_order():
    references, candidates = tokens(PAPERS_GOOD)
    turned = dict(reversed(references.items()))
    assert rouge_l(turned, candidates) == rouge_l(references, candidates)
    assert bleu(turned, candidates) == bleu(references, candidates)


@needs_java
@pytest.mark.skipif("METEOR" not in os.environ, reason="takes 12 s on an idle machine, minutes on a busy one: METEOR=1")
def test_meteor_of_the_clipscore_papers_example():
    assert round(coco_metrics.meteor(*tokens(PAPERS_GOOD))[0], 4) == 0.3444
    assert round(coco_metrics.meteor(*tokens(PAPERS_BAD))[0], 4) == 0.1861


ANSWERS = r"""
for line in sys.stdin:
    parts = line.rstrip("\n").split(" ||| ")
    if parts[0] == "SCORE":
        print(len(parts), parts[-1].replace(" ", "_"), flush=True)
    else:
        print("\n".join(part.split()[0] for part in parts[1:]) + "\n0.5", flush=True)
"""


def test_meteors_conversation(tmp_path, monkeypatch):
    """One line for each image, then one for all; a separator in a caption must not become a reference."""
    stub(tmp_path / "bin", monkeypatch, ANSWERS)
    references = {"a": ["x y", "z"], "b": ["p ||| q"]}
    assert coco_metrics.meteor(references, {"b": "r", "a": ""}) == (0.5, [3.0, 4.0])


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("sys.stderr.write('no\\nmemory'); sys.exit(1)", r"METEOR failed: .*java exited with 1 \(no memory\)"),
        ("sys.stdin.readline(); sys.exit(0)", r"exited with 0 \(it said nothing\)"),
        ("sys.stderr.write('x' * 1000000); sys.exit(3)", "exited with 3"),  # more than a pipe holds
    ],
)
def test_a_failing_meteor_is_read_and_shown(tmp_path, monkeypatch, script, message):
    """pycocoevalcap's wrapper waits forever for an answer."""
    stub(tmp_path / "bin", monkeypatch, script)
    with pytest.raises(ChildProcessError, match=message):
        coco_metrics.meteor(*tokens(PAPERS_GOOD))


def test_a_silent_meteor_is_stopped(tmp_path, monkeypatch):
    stub(tmp_path / "bin", monkeypatch, "time.sleep(60)")
    monkeypatch.setattr(coco_metrics, "START_SECONDS", 0.3)
    monkeypatch.setattr(coco_metrics, "SECONDS_A_CAPTION", 0.0)
    before = threading.active_count()
    with pytest.raises(ChildProcessError, match=r"exited with -9 .*it was stopped after 0 s"):
        coco_metrics.meteor(*tokens(PAPERS_GOOD))
    assert threading.active_count() == before


def test_meteor_in_a_path_with_a_space_is_refused(tmp_path, monkeypatch):
    """Its Java program waits forever there."""
    stub(tmp_path / "bin", monkeypatch, ANSWERS)
    from pycocoevalcap.meteor import meteor

    monkeypatch.setattr(meteor, "__file__", str(tmp_path / "my env" / "meteor.py"))
    with pytest.raises(ValueError, match="hangs in a path with a space"):
        coco_metrics.meteor(*tokens(PAPERS_GOOD))


@pytest.fixture
def spice_folder(tmp_path, monkeypatch):
    """A pycocoevalcap.spice that has its models."""
    import pycocoevalcap.spice

    (tmp_path / "spice" / "lib").mkdir(parents=True)
    for name in SPICE_MODELS:
        (tmp_path / "spice" / "lib" / name).touch()
    monkeypatch.setattr(pycocoevalcap.spice, "__file__", str(tmp_path / "spice" / "__init__.py"))
    return tmp_path / "spice"


SPICE = """
import json, os
items = json.load(open(sys.argv[4]))
assert sys.argv[:1] and "-subset" in sys.argv and os.path.isdir(sys.argv[sys.argv.index("-cache") + 1])
scores = [{"image_id": i["image_id"], "scores": {"All": {"f": len(i["refs"]) / 10}}} for i in items[::-1]]
json.dump(scores, open(sys.argv[sys.argv.index("-out") + 1], "w"))
"""


def test_spice_by_image_and_beside_no_jar(tmp_path, monkeypatch, spice_folder):
    """pycocoevalcap writes beside its jar, which fails in a read-only installation."""
    stub(tmp_path / "bin", monkeypatch, SPICE)
    before = sorted(spice_folder.rglob("*"))
    mean, scores = spice({"a": ["x"], "b": ["y", "z"]}, {"b": "y", "a": "x"})
    assert (mean, scores) == (pytest.approx(0.15), [0.2, 0.1])
    assert sorted(spice_folder.rglob("*")) == before


def test_a_failing_or_endless_spice_is_reported(tmp_path, monkeypatch, spice_folder):
    stub(tmp_path / "bin", monkeypatch, "sys.exit('no models')")
    with pytest.raises(ChildProcessError, match=r"SPICE failed: .*exited with 1 \(no models\)"):
        spice(*tokens(PAPERS_GOOD))
    (tmp_path / "bin" / "java").write_text(f"#!{sys.executable}\nimport time; time.sleep(60)\n")
    monkeypatch.setattr(coco_metrics, "START_SECONDS", 0.3)
    monkeypatch.setattr(coco_metrics, "SECONDS_A_CAPTION", 0.0)
    with pytest.raises(ChildProcessError, match="did not end within"):
        spice(*tokens(PAPERS_GOOD))


def test_spice_downloads_nothing(tmp_path, monkeypatch, spice_folder):
    """pycocoevalcap starts a download of 384 MB as soon as a scorer is made."""
    stub(tmp_path / "bin", monkeypatch, SPICE)
    (spice_folder / "lib" / SPICE_MODELS[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"SPICE needs stanford-corenlp-3\.6\.0-models\.jar in .*384 MB"):
        spice(*tokens(PAPERS_GOOD))


@pytest.mark.parametrize("metric", ["meteor", "spice"])
def test_without_java_one_message_says_what_works_without(tmp_path, monkeypatch, metric):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"{metric.upper()} needs Java .*CIDEr, BLEU, ROUGE-L .* work without"):
        getattr(coco_metrics, metric)(*tokens(PAPERS_GOOD))


def test_without_pycocoevalcap_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.rouge.rouge", None)
    with pytest.raises(ValueError, match="pip install -r requirements"):
        rouge_l(*tokens(PAPERS_GOOD))
