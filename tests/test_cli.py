"""runtime.py: nothing half-written, one line for bad input, and an import guard that leaves no trace."""

import argparse
import os
import stat
import subprocess
import sys

import pytest
import torch

from captioning import imports
from captioning.cli import BAD_INPUT, INTERRUPTED, FlagParser, add_common_flags, command, positive_int
from captioning.device import pick_device, seed_everything
from captioning.files import atomic_path, write_json, write_text
from captioning.imports import import_guarded
from captioning.profiles import ROOT


def test_atomic_path_replaces_the_old_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "new" / "folder" / "out.json"
    write_text(target, "old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == target.parent, "os.replace is atomic within one file system only"
        assert target.read_text() == "old", "a reader must see the old file until the new one is whole"
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_atomic_path_keeps_the_old_file_when_the_writer_fails(tmp_path):
    target = tmp_path / "out.json"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_atomic_path_follows_the_umask_and_restores_it(tmp_path, umask):
    """mkstemp makes files 0600, which nobody else could read whatever the user's umask says."""
    before = os.umask(umask)
    try:
        write_text(tmp_path / "out", "x")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o666 & ~umask


def test_write_json_keeps_unicode_readable(tmp_path):
    write_json(tmp_path / "out.json", {"caption": "un café"})
    assert (tmp_path / "out.json").read_text(encoding="utf-8") == '{\n  "caption": "un café"\n}\n'


FAKE_TORCHVISION = """
import torch
@torch.library.register_fake("torchvision::surely_missing")
def fake(x):
    return x
"""


@pytest.fixture
def fake_torchvision(tmp_path, monkeypatch):
    """Return a function that puts a package named torchvision with the given source first on the path."""

    def install(source: str) -> None:
        package = tmp_path / "torchvision"
        package.mkdir()
        (package / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    yield install
    sys.modules.pop("torchvision", None)  # monkeypatch then puts the real one back, where there was one


def test_import_guarded_survives_a_torchvision_without_operators(fake_torchvision):
    """PyPI's torchvision beside CPU-only torch: `operator torchvision::nms does not exist` at import."""
    register_fake = torch.library.register_fake
    fake_torchvision(FAKE_TORCHVISION)
    assert import_guarded("torchvision").fake(3) == 3, "the decorated function must come through unchanged"
    assert torch.library.register_fake is register_fake


def test_import_guarded_hides_no_other_missing_operator(fake_torchvision):
    register_fake = torch.library.register_fake
    fake_torchvision(FAKE_TORCHVISION.replace("torchvision::", "another::"))
    with pytest.raises(RuntimeError, match="another::surely_missing"):
        import_guarded("torchvision")
    assert torch.library.register_fake is register_fake, "the guard must go, also when the import fails"


def test_import_guarded_still_registers_operators_that_exist(fake_torchvision, monkeypatch):
    registered = []

    def register_fake(op, *_args, **_kwargs):
        registered.append(op)
        return lambda function: function

    monkeypatch.setattr(torch.library, "register_fake", register_fake)
    monkeypatch.setattr(imports, "_operator_exists", lambda name: True)
    fake_torchvision(FAKE_TORCHVISION)
    import_guarded("torchvision")
    assert registered == ["torchvision::surely_missing"]


def test_the_real_libraries_import_in_a_fresh_interpreter():
    names = "('timm', 'open_clip')"
    code = f"from captioning.imports import import_guarded; print([import_guarded(n).__name__ for n in {names}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "['timm', 'open_clip']\n", done.stderr


@pytest.fixture
def parser():
    parser = FlagParser(prog="script")
    parser.add_argument("--pred-file", default="p.json", help="predictions")
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
    assert "predictions (default: p.json)" in " ".join(parser.format_help().split())


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


def test_pick_device_auto_prefers_cuda_then_mps_then_cpu(monkeypatch):
    for cuda, mps, expected in [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device() == torch.device(expected)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "xpu", "a toaster"])
def test_pick_device_refuses_what_is_not_there(monkeypatch, name):
    """`mps` on a machine without one used to pass, and died later with a torch traceback."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"--device {name}.*cpu"):
        pick_device(name)


def test_pick_device_knows_how_many_gpus_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"--device cuda:2.*sees 2"):
        pick_device("cuda:2")


def test_seed_everything_repeats_every_generator():
    import random

    import numpy as np

    def draw():
        seed_everything(2**32 + 5)  # numpy takes 32 bits only
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002 - the global one is meant

    assert draw() == draw()
