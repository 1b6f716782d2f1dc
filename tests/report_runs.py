"""Folders of finished runs, as p2_train.py and evaluate.py leave them, for tests of the report."""

import io
import json

import numpy as np
from PIL import Image

NAUGHTY = '<script>alert("x")</script> & "quotes"'


def png(colour="red", size=(40, 30)):
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


def write_run(folder, setting="1", epochs=2, done=2, cider=1.25, profile="micro", **train):
    folder.mkdir(parents=True)
    numbers = {"epochs": epochs, "batch_size": 8, "lr": 0.001, "lora_rank": 4, "lora_alpha": 4.0, "seed": 0, **train}
    config = {
        "setting": setting,
        "profile": profile,
        "train": numbers,
        "captioner": {"encoder": NAUGHTY},
        "trainable_parameters": 1234,
        "device": "cpu",
        "versions": {"torch": "2.13.0"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {
            "kind": "epoch",
            "epoch": e,
            "step": 10 * e,
            "train_loss": 1.0,
            "val_loss": 1.1,
            "val_cider": e / 10,
            "seconds": 30.0 * e,
        }
        for e in range(1, done + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "best.safetensors").write_bytes(b"")
    scores = {"CIDEr": cider, "CLIPScore": 1.5, "images": 9, "device": "cpu"}
    (folder / "val_scores.json").write_text(json.dumps(scores))
    return folder


def write_maps(root, image, captions, hot):
    """The maps of an image by both models, as p3_attention.py leaves them; a word of ``hot`` has all in one cell."""
    photo = root / "data" / f"{image}.jpg"
    photo.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (80, 60), "green").save(photo)
    for model, caption in zip(("p1", "p2"), captions, strict=True):
        words = caption.split()
        maps = np.full((len(words), 3, 4), 0.01, dtype=np.float32)
        for place in (words.index(word) for word in hot if word in words):
            maps[place, 1, 2] = 1
        folder = root / "attention" / model
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(
            folder / f"{image}.npz",
            maps=maps,
            words=np.array(words),
            layers=np.arange(2),
            heads="mean",
            method="raw",
            row="predict",
            window=np.array([10.0, 0.0, 70.0, 60.0]),
            caption=caption,
            image=photo.name,
            path=f"../../data/{photo.name}",
            model=model,
            image_mass=np.ones(len(words), dtype=np.float32),
        )
