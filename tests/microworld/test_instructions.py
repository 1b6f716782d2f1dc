"""microworld/instructions.py: questions of every style, and answers that are true."""

import random

import pytest

from captioning.models.llava import PROMPTS
from microworld.composer import make_scene
from microworld.instructions import KEY_OBJECTS, SHORT, conversation
from microworld.things import COLOURS, KINDS

COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5}


@pytest.fixture(scope="module")
def taught():
    """Scenes with their questions and answers."""
    made = [make_scene("pretrain", 4, k) for k in range(300)]
    return [(s, conversation(s, [c.text for c in cs], random.Random(k))) for k, (s, cs) in enumerate(made)]


def test_every_style_is_asked_and_both_of_the_reports_prompts(taught):
    questions = {question for _, pairs in taught for question, _ in pairs}
    assert set(PROMPTS.values()) <= questions
    for start in ("How many", "Where", "What colour"):
        assert any(question.startswith(start) for question in questions)


def test_counts_and_colours_are_true(taught):
    numbers = {"no": 0, "one": 1, **COUNTS}
    counted = 0
    for scene, pairs in taught:
        for _, answer in pairs:
            words = answer.rstrip(".").split()
            if answer.startswith("There") and len(words) == 4 and words[2] in numbers:
                things = [t for t in scene.things() if words[3] in KINDS[t.kind].names()[0]]
                assert len(things) == numbers[words[2]], answer
                counted += 1
            if words[-1] in COLOURS and len(words) == 4 and words[0] == "The":
                assert any(words[1] in KINDS[t.kind].names()[0] and t.colour == words[3] for t in scene.things()), (
                    answer
                )
    assert counted > 150


def test_key_objects_are_all_named_and_at_more_length(taught):
    for scene, pairs in taught:
        answer = next(a for q, a in pairs if q in KEY_OBJECTS)
        for group in scene.groups():
            assert any(name in answer.lower() for names in group.kind.names() for name in names), answer
        assert answer[0].isupper()
        assert answer.endswith(".")
    short = [len(a.split()) for _, pairs in taught for q, a in pairs if q in SHORT]
    long = [len(a.split()) for _, pairs in taught for q, a in pairs if q in KEY_OBJECTS]
    assert sum(long) / len(long) > 1.3 * sum(short) / len(short)
