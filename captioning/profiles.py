"""The two sizes of the suite as names and paths. Nothing else may differ between them: the code is the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent  # of the repository
MICRO_WEIGHTS = ROOT / "microworld" / "weights"


@dataclass(frozen=True)
class Profile:
    """Where one size of the suite finds its models and data; every entry is a default that a flag overrides.

    The full size's files are those that hw3_download.sh writes, relative to the folder of the clone.
    """

    data: str  # folder with train.json, val.json and images/{train,val}/
    decoder_files: tuple[str, ...]  # GPT-2 state dict in Hugging Face layout: the first of these that exists
    tokenizer: str  # folder with encoder.json and vocab.bpe
    encoder: str  # timm model name
    encoder_weights: str | None  # local file; None lets timm take its own pretrained weights
    clip_model: str  # open_clip model name, or a folder with open_clip_config.json
    clip_weights: str | None  # open_clip tag or local file; None for a folder
    llava: str  # hub id, or folder that save_pretrained wrote
    cache: str  # encoder tokens are kept here
    encoder_kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of timm.create_model

    @property
    def decoder(self) -> str:
        """The first of ``decoder_files`` that exists now, or the first one, which a message can then name."""
        return next((file for file in self.decoder_files if Path(file).is_file()), self.decoder_files[0])


def downloaded_encoder(name: str) -> str | None:
    """Return hw3_download.sh's file of the timm encoder ``name`` (tag included), or None if it does not exist.

    A QuickGELU name has the weights of its twin without it.
    """
    file = f"weights/{name.replace('_quickgelu_', '_')}.safetensors"
    return file if Path(file).is_file() else None


PROFILES = {
    "full": Profile(
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
    ),
    "micro": Profile(
        data="demo/data",
        decoder_files=(str(MICRO_WEIGHTS / "decoder" / "decoder_model.safetensors"),),
        tokenizer=str(MICRO_WEIGHTS / "decoder"),
        encoder="vit_base_patch32_clip_224.openai",  # CLIP's ViT layout and preprocessing, cut down by the arguments
        encoder_weights=str(MICRO_WEIGHTS / "encoder" / "open_clip_model.safetensors"),
        encoder_kwargs={"embed_dim": 192, "depth": 6, "num_heads": 3, "patch_size": 8, "img_size": 96, "crop_pct": 1.0},
        clip_model=str(MICRO_WEIGHTS / "scorer"),
        clip_weights=None,
        llava=str(MICRO_WEIGHTS / "llava"),
        cache="demo/cache",
    ),
}
