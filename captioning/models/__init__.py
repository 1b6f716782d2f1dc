"""The captioner (encoder, projector, decoder) and LLaVA."""
