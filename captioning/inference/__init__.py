"""From images to captions.

search       greedy and beam search over a step function       captions    captions of images from their encoder tokens
report_rule  beam search as the report's code ran it           encode      from image files to encoder tokens
batches      entries read ahead and captioned in batches       folder      a folder into one JSON, resumable
append_log   captions kept as they come                        wording     what captions may not say
options      flags of the scripts that caption                 text_files  captions as .txt files
jobs         what either model does to images
"""

from captioning.inference.batches import Job
from captioning.inference.captions import caption_features
from captioning.inference.folder import caption_images
from captioning.inference.report_rule import report_search
from captioning.inference.search import beam_search, greedy

__all__ = ["Job", "beam_search", "caption_features", "caption_images", "greedy", "report_search"]
