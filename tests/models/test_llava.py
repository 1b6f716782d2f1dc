"""llava.py and p1_llava_caption.py on the micro LLaVA: equal to plain generate, resumable, clear about bad input."""

import json
import logging
import shutil
import warnings
from argparse import Namespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import p1_llava_caption
from bench import llava as bench_llava
from captioning import profiles
from captioning.cli import BAD_INPUT, INTERRUPTED, PARTIAL
from captioning.data.annotations import load_annotations
from captioning.data.images import load_image
from captioning.data.listing import list_images
from captioning.imports import import_guarded
from captioning.inference.batches import ShrinkingBatch
from captioning.models import llava
from captioning.models.llava import PROMPTS, TEMPLATE, load_llava
from captioning.profiles import PROFILES, ROOT
from microworld.scenes import generate

MICRO = PROFILES["micro"].llava
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return load_llava(MICRO, CPU, torch.float32)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Forty validation scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    generate(folder, "val", 40, seed=5, workers=1)
    return folder


@pytest.fixture(scope="module")
def answers(model, scenes):
    """Our answers to both of the report's prompts, in batches of 16, as token ids."""
    paths = list_images(scenes / "images" / "val")
    return {setting: bench_llava.ours(model, paths, PROMPTS[setting], 48, 16) for setting in PROMPTS}


def caption(images, out, *flags):
    return p1_llava_caption.main([str(images), str(out), "--profile", "micro", "--device", "cpu", *map(str, flags)])


@pytest.fixture
def few(scenes, tmp_path):
    """Six of the scenes in another folder."""
    folder = tmp_path / "few"
    folder.mkdir()
    for path in list_images(scenes / "images" / "val")[:6]:
        shutil.copy(path, folder)
    return folder


# ------------------------------------------------------------------------------------------------------- the prompts


def test_the_prompts_are_the_reports_character_for_character():
    one, two = (TEMPLATE.format(PROMPTS[n]) for n in (1, 2))
    assert one == "USER: <image>\nBriefly describe this image in a sentence. Thank you. ASSISTANT:"
    assert two == (
        "USER: <image>\nIn one sentence, describe the key objects in the image and their state. For example, 'A red "
        "apple lies on a wooden table' or 'A dog sleeps peacefully on a couch.' ASSISTANT:"
    )


def test_the_chat_template_writes_the_same_conversation(model):
    content = [{"type": "image"}, {"type": "text", "text": PROMPTS[1]}]
    messages = [{"role": "user", "content": content}]
    text = model.processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == TEMPLATE.format(PROMPTS[1])
    messages.append({"role": "assistant", "content": [{"type": "text", "text": " A dog."}]})
    assert model.processor.apply_chat_template(messages) == f"{text} A dog.</s>".replace(
        "ASSISTANT: A", "ASSISTANT:  A"
    )


def test_a_prompt_needs_text_and_no_image_placeholder():
    for bad, why in (("  ", "empty"), ("<image> what is it?", "leave <image> out")):
        with pytest.raises(ValueError, match=why):
            llava.check_prompt(bad)


# ------------------------------------------------------------------------------------- equal to one image at a time


@pytest.mark.parametrize("setting", PROMPTS)
def test_batches_answer_with_the_tokens_of_plain_generate(model, scenes, answers, setting):
    plain = bench_llava.plain_loop(model, list_images(scenes / "images" / "val"), PROMPTS[setting], 48)
    assert [[t for t in answer if t not in model.eos_ids] for answer in plain] == answers[setting]
    assert len({tuple(answer) for answer in answers[setting]}) > 15


def test_prompts_of_different_length_share_a_batch(model, scenes):
    """Left padding: a short prompt beside a long one gets the same answer as by itself."""
    image = load_image(list_images(scenes / "images" / "val")[0])
    prompts = [PROMPTS[1], PROMPTS[2], "How many dogs are there?"]
    rows = [model.row(image, prompt) for prompt in prompts]
    assert len({len(row.input_ids) for row in rows}) == 3
    together = model.generate(rows, max_new_tokens=30)
    assert together == [model.generate([row], max_new_tokens=30)[0] for row in rows]
    assert together[0] != together[1]


