"""The tokenizer equals GPT-2's, and captions keep every token."""

import functools
import json
import shutil

import pytest
import torch

from captioning.data.annotations import Sample
from captioning.data.tokenizer import Tokenizer, encode_captions, tokenizer_files, train_tokenizer
from captioning.imports import import_guarded

TEXTS = ["a red dog runs on the green grass", "the dog doesn't see 12 red birds", "où est le café à l'été ?"] * 3
ODD_TEXTS = [
    "a red dog",
    " leading space",
    "trailing ",
    "  runs   of    spaces ",
    "\ttabs\nand\r\nnewlines\n\n",
    "",
    "don't we'll I'VE they're he'd I'm it's 's",
    "2024 12th 3.14 1,000,000",
    "café où naïve Ångström",
    "e\u0301 ﬁ ™ ½",
    "🐶 👩‍👩‍👧 🇫🇷",
    "一只红色的狗在跑",
    "العربية हिन्दी",
    "\x00\x01\x1f\x7f\x80\xa0\xad",
    "\u200b\u2028\ufeff\ufffd",
    "#version: 0.2 # #",
    "a.b,c;(d)[e]{f}<g>|h|",
    "<|endoftext",
    "UPPER lower MiXed",
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer(TEXTS, 300, folder)
    return folder


def test_tokenizer_equals_the_one_of_transformers(bpe):
    ours = Tokenizer(bpe)
    theirs = import_guarded("transformers").GPT2TokenizerFast(
        vocab=str(bpe / "encoder.json"), merges=str(bpe / "vocab.bpe")
    )
    assert len(theirs) == ours.vocab_size == 300
    assert theirs.eos_token_id == ours.eos_id == 299
    for text in ODD_TEXTS + TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False).strip() == text.strip()
    assert len(ours.encode(TEXTS[0])) < len(TEXTS[0]) / 2  # merges are in use


def test_end_of_text_inside_a_caption_is_plain_text(bpe):
    """transformers turns the characters into the special id, and such a caption would end in its middle."""
    tokenizer = Tokenizer(bpe)
    ids = tokenizer.encode("a dog<|endoftext|> runs")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a dog<|endoftext|> runs"


def test_decode_drops_specials_and_refuses_foreign_ids(bpe):
    tokenizer = Tokenizer(bpe)
    ids = [tokenizer.eos_id, *tokenizer.encode(" a dog "), tokenizer.eos_id]
    assert tokenizer.decode(torch.tensor(ids)) == "a dog"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(tokenizer.encode("狗")[:1]) == "\ufffd"  # a third of a character
    for strange in (300, -1):
        with pytest.raises(ValueError, match=str(strange)):
            tokenizer.decode([strange])


def test_training_is_reproducible_and_its_files_are_gpt2s(bpe, tmp_path):
    again = train_tokenizer(iter(TEXTS), 300, tmp_path)
    for name in ("encoder.json", "vocab.bpe"):
        assert (tmp_path / name).read_bytes() == (bpe / name).read_bytes()
    assert (bpe / "vocab.bpe").read_text(encoding="utf-8").startswith("#version: 0.2\n")
    assert again.eos_id == again.vocab_size - 1
    for byte in range(256):  # every byte has its own id
        assert again.decode(again.encode(f"x{chr(byte)}x")) == f"x{chr(byte)}x"


def test_training_says_when_the_texts_are_too_few_and_refuses_tiny_sizes(tmp_path, caplog):
    assert train_tokenizer(["ab ab"], 500, tmp_path).vocab_size == 258
    assert "258" in caplog.text
    assert train_tokenizer(["ab ab"], 257, tmp_path).vocab_size == 257
    with pytest.raises(ValueError, match="257"):
        train_tokenizer(["ab ab"], 256, tmp_path)


