"""Files as the hubs hold them, with random weights from the libraries' own classes, loaded by ours.

Tests of the full size take up to 4 GB of memory. They are marked ``full_size``: ``pytest -m "not full_size"`` leaves
them out. What does not depend on the size is tested on small models of the same layout.
"""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import p1_llava_caption
import p2_infer
from captioning.imports import import_guarded
from captioning.models import captioner as captioner_module
from captioning.models.adapter import load_captioner
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.models.encoder import build_encoder
from captioning.profiles import PROFILES
from captioning.scoring.clipscore import ClipScorer, clipscore
from decoder import Decoder, DecoderConfig, LoraConfig, build_decoder
from microworld.scenes import generate

CPU = torch.device("cpu")
VIT = "vit_large_patch14_clip_224"
full_size = pytest.mark.full_size


@pytest.fixture(autouse=True)
def free_memory():
    yield
    gc.collect()


def random_(module):
    """Weights that differ from one another: libraries start biases at 0 and gains at 1, which hides mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(float(gain), 0.02, generator=generator)
    return module.eval()


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------- GPT-2


def make_gpt2(**config):
    """A random GPT-2 of transformers; without arguments GPT-2 small, 124 M parameters."""
    transformers = import_guarded("transformers")
    return random_(transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)))


def mask_buffers(n_layer, size):
    """What the files of 2019 contain: the causal mask of every layer, and the number it masked with."""
    mask = torch.ones(size, size, dtype=torch.uint8).tril()[None, None]
    masks = {f"h.{layer}.attn.bias": mask for layer in range(n_layer)}
    return masks | {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(n_layer)}


def hub_layout(gpt2, layout):
    """The state dict as a hub holds it: ``plain`` is openai-community/gpt2's own."""
    body, masks = gpt2.transformer.state_dict(), mask_buffers(gpt2.config.n_layer, gpt2.config.n_positions)
    if layout == "plain":
        return body | masks
    if layout == "fp16":
        return {key: value.half() for key, value in body.items()} | masks
    prefixed = {f"transformer.{key}": value for key, value in (body | masks).items()}
    return prefixed | {"lm_head.weight": body["wte.weight"].clone()}


@torch.inference_mode()
def logits_of(decoder, ids):
    return decoder.logits(decoder(decoder.embed(ids), torch.arange(ids.shape[1])))


@pytest.mark.parametrize(
    ("layout", "suffix"),
    [("plain", "bin"), ("plain", "safetensors"), ("prefixed", "bin"), ("prefixed", "safetensors"), ("fp16", "bin")],
)
def test_gpt2_as_the_hub_holds_it(tmp_path, layout, suffix):
    gpt2 = make_gpt2(vocab_size=300, n_positions=64, n_embd=128, n_layer=3, n_head=2)
    state, path = hub_layout(gpt2, layout), tmp_path / f"decoder_model.{suffix}"
    if suffix == "bin":
        torch.save(state, path)
    else:
        save_file({key: value.clone() for key, value in state.items()}, path, metadata={"format": "pt"})
    decoder = build_decoder(path).eval()
    assert decoder.config == DecoderConfig(vocab_size=300, n_positions=64, n_embd=128, n_layer=3, n_head=2)
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, theirs = logits_of(decoder, ids), gpt2(ids).logits
        if layout == "fp16":  # compared with the same rounding, which moves logits by far more than the tolerance
            rounded = gpt2.half().float()(ids).logits
            assert not torch.allclose(theirs, rounded, atol=1e-5)
            theirs = rounded
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------- GPT-2 small and timm's ViT-L/14


