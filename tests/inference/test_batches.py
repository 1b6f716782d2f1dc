"""batches.py: entries are begun one batch ahead and captioned in batches that shrink when they must."""

import logging

import pytest
import torch
from level_captioner import grey, say

from captioning.data import images as images_module
from captioning.data import metadata
from captioning.inference.batches import Entry, Job, ShrinkingBatch, caption_entries


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 7.64 GiB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_batches_halve_when_memory_runs_out_and_stay_halved(caplog, error):
    tried = []

    def function(items):
        tried.append(len(items))
        if len(items) > 3:
            raise error
        return [item * 2 for item in items]

    halving = ShrinkingBatch(function)
    with caplog.at_level(logging.WARNING):
        assert halving(list(range(8))) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert tried == [8, 4, 2, 2, 2, 2]
    assert halving([5, 6, 7]) == [10, 12, 14]
    assert tried[6:] == [2, 1]
    assert "continuing with 2" in caplog.text


def test_another_error_of_the_device_is_not_taken_for_one_of_memory():
    def function(items):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`")

    with pytest.raises(RuntimeError, match="EXECUTION_FAILED"):
        ShrinkingBatch(function)([1, 2])


def test_one_image_that_does_not_fit_is_an_error_with_a_remedy():
    def function(items):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ValueError, match="with one image: use a smaller model"):
        ShrinkingBatch(function)([1, 2])


def test_a_batch_is_begun_before_the_one_before_it_is_captioned(images):
    images[1].write_bytes(b"")
    events, failed = [], []

    def begin(levels):
        events.append(f"begin {levels}")
        return levels

    def caption(levels):
        events.append(f"caption {levels}")
        return say(levels)

    job = Job(grey, caption, begin=begin)
    batches = list(caption_entries(map(Entry.of, images), job, 3, lambda entry, error: failed.append(entry.key)))
    assert batches == [{"0": "level 0", "2": "level 2"}, {str(k): f"level {k}" for k in (3, 4, 5)}, {"6": "level 6"}]
    assert failed == ["1"]
    assert events == [
        "begin [0, 2]",
        "begin [3, 4, 5]",
        "caption [0, 2]",
        "begin [6]",
        "caption [3, 4, 5]",
        "caption [6]",
    ]


def test_a_job_remembers_how_many_images_fit(images):
    tried = []

    def caption(levels):
        tried.append(len(levels))
        if len(levels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return say(levels)

    job = Job(grey, caption)
    for _ in range(2):  # as over two shards
        list(caption_entries(map(Entry.of, images[:4]), job, 4, lambda entry, error: None))
    assert tried == [4, 2, 2, 2, 2]


@pytest.mark.parametrize("error", [RuntimeError("1x1"), KeyError("mode"), MemoryError(), OSError("no name")])
def test_whatever_one_picture_raises_it_is_named_and_the_others_are_captioned(images, error):
    def prepare(image):
        if grey(image) == 4:
            raise error
        return grey(image)

    failed = {}
    batches = caption_entries(map(Entry.of, images), Job(prepare, say), 3, lambda entry, e: failed.update({entry: e}))
    captions = {key: caption for batch in batches for key, caption in batch.items()}
    assert captions == {str(k): f"level {k}" for k in range(7) if k != 4}
    ((entry, reason),) = failed.items()
    assert (entry.key, type(reason)) == ("4", ValueError)
    assert str(reason).startswith(f"{images[4]}: ")


def test_what_pillow_raises_for_one_picture_does_not_end_a_run(images, monkeypatch):
    """struct.error, TypeError and AttributeError did."""
    whole = metadata.orientation
    monkeypatch.setattr(images_module, "orientation", lambda image: whole(image) if grey(image) != 4 else 1 / 0)
    failed = []
    batches = caption_entries(map(Entry.of, images), Job(grey, say), 3, lambda entry, error: failed.append(str(error)))
    assert sum(map(len, batches)) == 6
    assert failed == [f"{images[4]}: cannot be read as an image (division by zero); replace it or take it out"]
