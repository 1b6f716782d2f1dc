"""`--report-faithful` against the report's training loop as report_code.py has it, sharing no code with the suite."""

import pytest
import report_code
import torch
from runs import records, weights

from captioning.checkpoints import read_state_dict
from captioning.profiles import PROFILES
from captioning.training.trainer import Trainer
from microworld.scenes import generate
from p2_train import main

pytestmark = pytest.mark.usefixtures("constant_score")

STEPS = 30
FLAGS = (
    "--profile micro --device cpu --setting 1 --report-faithful --epochs 2 --val-images 2 --beam-size 2 "
    "--max-new-tokens 4 --log-every 1"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Training scenes with 240 captions: 15 steps an epoch."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 48), ("val", 2)):
        generate(folder, split, count, seed=3, workers=1)
    return folder


class Watched:
    """What a training began with, and the data of its steps, one caption a row."""

    def __init__(self, monkeypatch):
        self.start, self.batches, self.eos = None, [], None
        take = Trainer.train_step

        def train_step(trainer, batches):
            if self.start is None:
                self.eos = trainer.tokenizer.eos_id
                self.start = {name: tensor.clone() for name, tensor in trainer.captioner.adapter_state().items()}
            (batch,) = (loaded.batch for loaded in batches)
            pairs = [(i, c) for i, group in zip(batch.images, batch.captions, strict=True) for c in group]
            features = trainer.train_split.tokens([image for image, _ in pairs], trainer.device)
            self.batches.append((features, [caption for _, caption in pairs]))
            return take(trainer, batches)

        monkeypatch.setattr(Trainer, "train_step", train_step)


def their_adapter(model, projector):
    """LoRA and projector of transformers' model under our names."""
    lora = {n.replace("transformer.", "decoder."): p for n, p in model.named_parameters() if "lora_" in n}
    return lora | {f"projector.{name}": parameter for name, parameter in projector.named_parameters()}


def test_thirty_steps_of_setting_1_are_those_of_the_reports_loop(data, tmp_path, monkeypatch):
    watched, out = Watched(monkeypatch), tmp_path / "run"
    assert main([*FLAGS.split(), "--data", str(data), "--out", str(out)]) == 0
    losses = [record["loss"] for record in records(out, "step")]
    assert len(losses) == STEPS and {len(captions) for _, captions in watched.batches} == {16}

    model = report_code.build_gpt2(read_state_dict(PROFILES["micro"].decoder), n_head=2, rank=32)
    projector = torch.nn.Linear(*reversed(watched.start["projector.weight"].shape))
    theirs = their_adapter(model, projector)
    assert theirs.keys() == watched.start.keys()
    with torch.no_grad():
        for name, tensor in watched.start.items():
            theirs[name].copy_(tensor)
    wanted = report_code.train_like_the_report(model, projector, watched.batches, watched.eos, lr=5e-5)
    assert losses == pytest.approx(wanted, rel=0, abs=1e-5)
    learned = weights(out, "last")
    assert max((learned[name] - tensor).abs().max() for name, tensor in watched.start.items()) > 1e-3
    for name, tensor in theirs.items():
        assert torch.allclose(learned[name], tensor, rtol=0, atol=1e-5), name
