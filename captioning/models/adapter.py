"""Training that begins with an adapter instead of fresh LoRA: what the adapter decides, and loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from captioning.models.captioner import Captioner, CaptionerConfig, read_adapter


def adopted(stored: CaptionerConfig, given: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the numbers that an adapter decides; ValueError where a flag says otherwise."""
    lora = stored.lora
    numbers = {
        "lora_rank": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "rank_stabilized": False,
        "lora_enable": lora.enable_lora,
        "lora_lm_head": lora.lm_head,
        "cls": stored.use_cls,
        "encoder_layer": stored.encoder_layer,
    }
    for name, value in numbers.items():
        if given.get(name, value) != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {given[name]}: --init-adapter {path} has {value}; leave the flag out")
    return numbers


def start_from(captioner: Captioner, path: Path) -> None:
    """Load an adapter to train on; ValueError where it belongs to other frozen weights."""
    stored, state = read_adapter(path)
    for part in ("encoder", "decoder"):
        wanted, found = (getattr(config, f"{part}_hash") for config in (stored, captioner.config))
        if wanted != found:
            raise ValueError(f"--init-adapter {path}: was trained on another {part} (hash {wanted}, not {found})")
    # The same weights can be fed with other preprocessing; JSON makes tuples and lists alike.
    before, now = (json.dumps(dict(config.encoder_kwargs), sort_keys=True) for config in (stored, captioner.config))
    if before != now:
        raise ValueError(f"--init-adapter {path}: its encoder's arguments and preprocessing are {before}, not {now}")
    captioner.load_adapter_state(state)
