"""tokenizers.py: captions as PTB tokens by Java and by the port, without Java, and without the port."""

import importlib.util
import os
import sys
import threading
from pathlib import Path

import pytest
from scoring_examples import BOTH_TOKENIZERS, PREDICTIONS, REFERENCES, needs_java, plain_cider, stub_java

from captioning.scoring import evaluator
from captioning.scoring.tokenizers import PORT, PUNCTUATION, pick_tokenizer, ptb_java, ptb_tokenize

NASTY = [
    "Hello (there), 3,000 DOGS don't wait... for U.S. cats!",
    '"quoted" & `ticked` — it\'s 1/2 of http://x.com',
    "",
    "Été naïve café",
    "gonna smile 😀 now",
    "*NL* is no line end; <img src='a b'> is no tag",
    "",
]


@pytest.mark.parametrize("tokenizer", BOTH_TOKENIZERS)
def test_ptb_tokens_by_hand(tokenizer):
    tokens = ptb_tokenize({"x": NASTY[:4], "y": NASTY[4:]}, tokenizer)
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
    assert ptb_tokenize(captions) == expected


def test_the_punctuation_list_is_the_packages():
    from pycocoevalcap.tokenizer import ptbtokenizer

    assert set(ptbtokenizer.PUNCTUATIONS) == PUNCTUATION


@pytest.mark.parametrize("tokenizer", BOTH_TOKENIZERS)
def test_odd_white_space_moves_no_caption_to_another_image(tokenizer):
    """Java ends lines at characters that Python's join leaves alone: every later caption shifted by one image."""
    captions, expected = {}, {}
    for space in ("\r", "\n", "\r\n", "\x0b", "\x0c", "\x85", "\u2028", "\u2029", "\t  "):
        captions |= {(space, 0): [f"one{space}two"], (space, 1): [f"three{space}"], (space, 2): [f"{space}four"]}
        captions[space, 3] = ["five"]
        words = ("one two", "three", "four", "five")
        expected |= {(space, place): [word] for place, word in enumerate(words)}
    assert ptb_tokenize(captions, tokenizer) == expected


@needs_java
def test_several_at_once_and_nothing_is_written_beside_the_jar():
    from pycocoevalcap.tokenizer import ptbtokenizer

    folder = Path(ptbtokenizer.__file__).parent
    before, found = sorted(folder.iterdir()), {}

    def run(number):
        found[number] = ptb_java([f"Cat {number}.", "it's"] * 20)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [f"cat {number}", "it 's"] * 20 for number in range(4)}
    assert sorted(folder.iterdir()) == before


# --- without Java ---------------------------------------------------------------------------------------------------


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
        ptb_tokenize({"a": ["one"], "b": ["two"]})


def test_without_java_its_tokenizer_fails_clearly_and_leaves_no_file(tmp_path, monkeypatch):
    """pycocoevalcap's tokenizer finds that there is no Java only after writing a temporary file, and leaves it."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    folder = Path(ptbtokenizer.__file__).parent
    before = sorted(folder.iterdir())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="install a Java runtime"):
        evaluator.cider(REFERENCES, PREDICTIONS, "ptb-java")
    assert sorted(folder.iterdir()) == before


def test_without_java_the_port_is_the_default(tmp_path, monkeypatch):
    """A missing Java is by far the most common failure of this field's evaluators."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pick_tokenizer() == "ptb"
    expected = plain_cider(REFERENCES, PREDICTIONS)
    assert evaluator.cider(REFERENCES, PREDICTIONS)[1] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("missing", [None, "pycocoevalcap"])
@needs_java
def test_javas_tokenizer_is_the_default_where_its_jar_is(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert pick_tokenizer() == ("ptb" if missing else "ptb-java")
    assert pick_tokenizer("ptb") == "ptb"
    with pytest.raises(ValueError, match="--tokenizer spacy"):
        pick_tokenizer("spacy")


# --- without the port -----------------------------------------------------------------------------------------------


@pytest.fixture
def no_port(monkeypatch):
    """As if ptb.py, which is under another licence, had been removed."""
    monkeypatch.setitem(sys.modules, PORT, None)


@needs_java
def test_without_the_port_java_tokenizes_and_is_the_default(no_port):
    assert pick_tokenizer() == "ptb-java"
    tokens = {"x": ["it 's a cat"]}
    assert ptb_tokenize({"x": ["It's a cat."]}, "ptb-java") == ptb_tokenize({"x": ["It's a cat."]}) == tokens


def test_without_the_port_one_message_says_what_is_missing(no_port):
    with pytest.raises(ValueError, match=r"--tokenizer ptb: captioning/scoring/ptb\.py is not .*--tokenizer ptb-java"):
        ptb_tokenize({"x": ["A cat."]}, "ptb")


def test_with_neither_the_message_is_that_java_is_missing(no_port, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="install a Java runtime"):
        ptb_tokenize({"x": ["A cat."]})
