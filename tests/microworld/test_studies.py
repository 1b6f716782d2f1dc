"""microworld/studies.py and steps.py: options as words, one scaling rule, and a study that continues after a stop."""

import json
import math
from dataclasses import replace
from statistics import mean

import pytest

from captioning.models.captioner import CaptionerConfig
from captioning.training.config import SCST_NUMBERS, SETTINGS, TrainConfig
from captioning.training.run_folder import NEWEST
from captioning.training.setup import resolve_config
from microworld import studies
from microworld.steps import Runner, flags, scaled
from microworld.variants import REWARDS, VARIANTS, Variant
from p2_train import build_parser


class Recorder:
    """Stands in for the runner: notes the commands, and leaves what a training and a scoring leave."""

    def __init__(self, stop_at=None):
        self.commands, self.seconds, self.stop_at = [], {}, stop_at

    def __call__(self, title, *arguments, **options):
        words = [*map(str, arguments), *flags(**options)]
        self.commands.append(words)
        if title == self.stop_at:
            folder = studies.Path(words[words.index("--out") + 1])
            folder.mkdir(parents=True)
            (folder / NEWEST).touch()
            raise ValueError("stopped")
        if words[0] == "p2_train.py":
            leave_run(studies.Path(words[words.index("--out") + 1]))
        if words[0] == "evaluate.py":
            scores, images = (studies.Path(words[words.index(flag) + 1]) for flag in ("--json", "--per-image"))
            scores.parent.mkdir(parents=True, exist_ok=True)
            value = len(self.commands) / 10  # later ones are better
            scores.write_text(json.dumps({"CIDEr": value, "CLIPScore": 1.5, "device": "cpu"}))
            rows = {image: {"CIDEr": value + shift, "CLIPScore": 1.5} for image, shift in (("a", 0), ("b", 1))}
            images.write_text(json.dumps(rows))

    def scripts(self):
        return [words[0] for words in self.commands]

    def trained(self):
        return [words for words in self.commands if words[0] == "p2_train.py"]


