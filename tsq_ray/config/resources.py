"""Settings of where the work runs and what it writes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tsq_ray.config.base import Precision, Section


class OutputConfig(Section):
    """What a run writes."""

    part_mb: float = Field(default=128, gt=0)
    """Size of a Parquet part before compression, in MiB, where the run has enough videos; a part holds at least 128 rows of a run, and of a large run at most a thousandth of it."""
    rows_per_file: int = Field(default=0, ge=0)
    """Rows of a Parquet part (0: by `part_mb`)."""
    compression: Literal["zstd", "snappy", "none"] = "zstd"
    """Compression of the Parquet parts."""


class NodeType(Section):
    """A kind of node that the cluster's autoscaler can start."""

    cpus: float = Field(ge=0)
    """Its logical CPUs."""
    gpus: float = Field(default=0, ge=0)
    """Its GPUs."""
    count: int = Field(ge=1)
    """How many of them the cluster may have at a time."""


class ResourcesConfig(Section):
    """What the stages ask of the cluster; 0 means: choose from what the cluster has."""

    workers: int = Field(default=0, ge=0)
    """Workers of a CPU-only extraction (0: one a CPU, more as the cluster grows)."""
    decoders: int = Field(default=0, ge=0)
    """Decoding workers beside GPU encoders (0: one a CPU, more as the cluster grows)."""
    gpus: int = Field(default=-1, ge=-1)
    """GPUs to use: -1 all that the cluster has, or can start by `resources.node_types`; 0 none, on GPU machines too; n waits for n."""
    node_types: tuple[NodeType, ...] = ()
    """Nodes that the autoscaler can start, for example [{cpus = 16, count = 200}, {cpus = 8, gpus = 1, count = 64}]: Ray does not tell a driver. A run on a cluster that starts small then asks for as many as it can use, GPUs too."""
    batch_size: int = Field(default=8, ge=1)
    """Videos a worker takes at a time."""
    threads: int = Field(default=0, ge=0)
    """Threads of each worker's network (0: CPUs / workers); in `score` and `serve` of each replica's, which on a CPU does as many videos side by side (0: the node's CPUs)."""
    precision: Precision = "auto"
    """What the networks compute in, in `extract`, `score`, `predict` and `serve`; `auto`: bf16 on GPUs that have it, fp32 on CPUs."""
    resize: Literal["auto", "decoder", "device"] = "auto"
    """Who makes the pictures that the networks want of a frame: the `decoder` on its CPU, or, of frames that hold at most twice the data of these pictures, the networks' `device`; the same but for rounding. In `extract`, `score`, `predict` and `serve`; `auto`: the device where it is a GPU (`serve`: where its networks ask for one)."""
    compile: bool = False
    """Compile these networks with torch.compile, as CUDA graphs on GPUs: a minute more at the start of each worker. Needs a C++ compiler on the node."""

    def resizes_on_device(self, on_gpu: bool) -> bool:
        """Whether decoders hand on small frames as they are, given where the networks run."""
        return self.resize == "device" or (self.resize == "auto" and on_gpu)


class ScaleConfig(Section):
    """How far a deployment scales."""

    min_replicas: int = Field(default=1, ge=0)
    """Fewest replicas."""
    max_replicas: int = Field(default=1, ge=1)
    """Most replicas."""
    num_cpus: float = Field(default=0.25, ge=0)
    """Logical CPUs of a replica; may be fractional."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of a replica; may be fractional."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}"
            )
        return self


class ReplicaConfig(ScaleConfig):
    """How far one deployment of the Serve graph scales."""

    max_ongoing_requests: int = Field(default=32, ge=1)
    """Requests a replica takes at a time; above its batch size. A replica is added where more than half of them are taken."""


class ServeConfig(Section):
    """The endpoint and its deployments."""

    ingress: ScaleConfig = ScaleConfig(num_cpus=0.1)
    """Takes the requests and checks them."""
    decoder: ReplicaConfig = ReplicaConfig(max_replicas=2)
    """Fetches and decodes."""
    decoder_processes: int = Field(default=2, ge=1)
    """Decoding child processes of each decoder replica."""
    sampler: ReplicaConfig = ReplicaConfig()
    """Encodes the T frames and chooses K."""
    recognizer: ReplicaConfig = ReplicaConfig()
    """Recognises the K frames."""
    batch_size: int = Field(default=8, ge=1)
    """Most videos in one batch of the sampler or the recogniser on a GPU; on a CPU a replica does a video a thread, side by side."""
    batch_wait_s: float = Field(default=0.01, ge=0)
    """Longest wait for a batch to fill on a GPU, in seconds."""
    max_queued_requests: int = Field(default=256, ge=1)
    """Requests that an ingress replica has in hand, waiting ones too; one more is answered 429."""
    request_timeout_s: float = Field(default=120.0, gt=0)
    """Longest time of one request, its upload too, in seconds; past it the answer is 504."""
    max_upload_mb: float = Field(default=256, gt=0)
    """Largest upload, in MiB; a larger one gets 413."""
    allowed_uri_prefixes: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Folders, as paths or URIs, below which a request's `uri` may lie; none by default, so that nobody reads files through the endpoint."""
