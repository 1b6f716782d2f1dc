"""setup.py: from the flags to a trainer, and what is refused on the way, in one line."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from runs import records, train

from captioning.cli import BAD_INPUT
from captioning.inference.encode import cached_features
from captioning.kernels.onednn import ReorderedLinear, can_reorder
from captioning.models.adapter import load_captioner, read_adapter
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.profiles import PROFILES
from captioning.training import setup
from captioning.training.config import REPORT_FAITHFUL, TrainConfig
from captioning.training.setup import resolve_config
from decoder import LoraConfig, build_decoder
from p2_train import build_parser

pytestmark = pytest.mark.usefixtures("constant_score")


def copy_data(tiny_data, folder, change):
    """Copy the data with ``change`` applied to the parsed train.json."""
    shutil.copytree(tiny_data, folder)
    content = json.loads((folder / "train.json").read_text())
    change(content)
    (folder / "train.json").write_text(json.dumps(content))
    return folder


def captioner(profile, layer):
    lora = LoraConfig(4, 4.0)
    config = CaptionerConfig(profile.encoder, profile.encoder_kwargs, "random", lora=lora, encoder_layer=layer)
    return Captioner(config, build_decoder(profile.decoder, lora)).eval()


# ------------------------------------------------------------------------------------------------ the captioner


def test_another_layer_feeds_the_projector_and_has_features_of_its_own(tiny_profile, tiny_data, tmp_path):
    last, before = captioner(tiny_profile, -1), captioner(tiny_profile, -2)
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    tokens = {}
    block = before.encoder.blocks[-2]
    handle = block.register_forward_hook(lambda module, inputs, output: tokens.update(found=output))
    found = before.encode(pixels)
    handle.remove()
    assert torch.equal(found, tokens["found"])  # CLS first, then the patches, and no norm
    assert found.shape == last.encode(pixels).shape
    paths = sorted((tiny_data / "images" / "val").glob("*"))[:2]
    ours, theirs = (cached_features(model, paths, tmp_path / "cache") for model in (before, last))
    assert not torch.equal(ours[0], theirs[0])  # one key for both once gave the cached layer to either


@pytest.mark.skipif(not can_reorder(torch.device("cpu"), torch.float32), reason="this torch has no oneDNN")
def test_features_are_cached_with_weights_reordered_for_onednn_as_inference_has_them(tmp_path, monkeypatch):
    """Half the time of a product on AMD's processors."""
    kinds, encode = [], Captioner.encode

    def noted(captioner, pixels):
        kinds.append({type(module) for module in captioner.encoder.modules()})
        return encode(captioner, pixels)

    monkeypatch.setattr(Captioner, "encode", noted)
    assert train(tmp_path / "run", "--epochs", 1, "--cache", tmp_path / "cache") == 0
    assert kinds and all(ReorderedLinear in each and torch.nn.Linear not in each for each in kinds)


def test_the_layer_is_remembered_by_the_adapter_and_adapters_without_one_have_the_last(tmp_path, tiny_profile):
    assert train(tmp_path / "run", "--epochs", 1, "--encoder-layer", -2) == 0
    assert read_adapter(tmp_path / "run" / "best.safetensors")[0].encoder_layer == -2
    plain = vars(captioner(tiny_profile, -1).config) | {"lora": {"rank": 4}}
    plain.pop("encoder_layer")
    assert CaptionerConfig.from_dict(plain).encoder_layer == -1


def test_report_faithful_preprocesses_by_name_and_scales_by_one_over_the_rank(tmp_path, tiny_data):
    """timm answers a name with ImageNet's mean, deviation and crop, whatever the model's own; inference must agree."""
    out = tmp_path / "run"
    assert train(out, "--epochs", 1, "--report-faithful") == 0
    stored = read_adapter(out / "best.safetensors")[0]
    assert stored.lora.scaling == pytest.approx(1 / 4)
    assert list(stored.encoder_kwargs["mean"]) == [0.485, 0.456, 0.406]
    assert stored.encoder_kwargs["crop_pct"] == 0.875
    assert stored.search_rule == "report"
    assert json.loads((out / "config.json").read_text())["report_faithful"] is True
    loaded = load_captioner(out / "best.safetensors", PROFILES["micro"].decoder, None, torch.device("cpu"))
    own = captioner(PROFILES["micro"], -1).transform
    with Image.open(sorted((tiny_data / "images" / "val").iterdir())[0]) as image:
        assert not torch.allclose(loaded.transform(image), own(image), atol=0.05)
    assert "0.4850" in repr(loaded.transform)


