"""Tiny models: names and sizes for fixtures, and random decoders and captioners for tests that build their own."""

import warnings

import torch

from captioning.models.captioner import Captioner, CaptionerConfig
from decoder import Decoder, DecoderConfig, LoraConfig

VOCAB_SIZE = 1024  # of the micro world's tokenizer
TINY_ENCODER = "vit_base_patch32_clip_224.openai"
TINY_ENCODER_KWARGS = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16, "img_size": 48, "crop_pct": 1.0}

VOCAB, EOS = 50, 49  # of the decoders below
LORA = LoraConfig(rank=3, alpha=6.0, lm_head=True)
SHAPE = DecoderConfig(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2)


def random_decoder(lora=LORA, shape=SHAPE, seed=0):
    torch.manual_seed(seed)
    decoder = Decoder(shape, lora)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.ndim > 1 or "lora_" in name:  # GPT-2's own 0.02 makes captions of one repeated token
                parameter.normal_(std=0.25)
    return decoder


def make_captioner(lora=LORA, use_cls=True, shape=SHAPE, kwargs=TINY_ENCODER_KWARGS, **config):
    config = CaptionerConfig(TINY_ENCODER, kwargs, "random", use_cls, lora, **config)
    decoder = random_decoder(lora, shape)
    torch.manual_seed(1)
    return Captioner(config, decoder)


def random_features(captioner, images, seed=0):
    return torch.randn(images, *captioner.feature_shape, generator=torch.Generator().manual_seed(seed))


def ragged_captions(counts=(1, 5, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(1, 9, (n,), generator=generator).tolist() for n in counts]
    return [[torch.randint(0, EOS, (n,), generator=generator).tolist() for n in row] for row in lengths]


def write_torchscript(state, path):
    """Write tensors as a TorchScript archive whose modules and parameters have their names, as OpenAI's CLIPs."""
    root = torch.nn.Module()
    for name, tensor in state.items():
        *modules, last = name.split(".")
        module = root
        for part in modules:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_buffer(last, tensor.detach().clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(root), path)
