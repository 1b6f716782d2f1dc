"""Captions as PTB tokens: by Stanford's Java program, or by the port to Python."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from captioning.messages import one_line
from captioning.scoring import ptb
from captioning.scoring.ptb import PUNCTUATION

TOKENIZERS = {
    "ptb-java": "Stanford CoreNLP 3.4.1 PTBTokenizer (Java), lower-cased, punctuation dropped",
    "ptb": "pure Python port of the PTB rules, lower-cased, punctuation dropped",
}


def pick_tokenizer(name: str = "auto") -> str:
    """Return ``ptb-java`` or ``ptb``; ``auto`` takes Java's where Java and pycocoevalcap (it has the jar) are there.

    Raises:
        ValueError: ``name`` is none of the three.
    """
    if name == "auto":
        java = shutil.which("java") is not None and importlib.util.find_spec("pycocoevalcap") is not None
        return "ptb-java" if java else "ptb"
    if name not in TOKENIZERS:
        raise ValueError(f"--tokenizer {name}: use auto, {' or '.join(TOKENIZERS)}")
    return name


def ptb_tokenize(captions: Mapping[str, Sequence[str]], tokenizer: str = "auto") -> dict[str, list[str]]:
    """Tokenize ``{key: captions}`` as COCO's evaluation does: Penn Treebank tokens, lower case, no punctuation.

    Returns each caption's tokens joined by single spaces. Errors are those of ``cocometrics.ptb_java``.
    """
    tokenize = {"ptb-java": ptb_java, "ptb": ptb.tokenize}[pick_tokenizer(tokenizer)]
    tokenized = iter(tokenize([caption for group in captions.values() for caption in group]))
    return {key: [next(tokenized) for _ in group] for key, group in captions.items()}


PTB_OPTIONS = ("-preserveLines", "-lowerCase", "-encoding", "utf-8")  # pycocoevalcap's, with the encoding said aloud


def ptb_java(captions: Sequence[str]) -> list[str]:
    """Tokenize by Stanford's PTBTokenizer as COCO's evaluation does; tokens of each caption with single spaces between.

    The same jar, options and punctuation list as pycocoevalcap's ``PTBTokenizer``, but fed through a pipe: nothing is
    written to the package's folder. White space is normalised first, since Java counts ``\\r``, U+2028 and their like
    as line ends, and every later caption would move to the wrong image.

    Raises:
        FileNotFoundError: no Java on the PATH.
        ChildProcessError: Java failed, or gave back another number of lines than it got.
        ValueError: pycocoevalcap is not installed.
    """
    java = find_java("--tokenizer ptb-java")
    package = import_pycocoevalcap("tokenizer.ptbtokenizer")
    jar = Path(package.__file__).with_name(package.STANFORD_CORENLP_3_4_1_JAR)
    lines = [" ".join(caption.split()) for caption in captions]
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
            f"{len(lines)} lines ({one_line(run.stderr.decode(errors='replace'))}); check that `java -version` works, "
            "or use --tokenizer ptb"
        )
    return [" ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATION) for line in tokenized]


def find_java(what: str) -> str:
    """Return the path of ``java``, or raise FileNotFoundError saying that ``what`` needs it."""
    java = shutil.which("java")
    if java is None:
        raise FileNotFoundError(
            f"{what} needs Java and there is no `java` on the PATH: install a Java runtime (Debian: apt-get install "
            "default-jre-headless; conda: conda install openjdk); CIDEr, BLEU, ROUGE-L (--tokenizer ptb) and CLIPScore "
            "work without"
        )
    return java


def import_pycocoevalcap(module: str) -> ModuleType:
    """Import a module of pycocoevalcap; raise ValueError with the remedy where it is not installed."""
    try:
        return importlib.import_module(f"pycocoevalcap.{module}")
    except ModuleNotFoundError as error:
        raise ValueError(f"pycocoevalcap is needed ({error}): run pip install -r requirements.txt") from error
