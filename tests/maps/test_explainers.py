"""explainers.py: both models give their attention, and a planted patch comes back to the right pixels."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from captioning.data.tokenizer import Tokenizer
from captioning.inference import captions
from captioning.inference.search import SearchResult
from captioning.maps import by_probing, explainers
from captioning.maps.attention import METHODS, MapSpec, cell_centres, token_maps
from captioning.maps.by_agreement import POINTS
from captioning.maps.explainers import (
    CaptionerExplainer,
    LlavaExplainer,
    explain,
    explain_each,
    read,
    specs_to_compare,
    specs_to_show,
)
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.models.llava import PROMPTS, load_llava
from captioning.profiles import PROFILES
from decoder import LoraConfig, build_decoder

CPU = torch.device("cpu")
CAPTION = "A red ball lies on the road."


@pytest.fixture(scope="module")
def p2(tiny_profile):
    """A tiny random captioner; with the CLS token left out, as in setting 4, when ``use_cls`` is off."""

    def build(use_cls=True, crop=1.0):
        lora = LoraConfig(rank=2, alpha=2)
        kwargs = {**tiny_profile.encoder_kwargs, "crop_pct": crop}
        config = CaptionerConfig(
            encoder=tiny_profile.encoder, encoder_weights="random", encoder_kwargs=kwargs, use_cls=use_cls, lora=lora
        )
        captioner = Captioner(config, build_decoder(tiny_profile.decoder, lora)).merge()
        return CaptionerExplainer(captioner, Tokenizer(tiny_profile.tokenizer), 3, 12)

    return build


@pytest.fixture(scope="module")
def p1():
    return LlavaExplainer(load_llava(PROFILES["micro"].llava, CPU, torch.float32), PROMPTS[1], 1, 32)


@pytest.fixture(params=["p1", "p2", "p2 without CLS"])
def explainer(request, p1, p2):
    return p1 if request.param == "p1" else p2(use_cls=request.param == "p2")


def image(size=(200, 120)):
    return Image.effect_noise(size, 80).convert("RGB")


def test_maps_explain_the_caption_that_the_adapters_search_rule_finds(p2, monkeypatch):
    monkeypatch.setattr(captions, "report_search", lambda *sizes, rules: SearchResult([[40, 41]], []))
    explainer = p2()
    inputs, found = explainer.prepare(image()), []
    for rule in ("beam", "report"):
        explainer.captioner.config = replace(explainer.captioner.config, search_rule=rule)
        found.append(explainer.text(explainer.caption(inputs)))
    assert found[0] != found[1] == explainer.text([40, 41])


def test_weights_are_attention_and_equal_with_and_without_the_images_rows(explainer):
    inputs, tokens = explainer.prepare(image()), explainer.tokens(CAPTION)
    with torch.no_grad():
        part, whole = (explainer.capture(inputs, tokens, w) for w in (False, True))
    assert whole.has_image_rows
    assert not part.has_image_rows
    assert part.grid[0] * part.grid[1] == len(part.patches)
    for few, many in zip(part.weights, whole.weights, strict=True):
        assert torch.allclose(many.sum(-1), torch.ones(()), atol=1e-5)
        assert torch.allclose(few, many[:, :, -few.shape[2] :], atol=1e-5)
        assert many[0].triu(1).abs().max() == 0  # causal
    assert torch.allclose(part.logits, whole.logits, atol=1e-3)


def test_logits_are_those_of_the_fused_path(p2):
    """The manual softmax and the fused kernel are one mathematics."""
    explainer = p2()
    captioner, tokens = explainer.captioner, explainer.tokens(CAPTION)
    features = explainer.prepare(image())
    ids = [explainer.tokenizer.eos_id, *tokens]
    with torch.no_grad():
        capture = explainer.capture(features, tokens)
        x = torch.cat([captioner.prefix(features), captioner.decoder.embed(torch.tensor([ids]))], 1)
        hidden = captioner.decoder(x, torch.arange(x.shape[1]))[0, -len(ids) :]
    assert torch.allclose(captioner.decoder.logits(hidden), capture.logits, atol=1e-5)


def test_llavas_weights_are_the_librarys_eager_ones(p1):
    row, tokens = p1.prepare(image()), p1.tokens(CAPTION)
    model = p1.llava.model
    with torch.no_grad():
        capture = p1.capture(row, tokens)
        ids = torch.cat([row.input_ids, torch.tensor(tokens)])[None]
        model.set_attn_implementation("eager")
        eager = model(input_ids=ids, pixel_values=row.pixel_values, output_attentions=True)
        model.set_attn_implementation("sdpa")
    for ours, theirs in zip(capture.weights, eager.attentions, strict=True):
        assert torch.allclose(ours[0], theirs[0, :, -len(tokens) - 1 :], atol=1e-5)
    assert torch.allclose(capture.logits, eager.logits[0, -len(tokens) - 1 :], atol=1e-3)


def test_capturing_leaves_the_captions_alone(explainer):
    inputs = explainer.prepare(image())
    before = explainer.caption(inputs)
    read(explainer, inputs, explainer.tokens(CAPTION), [MapSpec("grad", "all")])
    assert explainer.caption(inputs) == before


def test_a_tokens_gradient_is_its_own(explainer):
    """One backward pass for all tokens equals one per token."""
    inputs, tokens = explainer.prepare(image()), explainer.tokens(CAPTION)
    with torch.enable_grad():
        capture = explainer.capture(inputs, tokens)
    together = token_maps(capture, MapSpec("grad", "all", "mean"))
    for t in (0, 3, len(tokens) - 1):
        with torch.enable_grad():
            alone = explainer.capture(inputs, tokens)
        gradients = torch.autograd.grad(alone.logits[t, tokens[t]], alone.weights)
        expected = sum(
            (w.detach()[0, :, t] * g[0, :, t]).clamp(min=0).mean(0)[alone.patches]
            for w, g in zip(alone.weights, gradients, strict=True)
        )
        assert torch.allclose(together[t], expected, rtol=1e-3, atol=1e-7)


def test_hidden_states_read_out_to_the_logits(explainer):
    """The caption's rows of the last layer say what the model says, counted from the vocabulary's mean."""
    inputs, tokens = explainer.prepare(image()), explainer.tokens(CAPTION)
    explainer.caption(inputs)  # leaves the prompt's keys and values in LLaVA's row
    with torch.no_grad():
        part, whole = (explainer.capture(inputs, tokens, w, hidden=True) for w in (False, True))
    assert len(part.hidden) == len(whole.hidden) == explainer.n_layer
    for few, many in zip(part.hidden, whole.hidden, strict=True):
        assert few.shape[0] == part.weights[0].shape[-1]
        assert torch.allclose(few, many, atol=1e-3)
    expected = (part.logits - part.logits.mean(1, keepdim=True))[:, tokens]
    assert torch.allclose(part.read_out(part.hidden[-1][-len(tokens) - 1 :]), expected, atol=1e-3)


def test_asking_again_with_the_same_image_says_the_same(explainer):
    inputs, tokens = explainer.prepare(image()), explainer.tokens(CAPTION)
    with torch.no_grad():
        capture = explainer.capture(inputs, tokens)
        probe = capture.probe()
        twice = torch.stack([probe.image, probe.image])
        expected = capture.logits[:-1].log_softmax(-1)[range(len(tokens)), tokens]
        assert torch.allclose(probe.log_probs(twice), expected.expand(2, -1), atol=1e-3)
        twice[1, probe.patches] = 0
        assert not torch.allclose(probe.log_probs(twice)[1], expected, atol=1e-2)
    assert len(probe.patches) == len(capture.patches)


def test_linked_weights_are_the_same_and_pass_gradients_from_row_to_row(explainer):
    inputs, tokens = explainer.prepare(image()), explainer.tokens(CAPTION)
    capture = explainer.capture(inputs, tokens, whole=True)
    weights, logits = capture.linked()
    for linked, apart in zip(weights, capture.weights, strict=True):
        assert torch.allclose(linked, apart, atol=1e-5)
    gradients = torch.autograd.grad(logits[2, tokens[2]], weights, retain_graph=True)
    rows = gradients[0][0].abs().sum((0, 2))  # of the first layer, by row
    assert rows[capture.patches].max() > 0 and rows[-len(tokens) + 2 :].max() == 0
    maps = token_maps(capture, MapSpec("chefer", "all"))
    assert maps.shape == (len(tokens), len(capture.patches)) and maps.max() > 0


@pytest.mark.parametrize("method", ["occlusion", "ig"])
def test_asking_finds_the_patches_that_differ(explainer, method, monkeypatch):
    """Two patches differ from the mean, one upwards and one downwards: any other is already what it is replaced by."""
    monkeypatch.setattr(by_probing, "SIDE", 1)  # the tiny captioner has only 3 x 3 patches
    inputs, tokens = explainer.prepare(image()), explainer.tokens(CAPTION)
    with torch.no_grad():
        capture = explainer.capture(inputs, tokens)
        probe, differ = capture.probe(), [2, len(capture.patches) - 2]
        tokens = probe.image.clone()
        mean = probe.image[probe.patches].mean(0)
        tokens[probe.patches] = mean
        tokens[probe.patches[differ]] = torch.stack([3 * mean, -mean])
        capture.probe = lambda: replace(probe, image=tokens)
        maps = token_maps(capture, MapSpec(method))
    assert set(maps.max(0).values.topk(2).indices.tolist()) == set(differ)
    maps[:, differ] = 0
    assert maps.max() < 1e-3


def test_the_cls_token_is_no_patch(p2):
    """Off by one would shift every map by a cell."""
    with_cls, without = p2(), p2(use_cls=False)
    assert with_cls.captioner.patch_columns.tolist() == list(range(1, 10))
    assert without.captioner.patch_columns.tolist() == list(range(9))


def test_patches_are_where_the_prompt_has_the_image(p1):
    row = p1.prepare(image())
    capture = p1.capture(row, p1.tokens(CAPTION))
    text = p1.llava.processor.tokenizer.decode(row.input_ids[capture.patches[0] - 4 : capture.patches[0]])
    assert text.startswith("<s>USER:")
    assert (row.input_ids[capture.patches] == p1.llava.image_token_id).all()
    assert row.input_ids[capture.patches[-1] + 1] != p1.llava.image_token_id


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (240, 240), (600, 130)])
@pytest.mark.parametrize("model", ["p1", "p2", "p2 cropped"])
def test_a_planted_patch_lands_on_its_pixels(size, model, p1, p2):
    """A white square in the original is found in the model's own pixels, and its cell is mapped back to the original.

    Transposed grids, a wrong crop and an off-by-one token would all land elsewhere.
    """
    explainer = p1 if model == "p1" else p2(crop=0.8 if "cropped" in model else 1.0)
    left, top, right, bottom = explainer.window(size)
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    side = min(size) // 8
    for share_x, share_y in ((0.2, 0.35), (0.8, 0.15), (0.55, 0.9)):
        x, y = left + share_x * (right - left), top + share_y * (bottom - top)
        picture = Image.new("RGB", size)
        picture.paste((255, 255, 255), tuple(int(v) for v in (x - side, y - side, x + side, y + side)))
        inputs = explainer.prepare(picture)
        pixels = inputs.pixel_values if model == "p1" else explainer.captioner.transform(picture)[None]
        gh, gw = explainer.capture(inputs, explainer.tokens("A")).grid
        cells = torch.nn.functional.adaptive_avg_pool2d(pixels.mean(1, keepdim=True), (gh, gw))[0, 0]
        row, column = divmod(int(cells.argmax()), gw)
        xs, ys = cell_centres((left, top, right, bottom), (gh, gw))
        assert abs(xs[column] - x) <= side + (right - left) / gw / 2
        assert abs(ys[row] - y) <= side + (bottom - top) / gh / 2


def test_an_explanation_holds_what_pictures_need(explainer, tmp_path):
    image().save(tmp_path / "x.png")
    specs = specs_to_show(MapSpec("grad", "all", "mean"), explainer.n_layer)
    explanation, attention = explain(explainer, tmp_path / "x.png", specs, CAPTION)
    assert explanation.words == CAPTION.split()
    assert explanation.caption == CAPTION
    assert {found.spec.method for found in explanation.word_maps} == {n for n, m in METHODS.items() if not m.slow}
    assert explanation.word_maps[0].spec.method == "grad"
    for found in explanation.word_maps:
        finer = POINTS if found.spec.method == "agree" else 1
        assert found.maps.shape == (7, *(finer * size for size in attention.capture.grid))
        assert (found.maps >= 0).all()
        assert found.maps.max() > 0
    assert ((explanation.image_mass > 0) & (explanation.image_mass < 1)).all()


def test_what_a_model_cannot_serve_is_left_out_with_the_reason(explainer, tmp_path, monkeypatch):
    image().save(tmp_path / "x.png")
    specs = [MapSpec(method, "all") for method in ("raw", "grad", "relative")]
    whole, _, absent = explain_each(explainer, tmp_path / "x.png", specs, CAPTION)
    assert [found.spec for found in whole.word_maps] == specs and absent == {}
    served = explainers.read

    def without_gradients(explainer, inputs, tokens, specs, *more):
        if any(spec.method == "grad" for spec in specs):
            raise ValueError("grad needs gradients, which this model does not hand out\nand more")
        return served(explainer, inputs, tokens, specs, *more)

    monkeypatch.setattr(explainers, "read", without_gradients)
    rest, _, absent = explain_each(explainer, tmp_path / "x.png", specs, CAPTION)
    assert absent == {specs[1]: "grad needs gradients, which this model does not hand out"}
    assert [found.spec for found in rest.word_maps] == [specs[0], specs[2]]
    for one, other in zip(whole.word_maps[::2], rest.word_maps, strict=True):
        assert (one.maps == other.maps).all()
    with pytest.raises(ValueError, match="grad needs"):
        explain_each(explainer, tmp_path / "x.png", specs[1:], CAPTION)


def test_tables_have_every_method_once(explainer):
    for slow in (False, True):
        specs = specs_to_compare(explainer.n_layer, explainer.n_head, slow)
        assert len(specs) == len(set(specs))
        assert {spec.method for spec in specs} == {name for name, m in METHODS.items() if slow or not m.slow}


def test_an_empty_caption_has_nothing_to_explain(explainer):
    with pytest.raises(ValueError, match="no word"):
        read(explainer, explainer.prepare(image()), [], [MapSpec()])
