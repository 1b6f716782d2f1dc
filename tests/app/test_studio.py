"""What the page can do, as functions: captions, scores and maps are those of the scripts."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import evaluate
import p1_llava_caption
import p2_infer
import p3_attention
from captioning.app import studio as module
from captioning.app.scenes import make_scenes
from captioning.app.studio import Kept, MapPage, Studio, adapters_beside, checked, short_name
from captioning.files import write_json
from captioning.maps import viewer
from captioning.maps.attention import METHODS, MapSpec
from captioning.models.llava import PROMPTS
from captioning.profiles import PROFILES

SMALL = ("--profile", "micro", "--device", "cpu")


@pytest.fixture(scope="module")
def chosen(studio, scenes):
    """A scene: how the page calls it, its file, and both models' answers."""
    name = scenes["scenes"][3]["picture"]
    answers = studio.caption(name, next(iter(studio.adapters)), {})["answers"]
    return name, studio.pictures[name].path, answers


def test_captions_confidences_and_other_beams_are_the_scripts(chosen, adapters, tmp_path):
    _, path, (tuned, llava) = chosen
    out = tmp_path / "p2.json"
    flags = ("--adapter", str(adapters[0]), "--n-best", "5")
    assert p2_infer.main([str(path), str(out), PROFILES["micro"].decoder, *flags, *SMALL]) == 0
    assert tuned["caption"] == json.loads(out.read_text())[path.stem]
    assert tuned["ranked"] == json.loads((tmp_path / "p2.scores.json").read_text())[path.stem]
    out = tmp_path / "p1.json"
    assert p1_llava_caption.main([str(path), str(out), "--scores", *SMALL]) == 0
    assert llava["caption"] == json.loads(out.read_text())[path.stem]
    assert llava["ranked"] == json.loads((tmp_path / "p1.scores.json").read_text())[path.stem]
    assert (tuned["model"], llava["model"]) == ("tuned captioner", "LLaVA")


@pytest.fixture(scope="module")
def explained(chosen, adapters, tmp_path_factory):
    """A function of a model and further flags: what p3_attention.py explains of the scene's caption by that model."""
    _, path, answers = chosen
    loaded, load, out = {}, p3_attention.load_explainer, tmp_path_factory.mktemp("maps")

    def explain(model, *more):
        answer = answers[("p2", "p1").index(model)]
        written = []
        flags = ("--adapter", str(adapters[0]), "--caption", answer["caption"], *more)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                p3_attention, "load_explainer", lambda *of: loaded.get(model) or loaded.setdefault(model, load(*of))
            )
            patch.setattr(p3_attention.figures, "word_grid", lambda *drawn: None)
            patch.setattr(p3_attention, "save_maps", lambda out, explanation, attention: written.append(explanation))
            assert p3_attention.main(["--model", model, "--images", str(path), "--out", str(out), *flags, *SMALL]) == 0
        return answer, written[0]

    return explain


@pytest.mark.parametrize(("model", "name"), [("p2", None), ("p1", "llava")])
def test_the_page_of_maps_begins_with_the_scripts(model, name, explained, studio):
    """It is, letter by letter, the viewer of what p3_attention.py explains, and offers every method."""
    answer, explanation = explained(model)
    offer = studio.model(name or next(iter(studio.adapters))).map_choices()
    assert studio.page(answer["maps"]) == viewer.page([explanation], answer["model"], offer)
    assert list(offer) == list(METHODS)
    for method, choices in offer.items():
        assert choices.keys() == {"layers", "heads"} and all(choices.values())
        assert {name for name in choices if choices[name] != [""]} == MapSpec(method).choices().keys()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("model", "name"), [("p2", None), ("p1", "llava")])
def test_maps_that_are_asked_for_are_the_scripts_to_the_byte(model, name, method, explained, chosen, studio):
    """Of two words: some methods ask the model very often."""
    short, name = "A ball", name or next(iter(studio.adapters))
    studio.pages.add(short, MapPage("", name, chosen[1], short, PROMPTS[1]))
    view = viewer.view(explained(model, "--caption", short, "--method", method)[1].word_maps[0])
    assert studio.map(short, method, view["layers"], view["heads"]) == view
    others = {key: value for key, value in {"layers": "1-2", "heads": "3"}.items() if view[key]}
    if others:
        flags = [word for key, value in others.items() for word in (f"--{key}", value)]
        other = viewer.view(explained(model, "--caption", short, "--method", method, *flags)[1].word_maps[0])
        assert studio.map(short, method, *({"layers": "", "heads": ""} | others).values()) == other
        assert other["maps"] != view["maps"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("gone", "raw", "all", "mean"), "this page of maps is not kept any more; choose it again"),
        (("", "dream", "all", "mean"), "--method dream: use one of raw"),
        (("", "raw", "7", "mean"), "--layers 7: the model has layers 0 to 3"),
        (("", "raw", [1], "mean"), r"--layers \[1\]: use all, last, a number"),
        (("", "raw", "all", "9"), "--heads 9: the model has heads 0 to 3"),
    ],
)
def test_maps_that_there_are_not_are_one_line(asked, message, studio, chosen):
    maps, *spec = asked
    with pytest.raises(ValueError, match=message):
        studio.map(maps or chosen[2][0]["maps"], *spec)


