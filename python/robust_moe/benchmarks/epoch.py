"""One whole epoch of training, with all that belongs to it: loading, attack, step, validation, checkpoint.

Ours is the product's trainer on a CIFAR ResNet-18 whose layer4.1 is four experts, adversarial training by PGD-7 as is
the default, crop and flip. Against it a trainer as papers publish one, in plain PyTorch: the masked loop, an attack
that calls ``loss.backward()``, a DataLoader of two workers that changes image by image, ``torch.save`` while the
training waits. Both score as many validation images by PGD-20, and write their state once. Both are timed in float32
and in bfloat16: ours as ``run.precision=bf16-mixed`` makes it, which scores in float32, the plain trainer by autocast,
scoring included. Each has a process of its own; memory is the most that it held, imports and images included, but not
the loader's workers.

512 images an epoch on a CPU, 16,384 on a GPU, made up: the pixels do not matter for the time. Where the time goes is
told by a clock around the trainer's own methods; on a GPU it waits for the device at every boundary. What a checkpoint
costs there is the copy and what is left of the writing when the epoch is over.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe.benchmarks.baselines import in_bfloat16
from robust_moe.benchmarks.harness import Options, Row, Run, compare
from robust_moe.benchmarks.own_process import own_worker
from robust_moe.benchmarks.train_step import EPS, LAYER, STEPS, check_step, plain_attack, with_loop
from robust_moe.config import TrainConfig, load_config
from robust_moe.data import Batch
from robust_moe.models import build_model
from robust_moe.precision import full_precision

if TYPE_CHECKING:
    from robust_moe.engine import Trainer

__all__ = ["Clock", "Sizes", "run"]

CLASSES, PADDING, WORKERS = 10, 4, 2
PARTS = ("data", "attack", "step", "validation", "checkpoint")
Answer = Callable[[Callable[[int], dict[str, float]]], None]


class Sizes(NamedTuple):
    """How much an epoch is."""

    images: int  # trained on
    validated: int  # attacked by PGD-20 at the end
    batch: int
    width: int  # channels of the first layer
    experts: int


class Clock:
    """Seconds by part of the work; the time of a part inside of another is not the other's.

    device: on a GPU the work that is queued belongs to the part that queued it.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._now = device, now
        self._inside: list[str] = []
        self.start()

    def start(self) -> None:
        self.spent = dict.fromkeys(PARTS, 0.0)
        self._began = self._last = self._time()

    def seconds(self) -> float:
        """Since the start."""
        return self._time() - self._began

    def _time(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._now()

    def _turn(self) -> None:
        """What has passed since the last boundary is the innermost part's."""
        now = self._time()
        if self._inside:
            self.spent[self._inside[-1]] += now - self._last
        self._last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._turn()
        self._inside.append(name)
        try:
            yield
        finally:
            self._turn()
            self._inside.pop()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its time counted as the part ``name``."""

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return timed

    def each(self, name: str, items: Iterator[Any]) -> Iterator[Any]:
        """``items``, the time until each counted as the part ``name``."""
        while True:
            with self.part(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


def _result(clock: Clock, images: int, loss: float, device: torch.device) -> dict[str, float]:
    from robust_moe.engine.view import memory_in_use

    seconds = clock.seconds()
    shares = {name: spent / seconds for name, spent in clock.spent.items()}
    return {"images_per_second": images / seconds, "loss": loss, "peak": float(memory_in_use(device) or 0)} | shares


# --- ours -------------------------------------------------------------------------------------------------------------


def _settings(sizes: Sizes, device: torch.device, folder: Path, precision: str = "32-true") -> list[str]:
    return [
        "data.name=image_folder",
        f"data.root={folder / 'images'}",
        "data.validation_fraction=0.2",
        "data.augment.flip=true",
        f"data.augment.crop_padding={PADDING}",
        "model.name=resnet18",
        f"model.width={sizes.width}",
        f"model.moe.layers=[{LAYER}]",
        f"model.moe.num_experts={sizes.experts}",
        "model.moe.balance=none",
        f"method.attack.steps={STEPS}",
        f"eval.limit={sizes.validated}",
        "run.epochs=10000",  # as many as are asked for
        f"run.batch_size={sizes.batch}",
        f"run.accelerator={device.type}",
        f"run.precision={precision}",
        f"run.threads={torch.get_num_threads()}",
        f"run.out={folder / precision}",
    ]


def _ours(answer: Answer, config: TrainConfig) -> None:
    """The product's trainer; each question is one epoch."""
    from robust_moe.engine import Reporter, Trainer

    class Asked(Trainer):
        def _run(self) -> bool:
            self._began, self._began_at = time.perf_counter(), 0
            answer(_epoch_of(self))
            return True

    Asked(config, Reporter(enabled=False)).fit(resume=False)


def _epoch_of(trainer: Trainer) -> Callable[[int], dict[str, float]]:
    clock, (running, losses) = Clock(trainer.fabric.device), (trainer.state.running, [0.0])
    attack: Any = getattr(trainer.method, "attack")  # noqa: B009  (of methods with one)
    loader, finish, read, batches = trainer.loader, trainer.writer.finish, running.read, trainer.loader.epoch
    for place, name, part in (
        (attack, "craft", "attack"),
        (trainer, "_step", "step"),
        (trainer, "_validate", "validation"),
        (trainer, "_save", "checkpoint"),
    ):
        setattr(place, name, clock.around(part, getattr(place, name)))

    def read_loss(*arguments: Any) -> dict[str, float]:
        means = read(*arguments)
        losses.append(means.get("loss", means.get("task_loss", 0.0)))
        return means

    for place, name, function in (
        (loader, "epoch", lambda *where: clock.each("data", batches(*where))),
        (running, "read", read_loss),
    ):
        setattr(place, name, function)

    def step(_: int) -> dict[str, float]:
        clock.start()
        trainer._train_epoch()
        trainer._finish_epoch()
        with clock.part("checkpoint"):
            finish()
        return _result(clock, len(loader) * loader.order.batch_size, losses[-1], trainer.fabric.device)

    return step


# --- the plain trainer ------------------------------------------------------------------------------------------------


class _PerImage(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images in memory, as arrays [H, W, 3] of uint8; each is cropped, mirrored and made a tensor by itself."""

    def __init__(self, images: list[np.ndarray[Any, Any]], labels: list[int]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(self.images[number]).permute(2, 0, 1)
        padded = F.pad(image, (PADDING,) * 4)
        top, left = torch.randint(2 * PADDING + 1, (2,)).tolist()
        image = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image.float().div(255), self.labels[number]


def _plain(
    answer: Answer, config: TrainConfig, sizes: Sizes, device: torch.device, folder: Path, mixed: bool = False
) -> None:
    """Training as papers publish it; each question is one epoch. ``mixed``: by autocast to bfloat16."""
    model = with_loop(_model(config, device)).to(memory_format=torch.contiguous_format)
    model = in_bfloat16(model) if mixed else model
    written = folder / ("plain-bf16.pt" if mixed else "plain-fp32.pt")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    images, labels = _read(folder / "images" / "train")
    data, held_out = (_PerImage(images[part], labels[part]) for part in (slice(sizes.images), slice(sizes.validated)))
    # started once: what a start costs depends on how this process was started, and is no part of an epoch
    kept: dict[str, Any] = {"num_workers": WORKERS, "persistent_workers": WORKERS > 0}
    loader = torch.utils.data.DataLoader(data, sizes.batch, shuffle=True, drop_last=True, **kept)
    scored = torch.utils.data.DataLoader(held_out, sizes.batch)
    clock = Clock(device)

    def start(x: Tensor) -> Tensor:
        return (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)

    def validate() -> None:
        model.eval()
        for x, y in scored:
            x, y = x.to(device), y.to(device)
            attacked = plain_attack(model, x, y, start(x), steps=config.eval.attack.build().steps)
            model.eval()
            with torch.no_grad():
                for each in (x, attacked):
                    (model(each).argmax(1) == y).float().mean().item()
        model.train()

    def step(_: int) -> dict[str, float]:
        clock.start()
        total = 0.0
        for x, y in clock.each("data", iter(loader)):
            x, y = x.to(device), y.to(device)
            with clock.part("attack"):
                x = plain_attack(model, x, y, start(x))
            with clock.part("step"):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                total += loss.item()
        with clock.part("validation"):
            validate()
        with clock.part("checkpoint"):
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, written)
        return _result(clock, len(loader) * sizes.batch, total / len(loader), device)

    answer(step)


def _model(config: TrainConfig, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config.model, num_classes=CLASSES, channels=3, image_size=32).to(device).train()


def _read(folder: Path) -> tuple[list[np.ndarray[Any, Any]], list[int]]:
    from PIL import Image  # of the extra, as the trainer

    files = sorted(folder.glob("*/*.png"), key=lambda path: path.name)
    return [np.array(Image.open(path)) for path in files], [int(path.parent.name) for path in files]


# --- both -------------------------------------------------------------------------------------------------------------


def _write(folder: Path, sizes: Sizes) -> None:
    """Made-up images of ten classes as an image folder, a fifth of them for validation."""
    from PIL import Image

    noise = np.random.default_rng(0)
    for part, count in (("train", -(-sizes.images * 5 // 4 // CLASSES)), ("test", 1)):
        for label in range(CLASSES):
            (folder / "images" / part / str(label)).mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / part / str(label) / f"{number:05d}.png")


def _check(config: TrainConfig, sizes: Sizes, device: torch.device) -> None:
    """The plain trainer's model and attack are ours: see :func:`~robust_moe.benchmarks.train_step.check_step`."""
    model, index = _model(config, device), torch.arange(sizes.batch, device=device)
    images = torch.rand(sizes.batch, 3, 32, 32, device=device)
    batch = Batch(images, torch.randint(CLASSES, (sizes.batch,), device=device), index)
    with full_precision():  # TF32 would move more pixels than rounding may
        check_step(model, with_loop(model), config.method.build(config.model), batch)


def run(options: Options) -> list[Row]:
    """A whole epoch of a ResNet-18 with one routed block, beside a plain loop trainer's."""
    many = options.device.type == "cuda"
    sizes = Sizes(16_384 if many else 512, 512 if many else 32, options.batch or 128, 64, 4)
    if options.quick:
        sizes = Sizes(images=16, validated=4, batch=8, width=8, experts=4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, sizes)
        config, mixed = (
            load_config(None, _settings(sizes, options.device, folder, precision))
            for precision in ("32-true", "bf16-mixed")
        )
        _check(config, sizes, options.device)
        plain = (config, sizes, options.device, folder)
        with ExitStack() as stack:
            asked = {
                "ours": stack.enter_context(own_worker(_ours, config)),
                "ours, bfloat16": stack.enter_context(own_worker(_ours, mixed)),
                "plain loop trainer": stack.enter_context(own_worker(_plain, *plain)),
                "plain loop trainer, bfloat16": stack.enter_context(own_worker(_plain, *plain, True)),
            }
            seen: dict[str, list[dict[str, float]]] = {name: [] for name in asked}

            def one(number: int, name: str) -> None:
                seen[name].append(asked[name](number))

            variants: dict[str, Run] = {name: partial(one, name=name) for name in asked}
            case: dict[str, Any] = {"epoch": f"PGD-{STEPS}", "model": f"resnet18, {LAYER}", "E": sizes.experts}
            case |= {"images": sizes.images, "B": sizes.batch, "width": sizes.width, "validated": sizes.validated}
            rows = compare(case | {"threads": torch.get_num_threads()}, variants, options, warmup=1, workers=True)
    return [dataclasses.replace(row, extra=_medians(seen[row.variant][-row.repeats :])) for row in rows]


def _medians(epochs: list[dict[str, float]]) -> dict[str, Any]:
    """Of the timed epochs; raises AssertionError for a loss that is not finite."""
    middle = {name: float(np.median([epoch[name] for epoch in epochs])) for name in epochs[0]}
    if not all(np.isfinite(epoch["loss"]) for epoch in epochs):
        raise AssertionError(f"loss: expected finite numbers, got {[epoch['loss'] for epoch in epochs]}")
    shares = {name: middle[name] for name in PARTS}
    shares["other"] = max(0.0, 1 - sum(shares.values()))
    return {
        "images_per_second": middle["images_per_second"],
        "peak_mib": middle["peak"] / 2**20,
        "shares": shares,
    }
