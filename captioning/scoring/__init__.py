"""Scores of captions.

evaluator      the metrics by name, and an `Evaluator` of prediction files; its result is an `Evaluation`
tokenizers     captions as Penn Treebank tokens: by Java (java), or by ptb, a port to Python under the GPL
cider          CIDEr-D on tokens; clipscore: CLIPScore and RefCLIPScore; coco_metrics: BLEU, METEOR, ROUGE-L, SPICE
significance   bootstrap intervals and paired tests; caption_stats: what captions are like
cache          what is kept between runs; gallery: a page of the best and the worst captions
"""

from captioning.scoring.cider import cider_d
from captioning.scoring.clipscore import ClipScorer, clipscore
from captioning.scoring.evaluator import Evaluation, Evaluator, cider
from captioning.scoring.tokenizers import ptb_tokenize

__all__ = ["ClipScorer", "Evaluation", "Evaluator", "cider", "cider_d", "clipscore", "ptb_tokenize"]
