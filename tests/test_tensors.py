"""tensors.py: what is written comes back, damage is noticed, fingerprints tell apart, copies are exact."""

import pytest
import torch
from safetensors.torch import save_file

from captioning.tensors import copy_exactly, fingerprint, read_tensors, write_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7, dtype=torch.int64)}


def test_tensors_and_texts_come_back_and_any_flipped_byte_is_noticed(tmp_path):
    file = tmp_path / "file.safetensors"
    write_tensors(file, TENSORS, {"text": "é"})
    tensors, texts = read_tensors(file)
    assert texts == {"text": "é"}
    assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            tensors, texts = read_tensors(file)
        except ValueError as error:
            assert str(file) in str(error)
            continue
        # What is left undetected is the checksum's own name, and padding: nothing that is used.
        assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)
        assert texts["text"] == "é"


def test_a_file_without_a_checksum_is_read(tmp_path):
    """Adapters of earlier versions have none."""
    save_file(TENSORS, tmp_path / "old.safetensors", metadata={"captioner": "{}"})
    assert read_tensors(tmp_path / "old.safetensors")[1] == {"captioner": "{}"}


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
