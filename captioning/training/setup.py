"""From the command line to a trainer that is ready to run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from captioning.data.annotations import Sample, load_split
from captioning.data.batches import pack_captions, shuffle_captions
from captioning.data.tokenizer import Tokenizer, encode_captions
from captioning.device import pick_device, product_dtype, seed_everything
from captioning.distributed import Processes
from captioning.files import atomic_path, check_writable, read_json, write_json
from captioning.inference.captions import check_vocabulary
from captioning.inference.encode import cached_features, prepare_encoder
from captioning.models.adapter import read_adapter, start_from
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.models.encoder import PREPROCESSING, RANDOM, preprocessing_by_name
from captioning.profiles import PRESETS, PROFILES, ROOT, downloaded_encoder
from captioning.scoring.clipscore import ClipScorer
from captioning.tensors import fingerprint
from captioning.training.config import REPORT_FAITHFUL, SCST_NUMBERS, SETTINGS, TrainConfig, as_flag, flag
from captioning.training.loading import Split
from captioning.training.run_folder import RunFolder
from captioning.training.scst import ScstTrainer
from captioning.training.trackers import Trackers
from captioning.training.trainer import Trainer, steps_per_epoch
from decoder import Decoder, DecoderConfig, LoraConfig, build_decoder, gpt2_state_dict

log = logging.getLogger(__name__)

# Best, last, and in each of three states, one of them being written, weights, two moments and the sum of gradients.
FILES_OF_WEIGHTS = 14
FULL_SHARE = 16  # images or captions of a batch that a GPU needs before a part of them takes it clearly less time
FREE = {"log_every", "save_every", "max_skipped", "attention"}  # numbers that may be changed when a run is resumed
# What an option means where a run of another version does not have it: those that are gone, and those that came later.
ABSENT = {"average_last": 0, "rank_stabilized": False, "draws": "beam"} | {
    "batch_by": "images",
    "predict_bos": False,
    "clear_gradients": True,
    "search_rule": "beam",
    "lora_plus": 1.0,
    "pool": 1,
}


def prepare(args: Any, processes: Processes, held: contextlib.ExitStack) -> Trainer:
    """Do what the flags ask for before the first step; ``held`` keeps lock and trackers for as long as the run lasts.

    Raises:
        ValueError, OSError: a flag, a file or the run folder is not what it must be.
    """
    config, samples = resolve_config(args), read_samples(args)
    folder = RunFolder(args.out or Path("runs") / args.setting)
    trackers = open_run(args, folder, processes, held)
    check_writable(cache_folder(args), "--cache")
    trainer = build(args, config, samples, folder, processes)
    check_processes(trainer)
    trainer.captioner.attention = processes.from_first(lambda: find_attention(trainer, args.resume))
    if processes.first:
        described = describe_run(args, config, trainer)
        write_json(folder.config, described)
        if trackers:
            held.enter_context(trackers.started(described))
            trainer.listeners.append(trackers.log)
    return trainer


def plan(args: Any, processes: Processes) -> str:
    """Say how long the training that the flags ask for would be; no image is encoded and no file is written.

    Raises:
        ValueError, OSError: as ``prepare``, but for what has to do with the run folder.
    """
    config, samples = resolve_config(args), read_samples(args)
    captioner, tokenizer = make_models(args, config, processes)
    captions, _ = (encode_split(samples[name], captioner, tokenizer) for name in ("train", "val"))
    steps = steps_per_epoch(config, captions)
    return (
        f"trainable parameters: {count_trainable(captioner):,}\n"
        f"training: {len(captions):,} images with {sum(map(len, captions)):,} captions, {config.batch_size} "
        f"{config.batch_by} a batch, {steps:,} optimiser steps an epoch, {steps * config.epochs:,} in all"
    )


def resolve_config(args: Any) -> TrainConfig:
    """Return the setting's numbers with those of the flags that were given."""
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if getattr(args, f.name) is not None}
    if given.get("objective") == "scst":
        given = SCST_NUMBERS | given
    if args.report_faithful:
        given = REPORT_FAITHFUL | given
    if "lr" in given and "projector_lr" not in given:
        given["projector_lr"] = given["lr"]  # one --lr is meant for both
    if args.init_adapter:
        given |= adopted(read_adapter(args.init_adapter)[0], given, args.init_adapter)
    elif given.get("objective") == "scst":
        raise ValueError("--objective scst tunes a captioner that can caption: name one with --init-adapter")
    return replace(SETTINGS[args.setting], **given)


