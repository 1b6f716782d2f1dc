"""Train LoRA and a projector so that GPT-2 captions what a frozen CLIP encoder sees.

Writes into the run folder: best.safetensors and last.safetensors (LoRA + projector), config.json (everything that the
run was made with), metrics.jsonl (a line every few steps, a line an epoch) and loss.png.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import data
import evaluate
import generation
import runtime
from captioner import RANDOM, Captioner, CaptionerConfig, fingerprint, read_adapter
from decoder import Decoder, DecoderConfig, LoraConfig, build_decoder, gpt2_state_dict
from profiles import PROFILES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the setting ``best``; see SETTINGS for the report's five."""

    epochs: int = 8
    batch_size: int = 16  # images; all their captions go with them
    accumulate: int = 1  # batches an optimiser step
    lr: float = 1e-3  # of LoRA
    projector_lr: float = 1e-3
    optimizer: str = "adamw"  # or adam
    weight_decay: float = 0.01
    schedule: str = "cosine"  # or constant
    warmup: float = 0.05  # share of all steps
    clip: float = 1.0  # largest gradient norm; 0 clips nothing
    label_smoothing: float = 0.0
    captions_per_image: int | None = None  # None is all of them
    seed: int = 0
    precision: str = "auto"  # fp32 or bf16; auto is bf16 on CUDA
    cls: bool = True
    lora_rank: int = 32
    lora_alpha: float = 32.0
    lora_dropout: float = 0.1
    lora_enable: tuple[bool, bool, bool] | None = None  # None is lora.Linear on c_attn, else MergedLinear on q, k, v
    lora_lm_head: bool = True
    max_trainable: int = 10_000_000
    val_images: int = 200  # captioned every epoch
    beam_size: int = 5
    max_new_tokens: int = 30
    log_every: int = 10  # steps

    def __post_init__(self) -> None:
        at_least_one = ("epochs", "batch_size", "accumulate", "beam_size", "max_new_tokens", "val_images", "log_every")
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name in ("lr", "projector_lr"):
            if not 0 < getattr(self, name) < 10:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be between 0 and 10")
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be in [0, 1)")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} {getattr(self, name)}: choose from {', '.join(choices)}")

    def lora(self) -> LoraConfig:
        """The decoder's LoRA."""
        return LoraConfig(
            rank=self.lora_rank, alpha=self.lora_alpha, dropout=self.lora_dropout,
            enable_lora=self.lora_enable, lm_head=self.lora_lm_head,
        )  # fmt: skip


CHOICES = {"optimizer": ("adam", "adamw"), "schedule": ("cosine", "constant"), "precision": ("auto", "fp32", "bf16")}

# The report's own: plain Adam at 5e-5, no schedule, and loralib's default lora_alpha of 1 (a scaling of 1 / rank).
_REPORT = TrainConfig(
    lr=5e-5, projector_lr=5e-5, optimizer="adam", weight_decay=0.0, schedule="constant", warmup=0.0, clip=0.0,
    lora_alpha=1.0, lora_dropout=0.0, lora_lm_head=False,
)  # fmt: skip
SETTINGS = {
    "best": TrainConfig(),
    "1": replace(_REPORT, epochs=10),
    "2": replace(_REPORT, epochs=5),
    "3": replace(_REPORT, epochs=3, lora_rank=64),
    "4": replace(_REPORT, epochs=7, lora_enable=(True, False, True), lora_dropout=0.2, lora_lm_head=True, cls=False),
    "5": replace(_REPORT, epochs=13),
}
HELP = {
    "epochs": "passes over the training images",
    "batch_size": "images a batch; all their captions go with them",
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
    parser.add_argument("--resume", action="store_true", help="go on from the last whole epoch in the run folder")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="full", help="sets names and paths only")
    parser.add_argument("--encoder", help="timm ViT (default: the profile's)")
    parser.add_argument("--encoder-weights", help="local file of its weights (default: the profile's)")
    parser.add_argument("--decoder", help="GPT-2 state dict (default: the profile's)")
    parser.add_argument("--tokenizer", help="folder of encoder.json and vocab.bpe (default: the profile's)")
    parser.add_argument("--cache", type=Path, help="folder of cached encoder tokens (default: the profile's)")
    parser.add_argument("--random-weights", action="store_true",
                        help="for checks of shape and speed only: random encoder, and a random GPT-2 small unless "
                             "--decoder is given")  # fmt: skip
    parser.add_argument("--shuffle-captions", action="store_true",
                        help="the blind baseline: train on captions dealt to wrong images")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--verbose", action="store_true", help="more log lines")
    group = parser.add_argument_group("numbers (defaults are those of --setting best)")
    for f in fields(TrainConfig):
        flag, default = "--" + f.name.replace("_", "-"), getattr(SETTINGS["best"], f.name)
        shown = "" if default is None else f" (default: {default})"
        if isinstance(default, bool):
            group.add_argument(flag, action=runtime.argparse.BooleanOptionalAction, help=HELP[f.name] + shown)
        else:
            kind = _triple if f.name == "lora_enable" else int if default is None else type(default)
            group.add_argument(flag, type=kind, choices=CHOICES.get(f.name), metavar=None if f.name in CHOICES else "X",
                               help=HELP[f.name] + shown)  # fmt: skip
    return parser