def test_maps_of_another_prompt_are_asked_by_it(studio, chosen):
    """Whatever prompt other pages have had meanwhile."""
    name, _, _ = chosen
    adapter, spec = next(iter(studio.adapters)), ("raw", "all", "mean")
    first, second = (
        studio.caption(name, adapter, {"prompt": prompt})["answers"][1]["maps"] for prompt in PROMPTS.values()
    )
    once = studio.map(first, *spec)
    assert studio.map(second, *spec) != once and studio.map(first, *spec) == once


def test_scores_are_those_of_the_script_on_the_same_scenes(chosen, studio, scenes, tmp_path):
    """CIDEr's document frequencies are those of the scenes shown."""
    _, path, (tuned, _) = chosen
    made = studio.sets[scenes["set"]]
    references = write_json(tmp_path / "refs.json", made.annotations.references) or tmp_path / "refs.json"
    predictions = dict.fromkeys(made.paths, "A dog.") | {path.stem: tuned["caption"]}
    write_json(tmp_path / "pred.json", predictions)
    files = ("--pred-file", tmp_path / "pred.json", "--annotation-file", references, "--images-root", path.parent)
    out = tmp_path / "per_image.json"
    assert evaluate.main([*map(str, (*files, "--per-image", out, "--no-cache")), *SMALL]) == 0
    row = json.loads(out.read_text())[path.stem]
    assert tuned["cider"] == pytest.approx(row["CIDEr"], abs=1e-12)
    assert tuned["clipscore"] == pytest.approx(row["CLIPScore"], abs=1e-6)
    assert tuned["not there"] == [
        name for _, name in made.chair.words.find(tuned["caption"]) if name not in there(made, path)
    ]
    everything = made.not_there(path.stem, "A boat, a train and a snowman.")
    assert set(everything) == {"boat", "train", "snowman"} - there(made, path) != set()


def there(made, path):
    return made.evaluator.objects[path.stem]


def test_settings_reach_the_models(studio, chosen):
    name, _, (tuned, llava) = chosen
    adapter = next(iter(studio.adapters))
    settings = {"captioner": {"beam_size": 2, "max_new_tokens": 4}, "llava": {"beam_size": 3}, "prompt": PROMPTS[2]}
    short, asked = studio.caption(name, adapter, settings)["answers"]
    assert len(short["ranked"]) == 2 and len(asked["ranked"]) == 3
    assert len(short["caption"].split()) < len(tuned["caption"].split()) and asked["caption"] != llava["caption"]
    both = {"min_new_tokens": 14, "no_repeat_ngram": 2}
    assert len(studio.caption(name, adapter, both)["answers"][0]["caption"].split()) > len(tuned["caption"].split())


def test_two_adapters_side_by_side(studio, chosen, scenes):
    name, _, (tuned, _) = chosen
    first, second = studio.adapters
    one, other = studio.compare(name, first, second, {})["answers"]
    assert (one["model"], other["model"]) == (first, second) and one["caption"] == tuned["caption"]
    assert one["maps"] != other["maps"] and first in studio.page(one["maps"])
    found = studio.compare_scenes(scenes["set"], first, second, {})
    assert [mean["adapter"] for mean in found["means"]] == [first, second]
    scores, others = (mean["scores"] for mean in found["means"])
    assert scores["CIDEr"] > others["CIDEr"] and scores.keys() == {"CIDEr", "CHAIRs", "CHAIRi", "CHAIR recall"}
    row = next(row for row in found["rows"] if row["picture"] == name)
    assert row["captions"][0] == {"caption": tuned["caption"], "cider": pytest.approx(tuned["cider"], abs=1e-12)}
    assert np.mean([row["captions"][0]["cider"] for row in found["rows"]]) == pytest.approx(scores["CIDEr"])


def test_a_picture_that_is_sent_has_no_cider(studio, png):
    shown = studio.add_picture("../../evil <name>.png", png)
    assert shown["references"] == [] and shown["shown"].startswith("data:image/jpeg")
    path = studio.pictures[shown["picture"]].path
    assert path.is_relative_to(studio.folder) and not re.search(r"[<>/]", path.name)
    answers = studio.caption(shown["picture"], next(iter(studio.adapters)), {})["answers"]
    assert [answer["cider"] for answer in answers] == [None, None] and answers[0]["clipscore"] >= 0


@pytest.mark.parametrize("name", ["", ".", "..", "...", "a" * 500 + ".png", "ä b.png", "con\x00.png"])
def test_any_name_is_kept_inside_the_folder(name, studio, png):
    kept = studio.pictures[studio.add_picture(name, png)["picture"]].path
    assert kept.is_file() and kept.is_relative_to(studio.folder / "pictures") and len(kept.name) <= 80


