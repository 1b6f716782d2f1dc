"""export_llava.py: stock transformers loads the folder as a LLaVA and captions like the suite, to the last word."""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image
from torch import nn

import p1_llava_caption
import p2_export
import p2_infer
import p3_attention
from captioning.data.images import load_image
from captioning.data.tokenizer import Tokenizer
from captioning.imports import import_guarded
from captioning.inference.captions import caption_features
from captioning.maps.explainers import LlavaExplainer
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.models.encoder import build_encoder
from captioning.models.export_llava import IMAGE_TOKEN, _make_norm, build_llava, check_tower
from captioning.models.llava import load_llava
from captioning.profiles import PROFILES
from decoder import Decoder, DecoderConfig, LoraConfig, build_decoder, init_weights
from microworld.scenes import generate

MICRO = PROFILES["micro"]
SCENES = 100
PROMPT = "<image><|endoftext|>"
TOLERANCE = 2e-6  # of features, relative to the largest


def save_adapter(path, use_cls=True, layer=-1, profile=MICRO, crop_mode=None, **lora):
    """An adapter with random LoRA and projector: captions without sense, but of every length and ending."""
    lora = LoraConfig(**({"rank": 8, "alpha": 8, "lm_head": True} | lora))
    cropped = {"crop_mode": crop_mode} if crop_mode else {}
    kwargs = (profile.encoder, profile.encoder_kwargs | cropped, profile.encoder_weights)
    captioner = Captioner(
        CaptionerConfig(*kwargs, use_cls, lora, encoder_layer=layer), build_decoder(profile.decoder, lora)
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in captioner.trainable().items():
            parameter.normal_(std=0.1 if "projector" in name else 0.05, generator=generator)
    captioner.save_adapter(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    generate(folder, "val", SCENES, seed=77, workers=1)
    return folder / "images" / "val"


@contextmanager
def exported(tmp_path, *flags, **options):
    adapter = save_adapter(tmp_path / "best.safetensors", **options)
    out = tmp_path / "out"
    assert p2_export.main([str(out), "--adapter", str(adapter), "--profile", "micro", *flags]) == 0
    captioner = p2_infer.load_captioner(adapter, MICRO.decoder, None, torch.device("cpu"))
    transformers = import_guarded("transformers")
    model, report = transformers.LlavaForConditionalGeneration.from_pretrained(out / "llava", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    yield captioner, model.eval(), transformers.AutoProcessor.from_pretrained(out / "llava", backend="pil"), out


def ours(captioner, images, beams=5, length=30):
    features = captioner.encode(torch.stack([captioner.transform(image) for image in images]))
    return caption_features(captioner, Tokenizer(MICRO.tokenizer), features, beams, length)


@torch.no_grad()
def theirs(model, processor, images, beams, length):
    inputs = processor(images=images, text=[PROMPT] * len(images), return_tensors="pt")
    ids = model.generate(**inputs, num_beams=beams, max_new_tokens=length)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


@pytest.mark.parametrize(
    ("use_cls", "layer", "count", "beams", "length"),
    [(True, -1, SCENES, 3, 8), (False, -1, 6, 5, 30), (True, -2, 6, 5, 30), (False, -2, 6, 5, 30)],
)
def test_captions_are_those_of_the_suite(tmp_path, pictures, use_cls, layer, count, beams, length):
    files = sorted(pictures.iterdir())[:count]
    with exported(tmp_path, use_cls=use_cls, layer=layer) as (captioner, model, processor, _):
        image = load_image(files[0])
        inputs = processor(images=image, text=PROMPT, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"][0], captioner.transform(image))
        assert inputs["input_ids"].shape[1] == captioner.n_prefix + 1
        with torch.no_grad():
            found = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
            wanted = captioner.projector(captioner.encode(inputs["pixel_values"])[0, captioner.n_dropped_tokens :])
        assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
        captions = []
        for start in range(0, count, 20):
            images = [load_image(file) for file in files[start : start + 20]]
            captions += ours(captioner, images, beams, length)
            assert theirs(model, processor, images, beams, length) == captions[start:]
        assert len(set(captions)) > count // 4


def test_pictures_that_are_squeezed_whole_are_squeezed_there_too(tmp_path):
    """As best-336's encoder has them; no other preset's, and so no other test's, does."""
    generator = torch.Generator().manual_seed(2)
    pixels = [torch.randint(0, 256, (*size, 3), generator=generator) for size in ((70, 150), (200, 90))]
    images = [Image.fromarray(picture.byte().numpy()) for picture in pixels]
    with exported(tmp_path, crop_mode="squash") as (captioner, model, processor, out):
        found = processor(images=images, text=[PROMPT] * 2, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, torch.stack([captioner.transform(image) for image in images]))
        assert theirs(model, processor, images, 3, 8) == ours(captioner, images, 3, 8)
        llava = load_llava(out / "llava", torch.device("cpu"))
        assert LlavaExplainer(llava, PROMPT, 1, 8).window((150, 70)) == (0, 0, 150, 70)


def test_the_code_on_the_card_and_the_pipeline_caption_alike(tmp_path, pictures, monkeypatch, capsys):
    file = min(pictures.iterdir())
    with exported(tmp_path) as (captioner, _, processor, out):
        (caption,) = ours(captioner, [load_image(file)])
        Image.open(file).save(out / "llava" / "image.jpg", quality=100, subsampling=0)
        (of_copy,) = ours(captioner, [load_image(out / "llava" / "image.jpg")])
        card = (out / "llava" / "README.md").read_text(encoding="utf-8")
        monkeypatch.chdir(out / "llava")
        capsys.readouterr()
        exec(compile(re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1), "README.md", "exec"), {})
        assert capsys.readouterr().out.strip() == of_copy != ""
        pipeline = import_guarded("transformers").pipeline(
            "image-text-to-text", model=str(out / "llava"), processor=processor
        )
        content = [{"type": "image", "image": Image.open(file)}, {"type": "text", "text": "What is this?"}]
        (answer,) = pipeline(text=[{"role": "user", "content": content}], return_full_text=False)
        assert answer["generated_text"].strip() == caption


def test_the_suites_own_scripts_run_on_it(tmp_path, pictures):
    """The captions of p2_infer by p1_llava_caption, and maps of their words by p3_attention --model p1."""
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(pictures.iterdir())[:3]:
        (few / file.name).write_bytes(file.read_bytes())
    with exported(tmp_path) as (captioner, _, _, out):
        model, flags = ["--model", str(out / "llava")], ["--profile", "micro", "--num-beams", "5"]
        result = tmp_path / "p1.json"
        argv = [str(few), str(result), *model, *flags, "--max-new-tokens", "30", "--batch-size", "2"]
        assert p1_llava_caption.main(argv) == 0
        wanted = ours(captioner, [load_image(file) for file in sorted(few.iterdir())])
        assert [*json.loads(result.read_text()).values()] == wanted
        maps = ["--model", "p1", "--llava", str(out / "llava"), "--images", str(few), "--out", str(tmp_path / "maps")]
        assert p3_attention.main([*maps, "--profile", "micro"]) == 0
        assert len(list((tmp_path / "maps").glob("*.png"))) == 3


def test_a_layer_can_be_a_norm():
    """For numbers of an encoder's size, whatever the activation, and where the input is far larger than its norm."""
    transformers = import_guarded("transformers")
    norm = nn.LayerNorm(16, eps=1e-5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for activation in ("gelu", "quick_gelu"):
        config = transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, hidden_act=activation
        )
        layer = transformers.CLIPVisionModel(config).eval()
        layer = getattr(layer, "vision_model", layer).encoder.layers[0]
        with torch.no_grad():
            _make_norm(layer, norm)
            x = torch.randn(1, 5, 16) * 300
            output = layer(x, attention_mask=None)
            output = output if torch.is_tensor(output) else output[0]
            assert torch.allclose(output / 2.0**30, norm(x), rtol=0, atol=1e-5)


def test_the_tokenizer_keeps_every_id_and_has_one_token_for_an_image(tmp_path):
    with exported(tmp_path) as (_, model, processor, _):
        tokenizer, own = processor.tokenizer, Tokenizer(MICRO.tokenizer)
        assert len(tokenizer) == own.vocab_size == model.config.text_config.vocab_size
        assert tokenizer("A red cube, 3 balls.")["input_ids"] == own.encode("A red cube, 3 balls.")
        assert tokenizer(PROMPT)["input_ids"] == [model.config.image_token_id, own.eos_id]
        assert tokenizer.decode([model.config.image_token_id]) == IMAGE_TOKEN
        assert model.generation_config.num_beams == 5 and model.generation_config.max_new_tokens == 30


def test_an_encoder_without_a_place_there_is_refused_with_the_reason():
    tiny = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32, "patch_size": 16}
    for name, reason in {
        "vit_base_patch16_224": "no norm before its first layer",
        "vit_base_patch16_siglip_224": "no norm before its first layer",
        "vit_base_patch16_clip_224": None,
    }.items():
        encoder = build_encoder(name, "random", tiny)
        if reason is None:
            check_tower(encoder, name)
            encoder.pretrained_cfg |= {"crop_mode": "squash", "crop_pct": 1.0}
            check_tower(encoder, name)
            encoder.pretrained_cfg["crop_pct"] = 0.9
            with pytest.raises(ValueError, match="preprocessed in another way"):
                check_tower(encoder, name)
            encoder.pretrained_cfg["crop_mode"] = "border"
            reason = "preprocessed in another way"
        with pytest.raises(ValueError, match=f"{name} has no place in transformers' CLIP tower: .*{reason}"):
            check_tower(encoder, name)


def test_flags_that_contradict_and_encoders_that_are_missing(tmp_path, capsys):
    adapter = save_adapter(tmp_path / "best.safetensors")
    argv = [str(tmp_path / "out"), "--adapter", str(adapter), "--profile", "micro"]
    assert p2_export.main([*argv, "--no-llava", "--push", "me/it"]) == 2
    assert "--push me/it: uploads OUT/llava" in capsys.readouterr().err
    assert p2_export.main([*argv, "--encoder-weights", "nowhere.safetensors"]) == 2
    assert "nowhere.safetensors: no such file" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert p2_export.main([*argv, "--no-llava"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter", "gpt2"]


# --- the hub, as far as an upload needs it ----------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """Models by name, each the paths of its files."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.models, self.daemon_threads = {"me/taken": set()}, True
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def read(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        self.reply(200, {"id": "me/new", "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        url, models, body = f"http://127.0.0.1:{self.server.server_port}", self.server.models, self.read()
        if self.path == "/api/repos/create":
            content = json.loads(body)
            name = f"{content.get('organization', 'me')}/{content['name']}"
            if name in models:
                return self.reply(409, {"error": "You already created this model repo"})
            models[name] = set()
            return self.reply(200, {"url": f"{url}/{name}"})
        if self.path == "/api/validate-yaml":  # of the model card
            return self.reply(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            return self.reply(
                200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]}
            )
        if "/commit/" in self.path:
            records = [json.loads(line) for line in body.splitlines()]
            name = re.search("/api/models/(.+)/commit/", self.path).group(1)
            models[name] |= {record["value"]["path"] for record in records if record["key"] == "file"}
            return self.reply(
                200, {"commitUrl": f"{url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
            )
        return self.reply(404, {"error": self.path})


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub, which huggingface_hub is pointed at."""
    package = import_guarded("huggingface_hub")
    server = Hub()
    url = f"http://127.0.0.1:{server.server_port}"
    real = package.HfApi
    monkeypatch.setattr(package, "HfApi", lambda: real(endpoint=url, token="hf_test"))
    monkeypatch.setattr(package.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_a_new_model_is_pushed_and_a_known_one_refused(tmp_path, hub, capsys):
    adapter = save_adapter(tmp_path / "best.safetensors")
    argv = ["--adapter", str(adapter), "--profile", "micro"]
    assert p2_export.main([str(tmp_path / "out"), *argv, "--push", "me/new"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("/me/new")
    assert hub.models["me/new"] == {path.name for path in (tmp_path / "out" / "llava").iterdir()}
    assert p2_export.main([str(tmp_path / "again"), *argv, "--push", "me/taken"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--push me/taken: exists on the hub already" in message and "can be uploaded later" in message
    assert (tmp_path / "again" / "llava" / "config.json").is_file()


class Ids:
    """A tokenizer whose texts are ids."""

    eos_id, vocab_size = 50256, 50257

    def decode(self, ids):
        return " ".join(str(int(i)) for i in ids if i != self.eos_id)


@pytest.mark.full_size
def test_vit_l_and_gpt2_small_with_random_weights():
    lora = LoraConfig(rank=32, alpha=32, lm_head=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = Decoder(DecoderConfig(), lora)
        init_weights(decoder)
        config = CaptionerConfig("vit_large_patch14_clip_224", {}, "random", lora=lora)
        captioner = Captioner(config, decoder).eval().requires_grad_(False)
        for name, tensor in captioner.adapter_state().items():
            tensor.normal_(std=0.2 if "projector" in name else 0.02)
        captioner.merge()
        pixels = torch.randn(5, 3, 224, 224)
    wanted = caption_features(captioner, Ids(), captioner.encode(pixels), 3, 8)
    model = build_llava(captioner, Ids.eos_id, image_id=188)
    prompt = torch.tensor([[188] * captioner.n_prefix + [Ids.eos_id]]).expand(5, -1)
    options = {"num_beams": 3, "max_new_tokens": 8, "eos_token_id": Ids.eos_id, "pad_token_id": Ids.eos_id}
    with torch.no_grad():
        found = model.generate(input_ids=prompt, pixel_values=pixels, do_sample=False, **options)
    assert [Ids().decode(row) for row in found[:, prompt.shape[1] :]] == wanted and len(set(wanted)) > 1
