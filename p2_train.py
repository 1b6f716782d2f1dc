"""Train LoRA and a projector so that GPT-2 captions what a frozen CLIP encoder sees.

Writes into the run folder: best.safetensors and last.safetensors (LoRA + projector), config.json (everything that the
run was made with), metrics.jsonl (a line every few steps, a line an epoch) and loss.png.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from argparse import BooleanOptionalAction
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import evaluate
from captioning import cli as runtime
from captioning import distributed
from captioning import tensors as checkpoints
from captioning.data import feature_cache as data
from captioning.distributed import Processes
from captioning.files import read_json
from captioning.inference import encode as generation
from captioning.models.adapter import adopted, start_from
from captioning.models.captioner import RANDOM, Captioner, CaptionerConfig, preprocessing_by_name, read_adapter
from captioning.profiles import PROFILES, downloaded_encoder
from captioning.training.scst import ScstTrainer
from captioning.training.trackers import CHOICES as TRACKERS
from captioning.training.trackers import Trackers
from captioning.training.trainer import CHOICES, SCST_NUMBERS, SETTINGS, Split, TrainConfig, Trainer
from decoder import Decoder, DecoderConfig, LoraConfig, build_decoder, gpt2_state_dict

log = logging.getLogger(__name__)

FILES_OF_WEIGHTS = 11  # best, last, and weights with two moments in each of three states, one of them being written
FREE = ("train.log_every", "train.save_every", "train.max_skipped")  # a resumed run may have other values of these
HELP = {
    "epochs": "passes over the training images",
    "batch_size": "images a batch, over all processes together; all their captions go with them",
    "accumulate": "batches an optimiser step",
    "lr": "learning rate of LoRA",
    "projector_lr": "learning rate of the projector",
    "optimizer": "adam or adamw",
    "weight_decay": "of adamw",
    "schedule": "cosine (to a hundredth) or constant",
    "warmup": "share of all steps in which the rate rises",
    "clip": "largest gradient norm; 0 clips nothing",
    "label_smoothing": "share of the target spread over the vocabulary",
    "captions_per_image": "captions of an image that an epoch shows (default: all)",
    "seed": "of weights, order and dropout",
    "precision": "fp32, bf16, or auto: bf16 on CUDA",
    "cls": "give the encoder's CLS token to the decoder too",
    "lora_rank": "LoRA's rank",
    "lora_alpha": "LoRA's update is scaled by alpha / rank",
    "lora_dropout": "dropout before LoRA",
    "lora_enable": "q, k, v of c_attn as MergedLinear, such as 1,0,1 (default: one lora.Linear)",
    "lora_lm_head": "LoRA on the output layer too, untied from the embeddings",
    "max_trainable": "refuse to train more parameters than this",
    "val_images": "validation images captioned and scored every epoch",
    "beam_size": "beams in validation",
    "max_new_tokens": "longest caption in validation",
    "log_every": "steps between lines of metrics.jsonl",
    "save_every": "steps between states for --resume, beside one an epoch: what a kill costs at most",
    "max_skipped": "end the run when so many steps in a row had no finite loss and gradient",
    "rank_stabilized": "scale LoRA by alpha / sqrt(rank) instead of alpha / rank",
    "encoder_layer": "layer that feeds the projector, from the end: -1 is the last, -2 the one before",
    "projector_epochs": "first epochs that train the projector alone",
    "average_last": "last epochs whose weights are averaged in the end",
    "patience": "epochs without a better one after which training stops; 0 never stops",
    "objective": "xe (cross-entropy), or scst (CIDEr-D as a reward; needs --init-adapter)",
    "draws": "an image's captions: beam (all that a beam search finds), or sample, scst",
    "samples": "captions an image: so many beams, or samples, scst",
    "temperature": "of samples, scst",
    "clip_reward": "weight of CLIPScore in the reward, scst",
    "brevity": "exponent of BLEU's brevity penalty on the reward, scst; 0 leaves it out",
    "xe_weight": "weight of cross-entropy beside the rewards, scst: holds captions near people's",
}


def _triple(text: str) -> tuple[bool, ...]:
    parts = text.split(",")
    if len(parts) != 3 or not set(parts) <= {"0", "1"}:
        raise ValueError(f"--lora-enable {text}: give three of 0 and 1 for q, k and v, such as 1,0,1")
    return tuple(part == "1" for part in parts)


def build_parser() -> Any:
    """Return the command line; numbers default to the setting's, so their flags default to nothing here."""
    parser = runtime.FlagParser(description=__doc__)
    parser.add_argument("--setting", choices=list(SETTINGS), default="best", help="whose numbers the flags change")
    parser.add_argument("--data", type=Path, help="folder with train.json, val.json, images/train, images/val")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/SETTING)")
    parser.add_argument("--resume", action="store_true", help="go on from the last state in the run folder")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="full", help="sets names and paths only")
    parser.add_argument("--encoder", help="timm ViT (default: the profile's)")
    parser.add_argument("--encoder-weights", help="local file of its weights (default: the profile's)")
    parser.add_argument("--decoder", help="GPT-2 state dict (default: the profile's)")
    parser.add_argument("--tokenizer", help="folder of encoder.json and vocab.bpe (default: the profile's)")
    parser.add_argument("--cache", type=Path, help="folder of cached encoder tokens (default: the profile's)")
    parser.add_argument(
        "--cache-gb",
        type=float,
        default=math.inf,
        metavar="N",
        help="cache at most N GB; images beyond are encoded every epoch (default: all)",
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="for checks of shape and speed only: random encoder, and a random GPT-2 small unless --decoder is given",
    )
    parser.add_argument(
        "--shuffle-captions", action="store_true", help="the blind baseline: train on captions dealt to wrong images"
    )
    parser.add_argument(
        "--init-adapter", type=Path, help="adapter to start from; its LoRA, layer and CLS are taken over"
    )
    parser.add_argument(
        "--report-faithful", action="store_true", help="the report's own ways: ImageNet preprocessing, LoRA alpha 1"
    )
    parser.add_argument(
        "--log-with",
        choices=TRACKERS,
        help="hand the numbers of metrics.jsonl to a tracker too; all: every one that is installed (default: none)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--verbose", action="store_true", help="more log lines")
    group = parser.add_argument_group("numbers (defaults are those of --setting best)")
    for f in fields(TrainConfig):
        flag, default = "--" + f.name.replace("_", "-"), getattr(SETTINGS["best"], f.name)
        shown = "" if default is None else f" (default: {default})"
        if isinstance(default, bool):
            group.add_argument(flag, action=BooleanOptionalAction, help=HELP[f.name] + shown)
        else:
            kind = _triple if f.name == "lora_enable" else int if default is None else type(default)
            group.add_argument(
                flag,
                type=kind,
                choices=CHOICES.get(f.name),
                metavar=None if f.name in CHOICES else "X",
                help=HELP[f.name] + shown,
            )
    return parser


