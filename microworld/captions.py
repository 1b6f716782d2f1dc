"""Five captions for a scene, as five people would write them: other focus, wording and length, same facts.

A caption is built from pieces; a piece that names a thing carries the things' ids, so that every caption can say which
of its words names which box (`Caption.mentions`), which attention maps are later checked against.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from microworld.scene import Group, Scene

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
PLACE_PHRASES = {
    "field": ("in a field", "on the grass", "in a green meadow"),
    "beach": ("on the beach", "on the sand", "by the sea"),
    "snow": ("in the snow", "on a snowy hill", "on the snow"),
    "street": ("on the street", "on the road", "in the city"),
    "room": ("in a room", "on the floor inside", "indoors"),
    "night": ("at night", "in the dark", "under a starry sky"),
}
OVER_PHRASES = {
    "field": ("over a field", "in the sky over the grass"),
    "beach": ("over the beach", "in the sky by the sea"),
    "snow": ("over the snow", "in the winter sky"),
    "street": ("over the street", "in the sky over the city"),
    "room": ("in a room", "indoors"),
    "night": ("in the night sky", "in the dark sky"),
}
SCENE_NOUNS = {
    "field": "country scene",
    "beach": "beach scene",
    "snow": "winter scene",
    "street": "street scene",
    "room": "room",
    "night": "night scene",
}
RELATION_PHRASES = {
    "left": ("to the left of", "left of", "next to", "beside"),
    "right": ("to the right of", "right of", "next to", "beside"),
    "on": ("on", "on top of"),
    "holds": ("with",),
    "under": ("under", "beneath"),
    "shelters": ("over",),
    "above": ("above", "over"),
    "below": ("under", "below"),
}
INVERSE = {
    "left": "right",
    "right": "left",
    "on": "holds",
    "holds": "on",
    "under": "shelters",
    "shelters": "under",
    "above": "below",
    "below": "above",
}


@dataclass(frozen=True)
class Mention:
    """One word of a caption that names something: its index among the white-space words, the things, and how."""

    word: int
    things: tuple[int, ...]
    role: str  # "noun", "colour", "size" or "count"


@dataclass
class Caption:
    """A caption and which of its words name which things."""

    words: list[str] = field(default_factory=list)
    mentions: list[Mention] = field(default_factory=list)

    def add(self, text: str, things: tuple[int, ...] = (), role: str = "") -> Caption:
        """Append the words of ``text``; with ``things`` each of them is a mention."""
        for word in text.split():
            if things:
                self.mentions.append(Mention(len(self.words), things, role))
            self.words.append(word)
        return self

    @property
    def text(self) -> str:
        """The caption as a sentence: capital first, full stop last."""
        sentence = " ".join(self.words)
        return sentence[0].upper() + sentence[1:] + "."


def write_captions(scene: Scene, rng: random.Random) -> list[Caption]:
    """Return five captions of ``scene`` that are not all alike."""
    styles = [_long, _at_place, _relation, _there_is, _short]
    captions: list[Caption] = []
    for style in styles:
        for _ in range(6):  # a few tries for a sentence that is not there yet
            caption = style(scene, rng)
            if caption.text not in {c.text for c in captions}:
                break
        captions.append(caption)
    rng.shuffle(captions)
    return captions


def noun_phrase(caption: Caption, group: Group, rng: random.Random, detail: float = 0.9, article: str = "") -> Caption:
    """Append "a small red bike", "three white sheep", …; ``detail`` is how likely colour and size are named."""
    ids, kind = group.ids, group.kind
    singular, plural = kind.names()[0] if rng.random() < 0.82 else rng.choice(kind.names())
    adjectives = []
    if group.size != "medium" and rng.random() < detail * 0.7:
        adjectives.append(({"small": "small", "big": rng.choice(("big", "large"))}[group.size], "size"))
    if group.colour and rng.random() < detail:
        adjectives.append((group.colour, "colour"))
    first = adjectives[0][0] if adjectives else singular
    if len(ids) > 1:
        caption.add(NUMBERS[len(ids)], ids, "count")
    elif not kind.coloured and kind.name in ("sun", "moon"):
        caption.add("the")
    else:
        caption.add(article or ("an" if first[0] in "aeiou" else "a"))
    for word, role in adjectives:
        caption.add(word, ids, role)
    return caption.add(plural if len(ids) > 1 else singular, ids, "noun")


def verb_phrase(group: Group, rng: random.Random) -> str:
    """Return what the group does: "stands", "are parked", …."""
    verb = rng.choice(group.kind.verbs)
    if len(group.ids) == 1:
        return verb
    head, *rest = verb.split()
    plural = {"is": "are", "flies": "fly"}.get(head, head.removesuffix("s"))
    return " ".join([plural, *rest])


def place_phrase(scene: Scene, group: Group, rng: random.Random) -> str:
    """Return where the group is: "on the beach", "over the street", …."""
    return rng.choice((OVER_PHRASES if group.in_sky else PLACE_PHRASES)[scene.place])


def _relate(caption: Caption, relation: str, rng: random.Random) -> Caption:
    return caption.add(rng.choice(RELATION_PHRASES[relation]))


def _long(scene: Scene, rng: random.Random) -> Caption:
    main, other = scene.main, scene.other
    caption = noun_phrase(Caption(), main, rng, 1.0).add(verb_phrase(main, rng))
    if other and scene.relation not in ("holds", "shelters"):
        noun_phrase(_relate(caption, scene.relation, rng), other, rng, 1.0)
    caption.add(place_phrase(scene, scene.main if not other else _grounded(main, other), rng))
    if other and scene.relation in ("holds", "shelters"):
        caption.add("with")
        noun_phrase(caption, other, rng, 1.0).add("on it" if scene.relation == "holds" else "below")
    if scene.extras:
        extra = rng.choice(scene.extras)
        caption.add("with" if not caption.words.count("with") else "and")
        noun_phrase(caption, extra, rng, 0.7).add("in the sky" if extra.in_sky else "behind")
    return caption


def _grounded(a: Group, b: Group) -> Group:
    return b if a.in_sky else a


def _at_place(scene: Scene, rng: random.Random) -> Caption:
    main = scene.main
    caption = noun_phrase(Caption(), main, rng)
    return caption.add(verb_phrase(main, rng)).add(place_phrase(scene, main, rng))


def _relation(scene: Scene, rng: random.Random) -> Caption:
    if not scene.other:
        caption = Caption().add(rng.choice(("a picture of", "a drawing of", "we see", "look at")))
        return noun_phrase(caption, scene.main, rng, 1.0).add(place_phrase(scene, scene.main, rng))
    first, second, relation = scene.main, scene.other, scene.relation
    if rng.random() < 0.4:
        first, second, relation = second, first, INVERSE[relation]
    if relation == "holds":
        return noun_phrase(noun_phrase(Caption(), first, rng).add("with"), second, rng).add("on it")
    caption = noun_phrase(Caption(), first, rng).add(verb_phrase(first, rng) if rng.random() < 0.6 else be(first))
    return noun_phrase(_relate(caption, relation, rng), second, rng)


def be(group: Group) -> str:
    """Return "is" or "are"."""
    return "are" if len(group.ids) > 1 else "is"


def _there_is(scene: Scene, rng: random.Random) -> Caption:
    main, other = scene.main, scene.other
    if rng.random() < 0.5:
        caption = Caption().add("there").add(be(main))
        caption = noun_phrase(caption, main, rng)
        if other:
            noun_phrase(caption.add("and"), other, rng)
            return caption.add(place_phrase(scene, _grounded(main, other), rng))
        return caption.add(place_phrase(scene, main, rng))
    noun = SCENE_NOUNS[scene.place]
    caption = Caption().add(f"a {noun} with")
    noun_phrase(caption, main, rng)
    if other:
        noun_phrase(caption.add("and"), other, rng)
    elif scene.extras:
        noun_phrase(caption.add("and"), scene.extras[0], rng, 0.7)
    return caption


def _short(scene: Scene, rng: random.Random) -> Caption:
    main, other = scene.main, scene.other
    if other and rng.random() < 0.65:
        first, second = (main, other) if rng.random() < 0.6 else (other, main)
        caption = noun_phrase(Caption(), first, rng, 0.8)
        caption.add(rng.choice(("and", "near", "with")))
        return noun_phrase(caption, second, rng, 0.8)
    caption = noun_phrase(Caption(), main, rng, 0.8)
    return caption.add(place_phrase(scene, main, rng))
