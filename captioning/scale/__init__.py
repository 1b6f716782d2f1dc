"""Millions of images: shards in, parts and a manifest out."""
