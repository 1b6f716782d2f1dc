"""Self-critical sequence training: a captioner's own captions, rewarded by CIDEr-D (Rennie et al., arXiv 1612.00563).

Several captions of an image are found by one beam search, which teaches what inference will find (Cornia et al., arXiv
1912.08226). Each is rewarded by its CIDEr-D on token ids, with the document frequencies of the training references, and
its advantage is its reward minus the mean of the image's other captions (Luo, arXiv 2003.09971), so no greedy pass is
needed. ``clip_reward`` mixes CLIPScore in (Cho et al., arXiv 2205.13115).

Three guards against what rewards invite (rewards.py): EOS is a token of captions and references, so that an ending in
the middle of a phrase costs n-grams; a caption that repeats more bigrams than most references of its image earns
nothing; and one that is shorter than its references earns less by BLEU's brevity penalty (Papineni et al. 2002), since
CIDEr-D hardly notices a missing word or two, and CLIPScore not at all. ``xe_weight`` keeps cross-entropy in the loss
(Paulus et al., arXiv 1705.04304), so that the wording stays like people's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from captioning.data.batches import pack_captions
from captioning.data.tokenizer import Tokenizer
from captioning.device import autocast, sent
from captioning.inference import search
from captioning.inference.captions import within_vocabulary
from captioning.models.captioner import Captioner
from captioning.scoring import evaluator, tokenizers
from captioning.scoring.caption_stats import caption_statistics
from captioning.scoring.clipscore import ClipScorer, clipscore
from captioning.training.loading import LoadedBatch
from captioning.training.rewards import CiderReward, ClipReward
from captioning.training.trainer import Trainer, count_targets


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Return rewards (B, K) minus the mean of the other K - 1 captions of the image."""
    count = rewards.shape[1]
    return rewards - (rewards.sum(1, keepdims=True) - rewards) / (count - 1)


def beams(
    captioner: Captioner, tokenizer: Tokenizer, features: torch.Tensor, count: int, longest: int
) -> list[list[list[int]]]:
    """Return the ``count`` captions that a beam search finds for each of B images: ``[image][caption]`` token ids.

    A caption that ended has EOS as its last token; one that was cut at ``longest`` tokens has not.
    """
    eos, read_on = tokenizer.eos_id, captioner.step_function(features, count, longest)
    step = within_vocabulary(read_on, tokenizer.vocab_size)
    found = search.beam_search(step, len(features), eos, eos, count, longest, device=features.device, keep=read_on.keep)
    return [ended(captions, eos, longest) for captions in found.finished]


def ended(captions: Sequence[list[int]], eos: int, longest: int) -> list[list[int]]:
    """Give every caption its EOS back, except those that were cut at ``longest`` tokens."""
    return [tokens if len(tokens) == longest else [*tokens, eos] for tokens in captions]


def weighted_loss(
    captioner: Captioner,
    features: torch.Tensor,
    captions: Sequence[Sequence[Sequence[int]]],
    weights: Sequence[Sequence[float]],
    eos: int,
) -> torch.Tensor:
    """Return minus the sum over all captions of weight * log-probability; those of an image share one prefix.

    Where weights are advantages, its gradient is REINFORCE's; where they are 1, that of the summed cross-entropy.

    Args:
        captioner: in eval mode, so that it gives the tokens the probabilities that they were found with.
        features: encoder tokens (B, N, D).
        captions: ``[image][caption]`` token ids, with EOS where it counts: not after a caption that was cut.
        weights: ``[image][caption]``.
        eos: id of EOS.
    """
    bare = [[c[:-1] if c[-1] == eos else c for c in group] for group in captions]
    of_tokens: list[float] = []
    for group, row in zip(captions, weights, strict=True):
        for caption, weight in zip(group, row, strict=True):
            cut = caption[-1] != eos  # packing adds an EOS that the search did not find: it gets no weight
            of_tokens += [weight] * len(caption) + [0.0] * cut
    batch = pack_captions(bare, eos, pad_to_multiple=8).each(lambda tensor: sent(tensor, features.device))
    log_probs = captioner.log_probs(features, batch)
    return -(sent(torch.tensor(of_tokens, dtype=torch.float32), features.device) * log_probs).sum()