def full_size_adapter(path, encoder_file):
    """An untrained adapter of rank 32, without fingerprints, so that no full-size model has to be built for it."""
    lora = LoraConfig(rank=32, alpha=32, lm_head=True)
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(captioner_module, "fingerprint", lambda state: "")
        captioner = Captioner(CaptionerConfig(VIT, {}, "random", True, lora), Decoder(DecoderConfig(), lora))
    assert sum(p.numel() for p in captioner.trainable().values()) == 7_138_592
    trained = {name: numbers(*p.shape, seed=3) * ("lora_B" not in name) for name, p in captioner.trainable().items()}
    config = CaptionerConfig(VIT, {}, str(encoder_file), True, lora)
    captioner_module.write_tensors(path, trained, {"captioner": json.dumps(captioner_module.asdict(config))})


@full_size
def test_p2_infer_captions_with_full_size_files(tmp_path, monkeypatch):
    """GPT-2 small in the hub's layout and ViT-L/14 in timm's, with its classifier: one image, few tokens.

    The models that p2_infer.py loaded are then compared with their libraries' own.
    """
    pixels, ids = numbers(1, 3, 224, 224, seed=2), torch.randint(0, 50257, (2, 12))
    encoder_file, decoder_file, adapter = (
        tmp_path / name for name in ("vit.safetensors", "gpt2.bin", "best.safetensors")
    )
    with torch.device("meta"):
        vit = import_guarded("timm").create_model(VIT, num_classes=1000)
    vit = random_(vit.to_empty(device="cpu"))
    save_file(vit.state_dict(), encoder_file, metadata={"format": "pt"})
    with torch.inference_mode():
        tokens = vit.forward_features(pixels)
    del vit
    gpt2 = make_gpt2()
    torch.save(hub_layout(gpt2, "plain"), decoder_file)
    with torch.inference_mode():
        logits = gpt2(ids).logits
    del gpt2
    gc.collect()
    full_size_adapter(adapter, encoder_file)
    generate(tmp_path / "scenes", "val", 1, seed=1, workers=1)
    loaded = []
    monkeypatch.setattr(p2_infer, "load_captioner", lambda *given: loaded.append(load_captioner(*given)) or loaded[0])
    files = [tmp_path / "scenes/images/val", tmp_path / "out.json", decoder_file]
    flags = ["--adapter", adapter, "--tokenizer", PROFILES["micro"].tokenizer]
    small = ["--beam-size", 2, "--max-new-tokens", 3, "--device", "cpu", "--precision", "fp32"]
    assert p2_infer.main([*map(str, [*files, *flags, *small])]) == 0
    assert len(json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))) == 1
    (captioner,) = loaded
    assert captioner.decoder.config == DecoderConfig()
    encoded = captioner.encode(pixels)
    assert encoded.shape == (1, 257, 1024)
    torch.testing.assert_close(encoded, tokens, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(captioner.decoder, ids), logits, rtol=1e-4, atol=1e-4)
    normalize = captioner.transform.transforms[-1]
    assert normalize.mean.tolist() == normalize.std.tolist() == [0.5, 0.5, 0.5], "laion2b_ft_in12k_in1k's own"


# ----------------------------------------------------------------------------------------------- open_clip's ViT-L/14


def test_vit_large_in_open_clips_layout_with_its_text_tower(tmp_path):
    """timm/vit_large_patch14_clip_224.openai holds a whole CLIP; only its vision tower is used, with QuickGELU.

    Two of its layers, at their full width: the others have the same names and shapes.
    """
    open_clip = import_guarded("open_clip")
    path = tmp_path / "open_clip_model.safetensors"
    config = open_clip.get_model_config("ViT-L-14-quickgelu")
    config["vision_cfg"]["layers"], config["text_cfg"]["layers"] = 2, 1
    with torch.device("meta"):
        clip = open_clip.CLIP(**config).eval()
    clip.visual.to_empty(device="cpu")
    random_(clip.visual)
    # Of the text tower only names and kinds matter.
    state = {k: v if k.startswith("visual.") else torch.zeros(8, dtype=v.dtype) for k, v in clip.state_dict().items()}
    save_file(state, path)
    clip.visual.output_tokens, clip.visual.proj = True, None
    pixels = numbers(1, 3, 224, 224, seed=2)
    with torch.inference_mode():
        pooled, patches = clip.visual(pixels)
        theirs = torch.cat([pooled[:, None], patches], 1)  # (1, 257, 1024)
        encoder = build_encoder("vit_large_patch14_clip_quickgelu_224.openai", str(path), {"depth": 2})
        ours = encoder.forward_features(pixels)
    assert ours.shape == (1, 257, 1024)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- CLIP ViT-B/32


