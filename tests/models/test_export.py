"""export.py and p2_export.py: transformers loads the folders without this suite and captions like it."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import p2_export
import p2_infer
from captioning.data.tokenizer import Tokenizer
from captioning.imports import import_guarded
from captioning.inference.captions import caption_features
from captioning.models import adapter as adapter_module
from captioning.models import export as export_module
from captioning.models.adapter import read_adapter
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.profiles import PROFILES
from decoder import LoraConfig, build_decoder

TEXT = "a red cube above two blue balls"
LORAS = {
    "best": LoraConfig(rank=4, alpha=32, lm_head=True),
    "1": LoraConfig(rank=4, alpha=32),
    "4": LoraConfig(rank=4, alpha=32, enable_lora=(True, False, True), lm_head=True),
}


pytestmark = pytest.mark.usefixtures("micro")


def make_adapter(path, lora, use_cls=True, layer=-1, pool=1):
    """An adapter file with random LoRA and projector, as if trained."""
    profile = PROFILES["micro"]
    config = CaptionerConfig(
        profile.encoder,
        profile.encoder_kwargs,
        profile.encoder_weights,
        use_cls,
        lora,
        encoder_layer=layer,
        pool=pool,
    )
    captioner = Captioner(config, build_decoder(profile.decoder, lora))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in captioner.trainable().values():
            parameter.normal_(std=0.2, generator=generator)
    captioner.save_adapter(path)
    return path


def export(tmp_path, lora, use_cls=True, layer=-1, pool=1):
    adapter = make_adapter(tmp_path / "run" / "best.safetensors", lora, use_cls, layer, pool)
    whole = [] if pool == 1 else ["--no-llava"]
    assert p2_export.main([str(tmp_path / "out"), "--adapter", str(adapter), "--profile", "micro", *whole]) == 0
    return p2_infer.load_captioner(adapter, PROFILES["micro"].decoder, None, torch.device("cpu")), tmp_path / "out"


@pytest.mark.parametrize("setting", LORAS)
def test_gpt2_lm_head_model_loads_it_and_gives_the_same_logits(tmp_path, setting):
    """LoRA on lm_head unties it: the embeddings stay GPT-2's own, and the output layer is a file entry of its own."""
    transformers = import_guarded("transformers")
    captioner, out = export(tmp_path, LORAS[setting])
    model, report = transformers.GPT2LMHeadModel.from_pretrained(out / "gpt2", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tied = model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert tied == model.config.tie_word_embeddings == (not LORAS[setting].lm_head)
    ids = torch.randint(0, 1024, (2, 9), generator=torch.Generator().manual_seed(1))
    decoder = captioner.decoder
    with torch.inference_mode():
        ours = decoder.logits(decoder(decoder.embed(ids), torch.arange(9)))
        theirs = model.eval()(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting", LORAS)
def test_gpt2_is_read_once_and_is_the_same_with_and_without_a_whole_llava(tmp_path, monkeypatch, setting):
    adapter, read = make_adapter(tmp_path / "best.safetensors", LORAS[setting]), []
    for module in (adapter_module, export_module):
        build = module.build_decoder
        monkeypatch.setattr(module, "build_decoder", lambda *args, build=build: read.append(args) or build(*args))
    for out, flags in (("whole", []), ("parts", ["--no-llava"])):
        assert p2_export.main([str(tmp_path / out), "--adapter", str(adapter), "--profile", "micro", *flags]) == 0
        assert len(read) == 1
        read.clear()
    for folder in ("gpt2", "adapter"):
        ours, theirs = (
            {path.name: path.read_bytes() for path in (tmp_path / out / folder).iterdir()} for out in ("whole", "parts")
        )
        assert ours == theirs


def test_the_tokenizer_is_the_suites(tmp_path):
    transformers = import_guarded("transformers")
    _, out = export(tmp_path, LORAS["1"])
    theirs = transformers.AutoTokenizer.from_pretrained(out / "gpt2")
    ours = Tokenizer(PROFILES["micro"].tokenizer)
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT)
    assert theirs.bos_token_id == theirs.eos_token_id == ours.eos_id


@pytest.mark.parametrize(
    ("use_cls", "layer", "pool"),
    [(True, -1, 1), (False, -1, 1), (True, -2, 1), (False, -2, 1), (True, -1, 3), (False, -2, 3)],
)
def test_the_code_on_the_card_captions_like_the_suite(tmp_path, monkeypatch, capsys, tiny_data, use_cls, layer, pool):
    """The card's code is run unchanged, but with the encoder's weights passed in, which are on no hub."""
    timm = import_guarded("timm")
    captioner, out = export(tmp_path, LORAS["best"], use_cls, layer, pool)
    picture = sorted((tiny_data / "images" / "val").iterdir())[0]
    Image.open(picture).save(out / "gpt2" / "image.jpg", quality=100)
    features = captioner.encode(captioner.transform(Image.open(out / "gpt2" / "image.jpg").convert("RGB"))[None])
    tokenizer = Tokenizer(PROFILES["micro"].tokenizer)
    expected = caption_features(captioner, tokenizer, features, beam_size=1, max_new_tokens=30)[0]
    card = (out / "gpt2" / "README.md").read_text(encoding="utf-8")
    assert ("averages of 3 x 3" in card) == (pool == 3)
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)

    def create_model(name, pretrained, num_classes, pretrained_cfg_overlay, **kwargs):
        assert (name, pretrained, num_classes) == (captioner.config.encoder, True, 0)
        assert pretrained_cfg_overlay | kwargs == captioner.config.encoder_kwargs
        return captioner.encoder

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.chdir(out / "gpt2")
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == expected != ""


