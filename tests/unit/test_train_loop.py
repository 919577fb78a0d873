"""The training loop in this process: its result, and what that alone depends on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.train import SHAPE, config_with, make_arrays, make_start, make_vocabulary

from tsq_ray.errors import RunFailed
from tsq_ray.training.sampler.loop import BatchShares, fit_tsqnet


def test_it_learns_and_repeats_exactly() -> None:
    torch.manual_seed(1)
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    state, curve = fit_tsqnet(
        make_arrays(),
        make_vocabulary(),
        make_start(),
        SHAPE,
        config_with(epochs=30, lr=0.05),
        threads=1,
    )
    again, curve_again = fit_tsqnet(
        make_arrays(),
        make_vocabulary(),
        make_start(),
        SHAPE,
        config_with(epochs=30, lr=0.05),
        threads=1,
    )
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
        fit_tsqnet(arrays, make_vocabulary(), make_start(), SHAPE, config_with())


def test_precision() -> None:
    curves = {
        precision: fit_tsqnet(
            make_arrays(),
            make_vocabulary(),
            make_start(),
            SHAPE,
            config_with(precision=precision, epochs=2),
            threads=1,
        )[1]
        for precision in ("auto", "fp32", "bf16")
    }
    assert curves["auto"] == curves["fp32"], "on a CPU"
    assert curves["bf16"] != curves["fp32"]
    for narrow, wide in zip(curves["bf16"], curves["fp32"], strict=True):
        assert narrow == pytest.approx(wide, rel=0.05)


def test_shares_make_up_the_batch() -> None:
    """Each video once, for any number of workers.

    The weights make the mean over the workers the mean over the batch.
    """
    config = config_with()
    workers = [
        BatchShares(make_arrays(), make_vocabulary(), config, rank, 3, torch.device("cpu"))
        for rank in range(3)
    ]
    whole = BatchShares(make_arrays(), make_vocabulary(), config, 0, 1, torch.device("cpu"))
    for batch in whole.order(7):
        _, _, targets, weight = whole.share(batch)
        assert weight == 1
        shares = [worker.share(batch) for worker in workers]
        means = [share[2].mean(0) * share[3] for share in shares]
        assert torch.allclose(torch.stack(means).mean(0), targets.mean(0))
        assert sum(share[3] for share in shares) == pytest.approx(3)
    assert [len(batch) for batch in whole.order(7)] == [4, 4, 4, 4, 4, 2], (
        "the last one is short: a worker has none of it"
    )
    assert not torch.equal(torch.cat(whole.order(7)), torch.cat(whole.order(8)))
    assert torch.equal(torch.cat(workers[2].order(7)), torch.cat(whole.order(7)))


def test_only_the_best_objects_count() -> None:
    few, all_of_them = (config_with(top_objects=count) for count in (3, 10))
    arrays = make_arrays()
    cut = arrays | {name: arrays[name][..., :3].copy() for name in ("object_ids", "object_probs")}
    state, _ = fit_tsqnet(arrays, make_vocabulary(), make_start(), SHAPE, few, threads=1)
    same, _ = fit_tsqnet(cut, make_vocabulary(), make_start(), SHAPE, few, threads=1)
    other, _ = fit_tsqnet(arrays, make_vocabulary(), make_start(), SHAPE, all_of_them, threads=1)
    assert torch.equal(state["textual.conv.weight"], same["textual.conv.weight"])
    assert not torch.equal(state["textual.conv.weight"], other["textual.conv.weight"])
