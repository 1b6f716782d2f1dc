"""From files to tensors.

annotations    caption files and predictions, read strictly     images         which there are, and their pixels
tokenizer      GPT-2's byte-level BPE                           batches        captions packed after their image
feature_cache  the frozen encoder's tokens, kept on disk        hw3_dataset    makes hw3_data/, for hw3_download.sh
"""

from captioning.data.annotations import Sample, load_split
from captioning.data.batches import PackedBatch, pack_captions
from captioning.data.feature_cache import FeatureCache
from captioning.data.images import list_images, load_image
from captioning.data.tokenizer import Tokenizer

__all__ = [
    "FeatureCache",
    "PackedBatch",
    "Sample",
    "Tokenizer",
    "list_images",
    "load_image",
    "load_split",
    "pack_captions",
]