def test_averaged_patches_have_no_place_in_a_llava(tmp_path, capsys):
    adapter = make_adapter(tmp_path / "best.safetensors", LORAS["1"], pool=3)
    assert p2_export.main([str(tmp_path / "out"), "--adapter", str(adapter), "--profile", "micro"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "trained with --pool 3" in line and "--no-llava" in line
    assert not list((tmp_path / "out").glob("*"))


def test_the_card_describes_training_and_validation(tmp_path):
    run = tmp_path / "run"
    make_adapter(run / "best.safetensors", LORAS["1"])
    described = {
        "setting": "2",
        "profile": "micro",
        "git": "abc123",
        "trainable_parameters": 12345,
        "train": {"epochs": 3, "batch_size": 4, "optimizer": "adam", "lr": 5e-5, "seed": 7},
        "versions": {"torch": "9.9"},
        "random_weights": False,
    }
    (run / "config.json").write_text(json.dumps(described))
    lines = [
        {"kind": "step", "loss": 1.0},
        {"kind": "epoch", "epoch": 1, "best": True, "val_cider": 0.5, "val_loss": 2.0, "val_images": 200},
        {"kind": "epoch", "epoch": 2, "best": False, "val_cider": 0.4, "val_loss": 1.0, "val_images": 200},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (run / "val_scores.json").write_text(json.dumps({"metrics": ["CIDEr"], "CIDEr": 0.6, "images": 300}))
    argv = [str(tmp_path / "out"), "--adapter", str(run / "best.safetensors"), "--profile", "micro"]
    assert p2_export.main([*argv, "--license", "cc-by-4.0"]) == 0
    for name in ("adapter", "gpt2", "llava"):
        card = (tmp_path / "out" / name / "README.md").read_text(encoding="utf-8")
        assert "setting 2: epochs 3, batch_size 4, optimizer adam" in card and "12,345 parameters" in card
        assert "epoch 1: cider 0.5000, loss 2.0000, on 200 validation images" in card
        assert "; afterwards CIDEr 0.6000 on 300 images" in card and "\nlicense: cc-by-4.0\n" in card
        assert not any(mark in card.split("## Use")[0] for mark in ("{", "None", "not recorded"))
    assert load_file(tmp_path / "out/adapter/adapter.safetensors").keys() == load_file(run / "best.safetensors").keys()


def test_what_does_not_fit_is_refused_and_leaves_nothing_behind(tmp_path, capsys, tiny_decoder_file):
    adapter = make_adapter(tmp_path / "best.safetensors", LORAS["1"])
    argv = [str(tmp_path / "out"), "--adapter", str(adapter), "--profile", "micro"]
    state = load_file(tiny_decoder_file)
    state["wte.weight"] = state["wte.weight"] + 1
    torch.save(state, tmp_path / "other.bin")
    assert p2_export.main([*argv, "--decoder", str(tmp_path / "other.bin")]) == 2
    assert "was trained on another decoder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    other = ["--decoder", str(tmp_path / "other.bin"), "--allow-other-decoder"]
    assert p2_export.main([str(tmp_path / "allowed"), *argv[1:], *other]) == 0
    stored, parts = read_adapter(adapter)[0].decoder_hash, ("adapter", "gpt2")
    cards = {part: (tmp_path / "allowed" / part / "README.md").read_text(encoding="utf-8") for part in parts}
    assert stored in cards["adapter"] and stored not in cards["gpt2"]  # which holds the other one
    assert p2_export.main(argv) == 0
    assert p2_export.main(argv) == 2 and "exists already" in capsys.readouterr().err
