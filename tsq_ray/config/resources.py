"""Settings for compute resources, output files and the serving endpoint."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tsq_ray.config.base import Precision, Section


class OutputConfig(Section):
    """The files that a run writes."""

    part_mb: float = Field(default=128, gt=0)
    """Target size of a Parquet part before compression, in MiB, if the run has enough videos. In a
    large run, a part holds at most a thousandth of the rows, or 128 rows if that is more."""
    rows_per_file: int = Field(default=0, ge=0)
    """Rows per Parquet part; 0: determined by `part_mb`."""
    compression: Literal["zstd", "snappy", "none"] = "zstd"
    """Compression of the Parquet parts."""


Labels = Annotated[str, Field(pattern=r"^([\w./-]+=[\w.-]+(,[\w./-]+=[\w.-]+)*)?$")]


def label_map(text: str) -> dict[str, str]:
    """Return labels given as name=value,..."""
    return dict(item.split("=") for item in text.split(",") if item)


class NodeType(Section):
    """A kind of node that the cluster's autoscaler can start."""

    cpus: float = Field(ge=0)
    """Logical CPUs of the node."""
    gpus: float = Field(default=0, ge=0)
    """GPUs of the node."""
    count: int = Field(ge=1)
    """Maximum number of such nodes in the cluster at a time."""
    labels: Labels = ""
    """Ray labels of such a node, as name=value,..."""


class LabelsConfig(Section):
    """Ray labels of the nodes on which each part of a run may be placed; empty: on any node."""

    decode: Labels = ""
    """For decoders, and the workers of a CPU-only extraction, for example tsq/part=decode."""
    networks: Labels = ""
    """For encoders, samplers, recognisers and the workers of trainings."""
    write: Labels = ""
    """For writers, senders and the ingress."""


class ResourcesConfig(Section):
    """Resources that the stages request from the cluster; 0: chosen from what the cluster has."""

    workers: int = Field(default=0, ge=0)
    """Workers of a CPU-only extraction (0: one per CPU, more as the cluster grows)."""
    decoders: int = Field(default=0, ge=0)
    """Decoding workers that feed GPU encoders (0: one per CPU, more as the cluster grows)."""
    gpus: int = Field(default=-1, ge=-1)
    """GPUs to use. -1: all that the cluster has or can start according to `resources.node_types`;
    0: none, even on GPU machines; n: that many. If no node has a GPU, a run waits for the first (a
    training: for all n)."""
    node_types: tuple[NodeType, ...] = ()
    """Nodes that the autoscaler can start, for example [{cpus = 16, count = 200}, {cpus = 8, gpus =
    1, count = 64}]; a driver cannot learn this from Ray. A run on a cluster that starts small then
    requests as many nodes as it can use, including GPU nodes."""
    labels: LabelsConfig = LabelsConfig()
    """Where each part may be placed."""
    batch_size: int = Field(default=8, ge=1)
    """Videos that a worker processes at a time."""
    threads: int = Field(default=0, ge=0)
    """Threads of each worker's network (0: CPUs / workers). In `score` and `serve`: threads of each
    replica, which on a CPU processes as many videos in parallel (0: the node's CPUs)."""
    precision: Precision = "auto"
    """Precision of the networks in `extract`, `score`, `predict` and `serve`; `auto`: bf16 on GPUs
    that support it, otherwise fp32."""
    resize: Literal["auto", "decoder", "device"] = "auto"
    """Where frames are resized to the networks' inputs: by the `decoder` on its CPU or, for frames
    with at most twice the data of those inputs, on the networks' `device`; results are equal up to
    rounding. Applies to `extract`, `score`, `predict` and `serve`; `auto`: the device if it is a
    GPU (`serve`: if its networks request one)."""
    compile: bool = False
    """Compile these networks with torch.compile, as CUDA graphs on GPUs. Adds a minute to the start
    of each worker and needs a C++ compiler on the node."""

    def resizes_on_device(self, on_gpu: bool) -> bool:
        """Whether decoders pass on small frames unresized, given where the networks run."""
        return self.resize == "device" or (self.resize == "auto" and on_gpu)


