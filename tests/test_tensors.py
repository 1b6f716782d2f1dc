"""tensors.py: files of named tensors are read without running code, damaged ones refused, copies exact."""

import os
import pickle

import pytest
import safetensors.torch
import torch

from captioning.tensors import copy_exactly, fingerprint, read_state_dict

STATE = {"wte.weight": torch.arange(300.0).view(30, 10), "h.0.bias": torch.ones(64)}


class Malicious:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_runs_code_is_refused_and_not_run(tmp_path, zipped):
    path, trace = tmp_path / "decoder.bin", tmp_path / "trace"
    torch.save({"wte.weight": Malicious(str(trace))}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"decoder\.bin: not a plain dict of tensors .*run code"):
        read_state_dict(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the trap was live


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["safetensors", "zipped", "legacy"])
def test_truncated_files_are_refused(tmp_path, kind, share):
    path = tmp_path / ("decoder.safetensors" if kind == "safetensors" else "decoder.bin")
    if kind == "safetensors":
        safetensors.torch.save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zipped")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=rf"{path.name}: (damaged|not a plain dict)"):
        read_state_dict(path)


@pytest.mark.parametrize("value", [[torch.ones(1)], {"model": {"wte.weight": torch.ones(1)}}, torch.ones(2), {"a": 1}])
def test_files_without_a_plain_dict_of_tensors_are_refused(tmp_path, value):
    torch.save(value, tmp_path / "decoder.pt")
    with pytest.raises(ValueError, match=r"decoder\.pt: holds no plain dict of tensors"):
        read_state_dict(tmp_path / "decoder.pt")


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\n", pickle.dumps(object(), protocol=2), b"\x80", b"PK\x03\x04"],
)
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_other_contents_are_refused(tmp_path, content, suffix):
    path = tmp_path / f"decoder.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"decoder\.{suffix}: "):
        read_state_dict(path)


def test_missing_files_and_unknown_suffixes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights file .*gone\.bin.*hw3_download"):
        read_state_dict(tmp_path / "gone.bin")
    with pytest.raises(FileNotFoundError, match="no weights file"):
        read_state_dict(tmp_path)
    (tmp_path / "decoder.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"unknown suffix '\.npz'"):
        read_state_dict(tmp_path / "decoder.npz")


def test_fingerprints_tell_apart_names_shapes_types_and_values():
    base = {"a": torch.arange(6.0)}
    others = [
        {"b": torch.arange(6.0)},
        {"a": torch.arange(6.0).view(2, 3)},
        {"a": torch.arange(6.0).half()},
        {"a": torch.tensor([0, 1, 2, 3, 4, 5.0000005])},
    ]
    assert len({fingerprint(state) for state in [base, *others]}) == 5
    transposed = torch.arange(6.0).view(2, 3).T
    assert fingerprint({"a": transposed}) == fingerprint({"a": transposed.contiguous()})


def test_tensors_are_copied_if_all_names_and_shapes_agree_and_else_none_is():
    targets = {"a": torch.zeros(2), "b": torch.zeros(2, 3)}
    for sources, message in (
        ({"a": torch.ones(2)}, "the file: missing b; unexpected none; name another"),
        ({"a": torch.ones(2), "b": torch.ones(2, 3), "c": torch.ones(1)}, "missing none; unexpected c"),
        ({"a": torch.ones(2), "b": torch.ones(3, 2)}, r"wrong shapes: b \(3, 2\) for \(2, 3\); name another"),
    ):
        with pytest.raises(ValueError, match=message):
            copy_exactly(targets, sources, "the file", "name another")
    assert not any(tensor.any() for tensor in targets.values())
    copy_exactly(targets, {"a": torch.ones(2).half(), "b": torch.ones(2, 3)}, "the file", "name another")
    assert all((tensor == 1).all() and tensor.dtype == torch.float32 for tensor in targets.values())
