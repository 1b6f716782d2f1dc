"""CHAIR (Rohrbach et al. 2018, arXiv 1809.02156): which objects captions name that are not in the pictures.

A word list says which words name which objects: a line for each object, its name first, synonyms after it, ``", "``
between. COCO's is the paper's ``synonyms.txt``; captions are read as the paper's code reads them, in `ObjectWords`.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioning.data.coco import read_object, read_records
from captioning.data.formats import ImageCaptions
from captioning.data.names import Names
from captioning.files import read_text
from captioning.messages import some
from captioning.scoring.coco_metrics import Scores

LABELS = ("CHAIRs", "CHAIRi", "CHAIR recall")
FROM_REFERENCES = "references"  # in place of a file of boxes: only the references say what is there

# Two words that mean one thing, whether the list has it or not: a hot dog is no dog, and a home plate no plate.
PAIRS = (
    "motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, fire hydrant, "
    "stop sign, parking meter, suit case, sports ball, baseball bat, baseball glove, tennis racket, wine glass, "
    "hot dog, cell phone, mobile phone, teddy bear, hair drier, potted plant, bow tie, laptop computer, home plate"
)
# Words for people that say something else before these: a baby bear is no baby, a passenger train no passenger.
ANIMALS = "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, animal, cub"
VEHICLES = "jet, train"
IRREGULAR = {"mice": "mouse", "geese": "goose", "people": "person", "children": "child", "feet": "foot"}
ENDINGS = (("men", "man"), ("ies", "y"), ("ves", "f"), ("ves", "fe"), ("s", ""))
WORD = re.compile(r"\w+(?:-\w+)*|'\w+|[^\w\s]")  # "man's" is two words, a hyphenated one is one


def _listed(text: str) -> list[str]:
    return text.split(", ")


# --- words ----------------------------------------------------------------------------------------------------------


class ObjectWords:
    """Finds objects in captions.

    Args:
        names: the object that a word, or two words, name. As in the paper's code they are compared as they are
            written with captions in lower case: three entries of its list (two begin with a space, ``iPhone`` is not
            in lower case) never match.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names
        self._pairs = {pair: pair for pair in (*_listed(PAIRS), *(n for n in names if n.count(" ") == 1))}
        self._pairs |= {f"{age} {animal}": animal for animal in _listed(ANIMALS) for age in ("baby", "adult")}
        self._pairs |= {f"passenger {vehicle}": vehicle for vehicle in _listed(VEHICLES)}
        self._pairs |= {"bow tie": "tie", "toilet seat": "toilet"}
        self._known = {word for name in (*names, *self._pairs, *self._pairs.values()) for word in name.split()}

    @classmethod
    def read(cls, file: str | os.PathLike) -> ObjectWords:
        """Read a word list.

        Raises:
            FileNotFoundError, ValueError: there is none, or it has another shape, or a word names two objects.
        """
        names: dict[str, str] = {}
        for number, line in enumerate(read_text(file).splitlines(), 1):
            words = _listed(line.strip())
            if not all(word.strip() and not re.search(r"[,;:{}\[\]\t]", word) for word in words):
                raise ValueError(
                    f"{file}: line {number} is {line!r:.60}; a list of object words has a line for each object, its "
                    "name first, then other words for it: bicycle, bike, trike"
                )
            for word in words:
                if names.setdefault(word, words[0]) != words[0]:
                    raise ValueError(f"{file}: {word!r} is a word for {names[word]!r} and for {words[0]!r}; keep one")
        if not names:
            raise ValueError(f"{file}: no object words in it")
        return cls(names)

    def find(self, caption: str) -> list[tuple[str, str]]:
        """Return every (word, object) that a caption names, in its order.

        Two-word names come first, plurals count as their singular, and the seat of a toilet is no chair.
        """
        words = list(self._paired([self._singular(word) for word in WORD.findall(caption.lower())]))
        if "toilet" in words:
            words = [word for word in words if word != "seat"]
        return [(word, self.names[word]) for word in words if word in self.names]

    def places(self, words: Sequence[str]) -> dict[int, str]:
        """Return the objects that a caption names, each by the place of its (last) word among the ``words``."""
        so_far = [self.find(" ".join(words[: n + 1])) for n in range(len(words))]
        named = so_far[-1] if so_far else []
        found = {}
        for count, (_, name) in enumerate(named, 1):
            found[next(n for n, names in enumerate(so_far) if names[:count] == named[:count])] = name
        return found

    def _paired(self, words: Sequence[str]) -> Iterator[str]:
        position = 0
        while position < len(words):
            pair = self._pairs.get(" ".join(words[position : position + 2]))
            yield pair or words[position]
            position += 2 if pair else 1

    def _singular(self, word: str) -> str:
        """Return the singular of a plural that is known, else the word itself."""
        if word in self._known:
            return word
        return next((singular for singular in _singulars(word) if singular in self._known), word)


def _singulars(word: str) -> Iterator[str]:
    """Yield what ``word`` could be the plural of."""
    if word in IRREGULAR:
        yield IRREGULAR[word]
    for plural, singular in ENDINGS:
        if word.endswith(plural):
            yield word.removesuffix(plural) + singular
    if re.search("(s|x|z|ch|sh|o)es$", word):
        yield word.removesuffix("es")


