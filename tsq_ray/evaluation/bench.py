"""The inputs of an evaluation, and its trainings: run as Ray tasks, stored as they finish.

Shapes: V videos, T frames, D dims, C classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import ValidationError

from tsq_ray import storage
from tsq_ray.bundle.weights import Bundle
from tsq_ray.config import Config, Task, TextConfig, TrainConfig
from tsq_ray.errors import ConfigError, ModelError
from tsq_ray.evaluation.annotations import Annotations
from tsq_ray.evaluation.samplers import frame_head_logits, true_class_probability
from tsq_ray.evaluation.store import Store
from tsq_ray.evaluation.trainings import Learned, TrainingSpec, arrays_of, learn
from tsq_ray.evaluation.videos import EvaluationFeatures, VideoSet
from tsq_ray.model import TSQShape
from tsq_ray.networks.encoder import object_names
from tsq_ray.networks.text import text_encoder
from tsq_ray.prototypes import prototypes
from tsq_ray.runs.lease import Lease
from tsq_ray.runtime import cluster, progress
from tsq_ray.runtime.nodes import Pool
from tsq_ray.runtime.observer import Observer
from tsq_ray.runtime.session import Session
from tsq_ray.runtime.waiting import Seen, Watch, look_at_tasks
from tsq_ray.training.teacher import shown_classes, soft_targets, taught_classes

Arguments = tuple[
    TSQShape | None,
    dict[str, np.ndarray] | None,
    dict[str, np.ndarray | None],
    np.ndarray | None,
]
"""Of a training: shape of the network, text embeddings, initial queries, soft targets."""


@dataclass(frozen=True)
class TeacherTargets:
    """The recogniser's answers on the first n training videos, in the order of their ids."""

    classes: list[int]
    """The classes that have a query."""
    targets: np.ndarray
    """Soft targets over all classes, float16 [n, C]."""


@dataclass(frozen=True)
class Trainings:
    """What a call of `train_all` did."""

    number: int = 0
    """Samplers trained; the store held the others."""
    happened: Mapping[str, float] = field(default_factory=dict)
    """`nodes_lost` and `waited_s`, if not 0."""
    used: Mapping[str, float] = field(default_factory=dict)
    """`cpu_hours` and `gpu_hours`."""


