"""LoRA in decoder.py: exact before and after merging, equal to loralib, and bad options refused."""

from __future__ import annotations

import contextlib
import copy

import loralib
import pytest
import torch
from decoders import LAYOUTS, TINY, full_logits, lora_decoder
from torch.utils._python_dispatch import TorchDispatchMode

from captioning.kernels.casts import CastTogether, cast_frozen, cast_lora, frozen_weight
from decoder import (
    LINEARS,
    Decoder,
    DecoderConfig,
    LoraConfig,
    LoraLinear,
    MergedLinear,
    build_decoder,
    gpt2_state_dict,
    load_gpt2,
    load_lora_state_dict,
    lora_state_dict,
    mark_trainable,
    merge_lora,
    merged_copies,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("lora", LAYOUTS.values(), ids=LAYOUTS)
def test_fresh_lora_changes_nothing(lora):
    base = lora_decoder(None)
    adapted = build_decoder(gpt2_state_dict(base), lora, TINY.n_head).train()  # in training, dropout of LoRA included
    ids = torch.randint(TINY.vocab_size, (2, 8))
    torch.testing.assert_close(full_logits(adapted, ids), full_logits(base, ids), atol=0, rtol=0)


@pytest.mark.parametrize("lora", LAYOUTS.values(), ids=LAYOUTS)
def test_merged_equals_unmerged_and_merging_twice_is_merging_once(lora):
    decoder = lora_decoder(lora)
    wte = decoder.wte.weight.clone()
    ids = torch.randint(TINY.vocab_size, (2, 8))
    before, base = full_logits(decoder, ids), full_logits(build_decoder(gpt2_state_dict(decoder), None, 4), ids)
    assert (before - base).abs().max() > 1e-3  # LoRA does something
    with torch.autocast("cpu", torch.bfloat16):  # the sum must not be rounded to bfloat16
        merge_lora(decoder)
    torch.testing.assert_close(full_logits(decoder, ids), before, atol=1e-6, rtol=1e-5)
    assert decoder.merged
    once = copy.deepcopy(decoder.state_dict())
    merge_lora(decoder)
    assert all(torch.equal(once[k], v) for k, v in decoder.state_dict().items())
    assert torch.equal(decoder.wte.weight, wte)


@pytest.mark.parametrize("enable", [(True, False, True), (False, True, False), (True, True, True)])
def test_merged_linear_equals_loralib(enable):
    options = {"r": 4, "lora_alpha": 8, "enable_lora": list(enable), "merge_weights": False}
    theirs, ours = loralib.MergedLinear(12, 18, **options), MergedLinear(12, 18, **options)
    torch.nn.init.normal_(theirs.lora_B)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 12)
    results = []
    for layer in (theirs, ours):
        source = x.clone().requires_grad_()
        out = layer(source)
        out.sin().sum().backward()
        results.append((out, source.grad, layer.lora_A.grad, layer.lora_B.grad))
    for expected, actual in zip(*results, strict=True):
        assert (expected - actual).abs().max() <= 1e-6 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 7, 12)])
def test_lora_linear_equals_loralib_and_drops_out_like_it(shape):
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.5, "merge_weights": False}
    theirs, ours = loralib.Linear(12, 18, **options), LoraLinear(12, 18, **options)
    torch.nn.init.normal_(theirs.lora_B)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for layer in (theirs, ours):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.manual_seed(1)
        out = layer(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, layer.lora_A, layer.lora_B])])
    for mine, wanted in zip(*reversed(results), strict=True):
        torch.testing.assert_close(mine, wanted)


