"""Teaching the captioner.

config      every number with its help and limits, the settings   trainer     steps, epochs, validation, resuming
setup       from flags to a trainer                               scst        the trainer with CIDEr-D as a reward
run_folder  what a run folder holds, and finding runs             rewards     CIDEr-D and CLIPScore of captions
trackers    TensorBoard and others beside metrics.jsonl
"""

from captioning.training.config import SETTINGS, TrainConfig
from captioning.training.scst import ScstTrainer
from captioning.training.trainer import Trainer

__all__ = ["SETTINGS", "ScstTrainer", "TrainConfig", "Trainer"]
