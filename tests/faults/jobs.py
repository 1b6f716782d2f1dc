"""Real processes of the scripts, cheaply: a server imports once, then forks one process a job, which can be killed.

As a script it is the server: a line of JSON in, the job's process id out, then its exit code. ``Jobs`` is the other
end.
"""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from captioning.profiles import ROOT


class Jobs:
    """Starts scripts with a profile of the tests' tiny models; use it as a context manager."""

    def __init__(self, profile):
        self.profile = asdict(profile)

    def __enter__(self):
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"},
        )
        return self

    def __exit__(self, *exception):
        self.server.stdin.close()
        self.server.wait()

    def start(self, script, argv, log, largest_file=None):
        """Start ``script`` with ``argv``, its words going to the file ``log``; return the process id."""
        job = {
            "script": script,
            "argv": [str(word) for word in argv],
            "log": str(log),
            "profile": self.profile,
            "largest_file": largest_file,
        }
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self):
        """Return the exit code of the job that was started; that of a killed one is minus the signal."""
        return int(self.server.stdout.readline())

    def run(self, script, argv, log, meanwhile=None, **limits):
        """Run a job to its end, doing ``meanwhile(process id)`` beside it; return exit code and seconds."""
        began = time.monotonic()
        pid = self.start(script, argv, log, **limits)
        if meanwhile:
            meanwhile(pid)
        return self.wait(), time.monotonic() - began


def kill_after(seconds, number=signal.SIGKILL):
    """Return what sends a job a signal after some seconds, unless it has ended by then."""

    def kill(pid):
        time.sleep(seconds)
        # An ended job has been reaped; its id is not given out again within the blink between its end and this.
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

    return kill


def work(job):
    """Be the job: run the script's own ``main`` and return its exit code."""
    if job["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], job["largest_file"]))
    from captioning.profiles import PROFILES, Profile

    PROFILES["micro"] = Profile(**job["profile"])
    return importlib.import_module(job["script"]).main(job["argv"])


def serve():
    """Fork a process for every line of stdin."""
    os.environ["PATH"] = ""  # without Java the tokenizer is Python's own: no process of another program outlives a kill
    import p2_infer  # noqa: F401 - imported for the jobs to come
    from captioning.imports import import_guarded

    import_guarded("timm.data")
    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        told, tell = os.pipe()  # and no file: the limit on files is not meant for the log
        pid = os.fork()
        if not pid:
            for stream in (1, 2):
                os.dup2(tell, stream)
            code = 1
            try:
                code = work(job)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        os.close(tell)
        print(pid, flush=True)
        with open(told, "rb") as words, Path(job["log"]).open("ab") as log:  # noqa: PTH123 - a descriptor
            log.write(words.read())
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
