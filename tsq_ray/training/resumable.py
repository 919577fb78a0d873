"""Ray Train runs that resume from the last checkpoint after a worker, node or driver is killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import torch

from tsq_ray import storage
from tsq_ray.errors import RunFailed
from tsq_ray.runtime import cluster, progress
from tsq_ray.runtime.nodes import Layout
from tsq_ray.runtime.session import Session

STATE_FILE = "state.pt"
"""The only file of a checkpoint."""
_MAX_FAILURES = 3


def run_workers(
    loop: Callable[[dict[str, Any]], None],
    job: dict[str, Any],
    scaling: Any,
    work: str,
    what: str,
    session: Session,
    *,
    counts: Any,
    total: int,
    observe: progress.Observe,
) -> dict[str, Any]:
    """Run `loop(job)` on Ray Train workers; return the contents of the last checkpoint, on the CPU.

    Raises RunFailed if the workers fail more than three times.

    Args:
        loop: runs on each worker; resumes from the last checkpoint in `work`, if any.
        job: argument of `loop`.
        scaling: a ScalingConfig.
        work: folder of the checkpoints.
        what: name of the run in messages.
        session: the command's cluster and output options.
        counts: actor that counts the progress.
        total: progress at the end.
        observe: called twice a second.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer

    cluster.quiet_data(session.debug)
    fs, path = storage.filesystem(work)
    trainer = TorchTrainer(
        loop,
        train_loop_config=job,
        scaling_config=scaling,
        run_config=RunConfig(
            name="run",
            storage_path=path,
            storage_filesystem=pa.fs.PyFileSystem(pa.fs.FSSpecHandler(fs)),
            failure_config=FailureConfig(max_failures=_MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        result = progress.run_with_progress(
            trainer.fit, counts, total, what, session, observe=observe
        )
    except Exception as error:
        raise cluster.run_failed(error, what) from error
    if result.checkpoint is None:
        raise RunFailed(
            f"{what}: Ray Train returned no checkpoint; run the same command again "
            "(--debug shows its log)"
        )
    with result.checkpoint.as_directory() as folder:
        return torch.load(Path(folder, STATE_FILE), weights_only=True, map_location="cpu")


def scaling(placed: Layout) -> Any:
    """Return Ray Train's ScalingConfig for a layout; elastic if the layout gives a range."""
    from ray.train import ScalingConfig

    pool = placed["worker"]
    workers: Any = pool.limit if pool.minimum == pool.limit else (pool.minimum, pool.limit)
    resources = {"CPU": pool.cpus, "memory": pool.memory}
    resources |= {"GPU": pool.gpus} if pool.gpus else {}
    labels: Any = {"label_selector": dict(pool.labels)} if pool.labels else {}
    return ScalingConfig(
        num_workers=workers,
        use_gpu=placed.on_gpu,
        resources_per_worker=resources,
        **labels,
    )


def worker_device(name: str) -> torch.device:
    """Return the layout's device in a Ray Train worker; Ray by itself would use any visible GPU."""
    from ray.train.torch import get_device

    return get_device() if name == "cuda" else torch.device("cpu")


def distribute(network: torch.nn.Module, device: torch.device, workers: int) -> torch.nn.Module:
    """Wrap `network`, which is on `device`, so that gradients are averaged over the workers."""
    if workers == 1:
        return network
    ids = [device] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(network, device_ids=ids)