def test_beams_answer_as_in_plain_generate(model, scenes):
    paths = list_images(scenes / "images" / "val")[:6]
    rows = [model.row(load_image(path), PROMPTS[1]) for path in paths]
    for row, tokens in zip(rows, model.generate(rows, num_beams=3, max_new_tokens=30), strict=True):
        plain = model.model.generate(
            input_ids=row.input_ids[None],
            pixel_values=row.pixel_values,
            num_beams=3,
            do_sample=False,
            max_new_tokens=30,
        )
        assert [t for t in plain[0, len(row.input_ids) :].tolist() if t not in model.eos_ids] == tokens


OPTIONS = {"min_new_tokens": 6, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3}


@pytest.mark.parametrize("beams", [1, 3])
def test_options_answer_as_in_plain_generate_with_the_models_own_scores(model, scenes, beams):
    """In a batch of two prompts; scores are those of reading prompt and answer in one pass, without the options."""
    images = [load_image(path) for path in list_images(scenes / "images" / "val")[:4]]
    rows = [model.row(image, prompt) for image in images for prompt in (PROMPTS[1], "What is there?")]
    found = model.ranked(rows, beams, 20, beams, OPTIONS)
    assert [answers[0][0] for answers in found] == model.generate(rows, beams, 20, options=OPTIONS)
    assert [answers[0][0] for answers in found] != model.generate(rows, beams, 20)
    for row, answers in zip(rows, found, strict=True):
        plain = model.model.generate(
            input_ids=row.input_ids[None],
            pixel_values=row.pixel_values,
            num_beams=beams,
            num_return_sequences=beams,
            do_sample=False,
            max_new_tokens=20,
            **OPTIONS,
        )[:, len(row.input_ids) :].tolist()
        assert [[t for t in answer if t not in model.eos_ids] for answer in plain] == [tokens for tokens, _ in answers]
        for answer, (tokens, score) in zip(plain, answers, strict=True):
            read = [*tokens, *answer[len(tokens) : len(tokens) + 1]]  # with EOS, where the answer ended
            _, logits = model.attend(row, tokens)
            log_probs = logits.float().log_softmax(-1)[: len(read)].gather(1, torch.tensor(read)[:, None])
            assert score == pytest.approx(log_probs.mean().item(), abs=1e-4)


def test_an_image_takes_the_tokens_that_the_processor_says(model):
    row = model.row(Image.new("RGB", (300, 120)), PROMPTS[1])
    config = model.model.config.vision_config
    assert (row.input_ids == model.image_token_id).sum() == (config.image_size // config.patch_size) ** 2


def test_the_second_setting_names_more(model, answers):
    """What the settings are for: the prompt decides how much is said."""
    words = {setting: sum(len(model.text(tokens).split()) for tokens in answers[setting]) for setting in PROMPTS}
    assert words[2] > 1.2 * words[1]


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_the_answers_alone(few, tmp_path, capfd, caplog):
    out = tmp_path / "out.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert caption(few, out) == 0
    captions = json.loads(out.read_text())
    assert list(captions) == [path.stem for path in list_images(few)]
    for text in captions.values():
        assert text == text.strip()
        assert text.endswith(".")
        assert not {"USER", "ASSISTANT", "<image>", "</s>"} & set(text.replace(":", " ").split())
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "[transformers]" not in capfd.readouterr().err  # its own handler holds the first stderr, before any capture


def test_an_answer_has_room_for_the_reports_200_tokens(few, tmp_path, monkeypatch):
    """And an answer that ends by itself is the same with any limit."""
    longest, generate_ = [], llava.Llava.generate

    def noted(self, rows, num_beams, max_new_tokens, options):
        longest.append(max_new_tokens)
        return generate_(self, rows, num_beams, max_new_tokens)

    monkeypatch.setattr(llava.Llava, "generate", noted)
    assert caption(few, tmp_path / "o.json", "--setting", 2) == 0
    assert caption(few, tmp_path / "p.json", "--setting", 2, "--max-new-tokens", 64) == 0
    assert longest == [200, 64]
    assert (tmp_path / "o.json").read_bytes() == (tmp_path / "p.json").read_bytes()


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (" A dog. \n", "A dog."),
        (" A dog. USER: Where? ASSISTANT: On a couch.", "On a couch."),  # the model goes on by itself
        (" An ASSISTANT:no space", "An ASSISTANT:no space"),
        ("", ""),
    ],
)
def test_the_answer_is_what_follows_the_last_assistant(model, said, answer):
    """The report's code splits the whole conversation there; white space at the ends is ours to drop."""
    assert model.text(model.processor.tokenizer(said, add_special_tokens=False).input_ids) == answer
    whole = TEMPLATE.format(PROMPTS[1]) + said
    assert not said or whole.split("ASSISTANT: ")[-1].strip() == answer