class ScstTrainer(Trainer):
    """Tunes a trained captioner for its reward; epoch 0 in the metrics is the captioner that it began with."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.reward = CiderReward(self.train_split.captions, self.tokenizer.eos_id, self.config.brevity)
        self.scorer: ClipScorer | None = None
        self.clip_reward: ClipReward | None = None
        self.rewards: list[float] = []

    def use_clip(self, scorer: ClipScorer) -> None:
        """Log CLIPScore in validation, and mix it into the reward where the config gives it a weight."""
        self.scorer = scorer
        if self.config.clip_reward:
            self.clip_reward = ClipReward(scorer, [s.path for s in self.train_split.samples], self.processes)

    def run(self) -> dict[str, Any]:
        """Measure the captioner as it comes, which is the best so far, then train."""
        if not self.progress.criterion:  # nothing was kept yet: a run resumed at epoch 0 has been measured
            self.sanity_check()
            self.keep({"kind": "epoch", "epoch": 0, "step": 0, **self.validate()})
        return super().run()

    def train_epoch(self, bar: Any) -> float:
        """Train one epoch and return its mean loss."""
        self.rewards = []
        return super().train_epoch(bar)

    def batch_loss(self, loaded: LoadedBatch) -> torch.Tensor:
        """Search, reward, and return this process's part of the loss of one batch of images.

        The policy's loss is a mean over all tokens that were found for the batch, cross-entropy over its references'.
        """
        self.captioner.eval()  # no dropout: probabilities must be those of the search
        eos, batch = self.tokenizer.eos_id, loaded.batch
        features = loaded.on(self.device)[0] if loaded.own else None
        samples = self.search(features) if features is not None else []
        own = [batch.images[place] for place in loaded.own]
        rewards = self.score(own, samples) if own else np.zeros((0, self.config.samples))
        own_tokens = sum(len(sample) for group in samples for sample in group)
        n_tokens, reward = self.processes.total(own_tokens, float(rewards.sum()))
        self.rewards.append(reward / (len(batch.images) * self.config.samples))
        if features is None:
            return torch.zeros((), device=self.device)
        weights = (advantages(rewards) / n_tokens).tolist()
        if self.config.xe_weight:
            weight = self.config.xe_weight / count_targets(batch.captions)
            for group, row, captions in zip(samples, weights, loaded.captions, strict=True):
                group += [[*caption, eos] for caption in captions]
                row += [weight] * len(captions)
        with autocast(self.device, self.config.precision):
            return weighted_loss(self.captioner, features, samples, weights, eos)

    def search(self, features: torch.Tensor) -> list[list[list[int]]]:
        """Return captions ``[image][caption]`` of the images with these encoder tokens (B, N, D)."""
        config = self.config
        with self.searching():
            return beams(self.captioner, self.tokenizer, features, config.samples, config.max_new_tokens)

    def score(self, indices: Sequence[int], samples: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
        """Return the rewards (B, K) of ``samples[image][caption]``."""
        images = np.repeat(indices, self.config.samples).tolist()
        flat = [sample for group in samples for sample in group]
        more: np.ndarray | float = 0.0
        if self.clip_reward is not None:
            texts = [self.tokenizer.decode(sample) for sample in flat]
            more = self.config.clip_reward * self.clip_reward(images, texts)
        return self.reward(images, flat, more).reshape(len(samples), -1)

    def measure(self, predictions: dict[str, str]) -> dict[str, float]:
        """Return CIDEr by beam and by greedy search, CLIPScore, and what the captions are like."""
        record = super().measure(predictions)
        greedy = self.captions(len(predictions), beam_size=1)
        record |= self.processes.from_first(lambda: self.describe(predictions, greedy, "val_cider" in record))
        if self.rewards:
            record["reward"] = sum(self.rewards) / len(self.rewards)
        return record

    def describe(self, beam: dict[str, str], greedy: dict[str, str], cider: bool) -> dict[str, float]:
        """Return the scores of validation captions, and what they and the references are like."""
        record, shown = {}, self.val_split.samples[: len(beam)]
        references = {str(s.path): list(s.captions) for s in shown}
        if cider:
            record["greedy_cider"] = evaluator.cider(references, greedy)[0]
        if self.scorer is not None:
            scores = clipscore(self.scorer, {str(s.path): s.path for s in shown}, beam)
            record["clipscore"] = sum(scores.values()) / len(beam)
        words = tokenizers.ptb_tokenize(
            {"beam": list(beam.values()), "references": [c for group in references.values() for c in group]}
        )
        for prefix, captions in (("", words["beam"]), ("reference_", words["references"])):
            statistics = caption_statistics(captions)
            record |= {f"{prefix}length": statistics["mean_length"], f"{prefix}repeated_2": statistics["repeated_2"]}
        return record
