"""From the command line to a trainer that is ready to run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from captioning import device as device_module
from captioning.data.annotations import load_split
from captioning.data.batches import shuffle_captions
from captioning.data.tokenizer import Tokenizer, encode_captions
from captioning.device import seed_everything
from captioning.distributed import Processes
from captioning.files import atomic_path, read_json, write_json
from captioning.inference.captions import check_vocabulary
from captioning.inference.encode import cached_features
from captioning.models.adapter import read_adapter, start_from
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.models.encoder import RANDOM, preprocessing_by_name
from captioning.profiles import PROFILES, downloaded_encoder
from captioning.scoring.clipscore import ClipScorer
from captioning.tensors import fingerprint
from captioning.training.config import SCST_NUMBERS, SETTINGS, TrainConfig, flag
from captioning.training.run_folder import check_room, has_state, lock_folder
from captioning.training.scst import ScstTrainer
from captioning.training.trackers import Trackers
from captioning.training.trainer import Split, Trainer
from decoder import Decoder, DecoderConfig, LoraConfig, build_decoder, gpt2_state_dict

log = logging.getLogger(__name__)

FILES_OF_WEIGHTS = 11  # best, last, and weights with two moments in each of three states, one of them being written


REMOVED = {"average_last": 0, "rank_stabilized": False, "draws": "beam"}  # options of earlier versions: off


FREE = ("train.log_every", "train.save_every", "train.max_skipped")  # a resumed run may have other values of these


def make_decoder(args: Any, lora: LoraConfig, out: Path, processes: Processes) -> Decoder:
    """Load the decoder, or with ``--random-weights`` and no ``--decoder`` make a GPT-2 small in the run folder."""
    if args.decoder or not args.random_weights:
        return build_decoder(args.decoder or PROFILES[args.profile].decoder, lora)
    decoder = Decoder(DecoderConfig(), lora)  # the same in all processes, which have one seed
    if not processes.first:
        return decoder
    with atomic_path(out / "decoder_model.safetensors") as temporary:
        save_file({k: v.contiguous() for k, v in gpt2_state_dict(decoder).items()}, temporary)
    log.info("random GPT-2 small: %s", out / "decoder_model.safetensors")
    return decoder


def make_captioner(args: Any, config: TrainConfig, out: Path, processes: Processes) -> Captioner:
    """Build encoder, projector and decoder from the flags, or from the profile where a flag is not given."""
    profile = PROFILES[args.profile]
    own = args.encoder is None or args.encoder == profile.encoder
    default = profile.encoder_weights if own else downloaded_encoder(args.encoder)
    weights = RANDOM if args.random_weights else args.encoder_weights or default
    log.info("encoder weights: %s", weights or "timm's own, from its cache or the hub")
    name = args.encoder or profile.encoder
    captioner_config = CaptionerConfig(
        encoder=name,
        encoder_kwargs=(profile.encoder_kwargs if own else {})
        | (preprocessing_by_name(name) if args.report_faithful else {}),
        encoder_weights=weights,
        use_cls=config.cls,
        encoder_layer=config.encoder_layer,
        lora=config.lora(),
    )
    return Captioner(captioner_config, make_decoder(args, config.lora(), out, processes))


def check_trainable(captioner: Captioner, limit: int) -> int:
    """Return the number of trained parameters; refuse more than ``limit``."""
    count = sum(p.numel() for p in captioner.trainable().values())
    if count > limit:
        raise ValueError(f"{count:,} trainable parameters exceed --max-trainable {limit:,}; lower --lora-rank")
    return count


def prepare_split(args: Any, name: str, captioner: Captioner, tokenizer: Tokenizer, processes: Processes) -> Split:
    """Read a split, check its captions against the context, and encode its images once."""
    profile = PROFILES[args.profile]
    samples = load_split(args.data or Path(profile.data), name)
    if name == "train" and args.shuffle_captions:
        samples = shuffle_captions(samples, seed=0)
    room = captioner.decoder.config.n_positions - captioner.n_prefix - 1
    captions = encode_captions(samples, tokenizer, room)
    if not args.cache_gb >= 0:
        raise ValueError(f"--cache-gb {args.cache_gb}: must be 0 or more")
    folder = args.cache or Path(profile.cache)
    paths = [s.path for s in samples]
    features = cached_features(captioner, paths, folder, args.cache_gb * 1e9, processes)
    return Split(samples, captions, features)


def describe_run(
    args: Any, config: TrainConfig, captioner: Captioner, trainable: int, processes: Processes
) -> dict[str, Any]:
    """Return what config.json keeps: settings, captioner, versions, command and git revision."""
    packages = ("torch", "timm", "loralib", "tokenizers", "pycocoevalcap")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout if shutil.which("git") else ""
    return {
        "setting": args.setting,
        "profile": args.profile,
        "train": asdict(config),
        "captioner": asdict(captioner.config),
        "trainable_parameters": trainable,
        "data": str((args.data or Path(PROFILES[args.profile].data)).resolve()),
        "shuffled_captions": args.shuffle_captions,
        "init_adapter": str(args.init_adapter.resolve()) if args.init_adapter else None,
        "random_weights": args.random_weights,
        "report_faithful": args.report_faithful,
        "device": str(captioner.device),
        "processes": processes.count,
        "command": sys.argv,
        "git": revision.strip() or None,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def check_resumed_config(out: Path, described: dict[str, Any]) -> None:
    """Refuse to go on with other settings than the run was begun with."""
    path = out / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {path} does not exist; start without --resume")
    before = read_json(path)
    now = json.loads(json.dumps(described))
    parts = ("train", "captioner")
    changed = [f"{part}.{k}" for part in parts for k in now[part] if now[part][k] != before[part].get(k)]
    changed = [name for name in changed if name not in FREE]
    changed += [f"train.{k}" for k, value in REMOVED.items() if before["train"].get(k, value) != value]
    changed += [k for k in ("shuffled_captions", "data") if now[k] != before.get(k)]
    if changed:
        raise ValueError(f"--resume: {out} was begun with other values of {', '.join(changed)}")


def resolve_config(args: Any) -> TrainConfig:
    """Return the setting's numbers with those of the flags that were given."""
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if getattr(args, f.name) is not None}
    if given.get("objective") == "scst":
        given = SCST_NUMBERS | given
    if args.report_faithful:
        given = {"lora_alpha": 1.0, "encoder_layer": -1} | given
    if "lr" in given and "projector_lr" not in given:
        given["projector_lr"] = given["lr"]  # one --lr is meant for both
    if args.init_adapter:
        given |= adopted(read_adapter(args.init_adapter)[0], given, args.init_adapter)
    elif given.get("objective") == "scst":
        raise ValueError("--objective scst tunes a captioner that can caption: name one with --init-adapter")
    return replace(SETTINGS[args.setting], **given)