# --- building -------------------------------------------------------------------------------------------------------


def make_decoder(args: Any, lora: LoraConfig, out: Path) -> Decoder:
    """Load the decoder, or with ``--random-weights`` and no ``--decoder`` make a GPT-2 small in the run folder."""
    if args.decoder or not args.random_weights:
        return build_decoder(args.decoder or PROFILES[args.profile].decoder, lora)
    decoder = Decoder(DecoderConfig(), lora)
    with runtime.atomic_path(out / "decoder_model.safetensors") as temporary:
        save_file({k: v.contiguous() for k, v in gpt2_state_dict(decoder).items()}, temporary)
    log.info("random GPT-2 small: %s", out / "decoder_model.safetensors")
    return decoder


def make_captioner(args: Any, config: TrainConfig, out: Path) -> Captioner:
    """Build encoder, projector and decoder from the flags, or from the profile where a flag is not given."""
    profile = PROFILES[args.profile]
    own = args.encoder is None or args.encoder == profile.encoder
    weights = RANDOM if args.random_weights else args.encoder_weights or (profile.encoder_weights if own else None)
    captioner_config = CaptionerConfig(
        encoder=args.encoder or profile.encoder,
        encoder_kwargs=profile.encoder_kwargs if own else {},
        encoder_weights=weights,
        use_cls=config.cls,
        lora=config.lora(),
    )
    return Captioner(captioner_config, make_decoder(args, config.lora(), out))


def check_trainable(captioner: Captioner, limit: int) -> int:
    """Return the number of trained parameters; refuse more than ``limit``."""
    count = sum(p.numel() for p in captioner.trainable().values())
    print(f"trainable parameters: {count:,}")
    if count > limit:
        raise ValueError(f"{count:,} trainable parameters exceed --max-trainable {limit:,}; lower --lora-rank")
    return count


