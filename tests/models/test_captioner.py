"""captioner.py: packing and caching change no number, only LoRA and projector train, adapters come back whole."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import TINY_ENCODER, TINY_ENCODER_KWARGS
from torch import nn

from captioning.data.batches import pack_captions
from captioning.imports import import_guarded
from captioning.inference import search
from captioning.models import captioner as captioner_module
from captioning.models.adapter import read_adapter
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.models.encoder import build_encoder, build_transform
from captioning.tensors import fingerprint
from captioning.training.config import SETTINGS
from captioning.training.trainer import make_optimizer
from decoder import Decoder, DecoderConfig, LoraConfig

VOCAB, EOS = 50, 49
LORA = LoraConfig(rank=3, alpha=6.0, lm_head=True)
SHAPE = DecoderConfig(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2)


def make_decoder(lora=LORA, shape=SHAPE, seed=0):
    torch.manual_seed(seed)
    decoder = Decoder(shape, lora)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.ndim > 1 or "lora_" in name:  # GPT-2's own 0.02 makes captions of one repeated token
                parameter.normal_(std=0.25)
    return decoder


def make_captioner(lora=LORA, use_cls=True, shape=SHAPE, **config):
    config = CaptionerConfig(TINY_ENCODER, TINY_ENCODER_KWARGS, "random", use_cls, lora, **config)
    decoder = make_decoder(lora, shape)
    torch.manual_seed(1)
    return Captioner(config, decoder)


@pytest.fixture(scope="module")
def captioner():
    """One captioner for the tests that only read it."""
    return make_captioner().eval()


def random_features(captioner, images, seed=0):
    return torch.randn(images, *captioner.feature_shape, generator=torch.Generator().manual_seed(seed))


def ragged_captions(counts=(1, 5, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(1, 9, (n,), generator=generator).tolist() for n in counts]
    return [[torch.randint(0, EOS, (n,), generator=generator).tolist() for n in row] for row in lengths]


# --------------------------------------------------------------------------------------------------------- training


def unpacked_loss(captioner, features, captions):
    """The definition: each caption alone behind its image, plain causal attention, mean over all tokens."""
    losses = []
    for image, texts in zip(features, captions, strict=True):
        for tokens in texts:
            inputs, targets = torch.tensor([[EOS, *tokens]]), torch.tensor([*tokens, EOS])
            x = torch.cat([captioner.prefix(image[None]), captioner.decoder.embed(inputs)], 1)
            hidden = captioner.decoder(x, torch.arange(x.shape[1]))[0, -len(targets) :]
            losses.append(F.cross_entropy(captioner.decoder.logits(hidden), targets, reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("use_cls", [True, False])
@pytest.mark.parametrize("lora", [LORA, LoraConfig(rank=2, alpha=2.0, enable_lora=(True, False, True))])
@pytest.mark.parametrize("counts", [(1, 5, 3), (7, 2), (4, 6, 1)])
def test_packed_captions_give_the_loss_and_gradients_of_single_ones(use_cls, lora, counts):
    model = make_captioner(lora, use_cls)
    features, captions = random_features(model, len(counts)), ragged_captions(counts)
    parameters = model.trainable()

    def gradients(loss):
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    packed = model.loss(features, pack_captions(captions, EOS, pad_to_multiple=8))
    single = unpacked_loss(model, features, captions)
    assert packed.item() == pytest.approx(single.item(), abs=1e-5)
    ours, wanted = gradients(packed), gradients(single)
    assert min(g.abs().max() for g in wanted.values()) > 1e-4  # all of them take part
    for name, gradient in wanted.items():
        assert torch.allclose(ours[name], gradient, atol=1e-5), name


def test_a_caption_sees_neither_its_neighbours_nor_padding(captioner):
    features = random_features(captioner, 1)
    one, other = [[[1, 2, 3], [4, 5]]], [[[1, 2, 3], [40, 41]]]
    hidden = []
    for captions, multiple in ((one, 1), (other, 1), (one, 16)):
        batch = pack_captions(captions, EOS, pad_to_multiple=multiple)
        x, positions, mask = captioner._packed_sequence(features, batch)
        hidden.append(captioner.decoder(x, positions, mask)[:, captioner.n_prefix :][:, :4])
    assert torch.allclose(hidden[0], hidden[1], atol=1e-6)
    assert torch.allclose(hidden[0], hidden[2], atol=1e-6)


def test_label_smoothing_reaches_the_loss(captioner):
    features, batch = random_features(captioner, 2), pack_captions(ragged_captions((2, 1)), EOS)
    plain, smooth = (captioner.loss(features, batch, s).item() for s in (0.0, 0.5))
    assert abs(plain - smooth) > 1e-3


def test_only_lora_and_projector_are_trained(captioner):
    names = set(captioner.trainable())
    assert names == {n for n, _ in captioner.named_parameters() if "lora_" in n or n.startswith("projector.")}
    assert {"projector.weight", "projector.bias", "decoder.lm_head.lora_A"} <= names
    assert not any(p.requires_grad for p in captioner.encoder.parameters())


def test_the_encoder_stays_in_eval_mode_when_the_captioner_trains():
    """An encoder left in train mode drops tokens and shifts norms: a trap that cost others their scores."""
    model = make_captioner().train()
    assert model.decoder.training
    assert not any(module.training for module in model.encoder.modules())
    assert not model.encode(torch.zeros(1, 3, 48, 48)).requires_grad


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_of_every_setting_moves_what_is_trained_and_nothing_else(setting):
    config = SETTINGS[setting]
    model = make_captioner(config.lora(), config.cls).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, config)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.trainable().values()))  # each in exactly one group
    model.loss(random_features(model, 2), pack_captions(ragged_captions((2, 3)), EOS)).backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(model.trainable())


@pytest.mark.parametrize(
    ("setting", "count"),
    [("1", 5_505_792), ("2", 5_505_792), ("3", 10_224_384), ("4", 7_138_592), ("5", 5_505_792), ("best", 7_138_592)],
)
def test_trained_parameters_of_the_full_size_settings(setting, count, monkeypatch):
    """GPT-2 small behind ViT-L/14, built without memory; only fingerprints need values."""
    monkeypatch.setattr(captioner_module, "fingerprint", lambda state: "none")
    config = SETTINGS[setting]
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(), config.lora())
        model = Captioner(
            CaptionerConfig("vit_large_patch14_clip_224", {}, "random", config.cls, config.lora()), decoder
        )
    assert model.feature_shape == (257, 1024)
    assert model.n_prefix == (257 if config.cls else 256)
    trained = sum(p.numel() for p in model.trainable().values())
    assert trained == count
    assert trained <= config.max_trainable
    assert (trained < 10_000_000) == (setting != "3")  # the report's own setting 3 is above its limit


# --------------------------------------------------------------------------------------------------------- encoding


def test_leaving_cls_out_shortens_the_prefix_by_it():
    whole, patches = make_captioner(), make_captioner(use_cls=False)
    features = random_features(whole, 2)
    assert whole.feature_shape == patches.feature_shape == (10, 32)  # 3 x 3 patches and CLS: one cache serves both
    assert (whole.n_prefix, patches.n_prefix) == (10, 9)
    assert torch.equal(patches.prefix(features), patches.projector(features[:, 1:]))
    assert whole.prefix(features).shape == (2, 10, 32)


def test_a_random_encoder_is_the_same_every_time_and_leaves_the_callers_seed_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = build_encoder(TINY_ENCODER, "random", TINY_ENCODER_KWARGS)
    assert torch.equal(torch.rand(1), expected)
    second = build_encoder(TINY_ENCODER, "random", TINY_ENCODER_KWARGS)
    assert fingerprint(first.state_dict()) == fingerprint(second.state_dict())


def test_preprocessing_is_the_models_own_and_not_imagenets():
    """resolve_data_config with the model's *name* silently answers with ImageNet's mean, std and crop of 0.875."""
    transform = build_transform(build_encoder(TINY_ENCODER, "random", TINY_ENCODER_KWARGS))
    shown = repr(transform)
    assert "0.4815" in shown  # OpenAI's mean
    assert "48" in shown
    other = build_encoder(TINY_ENCODER, "random", {**TINY_ENCODER_KWARGS, "mean": (0.5, 0.5, 0.5)})
    assert "0.5000" in repr(build_transform(other))


@pytest.mark.parametrize(
    ("name", "weights", "error", "message"),
    [
        ("vit_of_nobody", "random", ValueError, "--encoder vit_of_nobody"),
        ("resnet18", "random", ValueError, "not a vision transformer"),
        (TINY_ENCODER, "gone.safetensors", FileNotFoundError, "--encoder-weights gone.safetensors"),
    ],
)
def test_encoders_that_cannot_be_built_are_refused(name, weights, error, message):
    with pytest.raises(error, match=message):
        build_encoder(name, weights, {} if name == "resnet18" else TINY_ENCODER_KWARGS)


def test_encoder_weights_come_from_a_local_file_and_must_fit(tmp_path):
    encoder = build_encoder(TINY_ENCODER, "random", TINY_ENCODER_KWARGS)
    torch.manual_seed(9)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter)
    file = tmp_path / "encoder.safetensors"
    save_file({k: v.contiguous() for k, v in encoder.state_dict().items()}, file)
    loaded = build_encoder(TINY_ENCODER, str(file), TINY_ENCODER_KWARGS)
    assert fingerprint(loaded.state_dict()) == fingerprint(encoder.state_dict())
    for depth in (1, 3):  # timm loads headless models with strict=False: block 3 would be random, or block 2 unused
        with pytest.raises(ValueError, match=r"encoder\.safetensors: they do not fit.*blocks\."):
            build_encoder(TINY_ENCODER, str(file), {**TINY_ENCODER_KWARGS, "depth": depth})
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"cut\.safetensors"):
        build_encoder(TINY_ENCODER, str(tmp_path / "cut.safetensors"), TINY_ENCODER_KWARGS)


def test_open_clips_names_are_understood(tmp_path):
    """The micro encoder is stored as its whole open_clip model; its vision tower is what the captioner takes."""
    open_clip = import_guarded("open_clip")
    torch.manual_seed(4)
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 48}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(24, vision, text).eval()
    file = tmp_path / "open_clip_model.safetensors"
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, file)
    encoder = build_encoder(TINY_ENCODER, str(file), TINY_ENCODER_KWARGS)
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        pooled = encoder.forward_features(pixels)[:, 0] @ clip.visual.proj
        assert torch.allclose(pooled, clip.encode_image(pixels), atol=1e-5)


def test_a_prefix_that_fills_the_context_is_refused():
    with pytest.raises(ValueError, match="leave no room for a caption"):
        make_captioner(shape=replace(SHAPE, n_positions=11))


# --------------------------------------------------------------------------------------------------------- captioning


def full_logits(captioner, image, histories):
    """Logits (K, V) after ``[prefix | BOS tokens]`` of K histories, everything computed anew and without a cache."""
    inputs = torch.tensor(histories)
    prefix = captioner.prefix(image[None]).expand(len(histories), -1, -1)
    x = torch.cat([prefix, captioner.decoder.embed(inputs)], 1)
    return captioner.decoder.logits(captioner.decoder(x, torch.arange(x.shape[1]))[:, -1])


def plain_step(captioner, features):
    """A step function that remembers tokens only and computes every history anew."""
    slots = []

    def step(tokens, ancestors):
        slots.append(tokens)
        written = torch.cat(slots, 1)  # (B, slots)
        rows = [
            full_logits(captioner, image, [seen[mask].tolist() for mask in masks])
            for image, seen, masks in zip(features, written, ancestors, strict=True)
        ]
        return torch.stack(rows)

    return step


@torch.no_grad()
def plain_greedy(captioner, image, max_new_tokens):
    tokens = [EOS]
    for _ in range(max_new_tokens):
        tokens.append(full_logits(captioner, image, [tokens])[0].argmax().item())
        if tokens[-1] == EOS:
            return tokens[1:-1]
    return tokens[1:]


def test_greedy_with_the_cache_equals_full_sequences(captioner):
    features = random_features(captioner, 4)
    found = search.greedy(captioner.step_function(features, 1, 10), 4, EOS, EOS, 10)
    assert found.tokens == [plain_greedy(captioner, image, 10) for image in features]
    assert len({tuple(t) for t in found.tokens}) > 1  # else the images would not matter


@pytest.mark.parametrize("beams", [2, 5])
def test_beams_with_one_shared_prefix_equal_full_sequences(captioner, beams):
    features = random_features(captioner, 3)
    cached, plain = captioner.step_function(features, beams, 8), plain_step(captioner, features)
    found, wanted = (search.beam_search(step, 3, EOS, EOS, beams, 8) for step in (cached, plain))
    assert found.tokens == wanted.tokens
    assert found.scores == pytest.approx(wanted.scores, abs=1e-5)


@pytest.mark.parametrize("beams", [1, 4])
def test_a_batch_is_captioned_like_its_images_one_by_one(captioner, beams):
    features = random_features(captioner, 4, seed=2)

    def tokens(part):
        step = captioner.step_function(part, beams, 9)
        if beams == 1:
            return search.greedy(step, len(part), EOS, EOS, 9).tokens
        return search.beam_search(step, len(part), EOS, EOS, beams, 9).tokens

    assert tokens(features) == [tokens(image[None])[0] for image in features]


def test_a_caption_that_cannot_fit_behind_the_image_is_refused(captioner):
    features = random_features(captioner, 1)
    captioner.step_function(features, 1, 54)
    with pytest.raises(ValueError, match="--max-new-tokens 55"):
        captioner.step_function(features, 1, 55)


def test_the_last_token_of_the_context_can_be_reached(captioner):
    """64 positions hold 10 image tokens, BOS and 53 tokens, and the 54th needs no position of its own."""
    step = captioner.step_function(random_features(captioner, 1), 1, 54)
    never = VOCAB  # an EOS that no argmax can be, so that the search runs to its limit
    assert len(search.greedy(step, 1, EOS, never, 54).tokens[0]) == 54


@pytest.mark.parametrize("lora", [LORA, LoraConfig(rank=2, alpha=4.0, enable_lora=(True, False, True))])
def test_merged_lora_captions_alike(lora):
    model = make_captioner(lora).eval()
    features = random_features(model, 3)

    def caption():
        return search.beam_search(model.step_function(features, 3, 8), 3, EOS, EOS, 3, 8)

    before = caption()
    after = (model.merge() and caption(), model.merge() and caption())  # merging twice is merging once
    for result in after:
        assert result.tokens == before.tokens
        assert result.scores == pytest.approx(before.scores, abs=1e-4)


# --------------------------------------------------------------------------------------------------------- the adapter


@pytest.fixture
def adapter(captioner, tmp_path):
    path = tmp_path / "adapter.safetensors"
    captioner.save_adapter(path)
    return path


def test_an_adapter_brings_back_the_captions(captioner, adapter):
    config, state = read_adapter(adapter)
    assert config == captioner.config
    torch.manual_seed(77)  # the new LoRA and projector start elsewhere
    decoder = Decoder(SHAPE, config.lora)
    decoder.load_state_dict({k: v for k, v in captioner.decoder.state_dict().items() if "lora_" not in k}, strict=False)
    restored = Captioner(config, decoder)
    features = random_features(captioner, 3)
    batch = pack_captions(ragged_captions((1, 2, 3)), EOS)
    assert abs(restored.loss(features, batch) - captioner.loss(features, batch)) > 1e-3
    restored.load_adapter_state(state)
    assert torch.equal(restored.eval().loss(features, batch), captioner.loss(features, batch))


def test_an_adapter_holds_the_trained_tensors_and_no_others(captioner, adapter):
    wanted = {"projector.weight", "projector.bias", "decoder.lm_head.lora_A", "decoder.lm_head.lora_B"}
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    wanted |= {f"decoder.h.{n}.{layer}.lora_{ab}" for n in range(2) for layer in layers for ab in "AB"}
    state = load_file(adapter)
    assert set(state) == wanted == set(captioner.trainable())
    for name, parameter in captioner.trainable().items():
        assert torch.equal(state[name], parameter), name
    with safe_open(adapter, "pt") as file:
        assert json.loads(file.metadata()["captioner"])["lora"]["rank"] == 3


@pytest.mark.parametrize(
    ("lora", "shape"),
    [
        (replace(LORA, rank=4), SHAPE),
        (replace(LORA, lm_head=False), SHAPE),
        (replace(LORA, enable_lora=(True, False, True)), SHAPE),
        (LORA, replace(SHAPE, n_embd=48)),
        (LORA, replace(SHAPE, n_layer=3)),
    ],
)
def test_an_adapter_of_another_shape_is_refused(captioner, lora, shape):
    other = make_captioner(lora, shape=shape)
    with pytest.raises(ValueError, match="adapter"):
        other.load_adapter_state(captioner.adapter_state())


def test_an_adapter_with_a_tensor_too_few_or_too_many_is_refused(captioner):
    state, other = captioner.adapter_state(), make_captioner()
    for broken in (
        {k: v for k, v in state.items() if k != "projector.bias"},
        {k: v for k, v in state.items() if k != "decoder.h.0.mlp.c_fc.lora_B"},
        {**state, "encoder.cls_token": torch.zeros(1)},
    ):
        with pytest.raises(ValueError, match="adapter"):
            other.load_adapter_state(broken)


def test_an_adapter_refuses_other_frozen_weights(captioner):
    with pytest.raises(ValueError, match="another decoder"):
        Captioner(captioner.config, make_decoder(seed=1))
    kwargs = {**TINY_ENCODER_KWARGS, "depth": 1}
    with pytest.raises(ValueError, match="another encoder"):
        Captioner(replace(captioner.config, encoder_kwargs=kwargs), make_decoder())


def test_files_that_are_no_adapter_are_refused(adapter, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--adapter .*gone"):
        read_adapter(tmp_path / "gone.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(adapter.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut\.safetensors: damaged"):
        read_adapter(cut)
    plain = tmp_path / "plain.safetensors"
    save_file({"wte.weight": torch.zeros(2)}, plain)
    with pytest.raises(ValueError, match=r"plain\.safetensors: no adapter"):
        read_adapter(plain)


@pytest.mark.parametrize("header", ["{", "[]", "{}", '{"lora": {}, "encoder": "x", "unknown": 1}', '{"lora": 3}'])
def test_an_adapter_with_a_spoilt_config_is_refused_by_name(header, tmp_path):
    path = tmp_path / "spoilt.safetensors"
    save_file({"projector.bias": torch.zeros(2)}, path, metadata={"captioner": header})
    with pytest.raises(ValueError, match=r"spoilt\.safetensors"):
        read_adapter(path)


def test_images_that_leave_a_search_take_nothing_from_the_others():
    """The others' keys and values move to the front of the same memory."""
    captioner = make_captioner()
    features = random_features(captioner, 4)
    tokens, alone = torch.tensor([[EOS, 2]] * 4), torch.eye(2, dtype=torch.bool).repeat(4, 1, 1)
    seen = torch.cat([alone, alone], -1)
    whole, part = (captioner.step_function(features, 2, 5) for _ in range(2))
    for step in (whole, part):
        step(tokens, alone)
    rows = torch.tensor([0, 3])
    part.keep(rows)
    more = torch.tensor([[3, 4]] * 4)
    torch.testing.assert_close(part(more[rows], seen[rows]), whole(more, seen)[rows], atol=1e-5, rtol=0)
    assert part.cache.keys[0].data_ptr() == part.cache.keys[0]._base.data_ptr()  # nothing was allocated anew
