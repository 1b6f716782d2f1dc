"""Captions survive packing exactly; every image and caption is shown, in an order that the seed decides."""

import itertools

import numpy as np
import pytest
import torch

from captioning.data.annotations import Sample
from captioning.data.batches import CaptionDataset, length_grouped_batches, pack_captions, shuffle_captions


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
    assert {t.device.type for t in vars(moved).values()} == {"meta"}


@pytest.mark.parametrize(("batch", "multiple"), [([], 1), ([[[1]], []], 1), ([[[1]]], 0)])
def test_packing_refuses_nothing_to_pack(batch, multiple):
    with pytest.raises(ValueError, match=r"at least one|must be 1 or more"):
        pack_captions(batch, eos_id=0, pad_to_multiple=multiple)


def test_dataset_gives_all_captions_or_cycles_through_them():
    captions = [[[10 * image + n] for n in range(5)] for image in range(3)] + [[[90]]]
    assert [CaptionDataset(captions)[i] for i in range(4)] == list(enumerate(captions))
    dataset = CaptionDataset(captions, captions_per_image=2, seed=1)
    shown = []
    for epoch in range(5):
        dataset.set_epoch(epoch)
        index, chosen = dataset[1]
        assert (index, len(chosen), dataset[3]) == (1, 2, (3, [[90]]))
        assert dataset[1][1] == chosen
        shown += [tokens[0] for tokens in chosen]
    assert len(set(shown[:4])) == 4  # nothing comes back before the others were shown
    assert sorted(shown) == sorted([10, 11, 12, 13, 14] * 2)  # five epochs of two: each caption twice
    assert dataset.lengths() == [4, 4, 4, 2]
    other = CaptionDataset(captions, captions_per_image=2, seed=1)
    other.set_epoch(4)
    assert [other[i] for i in range(4)] == [dataset[i] for i in range(4)]
    with pytest.raises(ValueError, match="--captions-per-image 0"):
        CaptionDataset(captions, captions_per_image=0)


def test_every_image_and_every_seed_has_its_own_caption_order():
    captions = [[[n] for n in range(5)]] * 20
    images = {str(CaptionDataset(captions, 4)[index][1]) for index in range(20)}
    seeds = {str(CaptionDataset(captions, 4, seed)[0][1]) for seed in range(20)}
    assert len(images) > 5 and len(seeds) > 5


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
