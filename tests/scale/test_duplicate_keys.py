"""duplicate_keys.py: as a set would find them, but on disk."""

import random

from captioning.scale import duplicate_keys
from captioning.scale.duplicate_keys import DuplicateKeys


def test_repeats_are_found_as_by_a_set(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicate_keys, "BUCKET_KEYS", 80)
    rng = random.Random(0)
    keys = [[f"k{rng.randrange(400)}" for _ in range(rng.randrange(60))] for _ in range(12)]
    seen = set()
    expected = [[row for row, key in enumerate(some) if key in seen or seen.add(key)] for some in keys]
    with DuplicateKeys(tmp_path, sum(map(len, keys))) as table:
        for number, some in enumerate(keys):
            table.add(number, some)
        assert [rows.tolist() for rows in table.rows(len(keys))] == expected
    assert not list(tmp_path.iterdir())
