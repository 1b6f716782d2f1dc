"""Damaged files: each kind is mutated at random and read by the function that the scripts read it with.

What carries a checksum (adapters, states, decoders behind an adapter, cached features, the side file) must give what it
held, or an error of one line. What people write (JSON, images) cannot: a flipped letter is another caption. There only
the form is held: a well-formed result or an error of one line, and never another exception.
"""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from caption_layouts import PREDICTION_FILES, REFERENCE_FILES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutate import damaged_bytes, damaged_json
from PIL import Image

from captioning.checkpoints import read_state_dict
from captioning.data.annotations import load_annotations, load_predictions, load_split
from captioning.data.feature_cache import CacheSpec, FeatureCache
from captioning.data.images import load_image
from captioning.data.tokenizer import Tokenizer
from captioning.inference.folder import PredictionLog
from captioning.maps.grounding import load_grounded_captions
from captioning.maps.pairs import read_per_image
from captioning.models.adapter import load_captioner
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.tensors import fingerprint
from captioning.training.run_folder import Progress, RunFolder, State
from decoder import LoraConfig, build_decoder
from microworld.scenes import generate

COUNTS = [pytest.param(8, id="small"), pytest.param(100, id="campaign", marks=pytest.mark.faults)]
RUN = {"model": "m"}


@pytest.fixture
def try_damage(tally):
    """``try_damage(kind, read, files, count, damage, expected)``: mutate one of the files, read, restore, compare."""

    def trial(kind, read, files, count, damage=damaged_bytes, expected=None):
        whole = {path: path.read_bytes() for path in files}

        @settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
        @given(st.integers(0, 2**32 - 1))
        def once(seed):
            rng = random.Random(f"{kind} {seed}")
            path = rng.choice(files)
            path.write_bytes(damage(whole[path], rng))
            try:
                found = read()
            except (ValueError, OSError) as error:
                assert "\n" not in str(error).strip()[:300]
                tally(f"damaged {kind}", "clean errors")
            else:
                same = expected is None or found == expected
                tally(f"damaged {kind}", "absorbed" if same else "silent damage")
            finally:
                for file, content in whole.items():
                    file.write_bytes(content)

        once()

    return trial


