"""loading.py: steps are loaded in order, beside a GPU in a thread and ahead, on a CPU when they are taken."""

import threading

import pytest
import torch

from captioning.data.batches import Batch
from captioning.distributed import ALONE, Processes
from captioning.training.loading import Loader, Split

EOS = 9
GROUPS = [[Batch([n], [[[n, 1]]])] for n in range(5)]


class Features:
    """A cache of one number an image, which notes who asks for it, and fails at an image if told to."""

    def __init__(self, complete=True, fails_at=None):
        self.complete, self.fails_at = complete, fails_at
        self.asked = [threading.Event() for _ in GROUPS]
        self.threads = set()

    def gather(self, indices):
        self.threads.add(threading.current_thread() is threading.main_thread())
        if self.fails_at in indices:
            raise OSError(f"features.bin: image {self.fails_at} cannot be read")
        for index in indices:
            self.asked[index].set()
        return torch.tensor(indices, dtype=torch.float16)[:, None, None]


def loader(features, device, processes=ALONE):
    return Loader(Split([], [], features), EOS, torch.device(device), processes)


def images_of(steps):
    return [int(loaded.features) for [loaded] in steps]


def test_beside_a_gpu_a_thread_loads_the_next_step_while_this_one_is_taken():
    features = Features()
    for number, [loaded] in enumerate(loader(features, "mps").steps(GROUPS)):
        assert (loaded.features.dtype, int(loaded.features)) == (torch.float16, number)
        assert loaded.packed.inputs.tolist()[0][:3] == [EOS, number, 1]
        assert features.asked[min(number + 1, 4)].wait(60)  # before anybody asked for the next step
    assert features.threads == {False}


@pytest.mark.parametrize(("device", "complete"), [("cpu", True), ("mps", False)])
def test_on_a_cpu_and_where_images_are_still_encoded_nothing_is_loaded_ahead(device, complete):
    features = Features(complete)
    steps = loader(features, device).steps(GROUPS)
    next(steps)
    assert [event.is_set() for event in features.asked] == [True, False, False, False, False]
    assert images_of(steps) == [1, 2, 3, 4]
    assert features.threads == {True}


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_what_loading_raises_ends_the_training_with_its_message(device):
    steps = loader(Features(fails_at=2), device).steps(GROUPS)
    assert images_of([next(steps), next(steps)]) == [0, 1]
    with pytest.raises(OSError, match="image 2 cannot be read"):
        next(steps)


def test_a_process_without_an_image_of_a_batch_loads_nothing():
    second = Processes(1, 2)
    loaded = loader(Features(), "cpu", second).load(Batch([3], [[[3]]]))
    assert (list(loaded.own), loaded.features, loaded.captions) == ([], None, [])
    loaded = loader(Features(), "cpu", second).load(Batch([3, 4], [[[3]], [[4]]]))
    assert (int(loaded.features), loaded.captions) == (4, [[[4]]])
