"""decoder.py: equal to GPT-2, cache and masks exact, bad files refused."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from decoders import LAYOUTS, TINY, full_logits, greedy_ids, huggingface_gpt2, lora_decoder
from packings import packing_of, play_cuda

from captioning.kernels import attention_route
from decoder import (
    Decoder,
    DecoderConfig,
    KVCache,
    build_decoder,
    gpt2_state_dict,
    load_gpt2,
    lora_state_dict,
    mark_trainable,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- GPT-2 -----------------------------------------------------------------------------------------------------------


def test_logits_equal_transformers():
    model = huggingface_gpt2(TINY, scale=1.5)
    ids = torch.randint(TINY.vocab_size, (3, 20))
    ours = full_logits(build_decoder(model.state_dict(), n_head=TINY.n_head), ids)
    with torch.no_grad():
        theirs = model(ids).logits
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4


def test_greedy_tokens_equal_transformers():
    model = huggingface_gpt2(TINY, scale=1.5)
    model.generation_config.eos_token_id = None
    ids = torch.randint(1, TINY.vocab_size, (3, 5))
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    ours = greedy_ids(build_decoder(model.state_dict(), n_head=TINY.n_head), ids, 20)
    assert len(set(theirs[0].tolist())) > 5
    assert ours.tolist() == theirs.tolist()


def test_gpt2_small_equals_transformers():
    config = DecoderConfig(n_positions=64)  # width, depth and vocabulary of GPT-2 small
    model = huggingface_gpt2(config)
    decoder = build_decoder(model.state_dict())
    assert decoder.config == config
    ids = torch.randint(config.vocab_size, (1, 6))
    with torch.no_grad():
        assert (full_logits(decoder, ids) - model(ids).logits).abs().max() < 1e-4


def test_forgotten_transpose_of_the_square_weight_is_seen():
    """attn.c_proj is square, so a checkpoint loaded without transposing it passes every check of shapes."""
    model = huggingface_gpt2(TINY, scale=1.5)
    state = {k: v.T if k.endswith("attn.c_proj.weight") else v for k, v in model.state_dict().items()}
    ids = torch.randint(TINY.vocab_size, (2, 9))
    with torch.no_grad():
        assert (full_logits(build_decoder(state, n_head=TINY.n_head), ids) - model(ids).logits).abs().max() > 1e-2


def test_erf_gelu_is_seen(monkeypatch):
    """GPT-2 has the tanh form of GELU; the erf form has no weights and differs by little."""
    model = huggingface_gpt2(TINY, scale=1.5)
    decoder = build_decoder(model.state_dict(), n_head=TINY.n_head)
    ids = torch.randint(TINY.vocab_size, (2, 9))
    gelu = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x, approximate: gelu(x))
    with torch.no_grad():
        assert (full_logits(decoder, ids) - model(ids).logits).abs().max() > 2e-4


def test_random_weights_follow_gpt2():
    decoder = Decoder(DecoderConfig(vocab_size=500, n_embd=128, n_layer=8, n_head=2, n_positions=64))
    block = decoder.h[3]
    assert decoder.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for residual in (block.attn.c_proj, block.mlp.c_proj):
        assert residual.weight.std().item() == pytest.approx(0.02 / 16**0.5, rel=0.05)
    assert not block.mlp.c_fc.bias.any()
    assert (block.ln_1.weight == 1).all()
    assert not block.ln_1.bias.any()


def test_bfloat16_autocast_stays_near_float32_with_and_without_cache():
    decoder = lora_decoder(LAYOUTS["report's setting 4"])
    ids = torch.randint(TINY.vocab_size, (2, 12))
    exact = full_logits(decoder, ids)
    with torch.autocast("cpu", torch.bfloat16):
        rough = full_logits(decoder, ids)
        cache = decoder.new_cache(2, 12)
        with torch.no_grad():
            decoder(decoder.embed(ids[:, :8]), torch.arange(8), cache=cache)
            rest = decoder.logits(decoder(decoder.embed(ids[:, 8:]), torch.arange(8, 12), cache=cache))
    assert cache.keys[0].dtype == rough.dtype == torch.bfloat16
    assert decoder.new_cache(1, 1).keys[0].dtype == torch.float32
    assert (rough - exact).abs().max() < 0.03 * exact.abs().max()
    assert (rest - exact[:, 8:]).abs().max() < 0.03 * exact.abs().max()


# ---- Cache, positions, masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(10,), (1,) * 10, (4, 1, 3, 2), (4, 6)])
def test_cache_equals_no_cache(cuts):
    decoder = lora_decoder(LAYOUTS["all linears"])
    ids = torch.randint(TINY.vocab_size, (2, 10))
    cache, parts, start = decoder.new_cache(2, 10), [], 0
    with torch.no_grad():
        for size in cuts:
            x = decoder.embed(ids[:, start : start + size])
            parts.append(decoder.logits(decoder(x, torch.arange(start, start + size), cache=cache)))
            start += size
            assert cache.length == start
    torch.testing.assert_close(torch.cat(parts, 1), full_logits(decoder, ids), atol=1e-6, rtol=1e-5)


def test_a_prefix_serves_again_when_the_length_is_set_back():
    decoder = lora_decoder(None)
    ids = torch.randint(TINY.vocab_size, (1, 9))
    cache = decoder.new_cache(1, 9)
    with torch.no_grad():
        decoder(decoder.embed(ids[:, :4]), torch.arange(4), cache=cache)
        decoder(decoder.embed(ids[:, 4:].flip(1)), torch.arange(4, 9), cache=cache)
        cache.length = 4
        again = decoder.logits(decoder(decoder.embed(ids[:, 4:]), torch.arange(4, 9), cache=cache))
    torch.testing.assert_close(again, full_logits(decoder, ids)[:, 4:], atol=1e-6, rtol=1e-5)


def packed_mask(prefix: int, lengths: list[int]) -> torch.Tensor:
    """(T, T): each caption sees the prefix and its own past."""
    owner = torch.tensor([-1] * prefix + [i for i, n in enumerate(lengths) for _ in range(n)])
    same = (owner == owner[:, None]) | (owner == -1)
    return same & torch.ones(len(owner), len(owner)).tril().bool()


def test_packed_captions_equal_one_by_one_in_value_and_gradient():
    decoder = lora_decoder(LAYOUTS["query and value"])
    mark_trainable(decoder)
    lengths = [5, 1, 7]
    prefix = torch.randn(2, 6, TINY.n_embd)  # (B, P, C) as if image tokens
    captions = [torch.randint(TINY.vocab_size, (2, n)) for n in lengths]

    x = torch.cat([prefix, *[decoder.embed(c) for c in captions]], 1)
    positions = torch.cat([torch.arange(6), *[torch.arange(6, 6 + n) for n in lengths]])
    packed = decoder.logits(decoder(x, positions, packed_mask(6, lengths))[:, 6:])
    packed.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad()

    single = []
    for caption in captions:
        x = torch.cat([prefix, decoder.embed(caption)], 1)
        single.append(decoder.logits(decoder(x, torch.arange(x.shape[1]))[:, 6:]))
    single = torch.cat(single, 1)
    single.square().sum().backward()

    torch.testing.assert_close(packed, single, atol=1e-6, rtol=1e-5)
    assert gradients.keys() == lora_state_dict(decoder).keys()
    for name, parameter in decoder.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_a_decoder_takes_the_mask_where_packed_attention_has_no_kernel(monkeypatch):
    """And when attention weights are wanted; in neither case do the numbers differ."""
    torch.manual_seed(0)
    decoder = Decoder(TINY, LAYOUTS["all linears"]).eval()
    x, asked = torch.randn(1, 12, TINY.n_embd), []

    def hidden(**options):
        packing, mask, _ = packing_of([[3, 2]], prefix=7)
        packing._mask = lambda: asked.append(1) or mask
        with torch.no_grad():
            return decoder(x, torch.arange(12), packing, **options)

    packed = hidden()
    assert not asked
    attentions = []
    torch.testing.assert_close(hidden(attentions=attentions), packed)
    assert (len(attentions), len(asked)) == (TINY.n_layer, 1)
    monkeypatch.setattr(attention_route, "can_attend_packed", lambda *asked: False)
    torch.testing.assert_close(hidden(), packed)
    assert len(asked) == 2


@pytest.mark.parametrize("device", ["cpu", "as on cuda"])
def test_the_last_block_gives_the_wanted_rows_in_value_and_gradient(monkeypatch, device):
    """With a packing, with its mask, and causal: those of a full pass, and less work."""
    if device != "cpu":
        play_cuda(monkeypatch)
    decoder = lora_decoder(LAYOUTS["all linears"])
    x, grad = torch.randn(1, 12, TINY.n_embd, requires_grad=True), torch.randn(1, 5, TINY.n_embd)
    packing, mask, _ = packing_of([[3, 2]], prefix=7)
    rows = []
    decoder.h[-1].mlp.register_forward_hook(lambda module, given, out: rows.append(out.shape[1]))
    for visible in (packing, mask, None):
        whole, few = decoder(x, torch.arange(12), visible)[:, -5:], decoder(x, torch.arange(12), visible, last=5)
        torch.testing.assert_close(few, whole, atol=1e-5, rtol=1e-5)
        grads = [torch.autograd.grad(hidden, x, grad)[0] for hidden in (few, whole)]
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)
    assert rows == [12, 5] * 3


def test_captions_after_a_cached_prefix_equal_one_by_one():
    """What beam search does: several branches in one row, separated by the mask and by equal positions."""
    decoder = lora_decoder(None)
    prefix, branches = torch.randint(TINY.vocab_size, (2, 6)), torch.randint(TINY.vocab_size, (2, 3, 4))
    cache = decoder.new_cache(2, 6 + 3 * 4)
    steps = []
    with torch.no_grad():
        decoder(decoder.embed(prefix), torch.arange(6), cache=cache)
        for t in range(4):
            own = torch.eye(3, dtype=torch.bool).repeat(1, t + 1)  # (K, K (t + 1))
            mask = torch.cat([torch.ones(3, 6, dtype=torch.bool), own], 1)
            hidden = decoder(decoder.embed(branches[:, :, t]), torch.full((2, 3), 6 + t), mask, cache)
            steps.append(decoder.logits(hidden))
    for k in range(3):
        expected = full_logits(decoder, torch.cat([prefix, branches[:, k]], 1))[:, 6:]
        torch.testing.assert_close(torch.stack([s[:, k] for s in steps], 1), expected, atol=1e-6, rtol=1e-5)


def test_misuse_is_refused():
    decoder = lora_decoder(None)
    x = torch.randn(1, 3, TINY.n_embd)
    with pytest.raises(ValueError, match="position 48 is beyond the decoder's context of 48"):
        decoder(x, torch.arange(46, 49))
    with pytest.raises(ValueError, match="must be boolean"):
        decoder(x, torch.arange(3), torch.zeros(3, 3))
    full = KVCache(TINY, 1, 2)
    with pytest.raises(ValueError, match="holds 2 tokens and 3 are needed"):
        decoder(x, torch.arange(3), cache=full)
    assert full.length == 0
    with pytest.raises(ValueError, match="2 rows and the input has 1"):
        decoder(x, torch.arange(3), cache=KVCache(TINY, 2, 8))


@pytest.mark.parametrize(
    ("options", "message"), [({"n_layer": 0}, "n_layer must be positive"), ({"n_head": 5}, "multiple of n_head 5")]
)
def test_impossible_shapes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**options)


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "safetensors"])
def test_files_of_every_kind_load(tmp_path, suffix):
    decoder, path = lora_decoder(None), tmp_path / f"decoder.{suffix}"
    state = gpt2_state_dict(decoder)
    if suffix == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    again = build_decoder(path, n_head=TINY.n_head)
    assert again.config == TINY
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in decoder.state_dict().items())


def test_export_has_the_layout_of_transformers():
    model = huggingface_gpt2(TINY)
    ours = gpt2_state_dict(build_decoder(model.state_dict(), LAYOUTS["report's setting 4"], TINY.n_head))
    theirs = {k.removeprefix("transformer."): v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[k], v) and v.is_contiguous() for k, v in ours.items())


def test_mask_buffers_and_prefix_are_ignored_but_biases_are_not():
    decoder = lora_decoder(None)
    with torch.no_grad():
        decoder.h[1].attn.c_attn.bias.fill_(7.0)
    old = {f"transformer.{k}": v for k, v in gpt2_state_dict(decoder).items()}
    old["transformer.h.0.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
    old["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    old["lm_head.weight"] = decoder.wte.weight.detach().clone()
    again = build_decoder(old, n_head=TINY.n_head)
    assert (again.h[1].attn.c_attn.bias == 7).all()


def corrupt(decoder: Decoder, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = gpt2_state_dict(decoder) | changes
    return {k: v for k, v in state.items() if v is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h.1.mlp.c_fc.bias": None}, r"missing h\.1\.mlp\.c_fc\.bias; unexpected none"),
        ({"extra": torch.ones(1)}, "missing none; unexpected extra"),
        ({"h.0.attn.bias_k": torch.ones(1)}, r"unexpected h\.0\.attn\.bias_k"),
        ({"h.0.ln_1.bias": torch.ones(3)}, r"wrong shapes: h\.0\.ln_1\.bias \(3,\) for \(32,\)"),
        ({"h.2.mlp.c_fc.weight": torch.ones(128, 32)}, r"\(32, 128\) for \(128, 32\); .*Conv1D"),
        ({"lm_head.weight": torch.ones(61, 32)}, "lm_head.weight differs from wte.weight"),
        ({"transformer.wpe.weight": torch.ones(48, 32)}, "twice"),
    ],
)
def test_wrong_state_dicts_are_refused_and_change_nothing(changes, message):
    decoder = lora_decoder(None)
    before = copy.deepcopy(decoder.state_dict())
    with pytest.raises(ValueError, match=message):
        load_gpt2(decoder, corrupt(Decoder(TINY), **changes))
    assert all(torch.equal(before[k], v) for k, v in decoder.state_dict().items())


def test_shape_is_inferred_and_heads_default_to_width_over_64():
    config = DecoderConfig(vocab_size=20, n_positions=8, n_embd=128, n_layer=2, n_head=2)
    state = gpt2_state_dict(Decoder(config))
    assert DecoderConfig.from_state_dict(state) == config
    assert DecoderConfig.from_state_dict(state, n_head=4).n_head == 4
    with pytest.raises(ValueError, match="no multiple of 64"):
        DecoderConfig.from_state_dict(gpt2_state_dict(Decoder(TINY)))
    with pytest.raises(ValueError, match=r"wte\.weight"):
        DecoderConfig.from_state_dict({"conv.weight": torch.ones(2, 2)})


def test_errors_of_a_file_name_it(tmp_path):
    torch.save(corrupt(Decoder(TINY), **{"ln_f.bias": None}), tmp_path / "decoder.bin")
    with pytest.raises(ValueError, match=r"decoder\.bin: .*missing ln_f\.bias"):
        build_decoder(tmp_path / "decoder.bin", n_head=TINY.n_head)


@pytest.mark.parametrize("body", [False, True], ids=["GPT2LMHeadModel", "GPT2Model"])
@pytest.mark.parametrize("size", ["1GB", "20kB"], ids=["whole", "in shards"])
def test_folders_of_save_pretrained_say_what_weights_do_not_show(tmp_path, body, size):
    """Heads and epsilon: with others, logits would differ and nothing would be said."""
    model = huggingface_gpt2(TINY, scale=1.5)
    model.config.layer_norm_epsilon = 0.1
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.1
    (model.transformer if body else model).save_pretrained(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or size == "20kB"
    ids = torch.randint(TINY.vocab_size, (3, 20))
    with torch.no_grad():
        theirs = model(ids).logits
    for source in (tmp_path, next(iter([*tmp_path.glob("*.index.json"), *tmp_path.glob("model.safetensors")]))):
        assert (full_logits(build_decoder(source), ids) - theirs).abs().max() < 1e-4


def test_a_folder_whose_gpt2_has_another_activation_is_refused(tmp_path):
    model = huggingface_gpt2(TINY)
    model.config.activation_function = "gelu"
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: activation_function gelu, and the decoder computes"):
        build_decoder(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "gpt.", "module._orig_mod.gpt."])
@pytest.mark.parametrize("head", [False, True])
def test_wrapped_checkpoints_load(tmp_path, prefix, head):
    model = huggingface_gpt2(TINY)
    state = (model if head else model.transformer).state_dict()
    content = {"state_dict": {prefix + name: tensor for name, tensor in state.items()}, "epoch": 3}
    torch.save(content, tmp_path / "decoder.pt")
    again = gpt2_state_dict(build_decoder(tmp_path / "decoder.pt", n_head=TINY.n_head))
    assert all(torch.equal(again[name], tensor) for name, tensor in model.transformer.state_dict().items())


def test_what_is_no_gpt2_is_named_by_what_it_holds(tmp_path):
    adapter = {"decoder.h.0.attn.c_attn.lora_A": torch.ones(2, 2), "projector.bias": torch.ones(2)}
    safetensors.torch.save_file(adapter, tmp_path / "best.safetensors")
    message = r"best\.safetensors: .*no matrix 'wte\.weight' but decoder\.h\.0\.attn\.c_attn\.lora_A, projector\.bias;"
    with pytest.raises(ValueError, match=message):
        build_decoder(tmp_path / "best.safetensors")
