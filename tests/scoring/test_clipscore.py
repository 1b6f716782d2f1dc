"""clipscore.py: scores against a model put together by hand, and models and weights that must be refused."""

import argparse
import hashlib
import io
import json
import logging
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from scoring_examples import CAPTIONS, STEMS
from tiny import write_torchscript

from captioning.imports import import_guarded
from captioning.profiles import PROFILES
from captioning.scoring.clipscore import ClipScorer, _resolve_clip, clipscore, ref_clip_scores

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # OpenAI's


def plain_pixels(path, size=32):
    """Bicubic resize of the shorter side, centre crop, RGB, normalise: OpenAI's preprocessing, ``(3, size, size)``."""
    picture = Image.open(path)
    width, height = picture.size
    scale = size / min(width, height)
    picture = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)).convert("RGB")) / 255
    return torch.tensor(((pixels - MEAN) / STD).transpose(2, 0, 1), dtype=torch.float32)


def plain_clipscore(folder, paths, captions):
    """2.5 * max(cos, 0) one pair at a time in float64 at the end, on a model put together by hand."""
    open_clip = import_guarded("open_clip")
    model = open_clip.model.CLIP(**json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]).eval()
    model.load_state_dict(torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True))
    cosines = {}
    for stem, path in paths.items():
        with torch.no_grad():
            image = model.encode_image(plain_pixels(path)[None])[0].double().numpy()
            text = model.encode_text(open_clip.tokenize([captions[stem]]))[0].double().numpy()
        cosines[stem] = float(image @ text / np.sqrt((image @ image) * (text @ text)))
    return cosines, {stem: 2.5 * max(cosine, 0) for stem, cosine in cosines.items()}


def test_clipscore_equals_an_independent_computation(clip_folder, paths, scorer):
    cosines, expected = plain_clipscore(clip_folder, paths, CAPTIONS)
    assert min(cosines.values()) < 0 < max(cosines.values()), "the example must reach both sides of the clamp"
    scores = clipscore(scorer, paths, CAPTIONS, batch_size=3)
    assert list(scores) == STEMS
    assert scores == pytest.approx(expected, abs=1e-6)


def test_clipscore_depends_neither_on_order_nor_on_batch_size(paths, scorer):
    whole = clipscore(scorer, paths, CAPTIONS, batch_size=64)
    backwards = dict(reversed(paths.items()))
    for size in (1, 2, 7):
        assert clipscore(scorer, backwards, CAPTIONS, batch_size=size) == pytest.approx(whole, abs=1e-6)


def test_clipscore_belongs_to_the_pair(paths, scorer):
    right = clipscore(scorer, paths, CAPTIONS)
    swapped = clipscore(scorer, paths, {**CAPTIONS, "im0": CAPTIONS["im2"], "im2": CAPTIONS["im0"]})
    assert [stem for stem in STEMS if right[stem] != pytest.approx(swapped[stem], abs=1e-4)] == ["im0", "im2"]


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "local-dir:" + PROFILES["micro"].clip_model])
def test_white_space_at_a_captions_ends_changes_nothing(name):
    """The report's code does not strip its captions, and ours does; CIDEr is in test_tokenizers.py."""
    tokenizer = import_guarded("open_clip").get_tokenizer(name)
    assert torch.equal(tokenizer([" A red dog. \n"]), tokenizer(["A red dog."]))


def test_captions_are_truncated_at_the_context_length(scorer):
    shorter, cut, longer = scorer.encode_texts(["word " * 74, "word " * 75, "word " * 200])  # 75 + start + end = 77
    assert torch.allclose(cut, longer, atol=1e-6)
    assert not torch.allclose(shorter, cut, atol=1e-4)


@pytest.fixture(scope="module")
def by_windows(clip_folder):
    return ClipScorer(str(clip_folder), None, torch.device("cpu"), long="mean")


