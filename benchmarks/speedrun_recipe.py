"""The small twin of the speed-run's recipe, and what is taken away from it, arm by arm, at equal cost.

An arm is the recipe with one ingredient put back to what a plain trainer does. It trains for as many batches as the
recipe's passes pay for (:func:`robust_moe.engine.passes_of_run`): without growing steps a batch is dearer, so there are
fewer of them. Schedules are shares of the run and so end with it in every arm.
"""

from __future__ import annotations

from dataclasses import replace

from robust_moe.config import TrainConfig, load_config
from robust_moe.engine import passes_of_run

__all__ = ["ARMS", "BASELINE", "FULL", "RECIPE", "arm_config"]

FULL, BASELINE = "full", "plain"

# The network and the images of `robust-moe reproduce --scale cpu`: 7,000 images at 16 pixels, a ResNet of 8 channels,
# and its radius, 4/255, at which so small a network is well above chance. Epochs, batch and the average's memory belong
# to the size; the rest is the preset's.
RECIPE: tuple[str, ...] = (
    "data.name=parquet",
    "data.image_size=16",
    "data.train_limit=7000",
    "data.validation_fraction=0.02",
    "data.augment.flip=true",
    "data.augment.flip_order=alternating",
    "data.augment.crop_padding=2",
    "model.name=resnet_small",
    "model.width=8",
    "method.name=pgd_at",
    "method.attack.eps=4/255",
    "method.attack.steps=7",
    "method.attack.alpha=1/255",
    "method.attack_steps_schedule=[[0,2],[0.4,5],[0.7,7]]",
    "method.label_smoothing=0.3",
    "optim.lr=0.2",
    "optim.schedule=one_cycle",
    "optim.weight_decay_on=weights",
    "eval.attack.eps=4/255",
    "eval.attack.steps=1",  # of the trainer's own look at one image; the measurement has its own attacks
    "eval.attack.alpha=1/255",
    "eval.limit=1",
    "eval.every=1000",
    "eval.batch_size=250",
    "run.epochs=15",
    "run.batch_size=128",
    "run.ema_epochs=1",
    "run.accelerator=cpu",
    "run.precision=32-true",  # as measured, on every processor
    "run.threads=1",
)

PIECEWISE = ("optim.schedule=multistep", "optim.schedule.milestones=[0.5,0.75]", "optim.lr=0.1")
NO_AVERAGE = ("run.ema_epochs=0",)
HARD_LABELS = ("method.label_smoothing=0",)
CONSTANT_STEPS = ("method.attack_steps_schedule=[]",)
DECAY_ON_ALL = ("optim.weight_decay_on=all",)
RANDOM_FLIPS = ("data.augment.flip_order=random",)

ARMS: dict[str, tuple[str, ...]] = {
    FULL: (),
    "no one-cycle": PIECEWISE,  # the rate and the drops of Rice et al., 2020, arXiv:2002.11569
    "no average": NO_AVERAGE,
    "no smoothing": HARD_LABELS,
    "no growing steps": CONSTANT_STEPS,  # seven from the start
    "decay on norms too": DECAY_ON_ALL,
    "random flips": RANDOM_FLIPS,
    BASELINE: (*PIECEWISE, *NO_AVERAGE, *HARD_LABELS, *CONSTANT_STEPS, *DECAY_ON_ALL, *RANDOM_FLIPS),
}


def arm_config(arm: str, overrides: tuple[str, ...], images: int) -> tuple[TrainConfig, int]:
    """(configuration, passes) of an arm that costs what the recipe does, at most one batch less.

    Args:
        arm: a key of :data:`ARMS`.
        overrides: ``key=value`` that change the recipe, and so all arms but for what an arm sets itself.
        images: training images.
    """
    recipe = load_config(None, [*RECIPE, *overrides])
    affordable = passes_of_run(recipe, images)
    config = load_config(None, [*RECIPE, *overrides, *ARMS[arm]])

    def cut(steps: int) -> TrainConfig:
        epochs = -(-steps // max(images // config.run.batch_size, 1))
        return replace(config, run=replace(config.run, epochs=epochs, max_steps=steps))

    fits, too_many = 0, 1
    while passes_of_run(cut(too_many), images) <= affordable:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if passes_of_run(cut(middle), images) <= affordable else (fits, middle)
    return cut(fits), passes_of_run(cut(fits), images)
