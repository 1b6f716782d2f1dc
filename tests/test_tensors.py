"""tensors.py: what is written comes back, and damage is noticed."""

import torch
from safetensors.torch import save_file

from captioning.tensors import read_tensors, write_tensors

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
