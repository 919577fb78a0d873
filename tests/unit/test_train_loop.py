"""The training loop in this process: what it gives, and on what alone that hangs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from train_case import SHAPE, config_with, make_arrays, make_start, make_vocabulary

from tsq_ray.errors import RunFailed
from tsq_ray.train.loop import fit


def test_it_learns_and_the_same_again() -> None:
    torch.manual_seed(1)
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    state, curve = fit(make_arrays(), make_vocabulary(), make_start(), SHAPE, config_with(epochs=30, lr=0.05), threads=1)
    again, curve_again = fit(make_arrays(), make_vocabulary(), make_start(), SHAPE, config_with(epochs=30, lr=0.05), threads=1)
    assert [losses["epoch"] for losses in curve] == list(range(1, 31))
    assert curve[0].keys() == {"epoch", "loss", "visual", "textual", "t2v", "v2t"}
    assert curve[-1]["visual"] < 0.75 * curve[0]["visual"]
    assert curve == curve_again
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    assert torch.equal(random, torch.get_rng_state()), "the caller's random numbers are its own"
    assert torch.get_num_threads() == threads


def test_a_loss_that_is_no_number_ends_it() -> None:
    arrays = make_arrays()
    arrays["visual"][3] = np.inf
    with pytest.raises(RunFailed, match=r"the loss is nan in epoch 1; lower train\.lr"):
        fit(arrays, make_vocabulary(), make_start(), SHAPE, config_with())
