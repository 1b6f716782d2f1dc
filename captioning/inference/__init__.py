"""From images to captions."""
