"""CHAIR against values counted by hand; the objects of the word list are some of COCO's."""

import json

import pytest

import evaluate
from captioning.cli import BAD_INPUT
from captioning.profiles import PROFILES
from captioning.scoring.chair import Chair, ObjectWords, objects_in_boxes
from microworld.scenes import generate
from microworld.things import KINDS

LIST = """\
person, girl, boy, man, woman, child, children, people, player, passenger, baby, adult
bicycle, bike
motorcycle, scooter,  motor bike
airplane, jet, plane, air plane
bus
train, locomotive
traffic light, street light, stop light
fire hydrant, hydrant
bird, goose
cat, kitten
dog, puppy
horse, pony
sheep, lamb
bear
tie, bow, bow tie
skis, ski
sports ball, ball
baseball bat
tennis racket, racket
wine glass
cup
knife, knive
sandwich, burger
orange
hot dog
cake,  cheesecake
chair, seat, stool
potted plant
dining table, table, desk
toilet
tv, television
laptop, laptop computer
mouse
cell phone, phone, iPhone
oven, stove, stove top oven
scissors
teddy bear, teddybear
"""
NAMED = [  # a caption, and the objects that it names, by hand
    ("A man rides a horse.", ["person", "horse"]),
    ("Two hot dogs on a plate", ["hot dog"]),
    ("a hot brown dog", ["dog"]),
    ("A baby bear next to a passenger train", ["bear", "train"]),
    ("Adult sheep and baby birds", ["sheep", "bird"]),
    ("passengers of a jet", ["person", "airplane"]),
    ("a toilet seat", ["toilet"]),
    ("a seat beside the toilet", ["toilet"]),
    ("a seat beside the bus", ["chair", "bus"]),
    ("wine glasses, and glasses", ["wine glass"]),
    ("A bow tie, a bow, and ties", ["tie", "tie", "tie"]),
    ("people with knives", ["person", "knife"]),
    ("Children, women and men", ["person", "person", "person"]),
    ("geese and mice", ["bird", "mouse"]),
    ("ponies and puppies", ["horse", "dog"]),
    ("buses and sandwiches", ["bus", "sandwich"]),
    ("a bus", ["bus"]),
    ("tennis rackets by a racket", ["tennis racket", "tennis racket"]),
    ("he cares for tennis", []),
    ("a baseball bat at home plate", ["baseball bat"]),
    ("a bat hangs there", []),
    ("a teddy bear and a bear", ["teddy bear", "bear"]),
    ("street lights over a stop light", ["traffic light", "traffic light"]),
    ("a light", []),
    ("The man's TV.", ["person", "tv"]),
    ("a stove top oven", ["oven", "oven"]),  # three words are not one name: as the paper's code has it
    ("a motor bike, a cheesecake, an iPhone", []),  # nor do entries with a space before them or a capital match
    ("an air plane", ["airplane"]),
    ("a laptop computer", ["laptop"]),
    ("dining tables", ["dining table"]),
    ("skis, skiing, a ski", ["skis", "skis"]),
    ("an orange orange", ["orange", "orange"]),
    ("stop-sign and fire-hydrant", []),
    ("fire hydrant!", ["fire hydrant"]),
    ("a cell phone", ["cell phone"]),
    ("a potted plant and a plant", ["potted plant"]),
    ("scissors", ["scissors"]),
    ("", []),
    ("éclair", []),
    ("A GIRL WITH A BALL", ["person", "sports ball"]),
]
# Image, objects with boxes, references, caption; of these: mentions, of what is not there, objects there, found.
CASES = [
    ("a", {"dog"}, ["a man walks"], "a man with a dog and a cat"),  # 3, 1 (cat), 2, 2
    ("b", {"bus", "person"}, ["a street"], "two buses"),  # 1, 0, 2, 1
    ("c", set(), ["nothing here"], "a dog, a dog and a puppy"),  # 3, 3, 0, 0
    ("d", {"cup"}, ["a cup"], "grass"),  # 0, 0, 1, 0
]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    file = tmp_path_factory.mktemp("words") / "words.txt"
    file.write_text(LIST)
    return file