def test_what_the_loader_refuses_is_one_line(studio, png):
    for content, reason in (
        (b"", "the file is empty"),
        (b"<svg/>", "of no known image format"),
        (png[:60], "a.png: "),
    ):
        with pytest.raises(ValueError, match=reason) as refusal:
            studio.add_picture("a.png", content)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"captioner": {"beam_size": 0}}, "beam size 0: a whole number from 1 to 20"),
        ({"captioner": {"beam_size": 1000}}, "beam size 1000: a whole number from 1 to 20"),
        ({"captioner": {"max_new_tokens": None}}, "max new tokens None: a whole number from 1 to 200"),
        ({"captioner": {"max_new_tokens": 2.5}}, "max new tokens 2.5: a whole number"),
        ({"no_repeat_ngram": True}, "no repeat ngram True: a whole number"),
        ({"min_new_tokens": 50}, "min new tokens 50: is above max new tokens 30"),
        ({"captioner": [1]}, "captioner: settings are an object"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        checked(settings, "captioner")


def test_one_models_trouble_is_its_own(studio, chosen, monkeypatch):
    name, _, (tuned, _) = chosen
    adapter = next(iter(studio.adapters))
    answers = studio.caption(name, adapter, {"prompt": "What is <image>?"})["answers"]
    assert answers[0]["caption"] == tuned["caption"] and "--prompt: leave <image> out" in answers[1]["error"]
    answers = studio.caption(name, "/etc/passwd", {})["answers"]
    assert "not one of those" in answers[0]["error"] and "caption" in answers[1]


def test_missing_models_are_said_and_cost_nothing_else(adapters, chosen, tmp_path, monkeypatch):
    """As at full size, where LLaVA and CLIP may not have been fetched."""
    _, path, (tuned, _) = chosen
    lean = Studio("micro", adapters, tmp_path, llava="nowhere/llava", device="cpu")
    monkeypatch.setattr(module, "ClipScorer", lambda *a: (_ for _ in ()).throw(FileNotFoundError("no CLIP weights")))
    lean.warm_up()
    kept = lean.add_picture(path.name, path.read_bytes())["picture"]
    first, second = lean.caption(kept, next(iter(lean.adapters)), {})["answers"]
    assert (first["caption"], first["clipscore"], first["why"]) == (tuned["caption"], None, "no CLIP weights")
    assert "nowhere/llava" in second["error"]


# --- scenes ---------------------------------------------------------------------------------------------------------


def test_scenes_are_drawn_once_and_anew_with_another_seed(studio, scenes):
    again, others = studio.draw("val", 1926), studio.draw("val_novel", 3)
    assert again == scenes and len(scenes["scenes"]) == 24
    assert others["scenes"][0]["shown"] != scenes["scenes"][0]["shown"]
    shown = studio.show(scenes["scenes"][0]["picture"])
    assert len(shown["references"]) == 5 and shown["references"][0] == scenes["scenes"][0]["said"]


@pytest.mark.parametrize(
    ("split", "seed"), [("train", 1), ("../x", 1), (None, 1), ("val", -1), ("val", 1.5), ("val", True)]
)
def test_other_splits_and_seeds_are_refused(split, seed, studio):
    with pytest.raises(ValueError, match="use one of val, val_novel" if split != "val" else "a whole number from 0"):
        studio.draw(split, seed)


def test_scenes_of_the_full_size_are_its_validation_images(tmp_path, monkeypatch, tiny_data, tiny_profile):
    from dataclasses import replace

    monkeypatch.setitem(PROFILES, "full", replace(tiny_profile, data=str(tiny_data)))
    made = make_scenes("full", tmp_path, "val", 0, count=5)
    assert len(made.paths) == 5 and all(path.is_file() for path in made.paths.values())
    assert made.paths != make_scenes("full", tmp_path, "val", 1, count=5).paths
    monkeypatch.setitem(PROFILES, "full", replace(tiny_profile, data=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"val\.json: no such file; .*hw3_download\.sh data"):
        make_scenes("full", tmp_path, "val", 0)


# --- the rest -------------------------------------------------------------------------------------------------------


def test_only_the_latest_are_kept(tmp_path):
    forgotten = []
    kept = Kept(2, forgotten.append)
    for name in "abc":
        kept.add(name, name.upper())
    assert list(kept) == ["b", "c"] and forgotten == ["A"] and kept.find("b", "picture") == "B"
    with pytest.raises(ValueError, match="this picture is not kept any more; choose it again"):
        kept.find("a", "picture")
    kept.add("d", "D")
    assert list(kept) == ["b", "d"]


def test_adapters_of_the_profile_are_found_and_named_shortly(unbroken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "lora").mkdir(parents=True)
    own = Path(PROFILES["micro"].adapter)
    (tmp_path / "demo" / "lora" / "best.safetensors").write_bytes(own.read_bytes())
    (tmp_path / "runs" / "broken").mkdir(parents=True)
    (tmp_path / "runs" / "broken" / "best.safetensors").write_bytes(b"no adapter")
    found = adapters_beside("micro")
    assert list(map(short_name, found)) == [
        "microworld/weights/adapter/adapter.safetensors",
        "demo/lora/best.safetensors",
    ]
    with pytest.raises(FileNotFoundError, match="give --profile micro"):
        adapters_beside("full")