class ScaleConfig(Section):
    """Scaling limits and resources of a deployment."""

    min_replicas: int = Field(default=1, ge=0)
    """Minimum number of replicas."""
    max_replicas: int = Field(default=1, ge=1)
    """Maximum number of replicas."""
    num_cpus: float = Field(default=0.25, ge=0)
    """Logical CPUs per replica; may be fractional."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs per replica; may be fractional."""
    target_ongoing_requests: float = Field(default=0, ge=0)
    """Requests per replica that autoscaling aims at (0: half of what a replica handles at a time;
    for a decoder, two per decoding process)."""
    upscale_delay_s: float = Field(default=10, ge=0)
    """How long there must be too few replicas before one is added, in seconds."""
    downscale_delay_s: float = Field(default=300, ge=0)
    """How long there must be too many replicas before one is removed, in seconds."""

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}"
            )
        return self


class ReplicaConfig(ScaleConfig):
    """Scaling of one deployment of the Serve graph."""

    max_ongoing_requests: int = Field(default=32, ge=1)
    """Requests that a replica handles at a time; should exceed its batch size."""


class ServeConfig(Section):
    """The endpoint and its deployments."""

    ingress: ScaleConfig = ScaleConfig(min_replicas=2, max_replicas=2, num_cpus=0.1)
    """Receives and validates requests; two, so that one can be replaced."""
    decoder: ReplicaConfig = ReplicaConfig(max_replicas=2)
    """Fetches and decodes videos."""
    decoder_processes: int = Field(default=2, ge=1)
    """Decoding child processes per decoder replica."""
    sampler: ReplicaConfig = ReplicaConfig()
    """Encodes the T frames and chooses K of them."""
    recognizer: ReplicaConfig = ReplicaConfig()
    """Recognises the K frames."""
    batch_size: int = Field(default=8, ge=1)
    """Maximum batch size of the sampler and the recogniser on a GPU, in videos; on a CPU, a replica
    processes one video per thread in parallel."""
    batch_wait_s: float = Field(default=0.01, ge=0)
    """Longest wait for a full batch on a GPU, in seconds."""
    max_queued_requests: int = Field(default=256, ge=1)
    """Maximum number of requests in flight per ingress replica; further ones return 429, as do
    requests that could not be answered within their time limit."""
    request_timeout_s: float = Field(default=120.0, gt=0)
    """Time limit of one request, including its upload, in seconds; then it returns 504."""
    drain_s: float = Field(default=30.0, ge=0)
    """How long `tsq serve` waits for the requests in flight when it shuts down, in seconds."""
    max_upload_mb: float = Field(default=256, gt=0)
    """Largest upload, in MiB; a larger one returns 413."""
    max_upload_total_mb: float = Field(default=1024, gt=0)
    """Limit on all uploads in flight per ingress replica, in MiB; further ones return 503."""
    fetch_timeout_s: float = Field(default=30.0, gt=0)
    """Time limit for fetching the video of a `uri`, in seconds; then it returns 504. In a batch, a
    file may take longer while it arrives at 256 KiB/s on average."""
    max_fetches: int = Field(default=32, ge=1)
    """Videos that a decoder replica fetches at a time; further ones wait."""
    batches_uri: str = ""
    """Folder of the batches' run folders, local or in object storage. Empty: no batches."""
    batch_videos: int = Field(default=2, ge=1)
    """Videos of batches in progress at a time; the rest of the endpoint is for single requests."""
    max_batch_lines: int = Field(default=50_000, ge=1)
    """Maximum number of lines of a batch sent as JSON lines; a manifest may be of any size."""
    webhook_prefixes: tuple[Annotated[str, Field(min_length=1)], ...] = ("https://",)
    """Allowed prefixes of webhooks, URLs to call when a batch has ended; `https://` allows public
    hosts."""
    tokens_file: str = ""
    """File of named tokens, each with a rate and a share (`tsq token new`); read again when it
    changes. Empty: none."""
    metrics_port: int = Field(default=8001, ge=1, le=65535)
    """Port of the metrics, on loopback (`tsq serve`)."""
    header_timeout_s: int = Field(default=10, ge=1)
    """How long a client may take to send a request's headers, in seconds (`tsq serve`)."""
    max_connections: int = Field(default=1024, ge=1)
    """Maximum number of connections; further ones wait (`tsq serve`)."""
    allowed_uri_prefixes: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Folders, as absolute paths or URIs, that a request's `uri` may point into; none by default,
    so that the endpoint exposes no files. `https://` allows every public host."""
