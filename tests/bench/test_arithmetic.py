"""bench/arithmetic.py against torch's own counter of operations, on models of other shapes."""

from dataclasses import replace

import pytest
import torch
from tiny import TINY_ENCODER
from torch.utils.flop_counter import FlopCounterMode

from bench import arithmetic
from bench.arithmetic import Vit, gpt2
from captioning.data.batches import pack_captions
from captioning.imports import import_guarded
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.profiles import PRESETS, PROFILES
from decoder import Decoder, DecoderConfig, LoraConfig

RANK, VOCAB, EOS = 4, 61, 60
LORA = LoraConfig(rank=RANK, alpha=4.0, lm_head=True)
KWARGS = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16, "img_size": 48}
SHAPES = arithmetic.CaptionerShape(Vit(10, 32, 2, 768), gpt2(3, 64, VOCAB), RANK, head=True)


@pytest.fixture(scope="module")
def captioner():
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(VOCAB, 64, 64, 3, 2), LORA)
    return Captioner(CaptionerConfig(TINY_ENCODER, KWARGS, "random", lora=LORA), decoder)


def count(function):
    """Operations of matrix products and attention; attention is made plain, or the counter would not see it."""

    def addmm_(total, a, b, **options):
        return 2 * a[0] * a[1] * b[1]

    in_place = {torch.ops.aten.addmm_: addmm_}  # LoRA's update; the counter knows the other form only
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, plain:
        function()
    return counter.get_total_flops()


def test_an_encoded_image(captioner):
    assert count(lambda: captioner.encode(torch.randn(1, 3, 48, 48))) == SHAPES.encoder.operations


def test_a_step_of_training(captioner):
    captioner.train()
    packed = replace(pack_captions([[[1, 2, 3], [4, 5, 6, 7]]], EOS), slots=None)  # a mask: the counter sees all
    features = torch.randn(1, *captioner.feature_shape)
    counted = count(lambda: captioner.loss(features, packed).backward())
    dense = 2 * arithmetic.attention(19, 19, 64) + arithmetic.attention(9, 19, 64)  # the last layer's captions only
    assert counted == pytest.approx(SHAPES.train(9, 2) + 3 * (dense - SHAPES.attended(9, 2)), rel=0.01)
    assert SHAPES.attended(9, 2) == 3 * 4 * 64 * (19 * 10 + 2 * 4.5**2) - 4 * 64 * 10 * 10


def test_a_search(captioner):
    """Three beams for four steps; the first step of a search is the token BOS."""
    merged = arithmetic.CaptionerShape(SHAPES.encoder, SHAPES.decoder, RANK)
    captioner.eval()

    def search():
        step = captioner.step_function(torch.zeros(1, *captioner.feature_shape), 3, 4)
        for n in range(1, 5):
            step(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, 3 * n, dtype=torch.bool))

    lora = 2 * RANK * 16 * 64 * 3 * (10 + 3 * 4) + 2 * RANK * (64 + VOCAB) * 3 * 4  # not merged in this test
    assert count(search) == pytest.approx(merged.search(3, 4) + lora, rel=0.001)


def test_reading_of_a_llama():
    """transformers' own, of LLaVA's kind of decoder: gate, up and down in the MLP, nothing shared between heads."""
    transformers = import_guarded("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        attn_implementation="eager",
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = arithmetic.Decoder(3, 64, VOCAB, 4 * 64**2 + 3 * 64 * 176)
    counted = count(lambda: theirs(input_ids=torch.zeros(1, 21, dtype=torch.long), logits_to_keep=1, use_cache=False))
    assert counted == pytest.approx(ours.read(21, 21) + ours.logits(1), rel=0.005)


def test_the_full_size_is_what_is_known_of_it():
    assert arithmetic.VIT_L14.operations == pytest.approx(162e9, rel=0.01)
    assert arithmetic.GPT2_SMALL.weights == pytest.approx(124e6, rel=0.01)  # without positions, norms and biases
    assert arithmetic.LLAMA_7B.weights == pytest.approx(6.74e9 - 131e6, rel=0.01)  # without the input embeddings
    dense = 3 * 12 * arithmetic.attention(327, 327, 768) - 3 * arithmetic.CaptionerShape().attended(70)
    spared = (4 * 9 * 768**2 + 6 * 32 * 768 * 12) * 257  # what the last layer does not do for the prefix
    masked = arithmetic.CaptionerShape().train(70) + dense + spared
    assert masked / 5 == pytest.approx(30e9, rel=0.05)
    assert sum(arithmetic.llava_operations(40, 16)) == pytest.approx(9e12, rel=0.05)


def test_bytes_of_a_search_fall_with_the_batch_to_those_of_the_cache():
    models = arithmetic.CaptionerShape()
    cache = sum(2 * 12 * 768 * 2 * (257 + 5 * t) for t in range(1, 31))
    assert models.search_bytes(5, 30, 10**9) == pytest.approx(cache, rel=0.001)
    assert models.search_bytes(5, 30, 1) - cache == pytest.approx(31 * 2 * models.decoder.weights)


@pytest.mark.parametrize("setting", ["best", *arithmetic.PRESETS])
def test_the_settings_encoders_are_timms(setting):
    """Built without memory; norms, biases and CLS are left out of the arithmetic."""
    ours = arithmetic.PRESETS.get(setting, arithmetic.VIT_L14)
    with torch.device("meta"):
        theirs = import_guarded("timm").create_model(PRESETS.get(setting, PROFILES["full"].encoder), num_classes=0)
    assert ours.weights == pytest.approx(sum(p.numel() for p in theirs.parameters()), rel=0.002)
    assert (ours.tokens, ours.width, ours.depth) == (theirs.pos_embed.shape[1], theirs.embed_dim, len(theirs.blocks))
    assert arithmetic.PRESETS.keys() == PRESETS.keys()


def test_pooled_patches_shorten_the_prefix():
    captioner = Captioner(
        CaptionerConfig(TINY_ENCODER, KWARGS | {"patch_size": 8}, "random", lora=LORA, pool=2),
        Decoder(DecoderConfig(VOCAB, 64, 64, 3, 2), LORA),
    )
    shapes = arithmetic.CaptionerShape(Vit(37, 32, 2, 192), SHAPES.decoder, RANK, pool=2)
    assert (shapes.prefix, shapes.feature_bytes) == (captioner.n_prefix, 2 * 10 * 32)
    assert shapes.trained == sum(p.numel() for p in captioner.trainable().values())
    assert shapes.train(9, 2) == SHAPES.train(9, 2)  # as many tokens as 3 x 3 patches without
    assert count(lambda: captioner.encode(torch.randn(1, 3, 48, 48))) == shapes.encoder.operations
