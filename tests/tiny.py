"""Names and sizes of the tiny models, for fixtures and for the tests that build such a model themselves."""

VOCAB_SIZE = 1024  # of the micro world's tokenizer
TINY_ENCODER = "vit_base_patch32_clip_224.openai"
TINY_ENCODER_KWARGS = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16, "img_size": 48, "crop_pct": 1.0}