@pytest.mark.parametrize(
    ("words", "sizes"), [(76, (38, 38)), (150, (75, 75)), (151, (51, 50, 50)), (400, (67,) * 4 + (66,) * 2)]
)
def test_the_mean_of_a_long_caption_is_that_of_its_windows(by_windows, scorer, words, sizes):
    """Words that are one token each, so that a window is a caption as well."""
    caption = [("red", "ball", "dog", "table", "street", "man", "hat")[number % 7] for number in range(words)]
    windows, start = [], 0
    for size in sizes:
        windows.append(" ".join(caption[start : start + size]))
        start += size
    expected = torch.nn.functional.normalize(scorer.encode_texts(windows).mean(0), dim=0)
    short, found = by_windows.encode_texts(["a red ball", " ".join(caption)])
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(short, scorer.encode_texts(["a red ball", " ".join(caption)])[0])
    assert not torch.allclose(found, scorer.encode_texts([" ".join(caption)])[0], atol=1e-4)


def test_captions_that_fit_are_the_same_by_mean(by_windows, scorer):
    fitting = [*CAPTIONS.values(), "word " * 75]
    assert torch.equal(by_windows.encode_texts(fitting), scorer.encode_texts(fitting))


class OwnTokens:
    """A tokenizer of words as numbers, with what others put around them: start, end and padding."""

    def __init__(self, start, end, padding):
        self.start, self.end, self.padding = start, end, padding

    def __call__(self, texts, context_length=12):
        rows = []
        for text in texts:
            own = [int(word) for word in text.split()][: context_length - len(self.start) - len(self.end)]
            row = [*self.start, *own, *self.end]
            rows.append(row + [self.padding] * (context_length - len(row)))
        return torch.tensor(rows)


@pytest.mark.parametrize(
    ("start", "end", "padding"),
    [([98], [99], 0), ([], [99], 0), ([], [99], 99), ([98], [99], 99), ([99], [99], 99), ([97, 98], [99, 96], 0)],
)
@pytest.mark.parametrize("count", [12, 13, 24, 25, 60])
def test_windows_are_whole_captions_to_tokenizers_of_every_kind(scorer, monkeypatch, start, end, padding, count):
    """CLIP's, the micro world's (no start), T5's (padded with the end), transformers' CLIP and GPT-2's."""
    tokenizer = OwnTokens(start, end, padding)
    monkeypatch.setattr(scorer, "tokenizer", tokenizer)
    words = [str(1 + number % 90) for number in range(count)]
    room = 12 - len(start) - len(end)
    parts = np.array_split(words, -(-count // room))
    expected = tokenizer([" ".join(part) for part in parts])
    assert scorer._windows(" ".join(words)).tolist() == expected.tolist()


def test_an_unknown_way_with_long_captions_is_refused(clip_folder):
    with pytest.raises(ValueError, match="--clip-long middle: use one of truncate, mean"):
        ClipScorer(str(clip_folder), None, torch.device("cpu"), long="middle")


def test_the_micro_worlds_scorer_takes_windows_too():
    """Its tokenizer is not CLIP's: it has no start token."""
    scorers = [
        ClipScorer(PROFILES["micro"].clip_model, None, torch.device("cpu"), long=long) for long in ("truncate", "mean")
    ]
    caption = "A red bike stands next to a duck. " * 12
    assert scorers[0].truncated([caption]) == [0]
    windows = scorers[1]._windows(caption)
    assert windows.shape[1] == 48
    expected = torch.nn.functional.normalize(scorers[0]._encode_tokens(windows).mean(0), dim=0)
    assert torch.allclose(scorers[1].encode_texts([caption])[0], expected, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_scores_are_close_and_normalised_in_float32(clip_folder, paths, scorer, precision):
    half = ClipScorer(str(clip_folder), None, torch.device("cpu"), precision)
    pixels = torch.stack([half.load_image(path) for path in paths.values()])
    for features in (half.encode_texts(list(CAPTIONS.values())), half.encode_images(pixels)):
        assert features.dtype == torch.float32
        assert features.norm(dim=-1).tolist() == pytest.approx([1.0] * 7, abs=1e-6), "fp16 would round the norm"
    exact, close = (clipscore(s, paths, CAPTIONS) for s in (scorer, half))
    assert close == pytest.approx(exact, abs=0.03)
    assert close != exact


def test_precision_follows_the_device(clip_folder, scorer):
    assert (scorer.precision, scorer.model.training) == ("fp32", False)
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())
    with pytest.raises(ValueError, match="--precision fp8"):
        ClipScorer(str(clip_folder), None, torch.device("cpu"), "fp8")


def test_a_score_that_is_no_number_is_an_error(paths, scorer, monkeypatch):
    monkeypatch.setattr(scorer, "encode_texts", lambda captions: torch.full((len(captions), 8), float("nan")))
    with pytest.raises(ValueError, match=r"7 CLIPScores are not a number .*--precision fp32"):
        clipscore(scorer, paths, CAPTIONS)


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"no picture"])
def test_a_corrupt_image_is_named(tmp_path, paths, scorer, damage):
    broken = tmp_path / "broken.png"
    broken.write_bytes(damage(paths["im0"].read_bytes()))
    with pytest.raises(ValueError, match=r"broken\.png: .*replace it"):
        clipscore(scorer, {**paths, "im0": broken}, CAPTIONS)