def make_optimizer(captioner: Captioner, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimiser: every trained parameter is in one of two groups, projector or LoRA."""
    trainable = captioner.trainable()
    groups = [
        {"params": [p for n, p in trainable.items() if not n.startswith("projector.")], "lr": config.lr},
        {"params": [p for n, p in trainable.items() if n.startswith("projector.")], "lr": config.projector_lr},
    ]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    decay = {"weight_decay": config.weight_decay} if config.optimizer == "adamw" else {}
    return kind(groups, **decay)


def schedule_factor(step: int, steps: int, config: TrainConfig) -> float:
    """Return what the learning rates are multiplied by at ``step`` of ``steps``."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


# --- training -------------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """One split, ready to train or validate on: samples, their caption tokens, and the encoder's tokens of each."""

    samples: list[data.Sample]
    captions: list[list[list[int]]]
    features: data.FeatureCache

    def batch(self, indices: Sequence[int], eos: int, device: torch.device,
              captions: Sequence[Any] | None = None) -> tuple[torch.Tensor, data.PackedBatch]:  # fmt: skip
        """Return features (B, N, D) and packed captions of the samples ``indices``."""
        captions = captions if captions is not None else [self.captions[i] for i in indices]
        packed = data.pack_captions(captions, eos, pad_to_multiple=8)
        return self.features.gather(list(indices)).float().to(device), packed.to(device)


class Trainer:
    """Trains one captioner on one split, validates it on another, and keeps the run folder."""

    def __init__(self, captioner: Captioner, tokenizer: data.Tokenizer, train: Split, val: Split,
                 config: TrainConfig, out: Path) -> None:  # fmt: skip
        self.captioner, self.tokenizer, self.config, self.out = captioner, tokenizer, config, out
        self.train_split, self.val_split = train, val
        self.dataset = data.CaptionDataset(train.captions, config.captions_per_image, config.seed)
        self.optimizer = make_optimizer(captioner, config)
        self.device = captioner.device
        bf16 = config.precision == "bf16" or (config.precision == "auto" and self.device.type == "cuda")
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        per_epoch = math.ceil(len(train.samples) / config.batch_size)
        self.steps_per_epoch = math.ceil(per_epoch / config.accumulate)
        self.steps = self.steps_per_epoch * config.epochs
        self.epoch, self.step, self.best = 0, 0, -math.inf
        self.started = time.time()

    def run(self) -> dict[str, Any]:
        """Train what is left of the epochs and return the last line of metrics."""
        self.sanity_check()
        record: dict[str, Any] = {}
        with tqdm(total=self.steps, initial=self.step, desc="train", disable=not sys.stderr.isatty()) as bar:
            while self.epoch < self.config.epochs:
                loss = self.train_epoch(bar)
                self.epoch += 1
                record = {"kind": "epoch", "epoch": self.epoch, "step": self.step, "train_loss": loss}
                record |= self.validate()
                self.keep(record)
        return record

    def sanity_check(self) -> None:
        """Take two validation batches through loss and search: a bad path fails in seconds, not after an epoch."""
        self.captioner.eval()
        count = min(len(self.val_split.samples), 2 * self.config.batch_size)
        self.val_loss(count)
        self.captions(min(count, 2))

    def batches(self) -> Iterator[list[int]]:
        """Yield this epoch's batches of indices."""
        self.dataset.set_epoch(self.epoch)
        config = self.config
        yield from data.length_grouped_batches(self.dataset.lengths(), config.batch_size, config.seed, self.epoch)

    def train_epoch(self, bar: Any) -> float:
        """Train one epoch and return its mean loss."""
        config, losses = self.config, []
        torch.manual_seed(config.seed * 1000 + self.epoch)  # dropout: a resumed run draws what an unbroken one draws
        self.captioner.train()
        batches = list(self.batches())
        for start in range(0, len(batches), config.accumulate):
            loss = self.train_step(batches[start : start + config.accumulate])
            losses.append(loss)
            bar.update()
            bar.set_postfix(epoch=self.epoch + 1, loss=f"{loss:.3f}")
            if self.step % config.log_every == 0 or self.step == 1:
                lr = self.optimizer.param_groups[0]["lr"]
                self.write_metrics({"kind": "step", "step": self.step, "loss": loss, "lr": lr})
        return sum(losses) / len(losses)

    def train_step(self, batches: list[list[int]]) -> float:
        """Take one optimiser step over ``batches`` and return their mean loss."""
        config, total = self.config, 0.0
        for group, lr in zip(self.optimizer.param_groups, (config.lr, config.projector_lr), strict=True):
            group["lr"] = lr * schedule_factor(self.step, self.steps, config)
        self.optimizer.zero_grad(set_to_none=True)
        for indices in batches:
            shown = [self.dataset[i][1] for i in indices]
            features, packed = self.train_split.batch(indices, self.tokenizer.eos_id, self.device, shown)
            with self.autocast():
                loss = self.captioner.loss(features, packed, config.label_smoothing) / len(batches)
            if not torch.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss.item()} at step {self.step}; the last whole epoch is kept in {self.out}; "
                    "lower --lr, or set --clip 1"
                )
            loss.backward()
            total += loss.item()
        if config.clip:
            torch.nn.utils.clip_grad_norm_(list(self.captioner.trainable().values()), config.clip)
        self.optimizer.step()
        self.step += 1
        return total

    @torch.no_grad()
    def val_loss(self, count: int) -> float:
        """Return the mean loss over the first ``count`` validation images."""
        losses = []
        for start in range(0, count, self.config.batch_size):
            indices = range(start, min(start + self.config.batch_size, count))
            with self.autocast():
                loss = self.captioner.loss(*self.val_split.batch(indices, self.tokenizer.eos_id, self.device))
            losses.append(loss.item() * len(indices))
        return sum(losses) / count

    def captions(self, count: int) -> dict[str, str]:
        """Caption the first ``count`` validation images."""
        predictions = {}
        for start in range(0, count, self.config.batch_size):
            indices = list(range(start, min(start + self.config.batch_size, count)))
            features = self.val_split.features.gather(indices).float().to(self.device)
            with self.autocast():
                texts = generation.caption_features(
                    self.captioner, self.tokenizer, features, self.config.beam_size, self.config.max_new_tokens
                )
            predictions |= {self.val_split.samples[i].stem: t for i, t in zip(indices, texts, strict=True)}
        return predictions

    def validate(self) -> dict[str, Any]:
        """Return loss and CIDEr of generated captions on the validation subset."""
        self.captioner.eval()
        count = min(self.config.val_images, len(self.val_split.samples))
        result: dict[str, Any] = {"val_loss": self.val_loss(count), "val_images": count}
        predictions = self.captions(count)
        references = {s.stem: list(s.captions) for s in self.val_split.samples[:count]}
        try:
            result["val_cider"] = evaluate.cider(references, predictions)[0]
        except (ValueError, OSError) as error:
            log.warning("no CIDEr (%s); the best epoch is chosen by validation loss instead", error)
        return result

    def keep(self, record: dict[str, Any]) -> None:
        """Write metrics, adapters and what --resume needs."""
        record = {**record, "seconds": round(time.time() - self.started, 1)}
        score = record.get("val_cider", -record["val_loss"])
        record["best"] = score > self.best
        self.best = max(self.best, score)
        self.captioner.save_adapter(self.out / "last.safetensors")
        if record["best"]:
            self.captioner.save_adapter(self.out / "best.safetensors")
        state = {"optimizer": self.optimizer.state_dict(), "epoch": self.epoch, "step": self.step, "best": self.best}
        with runtime.atomic_path(self.out / "training_state.pt") as temporary:
            torch.save(state, temporary)
        self.write_metrics(record)
        plot_losses(self.out)
        log.info(
            "epoch %d: train loss %.3f, val loss %.3f, val CIDEr %s%s", self.epoch, record["train_loss"],
            record["val_loss"], f"{record['val_cider']:.3f}" if "val_cider" in record else "-",
            " (best)" if record["best"] else "",
        )  # fmt: skip

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def resume(self) -> None:
        """Take up the last whole epoch of the run folder."""
        path = self.out / "training_state.pt"
        if not path.is_file():
            raise FileNotFoundError(f"--resume: {path} does not exist; start without --resume")
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.captioner.load_adapter_state(read_adapter(self.out / "last.safetensors")[1])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        log.info("resumed after epoch %d", self.epoch)


