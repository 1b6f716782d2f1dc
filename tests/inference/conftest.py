"""Pictures for the files about folders and batches."""

import pytest
from level_captioner import picture


@pytest.fixture
def images(tmp_path):
    """Seven one-coloured images; number k has the grey level k."""
    folder = tmp_path / "images"
    folder.mkdir()
    for level in range(7):
        (folder / f"{level}.png").write_bytes(picture(level))
    return sorted(folder.iterdir())