@pytest.fixture
def boxes(tmp_path):
    """COCO instances of the images of CASES, and of one more."""
    names = [line.split(", ")[0] for line in LIST.splitlines()]
    content = {
        "images": [{"id": n, "file_name": f"{image}.jpg"} for n, image in enumerate("xabcd")],
        "categories": [{"id": n, "name": name} for n, name in enumerate(names)],
        "annotations": [
            {"image_id": n, "category_id": names.index(name), "bbox": [0, 0, 1, 1]}
            for n, (_, objects, *_) in enumerate(CASES, 1)
            for name in sorted(objects)
        ],
    }
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(("caption", "objects"), NAMED)
def test_objects_that_a_caption_names(words, caption, objects):
    assert len(NAMED) == 40
    assert [name for _, name in ObjectWords.read(words).find(caption)] == objects


@pytest.mark.parametrize(("caption", "objects"), NAMED)
def test_each_object_has_the_place_of_its_word(words, caption, objects):
    list_, text = ObjectWords.read(words), caption.split()
    places = list_.places(text)
    assert list(places) == sorted(places) and len(places) == len(set(places))
    assert set(places.values()) <= set(objects) and len(places) <= len(objects)


def test_the_place_of_a_name_of_two_words_is_that_of_the_second(tmp_path):
    (tmp_path / "words.txt").write_text("hot dog\ndog, puppy\nbear\nperson, baby\n")
    list_ = ObjectWords.read(tmp_path / "words.txt")
    text = "Two puppies, a hot dog and a baby bear with a dog."
    assert list_.places(text.split()) == {1: "dog", 4: "hot dog", 8: "bear", 11: "dog"}
    assert list_.places([]) == list_.places(["nothing"]) == {}


def test_scores_counted_by_hand(words, boxes):
    file_names = {image: f"{image}.jpg" for image, *_ in CASES}
    chair = Chair.of_files(str(words), str(boxes), file_names)
    there = chair.there({image: references for image, _, references, _ in CASES})
    assert there == {"a": {"dog", "person"}, "b": {"bus", "person"}, "c": set(), "d": {"cup"}}
    scores, details = chair.score({image: caption for image, *_, caption in CASES}, there)
    assert scores == [
        (2 / 4, [1, 0, 1, 0]),
        (4 / 7, [1 / 3, 0, 1, 0]),
        (3 / 5, [1, 1 / 2, 0, 0]),
    ]
    assert details["a"] == {
        "objects named": ["person", "dog", "cat"],
        "objects not there": ["cat"],
        "objects there": ["dog", "person"],
    }


def test_references_alone_only_where_asked_for(words):
    chair = Chair.of_files(str(words), "references", {"a": "a.jpg"})
    assert chair.there({"a": ["two dogs"]}) == {"a": {"dog"}} and "boxes" not in chair.origin["chair_objects"]


def test_no_captions_with_objects_score_zero(words):
    chair = Chair(ObjectWords.read(words))
    scores, _ = chair.score({"a": "grass"}, {"a": set()})
    assert [mean for mean, _ in scores] == [0, 0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no object words"),
        ("dog\n\ncat", "line 2 is ''"),
        ("dog,puppy", "a line for each object"),
        ('{"dog": ["puppy"]}', "a line for each object"),
        ("dog: puppy", "a line for each object"),
        ("dog, cub\nbear, cub", "'cub' is a word for 'dog' and for 'bear'"),
    ],
)
def test_word_lists_of_another_shape_are_refused(tmp_path, text, message):
    file = tmp_path / "words.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        ObjectWords.read(file)
    assert str(file) in str(error.value)


