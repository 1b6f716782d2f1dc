"""torchscript.py: tensors of TorchScript archives, with nothing in them being run."""

import os
import pickle
import random
import zipfile

import pytest
import torch
from torch import nn

from captioning.checkpoints import read_state_dict
from captioning.torchscript import is_torchscript, read_torchscript


class Network(nn.Module):
    """Every kind of attribute that an archive holds: nested and listed modules, half precision, integers, views."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.low = nn.Parameter(torch.randn(2, 3).half())
        self.turned = nn.Parameter(torch.randn(5, 2).T)
        self.tied = self.first.weight
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("empty", torch.zeros(0, 2))
        self.names, self.rate, self.nothing = [1, 2, 3], 1.5, None

    def forward(self, x):
        x = self.blocks(self.first(x)) * self.count + self.low.float().sum() + self.turned.sum() * self.rate
        return x + self.names[0] + self.empty.sum() + self.tied.sum()


@pytest.fixture(scope="module", params=["traced", "scripted"])
def archive(request, tmp_path_factory):
    torch.manual_seed(0)
    path, network = tmp_path_factory.mktemp("archive") / "ViT-B-32.pt", Network()
    with pytest.warns(DeprecationWarning):
        torch.jit.save(
            torch.jit.trace(network, torch.ones(1, 3)) if request.param == "traced" else torch.jit.script(network), path
        )
    return path, network.state_dict()


def test_the_state_dict_is_the_networks_own(archive):
    path, wanted = archive
    assert is_torchscript(path)
    found = read_state_dict(path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


def rewritten(path, target, change):
    """Copy an archive with entries passed through ``change(name, content)``; None leaves one out."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as archive:
        for entry in source.infolist():
            content = change(entry.filename.split("/", 1)[1], source.read(entry))
            if content is not None:
                archive.writestr(entry.filename, content)
    return target


def test_programs_are_not_read(archive, tmp_path):
    path, wanted = archive
    stripped = rewritten(path, tmp_path / "a.pt", lambda name, data: b"!" if name.startswith("code/") else data)
    assert read_state_dict(stripped).keys() == wanted.keys()


class Trap:
    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_runs_code_is_refused_and_not_run(archive, tmp_path, protocol):
    trace = tmp_path / "trace"
    evil = pickle.dumps({"weight": Trap(trace)}, protocol=protocol)
    path = rewritten(archive[0], tmp_path / "a.pt", lambda name, data: evil if name == "data.pkl" else data)
    with pytest.raises(ValueError, match=r"a\.pt: ") as error:
        read_state_dict(path)
    assert not trace.exists() and "weights_only" not in str(error.value)
    pickle.loads(evil)
    assert trace.exists()  # the trap was live


def tensor_of(size, stride, offset=0):
    """A data.pkl of one module with one tensor over the archive's first numbers."""
    opcodes = b"\x80\x02c__torch__\nM\n)\x81}(X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storage"
    opcodes += b"ctorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpuK\x0ctQ"
    numbers = [b"J" + n.to_bytes(4, "little", signed=True) for n in (offset, size, stride)]
    return opcodes + numbers[0] + b"(" + numbers[1] + b"t(" + numbers[2] + b"t\x89}tRub."


def one_tensor(tmp_path, description, compression=zipfile.ZIP_STORED):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {"constants.pkl": b"", "data.pkl": description, "data/0": bytes(48)}.items():
            archive.writestr(f"a/{name}", content)
    return path


@pytest.mark.parametrize(("size", "stride", "offset"), [(13, 1, 0), (2, 12, 0), (12, 1, 1), (2, -1, 3), (1, 1, -1)])
def test_tensors_beyond_their_numbers_are_refused(tmp_path, size, stride, offset):
    description = tensor_of(size, stride, offset)
    with pytest.raises(ValueError, match=r"a\.pt: damaged"):
        read_state_dict(one_tensor(tmp_path, description))
    path = one_tensor(tmp_path, tensor_of(12, 1))
    assert torch.equal(read_state_dict(path)["w"], torch.zeros(12))  # the form is right, the numbers above are not


def test_compressed_numbers_are_refused(tmp_path):
    """torch never compresses them; a bomb would be small on disk and endless in memory."""
    path = one_tensor(tmp_path, tensor_of(12, 1), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="a/data/0 is compressed"):
        read_state_dict(path)


def test_modules_within_themselves_end(tmp_path):
    endless = b"\x80\x02c__torch__\nM\n)\x81}q\x00(X\x01\0\0\0wh\x00ub."
    with pytest.raises(ValueError, match="without parameters"):
        read_state_dict(one_tensor(tmp_path, endless))


def test_an_archive_of_another_byte_order_is_refused(archive, tmp_path):
    path = rewritten(archive[0], tmp_path / "a.pt", lambda name, data: b"big" if name == "byteorder" else data)
    with pytest.raises(ValueError, match="byte order"):
        read_state_dict(path)


def test_damaged_archives_give_the_same_tensors_or_one_line(archive, tmp_path):
    path, wanted = archive
    whole, target = path.read_bytes(), tmp_path / "a.pt"
    for seed in range(300):
        rng = random.Random(seed)
        content = bytearray(whole[: rng.randrange(len(whole))] if seed % 4 == 0 else whole)
        for _ in range(rng.randrange(1, 4)):
            if content:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        target.write_bytes(content)
        try:
            found = read_state_dict(target)
        except ValueError as error:
            assert str(error).startswith(str(target)) and "\n" not in str(error)
            continue
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items() if name in found)


def test_pickles_of_torch_save_are_no_torchscript(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    assert not is_torchscript(tmp_path / "a.pt")
    with pytest.raises(ValueError):
        read_torchscript(tmp_path / "a.pt")
