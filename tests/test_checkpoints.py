"""checkpoints.py: weights in the forms that people have, read without running code; what is uncertain is refused."""

import argparse
import json
import os
import pickle

import pytest
import safetensors.torch
import torch

from captioning.checkpoints import peel, read_state_dict, transformers_config

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


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([torch.ones(1)], "a list"),
        (torch.ones(2), "a Tensor"),
        ({"a": 1}, r"a dict of a \(int\)"),
        ({"epoch": 3, "args": {}}, r"a dict of epoch \(int\), args \(dict\)"),
        ({"model": dict(STATE), "model_ema": dict(STATE), "epoch": 3}, r"several \(model, model_ema\)"),
    ],
)
def test_files_in_which_no_state_dict_is_certain_are_refused(tmp_path, value, found):
    torch.save(value, tmp_path / "decoder.pt")
    with pytest.raises(ValueError, match=rf"decoder\.pt: holds no plain dict of tensors but {found}; save"):
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


# --- as people have them --------------------------------------------------------------------------------------------


def is_state(found):
    return found.keys() == STATE.keys() and all(torch.equal(found[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize("name", ["a.BIN", "a.Pt", "a.PTH", "a.ckpt", "a.SafeTensors"])
def test_suffixes_in_any_case(tmp_path, name):
    (safetensors.torch.save_file if name.endswith("ors") else torch.save)(STATE, tmp_path / name)
    assert is_state(read_state_dict(tmp_path / name))


def test_the_content_decides_and_not_the_suffix(tmp_path):
    torch.save(STATE, tmp_path / "pickle.safetensors")
    safetensors.torch.save_file(STATE, tmp_path / "safe.bin")
    for name in ("pickle.safetensors", "safe.bin"):
        assert is_state(read_state_dict(tmp_path / name))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}, "lr": 0.1}},
        lambda state: {"state_dict": state},
        lambda state: {"checkpoint": {"model_state_dict": state, "step": torch.tensor(1)}},
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.model.", "gpt."])
def test_what_training_scripts_put_around_a_state_dict_is_taken_off(tmp_path, wrap, prefix):
    torch.save(wrap({prefix + name: tensor for name, tensor in STATE.items()}), tmp_path / "a.pt")
    assert is_state(read_state_dict(tmp_path / "a.pt"))


def test_torchs_own_words_within_names_are_taken_off():
    state = {"a.weight": STATE["wte.weight"], "h.0._orig_mod.bias": STATE["h.0.bias"]}
    assert list(peel(state)) == ["a.weight", "h.0.bias"]
    twice = {**state, "h.0.bias": torch.ones(1)}
    assert list(peel(twice)) == list(twice)  # two would have one name: not certain
    assert list(peel({"wte.weight": torch.ones(1)})) == ["wte.weight"]


def write_shards(folder, kind):
    """STATE in two shards with their index, as ``save_pretrained`` writes them."""
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    save = safetensors.torch.save_file if kind == "safetensors" else torch.save
    places = {name: f"{stem}-0000{n}-of-00002.{suffix}" for n, name in enumerate(STATE, start=1)}
    for name, shard in places.items():
        save({name: STATE[name]}, folder / shard)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    return index, places


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_by_their_index_or_their_folder(tmp_path, kind):
    index, places = write_shards(tmp_path, kind)
    assert is_state(read_state_dict(index)) and is_state(read_state_dict(tmp_path))
    shard = tmp_path / next(iter(places.values()))
    with pytest.raises(ValueError, match=r"-00001-of-00002\..*: one of several shards; name their \.index\.json"):
        read_state_dict(shard)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{index.name}: 1 of its 2 shards are missing: {shard.name}"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    "content", [[], {}, {"weight_map": []}, {"weight_map": {"a": "../a.bin"}}, {"weight_map": {"a": 3}}]
)
def test_an_index_that_is_none_is_refused(tmp_path, content):
    """It may name no file outside of its folder."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"index\.json: no index of shards; wanted is an object weight_map"):
        read_state_dict(index)


def test_an_index_and_shards_that_disagree_are_refused(tmp_path):
    index, places = write_shards(tmp_path, "safetensors")
    index.write_text(json.dumps({"weight_map": {**places, "gone": next(iter(places.values()))}}), encoding="utf-8")
    with pytest.raises(ValueError, match="its shards hold other tensors: gone"):
        read_state_dict(index)


def test_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights file in .*, which holds none; wanted is \.safetensors"):
        read_state_dict(tmp_path)
    (tmp_path / "tf_model.h5").touch()
    with pytest.raises(FileNotFoundError, match=r"which holds tf_model\.h5; wanted"):
        read_state_dict(tmp_path)
    torch.save(STATE, tmp_path / "own.pt")
    assert is_state(read_state_dict(tmp_path))  # the only one
    torch.save(STATE, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"holds other\.pth, own\.pt; name one of them"):
        read_state_dict(tmp_path)
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(read_state_dict(tmp_path)) == ["a"]  # save_pretrained's name comes first


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS .*`git lfs pull`"),
        (b"\n<!DOCTYPE html><html>", "a web page and not weights"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"\x89HDF\r\n", "an HDF5 file of TensorFlow"),
    ],
)
@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
def test_what_is_often_found_in_place_of_weights_is_named(tmp_path, content, what, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: {what}"):
        read_state_dict(tmp_path / name)


def test_a_pickle_of_more_than_tensors_says_of_what_and_gives_no_bad_advice(tmp_path):
    torch.save({"model": STATE, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"it holds argparse\.Namespace, .*save the state dict alone") as error:
        read_state_dict(tmp_path / "a.pt")
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


def test_only_transformers_own_config_says_what_weights_are(tmp_path):
    assert transformers_config(tmp_path) == {}
    for content, found in (({"setting": "best"}, {}), ([], {}), ({"model_type": "gpt2"}, {"model_type": "gpt2"})):
        (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
        assert transformers_config(tmp_path) == transformers_config(tmp_path / "model.safetensors") == found
