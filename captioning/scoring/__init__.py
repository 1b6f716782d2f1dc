"""Scores of captions: CIDEr, CLIPScore and COCO's others."""