def test_report_faithful_leaves_what_is_asked_for(tmp_path):
    assert train(tmp_path / "run", "--epochs", 1, "--report-faithful", "--lora-alpha", 2) == 0
    assert read_adapter(tmp_path / "run" / "best.safetensors")[0].lora.alpha == 2


SOUND = {  # of every point of the report's code, the flag that turns it off and what it then is
    "batch_by": ("--batch-by", "images"),
    "predict_bos": ("--no-predict-bos", False),
    "clear_gradients": ("--clear-gradients", True),
    "preprocessing": ("--preprocessing", "own"),
    "search_rule": ("--search-rule", "beam"),
    "lora_alpha": ("--lora-alpha", 32.0),
    "precision": ("--precision", "auto"),
}


@pytest.mark.parametrize("setting", ["best", "1", "4"])
@pytest.mark.parametrize("name", SOUND)
def test_each_point_of_the_reports_code_can_be_turned_off_alone(setting, name):
    option, value = SOUND[name]
    words = [option] if isinstance(value, bool) else [option, str(value)]
    faithful, changed = (
        resolve_config(build_parser().parse_args(["--setting", setting, "--report-faithful", *more]))
        for more in ([], words)
    )
    assert getattr(faithful, name) == REPORT_FAITHFUL[name] != value
    assert changed == replace(faithful, **{name: value})


def test_an_adapter_keeps_its_preprocessing_and_its_search_rule_unless_told_otherwise(tmp_path, capsys):
    assert train(tmp_path / "run", "--epochs", 1, "--preprocessing", "imagenet", "--search-rule", "report") == 0
    start = ("--init-adapter", tmp_path / "run" / "last.safetensors", "--epochs", 1)
    assert train(tmp_path / "further", *start) == 0
    further = read_adapter(tmp_path / "further" / "last.safetensors")[0]
    assert (further.encoder_kwargs["crop_pct"], further.search_rule) == (0.875, "report")
    assert train(tmp_path / "beams", *start, "--search-rule", "beam") == 0
    assert read_adapter(tmp_path / "beams" / "last.safetensors")[0].search_rule == "beam"
    assert train(tmp_path / "other", *start, "--preprocessing", "own") == BAD_INPUT
    assert "--preprocessing own: --init-adapter" in capsys.readouterr().err


def test_a_run_of_the_last_versions_report_faithful_is_known_by_its_preprocessing(tmp_path):
    """It had no options of its own; images were batched, and gradients cleared."""
    flags = ("--setting", "1", "--batch-by", "images", "--preprocessing", "imagenet", "--epochs", 1)
    assert train(tmp_path / "run", *flags) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for name in ("batch_by", "predict_bos", "clear_gradients", "preprocessing"):
        del config["train"][name]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"report_faithful": True}))
    assert train(tmp_path / "run", *flags, "--resume") == 0
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert train(tmp_path / "run", *flags, "--resume") == BAD_INPUT


def test_too_many_trained_parameters_are_refused(tmp_path, capsys):
    assert train(tmp_path / "run", "--max-trainable", 1000) == BAD_INPUT
    assert "--max-trainable 1,000" in capsys.readouterr().err
    assert not (tmp_path / "run" / "last.safetensors").exists()


# ------------------------------------------------------------------------------------------------------ the data


def test_images_that_are_not_cached_give_the_losses_of_cached_ones(unbroken, tmp_path):
    """Of the validation images too, whose loss is taken where autocast might round the encoder."""
    flags = ("--cache", tmp_path / "cache", "--cache-gb", 0)
    assert train(tmp_path / "run", *flags) == 0
    (folder,) = (tmp_path / "cache").iterdir()
    assert (folder / "features.bin").stat().st_size == 0
    for kind, key in (("step", "loss"), ("epoch", "val_loss")):
        cached, encoded = ([record[key] for record in records(out, kind)] for out in (unbroken, tmp_path / "run"))
        assert encoded == pytest.approx(cached, abs=1e-4)


