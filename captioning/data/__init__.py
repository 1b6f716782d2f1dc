"""From files to tensors.

annotations    references and predictions, checked, matched     listing        which images a folder holds
formats        the layouts that they come in                    images         their pixels, from any format
coco           records in COCO's layout                         metadata       their orientation; pixels without it all
names          which image a name or number means               part_files     captions as JSONL or Parquet
tokenizer      GPT-2's byte-level BPE                           batches        captions packed after their image
feature_cache  the frozen encoder's tokens, kept on disk        hw3_dataset    makes hw3_data/, for hw3_download.sh
ranked         captions that carry scores
"""

import importlib
from typing import Any

_HOMES = {
    "Sample": "annotations",
    "load_split": "annotations",
    "load_image": "images",
    "list_images": "listing",
    "Tokenizer": "tokenizer",
    "PackedBatch": "batches",
    "pack_captions": "batches",
    "FeatureCache": "feature_cache",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import an export at its first use: whatever only reads images and captions starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