@pytest.fixture(scope="module")
def captioner_files(tiny_profile, tmp_path_factory):
    """An adapter that is no longer zero, and its decoder in both formats."""
    folder = tmp_path_factory.mktemp("captioner")
    config = CaptionerConfig(tiny_profile.encoder, tiny_profile.encoder_kwargs, "random", lora=LoraConfig(rank=2))
    model = Captioner(config, build_decoder(tiny_profile.decoder, config.lora))
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.normal_(std=0.1)
    model.save_adapter(folder / "adapter.safetensors")
    shutil.copy(tiny_profile.decoder, folder / "decoder.safetensors")
    torch.save(read_state_dict(tiny_profile.decoder), folder / "decoder.bin")
    return folder


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["adapter.safetensors", "decoder.safetensors", "decoder.bin"])
def test_damaged_weights_never_caption(captioner_files, tmp_path, try_damage, count, name):
    folder = tmp_path / "copy"
    shutil.copytree(captioner_files, folder)
    decoder = folder / (name if name.startswith("decoder") else "decoder.safetensors")

    def read():
        model = load_captioner(folder / "adapter.safetensors", decoder, None, torch.device("cpu"))
        return fingerprint(model.state_dict())

    try_damage(name, read, [folder / name], count, expected=read())


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_states_give_way_to_the_one_before_or_to_an_error(tmp_path, try_damage, count):
    folder, optimizer = RunFolder(tmp_path), {"state": {}, "param_groups": []}
    states = [State({"a": torch.randn(30, 7)}, optimizer, {}, Progress(step=step)) for step in (1, 2)]
    for state in states:
        folder.save_state(state)
    whole = {str((fingerprint(state.adapter), state.progress)) for state in states}

    class Either:
        def __eq__(self, found):
            return found in whole

    def read():
        state = folder.load_state()
        return str((fingerprint(state.adapter), state.progress))

    try_damage("training state", read, [folder.newest, folder.before], count, expected=Either())


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_caches_are_built_again(tmp_path, try_damage, count):
    paths = []
    for number in range(9):
        paths.append(tmp_path / f"{number}.jpg")
        paths[-1].write_bytes(bytes([number]) * 20)

    def encode(batch):
        return torch.stack([torch.arange(600.0).reshape(20, 30) + path.read_bytes()[0] for path in batch])

    def read():
        cache = FeatureCache.open(CacheSpec(tmp_path / "cache", {"k": "v"}, (20, 30), progress=False), paths, encode)
        return cache.gather(range(9)).tolist()

    expected = read()
    folder = next((tmp_path / "cache").iterdir())
    files = [folder / name for name in ("features.bin", "rows.sha256", "key.json")]
    try_damage("feature cache", read, files, count, expected=expected)


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_side_files_hold_no_wrong_caption(tmp_path, try_damage, count):
    captions = {f"image {number}": f"a red bike number {number}" for number in range(30)}
    with PredictionLog(tmp_path / "out.json", RUN) as log:
        log.start()
        log.add(captions)
    part = log.part

    class PartOf:
        def __eq__(self, found):
            return found.items() <= captions.items()

    def read():
        with PredictionLog(tmp_path / "out.json", RUN) as log:
            return log.captions

    assert read() == captions
    try_damage("side file", read, [part], count, expected=PartOf())


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Three scenes with captions, boxes and mentions, and the files that are made of them."""
    folder = tmp_path_factory.mktemp("scenes")
    generate(folder, "val", 3, seed=3, workers=1)
    content = json.loads((folder / "val.json").read_text())
    stems = [image["file_name"].split(".")[0] for image in content["images"]]
    (folder / "predictions.json").write_text(json.dumps(dict.fromkeys(stems, "a red bike")))
    scores = {stem: {"caption": "a red bike", "CLIPScore": 0.5} for stem in stems}
    (folder / "per_image.json").write_text(json.dumps(scores))
    boxes = [{"image_id": o["image_id"], "category_id": 1, "bbox": o["bbox"]} for o in content["objects"]]
    instances = {"images": content["images"], "annotations": boxes, "categories": [{"id": 1, "name": "a"}]}
    (folder / "instances.json").write_text(json.dumps(instances))
    return folder


JSON_READERS = {
    "captions for training": ("val.json", lambda f: load_split(f, "val")),
    "captions for scoring": ("val.json", lambda f: load_annotations(f / "val.json")),
    "captions with boxes": ("val.json", lambda f: load_grounded_captions(f / "val.json", f)),
    "instances": (
        "instances.json",
        lambda f: load_grounded_captions(f / "val.json", f, f / "instances.json"),
    ),
    "predictions": ("predictions.json", lambda f: load_predictions(f / "predictions.json")),
    "scores per image": ("per_image.json", lambda f: read_per_image(f / "per_image.json")),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", JSON_READERS)
def test_damaged_json_is_read_or_refused(scenes, tmp_path, try_damage, count, kind):
    folder = tmp_path / "copy"
    shutil.copytree(scenes, folder)
    name, read = JSON_READERS[kind]
    try_damage(f"JSON: {kind}", lambda: read(folder), [folder / name], count, damaged_json)


def damaged_layout(content, rng):
    try:
        json.loads(content)
    except ValueError:  # JSON lines, tables, token files
        return damaged_bytes(content, rng)
    return damaged_json(content, rng)


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_captions_in_any_layout_are_read_or_refused(tmp_path, try_damage, count):
    references, predictions = (
        [tmp_path / f"{kind}_{name}" for name in files]
        for kind, files in (("references", REFERENCE_FILES), ("predictions", PREDICTION_FILES))
    )
    for path, text in zip(
        references + predictions, (*REFERENCE_FILES.values(), *PREDICTION_FILES.values()), strict=True
    ):
        path.write_text(text, encoding="utf-8")
    known = load_annotations(references[0])

    def read():
        for path in references:
            load_annotations(path, "test")
        for path in predictions:
            load_predictions(path, known)

    try_damage("captions in any layout", read, references + predictions, count, damaged_layout)


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_tokenizers_are_read_or_refused(tokenizer_folder, tmp_path, try_damage, count):
    folder = tmp_path / "copy"
    shutil.copytree(tokenizer_folder, folder)
    files = [folder / "encoder.json", folder / "vocab.bpe"]
    try_damage("tokenizer", lambda: Tokenizer(folder).encode("a red bike"), files, count)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "gif"])
def test_damaged_images_are_read_or_refused(tmp_path, try_damage, count, kind):
    path = tmp_path / f"image.{kind}"
    noise = np.random.default_rng(0).integers(0, 255, (33, 47, 3), np.uint8)
    Image.fromarray(noise).save(path)

    def read():
        image = load_image(path)
        assert image.mode == "RGB"
        image.load()

    try_damage(f"image: {kind}", read, [path], count)