def make_decoder(args: Any, lora: LoraConfig, out: Path, processes: Processes) -> Decoder:
    """Load the decoder, or with ``--random-weights`` and no ``--decoder`` make a GPT-2 small in the run folder."""
    if args.decoder or not args.random_weights:
        return build_decoder(args.decoder or PROFILES[args.profile].decoder, lora)
    decoder = Decoder(DecoderConfig(), lora)  # the same in all processes, which have one seed
    if not processes.first:
        return decoder
    with runtime.atomic_path(out / "decoder_model.safetensors") as temporary:
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


def prepare_split(args: Any, name: str, captioner: Captioner, tokenizer: data.Tokenizer, processes: Processes) -> Split:
    """Read a split, check its captions against the context, and encode its images once."""
    profile = PROFILES[args.profile]
    samples = data.load_split(args.data or Path(profile.data), name)
    if name == "train" and args.shuffle_captions:
        samples = data.shuffle_captions(samples, seed=0)
    room = captioner.decoder.config.n_positions - captioner.n_prefix - 1
    captions = data.encode_captions(samples, tokenizer, room)
    if not args.cache_gb >= 0:
        raise ValueError(f"--cache-gb {args.cache_gb}: must be 0 or more")
    folder = args.cache or Path(profile.cache)
    paths = [s.path for s in samples]
    features = generation.cached_features(captioner, paths, folder, args.cache_gb * 1e9, processes)
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
    changed += [k for k in ("shuffled_captions", "data") if now[k] != before.get(k)]
    if changed:
        raise ValueError(f"--resume: {out} was begun with other values of {', '.join(changed)}")


