"""Damage at random, its seed chosen by hypothesis: of bytes whatever they mean, and of JSON that stays JSON."""

import copy
import json
import math

ODD_VALUES = (None, True, -1, 0, 10**30, 0.5, math.nan, math.inf, "", "\x00", "\ud800", "<script>", [], {}, [[]])


def damaged_bytes(content, rng):
    """Return ``content`` with one random damage."""
    place, length = rng.randrange(len(content)), rng.choice((1, 2, 8, 64, 512))
    noise = bytes(rng.randrange(256) for _ in range(length))
    return rng.choice(
        (
            lambda: content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :],
            lambda: content[:place] + noise + content[place + length :],
            lambda: content[:place] + noise + content[place:],
            lambda: content[:place] + content[place + length :],
            lambda: content[:place] + bytes(length) + content[place + length :],
            lambda: content[:place],
            lambda: content[:place] + content[max(0, place - length) :],
            lambda: content + noise,
        )
    )()


def damaged_json(content, rng):
    """Return the JSON ``content`` (bytes) with one value replaced, dropped or doubled, or else damaged as bytes."""
    if rng.random() < 0.4:
        return damaged_bytes(content, rng)
    if rng.random() < 0.1:
        return rng.choice((b"[" * 100_000, content.decode().encode("utf-16"), b"\xef\xbb\xbf" + content, b"", b"null"))
    value = copy.deepcopy(json.loads(content))
    spots = list(_spots(value))
    parent, key = rng.choice(spots)
    kind = rng.randrange(3)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, list):
        parent.append(parent[key])
    else:
        parent[key] = rng.choice(ODD_VALUES)
    return json.dumps(value).encode()


def _spots(value):
    """Yield (container, key or index) of everything within ``value``."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _spots(value[key])
