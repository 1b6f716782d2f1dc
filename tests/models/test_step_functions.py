"""step_functions.py: steps of fixed shapes caption like steps that grow, batch after batch, compiled or not."""

import os
import shutil
from dataclasses import replace

import pytest
import torch

from captioning.inference import search
from captioning.inference.report_rule import report_search
from captioning.models import step_functions
from captioning.models.inference_weights import prepare_decoder
from captioning.models.step_functions import CompiledStepFunction, StepFunction, check_compiler
from decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(vocab_size=41, n_positions=40, n_embd=32, n_layer=2, n_head=2)
PREFIX, TOKENS, EOS = 6, 9, 3


def make_decoder(config=CONFIG):
    torch.manual_seed(1)
    decoder = Decoder(config).eval().requires_grad_(False)
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.3)
    return decoder


@pytest.fixture(autouse=True)
def fresh_compiler():
    """torch compiles one function for a limited number of shapes in one process."""
    torch._dynamo.reset()


@pytest.fixture
def decoder():
    return make_decoder()


def images(count, seed):
    return torch.randn(count, PREFIX, CONFIG.n_embd, generator=torch.Generator().manual_seed(seed))


def captions(step, count, beams, rule="beam"):
    if rule == "report":
        return report_search(step, count, EOS, EOS, beams, TOKENS).tokens
    if beams == 1:
        return search.greedy(step, count, EOS, EOS, TOKENS).tokens
    return search.beam_search(step, count, EOS, EOS, beams, TOKENS).tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("beams", "rule"), [(1, "beam"), (4, "beam"), (4, "report")])
def test_batches_of_any_size_are_captioned_as_without_compiling(decoder, beams, rule, dtype):
    """One compiled shape serves full and smaller batches, and nothing of a batch is left over in the next."""
    prepare_decoder(decoder, dtype, reorder=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        steps = CompiledStepFunction(decoder, 5, PREFIX, beams, TOKENS, backend="eager")
        found, wanted = [], []
        for seed, count in enumerate((5, 2, 5, 1)):
            prefix = images(count, seed)
            found.append(captions(steps.begin(prefix), count, beams, rule))
            wanted.append(captions(StepFunction(decoder, prefix, beams, TOKENS), count, beams, rule))
    assert found == wanted
    assert len({tuple(caption) for batch in wanted for caption in batch}) > 6
    if dtype == torch.bfloat16:
        assert steps.cache.keys[0].dtype == torch.bfloat16


def test_the_logits_are_those_of_steps_that_grow(decoder):
    prefix = images(3, 0)
    steps, growing = (
        CompiledStepFunction(decoder, 4, PREFIX, 2, TOKENS, backend="eager"),
        StepFunction(decoder, prefix, 2, 9),
    )
    steps.begin(prefix)
    tokens, own = torch.tensor([[5, 7]] * 3), torch.eye(2, dtype=torch.bool).expand(3, 2, 2)
    torch.testing.assert_close(steps(tokens, own), growing(tokens, own), atol=1e-5, rtol=1e-5)
    crossed = torch.cat((own.flip(-1), own), -1)
    torch.testing.assert_close(steps(tokens, crossed), growing(tokens, crossed), atol=1e-5, rtol=1e-5)


def test_steps_are_traced_once(decoder):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    steps = CompiledStepFunction(decoder, 3, PREFIX, 2, TOKENS, backend=backend)
    for count in (3, 1):
        captions(steps.begin(images(count, 0)), count, 2)
    assert len(graphs) == 1


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_compiled_machine_code_captions_alike():
    decoder, prefix = make_decoder(replace(CONFIG, n_layer=1)), images(3, 0)  # a layer less takes half the time
    steps = CompiledStepFunction(decoder, 3, PREFIX, 3, TOKENS)
    assert captions(steps.begin(prefix), 3, 3) == captions(StepFunction(decoder, prefix, 3, TOKENS), 3, 3)


def test_what_does_not_fit_is_refused(decoder):
    with pytest.raises(ValueError, match="--max-new-tokens 39: after 6 image tokens only 34 fit"):
        CompiledStepFunction(decoder, 2, PREFIX, 2, 39, backend="eager")
    steps = CompiledStepFunction(decoder, 2, PREFIX, 2, TOKENS, backend="eager")
    with pytest.raises(ValueError, match="compiled for 2 images of 6 tokens"):
        steps.begin(images(3, 0))


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"--compile needs a C\+\+ compiler"):
        check_compiler(torch.device("cpu"))
    monkeypatch.setattr(step_functions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--compile needs triton"):
        check_compiler(torch.device("cuda"))
