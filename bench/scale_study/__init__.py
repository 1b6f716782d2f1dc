"""What a billion captions take on 1, 8 and 512 GPUs, on paper; writes docs/billion_images.md."""
