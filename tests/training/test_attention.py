"""How captions attend in a training run: found out at the start, recorded, the same in all processes, and kept."""

import json

import pytest
from runs import records, train

from captioning.cli import BAD_INPUT
from captioning.distributed import Processes
from captioning.kernels import attention_route
from captioning.models import captioner as captioner_module
from captioning.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("constant_score", "micro")


@pytest.fixture(autouse=True)
def undecided(monkeypatch):
    monkeypatch.setattr(attention_route, "_decided", {})


@pytest.fixture
def routes(monkeypatch):
    """Which route each pass took."""
    taken = []
    loss = captioner_module.Captioner.loss
    noted = lambda self, *given, **more: taken.append(self.attention) or loss(self, *given, **more)  # noqa: E731
    monkeypatch.setattr(captioner_module.Captioner, "loss", noted)
    return taken


def recorded(out):
    return json.loads((out / "config.json").read_text())["attention"]


def fail(*asked):
    raise RuntimeError("this card has no such kernel")


def test_either_route_trains_to_the_same_losses_and_is_recorded(tmp_path, routes):
    found = {}
    for route in ("auto", "mask"):
        assert train(tmp_path / route, "--attention", route) == 0
        found[route] = [line["loss"] for line in records(tmp_path / route, "step")]
    assert (recorded(tmp_path / "auto"), recorded(tmp_path / "mask")) == ("packed", "mask")
    assert set(routes) == {"packed", "mask"}
    assert found["auto"] == pytest.approx(found["mask"], abs=1e-5)


def test_where_packed_attention_fails_one_warning_comes_and_the_run_goes_on(tmp_path, monkeypatch, caplog, routes):
    monkeypatch.setattr(attention_route, "check", fail)
    assert train(tmp_path / "run") == 0
    assert recorded(tmp_path / "run") == "mask"
    assert set(routes) == {"mask"}
    assert len([message for message in caplog.messages if "no such kernel" in message]) == 1


def test_a_resumed_run_keeps_its_route_unless_told_otherwise(tmp_path, monkeypatch, routes):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(attention_route, "check", fail)
        patch.setattr(
            Trainer, "asked_to_stop", lambda self: setattr(self, "stopping", self.progress.step == 2) or self.stopping
        )
        train(out)
    attention_route._decided.clear()
    for flags, route in (((), "mask"), (("--attention", "packed"), "packed"), ((), "packed")):
        routes.clear()
        assert train(out, "--resume", *flags) == 0
        assert recorded(out) == route
    attention_route._decided.clear()
    monkeypatch.setattr(attention_route, "check", fail)  # another machine
    assert train(out, "--resume") == 0
    assert recorded(out) == "mask"


def test_a_run_of_an_earlier_version_is_resumed(tmp_path):
    assert train(tmp_path / "run") == 0
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    del config["attention"], config["train"]["attention"]
    path.write_text(json.dumps(config))
    assert train(tmp_path / "run", "--resume") == 0
    assert recorded(tmp_path / "run") == "packed"


def test_all_processes_take_what_the_first_one_found(tmp_path, monkeypatch, routes):
    ask = Processes.from_first

    def from_first(self, work):
        result = ask(self, work)
        return "mask" if result == "packed" else result  # the first process has another card

    monkeypatch.setattr(Processes, "from_first", from_first)
    assert train(tmp_path / "run") == 0
    assert set(routes) == {"mask"}


def test_packed_without_a_kernel_is_refused_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(captioner_module, "can_attend_packed", lambda *asked: False)
    assert train(tmp_path / "run", "--attention", "packed") == BAD_INPUT
    assert "--attention packed: no kernel for heads of 64" in capsys.readouterr().err