def test_clip_sees_what_the_captioner_sees(tmp_path, paths, scorer):
    """A 16-bit grey was white to it, a photograph on its side, and transparency whatever colour lay below."""
    picture = Image.open(paths["im0"]).convert("L")
    levels = np.asarray(picture)
    Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    clear = np.dstack([levels, np.where(levels > 100, 255, 0).astype(np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    Image.fromarray(np.where(levels > 100, levels, 255).astype(np.uint8)).save(tmp_path / "on white.png")
    picture.save(tmp_path / "plain.png")
    plain, deep, turned, clear, white = (
        scorer.load_image(tmp_path / f"{name}.png") for name in ("plain", "deep", "turned", "clear", "on white")
    )
    assert torch.equal(deep, plain) and torch.equal(turned, plain)
    assert torch.equal(clear, white) and not torch.equal(clear, plain)


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_is_scored_without_a_warning(tmp_path, paths, scorer):
    palette = Image.open(paths["im0"]).convert("P")
    palette.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    Image.open(tmp_path / "palette.png").convert("RGBA").save(tmp_path / "alpha.png")
    seen, wanted = (scorer.load_image(tmp_path / name) for name in ("palette.png", "alpha.png"))
    assert torch.equal(seen, wanted)


def test_openai_weights_in_a_local_file_are_refused_or_warned_of(tmp_path, caplog):
    """With a local file open_clip does not even warn."""
    open_clip = import_guarded("open_clip")
    named, unnamed = tmp_path / "vit_b_32.OpenAI.safetensors", tmp_path / "weights.safetensors"
    for file in (named, unnamed):
        file.touch()
    with pytest.raises(ValueError, match="ViT-B-32-quickgelu"):
        _resolve_clip(open_clip, "ViT-B-32", str(named))
    assert _resolve_clip(open_clip, "ViT-B-32-quickgelu", str(named)) == "ViT-B-32-quickgelu"
    assert not caplog.records
    assert _resolve_clip(open_clip, "ViT-B-32", str(unnamed)) == "ViT-B-32"
    assert "use ViT-B-32-quickgelu" in caplog.text
    assert _resolve_clip(open_clip, "ViT-B-32", "laion2b_s34b_b79k") == "ViT-B-32"


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("ViT-B-32-quickgelu", "opanai", "no such file, and no tag of ViT-B-32-quickgelu: openai"),
        ("ViT-B-32-quickgelu", "missing.safetensors", "no such file"),
        ("ViT-B-32-quickgelu", None, "needs --clip-weights"),
        ("ViT-B-33", "openai", "neither a folder nor a model that open_clip knows"),
        ("FOLDER", "openai", "brings its own weights"),
        ("EMPTY", None, "no open_clip_config.json"),
    ],
)
def test_unknown_models_and_weights_are_refused(tmp_path, clip_folder, model, weights, message):
    model = {"FOLDER": str(clip_folder), "EMPTY": str(tmp_path)}.get(model, model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ClipScorer(model, weights, torch.device("cpu"))


def test_an_unreachable_hub_gives_one_line_with_a_remedy(monkeypatch, caplog):
    open_clip = import_guarded("open_clip")

    def offline(*_args, **_kwargs):
        raise FileNotFoundError("offline,\nsays the hub")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    with pytest.raises(ValueError, match=r"openai cannot be loaded .*offline, says the hub.*hw3_download") as caught:
        ClipScorer("ViT-B-32-quickgelu", "openai", torch.device("cpu"))
    assert "\n" not in str(caught.value)
    assert not caplog.records, "open_clip's own log would repeat it"
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.parametrize("weights", [None, b"", b"garbage", b"\x80\x02garbage"])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_missing_or_broken_weights_never_become_random_ones(tmp_path, clip_folder, weights, suffix):
    """open_clip's create_model goes on with random weights and a warning."""
    shutil.copy(clip_folder / "open_clip_config.json", tmp_path)
    if weights is not None:
        (tmp_path / f"open_clip_model.{suffix}").write_bytes(weights)
    with pytest.raises(ValueError, match="cannot be loaded"):
        ClipScorer(str(tmp_path), None, torch.device("cpu"))


def test_ref_clipscore_of_zero_and_zero():
    one = torch.eye(2)
    found = ref_clip_scores(torch.tensor([0.0, 2.5]), one, torch.stack([-one[0], one[0], one[1]]), [1, 2])
    assert found.tolist() == [0.0, pytest.approx(2 * 2.5 / 3.5)]


def test_the_weights_are_named_by_their_hash(clip_folder, scorer, tmp_path):
    file = clip_folder / "open_clip_pytorch_model.bin"
    assert scorer.fingerprint == f"file:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    shutil.copytree(clip_folder, tmp_path / "twice")
    shutil.copy(file, tmp_path / "twice" / "other.bin")  # which one was loaded is not plain from outside
    twice = ClipScorer(str(tmp_path / "twice"), None, torch.device("cpu"))
    assert twice.fingerprint.startswith("state_dict:")
    with torch.no_grad():
        twice.model.visual.proj.mul_(2)
    before = twice.__dict__.pop("fingerprint")
    assert twice.fingerprint != before


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (224, 224), (100, 37), (1001, 224)])
def test_open_clips_preprocessing_gives_the_original_packages_pixels(size):
    """Bicubic resize on PIL, centre crop, OpenAI's mean and deviation, at 224: what ``clip.load`` does."""
    open_clip = import_guarded("open_clip")
    config = open_clip.get_pretrained_cfg("ViT-B-32-quickgelu", "openai")
    names = {"mean", "std", "interpolation", "resize_mode"} & config.keys()
    preprocess = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(size=224, **{name: config[name] for name in names}), is_train=False
    )
    noise = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    pixels = preprocess(picture)
    path = io.BytesIO()
    picture.save(path, "PNG")
    path.seek(0)
    assert torch.allclose(pixels, plain_pixels(path, 224), atol=1e-6)
    assert open_clip.get_model_config("ViT-B-32-quickgelu")["quick_gelu"]


