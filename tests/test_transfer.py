"""Host arrays on their way to a device."""

from __future__ import annotations

import numpy as np
import torch

from autoprune.parts.transfer import all_to_device

CPU = torch.device("cpu")


def test_arrays_arrive_as_they_were_whatever_their_integers():
    arrays = [
        np.arange(6).reshape(2, 3),
        np.array([[True], [False], [True]]),
        np.empty((0, 4), dtype=np.int64),
        np.arange(3, dtype=np.int32),
        np.arange(12).reshape(3, 4).T,
        np.empty(0, dtype=bool),
    ]
    moved = all_to_device(arrays, CPU)
    for array, tensor in zip(arrays, moved, strict=True):
        assert tensor.dtype == (torch.bool if array.dtype == bool else torch.int64)
        assert tensor.shape == array.shape
        assert (tensor.numpy() == array).all()


def test_what_arrives_can_be_written_to():
    given = np.arange(4)
    first, second = all_to_device([given, given], CPU)
    first.add_(1)
    assert second.tolist() == given.tolist() == [0, 1, 2, 3]


def test_nothing_is_moved_as_nothing():
    assert all_to_device([], CPU) == []
    (empty,) = all_to_device([np.empty((2, 0), dtype=bool)], CPU)
    assert empty.shape == (2, 0)