@dataclass
class Bench:
    """The data, bundle and settings of an evaluation, and the trainings finished so far."""

    bundle: Bundle
    features: EvaluationFeatures
    config: Config
    annotations: Annotations | None
    store: Store
    learned: dict[TrainingSpec, Learned] = field(default_factory=dict)

    @property
    def videos(self) -> VideoSet:
        """The measured videos."""
        return self.features.measured

    @property
    def task(self) -> Task:
        """The bundle's task."""
        return self.bundle.task

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the trainings and the random baseline."""
        return self.config.evaluate.seeds

    def spec(self, train: Mapping[str, Any], text: Mapping[str, Any], seed: int) -> TrainingSpec:
        """Specify a training of TSQNet with these overrides of `train.*` and `encoders.text.*`.

        Raises ConfigError if the values are inconsistent.
        """
        values = self.config.train.model_dump() | dict(train) | {"seed": seed, "task": self.task}
        try:
            config = TrainConfig.model_validate(values)
        except ValidationError as error:
            why = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(f"the bundle's train.* with {dict(train)}: {why}") from None
        return TrainingSpec(
            "tsq",
            config,
            self.config.encoders.text.model_copy(update=dict(text)),
        )

    def scsampler(self, seed: int) -> TrainingSpec:
        """Specify a training of the SCSampler ranker."""
        return TrainingSpec("scsampler", TrainConfig(seed=seed), TextConfig())

    def shape(self, config: TrainConfig, text_dim: int) -> TSQShape:
        """Return the shape of a training's network; fields that are settings come from `config`.

        With a teacher, only classes that it finds often enough have a query.
        """
        names = {item.name for item in dataclasses.fields(TSQShape)} & set(TrainConfig.model_fields)
        settings = {name: getattr(config, name) for name in names}
        dim = self.videos.visual.shape[-1]
        teacher = self.teacher_targets(config)
        count = len(self.bundle.classes) if teacher is None else len(teacher.classes)
        return TSQShape(num_classes=count, visual_dim=dim, text_dim=text_dim, **settings)

    def teacher_targets(self, config: TrainConfig) -> TeacherTargets | None:
        """Return the recogniser's targets for a training; None if it learns from labels.

        Raises RunError if it finds too few classes in the training videos.
        """
        training = self.features.training
        if config.target == "labels" or training is None:
            return None
        count, frames = config.max_videos or len(training), config.teacher_frames
        logits, index = training.logits[:count], training.frame_index[:count]
        targets = soft_targets(logits, index, frames, self.task)
        classes = taught_classes(targets, config.teacher_min_videos, self.task)
        return TeacherTargets(classes, targets)


def train_all(
    bench: Bench,
    specs: Iterable[TrainingSpec],
    session: Session,
    lease: Lease,
    begin: Callable[[], None],
) -> Trainings:
    """Fill `bench.learned` with the result of every spec.

    Results come from the store or from trainings, which run in parallel on one CPU each and are
    stored as they finish. `begin` is called before the first training. Raises what a training
    raised, and RunFailed if the lease is lost or the trainings have waited for room for longer than
    `session.wait_s`; a non-finite loss is a result ("diverged").
    """
    todo = []
    for spec in dict.fromkeys(spec for spec in specs if spec not in bench.learned):
        if (learned := bench.store.read(spec)) is None:
            todo.append(spec)
        else:
            bench.learned[spec] = learned
    if not todo:
        return Trainings()
    assert bench.features.training is not None, (
        "nothing to train on; the caller must leave out samplers that need training"
    )
    initial = InitialValues(bench, bench.features.training)
    calls = {spec: initial.arguments(spec) for spec in todo}
    with cluster.connect(session) as ray, Observer(ray, lease.holder, "evaluate") as observer:
        pool = cluster.lay_out(ray, "evaluate", bench.config, len(todo))["training"]
        begin()
        begun = progress.start_counts(progress.Begun)
        pending = _start(ray, pool, begun, initial, calls)
        look = _Look(ray, begun, lambda: {bench.store.key(spec) for spec in pending.values()})
        watch = Watch(ray, "evaluate", session.wait_s, look=look)
        with progress.progress_display(
            len(todo), "evaluate", session.show_progress, "trainings"
        ) as update:
            while pending:
                ready, _ = ray.wait(list(pending), timeout=0.5)
                lease.stop_if_lost()
                for reference in ready:
                    spec = pending.pop(reference)
                    try:
                        bench.learned[spec] = ray.get(reference)
                    except ray.exceptions.RayError as error:
                        raise cluster.run_failed(error, "evaluate") from error
                    bench.store.write(spec, bench.learned[spec])
                update(len(todo) - len(pending), 0)
                watch.tick(len(todo) - len(pending))
                observer.observe(len(todo) - len(pending), watch)
    return Trainings(len(todo), observer.happened, observer.hours)


def _start(
    ray: Any,
    pool: Pool,
    begun: Any,
    initial: InitialValues,
    calls: Mapping[TrainingSpec, Arguments],
) -> dict[Any, TrainingSpec]:
    """Start a Ray task per training; return the specs by their task's reference."""
    bench = initial.bench
    arrays = initial.training_arrays(any(spec.kind == "scsampler" for spec in calls))
    shared = ray.put(arrays), ray.put(arrays_of(bench.videos))
    texts = {id(text): ray.put(text) for _, text, _, _ in calls.values() if text is not None}
    task = ray.remote(num_cpus=pool.cpus, memory=pool.memory, max_retries=3)(_learn)
    return {
        task.remote(
            *(begun, bench.store.key(spec)),
            *(spec, *shared, shape, texts[id(text)] if text is not None else None),
            *(start, bench.config.sampler.top_classes, taught),
        ): spec
        for spec, (shape, text, start, taught) in calls.items()
    }


def _learn(begun: Any, name: str, *arguments: Any) -> Learned:
    """Run a training as the Ray task `name`."""
    begun.add.remote(name)
    return learn(*arguments)


