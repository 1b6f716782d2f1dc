"""attention.py: layers, heads, methods, words and pixels on weights that are known."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from captioning.maps.attention import (
    CaptionAttention,
    Capture,
    Heads,
    MapSpec,
    cell_centres,
    crop_window,
    parse_layers,
    token_maps,
    words_of,
)

GRID = (3, 4)
L, H, T, BEFORE, P = 3, 2, 5, 2, 12  # two positions before the patches, BOS after them
S = BEFORE + P + 1 + T
PATCHES = torch.arange(BEFORE, BEFORE + P)


def capture(weights, tokens=None, logits=None):
    tokens = list(range(T)) if tokens is None else tokens
    return Capture(weights, torch.zeros(T + 1, 9) if logits is None else logits, tokens, PATCHES, GRID)


@pytest.fixture
def random_capture():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(L, 1, H, S, S, generator=generator).masked_fill(~torch.ones(S, S).tril().bool(), -torch.inf)
    return capture(list(scores.softmax(-1)))


# --------------------------------------------------------------------------------------------------- layers and heads


def test_layers_by_name():
    assert parse_layers("all", 4) == [0, 1, 2, 3]
    assert parse_layers("last", 4) == parse_layers("-1", 4) == parse_layers("3", 4) == [3]
    assert parse_layers("1-2", 4) == [1, 2]
    for bad in ("4", "-5", "2-4", "3-2", "top", ""):
        with pytest.raises(ValueError, match=r"--layers"):
            parse_layers(bad, 4)
    with pytest.raises(ValueError, match="layers 0 to 3"):
        parse_layers("7", 4)


def test_heads_by_name():
    assert [str(Heads.parse(t, 4)) for t in ("max", "mean", "2", "top3", "head 1")] == [
        "max",
        "mean",
        "head 2",
        "top 3",
        "head 1",
    ]
    with pytest.raises(ValueError, match="heads 0 to 3"):
        Heads.parse("4", 4)
    with pytest.raises(ValueError, match="topK"):
        Heads.parse("top0", 4)


def test_heads_reduce_as_named(random_capture):
    part = random_capture.image_part("predict")  # (L, H, T, P)
    assert part.shape == (L, H, T, P)
    assert torch.allclose(token_maps(random_capture, MapSpec("raw", "1", "mean")), part[1].mean(0))
    assert torch.allclose(token_maps(random_capture, MapSpec("raw", "1", "max")), part[1].amax(0))
    assert torch.allclose(token_maps(random_capture, MapSpec("raw", "1", "1")), part[1, 1])
    assert torch.allclose(token_maps(random_capture, MapSpec("raw", "0-1", "0")), part[:2, 0].mean(0))


def test_the_two_rows_of_a_token_are_neighbours(random_capture):
    predict, own = (token_maps(random_capture, MapSpec("raw", "2", "0", row)) for row in ("predict", "own"))
    whole = random_capture.weights[2][0, 0][:, PATCHES]
    assert torch.equal(predict, whole[-T - 1 : -1])
    assert torch.equal(own, whole[-T:])


def test_top_heads_are_those_that_look_at_one_place_of_the_image():
    """One head spreads over the image, one looks at one patch, one looks at the text: top1 is the second."""
    weights = torch.zeros(1, 3, T + 1, S)
    weights[0, 0, :, PATCHES] = 1 / P
    weights[0, 1, :, PATCHES[5]] = 0.9
    weights[0, 1, :, 0] = 0.1
    weights[0, 2, :, PATCHES[1]] = 0.01
    weights[0, 2, :, 0] = 0.99
    maps = token_maps(capture([weights]), MapSpec("raw", "0", "top1"))
    assert (maps.argmax(-1) == 5).all()
    assert maps.max() == pytest.approx(0.9)


def count_operations(function):
    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **kwargs or {})

    with Counter() as counter:
        function()
    return counter.count


def test_choosing_heads_takes_no_more_operations_with_more_of_them():
    """It took an operation for each pair of heads: 5 s at LLaVA's 32 layers of 32 heads, and a wait on a GPU each."""
    few, many = (torch.rand(count, count, 2, 9).softmax(-1) for count in (2, 16))
    counts = {
        len(part): count_operations(lambda part=part: Heads("top", 1).choose(part, range(len(part))))
        for part in (few, many)
    }
    assert counts[16] == counts[2]