def plot_losses(out: Path) -> None:
    """Draw loss.png from metrics.jsonl: training and validation loss, and CIDEr where it was measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps, epochs = ([r for r in lines if r["kind"] == kind] for kind in ("step", "epoch"))
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="#9db8d9", lw=1, label="training loss")
    at = [r["step"] for r in epochs]
    axis.plot(at, [r["val_loss"] for r in epochs], "o-", color="#1f4e8c", label="validation loss")
    axis.set(xlabel="optimiser step", ylabel="loss a token (nats)", ylim=(0, None))
    handles, labels = axis.get_legend_handles_labels()
    if any("val_cider" in r for r in epochs):
        right = axis.twinx()
        right.plot(at, [r.get("val_cider", math.nan) for r in epochs], "s--", color="#c2571a", label="validation CIDEr")
        right.set(ylabel="CIDEr", ylim=(0, None))
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    axis.legend(handles, labels, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.13), frameon=False)
    with runtime.atomic_path(out / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)


# --- the script -----------------------------------------------------------------------------------------------------


def prepare_split(args: Any, name: str, captioner: Captioner, tokenizer: data.Tokenizer) -> Split:
    """Read a split, check its captions against the context, and encode its images once."""
    profile = PROFILES[args.profile]
    samples = data.load_split(args.data or Path(profile.data), name)
    if name == "train" and args.shuffle_captions:
        samples = data.shuffle_captions(samples, seed=0)
    room = captioner.decoder.config.n_positions - captioner.n_prefix - 1
    captions = data.encode_captions(samples, tokenizer, room)
    features = generation.cached_features(captioner, [s.path for s in samples], args.cache or Path(profile.cache))
    return Split(samples, captions, features)


def describe_run(args: Any, config: TrainConfig, captioner: Captioner, trainable: int) -> dict[str, Any]:
    """Return what config.json keeps: settings, captioner, versions, command and git revision."""
    packages = ("torch", "timm", "loralib", "tokenizers", "pycocoevalcap")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    revision = subprocess.run(git, capture_output=True, text=True, check=False)
    return {
        "setting": args.setting,
        "profile": args.profile,
        "train": asdict(config),
        "captioner": asdict(captioner.config),
        "trainable_parameters": trainable,
        "shuffled_captions": args.shuffle_captions,
        "random_weights": args.random_weights,
        "device": str(captioner.device),
        "command": sys.argv,
        "git": revision.stdout.strip() or None,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "decoder": fingerprint(gpt2_state_dict(captioner.decoder)),
    }


def check_resumed_config(out: Path, described: dict[str, Any]) -> None:
    """Refuse to go on with other settings than the run was begun with."""
    path = out / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {path} does not exist; start without --resume")
    before = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(described))
    parts = ("train", "captioner")
    changed = [f"{part}.{k}" for part in parts for k in now[part] if now[part][k] != before[part].get(k)]
    if changed:
        raise ValueError(f"--resume: {out} was begun with other values of {', '.join(changed)}")


def resolve_config(args: Any) -> TrainConfig:
    """Return the setting's numbers with those of the flags that were given."""
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if getattr(args, f.name) is not None}
    if "lr" in given and "projector_lr" not in given:
        given["projector_lr"] = given["lr"]  # one --lr is meant for both
    return replace(SETTINGS[args.setting], **given)