@pytest.mark.parametrize(("skipped", "newline"), [(0, "\r\n"), (1, "\n")])
def test_merges_may_have_windows_line_ends_or_no_version_line(bpe, tmp_path, skipped, newline):
    shutil.copytree(bpe, tmp_path, dirs_exist_ok=True)
    lines = (bpe / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    (tmp_path / "vocab.bpe").write_bytes(newline.join(lines[skipped:]).encode())
    assert Tokenizer(tmp_path).encode(TEXTS[0]) == Tokenizer(bpe).encode(TEXTS[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("encoder.json", "{", "not a JSON file"),
        ("encoder.json", "[1, 2]", "not a vocabulary"),
        ("encoder.json", '{"a": 0, "b": 2}', "not a vocabulary"),
        ("encoder.json", '{"a": [0]}', "not a vocabulary"),
        ("encoder.json", '{"a": 0}', r"lacks <\|endoftext\|>"),
        ("vocab.bpe", "#version: 0.2\na b c\n", "line 2"),
        ("vocab.bpe", "#version: 0.2\nq zzz\n", "line 2"),
        ("vocab.bpe", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_damaged_tokenizer_files_are_refused(bpe, tmp_path, name, content, message):
    shutil.copytree(bpe, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer(tmp_path)
    assert name in str(caught.value)


def test_missing_tokenizer_files_are_named(bpe, tmp_path):
    shutil.copy(bpe / "encoder.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"vocab\.bpe: missing"):
        Tokenizer(tmp_path)


def rename(bpe, folder):
    for ours, theirs in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copy(bpe / ours, folder / theirs)


def save_pretrained(bpe, folder, merges=None):
    """tokenizer.json alone; until transformers 4.20 its merges were strings."""
    files = {"vocab": str(bpe / "encoder.json"), "merges": str(bpe / "vocab.bpe")}
    import_guarded("transformers").GPT2TokenizerFast(**files).save_pretrained(folder)
    if merges:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("write", [rename, save_pretrained, functools.partial(save_pretrained, merges="strings")])
def test_the_names_and_forms_of_transformers(bpe, tmp_path, write):
    write(bpe, tmp_path)
    assert not {"encoder.json", "vocab.bpe"} & {file.name for file in tokenizer_files(tmp_path)}
    ours, same = Tokenizer(bpe), Tokenizer(tmp_path)
    assert (same.eos_id, same.vocab_size) == (ours.eos_id, ours.vocab_size)
    for text in ODD_TEXTS + TEXTS:
        assert same.encode(text) == ours.encode(text), text
        assert same.decode(ours.encode(text)) == text.strip()


def test_the_suites_own_names_come_first_and_half_a_pair_is_none(bpe, tmp_path):
    save_pretrained(bpe, tmp_path)
    shutil.copy(bpe / "encoder.json", tmp_path)
    assert [file.name for file in tokenizer_files(tmp_path)] == ["tokenizer.json"]
    shutil.copy(bpe / "vocab.bpe", tmp_path)
    assert [file.name for file in tokenizer_files(tmp_path)] == ["encoder.json", "vocab.bpe"]
    (tmp_path / "other").mkdir()
    shutil.copy(bpe / "vocab.bpe", tmp_path / "other" / "merges.txt")
    with pytest.raises(FileNotFoundError, match=r"vocab\.json: missing; .*vocab\.bpe, or vocab\.json and merges"):
        Tokenizer(tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.clear(), "not a tokenizer of GPT-2's kind"),
        (
            lambda content: content["model"].update(type="Unigram"),
            "not a tokenizer of GPT-2's kind, which is byte-level",
        ),
        (lambda content: content["pre_tokenizer"].update(add_prefix_space=True), "without prefix space"),
        (lambda content: content.update(pre_tokenizer={"type": "Sequence"}), "not a tokenizer of GPT-2's kind"),
        (lambda content: content.update(normalizer={"type": "NFC"}), "not a tokenizer of GPT-2's kind"),
        (lambda content: content["model"]["merges"].append(["q", "zzz"]), "merges do not belong"),
        (lambda content: content["model"]["merges"].append("a b c"), "not a tokenizer of GPT-2's kind"),
        (lambda content: content["model"]["vocab"].update({"<pad>": 999}), "not a vocabulary"),
    ],
)
def test_other_tokenizers_in_tokenizer_json_are_refused(bpe, tmp_path, change, message):
    save_pretrained(bpe, tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{message}"):
        Tokenizer(tmp_path)


def test_encode_captions_refuses_long_captions_by_name(bpe, tmp_path):
    tokenizer = Tokenizer(bpe)
    samples = [Sample(1, tmp_path / "a.jpg", ("a dog", "a red dog runs on"))]
    lengths = [len(tokenizer.encode(caption)) for caption in samples[0].captions]
    (encoded,) = encode_captions(samples, tokenizer, max(lengths))
    assert [tokenizer.decode(tokens) for tokens in encoded] == list(samples[0].captions)
    assert [len(tokens) for tokens in encoded] == lengths
    with pytest.raises(ValueError, match=rf"a\.jpg: caption 2 has {lengths[1]} tokens, more than {lengths[1] - 1}"):
        encode_captions(samples, tokenizer, lengths[1] - 1)
