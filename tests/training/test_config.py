"""config.py: bounds, choices, and flags that come from the fields."""

import argparse
from dataclasses import asdict, fields, replace

import pytest

from captioning.training.config import SETTINGS, TrainConfig, add_flags, as_flag


def flags(*argv):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser)
    return vars(parser.parse_args(argv))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"max_skipped": 0}, "--max-skipped 0: must be at least 1"),
        ({"lr": -1.0}, "--lr -1.0: must be above 0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"projector_lr": 10.0}, "--projector-lr 10.0: must be below 10"),
        ({"label_smoothing": 1.0}, "--label-smoothing 1.0: must be below 1"),
        ({"warmup": -0.1}, "--warmup -0.1: must be at least 0"),
        ({"captions_per_image": 0}, "--captions-per-image 0"),
        ({"projector_epochs": 9}, "--projector-epochs 9: must be from 0 to --epochs"),
        ({"patience": -1}, "--patience -1"),
        ({"encoder_layer": 0}, "--encoder-layer 0: must be below 0"),
        ({"samples": 1}, "--samples 1: must be at least 2"),
        ({"clip_reward": -1.0}, "--clip-reward -1.0"),
        ({"brevity": float("inf")}, "--brevity inf"),
        ({"xe_weight": -1.0}, "--xe-weight -1.0"),
        ({"optimizer": "sgd"}, "--optimizer sgd: choose from adam, adamw"),
        ({"objective": "scst", "label_smoothing": 0.1}, "--label-smoothing is of --objective xe"),
        ({"objective": "scst", "batch_by": "captions"}, "--batch-by captions is of --objective xe"),
        ({"objective": "scst", "predict_bos": True}, "--predict-bos is of --objective xe"),
        ({"preprocessing": "clip"}, "--preprocessing clip: choose from own, imagenet"),
        ({"lora_rank": 0}, "--lora-rank"),
    ],
)
def test_values_out_of_bounds_are_refused_by_flag(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TrainConfig(), **change).lora()


def test_every_field_has_a_flag_that_is_none_until_it_is_given():
    assert flags() == dict.fromkeys(f.name for f in fields(TrainConfig))


def test_flags_parse_to_the_types_of_their_fields():
    given = flags("--epochs", "3", "--lr", "0.1", "--captions-per-image", "2", "--lora-enable", "1,0,1", "--no-cls")
    found = {name: value for name, value in given.items() if value is not None}
    assert found == {
        "epochs": 3,
        "lr": 0.1,
        "captions_per_image": 2,
        "lora_enable": (True, False, True),
        "cls": False,
    }
    for argv, message in (
        (("--lora-enable", "1,2,1"), "--lora-enable: give three of 0 and 1"),
        (("--schedule", "linear"), "invalid choice"),
        (("--epochs", "many"), "invalid int value"),
    ):
        with pytest.raises(argparse.ArgumentError, match=message):
            flags(*argv)


def test_without_report_faithful_the_reports_settings_keep_its_batches_rates_and_epochs_and_no_more():
    for name, epochs in zip("12345", (10, 5, 3, 7, 13), strict=True):
        found = SETTINGS[name]
        assert (found.batch_by, found.batch_size, found.lr, found.epochs) == ("captions", 16, 5e-5, epochs)
        assert (found.predict_bos, found.clear_gradients, found.preprocessing) == (False, True, "own")


def test_the_reports_settings_scale_lora_by_one_over_the_rank():
    assert [round(1 / SETTINGS[name].lora().scaling) for name in "12345"] == [32, 32, 64, 32, 32]
    assert SETTINGS["best"].lora().scaling == 1


@pytest.mark.parametrize("config", [TrainConfig(), *SETTINGS.values(), TrainConfig(cls=False, captions_per_image=2)])
def test_every_value_stands_on_the_command_line_as_it_is_read(config):
    words = " ".join(as_flag(name, value) for name, value in asdict(config).items()).split()
    assert {name: value for name, value in flags(*words).items() if value is not None} == {
        name: value for name, value in asdict(config).items() if value is not None
    }
