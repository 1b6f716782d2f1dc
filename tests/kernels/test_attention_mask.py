"""attention_mask.py and the decoder: one additive mask a step, in the queries' type, and positions on the device."""

import pytest
import torch
import torch.nn.functional as F
from packings import packing_of
from tiny import make_captioner, random_decoder, random_features
from torch.utils._python_dispatch import TorchDispatchMode

import decoder as decoder_module
from captioning.kernels import attention_mask
from captioning.kernels.attention_mask import additive_mask


class Calls(TorchDispatchMode):
    """Notes every operator that runs, and every mask that attention gets."""

    def __init__(self):
        super().__init__()
        self.names, self.masks = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names.append(name)
        if "scaled_dot_product" in name:
            self.masks.append((kwargs or {}).get("attn_mask"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_attention_with_an_additive_mask_is_that_with_a_boolean_one_to_the_last_bit(dtype):
    torch.manual_seed(0)
    visible = torch.rand(2, 1, 5, 13) < 0.5
    visible[..., 0] = True
    q, k, v = torch.randn(2, 3, 5, 8).to(dtype), *torch.randn(2, 2, 3, 13, 8).to(dtype)
    mask = additive_mask(visible, dtype)
    assert (mask.dtype, mask.shape) == (dtype, visible.shape)
    outs = (F.scaled_dot_product_attention(q, k, v, attn_mask=m) for m in (mask, visible))
    torch.testing.assert_close(*outs, atol=0, rtol=0)


def test_on_cuda_rows_lie_apart_by_a_multiple_of_sixteen(monkeypatch):
    class OnCuda(torch.Tensor):
        device = torch.device("cuda")

    visible = torch.ones(2, 1, 5, 283, dtype=torch.bool).as_subclass(OnCuda)
    zeros = torch.zeros
    monkeypatch.setattr(attention_mask.torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype))
    mask = additive_mask(visible, torch.bfloat16)
    assert mask.shape == visible.shape
    assert mask.stride() == (5 * 288, 5 * 288, 288, 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_decode_step_makes_one_mask_in_the_queries_type_and_copies_no_position(precision):
    """Every layer once converted a boolean mask, and the position came from the CPU at each step."""
    captioner = make_captioner().merge()
    tokens = torch.randint(0, 9, (2, 3))
    ancestors = torch.eye(3, dtype=torch.bool).expand(2, 3, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        step = captioner.step_function(random_features(captioner, 2), 3, 4)
        with Calls() as calls:
            step(tokens, ancestors)
    assert calls.names.count("masked_fill_") == 1
    assert not {"max", "_local_scalar_dense", "lift_fresh", "where"} & set(calls.names)
    wanted = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {mask.dtype for mask in calls.masks} == {wanted}
    assert len(calls.masks) == len(captioner.decoder.h)
    assert len({mask.data_ptr() for mask in calls.masks}) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_mask_of_another_type_comes_beside_the_queries(monkeypatch, dtype):
    """Such as float32's beside bfloat16, which cuDNN's attention misreads in silence."""
    decoder, given = random_decoder().to(dtype).eval(), []
    attend = F.scaled_dot_product_attention

    def noted(q, k, v, attn_mask=None, is_causal=False):
        given.append((q.dtype, k.dtype, attn_mask.dtype))
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal)

    monkeypatch.setattr(decoder_module.F, "scaled_dot_product_attention", noted)
    packing, mask, _ = packing_of([[3, 2]], prefix=7)
    packing.route = "mask"
    x = torch.randn(1, 12, decoder.config.n_embd, dtype=dtype)
    with torch.no_grad():
        for visible in (packing, mask):
            decoder(x, torch.arange(12), visible)
    assert given == [(dtype, dtype, dtype)] * 2 * len(decoder.h)
