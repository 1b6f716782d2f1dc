"""Captions survive packing exactly; every image and caption is shown, in an order that the seed decides."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from captioning.data.annotations import Sample
from captioning.data.batches import (
    caption_batches,
    captions_of_epoch,
    length_grouped_batches,
    pack_captions,
    packed_length,
    shuffle_captions,
)


def test_packing_by_hand():
    packed = pack_captions([[[5, 6], [7]], [[8]]], eos_id=9, pad_to_multiple=4)
    assert packed.inputs.tolist() == [[9, 5, 6, 9, 7, 9, 9, 9], [9, 8, 9, 9, 9, 9, 9, 9]]
    assert packed.targets.tolist() == [[5, 6, 9, 7, 9, -100, -100, -100], [8, 9] + [-100] * 6]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert packed.segments.tolist() == [[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert packed.slots.tolist() == [[[0, 1, 2], [3, 4, -1]], [[0, 1, -1], [-1, -1, -1]]]
    assert pack_captions([[[5, 6], [7]], [[8]]], eos_id=9).inputs.shape == (2, 5)


def test_captions_come_back_out_of_a_packed_batch():
    rng = np.random.default_rng(0)
    batch = [[rng.integers(1, 50, rng.integers(1, 9)).tolist() for _ in range(rng.integers(1, 6))] for _ in range(7)]
    packed = pack_captions(batch, eos_id=0)
    for row, captions in enumerate(batch):
        for number, caption in enumerate(captions, start=1):
            mine = packed.segments[row] == number
            assert packed.inputs[row, mine].tolist() == [0, *caption]
            assert packed.targets[row, mine].tolist() == [*caption, 0]
            assert packed.positions[row, mine].tolist() == list(range(len(caption) + 1))
        assert packed.segments[row].max() == len(captions)
    assert torch.equal(packed.segments == 0, packed.targets == -100)


def test_packed_batch_moves_with_all_tensors():
    moved = pack_captions([[[1]]], eos_id=2).to("meta")
    assert {t.device.type for t in vars(moved).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert moved.longest == 2


@pytest.mark.parametrize("known", [True, False])
def test_places_are_those_of_the_targets_with_and_without_bos(known):
    packed = pack_captions([[[5, 6], [7]], [[8]]], eos_id=9, pad_to_multiple=4)
    packed = packed if known else replace(packed, kept=None)
    assert packed.places().tolist() == [i for i, t in enumerate(packed.targets.flatten().tolist()) if t != -100]
    with_bos = torch.cat([packed.inputs[:, :1], packed.targets], 1).flatten()
    assert packed.places(bos=True).tolist() == [i for i, t in enumerate(with_bos.tolist()) if t != -100]


@pytest.mark.parametrize(("batch", "multiple"), [([], 1), ([[[1]], []], 1), ([[[1]]], 0)])
def test_packing_refuses_nothing_to_pack(batch, multiple):
    with pytest.raises(ValueError, match=r"at least one|must be 1 or more"):
        pack_captions(batch, eos_id=0, pad_to_multiple=multiple)


def test_an_epoch_shows_all_captions_or_cycles_through_them():
    captions = [[[10 * image + n] for n in range(5)] for image in range(3)] + [[[90]]]
    assert captions_of_epoch(captions, None, 0, 3) == captions
    epochs = [captions_of_epoch(captions, 2, 1, epoch) for epoch in range(5)]
    assert [list(map(len, epoch)) for epoch in epochs] == [[2, 2, 2, 1]] * 5
    assert {str(epoch[3]) for epoch in epochs} == {"[[90]]"}
    shown = [tokens[0] for epoch in epochs for tokens in epoch[1]]
    assert len(set(shown[:4])) == 4  # nothing comes back before the others were shown
    assert sorted(shown) == sorted([10, 11, 12, 13, 14] * 2)  # five epochs of two: each caption twice
    assert list(map(packed_length, epochs[0])) == [4, 4, 4, 2]
    assert captions_of_epoch(captions, 2, 1, 4) == epochs[4]
    with pytest.raises(ValueError, match="--captions-per-image 0"):
        captions_of_epoch(captions, 0, 0, 0)


def test_every_image_and_every_seed_has_its_own_caption_order():
    captions = [[[n] for n in range(5)]] * 20
    images = {str(group) for group in captions_of_epoch(captions, 4, 0, 0)}
    seeds = {str(captions_of_epoch(captions[:1], 4, seed, 0)) for seed in range(20)}
    assert len(images) > 5 and len(seeds) > 5


def test_an_epoch_shows_what_it_showed_in_the_last_version():
    captions = [[[10 * image + n] for n in range(5)] for image in range(3)] + [[[90]]]
    numbers = [[t for group in captions_of_epoch(captions, 3, 4, e) for (t,) in group] for e in (0, 1, 7)]
    assert numbers == [
        [2, 4, 0, 11, 12, 14, 22, 20, 24, 90],
        [1, 3, 2, 13, 10, 11, 23, 21, 22, 90],
        [4, 0, 1, 12, 14, 13, 20, 24, 23, 90],
    ]


def test_length_grouped_batches_cover_all_and_waste_little():
    lengths = np.random.default_rng(0).integers(20, 120, 1003).tolist()
    batches = length_grouped_batches(lengths, 16, seed=0, epoch=0)
    assert sorted(itertools.chain(*batches)) == list(range(1003))
    assert sorted(map(len, batches)) == [1003 % 16] + [16] * 62
    padding = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches) / sum(lengths) - 1
    assert padding < 0.05  # about 0.6 in random order
    assert batches == length_grouped_batches(lengths, 16, seed=0, epoch=0)
    means = [np.mean([lengths[i] for i in batch]) for batch in batches]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.4  # not from short to long
    contents = [{frozenset(b) for b in length_grouped_batches(lengths, 16, s, e)} for s, e in ((0, 0), (0, 1), (1, 0))]
    assert not contents[0] & contents[1] and not contents[0] & contents[2]
    assert length_grouped_batches([], 4, 0, 0) == []
    with pytest.raises(ValueError, match="--batch-size 0"):
        length_grouped_batches([1], 0, 0, 0)


def test_caption_batches_show_every_caption_once_and_keep_an_images_together():
    captions = [[[image, number] for number in range(5 - image % 2)] for image in range(40)]
    batches = caption_batches(captions, 16, seed=0, epoch=0)
    assert [sum(map(len, batch.captions)) for batch in batches] == [16] * 11 + [4]  # 180 captions
    assert all(len(batch.images) == len(set(batch.images)) for batch in batches)
    pairs = [(image, caption) for batch in batches for image, group in zip(*batch, strict=True) for caption in group]
    assert all(image == caption[0] for image, caption in pairs)
    assert sorted(caption for _, caption in pairs) == sorted(itertools.chain(*captions))
    assert any(len(group) > 1 for batch in batches for group in batch.captions)
    assert batches == caption_batches(captions, 16, seed=0, epoch=0)
    others = [caption_batches(captions, 16, seed, epoch) for seed, epoch in ((0, 1), (1, 0))]
    assert batches != others[0] != others[1] != batches
    assert caption_batches([], 4, 0, 0) == []
    with pytest.raises(ValueError, match="--batch-size 0"):
        caption_batches(captions, 0, 0, 0)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_shuffled_captions_are_a_derangement(tmp_path, count):
    samples = [Sample(i, tmp_path / f"{i}.jpg", (f"caption {i}",)) for i in range(count)]
    for seed in range(5):
        dealt = shuffle_captions(samples, seed)
        assert [(s.image_id, s.path) for s in dealt] == [(s.image_id, s.path) for s in samples]
        assert sorted(s.captions for s in dealt) == sorted(s.captions for s in samples)
        assert all(new.captions != old.captions for new, old in zip(dealt, samples, strict=True))
        assert dealt == shuffle_captions(samples, seed)
    assert count < 50 or shuffle_captions(samples, 0) != shuffle_captions(samples, 1)


def test_one_image_has_no_other_to_deal_to(tmp_path):
    with pytest.raises(ValueError, match="1 image"):
        shuffle_captions([Sample(1, tmp_path / "a.jpg", ("a",))], 0)