def adopted(stored: CaptionerConfig, given: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the numbers that an adapter decides; ValueError where a flag says otherwise."""
    lora = stored.lora
    numbers = {
        "lora_rank": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "lora_enable": lora.enable_lora,
        "lora_lm_head": lora.lm_head,
        "cls": stored.use_cls,
        "encoder_layer": stored.encoder_layer,
        "pool": stored.pool,
        "preprocessing": "imagenet" if stored.encoder_kwargs.keys() >= set(PREPROCESSING) else "own",
    }
    for name, value in numbers.items():
        if given.get(name, value) != value:
            raise ValueError(f"{flag(name)} {given[name]}: --init-adapter {path} has {value}; leave the flag out")
    return numbers | {"search_rule": given.get("search_rule", stored.search_rule)}


def open_run(args: Any, folder: RunFolder, processes: Processes, held: contextlib.ExitStack) -> Trackers | None:
    """Find the trackers, then claim the run folder for as long as ``held`` lasts, all in the first process."""
    if not processes.first:
        return None
    trackers = Trackers(args.log_with, folder.path) if args.log_with else None
    held.enter_context(folder.claim(args.resume))
    return trackers


def build(
    args: Any, config: TrainConfig, samples: dict[str, list[Sample]], folder: RunFolder, processes: Processes
) -> Trainer:
    """Build models and data, and load what a resumed or tuned captioner has learned."""
    captioner, tokenizer = make_models(args, config, processes, folder)
    check_run(args, config, captioner, folder, processes)
    if args.init_adapter and not args.resume:
        start_from(captioner, args.init_adapter)
    prepare_encoder(captioner)
    train, val = (make_split(args, samples[name], captioner, tokenizer, processes) for name in ("train", "val"))
    free_encoder(captioner, train, val)
    kind = ScstTrainer if config.objective == "scst" else Trainer
    trainer = kind(captioner, tokenizer, train, val, config, folder, processes)
    if isinstance(trainer, ScstTrainer):
        load_clip(args, trainer)
    if args.resume:
        trainer.resume()
    return trainer


def make_models(
    args: Any, config: TrainConfig, processes: Processes, folder: RunFolder | None = None
) -> tuple[Captioner, Tokenizer]:
    """Build captioner and tokenizer; ValueError where they do not fit, or more is trained than is allowed."""
    seed_everything(config.seed)
    tokenizer = Tokenizer(args.tokenizer or PROFILES[args.profile].tokenizer)
    captioner = make_captioner(args, config, folder, processes).to(pick_device(args.device))
    check_vocabulary(tokenizer, captioner.decoder)
    trainable = count_trainable(captioner)
    if trainable > config.max_trainable:
        raise ValueError(
            f"{trainable:,} trainable parameters exceed --max-trainable {config.max_trainable:,}; lower --lora-rank"
        )
    return captioner, tokenizer


def make_captioner(args: Any, config: TrainConfig, folder: RunFolder | None, processes: Processes) -> Captioner:
    """Build encoder, projector and decoder from the flags, or from the profile where a flag is not given."""
    profile = PROFILES[args.profile]
    name = args.encoder or encoder_of(args.setting, args.profile)
    own = args.encoder in (None, profile.encoder)
    default = profile.encoder_weights if name == profile.encoder else downloaded_encoder(name)
    weights = RANDOM if args.random_weights else args.encoder_weights or default
    log.info("encoder weights: %s", weights or "timm's own, from its cache or the hub")
    captioner_config = CaptionerConfig(
        encoder=name,
        encoder_kwargs=(profile.encoder_kwargs if own else {})
        | (preprocessing_by_name(name) if config.preprocessing == "imagenet" else {}),
        encoder_weights=weights,
        use_cls=config.cls,
        encoder_layer=config.encoder_layer,
        lora=config.lora(),
        search_rule=config.search_rule,
        pool=config.pool,
    )
    return Captioner(captioner_config, make_decoder(args, config.lora(), folder, processes))


def encoder_of(setting: str, profile: str) -> str:
    """Return the timm model of a setting: that of the profile, but for presets; ValueError where it has none of it."""
    found = PROFILES[profile].presets.get(setting)
    if setting in PRESETS and found is None:
        raise ValueError(
            f"--setting {setting}: an encoder of --profile full, of which {profile} has none; take --setting best"
        )
    return found or PROFILES[profile].encoder


def make_decoder(args: Any, lora: LoraConfig, folder: RunFolder | None, processes: Processes) -> Decoder:
    """Load the decoder; with ``--random-weights`` and no ``--decoder`` make a GPT-2 small, in the run folder if any."""
    if args.decoder or not args.random_weights:
        return build_decoder(args.decoder or PROFILES[args.profile].decoder, lora)
    decoder = Decoder(DecoderConfig(), lora)  # the same in all processes, which have one seed
    if processes.first and folder is not None:
        path = folder.path / "decoder_model.safetensors"
        with atomic_path(path) as temporary:
            save_file({k: v.contiguous() for k, v in gpt2_state_dict(decoder).items()}, temporary)
        log.info("random GPT-2 small: %s", path)
    return decoder


def check_run(args: Any, config: TrainConfig, captioner: Captioner, folder: RunFolder, processes: Processes) -> None:
    """Refuse what would fail later, before any image is encoded: a full disk, another run."""
    if not processes.first:
        return
    trainable = count_trainable(captioner)
    print(f"trainable parameters: {trainable:,}")
    check_shares(config, captioner.device, processes.count)
    folder.check_room(FILES_OF_WEIGHTS * 4 * trainable)
    if args.resume:
        check_resumed(folder, fixed(args, config, captioner))


def check_shares(config: TrainConfig, device: torch.device, count: int) -> None:
    """Say where processes have too little of a batch to be worth it."""
    size = config.batch_size
    if size < count:
        idle = "--batch-size %d: %d of the %d processes have no image of a batch and only wait"
        log.warning(idle, size, count - size, count)
    elif device.type == "cuda" and count > 1 and size < count * FULL_SHARE:
        log.warning(
            "--batch-size %d over %d GPUs: a step of %d %s takes a GPU hardly less time than one of %d; several GPUs "
            "encode and validate faster, but train no faster; CUDA_VISIBLE_DEVICES=0 leaves the others free",
            size,
            count,
            size // count,
            config.batch_by,
            FULL_SHARE,
        )


def count_trainable(captioner: Captioner) -> int:
    """Return the number of trained parameters."""
    return sum(p.numel() for p in captioner.trainable().values())


def fixed(args: Any, config: TrainConfig, captioner: Captioner) -> dict[str, Any]:
    """Return what stays the same over a run, whether it is resumed or not."""
    return {
        "train": asdict(config),
        "captioner": asdict(captioner.config),
        "data": str((args.data or Path(PROFILES[args.profile].data)).resolve()),
        "shuffled_captions": args.shuffle_captions,
    }


def check_resumed(folder: RunFolder, now: dict[str, Any]) -> None:
    """Refuse to resume a run with other settings than it was started with."""
    if not folder.config.is_file():
        raise FileNotFoundError(f"--resume: {folder.config} does not exist; start without --resume")
    before, now = read_json(folder.config), json.loads(json.dumps(now))
    preprocessing = "imagenet" if before.get("report_faithful") else "own"  # once part of that flag
    had, wanted = ABSENT | {"preprocessing": preprocessing} | before["train"], ABSENT | now["train"]
    other = [k for k in wanted if k not in FREE and had.get(k) != wanted[k]]
    changed = [f"train.{k}" for k in other]
    now["captioner"].pop("encoder_weights")  # a path, which the place of the start decides; the hash says what it holds
    captioner = {name: ABSENT[name] for name in ("search_rule", "pool")} | before["captioner"]
    changed += [f"captioner.{k}" for k, value in now["captioner"].items() if captioner.get(k) != value]
    changed += [k for k in ("shuffled_captions", "data") if before.get(k) != now[k]]
    if changed:
        flags = " ".join(filter(None, (as_flag(k, had.get(k)) for k in other if k in TrainConfig.__dataclass_fields__)))
        remedy = f"; its own: {flags}" if flags else ""
        raise ValueError(f"--resume: {folder.path} was started with other values of {', '.join(changed)}{remedy}")


def cache_folder(args: Any) -> Path:
    """Return the folder of the encoder's tokens."""
    return args.cache or Path(PROFILES[args.profile].cache)


def read_samples(args: Any) -> dict[str, list[Sample]]:
    """Return the samples of both splits; errors as ``load_split``."""
    samples = {name: load_split(args.data or Path(PROFILES[args.profile].data), name) for name in ("train", "val")}
    if args.shuffle_captions:
        samples["train"] = shuffle_captions(samples["train"], seed=0)
    return samples


def encode_split(samples: list[Sample], captioner: Captioner, tokenizer: Tokenizer) -> list[list[list[int]]]:
    """Return the captions of a split as token ids; ValueError where one exceeds the context."""
    return encode_captions(samples, tokenizer, captioner.decoder.config.n_positions - captioner.n_prefix - 1)


def make_split(
    args: Any, samples: list[Sample], captioner: Captioner, tokenizer: Tokenizer, processes: Processes
) -> Split:
    """Encode a split's captions, then its images once."""
    captions = encode_split(samples, captioner, tokenizer)
    paths = [sample.path for sample in samples]
    features = cached_features(captioner, paths, cache_folder(args), args.cache_gb * 1e9, processes)
    split = Split.of_readable(samples, captions, features)
    if split.unreadable and processes.first:
        log.error("%d of %d images cannot be read; training goes on without them", split.unreadable, len(samples))
    return split


def free_encoder(captioner: Captioner, *splits: Split) -> None:
    """Take the encoder off the device, 1.2 GB for a ViT-L in float32, where no image is left for it to encode."""
    if all(split.features.complete for split in splits):
        captioner.encoder.to("cpu")


def load_clip(args: Any, trainer: ScstTrainer) -> None:
    """Give the trainer the profile's CLIP, for CLIPScore in validation and in the reward; only the reward needs it."""
    profile = PROFILES[args.profile]
    try:
        trainer.use_clip(ClipScorer(profile.clip_model, profile.clip_weights, trainer.device))
    except (FileNotFoundError, ValueError) as error:
        if trainer.config.clip_reward:
            raise
        log.warning("no CLIPScore in validation: %s", error)


def check_processes(trainer: Trainer) -> None:
    """Raise ValueError where the processes do not train the same captioner on the same captions."""
    processes, captioner = trainer.processes, trainer.captioner
    processes.check_same("settings or frozen weights", (asdict(trainer.config), asdict(captioner.config)))
    processes.check_same("adapters", fingerprint(captioner.adapter_state()))
    processes.check_same("captions", (trainer.train_split.captions, trainer.val_split.captions))


def find_attention(trainer: Trainer, resumed: bool) -> str:
    """Return how captions after one image attend in this run; a resumed one goes on as it was, where that is right."""
    captioner, config = trainer.captioner, trainer.config
    dtype = product_dtype(trainer.device, config.precision)
    before = read_json(trainer.folder.config).get("attention") if resumed and config.attention == "auto" else None
    if before is not None:
        return captioner.attention_route("auto" if before == "packed" else before, dtype)
    captions = trainer.processes.share(trainer.batches()[0].captions)
    batch = pack_captions(captions, trainer.tokenizer.eos_id, pad_to_multiple=8).to(trainer.device)
    return captioner.attention_route(config.attention, dtype, batch)


def describe_run(args: Any, config: TrainConfig, trainer: Trainer) -> dict[str, Any]:
    """Return what config.json keeps: settings, captioner, versions, command and git revision."""
    packages = ("torch", "timm", "loralib", "tokenizers", "pycocoevalcap")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout if shutil.which("git") else ""
    return {
        "setting": args.setting,
        "profile": args.profile,
        **fixed(args, config, trainer.captioner),
        "trainable_parameters": count_trainable(trainer.captioner),
        "unreadable_images": {"train": trainer.train_split.unreadable, "val": trainer.val_split.unreadable},
        "init_adapter": str(args.init_adapter.resolve()) if args.init_adapter else None,
        "random_weights": args.random_weights,
        "report_faithful": args.report_faithful,
        "attention": trainer.captioner.attention,
        "device": str(trainer.device),
        "processes": trainer.processes.count,
        "command": sys.argv,
        "git": revision.strip() or None,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
