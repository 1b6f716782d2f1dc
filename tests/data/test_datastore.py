"""datastore.py: which captions are nearest, what a file of them must hold, and the row of tokens that they become."""

import json

import pytest
import torch

from captioning.data.datastore import Datastore, retrieved_row
from captioning.tensors import write_tensors

EOS = 99
CLIP = {"clip_model": "a", "clip_weights": None, "clip_sha256": "b"}
CAPTIONS = ["north", "east", "north east", "north", "south"]
UNIT = torch.nn.functional.normalize(torch.tensor([[0.0, 1], [1, 0], [1, 1], [0, 1], [0, -1]]), dim=-1).half()


def datastore(captions=CAPTIONS, embeddings=UNIT, owners=(0, 0, 1, 1, 2)):
    return Datastore(list(captions), embeddings, torch.tensor(owners), ["x", "y", "z"], CLIP)


def nearest(query, count, image=""):
    return datastore().nearest(torch.tensor([query]), count, [image])[0]


def test_the_nearest_come_first_and_no_text_twice():
    assert nearest([0.1, 0.9], 3) == ["north", "north east", "east"]
    assert nearest([0.9, 0.1], 2) == ["east", "north east"]
    assert nearest([0.1, 0.9], 9) == ["north", "north east", "east", "south"]  # there are no more


def test_an_image_never_gets_its_own_captions_but_others_with_the_same_words():
    assert nearest([0.1, 0.9], 9, "x") == ["north", "north east", "south"]  # the north of image y
    assert nearest([0.1, 0.9], 9, "y") == ["north", "east", "south"]
    assert nearest([0.1, 0.9], 1, "unknown") == ["north"]


def test_images_get_the_same_alone_and_together():
    queries = torch.nn.functional.normalize(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert datastore().nearest(queries, 2) == [datastore().nearest(query[None], 2)[0] for query in queries]


def test_a_file_holds_all_of_it_and_its_fingerprint_tells_contents_apart(tmp_path):
    datastore().save(tmp_path / "a.safetensors")
    found = Datastore.load(tmp_path / "a.safetensors")
    assert (found.captions, found.images, found.clip) == (CAPTIONS, ["x", "y", "z"], CLIP)
    assert torch.equal(found.embeddings, UNIT)
    assert found.embeddings.dtype == torch.float16
    assert found.fingerprint == datastore().fingerprint
    others = [
        datastore(["n", *CAPTIONS[1:]]),
        datastore(embeddings=UNIT.flip(0)),
        datastore(owners=(0, 1, 1, 1, 2)),
    ]
    assert len({store.fingerprint for store in [found, *others]}) == 4


def test_a_file_that_is_missing_damaged_empty_or_something_else_is_refused(tmp_path):
    path = tmp_path / "store.safetensors"

    def refused(kind, words):
        with pytest.raises(kind, match=f"--datastore .*store.safetensors: {words}.*python -m captioning"):
            Datastore.load(path)

    refused(FileNotFoundError, "no such file")
    path.write_bytes(b"text")
    refused(ValueError, "damaged or not a safetensors file")
    write_tensors(path, {"a": torch.zeros(1)}, {"captioner": "{}"})
    refused(ValueError, "not a datastore")
    write_tensors(path, {"embeddings": UNIT, "owners": torch.zeros(5)}, {"datastore": json.dumps({"captions": []})})
    refused(ValueError, "not a datastore")
    datastore([], UNIT[:0], ()).save(path)
    refused(ValueError, "holds no captions")
    datastore().save(path)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    refused(ValueError, "damaged")


def test_a_row_has_one_length_and_the_nearest_caption_at_its_end():
    near, far = [1, 2, 3], [4, 5]
    assert retrieved_row([near, far], 9, EOS) == [EOS, EOS, EOS, 4, 5, EOS, 1, 2, 3]
    assert retrieved_row([near, far], 7, EOS) == [EOS, 4, 5, EOS, 1, 2, 3]
    assert retrieved_row([near, far], 6, EOS) == [EOS, EOS, EOS, 1, 2, 3][-6:]
    assert retrieved_row([near], 3, EOS) == retrieved_row([], 3, EOS) == [EOS] * 3