class Casts(TorchDispatchMode):
    """Counts the casts of tensors of some shapes that run within, and of their gradients."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.count += {args[0].shape, args[0].shape[::-1]} <= self.shapes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lora", LAYOUTS.values(), ids=LAYOUTS)
def test_casts_made_beforehand_change_no_number_and_nothing_that_is_kept(lora):
    decoder = lora_decoder(lora).eval()
    ids = torch.randint(TINY.vocab_size, (2, 8))
    shapes = {size for p in decoder.parameters() for size in (p.shape, p.shape[::-1])}

    def numbers(together=contextlib.nullcontext):
        with torch.autocast("cpu", torch.bfloat16), together(), Casts(shapes) as casts:
            logits = decoder.logits(decoder(decoder.embed(ids), torch.arange(8)))
            gradients = torch.autograd.grad(logits.float().logsumexp(-1).mean(), list(trained))
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        return casts.count, [logits, *gradients]

    mark_trainable(decoder)
    trained = [p for p in decoder.parameters() if p.requires_grad]
    exact, (many, before), names = full_logits(decoder, ids), numbers(), list(decoder.state_dict())
    cast_frozen(decoder, torch.bfloat16)
    assert frozen_weight(decoder.wte) is decoder.wte.weight  # without autocast
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen_weight(decoder.wte).dtype == torch.bfloat16
    count, after = numbers(lambda: cast_lora(decoder))
    assert count == 0 < many  # once every use of a bias, of a plain layer and of LoRA's tensors cast them again
    for mine, wanted in zip(after, before, strict=True):
        assert torch.equal(mine, wanted)
    assert torch.equal(full_logits(decoder, ids), exact)
    assert list(decoder.state_dict()) == names
    assert decoder.wte.weight.dtype == gpt2_state_dict(decoder)["h.0.mlp.c_fc.weight"].dtype == torch.float32
    merge_lora(decoder)
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen_weight(decoder.h[0].attn.c_proj) is decoder.h[0].attn.c_proj.weight  # no copy of what it was


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", LAYOUTS.values(), ids=LAYOUTS)
def test_merged_copies_read_as_a_merged_decoder_does_and_leave_no_trace(lora, dtype):
    decoder = lora_decoder(lora).eval()
    mark_trainable(decoder)
    cast_frozen(decoder, dtype)
    merged, ids = copy.deepcopy(decoder), torch.randint(TINY.vocab_size, (2, 8))
    merge_lora(merged)

    def logits(decoder):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32), torch.no_grad():
            return decoder.logits(decoder(decoder.embed(ids), torch.arange(8)))

    before, state = logits(decoder), copy.deepcopy(decoder.state_dict())
    with (
        pytest.raises(ZeroDivisionError),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32),
        merged_copies(decoder),
    ):
        assert torch.equal(logits(decoder), logits(merged))
        assert not torch.equal(logits(decoder), before)
        1 / 0  # noqa: B018
    assert torch.equal(logits(decoder), before)
    assert not decoder.merged and all(p.requires_grad == ("lora_" in n) for n, p in decoder.named_parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in decoder.state_dict().items())


def test_what_was_cast_together_and_not_used_has_no_gradient():
    used, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    first, _ = CastTogether.apply(torch.bfloat16, used, unused)
    first.sum().backward()
    assert used.grad.dtype == torch.float32 and unused.grad is None


def test_no_copies_are_made_in_the_weights_own_type():
    decoder = lora_decoder(LAYOUTS["report's setting 4"])
    cast_frozen(decoder, torch.bfloat16)
    assert decoder.lm_head.cast_weight is decoder.wte.cast_weight
    cast_frozen(decoder, torch.float32)
    assert decoder.lm_head.cast_weight is decoder.h[0].mlp.c_fc.cast_weight is decoder.h[0].mlp.c_fc.cast_bias is None
    with cast_lora(decoder):
        assert not hasattr(decoder.lm_head, "cast_lora")


def test_merged_linear_drops_out_like_loralib():
    options = {"r": 4, "lora_dropout": 0.5, "enable_lora": [True, False, True], "merge_weights": False}
    theirs, ours = loralib.MergedLinear(12, 18, **options), MergedLinear(12, 18, **options)
    torch.nn.init.normal_(theirs.lora_B)
    ours.load_state_dict(theirs.state_dict())
    x, results = torch.randn(7, 12), []
    for layer in (theirs, ours):
        torch.manual_seed(1)
        results.append(layer(x))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(ours(x), results[1])  # drawn again


@pytest.mark.parametrize("lora", LAYOUTS.values(), ids=LAYOUTS)
def test_eval_and_train_never_touch_weights(lora):
    """loralib's default merges in eval() and un-merges in train(), and its layers' eval() returns None."""
    decoder = lora_decoder(lora)
    before = copy.deepcopy(decoder.state_dict())
    for _ in range(3):
        assert decoder.eval() is decoder
        assert not decoder.merged
        assert decoder.train() is decoder
    assert all(torch.equal(before[k], v) for k, v in decoder.state_dict().items())


def test_weights_loaded_after_eval_count():
    """With loralib's default, LoRA weights loaded after eval() are silently ignored."""
    trained = lora_decoder(LAYOUTS["all linears"])
    fresh = build_decoder(gpt2_state_dict(trained), trained.lora, TINY.n_head).eval()
    load_lora_state_dict(fresh, lora_state_dict(trained))
    ids = torch.randint(TINY.vocab_size, (1, 5))
    assert torch.equal(full_logits(fresh, ids), full_logits(trained, ids))


def test_adapter_holds_exactly_the_lora_tensors():
    linears = [f"h.{i}.{name}" for i in range(TINY.n_layer) for name in LINEARS]
    state = lora_state_dict(Decoder(TINY, LAYOUTS["report's setting 4"]))
    assert set(state) == {f"{layer}.lora_{x}" for layer in [*linears, "lm_head"] for x in "AB"}
    assert state["h.0.attn.c_attn.lora_A"].shape == (2 * 4, 32)
    assert state["h.0.attn.c_attn.lora_B"].shape == (2 * 32, 4)
    assert set(lora_state_dict(Decoder(TINY, LAYOUTS["some linears"]))) == {
        f"h.{i}.{name}.lora_{x}" for i in range(TINY.n_layer) for name in ("attn.c_proj", "mlp.c_fc") for x in "AB"
    }
    assert lora_state_dict(Decoder(TINY)) == {}


