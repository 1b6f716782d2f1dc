"""The two sizes of the suite as names and paths. Nothing else may differ between them: the code is the same."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent  # of the repository
MICRO_WEIGHTS = ROOT / "microworld" / "weights"
# Encoders above a profile's own, by the setting that takes one; hw3_download.sh has a part of the setting's name.
PRESETS = {
    "best-336": "vit_large_patch14_clip_336.laion2b_ft_in12k_in1k",
    "best-h": "vit_huge_patch14_clip_224.laion2b_ft_in12k_in1k",
    "best-g": "vit_gigantic_patch14_clip_224.laion2b",
}
FOLDERS = {"weights", "hw3_data", "cache", "demo", "runs", "microworld"}  # where the suite's own paths begin


def find(path: str) -> str:
    """Return ``path`` as the working directory has it, or else as it lies beside the scripts; as it is if nowhere."""
    beside = ROOT / path
    return str(beside) if beside.exists() and not Path(path).exists() else path


@dataclass(frozen=True)
class Profile:
    """Where one size of the suite finds its models and data; every entry is a default that a flag overrides.

    The full size's files are those that hw3_download.sh writes. What is read is looked for in the working directory
    first, then beside the scripts; what is written by default, the cache, goes beside the scripts.
    """

    data: str  # folder with train.json, val.json and images/{train,val}/
    decoder_files: tuple[str, ...]  # GPT-2 state dict in Hugging Face layout: the first of these that exists
    tokenizer: str  # folder with encoder.json and vocab.bpe
    encoder: str  # timm model name
    encoder_weights: str | None  # local file; None lets timm take its own pretrained weights
    clip_model: str  # open_clip model name, or a folder with open_clip_config.json
    clip_weights: str | None  # open_clip tag or local file; None for a folder
    llava: str  # folder that save_pretrained wrote
    cache: str  # encoder tokens are kept here
    chair_words: str = "weights/chair_synonyms.txt"  # words for objects, for CHAIR: COCO's
    encoder_kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of timm.create_model
    adapter: str = "runs/best/best.safetensors"  # what the Python call and the page caption with
    presets: dict[str, str] = field(default_factory=dict)  # timm models in place of ``encoder``, by setting

    @property
    def decoder(self) -> str:
        """The first of ``decoder_files`` that exists now, or the first one, which a message can then name."""
        places = [str(place / file) for place in (Path(), ROOT) for file in self.decoder_files]
        return next((file for file in places if Path(file).is_file()), self.decoder_files[0])

    def found(self) -> Profile:
        """Return the profile with its paths as they are found now."""
        read = ("data", "tokenizer", "encoder_weights", "clip_model", "clip_weights", "llava", "chair_words", "adapter")
        paths: dict[str, Any] = {name: find(getattr(self, name)) for name in read if getattr(self, name)}
        return replace(self, **paths, cache=str(ROOT / self.cache))


class Profiles(dict[str, Profile]):
    """Profiles by name, each with its paths as they are found when it is asked for."""

    def __getitem__(self, name: str) -> Profile:
        """Return the profile ``name``."""
        return super().__getitem__(name).found()


def downloaded_encoder(name: str) -> str | None:
    """Return hw3_download.sh's file of the timm encoder ``name`` (tag included), or None if it does not exist.

    That of a preset is named all the same, so that nothing is fetched without the user's knowledge. A QuickGELU name
    has the weights of its twin without it.
    """
    file = find(f"weights/{name.replace('_quickgelu_', '_')}.safetensors")
    return file if Path(file).is_file() or name in PRESETS.values() else None


def download_part(file: str) -> str:
    """Return which part of hw3_download.sh fetches an encoder's weights, by their file."""
    return next((setting for setting, name in PRESETS.items() if Path(file).stem == name), "p2")


def is_hub_id(name: str) -> bool:
    """Whether ``name`` can only be a hub's OWNER/NAME, and not a path of this suite or of this machine.

    Where a folder is missing, its name must not be asked of the hub: anybody may own it there, and serve a model.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return False
    owner = name.split("/")[0]
    return owner.lower() not in FOLDERS and not any((place / owner).exists() for place in (Path(), ROOT))


PROFILES = Profiles(
    full=Profile(
        data="hw3_data/p2_data",
        # hw3_download.sh keeps safetensors; the course's own archive has a .bin
        decoder_files=("hw3_data/p2_data/decoder_model.safetensors", "hw3_data/p2_data/decoder_model.bin"),
        tokenizer="hw3_data/p2_data",
        encoder="vit_large_patch14_clip_224",
        # timm's bare name means this tag; the file is named, so that nothing is fetched without the user's knowledge
        encoder_weights="weights/vit_large_patch14_clip_224.laion2b_ft_in12k_in1k.safetensors",
        clip_model="ViT-B-32-quickgelu",
        clip_weights="weights/ViT-B-32-quickgelu.openai.safetensors",
        llava="weights/llava-1.5-7b-hf",
        cache="cache",
        presets=PRESETS,
    ),
    micro=Profile(
        data="demo/data",
        decoder_files=(str(MICRO_WEIGHTS / "decoder" / "decoder_model.safetensors"),),
        tokenizer=str(MICRO_WEIGHTS / "decoder"),
        encoder="vit_base_patch32_clip_224.openai",  # CLIP's ViT layout and preprocessing, cut down by the arguments
        encoder_weights=str(MICRO_WEIGHTS / "encoder" / "open_clip_model.safetensors"),
        encoder_kwargs={"embed_dim": 192, "depth": 6, "num_heads": 3, "patch_size": 8, "img_size": 96, "crop_pct": 1.0},
        clip_model=str(MICRO_WEIGHTS / "scorer"),
        clip_weights=None,
        llava=str(MICRO_WEIGHTS / "llava"),
        adapter=str(MICRO_WEIGHTS / "adapter" / "adapter.safetensors"),
        cache="demo/cache",
        chair_words=str(ROOT / "microworld" / "object_words.txt"),
    ),
)
