"""microworld/captions.py: captions are true of their scenes, and mentions point at the right words."""

from captioning.data.tokenizer import Tokenizer
from microworld.things import COLOURS, KINDS

COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5}


def test_five_captions_mostly_distinct_of_eight_to_twelve_words(scenes):
    captions = [caption for _, five in scenes["train"] for caption in five]
    assert all(len(five) == 5 for _, five in scenes["train"])
    distinct = [len({caption.text for caption in five}) for _, five in scenes["train"]]
    assert min(distinct) >= 2
    assert sum(distinct) > 4.8 * 500
    assert 8 <= sum(len(caption.words) for caption in captions) / len(captions) <= 12
    assert max(len(caption.words) for caption in captions) <= 30


def test_mentions_point_at_words_that_name_their_things(all_scenes):
    for scene, captions in all_scenes:
        things = {thing.id: thing for thing in scene.things()}
        for caption in captions:
            words = caption.text.rstrip(".").lower().split()  # as the annotation file has them
            assert len(words) == len(caption.words)
            assert any(mention.role == "noun" for mention in caption.mentions)
            for mention in caption.mentions:
                word, named = words[mention.word], [things[i] for i in mention.things]
                plural = len(named) > 1
                for thing in named:
                    expected = {
                        "noun": {names[plural] for names in KINDS[thing.kind].names()},
                        "colour": {thing.colour},
                        "size": {"small"} if thing.size == "small" else {"big", "large"},
                        "count": {key for key, count in COUNTS.items() if count == len(named)},
                    }[mention.role]
                    assert word in expected, (caption.text, mention)


def test_every_colour_and_thing_that_a_caption_names_is_a_mention(all_scenes):
    """A caption that names a colour or a thing outside of its mentions would go unchecked above."""
    nouns = {name for kind in KINDS.values() for pair in kind.names() for name in pair}
    for _, captions in all_scenes:
        for caption in captions:
            marked = {mention.word for mention in caption.mentions}
            named = {n for n, word in enumerate(caption.words) if word in COLOURS or word in nouns}
            others = {caption.words[n : n + 2] == ["green", "meadow"] for n in named - marked}  # part of a place's name
            assert others <= {True}, caption.text


def test_what_captions_say_of_left_right_above_and_below_is_true(all_scenes):
    true = {
        ("left", "of"): lambda a, b: a[0] + a[2] <= b[0],
        ("right", "of"): lambda a, b: b[0] + b[2] <= a[0],
        ("above",): lambda a, b: a[1] + a[3] <= b[1],
        ("beneath",): lambda a, b: a[1] + a[3] > b[1] + 0.5 * b[3],
        ("top", "of"): lambda a, b: a[1] < b[1] + 0.6 * b[3],
    }
    seen = set()
    for scene, captions in all_scenes:
        boxes = {thing.id: thing.box for thing in scene.things()}
        for caption in captions:
            nouns = [m for m in caption.mentions if m.role == "noun"]
            for n in range(len(caption.words)):
                for phrase, holds in true.items():
                    if tuple(caption.words[n : n + len(phrase)]) == phrase:
                        before = [m for m in nouns if m.word < n][-1]
                        after = next(m for m in nouns if m.word > n)
                        assert holds(boxes[before.things[0]], boxes[after.things[0]]), caption.text
                        seen.add(phrase)
    assert seen == set(true)


def test_captions_are_sentences_with_the_right_article(all_scenes):
    for _, captions in all_scenes:
        for caption in captions:
            text = caption.text
            assert text[0].isupper(), text
            assert text.endswith("."), text
            assert "  " not in text
            for article, word in zip(caption.words, caption.words[1:], strict=False):
                if article in ("a", "an"):
                    assert (article == "an") == (word[0] in "aeiou"), text


def test_captions_fit_the_tokenizer_and_come_back_from_it(scenes, tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder)
    for _, captions in scenes["val_novel"][:100]:
        for caption in captions:
            ids = tokenizer.encode(caption.text)
            assert tokenizer.decode(ids) == caption.text
            assert len(ids) <= 40
