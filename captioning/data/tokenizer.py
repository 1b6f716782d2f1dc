"""GPT-2's byte-level BPE, and captions as token ids."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from captioning.data.annotations import Sample
from captioning.files import is_integer, read_json, write_json, write_text
from captioning.imports import import_guarded
from captioning.messages import some

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"  # GPT-2 begins and ends every text with it
NUL = "\u0100"  # how byte-level BPE writes the byte 0


FORMS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"), ("tokenizer.json",))  # OpenAI's; transformers'


class Tokenizer:
    """GPT-2's byte-level BPE (Radford et al. 2019), read from ``encoder.json`` and ``vocab.bpe``, or as in FORMS.

    Equal to ``transformers.GPT2TokenizerFast`` with one deliberate exception: the characters ``<|endoftext|>`` inside
    a text are ordinary characters and never the special token, so no caption can end a sequence in its middle.

    Attributes:
        eos_id: id of ``<|endoftext|>``, which is also BOS.
        vocab_size: number of ids, 0 to ``vocab_size - 1``.
        vocab, merges: the model of the BPE; tokens in its own alphabet.

    Raises:
        FileNotFoundError: ``folder`` has none of FORMS complete.
        ValueError: the files are damaged or do not belong together.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        files = tokenizer_files(folder)
        vocab, merges = _read_tokenizer_json(*files) if len(files) == 1 else _read_pair(*files)
        self.eos_id = vocab[END_OF_TEXT]
        self.vocab_size = len(vocab)
        self.vocab, self.merges = vocab, merges
        self._tokenizer = byte_level(tokenizers.models.BPE(vocab=vocab, merges=merges))

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; no special id is added, and the text cannot contain one."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids`` without ``<|endoftext|>`` and without white space at its ends.

        Bytes that are not UTF-8, such as half a character, become U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary (it comes from a decoder with a larger one).
        """
        ids = [int(i) for i in ids]
        strange = [i for i in ids if not 0 <= i < self.vocab_size]
        if strange:
            raise ValueError(f"token ids {some(strange)} are not in this vocabulary of {self.vocab_size}")
        return self._tokenizer.decode([i for i in ids if i != self.eos_id], skip_special_tokens=False).strip()


def for_transformers(ours: Tokenizer, image_token: str) -> Any:
    """Return transformers' form of a tokenizer, in which ``image_token`` stands for the byte 0, which no caption has.

    So the vocabulary stays as it is, and with it every probability: a further token would have one too.
    """
    vocab = {image_token if token == NUL else token: number for token, number in ours.vocab.items()}
    merges = [pair for pair in ours.merges if NUL not in "".join(pair)]
    return import_guarded("transformers").PreTrainedTokenizerFast(
        tokenizer_object=byte_level(tokenizers.models.BPE(vocab=vocab, merges=merges)),
        additional_special_tokens=[image_token],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT),
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | os.PathLike) -> Tokenizer:
    """Train a byte-level BPE on ``texts``, write ``encoder.json`` and ``vocab.bpe`` to ``folder`` and load them.

    The same texts give the same files. All 256 bytes are in the vocabulary, so every text can be encoded, and
    ``<|endoftext|>`` is the last id, as in GPT-2. Where the texts have too few repeated pairs, the vocabulary is
    smaller than requested, and a warning says so.

    Raises:
        ValueError: ``vocab_size`` is below 257: 256 bytes and the end of text.
    """
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"a vocabulary of {vocab_size} is too small; byte-level BPE needs {len(alphabet) + 1} or more")
    trained = byte_level(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    vocab[END_OF_TEXT] = len(vocab)
    if len(vocab) < vocab_size:
        log.warning("the texts give a vocabulary of %d, not the requested %d", len(vocab), vocab_size)
    folder = Path(folder)
    write_json(folder / "encoder.json", vocab, indent=None)
    write_text(folder / "vocab.bpe", "\n".join(["#version: 0.2", *map(" ".join, model["merges"])]) + "\n")
    return Tokenizer(folder)


def byte_level(model: tokenizers.models.BPE) -> tokenizers.Tokenizer:
    """Return a tokenizer that splits texts as GPT-2's does, around a BPE of bytes."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits by GPT-2's regex
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def tokenizer_files(folder: str | os.PathLike) -> list[Path]:
    """Return the files of the tokenizer in ``folder``: of the first of FORMS that is complete there.

    Raises:
        FileNotFoundError: none is.
    """
    forms = [[Path(folder) / name for name in form] for form in FORMS]
    for files in forms:
        if all(file.is_file() for file in files):
            return files
    begun = next((files for files in forms if any(file.is_file() for file in files)), forms[0])
    missing = next(file for file in begun if not file.is_file())
    raise FileNotFoundError(
        f"{missing}: missing; a tokenizer is a folder with {', or '.join(map(' and '.join, FORMS))}; GPT-2's comes "
        "with `bash hw3_download.sh p2`"
    )


