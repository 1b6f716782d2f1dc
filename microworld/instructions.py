"""Questions about a scene and their answers, as the micro LLaVA is taught: LLaVA's visual instruction data in small.

Five styles: a short sentence, the key objects and their state, counting, where something is, and its colour. Every
style is asked in several wordings; two of them are the report's prompts, so that these mean something here.
"""

from __future__ import annotations

import random

from captioning.models.llava import PROMPTS
from microworld.captions import INVERSE, NUMBERS, RELATION_PHRASES, Caption, be, noun_phrase, place_phrase, verb_phrase
from microworld.scene import SIZE, Group, Scene
from microworld.things import KINDS

SHORT = (
    PROMPTS[1],
    "Briefly describe this image.",
    "Describe this image in a sentence.",
    "Describe the image in one short sentence.",
    "Give a short caption for this picture. Thank you.",
    "What does this picture show?",
    "Please write a brief caption.",
)
KEY_OBJECTS = (
    PROMPTS[2],
    "In one sentence, describe the key objects in the image and their state.",
    "Describe the key objects in the image and their state.",
    "Describe every object in the picture and what it does.",
    "What are the objects in this image, and in what state are they?",
)
BENEATH_AND_ABOVE = {"holds": "under", "shelters": "over"}  # as relations of the thing itself, not as "with"
COUNT = ("How many {plural} are there?", "Count the {plural}.", "How many {plural} do you see in this image?")
WHERE = ("Where {be} the {noun}?", "Tell me where the {noun} {be}.", "Where in the image {be} the {noun}?")
COLOUR = ("What colour {be} the {noun}?", "Which colour do you see on the {noun}?", "The {noun} {be} of which colour?")


def conversation(scene: Scene, captions: list[str], rng: random.Random) -> list[tuple[str, str]]:
    """Return question-answer pairs about ``scene``, each to be read as the first after the image.

    Args:
        scene: what the image shows.
        captions: its captions, which answer the questions for a short sentence.
        rng: the source of wording and of what is asked about.
    """
    asked = rng.choice(scene.groups())
    pairs = [(rng.choice(SHORT), caption) for caption in rng.sample(captions, 3)]
    pairs += [(_mostly_first(KEY_OBJECTS, rng), _key_objects(scene, rng)), _count(scene, asked, rng)]
    pairs.append(_where(scene, asked, rng))
    if asked.colour:
        pairs.append((_wording(COLOUR, asked, rng), f"{_subject(asked)} {be(asked)} {asked.colour}."))
    return pairs


def _mostly_first(wordings: tuple[str, ...], rng: random.Random) -> str:
    """Draw a wording, half of the time the first: one answer a scene has to do for all wordings of this style."""
    return wordings[0] if rng.random() < 0.5 else rng.choice(wordings)


def _wording(wordings: tuple[str, ...], group: Group, rng: random.Random) -> str:
    singular, plural = group.kind.names()[0]
    noun = plural if len(group.ids) > 1 else singular
    return rng.choice(wordings).format(be=be(group), noun=noun, plural=plural)


def _subject(group: Group) -> str:
    return "The " + group.kind.names()[0][len(group.ids) > 1]


def _key_objects(scene: Scene, rng: random.Random) -> str:
    """Name every group with all its attributes and what it does: longer than what people say of an image."""
    main = _clause(scene.main, rng).add(place_phrase(scene, scene.main, rng))
    clauses = [" ".join(main.words)]
    if scene.other:
        it = "it" if len(scene.main.ids) == 1 else "them"
        relation = INVERSE[scene.relation]
        where = BENEATH_AND_ABOVE.get(relation) or rng.choice(RELATION_PHRASES[relation])
        clauses.append(" ".join(_clause(scene.other, rng).add(where).add(it).words))
    for extra in scene.extras:
        behind = "in the sky" if extra.in_sky and scene.place != "room" else "behind"
        clauses.append(" ".join(_clause(extra, rng).add(behind).words))
    if len(clauses) == 1:
        clauses[0] += f", {_side(scene.main)} of the picture"
    *first, last = clauses
    sentence = ", ".join(first) + f" and {last}." if first else f"{last}."
    return sentence[0].upper() + sentence[1:]


def _clause(group: Group, rng: random.Random) -> Caption:
    return noun_phrase(Caption(), group, rng, 1.0).add(verb_phrase(group, rng))


def _side(group: Group) -> str:
    centres = [t.box[0] + t.box[2] / 2 for t in group.things]
    share = sum(centres) / len(centres) / SIZE
    return "on the left" if share < 0.36 else "on the right" if share > 0.64 else "in the middle"


def _count(scene: Scene, asked: Group, rng: random.Random) -> tuple[str, str]:
    """Ask for the number of a kind; one time in four of a kind that is not there."""
    present = {g.kind.name for g in scene.groups()}
    if rng.random() < 0.25:
        kind = rng.choice([k for k in KINDS.values() if k.name not in present])
        plural = kind.names()[0][1]
        return rng.choice(COUNT).format(plural=plural), f"There are no {plural}."
    same = [g for g in scene.groups() if g.kind is asked.kind]
    number = sum(len(g.ids) for g in same)
    singular, plural = asked.kind.names()[0]
    there = f"There are {NUMBERS.get(number, str(number))} {plural}." if number > 1 else f"There is one {singular}."
    return rng.choice(COUNT).format(plural=plural), there


def _where(scene: Scene, asked: Group, rng: random.Random) -> tuple[str, str]:
    """Ask where a group is; the answer names its neighbour where it has one, else the side of the picture."""
    question = _wording(WHERE, asked, rng)
    start = f"{_subject(asked)} {be(asked)}"
    if scene.other and asked in (scene.main, scene.other):
        partner, relation = (
            (scene.other, scene.relation) if asked is scene.main else (scene.main, INVERSE[scene.relation])
        )
        phrase = BENEATH_AND_ABOVE.get(relation) or RELATION_PHRASES[relation][0]
        return question, f"{start} {phrase} the {partner.kind.names()[0][len(partner.ids) > 1]}."
    return question, f"{start} {_side(asked)} of the picture."
