"""Adapter files: LoRA, projector, and the configuration that rebuilds the captioner around them."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import torch

from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.models.encoder import RANDOM
from captioning.profiles import downloaded_encoder, find
from captioning.tensors import difference, read_tensors
from decoder import Decoder, build_decoder, gpt2_state_dict

log = logging.getLogger(__name__)


def read_adapter(path: str | os.PathLike) -> tuple[CaptionerConfig, dict[str, torch.Tensor]]:
    """Read an adapter file: its config and its tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or is not an adapter of this suite.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--adapter {path}: no such file; train one with p2_train.py, or name another")
    try:
        state, metadata = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"--adapter {error}") from error
    if "captioner" not in metadata:
        raise ValueError(f"--adapter {path}: no adapter of this suite (its header holds no captioner config)")
    try:
        return CaptionerConfig.from_dict(json.loads(metadata["captioner"])), state
    except ValueError as error:  # bad JSON too
        raise ValueError(f"--adapter {path}: {error}") from error


def check_decoder(wanted: str, decoder: Decoder, found: str, allow_other: bool) -> None:
    """Refuse a decoder whose fingerprint is not the wanted one, or with ``allow_other`` warn of it."""
    if wanted in ("", found):
        return
    other = f"the adapter was trained on another decoder {difference(wanted, found, gpt2_state_dict(decoder))}"
    if not allow_other:
        raise ValueError(f"{other}; --allow-other-decoder takes it all the same")
    log.warning("--allow-other-decoder: %s", other)


def load_captioner(
    adapter: Path,
    decoder: Path,
    encoder_weights: str | None,
    device: torch.device,
    fallback: str | None = None,
    allow_other_decoder: bool = False,
) -> Captioner:
    """Rebuild a captioner from its adapter file, LoRA merged, ready to caption.

    The encoder's weights are ``encoder_weights``, or the file that the adapter names, or where that is missing (an
    adapter from another machine) what was downloaded for its encoder, or else ``fallback``; the adapter's fingerprint
    says whether they are the right ones.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or adapter and decoder do not fit.
    """
    config, state = read_adapter(adapter)
    stored = config.encoder_weights
    if not encoder_weights and stored not in (None, RANDOM):
        encoder_weights = (
            find(stored) if Path(find(stored)).exists() else downloaded_encoder(config.encoder) or fallback
        )
    if encoder_weights:
        config = replace(config, encoder_weights=encoder_weights)
    try:
        captioner = Captioner(replace(config, decoder_hash=""), build_decoder(decoder, config.lora))
        check_decoder(config.decoder_hash, captioner.decoder, captioner.config.decoder_hash, allow_other_decoder)
        captioner.load_adapter_state(state)
        captioner.source = Path(adapter)
    except ValueError as error:
        raise ValueError(f"--adapter {adapter} with decoder {decoder}: {error}") from error
    return captioner.to(device).merge()


def start_from(captioner: Captioner, path: Path) -> None:
    """Load an adapter to train it further; ValueError where it belongs to other frozen weights."""
    stored, state = read_adapter(path)
    frozen = {"encoder": captioner.encoder.state_dict(), "decoder": gpt2_state_dict(captioner.decoder)}
    for part, weights in frozen.items():
        wanted, found = (getattr(config, f"{part}_hash") for config in (stored, captioner.config))
        if wanted != found:
            other = difference(wanted, found, weights)
            raise ValueError(f"--init-adapter {path}: was trained on another {part} {other}")
    # The same weights can be used with other preprocessing; JSON makes tuples and lists alike.
    before, now = (json.dumps(dict(config.encoder_kwargs), sort_keys=True) for config in (stored, captioner.config))
    if before != now:
        raise ValueError(f"--init-adapter {path}: its encoder's arguments and preprocessing are {before}, not {now}")
    captioner.load_adapter_state(state)
