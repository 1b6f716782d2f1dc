"""The embedded weights are what they claim: they load through the libraries' own doors and know their world."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from captioning import load, score
from captioning.data.tokenizer import Tokenizer
from captioning.imports import import_guarded
from captioning.models.adapter import load_captioner, read_adapter
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.models.encoder import build_encoder, build_transform
from captioning.profiles import MICRO_WEIGHTS, PROFILES, ROOT
from captioning.scoring.clipscore import ClipScorer, clipscore
from decoder import LoraConfig, build_decoder
from microworld import recipes
from microworld.scenes import make_image

MICRO = PROFILES["micro"]
MODELS = ("decoder", "encoder", "scorer", "llava", "adapter")


def scenes(count: int):
    return [make_image("val", 99, k) for k in range(count)]


@pytest.mark.parametrize("name", MODELS)
def test_each_model_says_how_it_was_made(name: str):
    record = json.loads((MICRO_WEIGHTS / name / "training.json").read_text(encoding="utf-8"))
    assert record["command"] == f"python -m microworld.pretrain {name}"
    assert record["steps"] > 0 and record["seconds"] > 0 and record["metrics"] and "seed" in record["data"]


def test_weights_are_light():
    files = [p for name in MODELS if name != "adapter" for p in (MICRO_WEIGHTS / name).iterdir()]
    llava = sum(p.stat().st_size for p in files if p.parent.name == "llava")
    assert llava < 16e6
    assert sum(p.stat().st_size for p in files) - llava < 30 * 2**20
    assert max(p.stat().st_size for p in files) < 20 * 2**20


def test_the_adapter_is_light_half_precision_and_of_no_machine():
    file = Path(MICRO.adapter)
    config, state = read_adapter(file)
    assert file.stat().st_size < 2e6 and {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert config.encoder_weights == "microworld/weights/encoder/open_clip_model.safetensors"
    record = json.loads((file.parent / "training.json").read_text(encoding="utf-8"))
    assert record["parameters"] == sum(tensor.numel() for tensor in state.values())
    assert record["metrics"]["val CIDEr"] > 1


def test_the_adapter_is_refused_on_another_decoder(tmp_path):
    other = load_file(MICRO.decoder)
    other["wte.weight"] = other["wte.weight"] + 1
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="trained on another decoder"):
        load(MICRO.adapter, device="cpu", decoder=tmp_path / "other.safetensors")


def test_the_adapter_captions_unseen_scenes():
    captioner, drawn = load("micro", device="cpu"), scenes(12)
    captions = captioner.caption([image for image, _, _ in drawn])
    references = [[caption.text for caption in said] for _, _, said in drawn]
    right, wrong = (score(said, references).means["CIDEr"] for said in (captions, captions[1:] + captions[:1]))
    assert right > 2 * wrong


def test_import_load_and_the_first_caption_take_five_seconds_of_one_core_at_most():
    """In the processor's time, which other programs do not change; the bound is on the fastest of three."""
    code = "import time; from captioning import load; captioner = load('micro', device='cpu');"
    code += "captioner.caption('examples/images/000000000000.jpg'); print(time.process_time())"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    took = []
    while len(took) < 3 and min(took, default=9) >= 5:
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
        took.append(float(run.stdout))
    assert min(took) < 5


def test_the_pre_training_splits_share_no_seed():
    assert len(set(recipes.SCENE_SEEDS.values())) == len(recipes.SCENE_SEEDS)


def test_timm_and_open_clip_see_the_same():
    """The P2 encoder is the CLIP model's vision tower; a wrong key map or activation would show here."""
    open_clip = import_guarded("open_clip")
    clip = open_clip.create_model(f"local-dir:{MICRO_WEIGHTS / 'encoder'}").eval()
    clip.visual.output_tokens = True
    encoder = build_encoder(MICRO.encoder, MICRO.encoder_weights, MICRO.encoder_kwargs)
    assert encoder.patch_embed.grid_size >= (12, 12)
    assert sum(p.numel() for p in encoder.parameters()) <= 6e6
    pixels = torch.stack([build_transform(encoder)(image) for image, _, _ in scenes(2)])
    with torch.no_grad():
        torch.testing.assert_close(encoder.forward_features(pixels)[:, 1:], clip.visual(pixels)[1], atol=1e-4, rtol=0)


