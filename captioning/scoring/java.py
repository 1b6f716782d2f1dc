"""Running the Java programs inside pycocoevalcap so that a failure is reported and nothing waits forever.

The package's own wrappers write beside their jars, ignore Java's exit code, and wait forever for a Java that has died.
Here Java reads from pipes, its messages are read and shown, and it is killed when it does not answer in time.
"""

from __future__ import annotations

import importlib
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from captioning.messages import one_line


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


def folder_of(module: ModuleType) -> Path:
    """Return the folder of an imported module, where its jar is."""
    assert module.__file__ is not None, "only a namespace package has no file"
    return Path(module.__file__).parent


def run_java(
    what: str, command: Sequence[str], folder: Path, text: str = "", limit: float | None = None
) -> tuple[int, bytes, str]:
    """Run ``command`` in ``folder`` on ``text`` to its end; return its exit code, its output and its messages.

    Raises:
        ChildProcessError: it took more than ``limit`` seconds and was stopped.
    """
    try:
        run = subprocess.run(command, input=text.encode(), cwd=folder, capture_output=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise ChildProcessError(f"{what} did not end within {limit:.0f} s and was stopped") from error
    return run.returncode, run.stdout, one_line(run.stderr.decode(errors="replace"))


def failure_message(what: str, java: str, code: int, messages: str) -> str:
    """Return one line on a program that failed: its exit code and what it wrote to standard error."""
    return f"{what} failed: {java} exited with {code} ({messages or 'it said nothing'})"


@contextmanager
def conversation(
    what: str, command: Sequence[str], folder: Path, limit: float
) -> Iterator[Callable[[str, int], list[str]]]:
    """Yield ``ask(line, answers) -> lines`` of a program that answers on its standard output; end it in any case.

    Raises:
        ChildProcessError: the program ended early, or was stopped after ``limit`` seconds.
    """
    with tempfile.TemporaryFile() as messages:  # a pipe that is not read would fill up and block the program
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages)
        assert process.stdin is not None
        assert process.stdout is not None
        asked, answered = process.stdin, process.stdout
        watch = threading.Timer(limit, process.kill)
        watch.start()

        def ask(line: str, answers: int) -> list[str]:
            try:
                asked.write((line + "\n").encode())
                asked.flush()
                replies = [answered.readline().decode().strip() for _ in range(answers)]
            except BrokenPipeError:
                replies = [""]
            if "" in replies:
                code = process.wait()
                messages.seek(0)
                said = one_line(messages.read().decode(errors="replace"))
                stopped = f"; it was stopped after {limit:.0f} s" if code == -signal.SIGKILL else ""
                raise ChildProcessError(failure_message(what, command[0], code, said) + stopped)
            return replies

        try:
            yield ask
        finally:
            watch.cancel()
            watch.join()
            process.kill()
            process.communicate()