class _Look:
    """Tells a Watch how many of the pending trainings have begun."""

    def __init__(self, ray: Any, begun: Any, pending: Callable[[], set[str]]) -> None:
        """`begun`: the actor that trainings report to; `pending`: names of those not finished."""
        self._ray, self._actor, self._pending = ray, begun, pending
        self._begun: set[str] = set()

    def __call__(self) -> Seen:
        with contextlib.suppress(self._ray.exceptions.RayError):
            # what is known is kept: a restarted actor has forgotten it
            self._begun |= self._ray.get(self._actor.get.remote(), timeout=10)
            pending = self._pending()
            at_work = len(pending & self._begun)
            return look_at_tasks(self._ray, "training", len(pending) - at_work, at_work)
        return Seen(Counter(), Counter())


class InitialValues:
    """Initial values of the trainings, each computed once."""

    def __init__(self, bench: Bench, training: VideoSet) -> None:
        self.bench, self.training = bench, training
        self.logits: np.ndarray | None = None
        self.texts: dict[TextConfig, dict[str, np.ndarray]] = {}
        self.starts: dict[int, np.ndarray] = {}

    def arguments(self, spec: TrainingSpec) -> Arguments:
        """Return a training's network shape, text embeddings, initial queries and soft targets."""
        if spec.kind == "scsampler":
            return None, None, {}, None
        text = self._text(spec.text) if spec.config.modules == "both" else None
        shape = self.bench.shape(spec.config, text["vocabulary"].shape[1] if text else 1)
        teacher = self.bench.teacher_targets(spec.config)
        visual = textual = None
        if spec.config.init_visual == "prototype":
            visual = self._prototypes(spec.config.seed, teacher)
        if text and spec.config.init_textual == "text":
            textual = text["classes"]
        if teacher is None:
            return shape, text, {"visual": visual, "textual": textual}, None
        textual = textual[teacher.classes] if textual is not None else None
        targets = teacher.targets[:, teacher.classes]
        return shape, text, {"visual": visual, "textual": textual}, targets

    def training_arrays(self, with_teacher: bool) -> dict[str, np.ndarray]:
        """Return the training arrays; `teacher`, for SCSampler, is the true-class probability."""
        teacher = (
            {"teacher": true_class_probability(self.training, self.bench.task)}
            if with_teacher
            else {}
        )
        return arrays_of(self.training) | teacher

    def _text(self, config: TextConfig) -> dict[str, np.ndarray]:
        if config not in self.texts:
            encoder, classes = text_encoder(config), self.bench.bundle.classes
            self.texts[config] = {
                "vocabulary": encoder.embed(object_names()).numpy(),
                "classes": encoder.embed(classes).numpy(),
            }
            unknown = [
                name
                for name, row in zip(classes, self.texts[config]["classes"], strict=True)
                if not row.any()
            ]
            if unknown:
                raise ModelError(
                    f"text weights {storage.redact(config.weights)!r}: has no word of "
                    f"{len(unknown)} class names (first: {unknown[0]!r}); use other word vectors"
                )
        return self.texts[config]

    def _prototypes(self, seed: int, teacher: TeacherTargets | None) -> np.ndarray:
        """Return one prototype per class, from the logits of the frame head or of the teacher."""
        task, count = self.bench.task, len(self.bench.bundle.classes)
        if teacher is not None:
            position = {label: number for number, label in enumerate(teacher.classes)}
            shown = shown_classes(teacher.targets, task)
            labels = [[position[label] for label in ids if label in position] for ids in shown]
            chosen = slice(0, len(labels))
            logits = self.training.logits[chosen][..., teacher.classes]
            return prototypes(
                self.training.visual[chosen], logits, labels, len(position), seed, task
            ).numpy()
        if seed not in self.starts:
            labels = [np.flatnonzero(row).tolist() for row in self.training.targets]
            self.starts[seed] = prototypes(
                self.training.visual, self._head_logits(), labels, count, seed, task
            ).numpy()
        return self.starts[seed]

    def _head_logits(self) -> np.ndarray:
        """Return the logits of the frame head, or of the recogniser if the head lacks classes."""
        bundle = self.bench.bundle
        assert bundle.encoder.head is not None, "a bundle's encoder has the frame head"
        if bundle.sampler_classes is not None:
            return self.training.logits
        if self.logits is None:
            self.logits = frame_head_logits(bundle.encoder.head, self.training)
        return self.logits