def leave_run(folder):
    folder.mkdir(parents=True, exist_ok=True)
    train = {"epochs": 1, "batch_size": 8, "lr": 0.1, "lora_rank": 4, "lora_alpha": 4, "seed": 0}
    config = {
        "setting": "1",
        "profile": "micro",
        "train": train,
        "captioner": {},
        "trainable_parameters": 1,
        "device": "cpu",
        "versions": {},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text('{"kind": "epoch", "epoch": 1, "step": 1, "val_loss": 0.5}\n')
    (folder / "best.safetensors").touch()


def test_options_as_words():
    words = flags(batch_size=8, html=True, lora_lm_head=False, seed=None, images=["a", "b"])
    assert words == ["--batch-size", "8", "--html", "--no-lora-lm-head", "--images", "a", "b"]


def test_a_step_that_fails_is_named(tmp_path, capfd):
    run = Runner()
    with pytest.raises(ValueError, match="the step 'draw' failed with exit code 2; see its message above"):
        run("draw", "-m", "microworld.scenes", out=tmp_path, split="val", count=0)
    shown = capfd.readouterr()
    assert "== draw\n$ python -m microworld.scenes" in shown.out and "--count" in shown.err
    assert run.seconds["draw"] > 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_one_rule_scales_every_setting(setting):
    config = resolve_config(build_parser().parse_args(flags(**scaled(setting))))
    full = SETTINGS[setting]
    assert config.epochs == math.ceil(full.epochs / 2)
    assert config.batch_size == full.batch_size / 2
    assert config.lr == pytest.approx(3 * full.lr)
    assert config.projector_lr / config.lr == pytest.approx(full.projector_lr / full.lr, rel=0.01)
    changed = {"epochs", "batch_size", "lr", "projector_lr", "val_images"}
    kept = TrainConfig.__dataclass_fields__.keys() - changed
    assert all(getattr(config, name) == getattr(full, name) for name in kept)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_differs_from_best_in_what_it_names(variant):
    configs = [
        resolve_config(build_parser().parse_args(flags(**scaled("best") | dict(options))))
        for options in ({}, VARIANTS[variant].train)
    ]
    different = {name for name in TrainConfig.__dataclass_fields__ if len({getattr(c, name) for c in configs}) > 1}
    assert different == VARIANTS[variant].train.keys()


@pytest.mark.parametrize("name", studies.SOUND)
def test_every_row_of_the_letter_differs_from_it_in_one_point(name):
    literal, sound = (
        resolve_config(build_parser().parse_args(flags(**studies.recipe("1-letter") | options)))
        for options in ({}, studies.SOUND[name])
    )
    ((field, value),) = studies.SOUND[name].items()
    assert sound == replace(literal, **{field: value}) != literal
    assert (literal.batch_by, literal.lora_alpha, literal.precision) == ("captions", 1, "fp32")


def test_the_letter_is_held_against_each_point_with_every_seed(tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(studies, "Runner", lambda: recorder)
    assert studies.main(["letter", "--out", str(tmp_path), "--seeds", "0", "1"]) == 0
    trained = recorder.trained()
    assert len(trained) == 2 * 6  # to the letter, four points, all of them; beams need no training
    assert ["--report-faithful" in words for words in trained] == [True] * 5 + [False] + [True] * 5 + [False]
    assert not any("--precision" in words for words in trained)  # that is the letter's
    searched = [words for words in recorder.commands if "--search-rule" in words]
    adapters = [studies.Path(words[words.index("--adapter") + 1]).parent.name for words in searched]
    assert adapters == ["1-letter", "1-letter-seed1"]
    assert all(words[words.index("--search-rule") + 1] == "beam" for words in searched)
    found = json.loads((tmp_path / "letter" / "BOS_not_predicted" / "comparison.json").read_text())
    assert (found["what"], found["seeds"], found["profile"], found["device"]) == (
        "BOS not predicted",
        [0, 1],
        "micro",
        "cpu",
    )
    difference = mean(found["sound"]["CIDEr"]) - mean(found["literal"]["CIDEr"])
    assert found["paired"]["CIDEr"]["difference"] == pytest.approx(difference)
    assert found["paired"]["CLIPScore"]["p_value"] == 1
    assert len(list((tmp_path / "letter").glob("*/comparison.json"))) == 6


def test_settings_to_the_letter_are_run_beside_those_with_sound_practice(tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(studies, "Runner", lambda: recorder)
    flags = ["settings", "--out", str(tmp_path), "--only", "2-letter", "2", "--seeds", "0", "1", "--precision", "bf16"]
    assert studies.main(flags) == 0
    trained = recorder.trained()
    names = [studies.Path(words[words.index("--out") + 1]).name for words in trained]
    assert names == ["best", "2-letter", "2", "best-seed1", "2-letter-seed1", "2-seed1"]
    assert ["--report-faithful" in words for words in trained] == [False, True, False] * 2
    assert all(words[words.index("--precision") + 1] == "bf16" for words in trained)
    captioned = [words for words in recorder.commands if words[0] == "p2_infer.py"]
    assert len(captioned) == 2 * len(trained)  # val and val_novel
    found = json.loads((tmp_path / "settings" / "2-letter" / "comparison.json").read_text())
    assert (found["what"], found["against"], found["seeds"]) == ("2-letter", "best", [0, 1])
    difference = mean(found["val_novel"]["2-letter"]["CIDEr"]) - mean(found["val_novel"]["best"]["CIDEr"])
    assert found["val_novel"]["paired"]["CIDEr"]["difference"] == pytest.approx(difference)


def test_a_study_continues_where_it_stopped(tmp_path, monkeypatch, capsys):
    first = Recorder(stop_at="train 2")
    monkeypatch.setattr(studies, "Runner", lambda: first)
    flags = ["settings", "--out", str(tmp_path), "--only", "1", "2", "--seeds", "0"]
    assert studies.main(flags) == 2
    second = Recorder()
    monkeypatch.setattr(studies, "Runner", lambda: second)
    assert studies.main(flags) == 0
    trained = second.trained()
    assert len(trained) == 1
    assert trained[0][trained[0].index("--setting") + 1] == "2"
    assert "--resume" in trained[0]
    assert second.scripts()[-1] == "report.py"
    third = Recorder()
    monkeypatch.setattr(studies, "Runner", lambda: third)
    assert studies.main(flags) == 0
    assert not {"p2_train.py", "p2_infer.py", "evaluate.py"} & set(third.scripts())


def test_further_seeds_of_a_setting_have_their_own_folders(tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(studies, "Runner", lambda: recorder)
    assert studies.main(["settings", "--out", str(tmp_path), "--only", "3", "--seeds", "0", "1"]) == 0
    trained = recorder.trained()
    names = [studies.Path(words[words.index("--out") + 1]).name for words in trained]
    assert names == ["best", "3", "best-seed1", "3-seed1"]
    assert [words[words.index("--seed") + 1] for words in trained] == ["0", "0", "1", "1"]


def study(monkeypatch, *words):
    """Run a study by a recorder, and return that."""
    recorder = Recorder()
    monkeypatch.setattr(studies, "Runner", lambda: recorder)
    assert studies.main([*map(str, words)]) == 0
    return recorder


def value(words, flag):
    return words[words.index(flag) + 1]


@pytest.mark.parametrize(("name", "row"), [("settings", "5"), ("letter", "gradients cleared"), ("variants", "no CLS")])
def test_epochs_instead_of_the_recipes(name, row, tmp_path, monkeypatch):
    trained = study(monkeypatch, name, "--out", tmp_path, "--only", row, "--seeds", 0, "--epochs", 12).trained()
    assert [value(words, "--epochs") for words in trained] == ["12", "12"]


def test_variants_are_held_against_best_with_every_seed_on_both_splits(tmp_path, monkeypatch):
    command = ("variants", "--out", tmp_path, "--only", "no CLS", "rank 16", "--seeds", 0, 2, "--scenes", 20)
    recorder = study(monkeypatch, *command)
    trained = recorder.trained()
    drawn = [words for words in recorder.commands if words[:2] == ["-m", "microworld.scenes"]]
    assert {value(words, "--seed") for words in drawn} == {"1"}  # scenes that no reported number is measured on
    assert {value(w, "--split"): value(w, "--count") for w in drawn} == {
        "train": "1700",
        "val": "20",
        "val_novel": "10",
    }
    assert [(studies.Path(value(w, "--out")).parent.name, value(w, "--seed")) for w in trained] == [
        (name, seed) for seed in ("0", "2") for name in ("best", "no_CLS", "rank_16")
    ]
    captioned = [words for words in recorder.commands if words[0] == "p2_infer.py"]
    assert len(captioned) == 2 * len(trained)
    assert {studies.Path(value(words, "--adapter")).name for words in captioned} == {"last.safetensors"}
    found = json.loads((tmp_path / "variants" / "rank_16" / "comparison.json").read_text())
    assert (found["what"], found["against"], found["seeds"]) == ("rank 16", "best", [0, 2])
    for split in ("val", "val_novel"):
        difference = mean(found[split]["rank 16"]["CIDEr"]) - mean(found[split]["best"]["CIDEr"])
        assert found[split]["paired"]["CIDEr"]["difference"] == pytest.approx(difference)
        assert found[split]["rank 16"]["val_loss"] == [0.5, 0.5]
    assert not (tmp_path / "variants" / "best" / "comparison.json").exists()


def test_a_variant_of_the_search_alone_needs_no_training(tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "greedy", Variant(search={"beam_size": 1}, adapter_of="no CLS"))
    recorder = study(monkeypatch, "variants", "--out", tmp_path, "--only", "greedy", "--seeds", 1)
    assert [studies.Path(value(words, "--out")).parent.name for words in recorder.trained()] == ["best", "no_CLS"]
    greedy = [words for words in recorder.commands if "--beam-size" in words]
    assert [studies.Path(value(words, "--adapter")).parents[1].name for words in greedy] == ["no_CLS"] * 2
    assert (tmp_path / "variants" / "greedy" / "comparison.json").is_file()


def test_a_study_of_variants_that_is_done_runs_nothing_again(tmp_path, monkeypatch):
    command = ("variants", "--out", tmp_path, "--only", "no CLS", "--seeds", 0)
    study(monkeypatch, *command)
    again = study(monkeypatch, *command)
    assert not {"p2_train.py", "p2_infer.py", "evaluate.py"} & set(again.scripts())


def test_rewards_begin_where_cross_entropy_has_levelled_off(tmp_path, monkeypatch):
    losses = iter([2.0, 1.5, 1.2, 1.1999])  # best; two runs that still bring something; one that does not
    monkeypatch.setattr(studies, "last_loss", lambda folder: next(losses, 1.0))
    trained = study(monkeypatch, "rewards", "--out", tmp_path, "--seeds", 4, "--precision", "bf16").trained()
    names = [studies.Path(value(words, "--out")).parent.name for words in trained]
    levels = ["level_1", "level_2", "level_3"]
    assert names == ["start", *levels, "more_cross-entropy", "cider", "cider+clip"]
    tuned = trained[-3:]
    assert {studies.Path(value(words, "--init-adapter")).parent.parent.name for words in tuned} == {"level_2"}
    assert [value(words, "--objective") for words in tuned] == ["xe", "scst", "scst"]
    assert ["--clip-reward" in words for words in tuned] == [False, False, True]
    same = ("--lr", "--batch-size", "--epochs", "--val-images", "--seed", "--precision")
    assert len({tuple(value(words, flag) for flag in same) for words in tuned}) == 1
    assert value(tuned[0], "--seed") == "4"
    assert float(value(tuned[0], "--lr")) == pytest.approx(3 * SCST_NUMBERS["lr"])
    assert len({value(words, "--seed") for words in trained[1:]}) == 4  # each of the levels has an order of its own
    assert {path.parent.name for path in (tmp_path / "rewards").glob("*/comparison.json")} == {
        "start",
        "cider",
        "cider+clip",
    }


def test_rewards_from_an_adapter_share_one_start(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "last_loss", lambda folder: 1.0)
    command = ("rewards", "--out", tmp_path, "--seeds", 0, 1, "--only", "cider", "--start", tmp_path / "a.safetensors")
    trained = study(monkeypatch, *command, "--epochs", 1).trained()
    names = [studies.Path(value(words, "--out")).parent.name for words in trained]
    assert names == ["level_1", "level_2", *["more_cross-entropy", "cider"] * 2]
    assert value(trained[0], "--init-adapter") == str(tmp_path / "a.safetensors")
    assert {value(words, "--epochs") for words in trained} == {"1"}


@pytest.mark.parametrize("row", REWARDS)
def test_further_cross_entropy_is_as_long_as_each_reward_and_by_the_same_schedule(row, tmp_path, monkeypatch):
    study_of = studies.Study(None, studies.build_parser().parse_args(["rewards"]))
    monkeypatch.setattr("captioning.training.setup.read_adapter", lambda path: (CaptionerConfig("vit"), {}))
    adapter = {"init_adapter": tmp_path}
    further, config = (
        resolve_config(build_parser().parse_args(flags(**adapter, **REWARDS[name], **study_of.tuning())))
        for name in ("more cross-entropy", row)
    )
    same = ("epochs", "lr", "projector_lr", "schedule", "warmup", "weight_decay", "optimizer", "batch_size", "batch_by")
    assert all(getattr(config, name) == getattr(further, name) for name in same)
    assert config.epochs == 2


@pytest.mark.parametrize(
    "flags",
    [
        ("rewards", "--only", "bleu"),
        ("settings", "--only", "9"),
        ("variants", "--only", "x"),
        ("variants", "--scenes", "0"),
    ],
)
def test_names_and_numbers_that_do_not_exist_are_refused(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(studies, "Runner", Recorder)
    assert studies.main([*flags, "--out", str(tmp_path)]) == 2
    assert f"{flags[1]} {flags[2]}" in capsys.readouterr().err
