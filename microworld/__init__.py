"""The embedded world: generated scenes with captions and boxes, and small models of the full-size architectures."""
