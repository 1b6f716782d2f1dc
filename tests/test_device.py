"""Devices that are not there are refused by name; one seed sets every generator."""

import importlib
import logging
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from captioning import device
from captioning.device import autocast, pick_device, product_dtype, seed_everything, settle_precision
from captioning.distributed import ALONE, join
from captioning.models.llava import pick_dtype

LISTED_GPUS = device.listed_gpus  # which other tests do without
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")


@pytest.fixture(autouse=True)
def started_by_hand(monkeypatch):
    """No launcher's variables, whatever the user's shell has set."""
    for name in (*LAUNCHED, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def attention_as_it_was():
    """A CUDA device that is picked switches cuDNN's attention off for the process."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.fixture
def card(monkeypatch):
    """Let torch describe its GPUs: ``card(capability, name, built_for)``."""

    def describe(capability, name="a GPU", built_for=()):
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built_for))
        found = SimpleNamespace(name=name, major=capability[0], minor=capability[1], total_memory=24 * 10**9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)

    return describe


@pytest.fixture
def two_gpus(monkeypatch, card):
    card((9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_pick_device_auto_prefers_cuda_then_mps_then_cpu(monkeypatch, card):
    card((9, 0))
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


def test_pick_device_knows_how_many_gpus_there_are(two_gpus):
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"--device cuda:2.*sees 2"):
        pick_device("cuda:2")


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(None, "cuda"), ("", "cuda"), (" ", "cuda"), ("0", "cuda:0"), ("1", "cuda:1"), ("3", "cuda:1")],
)
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_launched_process_takes_its_own_gpu_in_turn(monkeypatch, two_gpus, name, rank, expected):
    """LOCAL_RANK=3 on two GPUs was cuda:3, an empty one was no device at all; `--device cuda` was GPU 0 for all."""
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert pick_device(name) == torch.device(expected)


def test_a_rank_that_is_no_number_is_named(monkeypatch, two_gpus):
    monkeypatch.setenv("LOCAL_RANK", "one")
    with pytest.raises(ValueError, match="LOCAL_RANK=one: must be a whole number"):
        pick_device()


def test_under_a_launcher_no_gpu_may_be_named(monkeypatch, two_gpus):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--device cuda:1: every process would take it"):
        pick_device("cuda:1")


@pytest.mark.parametrize(
    "values", [{}, dict.fromkeys(LAUNCHED, ""), {"WORLD_SIZE": "1", "RANK": "", "LOCAL_RANK": "0"}]
)
def test_what_is_empty_is_not_set(monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert join(torch.device("cpu")) is ALONE


@pytest.mark.parametrize(
    "values", [{}, {"RANK": "", "LOCAL_RANK": "0"}, {"RANK": "2", "LOCAL_RANK": "0"}, {"RANK": "0", "LOCAL_RANK": ""}]
)
def test_processes_that_are_announced_without_a_rank_are_refused(monkeypatch, values):
    for name, value in {"WORLD_SIZE": "2", **values}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2: 2 processes are announced.*unset WORLD_SIZE"):
        join(torch.device("cpu"))


@pytest.mark.parametrize(
    ("asked", "precision", "on", "dtype"),
    [
        ("bf16", "auto", True, torch.bfloat16),
        ("BF16", "fp32", False, torch.bfloat16),
        ("fp16", "auto", False, torch.float16),
        ("no", "auto", False, torch.float32),
        ("", "auto", False, torch.float32),
        ("no", "bf16", True, torch.float32),
    ],
)
def test_accelerates_mixed_precision_is_followed_or_warned_of_once(monkeypatch, caplog, asked, precision, on, dtype):
    """``no`` is what accelerate sets where nothing was said, so auto stays auto."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    with autocast(torch.device("cpu"), precision):
        assert torch.is_autocast_enabled("cpu") is on
    assert pick_dtype("auto", torch.device("cpu")) == dtype
    join(torch.device("cpu"))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (asked == "fp16")
    assert ("mixed_precision fp16" in caplog.text) is (asked == "fp16")


@pytest.mark.parametrize(("name", "enabled"), [("cpu", True), ("cuda:1", False), ("auto", False)])
def test_cudnns_attention_is_off_once_a_gpu_is_picked(two_gpus, name, enabled):
    """On an H100 it builds a graph for every new shape, and each step of a search has a new shape."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    pick_device(name)
    assert torch.backends.cuda.cudnn_sdp_enabled() is enabled


CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
CUDA_12 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90a")


@pytest.mark.parametrize(
    ("capability", "built_for", "remedy"),
    [
        ((6, 1), CUDA_13, "whl/cu126"),
        ((7, 0), CUDA_13, "whl/cu126"),
        ((10, 0), CUDA_12, "a newer torch"),
        ((9, 1), CUDA_12, "a newer torch"),  # 9.0a is for 9.0 alone
    ],
)
@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_that_torch_has_no_kernels_for_is_refused(two_gpus, card, capability, built_for, remedy, name):
    """A GTX 1080 Ti died at the first kernel, "no kernel image is available"."""
    card(capability, "GTX 1080 Ti", built_for)
    numbers = ".".join(map(str, capability))
    with pytest.raises(ValueError, match=f"GTX 1080 Ti has compute capability {numbers}.*{remedy}.*--device cpu"):
        pick_device(name)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "built_for"),
    [
        ((7, 5), CUDA_13),
        ((8, 9), CUDA_13),
        ((9, 0), CUDA_12),
        ((6, 1), CUDA_12),
        ((13, 0), CUDA_13),
        ((9, 4), ["gfx942"]),
    ],
)
def test_a_gpu_that_torch_has_kernels_for_is_taken(two_gpus, card, capability, built_for):
    card(capability, built_for=built_for)
    assert pick_device() == torch.device("cuda")


NVIDIA_SMI = """#!/bin/sh
echo "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-0)"
echo "  MIG 1g.5gb Device 0: (UUID: MIG-0)"
"""


@pytest.fixture
def unseen_gpu(tmp_path, monkeypatch):
    """A GPU that nvidia-smi lists and torch does not see."""
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(device, "listed_gpus", LISTED_GPUS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("built_for", "visible", "remedy"),
    [
        (None, None, "without CUDA"),
        ("13.0", None, "driver for CUDA 13.0"),
        ("13.0", "3", "CUDA_VISIBLE_DEVICES=3 names"),
        ("13.0", "MIG-7", "CUDA_VISIBLE_DEVICES=MIG-7 names"),
    ],
)
def test_nobody_computes_on_the_cpu_beside_a_gpu_unasked(unseen_gpu, monkeypatch, built_for, visible, remedy):
    """An old driver or a CPU build of torch made `auto` the CPU: a training of days, and no line said so."""
    monkeypatch.setattr(torch.version, "cuda", built_for)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name in (None, "cuda"):  # asked for by name, it is refused anyway: with the same remedy
        with pytest.raises(ValueError, match=rf"lists 1 GPU\(s\) and torch .* sees none; .*{remedy}.*--device cpu"):
            pick_device(name)
    for asked in ("auto", "cpu"):
        assert pick_device(asked) == torch.device("cpu")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_may_be_hidden(unseen_gpu, monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert pick_device(None) == torch.device("cpu")


@pytest.mark.parametrize("text", [None, "#!/bin/sh\necho NVIDIA-SMI has failed >&2; exit 9\n"])
def test_without_a_driver_the_cpu_is_the_device(unseen_gpu, monkeypatch, tmp_path, text):
    (tmp_path / "nvidia-smi").unlink() if text is None else (tmp_path / "nvidia-smi").write_text(text)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pick_device(None) == torch.device("cpu")


@pytest.mark.parametrize("script", ["p2_train", "p2_infer", "p1_llava_caption", "p3_attention", "evaluate"])
def test_scripts_know_whether_a_device_was_asked_for(script):
    parser = importlib.import_module(script).build_parser()
    assert parser.get_default("device") is None


@pytest.fixture
def said(caplog):
    """What is logged, of this device or its precision, from now on."""
    caches = device._announce, device.warn_of_emulation
    for cache in caches:
        cache.cache_clear()
    with caplog.at_level(logging.INFO):
        yield caplog
    for cache in caches:
        cache.cache_clear()


def test_the_devices_name_is_logged_once(two_gpus, card, said):
    card((7, 5), "Tesla T4")
    pick_device("cuda:1"), pick_device("cuda:1")
    pick_device("cuda:0", announce=False)
    assert said.messages == ["device: cuda:1, Tesla T4, 24 GB; without bf16: --precision auto is fp32"]


@pytest.mark.parametrize(
    ("visible", "rank", "count", "note"),
    [
        (None, None, 2, ""),
        ("0,1", "1", 2, ""),
        ("MIG-0", "0", 1, ""),
        ("MIG-0,MIG-1", None, 1, "; CUDA_VISIBLE_DEVICES=MIG-0,MIG-1 names 2, and torch sees 1"),
        ("0,7,1", None, 1, "; CUDA_VISIBLE_DEVICES=0,7,1 names 3, and torch sees 1"),
        ("2", "2", 1, "; process 2 of this machine sees 1 GPU(s), which others may share"),
        (None, "3", 2, "; process 3 of this machine sees 2 GPU(s), which others may share"),
    ],
)
def test_parts_of_gpus_and_launchers_that_show_one_are_recognised(
    two_gpus, card, monkeypatch, said, visible, rank, count, note
):
    """CUDA takes one MIG part of several; srun and others show each process its own GPU, whatever LOCAL_RANK is."""
    card((9, 0), "H100 MIG 1g.10gb")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("LOCAL_RANK", rank)):
        if value is not None:
            monkeypatch.setenv(name, value)
    found = pick_device(None)
    assert found.index is None or found.index < count
    assert said.messages == [f"device: {found}, H100 MIG 1g.10gb, 24 GB{note}"]


@pytest.mark.parametrize(("capability", "warned"), [((7, 5), True), ((8, 6), False)])
def test_bf16_that_a_gpu_emulates_is_done_and_warned_of_once(card, monkeypatch, said, capability, warned):
    card(capability, "Tesla T4")
    for _ in range(2):
        assert product_dtype(torch.device("cuda"), "bf16") == torch.bfloat16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert product_dtype(torch.device("cuda"), "auto") == torch.bfloat16
    assert product_dtype(torch.device("cuda"), "fp32") == torch.float32
    assert [record.levelname for record in said.records] == ["WARNING"] * warned
    assert ("Tesla T4 has no such products and emulates them" in said.text) is warned
    said.clear()
    device.warn_of_emulation.cache_clear()
    assert pick_dtype("bfloat16", torch.device("cuda")) == torch.bfloat16
    assert len(said.records) == warned


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_is_bf16_only_where_a_gpu_has_it(card, capability, dtype):
    """A T4 and an RTX 2080 emulated it, slowly."""
    card(capability)
    assert product_dtype(torch.device("cuda:1"), "auto") == dtype
    assert product_dtype(torch.device("cuda:1"), "bf16") == torch.bfloat16


@pytest.fixture
def processor(monkeypatch):
    """Let torch describe the processor: ``processor(avx512_bf16=True)``."""

    def describe(**capabilities):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)

    return describe


@pytest.mark.parametrize("own", ["avx512_bf16", "amx_bf16"])
def test_auto_is_bf16_on_a_processor_that_has_it_at_full_size_only(processor, monkeypatch, said, own):
    """Small models stay in float32: the demo's figures, and captions that do not depend on the batch."""
    cpu = torch.device("cpu")
    processor(avx512_f=True, **{own: True})
    assert settle_precision(cpu, "auto", 768) == settle_precision(cpu, "auto", 1024) == "bf16"
    assert settle_precision(cpu, "auto", 256) == settle_precision(cpu, "fp32", 1024) == "fp32"
    assert settle_precision(cpu, "bf16", 256) == "bf16"
    assert product_dtype(cpu, "auto") == torch.float32
    assert pick_dtype("auto", cpu) == torch.float32  # bf16 cost LLaVA's captions CIDEr
    pick_device("cpu")
    assert said.messages == ["device: cpu; it has bf16, which p2_infer.py's auto takes at full size; others if asked"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # not followed, and warned of elsewhere
    assert settle_precision(cpu, "auto", 768) == "fp32"


@pytest.mark.parametrize("found", [{}, {"avx512_f": True, "avx512_bf16": False, "amx_tile": True}])
def test_a_processor_without_bf16_stays_in_float32(processor, monkeypatch, said, found):
    processor(**found)
    assert settle_precision(torch.device("cpu"), "auto", 768) == "fp32"
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in older torch
    assert settle_precision(torch.device("cpu"), "auto", 768) == "fp32"
    pick_device("cpu")
    assert said.messages == ["device: cpu"]


@pytest.mark.parametrize(("capability", "settled"), [((7, 5), "fp32"), ((8, 0), "bf16")])
def test_on_a_gpu_the_width_does_not_matter(card, capability, settled):
    card(capability)
    assert {settle_precision(torch.device("cuda"), "auto", width) for width in (64, 768)} == {settled}


def test_seed_everything_repeats_every_generator():
    def draw():
        seed_everything(2**32 + 5)  # numpy takes 32 bits only
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002 - the global one is meant

    assert draw() == draw()


def test_the_caches_of_cpu_kernels_are_bounded_unless_the_user_says_otherwise(monkeypatch):
    for name in device.PRIMITIVE_CACHES:
        monkeypatch.setenv(name, "set so that it is restored")
        monkeypatch.delenv(name)
    monkeypatch.setenv(device.PRIMITIVE_CACHES[0], "7")
    pick_device("cpu")
    assert [os.environ[name] for name in device.PRIMITIVE_CACHES] == ["7", device.PRIMITIVES]