def test_top_heads_are_chosen_among_the_given_layers(random_capture):
    part = random_capture.image_part("predict")
    share = part / part.sum(-1, keepdim=True)
    entropy, mass = -(share * share.log()).sum(-1).mean(-1), part.sum(-1).mean(-1)  # (L, H)
    pairs = [(layer, head) for layer in (1, 2) for head in range(H)]
    looking = [pair for pair in pairs if mass[pair] >= mass[1:].mean()]
    expected = sorted(looking, key=lambda pair: entropy[pair])[:2]
    chosen = Heads("top", 2).choose(part, [1, 2])
    assert sorted((layer, head) for layer, heads in chosen for head in heads) == sorted(expected)


def test_the_attention_on_the_image_leaves_the_device_once(random_capture, monkeypatch):
    copies, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.shape) or cpu(tensor))
    attention = CaptionAttention(random_capture, [(str(n), [n]) for n in range(T)])
    for spec in (
        MapSpec(method, "all", heads, row)
        for method in ("raw", "relative")
        for heads in ("mean", "top2", "1")
        for row in ("predict", "own")
    ):
        attention.maps(spec)
        attention.image_mass(spec)
    assert copies == [(L, H, T + 1, P)]
    attention.maps(MapSpec("rollout", "all"))
    assert copies[1:] == [(T, P)]  # not one a layer or word


# ------------------------------------------------------------------------------------------------------------ methods


def test_relative_takes_away_what_every_word_gets():
    """A sink patch outshines the patch that only one word looks at, until it is divided out."""
    weights = torch.full((1, 1, T + 1, S), 1e-3)
    weights[..., PATCHES[0]] = 0.5
    weights[0, 0, 2, PATCHES[7]] = 0.2
    found = {m: token_maps(capture([weights]), MapSpec(m, "0", "mean"))[2].argmax().item() for m in ("raw", "relative")}
    assert found == {"raw": 0, "relative": 7}


def test_generic_takes_away_what_a_generic_caption_gets(random_capture):
    spec, raw = MapSpec("generic", "1", "mean"), MapSpec("raw", "1", "mean")
    with pytest.raises(ValueError, match="needs a capture of a generic caption"):
        token_maps(random_capture, spec)
    random_capture.generic = capture([w.roll(1, 1) ** 2 for w in random_capture.weights])
    common = token_maps(random_capture.generic, raw).mean(0)
    assert torch.allclose(token_maps(random_capture, spec), token_maps(random_capture, raw) / (common + common.mean()))


def test_rollout_follows_attention_through_layers():
    """Layer 0 moves patch 3 into position BOS, layer 1 lets the first token look at BOS only: it saw patch 3."""
    eye = torch.eye(S)[None, None]
    first, second = eye.clone(), eye.clone()
    bos = BEFORE + P
    first[0, 0, bos] = torch.eye(S)[PATCHES[3]]
    second[0, 0, bos + 1] = torch.eye(S)[bos]
    maps = token_maps(capture([first, second]), MapSpec("rollout", "all", "mean", "own"))
    assert maps[0].argmax() == 3
    assert maps[0, 3] == pytest.approx(0.25)
    assert maps[1].sum() == 0
    with pytest.raises(ValueError, match="image's own rows"):
        token_maps(capture([w[:, :, -T - 1 :] for w in (first, second)]), MapSpec("rollout", "all"))


def test_grad_keeps_what_speaks_for_the_token():
    """Two patches get the same attention; one speaks for the token and one against it."""
    weights = torch.full((1, 1, T + 1, S), 0.1, requires_grad=True)
    value = torch.zeros(S)
    value[PATCHES[4]], value[PATCHES[9]] = 1.0, -1.0
    logits = torch.zeros(T + 1, 9).index_put((torch.tensor([1]), torch.tensor([1])), (weights[0, 0, 1] * value).sum())
    maps = token_maps(capture([weights], logits=logits), MapSpec("grad", "0", "mean"))
    assert maps[1].argmax() == 4
    assert maps[1, 9] == 0
    assert maps[[0, 2, 3, 4]].sum() == 0
    with pytest.raises(ValueError, match="needs a capture with gradients"):
        token_maps(capture([weights.detach()]), MapSpec("grad", "0"))


