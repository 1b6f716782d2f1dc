"""Map methods that ask the model again with other image tokens: close to what a word depends on, and slow.

The image is encoded once; what is changed are its projected tokens, between the encoder and the language model. Masking
pixels instead would also change the tokens of other patches, which the encoder has mixed: the encoder may carry a thing
into a patch beside it, and these methods point at that patch, where the language model reads it. It would also show the
encoder pictures with holes, such as it was never trained on.
"""

from __future__ import annotations

import torch

from captioning.maps.capture import Capture, Choices, Probe

BATCH = 16  # rows of image and caption at once
BATCH_WITH_GRADIENTS = 4  # likewise
STEPS = 8  # between the mean token and the image
SIDE = 3  # patches of an occluded square's side


def occlusion(capture: Capture, spec: Choices) -> torch.Tensor:
    """Mask a square of patches and see how far each word's log-probability falls (Zeiler and Fergus 2014).

    The tokens of ``SIDE`` x ``SIDE`` patches become the mean token of the image; a patch gets the mean fall over the
    squares that cover it. There is a pass for every square, ``BATCH`` at once: at full size LLaVA's 676 take about as
    long as reading 676 images. Returns (T, P) on the CPU; a rise counts as none.

    Raises:
        ValueError: there is no model to ask.
    """
    probe = _probe(capture, spec)
    squares = _squares(capture.grid, SIDE)  # (Q, P)
    with torch.no_grad():
        before = probe.log_probs(probe.image[None])  # (1, T)
    falls = before - log_probs_without(probe, squares)
    return (falls.cpu().T @ squares.float() / SIDE**2).clamp(min=0)  # (T, Q) by (Q, P)


def log_probs_without(probe: Probe, away: torch.Tensor) -> torch.Tensor:
    """Return the log-probability (B, T) of each token where the patches ``away`` (B, P) are the image's mean token."""
    patches = probe.image[probe.patches]
    found = []
    with torch.no_grad():
        for some in away.to(probe.image.device).split(BATCH):
            image = probe.image.repeat(len(some), 1, 1)
            image[:, probe.patches] = torch.where(some[..., None], patches.mean(0), patches)  # (b, P, C)
            found.append(probe.log_probs(image))
    return torch.cat(found)


def ig(capture: Capture, spec: Choices) -> torch.Tensor:
    """Return integrated gradients of each word's log-probability (Sundararajan et al. 2017, arXiv 1703.01365).

    The patches' tokens go from their mean, which shows nothing in particular, to what they are in ``STEPS`` steps; a
    patch gets its way times the mean gradient along it. The shares of all patches add up to what the image adds to the
    log-probability. Returns (T, P) on the CPU; what speaks against the word counts as none.

    A gradient for each step and token, ``BATCH_WITH_GRADIENTS`` rows at once: by estimate 11 GB beside the weights of
    LLaVA-7B in float16.

    Raises:
        ValueError: there is no model to ask, or it passes no gradients on.
    """
    probe = _probe(capture, spec)
    mean = probe.image[probe.patches].mean(0)
    way = torch.zeros_like(probe.image)
    way[probe.patches] = probe.image[probe.patches] - mean  # (N, C)
    shares = (torch.arange(STEPS) + 0.5) / STEPS - 1  # of the way, counted back from the image
    pairs = torch.cartesian_prod(shares, torch.arange(len(probe.tokens), dtype=shares.dtype)).to(way.device)
    found = torch.zeros(len(probe.tokens), len(probe.patches), device=way.device)
    for some in pairs.split(BATCH_WITH_GRADIENTS):
        words = some[:, 1].long()  # (B,)
        with torch.enable_grad():
            image = (probe.image + some[:, :1, None].to(way.dtype) * way).requires_grad_()  # (B, N, C)
            total = probe.log_probs(image).gather(1, words[:, None]).sum()
        if not total.requires_grad:
            raise ValueError(f"{spec.method} needs gradients, and the model passes none from words to image tokens")
        (gradient,) = torch.autograd.grad(total, image)
        found.index_add_(0, words, (gradient * way).sum(-1).float()[:, probe.patches])
    return (found / STEPS).clamp(min=0).cpu()


def _squares(grid: tuple[int, int], side: int) -> torch.Tensor:
    """Return (Q, P) bool: the patches of every square that covers any; at the border also those that reach beyond it.

    So side * side squares cover each patch, and a patch of the corner is told from its neighbours.
    """
    reach = side // 2
    centres, cells = (
        torch.cartesian_prod(*(torch.arange(-beyond, size + beyond) for size in grid)) for beyond in (reach, 0)
    )
    return (centres[:, None] - cells).abs().amax(-1) <= reach


def _probe(capture: Capture, spec: Choices) -> Probe:
    if capture.probe is None:
        raise ValueError(f"{spec.method} asks the model again, and the capture has none")
    return capture.probe()