def test_foreign_adapters_are_refused_and_change_nothing():
    decoder = lora_decoder(LAYOUTS["all linears"])
    before = {k: v.clone() for k, v in lora_state_dict(decoder).items()}
    other_rank = lora_state_dict(lora_decoder(LoraConfig(rank=8)))
    with pytest.raises(ValueError, match=r"wrong shapes: h\.0\.attn\.c_attn\.lora_A \(8, 32\) for \(4, 32\).*rank"):
        load_lora_state_dict(decoder, other_rank)
    with pytest.raises(ValueError, match=r"missing .*c_fc\.lora_A.*unexpected lm_head\.lora_A, lm_head\.lora_B"):
        load_lora_state_dict(decoder, lora_state_dict(lora_decoder(LAYOUTS["lm_head alone"])))
    assert all(torch.equal(before[k], v) for k, v in lora_state_dict(decoder).items())


def test_after_a_merge_nothing_is_loaded_or_trained():
    decoder = lora_decoder(LAYOUTS["report's setting 4"])
    state, base = lora_state_dict(decoder), gpt2_state_dict(decoder)
    merge_lora(decoder)
    with pytest.raises(ValueError, match="after merge_lora"):
        load_lora_state_dict(decoder, state)
    with pytest.raises(ValueError, match="after merge_lora"):
        load_gpt2(decoder, base)
    with pytest.raises(ValueError, match="after merge_lora"):
        mark_trainable(decoder)
    with pytest.raises(ValueError, match="no longer tied"):
        gpt2_state_dict(decoder)


def test_merged_decoder_exports_as_plain_gpt2():
    decoder = lora_decoder(LAYOUTS["query and value"])
    ids = torch.randint(TINY.vocab_size, (1, 7))
    expected = full_logits(decoder, ids)
    merge_lora(decoder)
    plain = build_decoder(gpt2_state_dict(decoder), n_head=TINY.n_head)
    torch.testing.assert_close(full_logits(plain, ids), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lora", LAYOUTS.values(), ids=LAYOUTS)
def test_every_parameter_is_trainable_or_frozen_as_it_should_be(lora):
    decoder = Decoder(TINY, lora)
    mark_trainable(decoder)
    trainable = {name for name, p in decoder.named_parameters() if p.requires_grad}
    assert trainable == set(lora_state_dict(decoder)) != set()
    frozen = {name for name, p in decoder.named_parameters() if not p.requires_grad}
    assert frozen == set(gpt2_state_dict(Decoder(TINY)))


def test_lora_of_gpt2_small_at_rank_32_has_4718592_parameters():
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(), LoraConfig(rank=32))
    mark_trainable(decoder)
    assert sum(p.numel() for p in decoder.parameters() if p.requires_grad) == 4_718_592


def test_training_step_leaves_the_embeddings_alone_under_lm_head_lora():
    """A LoRA-wrapped lm_head shares its weight with wte; neither a step nor a merge may move the embeddings."""
    decoder = lora_decoder(LAYOUTS["lm_head alone"]).train()
    mark_trainable(decoder)
    assert decoder.lm_head.weight is decoder.wte.weight
    wte = decoder.wte.weight.clone()
    optimizer = torch.optim.SGD([p for p in decoder.parameters() if p.requires_grad], lr=1.0)
    decoder.logits(decoder(torch.randn(1, 4, TINY.n_embd), torch.arange(4))).square().sum().backward()
    optimizer.step()
    merge_lora(decoder)
    assert torch.equal(decoder.wte.weight, wte)
    assert not torch.equal(decoder.lm_head.weight, wte)


def test_scaling_is_alpha_over_rank():
    lora = LoraConfig(rank=8, alpha=2.0, enable_lora=(True, False, True), lm_head=True)
    layers = [m for m in Decoder(TINY, lora).modules() if isinstance(m, loralib.LoRALayer)]
    assert len(layers) == 4 * TINY.n_layer + 1
    assert {layer.scaling for layer in layers} == {lora.scaling} == {0.25}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "--lora-rank"),
        ({"alpha": 0.0}, "--lora-alpha"),
        ({"alpha": float("nan")}, "--lora-alpha"),
        ({"dropout": 1.0}, "--lora-dropout"),
        ({"targets": ("attn.q_proj",)}, "--lora-targets"),
        ({"targets": ("mlp.c_fc", "mlp.c_fc")}, "--lora-targets"),
        ({"targets": ()}, "nothing is left to adapt"),
        ({"enable_lora": (True, False)}, "three booleans"),
        ({"enable_lora": (False, False, False)}, "--enable-lora is false"),
        ({"enable_lora": (True, False, True), "targets": ("mlp.c_fc",)}, "--enable-lora splits attn.c_attn"),
    ],
)
def test_bad_lora_options_name_their_flag(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


def test_lora_config_read_back_from_json_is_the_same():
    lora = LoraConfig(enable_lora=(True, False, True))
    assert LoraConfig(enable_lora=[True, False, True], targets=list(LINEARS)) == lora
    assert hash(lora)
