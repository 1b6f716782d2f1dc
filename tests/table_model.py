"""A language model that is a table: logits looked up by the whole history, which the ancestor mask must give."""

import torch


class TableModel:
    """The logits after a history depend on its last ``depth`` tokens; a history is left-padded with ``eos``."""

    def __init__(self, vocab, rows, depth, sharpness=1.0, seed=0, eos=0):
        self.vocab, self.depth, self.eos = vocab, depth, eos
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(rows, *[vocab] * depth, vocab, generator=generator) * sharpness

    def logits(self, row, history):
        """(V,) after the tokens ``history``, BOS left out."""
        last = ((self.eos,) * self.depth + tuple(history))[-self.depth :]
        return self.table[(row, *last)]

    def step(self, rows):
        """A step function for these rows, as the images of a batch."""
        return TableStep(self, rows)


class TableStep:
    """What a search calls: checks that every beam has one ancestor a step, and reads the beams' histories from them."""

    def __init__(self, model, rows):
        self.model, self.rows = model, list(rows)
        self.fed = []  # (B, K) of each step
        self.sizes = []  # B of each step

    def __call__(self, tokens, ancestors):
        self.fed.append(tokens)
        self.sizes.append(len(tokens))
        slots = torch.cat(self.fed, 1)  # (B, n)
        assert ancestors.shape == (*tokens.shape, slots.shape[1])
        assert ancestors.sum(-1).eq(len(self.fed)).all()
        return torch.stack(
            [
                torch.stack([self.model.logits(row, own[seen].tolist()[1:]) for seen in mask])
                for row, own, mask in zip(self.rows, slots, ancestors, strict=True)
            ]
        )

    def keep(self, places):
        """Drop all images but these, by place in the batch."""
        self.fed = [tokens[places] for tokens in self.fed]
        self.rows = [self.rows[place] for place in places.tolist()]
