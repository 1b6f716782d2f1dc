"""Pre-training in small: every model is written as its library loads it, with a record of how it was made."""

import json
import shutil

import numpy as np
import pytest
import torch

from captioning.data.tokenizer import Tokenizer
from captioning.files import write_json
from captioning.imports import import_guarded
from captioning.models.adapter import read_adapter
from captioning.profiles import MICRO_WEIGHTS
from decoder import build_decoder
from microworld import pretrain, pretrain_adapter, pretrain_clip, pretrain_decoder, pretrain_llava
from microworld.recipes import CLIP_CONFIGS, SCENE_SEEDS, Recipe, Run, draw_scenes, learning_rate, optimise
from microworld.steps import Runner

CPU = torch.device("cpu")


def make_run(name, out, **recipe):
    out.mkdir(exist_ok=True)
    return Run(name, Recipe(**{"scenes": 4, "epochs": 1, "batch_size": 2, "lr": 1e-3, **recipe}), out, CPU, workers=1)


def check_record(out, name, metrics):
    record = json.loads((out / "training.json").read_text())
    assert (record["model"], record["data"]["seed"], record["recipe"]["batch_size"]) == (name, SCENE_SEEDS[name], 2)
    assert record["command"] == f"python -m microworld.pretrain {name}"
    assert record["steps"] > 0 and record["parameters"] > 0
    assert metrics <= record["metrics"].keys()


def test_the_tokenizer_and_the_decoder(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_decoder, "HELD_OUT", 20)
    words = ["--weights", str(tmp_path), "--scenes", "60"]
    assert pretrain.main(["tokenizer", *words]) == 0
    out = tmp_path / "decoder"
    assert Tokenizer(out).decode(Tokenizer(out).encode("A red bus.")) == "A red bus."
    shutil.copy(MICRO_WEIGHTS / "decoder" / "encoder.json", out)
    shutil.copy(MICRO_WEIGHTS / "decoder" / "vocab.bpe", out)
    pretrain_decoder.train_decoder(make_run("decoder", out, scenes=120))
    assert build_decoder(out / "decoder_model.safetensors").config.vocab_size == 1024
    check_record(out, "decoder", {"held_out_loss", "held_out_loss_after_images"})


@pytest.mark.parametrize(("name", "patch_loss"), [("encoder", 1.0), ("scorer", 0.0)])
def test_the_clip_models(name, patch_loss, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_clip, "UNSEEN", 4)
    pretrain_clip.train_clip(make_run(name, tmp_path, patch_loss=patch_loss))
    model = import_guarded("open_clip").create_model(f"local-dir:{tmp_path}")
    assert type(model.visual).__name__ == {"encoder": "VisionTransformer", "scorer": "ModifiedResNet"}[name]
    check_record(tmp_path, name, {"recall_at_1", "recall_at_5", "clipscore_right", "clipscore_wrong", "last_loss"})


def test_the_adapter_is_the_suites_own_run_in_half_precision(tmp_path, unbroken, monkeypatch):
    """Its steps are scripts, which have tests of their own; here a finished run stands in for them."""
    titles, scored = [], []

    class Finished(Runner):
        def __call__(self, title, *arguments, **options):
            titles.append(title)
            if arguments[0] == "p2_train.py":
                shutil.copytree(unbroken, options["out"])
            elif arguments[0] == "p2_infer.py":
                scored.append(options["adapter"])
            elif arguments[0] == "evaluate.py":
                write_json(options["json"], {"CIDEr": 1.25, "CLIPScore": 1.5})

    monkeypatch.setattr(pretrain_adapter, "Runner", Finished)
    assert pretrain.main(["adapter", "--weights", str(tmp_path), "--scenes", "12", "--device", "cpu"]) == 0
    shipped = tmp_path / "adapter" / "adapter.safetensors"
    assert titles[:4] == ["draw train", "draw val", "draw val_novel", "train lora"] and scored == [shipped, shipped]
    (config, state), (_, trained) = read_adapter(shipped), read_adapter(unbroken / "best.safetensors")
    assert config.encoder_weights == "microworld/weights/encoder/open_clip_model.safetensors"
    assert all(torch.equal(state[name], tensor.half()) for name, tensor in trained.items())
    record = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert record["command"] == "python -m microworld.pretrain adapter"
    assert record["metrics"]["val_novel CIDEr"] == 1.25 and record["data"]["scenes"] == 12


def test_the_llava(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_llava, "TEXT_SCENES", 40)
    monkeypatch.setattr(pretrain_llava, "HELD_OUT", 2)
    pretrain_llava.train_llava(make_run("llava", tmp_path))
    transformers = import_guarded("transformers")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert model.config.image_token_index == processor.image_token_id
    check_record(tmp_path, "llava", {"last_loss", "held_out_loss"})


def test_batches_are_full_shuffled_and_each_scene_comes_once_an_epoch(tmp_path):
    run = make_run("encoder", tmp_path, scenes=7, epochs=2, batch_size=3)
    batches = list(run.batches())
    assert [epoch for epoch, _ in batches] == [0, 0, 1, 1]
    for epoch in (0, 1):
        seen = np.concatenate([batch for e, batch in batches if e == epoch])
        assert len(set(seen.tolist())) == 6


def test_the_rate_warms_up_and_falls_to_a_hundredth():
    recipe = Recipe(1, 1, 1, lr=1.0, warmup=10)
    assert learning_rate(0, 110, recipe) == pytest.approx(0.1)
    assert learning_rate(9, 110, recipe) == learning_rate(10, 110, recipe) == pytest.approx(1.0)
    assert learning_rate(110, 110, recipe) == pytest.approx(0.01)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="the loss is nan at step 0; lower the learning rate"):
        optimise(make_run("encoder", tmp_path), [weight], [0], 1, lambda _: weight.sum() * float("nan"))


def test_patch_labels_name_the_thing_at_each_patch():
    scenes = draw_scenes(SCENE_SEEDS["test"], 2, CLIP_CONFIGS["encoder"]["vision_cfg"]["image_size"], workers=1)
    assert scenes.pixels.shape == (2, 96, 96, 3) and scenes.labels.shape == (2, 2, 12, 12)
    kinds, colours = scenes.labels[:, 0], scenes.labels[:, 1]
    assert (kinds > 0).any() and (kinds == 0).any() and ((colours > 0) <= (kinds > 0)).all()


def test_questions_of_one_scene_do_not_see_each_other():
    """Packed after one image, questions are learned as if each came alone."""
    torch.manual_seed(0)
    model = pretrain_llava.build_model()
    tokenizer = import_guarded("transformers").AutoProcessor.from_pretrained(MICRO_WEIGHTS / "llava").tokenizer
    pairs = [[pretrain_llava.encode_pair(tokenizer, *p) for p in pretrain_llava.conversations(k, 0)] for k in range(2)]
    features, head = torch.randn(2, 144, 192), torch.tensor(tokenizer("USER: ").input_ids)

    def loss(features, batch):
        with torch.no_grad():
            return float(pretrain_llava.instruction_loss(model, head, features, pretrain_llava.pack_pairs(batch)))

    alone = [(loss(features[k : k + 1], [[pair]]), len(pair[1])) for k in range(2) for pair in pairs[k]]
    mean = sum(value * count for value, count in alone) / sum(count for _, count in alone)
    assert loss(features, pairs) == pytest.approx(mean, abs=1e-5)