def test_the_blind_baseline_trains_and_says_so(unbroken, tmp_path):
    assert train(tmp_path / "run", "--shuffle-captions", "--epochs", 1) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["shuffled_captions"] is True
    blind, seeing = (records(out, "step")[0]["loss"] for out in (tmp_path / "run", unbroken))
    assert blind != seeing  # the first batch shows the same images with other captions


def test_a_missing_training_image_is_named(tiny_data, tmp_path, capsys):
    folder = copy_data(tiny_data, tmp_path / "data", lambda content: None)
    (folder / "images" / "train" / "000000000003.jpg").unlink()
    assert train(tmp_path / "run", "--data", folder) == BAD_INPUT
    assert "000000000003.jpg" in capsys.readouterr().err


def test_a_caption_too_long_for_the_context_is_named_with_its_image(tiny_data, tmp_path, capsys):
    def lengthen(content):
        content["annotations"][26]["caption"] = "a red bike " * 90

    folder = copy_data(tiny_data, tmp_path / "data", lengthen)
    assert train(tmp_path / "run", "--data", folder) == BAD_INPUT
    error = capsys.readouterr().err
    assert "000000000005.jpg" in error
    assert "caption 2" in error


# ------------------------------------------------------------------------------------------------ the run folder


def test_resuming_on_other_captions_is_refused(unbroken, capsys):
    assert train(unbroken, "--resume", "--shuffle-captions") == BAD_INPUT
    assert "shuffled_captions" in capsys.readouterr().err


def test_resuming_with_other_numbers_or_nothing_to_resume_is_refused(unbroken, tmp_path, capsys):
    assert train(unbroken, "--resume", "--lr", "0.5") == BAD_INPUT
    error = capsys.readouterr().err
    assert "train.lr" in error
    assert "--resume" in error
    assert train(tmp_path / "empty", "--resume") == BAD_INPUT
    assert "start without --resume" in capsys.readouterr().err


def test_a_run_folder_in_use_is_not_written_over(unbroken, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in unbroken.iterdir()}
    assert train(unbroken) == BAD_INPUT
    assert f"--out {unbroken}" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in unbroken.iterdir()} == before


# --------------------------------------------------------------------------------------------- an adapter to tune


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--init-adapter"),
        (("--init-adapter", "gone.safetensors"), "gone.safetensors"),
        (("--init-adapter", "BEST", "--lora-rank", 8), "--lora-rank 8"),
        # The weights are the same, what they are fed with is not.
        (("--init-adapter", "BEST", "--report-faithful", "--lora-alpha", 32), "preprocessing"),
        (("--init-adapter", "BEST", "--samples", 1), "--samples 1"),
    ],
)
def test_bad_starts_are_refused_by_flag(unbroken, tmp_path, capsys, flags, message):
    flags = [unbroken / "best.safetensors" if flag == "BEST" else flag for flag in flags]
    assert train(tmp_path / "run", "--objective", "scst", *flags) == BAD_INPUT
    assert message in capsys.readouterr().err


def test_a_clip_reward_needs_a_clip(unbroken, tmp_path, monkeypatch, capsys):
    def no_clip(*args):
        raise FileNotFoundError("no CLIP here")

    monkeypatch.setattr(setup, "ClipScorer", no_clip)
    flags = ("--objective", "scst", "--init-adapter", unbroken / "best.safetensors", "--clip-reward", 1)
    assert train(tmp_path / "run", *flags) == BAD_INPUT
    assert "no CLIP here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "count", "said"),
    [("cuda", 4, "16 over 4 GPUs: a step of 4 images"), ("cuda", 1, ""), ("cpu", 4, ""), ("cuda", 17, "1 of the 17")],
)
def test_several_gpus_for_a_small_batch_are_told_that_they_hardly_help(device, count, said, caplog):
    setup.check_shares(TrainConfig(), torch.device(device), count)
    assert said in caplog.text and bool(caplog.text) == bool(said)
    caplog.clear()
    setup.check_shares(TrainConfig(batch_size=16 * count), torch.device(device), count)
    assert not caplog.text