def test_preprocessing_is_that_of_the_pre_training():
    encoder = build_encoder(MICRO.encoder, MICRO.encoder_weights, MICRO.encoder_kwargs)
    image, _, _ = scenes(1)[0]
    small = image.resize((recipes.ENCODER_IMAGE, recipes.ENCODER_IMAGE), Image.Resampling.BICUBIC)
    expected = recipes.normalise(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(1, 96, 96, 3))
    torch.testing.assert_close(build_transform(encoder)(image)[None], expected)


def test_the_scorer_prefers_right_captions(tmp_path):
    drawn = scenes(24)
    paths, right = {}, {}
    for k, (image, _, captions) in enumerate(drawn):
        paths[str(k)] = tmp_path / f"{k}.png"
        image.save(paths[str(k)])
        right[str(k)] = captions[0].text
    wrong = {str(k): right[str((k + 7) % 24)] for k in range(24)}
    scorer = ClipScorer(MICRO.clip_model, None, torch.device("cpu"))
    good, bad = (clipscore(scorer, paths, captions) for captions in (right, wrong))
    assert sum(good[k] > bad[k] for k in good) >= 20


def test_the_decoder_has_learnt_its_language_at_every_position():
    decoder = build_decoder(MICRO.decoder).eval()
    tokenizer = Tokenizer(MICRO.tokenizer)
    assert 1000 <= tokenizer.vocab_size == decoder.config.vocab_size <= 4000
    ids = torch.tensor([tokenizer.eos_id, *tokenizer.encode("A red bike stands on the beach."), tokenizer.eos_id])
    for start in (0, 150, decoder.config.n_positions - len(ids)):
        with torch.no_grad():
            hidden = decoder(decoder.embed(ids[None, :-1]), torch.arange(len(ids) - 1) + start)
            loss = F.cross_entropy(decoder.logits(hidden)[0], ids[1:])
        assert loss < 2.5  # an untrained one has log(1024) = 6.9


def test_an_adapter_from_another_machine_finds_the_profiles_encoder(tmp_path):
    """The adapter remembers a path; where that is gone the profile's file serves, if its fingerprint is right."""
    config = CaptionerConfig(MICRO.encoder, MICRO.encoder_kwargs, MICRO.encoder_weights, lora=LoraConfig(rank=2))
    captioner = Captioner(config, build_decoder(MICRO.decoder, config.lora))
    captioner.config = replace(captioner.config, encoder_weights="/gone/open_clip_model.safetensors")
    captioner.save_adapter(tmp_path / "a.safetensors")
    arguments = (tmp_path / "a.safetensors", MICRO.decoder, None, torch.device("cpu"))
    assert load_captioner(*arguments, MICRO.encoder_weights).decoder.merged
    with pytest.raises(FileNotFoundError, match="gone"):
        load_captioner(*arguments)
    other = str(MICRO_WEIGHTS / "scorer" / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="scorer"):
        load_captioner(*arguments, other)


def test_llava_loads_by_the_librarys_own_calls_and_sees_with_the_encoders_tower():
    transformers = import_guarded("transformers")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(MICRO.llava).float().eval()
    processor = transformers.AutoProcessor.from_pretrained(MICRO.llava)
    assert type(processor).__name__ == "LlavaProcessor"
    encoder = build_encoder(MICRO.encoder, MICRO.encoder_weights, MICRO.encoder_kwargs)
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tower = model.model.vision_tower
        seen = tower.post_layernorm(tower(pixels, output_hidden_states=True).hidden_states[-1])
        assert torch.allclose(seen, encoder.forward_features(pixels), atol=2e-2)  # fp16 files of one float32 original
