"""Explanations as files: the npz of an image, which `p3_attention.py` writes beside its picture."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np

from captioning.files import atomic_path
from captioning.maps.attention import CaptionAttention, Explanation, Heads, MapSpec, WordMaps, parse_layers


def save_maps(out: Path, explanation: Explanation, attention: CaptionAttention) -> None:
    """Write the default maps of an explanation, and the attention that they were made from, as a compressed npz.

    ``attention`` (L, nh, T, gh, gw) float16 is the attention of every layer, head and token on the patches; ``maps``
    (W, gh, gw) float32 are the word maps made from it; ``path`` leads from the folder of ``out`` to the image; the
    other arrays say which is which.
    """
    capture, spec = attention.capture, explanation.word_maps[0].spec
    part = capture.image_part(spec.row).numpy().astype(np.float16)
    word_of_token = np.full(len(capture.tokens), -1)
    for number, (_, indices) in enumerate(attention.words):
        word_of_token[indices] = number
    content = io.BytesIO()
    np.savez_compressed(
        content,
        attention=part.reshape(*part.shape[:3], *capture.grid),
        maps=explanation.word_maps[0].maps,
        tokens=np.array(capture.tokens),
        words=np.array(explanation.words),
        word_of_token=word_of_token,
        layers=np.array(parse_layers(spec.layers, capture.n_layer)),
        heads=str(Heads.parse(spec.heads, capture.n_head)),
        method=spec.method,
        row=spec.row,
        grid=np.array(capture.grid),
        window=np.array(explanation.window),
        caption=explanation.caption,
        image=explanation.path.name,
        path=os.path.relpath(os.path.realpath(explanation.path), os.path.realpath(out.parent)),
        model=explanation.model,
        image_mass=attention.image_mass(spec),
    )
    with atomic_path(out) as temporary:
        temporary.write_bytes(content.getvalue())


def load_maps(file: Path) -> Explanation:
    """Return the explanation that :func:`save_maps` wrote, with its default maps.

    Earlier versions kept the image's name alone; its path is then one of a file beside ``file``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or of something else.
    """
    try:
        with np.load(file, allow_pickle=False) as found:
            first, last = found["layers"][[0, -1]]
            layers = str(first) if first == last else f"{first}-{last}"
            spec = MapSpec(str(found["method"]), layers, str(found["heads"]), str(found["row"]))
            return Explanation(
                path=file.parent / str(found["path" if "path" in found else "image"]),
                caption=str(found["caption"]),
                words=found["words"].tolist(),
                word_maps=[WordMaps(spec, found["maps"])],
                window=tuple(found["window"].tolist()),
                model=str(found["model"]),
                image_mass=found["image_mass"],
            )
    except (LookupError, EOFError, zipfile.BadZipFile, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: no maps that can be read ({error}); make them again with p3_attention.py") from error
