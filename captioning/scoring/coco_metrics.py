"""COCO's other metrics by pycocoevalcap, and the Java programs in it, run so that they cannot fail in silence or hang.

The package's own wrappers write beside their jars, ignore Java's exit code, and wait for ever for a Java that has died.
Here Java reads from pipes, its messages are read and shown, and it is killed when it does not answer.
"""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from captioning.messages import one_line
from captioning.scoring.tokenizers import find_java, import_pycocoevalcap

METEOR_OPTIONS = ("-", "-", "-stdio", "-l", "en", "-norm")  # pycocoevalcap's


SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


START_SECONDS = 600.0  # METEOR reads its paraphrases for 12 s on an idle machine; a busy one may need minutes


SECONDS_A_CAPTION = 5.0


Tokens = Mapping[str, Sequence[str]]  # by image, captions as tokens with single spaces between


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
        ValueError: pycocoevalcap is not installed, or lies in a path with a space.
    """
    java = find_java("METEOR")
    package = import_pycocoevalcap("meteor.meteor")
    folder = Path(package.__file__).parent
    if " " in str(folder):
        raise ValueError(f"METEOR hangs in a path with a space ({folder}): install the suite in a path without one")
    command = [java, "-Xmx2G", "-jar", package.METEOR_JAR, *METEOR_OPTIONS]
    with _conversation("METEOR", command, folder, START_SECONDS + SECONDS_A_CAPTION * len(candidates)) as ask:
        lines = []
        for image, caption in candidates.items():
            parts = [" ".join(text.replace("|||", " ").split()) for text in (*references[image], caption)]
            lines.append(ask("SCORE ||| " + " ||| ".join(parts), 1)[0])
        scores = [float(line) for line in ask("EVAL ||| " + " ||| ".join(lines), len(lines) + 1)]
    return scores[-1], scores[:-1]


def spice(references: Tokens, candidates: Mapping[str, str]) -> Scores:
    """Return SPICE (Anderson et al. 2016), F of scene graph tuples. Nothing is downloaded.

    Raises:
        FileNotFoundError: no Java, or the models of 384 MB are not there.
        ChildProcessError: Java failed or did not end.
        ValueError: pycocoevalcap is not installed.
    """
    java = find_java("SPICE")
    folder = Path(import_pycocoevalcap("spice").__file__).parent
    missing = [name for name in SPICE_MODELS if not (folder / "lib" / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f'SPICE needs {" and ".join(missing)} in {folder / "lib"}: run `python -c "from pycocoevalcap.spice.'
            'get_stanford_models import get_stanford_models as get; get()"` where there is a network (384 MB)'
        )
    items = [{"image_id": image, "test": candidates[image], "refs": list(references[image])} for image in candidates]
    with tempfile.TemporaryDirectory() as name:  # of this run alone: several may run at once, the package be read-only
        work = Path(name)
        (work / "in.json").write_text(json.dumps(items), encoding="utf-8")
        (work / "cache").mkdir()
        command = [
            java,
            "-Xmx8G",
            "-jar",
            "spice-1.0.jar",
            str(work / "in.json"),
            "-cache",
            str(work / "cache"),
            "-out",
            str(work / "out.json"),
            "-subset",
            "-silent",
        ]
        limit = START_SECONDS + SECONDS_A_CAPTION * len(items)
        try:
            run = subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=limit)
        except subprocess.TimeoutExpired as error:
            raise ChildProcessError(f"SPICE did not end within {limit:.0f} s and was stopped") from error
        if run.returncode != 0:
            message = one_line(run.stderr.decode(errors="replace"))
            raise ChildProcessError(f"SPICE failed: {java} exited with {run.returncode} ({message})")
        results = json.loads((work / "out.json").read_text(encoding="utf-8"))
    found = {item["image_id"]: float(item["scores"]["All"]["f"]) for item in results}
    scores = [found[image] for image in candidates]
    return sum(scores) / len(scores), scores


def _paired(references: Tokens, candidates: Mapping[str, str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return both as pycocoevalcap wants them, in the order of ``candidates``."""
    return {key: list(references[key]) for key in candidates}, {key: [text] for key, text in candidates.items()}


@contextmanager
def _conversation(what: str, command: Sequence[str], folder: Path, limit: float) -> Iterator:
    """Yield ``ask(line, answers) -> lines`` of a program that answers on its standard output; end it in any case.

    Raises:
        ChildProcessError: the program ended early, or was stopped after ``limit`` seconds.
    """
    with tempfile.TemporaryFile() as messages:  # a pipe that nobody reads would fill up and block the program
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages)
        watch = threading.Timer(limit, process.kill)
        watch.start()

        def ask(line: str, answers: int) -> list[str]:
            try:
                process.stdin.write((line + "\n").encode())
                process.stdin.flush()
                replies = [process.stdout.readline().decode().strip() for _ in range(answers)]
            except BrokenPipeError:
                replies = [""]
            if "" in replies:
                raise ChildProcessError(_obituary(what, process, messages, limit))
            return replies

        try:
            yield ask
        finally:
            watch.cancel()
            watch.join()
            process.kill()
            process.communicate()


def _obituary(what: str, process: subprocess.Popen, messages: IO[bytes], limit: float) -> str:
    code = process.wait()
    messages.seek(0)
    said = one_line(messages.read().decode(errors="replace")) or "it said nothing"
    stopped = f"; it was stopped after {limit:.0f} s" if code == -signal.SIGKILL else ""
    return f"{what} failed: {process.args[0]} exited with {code} ({said}){stopped}"