@full_size
def test_clip_vit_b_32_of_openai_from_a_local_file_scores_as_open_clip_does(tmp_path):
    open_clip = import_guarded("open_clip")
    path = tmp_path / "ViT-B-32-quickgelu.openai.safetensors"
    model = random_(open_clip.create_model("ViT-B-32-quickgelu", pretrained=None))
    save_file(model.state_dict(), path)
    images = {}
    for number, size in enumerate([(80, 60), (60, 200)]):
        images[str(number)] = tmp_path / f"{number}.png"
        noise = torch.randint(0, 256, (*size[::-1], 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(images[str(number)])
    captions = {"0": "a red cube", "1": "two dogs on a couch"}
    preprocess = open_clip.image_transform(224, is_train=False)
    with torch.inference_mode():
        pixels = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in images.values()])
        texts = open_clip.get_tokenizer("ViT-B-32-quickgelu")(list(captions.values()))
        cosine = torch.cosine_similarity(model.encode_image(pixels), model.encode_text(texts))
    del model
    gc.collect()
    scores = clipscore(ClipScorer("ViT-B-32-quickgelu", str(path), CPU), images, captions)
    torch.testing.assert_close(torch.tensor(list(scores.values())), 2.5 * cosine.clamp(min=0), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- LLaVA


def hub_llava(folder):
    """The micro LLaVA as the hub holds the 7B: three fp16 shards with an index, the vision tower under the name that
    it had when the file was written, and an image processor with a file of its own.
    """
    micro = Path(PROFILES["micro"].llava)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(micro / name, folder)
    processor = json.loads((micro / "processor_config.json").read_text(encoding="utf-8"))
    image_processor = processor.pop("image_processor")
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor), encoding="utf-8")
    (folder / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    state = {
        key.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for key, tensor in load_file(micro / "model.safetensors").items()
    }
    keys, places = sorted(state), {}
    for number in range(3):
        shard, part = f"model-0000{number + 1}-of-00003.safetensors", keys[number::3]
        save_file({key: state[key] for key in part}, folder / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def test_llava_in_shards_with_an_index(tmp_path):
    """Renamed keys that were not recognised would leave the vision tower at random."""
    folder, scenes = tmp_path / "llava-1.5-7b-hf", tmp_path / "scenes"
    folder.mkdir()
    hub_llava(folder)
    transformers = import_guarded("transformers")
    net, report = transformers.LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert net.dtype == torch.float16
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    generate(scenes, "val", 3, seed=2, workers=1)
    answers = []
    for name, model in (("hub", folder), ("micro", PROFILES["micro"].llava)):
        out = tmp_path / f"{name}.json"
        argv = [scenes / "images/val", out, "--model", model, "--device", "cpu", "--max-new-tokens", "20"]
        assert p1_llava_caption.main([*map(str, argv)]) == 0
        answers.append(json.loads(out.read_text(encoding="utf-8")))
    assert answers[0] == answers[1] and len(set(answers[0].values())) == 3


def test_a_llava_folder_without_one_of_its_shards_is_refused(tmp_path, capsys):
    hub_llava(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    argv = [*map(str, [tmp_path, tmp_path / "out.json", "--model", tmp_path, "--device", "cpu"])]
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    assert p1_llava_caption.main(argv) == 2
    assert "bash hw3_download.sh p1" in capsys.readouterr().err
