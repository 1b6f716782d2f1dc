"""Map methods that read attention weights: from a word's row of the matrix to a map of the patches.

Every function takes a capture and a spec and returns (T, P) on the CPU, not negative.
"""

from __future__ import annotations

import functools

import torch

from captioning.maps.capture import Capture, Choices, Chosen, Heads, parse_layers


def raw(capture: Capture, spec: Choices) -> torch.Tensor:
    """Return the attention itself, of the chosen heads, mean over the layers."""
    return raw_steps(capture, spec).mean(0)


def raw_steps(capture: Capture, spec: Choices) -> torch.Tensor:
    """Return the attention of the chosen heads in each chosen layer, (l, T, P)."""
    part = capture.image_part(spec.row)
    heads, chosen = _choose(capture, spec, part)
    return torch.stack([heads.reduce(part[layer], which) for layer, which in chosen])


def relative(capture: Capture, spec: Choices) -> torch.Tensor:
    """Divide attention by its mean over the caption's words: sink patches, which light up for every word, go."""
    maps = raw(capture, spec)
    return _divide(maps, maps.mean(0))


def generic(capture: Capture, spec: Choices) -> torch.Tensor:
    """Divide attention by that of a caption that fits every image (Zhang et al., ICLR 2025, arXiv 2502.17422).

    Raises:
        ValueError: the capture has no such caption beside it.
    """
    if capture.generic is None:
        raise ValueError("generic needs a capture of a generic caption too")
    return _divide(raw(capture, spec), raw(capture.generic, spec).mean(0))


def _divide(maps: torch.Tensor, common: torch.Tensor) -> torch.Tensor:
    return maps / (common + common.mean())  # the added mean keeps patches that no word looks at from exploding


def rollout(capture: Capture, spec: Choices) -> torch.Tensor:
    """Follow attention back through the layers, each of which keeps half of its input, the residual.

    Abnar and Zuidema 2020, arXiv 2005.00928.

    Raises:
        ValueError: the capture lacks the image's own rows.
    """
    if not capture.has_image_rows:
        raise ValueError("rollout needs the attention of the image's own rows; capture all rows")
    heads, chosen = _choose(capture, spec, capture.image_part(spec.row))
    size = capture.weights[0].shape[-1]
    flow = torch.eye(size, device=capture.weights[0].device)
    for layer, which in chosen:
        step = heads.reduce(capture.weights[layer].detach()[0].float(), which)
        step = step / step.sum(-1, keepdim=True)  # a maximum over heads does not sum to 1
        flow = (0.5 * step + 0.5 * torch.eye(size, device=step.device)) @ flow
    return flow[-len(capture.tokens) - 1 :][capture.rows(spec.row)][:, capture.patches].cpu()


def grad(capture: Capture, spec: Choices) -> torch.Tensor:
    """Multiply attention by the gradient of the token's own logit, keep the positive part, and sum over the layers.

    After Chefer et al. 2021, whose rule also passes relevance from token to token; here a token's relevance comes from
    its own row alone, always the predicting one. A capture passes no gradient from one caption row to another, so a
    single backward pass of the sum of all tokens' logits gives every row the gradient of its own token alone.

    Raises:
        ValueError: the capture has no gradients.
    """
    return functools.reduce(torch.add, gradient_steps(capture, spec)).cpu()


def gradient_steps(capture: Capture, spec: Choices) -> list[torch.Tensor]:
    """Return (T, P) of each chosen layer, which ``grad`` adds up, where the capture is."""
    if not capture.logits.requires_grad:
        raise ValueError(f"{spec.method} needs a capture with gradients")
    if capture.gradients is None:
        count = len(capture.tokens)
        own = capture.logits[range(count), capture.tokens].float().sum()
        capture.gradients = torch.autograd.grad(own, capture.weights)
    heads, chosen = _choose(capture, spec, capture.image_part(spec.row))
    rows, steps = capture.rows("predict"), []
    for layer, which in chosen:
        gradient = capture.gradients[layer][0, :, -len(capture.tokens) - 1 :]  # (nh, T + 1, S)
        step = heads.reduce((capture.caption_rows(layer) * gradient).clamp(min=0), which)  # (T + 1, S)
        steps.append(step[rows][:, capture.patches])
    return steps


def chefer(capture: Capture, spec: Choices) -> torch.Tensor:
    """Pass relevance from token to token through all layers (Chefer et al. 2021, arXiv 2103.15679, for decoders).

    From the position that predicts a token downwards, every layer adds what its positions took from others: attention
    times the gradient of that token's logit, positive part, of the chosen heads. Unlike ``grad`` it knows that a word
    may have read what other positions had gathered from the image.

    One backward pass for each token, through all rows: by estimate 7 GB beside LLaVA-7B's weights.

    Raises:
        ValueError: there is no model to read it again.
    """
    if capture.linked is None:
        raise ValueError("chefer reads the caption again with gradients, and the capture has no model")
    weights, logits = capture.linked()
    heads, chosen = _choose(capture, spec, capture.image_part(spec.row))
    count, maps = len(capture.tokens), []
    for t, token in enumerate(capture.tokens):
        gradients = torch.autograd.grad(logits[t, token], weights, retain_graph=True)
        relevance = torch.zeros(weights[0].shape[-1], device=logits.device)
        relevance[t - count - 1] = 1.0
        for layer, which in reversed(chosen):
            step = (weights[layer].detach() * gradients[layer])[0].float().clamp(min=0)  # (nh, S, S)
            relevance = relevance + relevance @ heads.reduce(step, which)
        maps.append(relevance[capture.patches])
    return torch.stack(maps).cpu()


def _choose(capture: Capture, spec: Choices, part: torch.Tensor) -> tuple[Heads, Chosen]:
    heads, layers = Heads.parse(spec.heads, capture.n_head), parse_layers(spec.layers, capture.n_layer)
    if heads.rule != "local":
        return heads, heads.choose(part, layers)
    if capture.local_heads is None:
        raise ValueError("--heads local: the capture has no model with localisation heads")
    found = capture.local_heads()
    chosen = [(layer, [head for at, head in found if at == layer]) for layer in layers]
    if not any(which for _, which in chosen):
        raise ValueError(f"--heads local: they are in layers {sorted({at for at, _ in found})}, not {spec.layers}")
    return heads, [(layer, which) for layer, which in chosen if which]
