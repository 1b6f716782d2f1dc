"""The report's training loop and search, written independently of the suite: what `--report-faithful` is held against.

Plain transformers and loralib, one caption a sequence, no shared prefix, no cache, gradients never cleared.
"""

import loralib
import torch
import torch.nn.functional as F

from captioning.imports import import_guarded

IGNORED = -100
ADAPTED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def build_gpt2(state, n_head, rank):
    """GPT-2 of a state dict in Hugging Face layout, with a loralib layer for each of a block's four linear ones."""
    (vocab_size, width), positions = state["wte.weight"].shape, state["wpe.weight"].shape[0]
    layers = len({key.split(".")[1] for key in state if key.startswith("h.")})
    transformers = import_guarded("transformers")
    config = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=n_head,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
    )
    model = transformers.GPT2LMHeadModel(config)
    model.transformer.load_state_dict(dict(state), strict=False)
    for block in model.transformer.h:
        for path in ADAPTED:
            part, name = path.split(".")
            conv = getattr(getattr(block, part), name)
            n_in, n_out = conv.weight.shape
            layer = loralib.Linear(n_in, n_out, r=rank, merge_weights=False)  # alpha is 1: the update times 1 / rank
            layer.weight.data, layer.bias.data = conv.weight.data.T.contiguous(), conv.bias.data
            setattr(getattr(block, part), name, layer)
    loralib.mark_only_lora_as_trainable(model)
    return model


def padded(captions, end):
    """Ids with the end token before and after them, padded with it (B, L); and the targets, padding left out."""
    longest = max(map(len, captions)) + 2
    ids = torch.full((len(captions), longest), end)
    targets = torch.full((len(captions), longest), IGNORED)
    for row, caption in enumerate(captions):
        whole = torch.tensor([end, *caption, end])
        ids[row, : len(whole)] = targets[row, : len(whole)] = whole
    return ids, targets


def report_loss(model, projector, features, captions, end):
    """Mean loss over all ids of the captions, BOS included: the last image token predicts it."""
    ids, targets = padded(captions, end)
    prefix = projector(features)  # (B, P, C)
    x = torch.cat([prefix, model.transformer.wte(ids[:, :-1])], 1)
    logits = model(inputs_embeds=x).logits[:, prefix.shape[1] - 1 :]  # (B, L, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def train_like_the_report(model, projector, batches, end, lr):
    """Take one step for each batch (features (B, P, D), captions) and return the losses; gradients only ever grow."""
    parameters = [p for p in model.parameters() if p.requires_grad] + list(projector.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses = []
    for features, captions in batches:
        loss = report_loss(model, projector, features, captions, end)
        loss.backward()
        optimizer.step()  # no zero_grad, here or anywhere
        losses.append(loss.item())
    return losses


def best(scores, count):
    """The largest scores and their places; of equal ones the first in front (torch.topk leaves that open)."""
    values, places = scores.sort(descending=True, stable=True)
    return values[:count], places[:count]


def search_like_the_report(log_probs, end, beams=5, longest=30):
    """Search the caption of one image as the report's code did; return its ids with BOS, and EOS where it has one.

    Args:
        log_probs: from a list of ids that begins with BOS to the log-probabilities (V,) of the next one.
        end: BOS and EOS.
        beams: live beams at the start.
        longest: most new ids.
    """
    values, ids = best(log_probs([end]), beams)
    alive = [([end, int(token)], float(value)) for value, token in zip(values, ids, strict=True)]  # EOS may be there
    finished = []
    for new in range(2, longest + 1):
        count = len(alive)
        sums = torch.stack([log_probs(ids) + total for ids, total in alive])  # (k, V)
        values, places = best(sums.flatten(), count)
        chosen = []
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            parent, token = divmod(place, sums.shape[1])
            chosen.append(([*alive[parent][0], token], value))
        finished += [beam for beam in chosen if beam[0][-1] == end or new == longest]
        alive = [beam for beam in chosen if beam[0][-1] != end and new < longest]
        if not alive:
            break
    finished = finished or alive  # one new id at most: there was no second round
    return max(finished, key=lambda beam: beam[1] / len(beam[0]))[0]
