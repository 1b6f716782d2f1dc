"""Teaching the captioner: settings, trainer, rewards, run folders."""
