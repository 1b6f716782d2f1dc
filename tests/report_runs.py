"""Folders of finished runs, as p2_train.py and evaluate.py leave them, for tests of the report."""

import io
import json

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
