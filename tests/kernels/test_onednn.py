"""onednn.py and frozen_linear.py: products by frozen and by reordered weights are those of F.linear."""

import pytest
import torch

from captioning.kernels.frozen_linear import frozen_linear
from captioning.kernels.onednn import OneDnnLinear, ReorderedLinear, can_reorder


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_onednn_multiplies_by_frozen_weights_in_training_only(monkeypatch):
    """Equal in value and gradient; not used for trained weights, other types, autocast, few rows, and inference."""
    calls = []
    apply = OneDnnLinear.apply
    monkeypatch.setattr(OneDnnLinear, "apply", lambda *given: calls.append(1) or apply(*given))
    layer = torch.nn.Linear(40, 24).requires_grad_(False)
    x = torch.randn(70, 40, requires_grad=True)
    outs = frozen_linear(layer, x), layer(x)
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in outs))
    assert len(calls) == 2  # forward and backward
    with torch.no_grad():
        frozen_linear(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        frozen_linear(layer, x)
    frozen_linear(layer, x[:9])
    frozen_linear(torch.nn.Linear(40, 24), x)
    frozen_linear(layer.double(), x.double())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    frozen_linear(layer.float(), x)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reordered_weight_gives_the_same_product_and_is_in_no_state_dict(dtype):
    if not can_reorder(torch.device("cpu"), dtype):
        pytest.skip("this torch has no oneDNN for this type")
    layer, x = torch.nn.Linear(40, 24), torch.randn(2, 7, 40)
    reordered = ReorderedLinear(layer.weight, layer.bias, dtype)
    with torch.no_grad():
        out, wanted = reordered(x), layer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype and not reordered.state_dict()
    torch.testing.assert_close(out, wanted)