def claim(out: Path, resume: bool) -> None:
    """Make the run folder; never write over a finished run without being asked to go on."""
    if not resume and (out / "metrics.jsonl").exists():
        raise ValueError(f"--out {out}: holds a run already; add --resume, name another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)


@runtime.command
def main(argv: list[str] | None = None) -> int:
    """Train; return 0."""
    args = build_parser().parse_args(argv)
    runtime.setup_logging(args.verbose)
    config = resolve_config(args)
    device = runtime.pick_device(args.device)
    out = args.out or Path("runs") / args.setting
    claim(out, args.resume)
    runtime.seed_everything(config.seed)
    tokenizer = data.Tokenizer(args.tokenizer or PROFILES[args.profile].tokenizer)
    captioner = make_captioner(args, config, out).to(device)
    generation.check_vocabulary(tokenizer, captioner.decoder)
    trainable = check_trainable(captioner, config.max_trainable)
    described = describe_run(args, config, captioner, trainable)
    if args.resume:
        check_resumed_config(out, described)
    train, val = (prepare_split(args, name, captioner, tokenizer) for name in ("train", "val"))
    trainer = Trainer(captioner, tokenizer, train, val, config, out)
    if args.resume:
        trainer.resume()
    runtime.write_json(out / "config.json", described)
    record = trainer.run()
    if record:
        shown = {k: round(v, 4) for k, v in record.items() if isinstance(v, float)}
        print(f"{out / 'best.safetensors'}: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