# --- objects --------------------------------------------------------------------------------------------------------


def objects_in_boxes(
    file: str | os.PathLike, words: ObjectWords, file_names: Mapping[str, str], ids: Mapping[str, int]
) -> dict[str, dict[str, list[Any]]]:
    """Return the objects of every image by key, from COCO instances (or the micro world's captions with ``objects``).

    Each object has its boxes: x, y, width and height, or None where a record lacks them.

    Args:
        file: images, categories and boxes.
        words: each category must be a word of it.
        file_names, ids: the images to find, as `Annotations` has them.

    Raises:
        FileNotFoundError, ValueError: the file is missing or has another shape, a category is not in the word list, or
            some of the images are not in the file.
    """
    content = read_object(file)
    categories = {r["id"]: r["name"].lower() for r in read_records(file, content, "categories", "id", "name")}
    unknown = sorted({name for name in categories.values() if name not in words.names})
    if unknown:
        raise ValueError(f"{file}: the word list (--chair-words) lacks {len(unknown)} categories: {some(unknown)}")
    images = read_records(file, content, "images", "id", "file_name")
    keys = Names(file_names, ids).keys(file, [ImageCaptions(r["file_name"], []) for r in images], "names")
    by_id = {image["id"]: key for image, key in zip(images, keys, strict=True) if key is not None}
    missing = [key for key in file_names if key not in set(by_id.values())]
    if missing:
        raise ValueError(
            f"{file}: has the boxes of other images: {len(missing)} of the {len(file_names)} to score are not among "
            f"its {len(images)}: {some(missing)}"
        )
    found: dict[str, dict[str, list[Any]]] = {key: {} for key in file_names}
    boxes = "objects" if "objects" in content else "annotations"
    for record in read_records(file, content, boxes, "image_id", "category_id", optional=True):
        if record["category_id"] not in categories:
            raise ValueError(f"{file}: a box has the category {record['category_id']!r}, which is not among its own")
        if record["image_id"] in by_id:
            name = words.names[categories[record["category_id"]]]
            found[by_id[record["image_id"]]].setdefault(name, []).append(record.get("bbox"))
    return found


# --- scores ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chair:
    """What CHAIR needs beside captions: the words for objects, and which objects the boxes of each image show."""

    words: ObjectWords
    boxed: Mapping[str, set[str]] = field(default_factory=dict)  # by image; none where only references count
    origin: Mapping[str, str] = field(default_factory=dict)  # files, for the record

    @classmethod
    def of_files(
        cls, words: str, boxes: str, file_names: Mapping[str, str], ids: Mapping[str, int] | None = None
    ) -> Chair:
        """Read the word list, and boxes unless they are ``references``; errors as of ``objects_in_boxes``."""
        if not Path(words).is_file():
            raise FileNotFoundError(
                f"{words}: no such word list; fetch COCO's by: bash hw3_download.sh data, or name one by --chair-words"
            )
        list_ = ObjectWords.read(words)
        alone = boxes == FROM_REFERENCES
        found = {} if alone else objects_in_boxes(boxes, list_, file_names, ids or {})
        boxed = {image: set(objects) for image, objects in found.items()}
        there = "those that the references name" + ("" if alone else f" and those with boxes in {boxes}")
        return cls(list_, boxed, {"chair_words": words, "chair_objects": there})

    def there(self, references: Mapping[str, Sequence[str]]) -> dict[str, set[str]]:
        """Return the objects of each image: those with boxes, and those that its references name."""
        found: defaultdict[str, set[str]] = defaultdict(set)
        for image, captions in references.items():
            found[image] |= self.boxed.get(image, set())
            found[image].update(name for caption in captions for _, name in self.words.find(caption))
        return found

    def score(
        self, captions: Mapping[str, str], there: Mapping[str, set[str]]
    ) -> tuple[list[Scores], dict[str, dict[str, list[str]]]]:
        """Return the scores of captions by ``LABELS``, and by image the objects behind them.

        CHAIRs is the share of captions that name an object that is not there, CHAIRi the share of all mentions that
        do, and recall that of the objects there that are named; 0 where there are none to count.
        """
        found = {image: self.words.find(caption) for image, caption in captions.items()}
        wrong = {image: [name for _, name in named if name not in there[image]] for image, named in found.items()}
        right = {image: {name for _, name in named} & there[image] for image, named in found.items()}
        by_sentence = [float(bool(wrong[image])) for image in captions]
        by_mention = [_share(len(wrong[image]), len(found[image])) for image in captions]
        recall = [_share(len(right[image]), len(there[image])) for image in captions]
        return [
            (_share(sum(by_sentence), len(by_sentence)), by_sentence),
            (_share(_count(wrong), _count(found)), by_mention),
            (_share(_count(right), sum(len(there[image]) for image in captions)), recall),
        ], {
            image: {
                "objects named": [name for _, name in found[image]],
                "objects not there": wrong[image],
                "objects there": sorted(there[image]),
            }
            for image in captions
        }


def _share(part: float, total: float) -> float:
    return part / total if total else 0.0


def _count(groups: Mapping[str, Any]) -> int:
    return sum(map(len, groups.values()))
