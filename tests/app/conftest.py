"""A studio of the micro models and its server, for tests of the functions and of the page."""

import io
import threading
from pathlib import Path

import pytest
import safetensors
from PIL import Image

from captioning.app.server import Server
from captioning.app.studio import Studio
from captioning.models.adapter import read_adapter
from captioning.profiles import PROFILES
from captioning.tensors import write_tensors

SEED = 1926


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """The micro adapter, and the same without its LoRA's half of all weights: another captioner."""
    own = Path(PROFILES["micro"].adapter)
    with safetensors.safe_open(own, "pt") as file:
        texts = {"captioner": file.metadata()["captioner"]}
    weaker = {name: tensor / 2 if "lora" in name else tensor for name, tensor in read_adapter(own)[1].items()}
    other = tmp_path_factory.mktemp("adapters") / "weaker.safetensors"
    write_tensors(other, weaker, texts)
    return [own, other]


@pytest.fixture(scope="session")
def png():
    """The bytes of a picture."""
    content = io.BytesIO()
    Image.new("RGB", (60, 40), "navy").save(content, "png")
    return content.getvalue()


@pytest.fixture(scope="session")
def studio(adapters, tmp_path_factory):
    return Studio("micro", adapters, tmp_path_factory.mktemp("studio"), device="cpu")


@pytest.fixture(scope="session")
def scenes(studio):
    return studio.draw("val", SEED)


@pytest.fixture(scope="session")
def server(studio):
    with Server(studio, largest=10**6) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()