def make_trainer(
    args: Any,
    captioner: Captioner,
    tokenizer: Tokenizer,
    train: Split,
    val: Split,
    config: TrainConfig,
    out: Path,
    processes: Processes,
) -> Trainer:
    """Return the trainer of the objective; rewards by CLIPScore need the profile's CLIP."""
    if config.objective == "xe":
        return Trainer(captioner, tokenizer, train, val, config, out, processes)
    profile = PROFILES[args.profile]
    trainer = ScstTrainer(captioner, tokenizer, train, val, config, out, processes)
    try:
        trainer.use_clip(ClipScorer(profile.clip_model, profile.clip_weights, captioner.device))
    except (FileNotFoundError, ValueError) as error:
        if config.clip_reward:
            raise
        log.warning("no CLIPScore in validation: %s", error)
    return trainer


def claim(out: Path, resume: bool, held: contextlib.ExitStack) -> None:
    """Make the run folder and lock it for as long as ``held``; never write over a run without being asked to go on."""
    if resume and not has_state(out):
        raise FileNotFoundError(f"--resume: {out} holds no state of a run; start without --resume")
    if not resume and has_state(out):
        raise ValueError(f"--out {out}: holds a run already; add --resume, name another folder, or remove it")
    held.enter_context(lock_folder(out))
    if not resume:
        (out / "metrics.jsonl").unlink(missing_ok=True)  # of a run that was stopped before its first state


def pick_device(name: str) -> torch.device:
    """Return this process's device; behind a launcher each takes a GPU of its own, so none may be named."""
    if ":" in name and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"--device {name}: every process would take it; leave it out and each takes one of its own")
    return device_module.pick_device("auto" if name == "cuda" and "LOCAL_RANK" in os.environ else name)


def prepare(args: Any, processes: Processes, held: contextlib.ExitStack) -> Trainer:
    """Build all that the flags ask for, and take up what there was; ``held`` closes what a run holds while it lasts."""
    config, device, out = resolve_config(args), pick_device(args.device), args.out or Path("runs") / args.setting
    trackers = Trackers(args.log_with, out) if args.log_with and processes.first else None
    if processes.first:
        claim(out, args.resume, held)
        if config.batch_size < processes.count:
            log.warning(
                "--batch-size %d: %d of the %d processes have no image of a batch and only wait",
                config.batch_size,
                processes.count - config.batch_size,
                processes.count,
            )
    seed_everything(config.seed)
    tokenizer = Tokenizer(args.tokenizer or PROFILES[args.profile].tokenizer)
    captioner = make_captioner(args, config, out, processes).to(device)
    check_vocabulary(tokenizer, captioner.decoder)
    trainable = check_trainable(captioner, config.max_trainable)
    described = describe_run(args, config, captioner, trainable, processes)
    if processes.first:
        print(f"trainable parameters: {trainable:,}")
        check_room(out, FILES_OF_WEIGHTS * 4 * trainable)
        if args.resume:
            check_resumed_config(out, described)
    train, val = (prepare_split(args, name, captioner, tokenizer, processes) for name in ("train", "val"))
    trainer = make_trainer(args, captioner, tokenizer, train, val, config, out, processes)
    if args.resume:
        trainer.resume()
    elif args.init_adapter:
        start_from(captioner, args.init_adapter)
    processes.check_same("settings or frozen weights", (asdict(config), asdict(captioner.config)))
    processes.check_same("adapters", fingerprint(captioner.adapter_state()))
    processes.check_same("captions", (train.captions, val.captions))
    if processes.first:
        write_json(out / "config.json", described)
    if trackers is not None:
        held.enter_context(trackers.begun(described))
        trainer.listeners.append(trackers.log)
    return trainer


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
    }
    for name, value in numbers.items():
        if given.get(name, value) != value:
            raise ValueError(f"{flag(name)} {given[name]}: --init-adapter {path} has {value}; leave the flag out")
    return numbers
