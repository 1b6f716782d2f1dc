"""Millions of images: shards in, parts and a manifest out.

pipeline        from flags to captions; a `ShardRun`             sources     folders, pictures, lists, as shards
worker          one process: claim, caption and seal a shard     tar_stream  tars read once, damage noticed
ray_engine      the same by actors of a Ray cluster              manifest    what all shards held and came to
results         a run's folder from its start to its end         duplicate_keys  keys that two shards have
archives        tars and zips as shards
"""

from captioning.scale.pipeline import ShardRun, caption_source
from captioning.scale.sources import Source

__all__ = ["ShardRun", "Source", "caption_source"]
