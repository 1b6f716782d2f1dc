"""References and predictions of the same images in every layout that is read, for tests of readers and scripts."""

import csv
import hashlib
import io
import json

from scoring_examples import PREDICTIONS, REFERENCES, annotation_content

IDS = {stem: 100 + number for number, stem in enumerate(REFERENCES)}  # as annotation_content numbers the images


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def table(columns, rows, mark=","):
    text = io.StringIO()
    csv.writer(text, delimiter=mark, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


def pairs(of=REFERENCES):
    return [(stem, caption) for stem, captions in of.items() for caption in captions]


def karpathy(folder="val2014", split="test"):
    """As ``dataset_coco.json``, with images of other splits before and after."""
    others = {"x": ["an image to train on"], "y": ["another, held back at first"], "z": ["one to choose by"]}
    splits = {"x": "train", "y": "restval", "z": "val"}
    images = [
        {
            "filepath": folder,
            "filename": f"{stem}.png",
            "cocoid": IDS.get(stem, 900 + ord(stem)),
            "imgid": 1000 - number,
            "sentids": [],
            "split": splits.get(stem, split),
            "sentences": [{"raw": c, "tokens": c.split(), "imgid": 1000 - number, "sentid": 0} for c in captions],
        }
        for number, (stem, captions) in enumerate([("x", others["x"]), *REFERENCES.items(), *list(others.items())[1:]])
    ]
    return {"images": images, "dataset": "coco"}


REFERENCE_FILES = {  # by name of the file, its text
    "coco.json": json.dumps({**annotation_content(), "annotations": annotation_content()["annotations"][::-1]}),
    "karpathy.json": json.dumps(karpathy()),
    "lavis_gt.json": json.dumps(
        {
            "annotations": [{"image_id": IDS[s], "caption": c, "id": IDS[s]} for s, c in pairs()],
            "images": [{"id": IDS[s]} for s in REFERENCES],
        }
    ),
    "lavis_train.json": json.dumps(
        [{"caption": c, "image": f"val2014/{s}.png", "image_id": f"coco_{IDS[s]}"} for s, c in pairs()]
    ),
    "lavis_val.json": json.dumps([{"image": f"val2014/{s}.png", "caption": c} for s, c in REFERENCES.items()]),
    "Flickr8k.token.txt": "".join(f"{s}.png#{n}\t{c}\n" for s, cs in REFERENCES.items() for n, c in enumerate(cs)),
    "captions.txt": table(["image", "caption"], [(f"{s}.png", c) for s, c in pairs()]),
    "results.csv": "image_name| comment_number| comment\n" + "".join(f"{s}.png| 0| {c}\n" for s, c in pairs()),
    "stems.json": json.dumps(REFERENCES),
    "names.json": json.dumps({f"{s}.png": c for s, c in REFERENCES.items()}),
    "coco_tools.json": json.dumps({s: [{"caption": c} for c in captions] for s, captions in REFERENCES.items()}),
    "metadata.jsonl": lines({"file_name": f"{s}.png", "text": c} for s, c in pairs()),
    "without_suffix.jsonl.json": lines({"key": s, "captions": c} for s, c in REFERENCES.items()),
}

PREDICTION_FILES = {
    "flat.json": json.dumps(PREDICTIONS),
    "names.json": json.dumps({f"{s}.png": c for s, c in PREDICTIONS.items()}),
    "other_suffix.json": json.dumps({f"{s}.JPG": c for s, c in PREDICTIONS.items()}),
    "paths.json": json.dumps({f"/data/images/val/{s}.png": c for s, c in PREDICTIONS.items()}),
    "tar_keys.json": json.dumps({f"00/{s}": c for s, c in PREDICTIONS.items()}),
    "lists.json": json.dumps({s: [c] for s, c in PREDICTIONS.items()}),
    "objects.json": json.dumps({s: {"CIDEr": 1.0, "caption": c} for s, c in PREDICTIONS.items()}),
    "coco_tools.json": json.dumps({s: [{"caption": c}] for s, c in PREDICTIONS.items()}),
    "records.json": json.dumps([{"image": f"{s}.png", "caption": c} for s, c in PREDICTIONS.items()]),
    "keys.jsonl": lines({"key": s, "caption": c} for s, c in PREDICTIONS.items()),
    "names.jsonl": lines({"file_name": f"{s}.png", "caption": [c]} for s, c in PREDICTIONS.items()),
    "lines.json": lines({"image": s, "caption": c} for s, c in PREDICTIONS.items()),
    "per_image.csv": table(["image", "CIDEr", "caption"], [(s, 1.0, c) for s, c in PREDICTIONS.items()]),
}
ID_FILES = {  # those that say images by the ids of a file of references that has some
    "ids.json": json.dumps({IDS[s]: c for s, c in PREDICTIONS.items()}),
    "coco_results.json": json.dumps([{"image_id": IDS[s], "caption": c} for s, c in PREDICTIONS.items()]),
    "ids_as_text.json": json.dumps([{"image_id": str(IDS[s]), "caption": c, "id": 7} for s, c in PREDICTIONS.items()]),
    "results.jsonl": lines({"image_id": IDS[s], "caption": c} for s, c in PREDICTIONS.items()),
}


def write_run(folder, parts, form="jsonl"):
    """Write a finished captioning run's folder: parts, each ``{key: caption}``, with its manifest."""
    from captioning.data.part_files import write_part

    folder.mkdir()
    shards = []
    for number, captions in enumerate(parts):
        part = folder / f"{number}.{form}"
        write_part(part, captions.items())
        shards.append({"part": part.name, "part_sha256": hashlib.sha256(part.read_bytes()).hexdigest()})
    (folder / "_manifest.json").write_text(json.dumps({"keys": sum(map(len, parts)), "shards": shards}))
    return folder