def test_settings_and_prompts_decide_the_answer(few, tmp_path):
    for name, flags in {"1": (), "2": ("--setting", "2"), "count": ("--prompt", "How many dogs are there?")}.items():
        assert caption(few, tmp_path / f"{name}.json", *flags) == 0
    one, two, count = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("1", "2", "count"))
    assert one != two
    assert all(text.startswith("There") for text in count.values())


def test_scores_several_answers_and_text_files(few, tmp_path, capsys):
    out, plain = tmp_path / "out.json", tmp_path / "plain.json"
    assert caption(few, plain, "--num-beams", 3) == 0
    assert caption(few, out, "--num-beams", 3, "--n-best", 2, "--txt", tmp_path / "texts") == 0
    captions = json.loads(out.read_text())
    assert captions == json.loads(plain.read_text())
    scores = json.loads((tmp_path / "out.scores.json").read_text())
    for key, text in captions.items():
        assert scores[key][0]["caption"] == text == (tmp_path / "texts" / f"{key}.txt").read_text()[:-1]
        assert [len(scores[key]), *map(list, scores[key])] == [2, ["caption", "score"], ["caption", "score"]]
        assert all(row["score"] < 0 for row in scores[key])
    assert "--n-best 2: --num-beams 1 finds" in fails(capsys, few, out, "--n-best", 2)
    assert "--compare and --txt" in fails(capsys, few, out, "--compare", "--annotation-file", few / "v.json", "--txt=x")