# --- the forms in which people have weights -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named(clip_folder, tmp_path_factory):
    """The tiny CLIP as models that open_clip knows by name, with either activation."""
    open_clip, folder = import_guarded("open_clip"), tmp_path_factory.mktemp("configs")
    config = json.loads((clip_folder / "open_clip_config.json").read_text())["model_cfg"]
    for name, quick in (("tiny-clip", False), ("tiny-clip-quickgelu", True)):
        (folder / f"{name}.json").write_text(json.dumps({**config, "quick_gelu": quick}))
    open_clip.add_model_config(folder)
    return "tiny-clip"


def wrapped(state, folder):
    torch.save({"model": {f"_orig_mod.{key}": value for key, value in state.items()}, "epoch": 3}, folder / "clip.PT")
    return folder / "clip.PT"


def upper_case(state, folder):
    safetensors.torch.save_file(state, folder / "clip.SAFETENSORS")
    return folder / "clip.SAFETENSORS"


def in_shards(state, folder):
    places = {key: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, key in enumerate(state)}
    for shard in set(places.values()):
        safetensors.torch.save_file({key: state[key] for key in places if places[key] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize("form", [wrapped, upper_case, in_shards])
def test_weights_in_any_form_give_the_same_scores(clip_folder, named, paths, scorer, tmp_path, form):
    state = torch.load(clip_folder / "open_clip_pytorch_model.bin", weights_only=True)
    other = ClipScorer(named, str(form(state, tmp_path)), torch.device("cpu"))
    assert clipscore(other, paths, CAPTIONS) == clipscore(scorer, paths, CAPTIONS)


def test_openais_archive_is_read_and_wants_quick_gelu(clip_folder, named, paths, scorer, tmp_path):
    state, file = torch.load(clip_folder / "open_clip_pytorch_model.bin", weights_only=True), tmp_path / "ViT-B-32.pt"
    numbers = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77)}
    write_torchscript({**state, **numbers, "vocab_size": torch.tensor(49408)}, file)
    with pytest.raises(ValueError, match=r"trained with QuickGELU, .*use --clip-model tiny-clip-quickgelu"):
        ClipScorer(named, str(file), torch.device("cpu"))
    quick = ClipScorer(f"{named}-quickgelu", str(file), torch.device("cpu"))
    assert quick.model.state_dict().keys() == state.keys()
    assert all(torch.equal(quick.model.state_dict()[name], tensor) for name, tensor in state.items())
    assert clipscore(quick, paths, CAPTIONS) != clipscore(scorer, paths, CAPTIONS)


