"""attention_route.py: packed attention is taken where it shows that it is right, and else a mask, with one warning."""

import logging
from types import SimpleNamespace

import pytest
import torch
from packings import packing_of, play_cuda

from captioning.kernels import attention_route, packed_attention
from captioning.kernels.attention_route import MASK, PACKED, takes_packed

CPU = torch.device("cpu")
FLASH = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture(autouse=True)
def undecided(monkeypatch):
    monkeypatch.setattr(attention_route, "_decided", {})


def route(dtype=torch.float32, **more):
    return attention_route.attention_route(CPU, dtype, 16, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_where_the_kernel_is_right_it_is_taken_and_nothing_random_changes(dtype, caplog):
    before = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as where it is first asked for
        assert route(dtype) == PACKED
    assert torch.equal(before, torch.get_rng_state())
    assert not warnings(caplog)


def warnings(caplog):
    """What was logged as a warning; whether more is logged depends on the tests before."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_it_is_found_out_once_and_without_a_warning_where_there_is_no_kernel(monkeypatch, caplog):
    checks = []
    monkeypatch.setattr(attention_route, "check", lambda *asked: checks.append(asked))
    assert [route(), route(), route(torch.bfloat16), route(torch.float16)] == [PACKED] * 3 + [MASK]
    assert [dtype for _, dtype, _ in checks] == [torch.float32, torch.bfloat16]
    assert not warnings(caplog)


@pytest.mark.parametrize("failure", [RuntimeError, NotImplementedError, AttributeError, TypeError])
@pytest.mark.parametrize("name", [FLASH, f"{FLASH}_backward"])
def test_a_kernel_that_fails_is_warned_of_once_and_the_mask_taken(monkeypatch, caplog, failure, name):
    def fail(*_, **__):
        raise failure("no such argument\nand a long trace")

    monkeypatch.setattr(torch.ops.aten, name, SimpleNamespace(default=fail))
    assert [route(), route()] == [MASK, MASK]
    (warning,) = warnings(caplog)
    assert "no such argument; attention takes a mask" in warning


@pytest.mark.parametrize("name", [FLASH, f"{FLASH}_backward"])
@pytest.mark.parametrize("spoil", [lambda x: x * 1.03, lambda x: x * torch.nan], ids=["larger", "nan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_is_wrong_is_not_taken(monkeypatch, caplog, name, spoil, dtype):
    kernel = getattr(torch.ops.aten, name)

    def wrong(*given, **more):
        first, *others = kernel(*given, **more)
        return spoil(first), *others

    monkeypatch.setattr(torch.ops.aten, name, SimpleNamespace(default=wrong))
    assert route(dtype) == MASK
    assert "off by" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_path_of_cuda_is_about_as_exact_as_the_mask(monkeypatch, dtype):
    play_cuda(monkeypatch)
    attention_route.check(CPU, dtype, 64)


def test_the_route_that_was_asked_for_is_taken(monkeypatch):
    packing, _, _ = packing_of([[3, 2]], prefix=7)
    qkv = torch.zeros(1, 12, 3, 2, 16)
    monkeypatch.setattr(attention_route, "check", lambda *asked: pytest.fail("nothing is left to be found out"))
    taken = {}
    for asked in (PACKED, MASK):
        packing.route = asked
        taken[asked] = takes_packed(qkv, packing)
    assert taken == {PACKED: True, MASK: False}
    packing.route = PACKED
    assert not takes_packed(qkv.half(), packing)  # which has no kernel


class OnCuda:
    """A card for the decision: what torch would say of it, and a clock that every run of a route moves on."""

    device = torch.device("cuda:0")

    def __init__(self, monkeypatch, packed=1.0, mask=2.0):
        self.now, self.runs = 0.0, {PACKED: 0, MASK: 0}
        self.taken = {PACKED: packed, MASK: mask}
        monkeypatch.setattr(attention_route, "can_attend_packed", lambda *asked: True)
        monkeypatch.setattr(attention_route, "check", lambda *asked: None)
        monkeypatch.setattr(attention_route.Trial, "_packed", lambda trial, qkv: self.run(PACKED, qkv))
        monkeypatch.setattr(attention_route.Trial, "_masked", lambda trial, qkv: self.run(MASK, qkv))
        monkeypatch.setattr(attention_route.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def run(self, which, qkv):
        self.now += self.taken[which]
        self.runs[which] += 1
        return qkv.sum(2).flatten(2)


@pytest.mark.parametrize(("packed", "mask", "faster"), [(1.0, 2.0, PACKED), (2.0, 1.0, MASK)])
def test_on_cuda_the_faster_of_five_runs_at_the_real_shape_stays(monkeypatch, packed, mask, faster):
    card = OnCuda(monkeypatch, packed, mask)
    packing, _, _ = packing_of([[3, 2]], prefix=7)
    with torch.no_grad():
        decided = [attention_route.attention_route(card.device, torch.bfloat16, 16, packing, 2) for _ in range(3)]
    assert decided == [faster] * 3
    assert card.runs == {PACKED: 6, MASK: 6}


def test_nothing_is_tried_out_while_a_graph_is_recorded(monkeypatch):
    card = OnCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert attention_route.attention_route(card.device, torch.bfloat16, 16) == MASK
    assert not attention_route._decided


@pytest.mark.parametrize("kind", ["mps", "xpu", "meta"])
def test_other_devices_take_the_mask(kind):
    assert not packed_attention.can_attend_packed(torch.device(kind), torch.float32, 64)


def test_what_was_built_is_asked_for_and_not_only_what_is_allowed(monkeypatch):
    """A build without flash attention allows it all the same."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    asked = torch.device("cuda:0"), torch.bfloat16, 64
    for built in (False, True):
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda built=built: built)
        assert packed_attention.can_attend_packed(*asked) == built
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not packed_attention.can_attend_packed(*asked)
