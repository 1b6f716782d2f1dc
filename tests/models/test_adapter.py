"""adapter.py: adapters hold what was trained, restore the captions, and refuse what they do not belong to."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import EOS, LORA, SHAPE, TINY_ENCODER_KWARGS, make_captioner, ragged_captions, random_decoder, random_features

from captioning.data.batches import pack_captions
from captioning.inference import search
from captioning.models.adapter import load_captioner, read_adapter, start_from
from captioning.models.captioner import Captioner
from captioning.models.encoder import build_encoder
from captioning.tensors import fingerprint
from decoder import Decoder, DecoderConfig, gpt2_state_dict, load_gpt2

STORED = Path(__file__).parent.parent / "fixtures" / "adapters"  # written by the version before captioning/ existed


@pytest.fixture(scope="module")
def captioner():
    """One captioner for the tests that only read it."""
    return make_captioner().eval()


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


def test_an_adapter_says_how_its_captions_are_searched(captioner, tmp_path):
    path, stored = tmp_path / "report.safetensors", captioner.config
    captioner.config = replace(stored, search_rule="report")
    captioner.save_adapter(path)
    captioner.config = stored
    config = read_adapter(path)[0]
    assert config == replace(stored, search_rule="report")
    assert read_adapter(STORED / "plain.safetensors")[0].search_rule == "beam"  # written before there was a choice

    odd = json.dumps(asdict(config) | {"search_rule": "guess"})
    save_file(load_file(path), tmp_path / "odd.safetensors", {"captioner": odd})
    with pytest.raises(ValueError, match=r"odd\.safetensors: .*search_rule 'guess': choose from beam, report"):
        read_adapter(tmp_path / "odd.safetensors")


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
        Captioner(captioner.config, random_decoder(seed=1))
    kwargs = {**TINY_ENCODER_KWARGS, "depth": 1}
    with pytest.raises(ValueError, match="another encoder"):
        Captioner(replace(captioner.config, encoder_kwargs=kwargs), random_decoder())


def test_files_that_are_not_adapters_are_refused(adapter, tmp_path):
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
def test_an_adapter_with_a_damaged_config_is_refused_by_name(header, tmp_path):
    path = tmp_path / "damaged.safetensors"
    save_file({"projector.bias": torch.zeros(2)}, path, metadata={"captioner": header})
    with pytest.raises(ValueError, match=r"damaged\.safetensors"):
        read_adapter(path)


# ---- the same decoder in another precision -------------------------------------------------------------------------


def as_file(decoder, dtype, path):
    save_file({name: tensor.to(dtype) for name, tensor in gpt2_state_dict(decoder).items()}, path)
    (path.parent / "config.json").write_text('{"model_type": "gpt2", "n_head": 2}', encoding="utf-8")
    return path


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
def test_a_decoder_in_another_precision_says_so_and_is_taken_when_allowed(tmp_path, caplog, dtype):
    """Which of the two the adapter was trained on decides what can be known: rounding has no way back."""
    name, whole = str(dtype).removeprefix("torch."), random_decoder()
    files = {kind: as_file(whole, kind, tmp_path / f"{kind}.safetensors") for kind in (torch.float32, dtype)}
    for trained, given, why in (
        (dtype, torch.float32, f"rounded to {name} it is the wanted one, so only the precision differs"),
        (torch.float32, dtype, f"all of its numbers are {name}'s, so the precision may be the reason"),
    ):
        captioner, adapter = make_captioner(), tmp_path / "adapter.safetensors"
        load_gpt2(captioner.decoder, load_file(files[trained]))
        config = replace(captioner.config, decoder_hash=fingerprint(gpt2_state_dict(captioner.decoder)))
        captioner.config = config
        captioner.save_adapter(adapter)
        arguments = (adapter, files[given], None, torch.device("cpu"))
        with pytest.raises(ValueError, match=rf"another decoder .*{why}\); --allow-other-decoder takes it"):
            load_captioner(*arguments)
        with caplog.at_level("WARNING"):
            caplog.clear()
            loaded = load_captioner(*arguments, allow_other_decoder=True)
        assert len(caplog.records) == 1 and why in caplog.text
        assert torch.equal(loaded.decoder.wpe.weight, load_file(files[given])["wpe.weight"].float())
        caplog.clear()
        load_captioner(adapter, files[trained], None, torch.device("cpu"), allow_other_decoder=True)
        assert not caplog.records


def test_a_strange_decoder_is_not_put_down_to_precision(captioner, adapter, tmp_path):
    strange = as_file(random_decoder(seed=1), torch.float32, tmp_path / "decoder.safetensors")
    with pytest.raises(ValueError, match=r"another decoder \(hash \w+, this one is \w+\);"):
        load_captioner(adapter, strange, None, torch.device("cpu"))
    wider = as_file(random_decoder(shape=replace(SHAPE, n_embd=48)), torch.float32, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="does not fit this captioner"):
        load_captioner(adapter, wider, None, torch.device("cpu"), allow_other_decoder=True)


def test_another_precision_of_encoder_and_decoder_is_named_where_training_goes_on(captioner, adapter):
    other = make_captioner()
    with torch.no_grad():
        for parameter in other.decoder.parameters():
            parameter.copy_(parameter.half())
    other.config = replace(other.config, decoder_hash=fingerprint(gpt2_state_dict(other.decoder)))
    with pytest.raises(ValueError, match=r"--init-adapter .*another decoder .*float16's, so the precision may be"):
        start_from(other, adapter)
    halves = {key: tensor.half().float() for key, tensor in captioner.encoder.state_dict().items()}
    config = replace(captioner.config, encoder_hash=fingerprint(halves))
    with pytest.raises(ValueError, match=r"another encoder .*rounded to float16 it is the wanted one"):
        Captioner(config, random_decoder())


# ---- adapters of an earlier version --------------------------------------------------------------------------------


def numbers(*shape, scale=1.0, seed=0):
    """Numbers in [-scale, scale) that need no generator, so that they are the same with every torch."""
    x = (torch.arange(1, torch.Size(shape).numel() + 1) + 99991 * seed) * 2654435761 % 2**32
    x = (x ^ x >> 16) * 0x45D9F3B % 2**32
    return ((x ^ x >> 16) % 65536 / 32768 - 1).mul(scale).view(shape)


def fill(state):
    gains = {key: float(tensor.ndim == 1 and key.endswith("weight")) for key, tensor in state.items()}
    return {k: gains[k] + numbers(*state[k].shape, scale=0.5, seed=n) for n, k in enumerate(sorted(state))}


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """Files of the encoder and the decoder that the stored adapters were made for."""
    folder = tmp_path_factory.mktemp("frozen")
    encoder, decoder = folder / "encoder.safetensors", folder / "decoder.safetensors"
    config, _ = read_adapter(STORED / "plain.safetensors")
    save_file(fill(build_encoder(config.encoder, "random", config.encoder_kwargs).state_dict()), encoder)
    shape = DecoderConfig(vocab_size=40, n_positions=24, n_embd=64, n_layer=1, n_head=1)
    save_file(fill(gpt2_state_dict(Decoder(shape))), decoder)
    return encoder, decoder


@pytest.mark.parametrize("name", ["plain", "merged_linear"])
def test_adapters_of_the_last_version_load_and_caption_as_they_did(frozen, name):
    """merged_linear: LoRA on query, value and the output layer, no CLS token, the last layer but one."""
    encoder, decoder = frozen
    expected = json.loads((STORED / "expected.json").read_text(encoding="utf-8"))[name]
    model = load_captioner(STORED / f"{name}.safetensors", decoder, str(encoder), torch.device("cpu"))
    features = model.encode(torch.stack([numbers(3, 32, 32, scale=2.0, seed=seed) for seed in (98, 99)]))
    found = search.beam_search(model.step_function(features, 3, 8), 2, 39, 39, 3, 8)
    assert found.tokens == expected["tokens"]
    assert found.scores == pytest.approx(expected["scores"], abs=1e-4)
    with torch.no_grad():
        hidden = model.decoder(model.prefix(features), torch.arange(model.n_prefix))
        logits = model.decoder.logits(hidden[:, -1])[:, :6]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), atol=1e-4, rtol=1e-4)