def linked_capture(share):
    """A capture of two layers: the first lets BOS read patch 3, by ``share``; the second a token BOS and patch 7."""
    first, second = torch.zeros(2, 1, 1, S, S)
    bos = BEFORE + P
    first[0, 0, bos, PATCHES[3]] = share
    second[0, 0, bos + 1, [bos, PATCHES[7]]] = torch.tensor([0.6, 0.4])
    weights = [first.requires_grad_(), second.requires_grad_()]
    read = (second @ first + second)[0, 0, bos + 1]  # by the row of token 0, which predicts token 1
    logits = torch.zeros(T + 1, 9)
    logits[1, 1] = read[PATCHES[3]] + read[PATCHES[7]]
    found = capture([w.detach() for w in weights])
    found.linked = lambda: (weights, logits)
    return found


def test_chefer_follows_relevance_through_other_positions():
    """The token's own row never looks at patch 3: it reads it at BOS, which had read it."""
    maps = token_maps(linked_capture(0.9), MapSpec("chefer", "all", "mean"))
    assert set(maps[1].topk(2).indices.tolist()) == {3, 7}
    assert maps[1, 3] == pytest.approx(0.6 * 0.9 * 0.9 * 0.6)  # weight times gradient of either layer
    assert maps[1, 7] == pytest.approx(0.4)
    assert maps[[0, 2, 3, 4]].sum() == 0
    assert token_maps(linked_capture(0.9), MapSpec("chefer", "last", "mean"))[1].argmax() == 7
    with pytest.raises(ValueError, match="chefer reads the caption again"):
        token_maps(capture([torch.rand(1, 1, S, S)]), MapSpec("chefer", "0"))


def test_unknown_methods_and_rows():
    with pytest.raises(ValueError, match="--method"):
        MapSpec("deep")
    with pytest.raises(ValueError, match="--row"):
        MapSpec(row="next")


# -------------------------------------------------------------------------------------------------------------- words


def test_words_are_grouped_by_position():
    """Repeated words would collapse if they were merged by text."""
    pieces = ["a", " bl", "ue", " tree", " and", " a", " bl", "ue", " tree", "."]
    found = words_of(range(10), lambda ids: "".join(pieces[i] for i in ids))
    assert found == [
        ("a", [0]),
        ("blue", [1, 2]),
        ("tree", [3]),
        ("and", [4]),
        ("a", [5]),
        ("blue", [6, 7]),
        ("tree.", [8, 9]),
    ]


def test_white_space_tokens_belong_to_the_next_word_and_empty_ones_to_none():
    pieces = [" ", "a", "", " ", "dog"]
    found = words_of(range(5), lambda ids: "".join(pieces[i] for i in ids))
    assert found == [("a", [0, 1]), ("dog", [3, 4])]


def test_the_map_of_a_word_is_the_mean_of_its_tokens():
    maps = torch.arange(24.0).reshape(2, 12)
    weights = torch.zeros(1, 1, 3, S)
    weights[0, 0, :2, PATCHES] = maps
    words = [("one", [0, 1]), ("two", [1])]
    merged = CaptionAttention(capture([weights], tokens=[0, 1]), words).maps(MapSpec("raw", "0", "0"))
    assert merged.shape == (2, *GRID)
    assert np.allclose(merged[0].ravel(), maps.mean(0))
    assert merged[1, 2, 3] == 23


# ------------------------------------------------------------------------------------------------------------- pixels


def test_what_a_centre_crop_sees():
    assert crop_window((640, 480), 224, (224, 224)) == (80, 0, 560, 480)
    assert crop_window((300, 600), 100, (100, 100)) == (0, 150, 300, 450)
    assert crop_window((400, 200), 100, (80, 80)) == (120, 20, 280, 180)
    assert crop_window((640, 480), None, (224, 224)) == (0, 0, 640, 480)
    with pytest.raises(ValueError, match="would pad"):
        crop_window((100, 100), 96, (112, 112))


def test_centres_of_cells():
    xs, ys = cell_centres((80, 0, 560, 480), (3, 4))
    assert xs.tolist() == [140, 260, 380, 500]
    assert ys.tolist() == [80, 240, 400]
