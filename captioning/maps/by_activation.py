"""Map methods that read hidden states: what the image's own positions would say."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from captioning.maps.by_attention import raw
from captioning.maps.capture import Capture, Choices, parse_layers
from captioning.maps.filters import rank_gaussian

SINK = 0.1  # the paper's 20 times the root mean square, of 4,096 dimensions


def tam(capture: Capture, spec: Choices) -> torch.Tensor:
    """Return token activation maps (Li et al., ICCV 2025, arXiv 2506.23270): (T, P) on the CPU.

    The hidden state of each patch's position, after the last norm, is read by the output layer at the token's id. From
    that is subtracted what earlier tokens explain: their maps, weighted by what their own positions say of this token,
    and scaled by least squares. A rank-based Gaussian filter removes what is left of single patches. Logits are counted
    from their mean over the vocabulary, for a softmax knows no offset and GPT-2's are all negative. An earlier layer is
    read through the same norm and output layer.

    Raises:
        ValueError: the capture has no hidden states.
    """
    if capture.hidden is None or capture.read_out is None:
        raise ValueError("tam needs a capture with hidden states")
    chosen = parse_layers(spec.layers, capture.n_layer)
    logits = torch.stack([capture.read_out(capture.hidden[layer]) for layer in chosen]).mean(0)
    count = len(capture.tokens)
    says = torch.cat([logits[capture.patches], logits[-count:]]).float().clamp(min=0).cpu().T  # (T, P + T)
    image, text = says[:, :-count], says[:, -count:]
    return rank_gaussian(unexplained(image, text, torch.tensor(capture.tokens)), capture.grid)


def sinkless(capture: Capture, spec: Choices) -> torch.Tensor:
    """Return attention without sink patches (Kang et al., ICLR 2025, arXiv 2503.03321): (T, P) on the CPU.

    Models park attention at positions whose hidden state is huge in a few dimensions. Those are the dimensions that
    hold at least ``SINK`` of the squared length of the first position's state in the middle layer; a patch that is as
    huge in one of them is a sink, and its share of every map is 0. Without any such dimension the maps are ``raw``'s.

    Raises:
        ValueError: the capture has no hidden states.
    """
    if capture.hidden is None:
        raise ValueError("sinkless needs a capture with hidden states")
    squares = capture.hidden[(capture.n_layer - 1) // 2].float().square()  # (S, C)
    huge = squares / squares.sum(-1, keepdim=True).clamp(min=1e-12) >= SINK
    sinks = (huge[capture.patches] & huge[0]).any(-1).cpu()
    return raw(capture, spec) * ~sinks


def unexplained(image: torch.Tensor, text: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return what of each token's map earlier tokens do not explain: the estimated causal inference of TAM.

    Args:
        image: (T, P): the token's activation at every patch, not negative.
        text: (T, T): the token's (row) activation at the position of each token (column), not negative.
        tokens: (T,) ids; an earlier occurrence of the same token explains nothing.
    """
    earlier = torch.ones_like(text).tril(-1).bool() & (tokens[:, None] != tokens)
    weights = F.normalize(text * earlier, p=1, dim=1)
    explained = weights @ image  # (T, P)
    scale = (image * explained).sum(1, keepdim=True) / explained.square().sum(1, keepdim=True).clamp(min=1e-12)
    return (image - scale * explained).clamp(min=0)