def resolve_config(args: Any) -> TrainConfig:
    """Return the setting's numbers with those of the flags that were given."""
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if getattr(args, f.name) is not None}
    if given.get("objective") == "scst":
        given = SCST_NUMBERS | given
    if args.report_faithful:
        given = {"lora_alpha": 1.0, "rank_stabilized": False, "encoder_layer": -1} | given
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
    tokenizer: data.Tokenizer,
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
        trainer.use_clip(evaluate.ClipScorer(profile.clip_model, profile.clip_weights, captioner.device))
    except (FileNotFoundError, ValueError) as error:
        if config.clip_reward:
            raise
        log.warning("no CLIPScore in validation: %s", error)
    return trainer


def claim(out: Path, resume: bool, held: contextlib.ExitStack) -> None:
    """Make the run folder and lock it for as long as ``held``; never write over a run without being asked to go on."""
    if resume and not checkpoints.has_state(out):
        raise FileNotFoundError(f"--resume: {out} holds no state of a run; start without --resume")
    if not resume and checkpoints.has_state(out):
        raise ValueError(f"--out {out}: holds a run already; add --resume, name another folder, or remove it")
    held.enter_context(checkpoints.lock_folder(out))
    if not resume:
        (out / "metrics.jsonl").unlink(missing_ok=True)  # of a run that was stopped before its first state


def pick_device(name: str) -> torch.device:
    """Return this process's device; behind a launcher each takes a GPU of its own, so none may be named."""
    if ":" in name and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"--device {name}: every process would take it; leave it out and each takes one of its own")
    return runtime.pick_device("auto" if name == "cuda" and "LOCAL_RANK" in os.environ else name)


@runtime.command
def main(argv: list[str] | None = None) -> int:
    """Train; return 0, or 4 (``STOPPED``) where SIGTERM or SIGINT ended the run behind a step and --resume goes on."""
    args = build_parser().parse_args(argv)
    runtime.setup_logging(args.verbose)
    with distributed.join(pick_device(args.device)) as processes, contextlib.ExitStack() as held:
        if not processes.first:
            logging.disable(logging.INFO)  # the first one says it for all
        trainer = processes.together(lambda: prepare(args, processes, held))
        return run(trainer)


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
    runtime.seed_everything(config.seed)
    tokenizer = data.Tokenizer(args.tokenizer or PROFILES[args.profile].tokenizer)
    captioner = make_captioner(args, config, out, processes).to(device)
    generation.check_vocabulary(tokenizer, captioner.decoder)
    trainable = check_trainable(captioner, config.max_trainable)
    described = describe_run(args, config, captioner, trainable, processes)
    if processes.first:
        print(f"trainable parameters: {trainable:,}")
        checkpoints.check_room(out, FILES_OF_WEIGHTS * 4 * trainable)
        if args.resume:
            check_resumed_config(out, described)
    train, val = (prepare_split(args, name, captioner, tokenizer, processes) for name in ("train", "val"))
    trainer = make_trainer(args, captioner, tokenizer, train, val, config, out, processes)
    if args.resume:
        trainer.resume()
    elif args.init_adapter:
        start_from(captioner, args.init_adapter)
    processes.check_same("settings or frozen weights", (asdict(config), asdict(captioner.config)))
    processes.check_same("adapters", checkpoints.fingerprint(captioner.adapter_state()))
    processes.check_same("captions", (train.captions, val.captions))
    if processes.first:
        runtime.write_json(out / "config.json", described)
    if trackers is not None:
        held.enter_context(trackers.begun(described))
        trainer.listeners.append(trackers.log)
    return trainer


def run(trainer: Trainer) -> int:
    """Train and say what came of it; return the exit code."""
    record = trainer.run()
    if record and trainer.processes.first:
        shown = {k: round(v, 4) for k, v in record.items() if isinstance(v, float)}
        print(f"{trainer.out / 'best.safetensors'}: {shown}")
    if trainer.finished:
        return 0
    if trainer.processes.first:
        print(f"stopped behind step {trainer.step} of {trainer.steps}; the same command with --resume goes on")
    return runtime.STOPPED


if __name__ == "__main__":
    sys.exit(main())