def _read_pair(vocab_file: Path, merges_file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocab = _checked_vocab(read_json(vocab_file), vocab_file)
    try:
        lines = merges_file.read_text(encoding="utf-8").split("\n")  # not splitlines: tokens may hold other separators
    except UnicodeDecodeError as error:
        raise ValueError(f"{merges_file}: not UTF-8 text ({error})") from error
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        first, _, second = line.partition(" ")
        if any(token not in vocab for token in (first, second, first + second)):
            raise ValueError(
                f"{merges_file}: line {number} ({line!r:.80}) does not merge two tokens of the {vocab_file.name} "
                "beside it"
            )
        merges.append((first, second))
    return vocab, merges


def _read_tokenizer_json(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read the one file that transformers writes today, if it describes a tokenizer as this one."""
    content = read_json(file)
    try:
        model, before = content["model"], content["pre_tokenizer"]
        kind = (model["type"], before["type"], before["add_prefix_space"], content["normalizer"])
        vocab = model["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        known = all({first, second, first + second} <= vocab.keys() for first, second in merges)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a tokenizer of GPT-2's kind ({type(error).__name__}: {error})") from error
    if kind != ("BPE", "ByteLevel", False, None):
        raise ValueError(f"{file}: not a tokenizer of GPT-2's kind, which is byte-level BPE without prefix space")
    if not known:
        raise ValueError(f"{file}: its merges do not belong to its vocabulary")
    return _checked_vocab(vocab, file), merges


def _checked_vocab(vocab: Any, file: Path) -> dict[str, int]:
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    if not ids or not all(map(is_integer, ids)) or sorted(ids) != list(range(len(ids))):
        raise ValueError(f"{file}: not a vocabulary; expected one object that maps its N tokens to the ids 0 to N - 1")
    missing = [token for token in (END_OF_TEXT, *tokenizers.pre_tokenizers.ByteLevel.alphabet()) if token not in vocab]
    if missing:
        raise ValueError(f"{file}: not a vocabulary of GPT-2's kind; it lacks {some(missing)}")
    return vocab


def encode_captions(samples: Sequence[Sample], tokenizer: Tokenizer, max_tokens: int) -> list[list[list[int]]]:
    """Return the token ids of every caption of every sample, without BOS and EOS.

    Raises:
        ValueError: a caption has more than ``max_tokens`` tokens. Cutting it would teach the model to stop in the
            middle of a sentence.
    """
    encoded = [[tokenizer.encode(caption) for caption in sample.captions] for sample in samples]
    for sample, captions in zip(samples, encoded, strict=True):
        for number, tokens in enumerate(captions, start=1):
            if len(tokens) > max_tokens:
                raise ValueError(
                    f"{sample.path.name}: caption {number} has {len(tokens)} tokens, more than {max_tokens}; shorten "
                    f"it or raise the limit: {sample.captions[number - 1][:60]!r}"
                )
    return encoded
