"""Untrusted weights: no pickle is ever executed, wherever one can be given; each is refused in one line."""

import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from captioning.checkpoints import read_state_dict
from captioning.models.adapter import read_adapter
from captioning.models.encoder import build_encoder
from captioning.models.llava import load_llava
from captioning.profiles import MICRO_WEIGHTS, PROFILES, ROOT
from captioning.scoring.clipscore import ClipScorer
from captioning.training.run_folder import RunFolder

CPU = torch.device("cpu")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def folder_with_pickle(source, weights, name, evil, tmp_path):
    """Copy a model folder with its safetensors replaced by the pickle."""
    folder = tmp_path / source
    shutil.copytree(MICRO_WEIGHTS / source, folder)
    (folder / weights).unlink()
    shutil.copy(evil, folder / name)
    return folder


def encoder(evil, tmp_path):
    micro = PROFILES["micro"]
    build_encoder(micro.encoder, str(evil), micro.encoder_kwargs)


def decoder(evil, tmp_path):
    read_state_dict(evil)


def adapter(evil, tmp_path):
    read_adapter(evil)


def state(evil, tmp_path):
    folder = RunFolder(tmp_path)
    shutil.copy(evil, folder.newest)
    folder.load_state()


def clip_file(evil, tmp_path):
    ClipScorer("ViT-B-32-quickgelu", str(evil), CPU)


def clip_folder(evil, tmp_path):
    name = "open_clip_pytorch_model.bin"
    ClipScorer(str(folder_with_pickle("scorer", "open_clip_model.safetensors", name, evil, tmp_path)), None, CPU)


def llava_folder(evil, tmp_path):
    folder = folder_with_pickle("llava", "model.safetensors", "pytorch_model.bin", evil, tmp_path)
    load_llava(str(folder), CPU, torch.float32)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("load", [encoder, decoder, adapter, state, clip_file, clip_folder, llava_folder])
def test_no_pickle_is_executed(load, form, tmp_path):
    evil, trace = tmp_path / "evil.bin", tmp_path / "trace"
    content = load_file(MICRO_WEIGHTS / "decoder" / "decoder_model.safetensors") | {"trap": Trap(trace)}
    if form == "bare":
        evil.write_bytes(pickle.dumps({"trap": Trap(trace)}, protocol=2))
    else:
        torch.save(content, evil, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(evil, tmp_path)
    assert not trace.exists(), "the pickle ran"
    assert str(tmp_path) in str(error.value)
    if form == "bare":
        pickle.loads(evil.read_bytes())
    else:
        torch.load(evil, weights_only=False)
    assert trace.exists()  # the trap was live


def test_nothing_in_the_suite_unpickles_by_itself():
    """New code that loads weights must go through read_state_dict or safetensors."""
    folders = [*ROOT.glob("*.py"), *ROOT.glob("captioning/**/*.py"), *ROOT.glob("microworld/*.py")]
    sources = {path.name: path.read_text() for path in folders}
    calls = [
        (name, line.strip())
        for name, text in sources.items()
        for line in text.splitlines()
        if any(
            call in line
            for call in (
                "torch.load(",
                "pickle.load",
                "Unpickler(",
                "jit.load",
                "np.load(",
                "allow_pickle",
                "trust_remote_code",
            )
        )
    ]
    assert calls == [
        ("checkpoints.py", 'content = torch.load(file, map_location="cpu", weights_only=True)'),
        ("saved.py", "with np.load(file, allow_pickle=False) as found:"),
    ]