def test_boxes_that_do_not_fit_are_refused(words, boxes, tmp_path):
    list_ = ObjectWords.read(words)
    with pytest.raises(ValueError, match=r"boxes of other images: 1 of the 2 .*: e"):
        objects_in_boxes(boxes, list_, {"a": "a.jpg", "e": "e.jpg"}, {})
    content = json.loads(boxes.read_text())
    content["categories"][3]["name"] = "spaceship"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lacks 1 categories: spaceship"):
        objects_in_boxes(other, list_, {"a": "a.jpg"}, {})
    content["annotations"][0]["category_id"] = 999
    content["categories"][3]["name"] = "airplane"
    other.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="category 999, which is not among its own"):
        objects_in_boxes(other, list_, {"a": "a.jpg"}, {})


# --- the command line, on the micro world, whose list and boxes are exact by construction -----------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Twelve scenes; predictions that name one more thing in three of them."""
    folder = tmp_path_factory.mktemp("scenes")
    generate(folder, "val", 12, seed=11, workers=1)
    content = json.loads((folder / "val.json").read_text())
    first = {record["image_id"]: record["caption"] for record in reversed(content["annotations"])}
    names = {category["id"]: category["name"] for category in content["categories"]}
    there = {i: {names[o["category_id"]] for o in content["objects"] if o["image_id"] == i} for i in first}
    for i in (0, 4, 7):
        first[i] = first[i].rstrip(".") + f" and a {next(kind for kind in KINDS if kind not in there[i])}."
    file = folder / "predictions.json"
    file.write_text(json.dumps([{"image_id": i, "caption": caption} for i, caption in first.items()]))
    return folder


def run(scenes, *flags):
    annotations = ["--annotation-file", str(scenes / "val.json"), "--profile", "micro"]
    return evaluate.main(["--pred-file", str(scenes / "predictions.json"), *annotations, *flags])


def test_planted_objects_are_found(scenes, tmp_path, capsys):
    out, images = tmp_path / "scores.json", tmp_path / "images.json"
    flags = ["--metrics", "chair", "--boxes", str(scenes / "val.json"), "--json", str(out), "--per-image", str(images)]
    assert run(scenes, *flags, "--bootstrap", "10", "--compare", str(scenes / "predictions.json")) == 0
    scores, rows = json.loads(out.read_text()), json.loads(images.read_text())
    assert scores["CHAIRs"] == 3 / 12 and 0 < scores["CHAIRi"] < 1 and 0 < scores["CHAIR recall"] <= 1
    assert scores["chair_words"].endswith("object_words.txt") and "with boxes in" in scores["chair_objects"]
    assert sorted(int(name) for name, row in rows.items() if row["objects not there"]) == [0, 4, 7]
    assert [row["CHAIRs"] for row in rows.values()] == [0.0] * 9 + [1.0] * 3  # best first
    text = capsys.readouterr().out
    assert "CHAIRs: 95% interval" in text and "CHAIRi: 95%" not in text


def test_the_objects_are_in_the_table_too(scenes, tmp_path):
    table = tmp_path / "images.csv"
    assert run(scenes, "--metrics", "chair", "--boxes", str(scenes / "val.json"), "--per-image", str(table)) == 0
    header, *rows = table.read_text().splitlines()
    assert header.endswith("caption,objects named,objects not there,objects there") and len(rows) == 12


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--metrics", "chair"), "CHAIR needs --boxes FILE"),
        (("--metrics", "cider", "--boxes", "b.json"), "--boxes b.json: is for --metrics chair"),
        (("--metrics", "chair", "--boxes", "nowhere.json"), "nowhere.json"),
        (("--metrics", "chair", "--boxes", "references", "--chair-words", "no.txt"), "no.txt: no such word list"),
    ],
)
def test_what_is_missing_is_named_in_one_line(scenes, capsys, flags, message):
    assert run(scenes, *flags) == BAD_INPUT
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_the_micro_worlds_list_is_what_its_captions_can_say():
    list_ = ObjectWords.read(PROFILES["micro"].chair_words)
    assert list_.names == {name: kind for kind, k in KINDS.items() for pair in k.names() for name in pair}