def test_an_interrupted_run_is_resumed(few, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.json", tmp_path / "out.json"
    assert caption(few, whole) == 0
    calls = []

    def broken(self, items):
        calls.append(len(items))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return self.function(items)

    with monkeypatch.context() as patch:
        patch.setattr(ShrinkingBatch, "__call__", broken)
        assert caption(few, out, "--batch-size", 2) == INTERRUPTED
    assert not out.exists()
    assert caption(few, out, "--setting", 2) == BAD_INPUT  # the side file belongs to setting 1
    assert caption(few, out, "--batch-size", 4) == 0
    assert out.read_bytes() == whole.read_bytes()


def test_compare_prints_the_table_of_both_settings(scenes, tmp_path, capsys):
    out = tmp_path / "table.json"
    assert caption(scenes / "images" / "val", out, "--compare", "--annotation-file", scenes / "val.json") == 0
    scores = json.loads(out.read_text())
    assert set(scores) == {"1", "2"}
    assert scores["1"]["CIDEr"] > scores["2"]["CIDEr"] > 0
    assert scores["2"]["words"] > scores["1"]["words"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["setting", "images", "CIDEr", "CLIPScore", "words"]
    assert float(lines[1].split()[2]) == pytest.approx(scores["1"]["CIDEr"], abs=1e-3)
    assert len(json.loads((tmp_path / "table_setting2.json").read_text())) == 40


def test_the_references_of_compare_may_call_images_by_number_alone(tmp_path):
    """As LAVIS writes them; the pictures are found by the numbers at the ends of their names, 0 among them."""
    content = json.loads((ROOT / "examples" / "references.json").read_text())
    content["images"] = [{"id": image["id"]} for image in content["images"]]
    (tmp_path / "gt.json").write_text(json.dumps(content))
    captions = json.loads((ROOT / "examples" / "predictions.json").read_text())
    args = Namespace(profile="micro", device="cpu", img_dir=[ROOT / "examples" / "images"], annotation_file="gt.json")
    scores, _ = p1_llava_caption.compare({"1": captions}, load_annotations(tmp_path / "gt.json"), args)
    assert scores["1"]["CIDEr"] == pytest.approx(1.417998065871006)  # the README's
    assert scores["1"]["CLIPScore"] == pytest.approx(1.3941642766, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------- bad input


def fails(capsys, *arguments):
    assert caption(*arguments) == BAD_INPUT
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def test_no_such_model(few, tmp_path, capsys):
    message = fails(capsys, few, tmp_path / "o.json", "--model", "no-one/no-llava")
    assert "--model no-one/no-llava" in message
    assert "hw3_download.sh" in message
    assert not list(tmp_path.glob("o.json*"))
    (tmp_path / "empty").mkdir()
    assert "no config.json" in fails(capsys, few, tmp_path / "o.json", "--model", tmp_path / "empty")


def test_another_architecture_is_named(few, tmp_path, capsys):
    folder = tmp_path / "gpt2"
    transformers = import_guarded("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    assert "is a GPT2LMHeadModel" in fails(capsys, few, tmp_path / "o.json", "--model", folder)


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(MICRO, tmp_path / "copied")


def test_missing_weights_are_never_made_up(few, tmp_path, copied, capsys):
    """from_pretrained would warn and use random numbers."""
    state = load_file(copied / "model.safetensors")
    gone = next(key for key in state if "down_proj" in key)
    del state[gone]
    save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    message = fails(capsys, few, tmp_path / "o.json", "--model", copied)
    assert "1 weights are missing" in message
    assert "down_proj" in message


def test_truncated_weights_are_an_error(few, tmp_path, copied, capsys):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert str(copied) in fails(capsys, few, tmp_path / "o.json", "--model", copied)


NOT_FITTING = {  # what is changed in processor_config.json, and what is said of it
    "143 tokens and the vision tower has 144 for it: processor_config.json: num_additional_image_tokens is 0, not 1": {
        "num_additional_image_tokens": None
    },
    "36 tokens and the vision tower has 144 .*: patch_size is 16, not 8": {"patch_size": 16},
    "145 tokens .*: vision_feature_select_strategy is full, not default": {"vision_feature_select_strategy": "full"},
    "63 tokens .*: patch_size is 12, not 8; processor_config.json: num_additional_image_tokens is 0, not 1": {
        "patch_size": 12,
        "num_additional_image_tokens": 0,
    },
    r"36 tokens .*does not take its pixels: processor_config.json: crop_size is \(48, 48\), not \(96, 96\)": {
        "crop_size": {"height": 48, "width": 48}
    },
}


@pytest.mark.parametrize(("message", "change"), NOT_FITTING.items())
def test_a_processor_that_does_not_fit_is_found_at_loading(tmp_path, message, change):
    """transformers finds it in the first batch, as a number of tokens and one of features."""
    folder = tmp_path / "llava"
    shutil.copytree(MICRO, folder)
    file = folder / "processor_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["image_processor"] |= {key: value for key, value in change.items() if key == "crop_size"}
    content |= {key: value for key, value in change.items() if key != "crop_size"}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"--model {folder}: an image gets {message}"):
        load_llava(str(folder), CPU, torch.float32)


def test_processors_of_before_2025_still_fit(tmp_path):
    """They say nothing of patches, and CLIP's are taken."""
    folder = tmp_path / "llava"
    shutil.copytree(MICRO, folder)
    file = folder / "processor_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for field in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        del content[field]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert load_llava(str(folder), CPU, torch.float32).processor.num_additional_image_tokens == 1


# --- where a model may come from ------------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch):
    """Fail where anything is asked of a hub; transformers' own loading is not even reached."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def asked(*arguments, **options):
        raise AssertionError(f"asked for {arguments}")

    for name in ("AutoConfig", "AutoProcessor", llava.ARCHITECTURE):
        monkeypatch.setattr(getattr(import_guarded("transformers"), name), "from_pretrained", asked)


OURS = ["weights/llava-1.5-7b-hf", "weights/other", "Weights/llava", "runs/best", "demo/llava", "microworld/llava"]
PATHS = ["./llava-hf/llava", "../a/b", "/no/where", "~/llava", "llava", "a/b/c", "a\\b", "mine/llava", "mine/model/"]


@pytest.mark.parametrize("name", OURS + PATHS)
def test_a_missing_folder_is_never_asked_of_the_hub(no_hub, few, tmp_path, monkeypatch, capsys, name):
    """Whoever takes the name ``weights`` there would serve the model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()  # a folder here, so that what is below it is a path
    with pytest.raises(FileNotFoundError, match=r"no such folder; run `bash hw3_download.sh p1`"):
        load_llava(name, CPU, torch.float32)
    assert "no such folder" in fails(capsys, few, tmp_path / "o.json", "--model", name)


def test_the_full_profiles_missing_model_is_one_line(no_hub, few, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiles, "ROOT", tmp_path)  # as in a clone without downloaded weights
    assert p1_llava_caption.main([str(few), str(tmp_path / "o.json"), "--device", "cpu"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --model weights/llava-1.5-7b-hf: no such folder; run `bash hw3_download.sh p1`")


@pytest.mark.parametrize("revision", [None, "0123abc"])
def test_a_hub_id_is_asked_of_the_hub_with_its_revision(monkeypatch, revision):
    seen = []

    def asked(name, **options):
        seen.append((name, options))
        raise OSError("no network. Try again.")

    monkeypatch.setattr(import_guarded("transformers").AutoConfig, "from_pretrained", asked)
    with pytest.raises(FileNotFoundError, match=r"--model llava-hf/llava-1\.5-7b-hf: no network; run"):
        load_llava("llava-hf/llava-1.5-7b-hf", CPU, torch.float32, revision)
    assert seen == [("llava-hf/llava-1.5-7b-hf", {"revision": revision})]


def test_a_folder_asks_for_nothing_elsewhere(tmp_path, monkeypatch):
    """An adapter's file in the folder names a base model, which transformers would take from the hub."""
    folder, seen = tmp_path / "llava", []
    shutil.copytree(MICRO, folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/model"}))
    transformers = import_guarded("transformers")
    for kind in (transformers.AutoConfig, transformers.AutoProcessor, getattr(transformers, llava.ARCHITECTURE)):
        plain = kind.from_pretrained
        monkeypatch.setattr(kind, "from_pretrained", lambda *a, plain=plain, **k: seen.append((a, k)) or plain(*a, **k))
    load_llava(str(folder), CPU, torch.float32)
    assert {str(names[0]) for names, _ in seen} == {str(folder)}
    assert [options.get("local_files_only") for _, options in seen[:3]] == [True] * 3


def test_a_prompt_without_room_for_an_answer(few, tmp_path, capsys):
    message = fails(capsys, few, tmp_path / "o.json", "--prompt", "What is that? " * 200)
    assert "no room for --max-new-tokens 200" in message
    assert "no room" in fails(capsys, few, tmp_path / "o.json", "--max-new-tokens", 500)


def test_unreadable_images_are_named_and_the_rest_is_captioned(few, tmp_path, caplog):
    list_images(few)[0].write_bytes(b"no picture")
    assert caption(few, tmp_path / "o.json") == PARTIAL
    assert len(json.loads((tmp_path / "o.json").read_text())) == 5
    assert "000000000000" in caplog.text or list_images(few)[0].name in caplog.text


def test_flags_that_make_no_sense(few, tmp_path, capsys):
    out = tmp_path / "o.json"
    assert "--batch-size 0" in fails(capsys, few, out, "--batch-size", 0)
    assert "--annotation-file: name the references" in fails(capsys, few, out, "--compare")
    assert "leave it out, or add --compare" in fails(capsys, few, out, "--annotation-file", "val.json")
    assert "--prompt is empty" in fails(capsys, few, out, "--prompt", " ")
    assert "no such folder" in fails(capsys, tmp_path / "nowhere", out)
    out.write_text("{}")
    assert "leave out --keep" in fails(capsys, few, out, "--keep")
    assert out.read_text() == "{}"
    assert caption(few, out) == 0
    assert len(json.loads(out.read_text())) > 0
    assert caption(few, out, "--overwrite") == 0  # what the last version wanted here


def test_four_bits_without_bitsandbytes(few, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(llava.importlib.util, "find_spec", lambda name: None)
    assert "pip install bitsandbytes" in fails(capsys, few, tmp_path / "o.json", "--load-in-4bit")
