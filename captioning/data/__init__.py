"""From files to tensors: images, annotations, tokens, batches, cached features."""
