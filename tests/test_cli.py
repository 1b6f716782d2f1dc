"""Every command line: one line for bad input, its exit code, and both spellings of a flag."""

import argparse
import subprocess
import sys

import pytest

from captioning.cli import BAD_INPUT, INTERRUPTED, FlagParser, add_common_flags, command, positive_int
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
    expected = {"verbose": False} | ({"profile": "full"} if profile else {}) | ({"device": "auto"} if device else {})
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
