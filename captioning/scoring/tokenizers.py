"""Captions as Penn Treebank tokens, by Stanford's Java program or by the port to Python, ptb.py, which is optional."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence

from captioning.scoring.java import find_java, folder_of, import_pycocoevalcap, run_java

TOKENIZERS = {
    "ptb-java": "Stanford CoreNLP 3.4.1 PTBTokenizer (Java), lower-cased, punctuation dropped",
    "ptb": "pure Python port of the PTB rules, lower-cased, punctuation dropped",
}
PORT = "captioning.scoring.ptb"
# What COCO's evaluation drops. Tokens are lower-cased before, so brackets ("-lrb-") are never dropped, there as here.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
PTB_OPTIONS = ("-preserveLines", "-lowerCase", "-encoding", "utf-8")  # pycocoevalcap's, with the encoding made explicit


def pick_tokenizer(name: str = "auto") -> str:
    """Return ``ptb-java`` or ``ptb``; ``auto`` is Java's where Java and pycocoevalcap (it has the jar) are installed.

    Raises:
        ValueError: ``name`` is none of the three, or ``ptb.py`` is not part of this copy.
    """
    port = importlib.util.find_spec(PORT) is not None
    if name == "auto":
        java = shutil.which("java") is not None and importlib.util.find_spec("pycocoevalcap") is not None
        return "ptb-java" if java or not port else "ptb"
    if name not in TOKENIZERS:
        raise ValueError(f"--tokenizer {name}: use auto, {' or '.join(TOKENIZERS)}")
    if name == "ptb" and not port:
        raise ValueError(
            "--tokenizer ptb: captioning/scoring/ptb.py is not part of this copy; add it (it is under the GPL), or use "
            "--tokenizer ptb-java"
        )
    return name


def ptb_tokenize(captions: Mapping[str, Sequence[str]], tokenizer: str = "auto") -> dict[str, list[str]]:
    """Tokenize ``{key: captions}`` as COCO's evaluation does: Penn Treebank tokens, lower case, no punctuation.

    Returns each caption's tokens joined by single spaces. Errors are those of `pick_tokenizer` and `ptb_java`.
    """
    tokenize = {"ptb-java": ptb_java, "ptb": ptb_python}[pick_tokenizer(tokenizer)]
    tokenized = iter(tokenize([caption for group in captions.values() for caption in group]))
    return {key: [next(tokenized) for _ in group] for key, group in captions.items()}


def ptb_python(captions: Sequence[str]) -> list[str]:
    """Tokenize by the port to Python; return the tokens of each caption, joined by single spaces."""
    from captioning.scoring.ptb import tokenize

    return [drop_punctuation(tokens) for tokens in tokenize(captions)]


def ptb_java(captions: Sequence[str]) -> list[str]:
    """Tokenize by Stanford's PTBTokenizer; return the tokens of each caption, joined by single spaces.

    The same jar, options and punctuation list as pycocoevalcap's ``PTBTokenizer``, but fed through a pipe: nothing is
    written to the package's folder. White space is normalised first, since Java counts ``\\r``, U+2028 and their like
    as line ends, and every later caption would move to the wrong image.

    Raises:
        FileNotFoundError: no Java on the PATH.
        ChildProcessError: Java failed, or returned another number of lines than it was given.
        ValueError: pycocoevalcap is not installed.
    """
    java = find_java("--tokenizer ptb-java")
    package = import_pycocoevalcap("tokenizer.ptbtokenizer")
    jar = folder_of(package) / package.STANFORD_CORENLP_3_4_1_JAR
    text = "".join(" ".join(caption.split()) + "\n" for caption in captions)
    # In the jar's folder and with its bare name: -cp would split a path at its colons.
    command = [java, "-cp", jar.name, "edu.stanford.nlp.process.PTBTokenizer", *PTB_OPTIONS]
    code, output, messages = run_java("the PTB tokenizer", command, jar.parent, text)
    lines = output.decode().split("\n")[:-1]
    if code != 0 or len(lines) != len(captions):
        raise ChildProcessError(
            f"the PTB tokenizer failed: {java} exited with {code} and returned {len(lines)} of {len(captions)} lines "
            f"({messages}); check that `java -version` works, or use --tokenizer ptb"
        )
    return [drop_punctuation(line.rstrip().split(" ")) for line in lines]


def drop_punctuation(tokens: Sequence[str]) -> str:
    """Return a caption's tokens without ``PUNCTUATION``, joined by single spaces."""
    return " ".join(token for token in tokens if token not in PUNCTUATION)
