"""torchvision is imported beside a torch without its operators, and the guard leaves no trace."""

import sys

import pytest
import torch

from captioning import imports
from captioning.imports import import_guarded

FAKE_TORCHVISION = """
import torch
@torch.library.register_fake("torchvision::surely_missing")
def fake(x):
    return x
"""


@pytest.fixture
def fake_torchvision(tmp_path, monkeypatch):
    """Return a function that puts a package named torchvision with the given source first on the path."""

    def install(source: str) -> None:
        package = tmp_path / "torchvision"
        package.mkdir()
        (package / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    yield install
    sys.modules.pop("torchvision", None)  # monkeypatch then puts the real one back, where there was one


def test_import_guarded_survives_a_torchvision_without_operators(fake_torchvision):
    """PyPI's torchvision beside CPU-only torch: `operator torchvision::nms does not exist` at import."""
    register_fake = torch.library.register_fake
    fake_torchvision(FAKE_TORCHVISION)
    assert import_guarded("torchvision").fake(3) == 3, "the decorated function must come through unchanged"
    assert torch.library.register_fake is register_fake


def test_import_guarded_hides_no_other_missing_operator(fake_torchvision):
    register_fake = torch.library.register_fake
    fake_torchvision(FAKE_TORCHVISION.replace("torchvision::", "another::"))
    with pytest.raises(RuntimeError, match="another::surely_missing"):
        import_guarded("torchvision")
    assert torch.library.register_fake is register_fake, "the guard must go, also when the import fails"


def test_import_guarded_still_registers_operators_that_exist(fake_torchvision, monkeypatch):
    registered = []

    def register_fake(op, *_args, **_kwargs):
        registered.append(op)
        return lambda function: function

    monkeypatch.setattr(torch.library, "register_fake", register_fake)
    monkeypatch.setattr(imports, "_operator_exists", lambda name: True)
    fake_torchvision(FAKE_TORCHVISION)
    import_guarded("torchvision")
    assert registered == ["torchvision::surely_missing"]


@pytest.mark.parametrize("name", ["timm", "open_clip"])
def test_the_real_libraries_import(name):
    assert import_guarded(name).__name__ == name
