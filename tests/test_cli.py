"""Every command line: one line for bad input, its exit code, and both spellings of a flag."""

import argparse
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from captioning import cli
from captioning.cli import BAD_INPUT, INTERRUPTED, UNHEARD, FlagParser, add_common_flags, command, positive_int
from captioning.profiles import ROOT


@pytest.fixture
def parser():
    parser = FlagParser(prog="script")
    parser.add_argument("--pred-file", default="p.json", help="predictions")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--kept_as_is", type=int)
    parser.add_argument("--kept-as-is", dest="another", type=int)
    parser.add_argument("--fast", action=argparse.BooleanOptionalAction, default=True, help="be quick")
    parser.add_argument("--warm-up", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("rest", nargs="*")
    return parser


@pytest.mark.parametrize("flag", ["--pred-file", "--pred_file"])
def test_both_spellings_of_a_flag_work(parser, flag):
    assert parser.parse_args([flag, "a_b.json"]).pred_file == "a_b.json"
    assert parser.parse_args([f"{flag}=a_b=c_d.json"]).pred_file == "a_b=c_d.json", "only the flag may change"


def test_spelling_leaves_everything_but_known_flags_alone(parser):
    args = parser.parse_args(["--kept_as_is", "3", "img_dir", "out_file.json"])
    assert (args.kept_as_is, args.another, args.rest) == (3, None, ["img_dir", "out_file.json"])
    assert parser.parse_args(["--no_warm_up"]).warm_up is False


def test_sys_argv_is_respelled_too(parser, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--pred_file", "x"])
    assert parser.parse_args().pred_file == "x"


@pytest.mark.parametrize("argv", [["--pred", "x"], ["--pred_fil", "x"], ["--unknown_flag"]])
def test_abbreviated_and_unknown_flags_are_refused(parser, argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(argv)
    assert stopped.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_counts_below_one_are_refused_by_their_flag(capsys):
    parser = FlagParser()
    parser.add_argument("--batch-size", "-b", type=positive_int, default=16)
    assert parser.parse_args(["--batch_size", "3"]).batch_size == 3
    for value in ("0", "-2"):
        with pytest.raises(ValueError, match=f"^--batch-size/-b {value}: must be at least 1$"):
            parser.parse_args([f"--batch-size={value}"])
    with pytest.raises(SystemExit):
        parser.parse_args(["-b", "two"])
    assert "invalid positive_int value: 'two'" in capsys.readouterr().err


@pytest.mark.parametrize(("profile", "device"), [(True, True), (False, True), (False, False)])
def test_common_flags_are_those_that_a_script_has_a_use_for(profile, device):
    parser = FlagParser()
    add_common_flags(parser, profile, device)
    expected = {"verbose": False} | ({"profile": "full"} if profile else {}) | ({"device": None} if device else {})
    assert vars(parser.parse_args([])) == expected


def test_help_shows_defaults(parser):
    help_ = " ".join(parser.format_help().split())
    assert "predictions (default: p.json)" in help_
    assert "of the draw (default: 0)" in help_
    assert "(default: None)" not in help_ and "(default: False)" not in help_


def test_pillow_does_not_warn_beside_our_messages():
    code = (
        "import warnings; from captioning.cli import setup_logging; setup_logging()\n"
        "from PIL import Image\n"
        "picture = Image.new('P', (1, 1)); picture.info['transparency'] = b'x'; picture.convert('RGB')\n"
        "warnings.warn_explicit('Corrupt EXIF data', UserWarning, 'x.py', 1, 'PIL.TiffImagePlugin')\n"
        "warnings.warn_explicit('ours', UserWarning, 'x.py', 1, 'captioning.x')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stderr.splitlines() == ["x.py:1: UserWarning: ours"]


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (ValueError("--epochs 0: must be positive"), BAD_INPUT, "error: --epochs 0: must be positive\n"),
        (FileNotFoundError("val.json: no such file"), BAD_INPUT, "error: val.json: no such file\n"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted\n"),
    ],
)
def test_command_turns_bad_input_into_one_line(capsys, raised, code, message):
    @command
    def main(argv=None):
        """Do it."""
        raise raised

    assert main([]) == code != 0
    assert capsys.readouterr() == ("", message)
    assert (main.__name__, main.__doc__) == ("main", "Do it.")


def test_command_passes_codes_arguments_and_bugs_through():
    assert command(lambda argv: len(argv))(["a", "b"]) == 2
    assert command(lambda argv: 7 if argv is None else 0)() == 7
    with pytest.raises(ZeroDivisionError):  # a bug must keep its traceback
        command(lambda argv: 1 // 0)([])
    with pytest.raises(SystemExit):
        command(lambda argv: sys.exit(2))([])


def test_a_wrong_flag_is_one_line(parser, capsys):
    """argparse printed the usage of all flags first: forty lines for p2_train.py."""
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--seed", "x"])
    assert stopped.value.code == BAD_INPUT
    assert re.fullmatch(r"error: argument --seed: .*'x' \(script --help shows all flags\)\n", capsys.readouterr().err)


def test_the_readme_lists_every_exit_code():
    table = (
        (ROOT / "README.md").read_text(encoding="utf-8").partition("| exit code, if not 0 |")[2].partition("\n\n")[0]
    )
    numbers = re.findall(r"\d+", " ".join(re.findall(r"^\| ([\d; ]+) \|", table, flags=re.M)))
    assert [*map(int, numbers)] == [cli.BAD_INPUT, cli.PARTIAL, cli.STOPPED, cli.INTERRUPTED, cli.UNHEARD]


# ------------------------------------------------------------------------------------------- a Python without packages


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py") if "@command" in path.read_text()))
def test_a_python_without_our_packages_is_one_line_with_the_remedy(script, tmp_path):
    """Without site packages, as a system's Python is; each script ended with a traceback."""
    done = subprocess.run(
        [sys.executable, "-S", ROOT / script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (BAD_INPUT, "")
    assert re.fullmatch(r"error: .* has no package \w+: .*activate.*pip install -r requirements.txt.*\n", done.stderr)


def test_a_package_that_is_missing_later_is_one_line_too(capsys):
    @command
    def main(argv):
        import no_such_package  # noqa: F401

    assert main([]) == BAD_INPUT
    assert "has no package no_such_package: " in capsys.readouterr().err

    @command
    def broken(argv):
        import captioning.no_such_module  # noqa: F401

    with pytest.raises(ModuleNotFoundError):  # a bug must keep its traceback
        broken([])


@pytest.mark.parametrize(
    ("statement", "code", "message"),
    [
        ("raise KeyboardInterrupt", INTERRUPTED, "interrupted\n"),
        ("import no_such_package", BAD_INPUT, "error: "),
        ("raise ValueError('a bug')", 1, "Traceback"),
    ],
)
def test_what_happens_while_a_script_still_imports(statement, code, message):
    done = subprocess.run(
        [sys.executable, "-c", f"import captioning\n{statement}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stderr.startswith(message)


# -------------------------------------------------------------------------------------------------- whoever reads it

LINES = """
import sys
from captioning.cli import command
@command
def main(argv=None):
    for number in range({count}):
        print(number)
    open({path!r}, "w").close()
    return 3
sys.exit(main())
"""


@pytest.fixture
def unheard():
    """Run Python code with a standard output whose reader has gone."""

    def run(code, **environment):
        reader, writer = os.pipe()
        os.close(reader)
        known = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        try:
            return subprocess.run(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env=known | environment,
                stdout=writer,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        finally:
            os.close(writer)

    return run


@pytest.mark.parametrize(("count", "unbuffered", "code"), [(1000, "", 3), (100_000, "", UNHEARD), (1000, "1", UNHEARD)])
def test_a_reader_that_has_gone_is_no_error(tmp_path, unheard, count, unbuffered, code):
    """`… | head -1` printed "error: [Errno 32] Broken pipe" or "Exception ignored", with exit code 2 or 120.

    A script that had only its last words to say has done its work, and its own code says so.
    """
    done = unheard(LINES.format(count=count, path=str(tmp_path / "done")), PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (code, "")
    assert (tmp_path / "done").exists() is (code == 3)


def test_help_that_nobody_reads_is_no_error(unheard):
    done = unheard("from captioning.cli import FlagParser, command\ncommand(FlagParser().parse_args)(['--help'])")
    assert (done.returncode, done.stderr) == (0, "")


def test_another_broken_pipe_is_an_error(capsys):
    @command
    def main(argv):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    assert main([]) == BAD_INPUT
    assert "Broken pipe" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_a_full_disk_refuses_is_one_line():
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", LINES.format(count=9, path=os.devnull)],
            cwd=ROOT,
            env=buffered,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (BAD_INPUT, "error: [Errno 28] No space left on device\n")
