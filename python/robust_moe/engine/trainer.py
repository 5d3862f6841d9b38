"""A training, from its configuration to its end: what it needs is set up here, and let go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from robust_moe.config import ConfigError, TrainConfig, save_config
from robust_moe.data import data_digest, load_splits, make_loader
from robust_moe.engine.crash import CrashGuard
from robust_moe.engine.ema import WeightAverage, average_decay
from robust_moe.engine.experiment import checkpoint_file, cpu_threads, describe_data, make_method, make_model
from robust_moe.engine.fabric import (
    StopRequest,
    backend_notes,
    library_algorithms,
    make_fabric,
    precision_notes,
    steps_fused,
)
from robust_moe.engine.log import MetricLog
from robust_moe.engine.loop import Loop
from robust_moe.engine.meters import Speed
from robust_moe.engine.processes import Processes
from robust_moe.engine.progress import Reporter
from robust_moe.engine.ranks import expect_one_data_set, expect_one_run, expect_shardable, join_ranks
from robust_moe.engine.rng import seed_all
from robust_moe.engine.run_checkpoints import LAST, CheckpointReader, find_checkpoint
from robust_moe.engine.run_folder import alone_in
from robust_moe.engine.sharding import shard
from robust_moe.engine.state import RunState, clear_run, precision_of
from robust_moe.engine.updates import Updater
from robust_moe.engine.validation import Validation
from robust_moe.engine.view import View
from robust_moe.engine.world import world_of
from robust_moe.engine.writer import CheckpointWriter
from robust_moe.evaluation.shards import Shards
from robust_moe.optim import expect_warmup_within
from robust_moe.outputs import CONFIG, expect_folder, expect_outputs, is_free, run_outputs
from robust_moe.seeding import derive_seed

__all__ = ["TrainResult", "Trainer"]


@dataclass(frozen=True)
class TrainResult:
    """How a call of :meth:`Trainer.fit` ended."""

    folder: Path
    finished: bool  # False: stopped by a signal; fitting again goes on from there
    steps: int  # batches trained on, in all calls
    best: dict[str, Any]  # of the best validation: robust, clean (shares), epoch (1 is the first), step; {}: none
    seconds: float  # wall clock of this call


class Trainer(Loop):
    """Trains as a configuration says and leaves a run folder behind.

    ``config.yaml``; ``metrics.jsonl`` and TensorBoard events; ``last.pt``, to go on from; ``step-N.pt``, what that was
    before, as often as ``run.keep`` says; ``best.pt``, by the robust accuracy on validation images, then the clean one,
    then the earliest; ``crash.pt`` if a loss, a gradient or a weight became NaN. Checkpoints are written in the
    background (:class:`~robust_moe.engine.writer.CheckpointWriter`). With ``run.ema_decay`` or ``run.ema_epochs`` a
    moving average of the weights is kept, in every checkpoint, and (``eval.ema_eval``) is what is validated. A run that
    is killed and fitted again gives the numbers of one that was not, on the same software and device (and with
    ``run.deterministic``, the default).

    While it trains no other training may work in the run folder. As a context manager it keeps the folder so until the
    end of the ``with`` block, for an evaluation that writes there too.

    Args:
        config: checked; every name is looked up before anything is written.
        reporter: what is said on screen; None: progress on standard output.

    Raises:
        ConfigError: a name or value that cannot be run, or a run folder whose files are not a run's.
    """

    def __init__(self, config: TrainConfig, reporter: Reporter | None = None) -> None:
        self.config = config
        self.world = world_of(config.run.devices)
        self.folder = expect_folder("run.out", config.run.out)
        sources = [(f"model.{place}init_from", half.init_from) for place, half in config.model.halves()]
        read = [(key, source and checkpoint_file(source)) for key, source in sources]
        expect_outputs("run.out", run_outputs(self.folder), read)
        self.reporter = reporter or Reporter()
        self._alone: ExitStack | None = None  # of a with block: holds the folder's lock from the first fit on
        expect_shardable(config, make_method(config, self.world.size), self.world)  # both refuse what they cannot train

    def __enter__(self) -> Self:
        self._alone = ExitStack()
        self._locked = False
        return self

    def __exit__(self, *_: object) -> None:
        alone, self._alone = self._alone, None
        if alone is not None:  # None: the end of a block around another of the same trainer
            alone.close()

    def fit(self, resume: bool = True, override: bool = False) -> TrainResult:
        """Train to the end, or until SIGINT or SIGTERM, which save and stop.

        Args:
            resume: go on from ``last.pt`` if there is one; False: remove an earlier run's files and start anew.
            override: go on also if the configuration has changed; the changes are reported. What the saved state
                depends on (:data:`robust_moe.engine.state.FIXED`) must still be the same, and there must be something
                left to do.

        Raises:
            CheckpointError: ``last.pt`` is damaged, of another configuration or other data, or with ``override``
                already at the new configuration's end; or the last checkpoint cannot be written (an earlier one that
                cannot is told, and tried again with the next).
            ConfigError: the run folder cannot be written, or another training works in it, or its config.yaml would be
                written over and has comments, or the warm-up is longer than the run.
            OSError: the metrics cannot be written at the end; while it trains they wait for it.
            DataError: the data cannot be read.
            FloatingPointError: a loss, gradient or gate became NaN or infinite.
            LostProcessError: of ``run.devices`` processes another has ended or stands still
                (:class:`~robust_moe.engine.processes.Processes`, which also says when the process ends instead).
        """
        began = time.perf_counter()
        if not resume or override:  # config.yaml is written over
            expect_outputs("run.out", [(self.folder / "config.yaml", CONFIG)])
        with cpu_threads(self.config.run.threads), ExitStack() as held:
            reader = CheckpointReader()
            self.fabric = make_fabric(self.config, self._began_in(reader) if resume else None, self.world)
            if self.world.rank == 0:
                with self._in_run_folder():
                    self._lock(held)
            self.processes = held.enter_context(Processes(self.fabric, self.world))
            self._set_up(reader if resume else None, override)
            try:
                algorithms = library_algorithms(self.config.run.deterministic)
                with self.log, self.writer, StopRequest(self.fabric) as self.stop, algorithms:
                    finished = self._run()
            finally:
                self.reporter.below = None
        state = self.state
        return TrainResult(self.folder, finished, state.step, dict(state.best), time.perf_counter() - began)

    # --- setting up ---

    def _lock(self, fit: ExitStack) -> None:
        if self._alone is None:
            self._expect_alone = fit.enter_context(alone_in(self.folder))
        elif not self._locked:
            self._expect_alone = self._alone.enter_context(alone_in(self.folder))
            self._locked = True

    def _began_in(self, reader: CheckpointReader) -> str | None:
        """The precision of the run that is to be gone on with, which ``run.precision: auto`` keeps; None: there is
        none, or a precision is asked for by name. The folder is not locked yet: which process locks it the fabric says,
        which is made for a precision."""
        if self.config.run.precision != "auto":
            return None
        with self._in_run_folder():
            source = find_checkpoint(self.folder)
        return None if source is None else precision_of(reader.read(source), source)

    def _set_up(self, reader: CheckpointReader | None, override: bool) -> None:
        """``reader``: of the checkpoint that is gone on from; None: the run starts anew."""
        config, fabric = self.config, self.fabric
        self.processes.launch()
        self.reporter.enabled = self.reporter.enabled and fabric.is_global_zero
        number_format = fabric.strategy.precision.precision
        for note in (*precision_notes(number_format, fabric.device), *backend_notes(self.world, fabric.device)):
            self.reporter.line(note)
        with self._in_run_folder():
            source = None if reader is None else find_checkpoint(self.folder)
        checkpoint = None if reader is None or source is None else reader.take(source)
        expect_one_run(self.world, config, number_format, source, checkpoint)
        self.splits = splits = load_splits(config.data, config.run.seed, self.reporter.task)
        for note in splits.notes:
            self.reporter.line(note)
        data = describe_data(splits.train)
        self.validation = Validation(config, splits, fabric.device, Shards(self.world.size, self.world.rank))
        self.loader = make_loader(
            splits.train,
            config.run.batch_size,
            device=fabric.device,
            shuffle=True,
            augment=config.data.augment,
            seed=config.run.seed,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            drop_last=len(splits.train) >= config.run.batch_size,  # a last batch of one image would upset BN
            say=self.reporter.warn,
            task=self.reporter.task,
        )
        self.total_steps = min(config.run.epochs * len(self.loader), config.run.max_steps or 2**62)
        expect_warmup_within(config.optim, self.total_steps, len(self.loader))
        seed_all(config.run.seed)
        self.model = make_model(config, data, warm_start=checkpoint is None)
        decay = average_decay(config.run, len(self.loader))
        average = WeightAverage(self.model, decay) if decay > 0 else None  # on the host, until the other is in parts
        self.model.to(fabric.device)
        join_ranks(self.model, config.run, self.world, None if self.loader.order.drop_last else len(splits.train))
        self.method = make_method(config, self.world.size)  # fresh: it may carry a perturbation from an earlier call
        for model in (self.model, *([] if average is None else [average.model])):
            model.to(fabric.device)
            if config.run.strategy == "fsdp":
                shard(model, fabric.device)
        if average is not None:
            average.begin(self.model)
        optimizer = config.optim.build(self.model, steps_fused(config.run, fabric.device))
        wrapped, self.optimizer = fabric.setup(self.model, optimizer)
        seed_all(derive_seed(config.run.seed, "rank", fabric.global_rank))
        precision = fabric.strategy.precision
        digest = data_digest(splits)
        expect_one_data_set(self.world, digest)
        self.state = RunState(config, data, digest, self.model, optimizer, precision, self.method, average)
        lines = 0
        if source is not None and checkpoint is not None:
            lines, changed = self.state.load_state_dict(
                checkpoint, source, fabric.global_rank, fabric.device, override=override
            )
            self.state.expect_something_left(self.total_steps, source, changed)
            if "data_digest" not in checkpoint and fabric.is_global_zero:
                self.reporter.warn(f"{source}: an older checkpoint, which does not tell which images the run has")
            self.reporter.line(f"going on from {source}: {self.state.step} of {self.total_steps} steps done")
            for text in changed + self.state.notes:
                self.reporter.line(f"changed: {text}")
        self.updater = Updater(
            fabric, self.model, wrapped, self.optimizer, self.method, config.optim.grad_clip, config.run.graph
        )
        with self._in_run_folder():
            if fabric.is_global_zero:
                clear_run(self.folder, anew=checkpoint is None)
            fabric.barrier()
            self.log = MetricLog(
                self.folder, lines, self.state.step, enabled=fabric.is_global_zero, say=self.reporter.warn
            )
            if checkpoint is None and fabric.is_global_zero:  # later it changes with a checkpoint only
                save_config(config, self.folder / "config.yaml")
        # of the last.pt that is there, which the next one makes a past one
        step = self.state.step if source is not None and source.name == LAST else None
        self.writer = CheckpointWriter(
            self.folder,
            config.run.keep,
            step,
            say=self.reporter.warn,
            before=lambda: self._expect_alone(),  # the first process's
            after=self._keep_config,
        )
        self.guard = CrashGuard(fabric, self.state, self.log, self.writer)
        if len(self.validation) == 0 and fabric.is_global_zero:
            self.reporter.warn("no validation images (data.validation_fraction=0): no best.pt will be kept")
        self.speed = Speed()
        self.view = View(best=self.state.best.get("robust"))
        self._warned = set()
        self._told = False

    @contextmanager
    def _in_run_folder(self) -> Iterator[None]:
        """What the operating system refuses in here is the fault of ``run.out``."""
        try:
            yield
        except OSError as error:
            why = error.strerror or error
            raise ConfigError(f"run.out: expected a folder to write to, got {self.folder} ({why})") from error

    def _keep_config(self) -> None:
        """An override's settings hold from the first checkpoint on."""
        if is_free(self.folder / "config.yaml", CONFIG):  # not a file that a user has put comments in
            save_config(self.config, self.folder / "config.yaml")
