"""ptb.py against the Java tokenizer: by a table of its answers, and by Java itself where it is installed."""

import ast
import json
import random
import re
import sys
from pathlib import Path

import pytest
from scoring_examples import COURSE_DATA, needs_java

from captioning.profiles import ROOT
from captioning.scoring import ptb
from captioning.scoring.tokenizers import ptb_java, ptb_python

ANSWERS = ROOT / "tests" / "fixtures" / "ptb.json"  # Java's, by `PYTHONPATH=tests python -m tests.scoring.test_ptb`

STRESS = (ROOT / "tests" / "fixtures" / "ptb_stress.txt").read_text(encoding="utf-8").splitlines()


def unescaped(line):
    r"""Resolve the \x and \u escapes of a line, which is otherwise taken literally."""
    return re.sub(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4}))", lambda m: chr(int(m[1] or m[2], 16)), line)


def stress_captions():
    """The lines, and each piece between spaces alone, in the middle and at the end of a caption."""
    lines = [unescaped(line) for line in STRESS]
    pieces = sorted({piece for line in lines for piece in line.split()})
    return lines + [text for piece in pieces for text in (piece, f"a {piece} cat", f"the dog, {piece}.")]


def fuzzed_captions(count, seed=0):
    """Captions of 1 to 12 random pieces, joined without a space half of the time."""
    generator = random.Random(seed)
    pieces = sorted({piece for line in STRESS for piece in unescaped(line).split()})
    return [
        "".join(generator.choice(pieces) + generator.choice(["", " "]) for _ in range(generator.randint(1, 12)))
        for _ in range(count)
    ]


def differences(captions):
    pairs = zip(captions, ptb_java(captions), ptb_python(captions), strict=True)
    return [(caption, java, pure) for caption, java, pure in pairs if java != pure]


def test_the_stress_list_as_java_answered():
    """The one test of the rules that needs no Java."""
    answers = json.loads(ANSWERS.read_text(encoding="utf-8"))
    assert list(answers) == list(dict.fromkeys(stress_captions())), (
        "run PYTHONPATH=tests python -m tests.scoring.test_ptb where Java is"
    )
    assert dict(zip(answers, ptb_python(answers), strict=True)) == answers


@needs_java
def test_the_stress_list_by_java():
    assert differences(stress_captions()) == []


@needs_java
def test_ten_thousand_fuzzed_captions_by_java():
    """Known: a last capital sigma glued to another script is lowered otherwise, and 'tİs passes for 'tis in Java."""
    found = differences(fuzzed_captions(10_000))
    assert [pair for pair in found if not {"Σ", "İ"} & set(pair[0])] == []
    assert len(found) <= 3


@needs_java
def test_every_character_of_the_basic_plane_by_java():
    """Unicode has gained letters since; Python's tables and the jar's differ, and the port follows the jar."""
    characters = [chr(point) for point in range(0x20, 0x10000) if not 0xD800 <= point <= 0xDFFF]
    captions = [f"a{character}b {character} c{character}" for character in characters]
    assert differences(captions) == []


@needs_java
def test_the_courses_captions_by_java():
    if not COURSE_DATA.is_dir():
        pytest.skip("the course's captions are not part of the project")
    content = json.loads((COURSE_DATA / "val.json").read_text(encoding="utf-8"))
    captions = [record["caption"] for record in content["annotations"]]
    captions += json.loads((COURSE_DATA / "pred.json").read_text(encoding="utf-8")).values()
    assert len(captions) == 10735
    assert differences(captions) == []


def test_it_names_its_licence_and_imports_nothing_of_the_suite():
    source = Path(ptb.__file__).read_text(encoding="utf-8")
    assert source.splitlines()[0] == "# SPDX-License-Identifier: GPL-2.0-or-later"
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    assert {module.split(".")[0] for module in modules} <= sys.stdlib_module_names


def test_the_next_caption_decides_on_a_last_single_letter():
    """All captions are one text to the Java tokenizer, whose rule for sentence starts looks past the line's end."""
    assert ptb_python(["vitamin c.", "A cat"]) == ["vitamin c", "a cat"]
    assert ptb_python(["vitamin c.", "a cat"]) == ["vitamin c.", "a cat"]
    assert ptb_python(["vitamin c.", "", "The cat"])[0] == "vitamin c"
    assert ptb_python(["vitamin c."]) == ["vitamin c."]


def test_one_caption_for_one():
    captions = ["one\rtwo", "", " \u2028 ", "three\x0bfour", "<a b='", "c'> d"]
    assert ptb_python(captions) == ["one two", "", "", "three four", "<a\xa0b='", "c'> d"]
    assert ptb_python([]) == []


def test_reading_chunk_by_chunk_gives_what_reading_it_whole_gives(monkeypatch):
    captions = [*stress_captions(), *fuzzed_captions(1000, seed=5)]
    by_chunks = ptb_python(captions)
    monkeypatch.setattr(ptb, "_crossing", lambda: re.compile(""))  # every caption might cross
    assert ptb_python(captions) == by_chunks


def main():
    """Write down Java's answers to the stress list."""
    captions = list(dict.fromkeys(stress_captions()))
    answers = dict(zip(captions, ptb_java(captions), strict=True))
    ANSWERS.write_text(json.dumps(answers, ensure_ascii=True, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
