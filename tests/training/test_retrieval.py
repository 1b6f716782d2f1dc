"""Retrieved captions from the datastore's command line to captions: own ones never, exchanged, resumed, refused."""

import json
import signal

import pytest
import torch
from runs import assert_same_run, same, signal_at, train, weights

import p2_export
import p2_infer
import p3_attention
from captioning import load
from captioning.cli import BAD_INPUT, STOPPED
from captioning.data.annotations import load_split
from captioning.data.datastore import Datastore
from captioning.data.tokenizer import Tokenizer
from captioning.profiles import MICRO_WEIGHTS, PROFILES
from captioning.scoring import make_datastore
from captioning.scoring.retrieval import Retriever
from captioning.training.trainer import Trainer
from microworld.scenes import generate

pytestmark = pytest.mark.usefixtures("constant_score")
ROWS = ("--retrieve", 2, "--retrieved-tokens", 40)


def build(data, out, *flags, clip=MICRO_WEIGHTS / "encoder"):
    words = [data, out, "--profile", "micro", "--device", "cpu", "--clip-model", clip, *flags]
    return make_datastore.main(list(map(str, words)))


@pytest.fixture(scope="module")
def store(tiny_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "train.safetensors"
    assert build(tiny_data, path) == 0
    return path


@pytest.fixture(scope="module")
def other_store(tmp_path_factory):
    """The captions of other scenes."""
    folder = tmp_path_factory.mktemp("other")
    generate(folder, "val_novel", 12, seed=3, workers=1)
    assert build(folder, folder / "novel.safetensors", "--split", "val_novel") == 0
    return folder / "novel.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory, store):
    """Two epochs that nothing interrupted."""
    out = tmp_path_factory.mktemp("retrieving") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("captioning.scoring.evaluator.cider", lambda *_: (0.5, {}))
        assert train(out, *ROWS, "--datastore", store) == 0
    return out


def infer(images, out, run, *flags):
    files = (images, out, PROFILES["micro"].decoder, "--adapter", run / "best.safetensors")
    small = ("--profile", "micro", "--device", "cpu", "--beam-size", 2, "--max-new-tokens", 12)
    return p2_infer.main([*map(str, (*files, *small, *flags))])


def test_the_command_writes_every_training_caption(store, tiny_data):
    found, samples = Datastore.load(store), load_split(tiny_data, "train")
    assert found.captions == [caption for sample in samples for caption in sample.captions]
    assert found.embeddings.shape == (len(found.captions), 192)
    assert torch.allclose(found.embeddings.float().norm(dim=1), torch.ones(len(found.captions)), atol=1e-3)


def test_no_image_of_a_training_gets_its_own_captions_and_other_images_get_the_nearest(
    store, tiny_data, tmp_path, tokenizer_folder
):
    tokenizer, samples = Tokenizer(tokenizer_folder), load_split(tiny_data, "train")
    retriever = Retriever(store, tokenizer, 3, 80, torch.device("cpu"))
    rows = retriever.rows_of([sample.path for sample in samples], tmp_path / "cache")
    own = [{tuple(tokenizer.encode(caption)) for caption in sample.captions} for sample in samples]
    for sample, row in zip(samples, rows, strict=True):
        assert len(captions_in(row, tokenizer.eos_id)) == 3
        copies = captions_in(row, tokenizer.eos_id) & {tuple(tokenizer.encode(c)) for c in sample.captions}
        assert all(sum(copy in captions for captions in own) > 1 for copy in copies)  # another image's same words
    pixels = [retriever.clip.load_image(sample.path) for sample in samples]
    with_own = retriever.rows(pixels)
    assert torch.equal(with_own, torch.cat([retriever.rows([image]) for image in pixels]))  # alone as in a batch
    assert any(captions_in(row, tokenizer.eos_id) & texts for row, texts in zip(with_own, own, strict=True))


def captions_in(row, eos):
    """The captions of a row of tokens that EOS separates."""
    found, caption = set(), []
    for token in [*row.tolist(), eos]:
        if token != eos:
            caption.append(token)
        elif caption:
            found.add(tuple(caption))
            caption = []
    return found


def test_another_datastore_changes_captions_and_nothing_is_trained(
    run, store, other_store, tiny_data, tmp_path, monkeypatch, capsys
):
    images, adapter = tiny_data / "images" / "val", (run / "best.safetensors").read_bytes()
    found = {}
    for name, flags in (("own", ()), ("same", ("--datastore", store)), ("other", ("--datastore", other_store))):
        assert infer(images, tmp_path / f"{name}.json", run, *flags) == 0
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["own"] == found["same"] != found["other"]
    monkeypatch.setattr(Datastore, "fingerprint", "another")
    assert infer(images, tmp_path / "changed.json", run) == BAD_INPUT  # the file that the adapter names has changed
    assert "is not the datastore that the adapter was trained with any more" in capsys.readouterr().err
    assert (run / "best.safetensors").read_bytes() == adapter


def test_images_are_captioned_alike_alone_and_in_batches(run, tiny_data, tmp_path):
    for size in (1, 8):
        flags = ("--batch-size", size, "--precision", "fp32", "--scores")
        assert infer(tiny_data / "images" / "val", tmp_path / f"{size}.json", run, *flags) == 0
    one, eight = (json.loads((tmp_path / f"{size}.json").read_text()) for size in (1, 8))
    assert one == eight
    scores = [json.loads((tmp_path / f"{size}.scores.json").read_text()) for size in (1, 8)]
    assert str(scores[0])[:40] == str(scores[1])[:40]


@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_training_is_one_that_nothing_interrupted(run, store, tmp_path, monkeypatch, step):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at(patch, step, signal.SIGTERM)
        assert train(out, *ROWS, "--datastore", store) == STOPPED
    assert train(out, *ROWS, "--datastore", store, "--resume") == 0
    assert_same_run(out, run)


def test_a_training_is_resumed_with_its_own_datastore_only(store, other_store, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at(patch, 1, signal.SIGTERM)
        assert train(out, *ROWS, "--datastore", store) == STOPPED
    assert train(out, *ROWS, "--datastore", other_store, "--resume") == BAD_INPUT
    assert "was started with other values of captioner.retrieval" in capsys.readouterr().err


def test_rewards_tune_an_adapter_that_retrieves(run, store, tmp_path):
    flags = ("--objective", "scst", "--init-adapter", run / "best.safetensors", "--epochs", 1)
    assert train(tmp_path / "scst", *flags, "--datastore", store) == 0
    tuned = weights(tmp_path / "scst", "last")
    assert not same(tuned, weights(run, "best"))


def test_text_reaches_the_loss(run, store, other_store, tmp_path, monkeypatch):
    losses = []
    loss = Trainer.val_loss
    monkeypatch.setattr(Trainer, "val_loss", lambda trainer, count: losses.append(loss(trainer, count)) or losses[-1])
    for number, datastore in enumerate((store, other_store)):
        assert train(tmp_path / str(number), *ROWS, "--datastore", datastore, "--epochs", 1) == 0
    assert losses[0] != losses[len(losses) // 2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--retrieve", 2), "--retrieve: needs --datastore"),
        (("--datastore", "STORE"), "--datastore: needs --retrieve"),
        (("--retrieve", 2, "--datastore", "missing.safetensors"), "--datastore missing.safetensors: no such file"),
        (
            ("--retrieve", 2, "--datastore", "STORE", "--retrieved-tokens", 150),
            "and 150 of retrieved captions leave no room",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, words, store, tmp_path, capsys):
    assert train(tmp_path / "run", *(store if flag == "STORE" else flag for flag in flags)) == BAD_INPUT
    assert words in capsys.readouterr().err


def test_a_datastore_of_another_clip_is_refused(run, store, tiny_data, tmp_path, capsys):
    """Its folder holds other weights now."""
    found, path = Datastore.load(store), tmp_path / "store.safetensors"
    Datastore(found.captions, found.embeddings, found.owners, found.images, {**found.clip, "clip_sha256": "x"}).save(
        path
    )
    for done in (
        lambda: train(tmp_path / "run", *ROWS, "--datastore", path),
        lambda: infer(tiny_data / "images" / "val", tmp_path / "p.json", run, "--datastore", path),
    ):
        assert done() == BAD_INPUT
        assert "was made with other weights" in capsys.readouterr().err


def test_inference_refuses_a_datastore_for_an_adapter_without_and_a_missing_one(
    run, unbroken, store, tiny_data, tmp_path, capsys
):
    images = tiny_data / "images" / "val"
    assert infer(images, tmp_path / "p.json", unbroken, "--datastore", store) == BAD_INPUT
    assert "train.safetensors: the adapter reads no retrieved captions; leave it out" in capsys.readouterr().err
    assert infer(images, tmp_path / "p.json", run, "--datastore", tmp_path / "none.safetensors") == BAD_INPUT
    assert "none.safetensors: no such file" in capsys.readouterr().err


def test_python_and_maps_read_them_as_p2_infer_does(run, store, other_store, tiny_data, tmp_path):
    images = sorted((tiny_data / "images" / "val").iterdir())
    found = {}
    for name, datastore in (("own", None), ("other", other_store)):
        model = load(run, device="cpu", profile="micro", precision="fp32", datastore=datastore)
        found[name] = model.caption(images, beam_size=2, max_new_tokens=12)
        flags = ("--datastore", datastore) if datastore else ()
        assert infer(images[0].parent, tmp_path / f"{name}.json", run, "--precision", "fp32", *flags) == 0
        assert list(json.loads((tmp_path / f"{name}.json").read_text()).values()) == found[name]
    explanation = model.explain(images[0], "A red bike.")
    assert explanation.maps.shape[0] == len(explanation.words) == 3
    assert found["own"] != found["other"]


def test_scripts_that_cannot_retrieve_say_so(run, store, tmp_path, capsys):
    words = ["--model", "p2", "--images", "examples/images", "--out", tmp_path / "maps", "--profile", "micro"]
    files = ["--adapter", run / "best.safetensors", "--datastore", tmp_path / "none.safetensors"]
    assert p3_attention.main(list(map(str, [*words, *files]))) == BAD_INPUT
    assert "--datastore" in capsys.readouterr().err
    words = [tmp_path / "out", "--adapter", run / "best.safetensors", "--profile", "micro"]
    assert p2_export.main(list(map(str, words))) == BAD_INPUT
    assert "has no place for retrieved captions; give --no-llava" in capsys.readouterr().err


def test_a_datastore_names_a_clip_of_the_suite_by_its_place_in_it(store):
    """Another machine has the suite elsewhere."""
    assert Datastore.load(store).clip["clip_model"] == "microworld/weights/encoder"