def test_transformers_clip_gives_the_same_features(named, tmp_path):
    transformers = import_guarded("transformers")
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 8}, text_config=text, projection_dim=8
    )
    torch.manual_seed(3)
    theirs = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use --clip-model tiny-clip-quickgelu"):
        ClipScorer(named, str(tmp_path), torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match="give transformers' CLIP as --clip-weights"):
        ClipScorer(str(tmp_path), None, torch.device("cpu"))
    ours = ClipScorer(f"{named}-quickgelu", str(tmp_path), torch.device("cpu"))
    pixels, captions = torch.randn(2, 3, 32, 32), ["a red bike", "two dogs on a mat"]
    with torch.inference_mode():
        joint = theirs(input_ids=ours.tokenizer(captions), pixel_values=pixels)
    torch.testing.assert_close(ours.encode_images(pixels), joint.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.encode_texts(captions), joint.text_embeds, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*TorchScript archive")
@pytest.mark.parametrize("archive", [True, False])
def test_no_message_says_how_to_run_a_pickle(clip_folder, tmp_path, archive):
    """In a model's folder open_clip reads the weights, and torch's refusal tells how to switch it off."""
    shutil.copytree(clip_folder, tmp_path / "clip")
    file = tmp_path / "clip" / "open_clip_pytorch_model.bin"
    if archive:
        write_torchscript({"a": torch.ones(1)}, file)
    else:
        torch.save({"a": argparse.Namespace()}, file)
    with pytest.raises(ValueError, match=r"cannot be loaded .*--clip-weights") as error:
        ClipScorer(str(tmp_path / "clip"), None, torch.device("cpu"))
    assert not {"trust", "arbitrary"} & set(str(error.value).split())
