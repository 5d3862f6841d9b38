"""How large a study is: data, networks, schedule, measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["SCALES", "Scale"]


@dataclass(frozen=True)
class Scale:
    """Everything that all runs of a study have in common."""

    settings: tuple[str, ...]  # key=value, on top of the defaults
    images: int  # test images that every attack is measured on, the first of every class
    sweep_images: int  # those that dual models are measured on: an attack a point of the sweep over alpha
    probe_images: int  # those that the dearer questions of robust_moe.reproduce.probes are asked of
    why: str
    # by family of networks (Run.family): settings of its runs, on top of the others; "network": all but transformers
    families: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _transformers(settings: tuple[str, ...], routed: tuple[int, ...]) -> dict[str, tuple[str, ...]]:
    """The families of a scale: a transformer, dense or with the MLPs of the blocks ``routed`` as experts."""
    mlps = ",".join(f"blocks.{block}.mlp" for block in routed)
    experts = ("model.moe.gate=linear", f"model.moe.layers=[{mlps}]")
    return {"network": (), "transformer": settings, "routed transformer": (*settings, *experts)}


# One schedule for all methods of a scale, so that a difference is the method's: published recipes differ in optimiser,
# epochs and augmentation at once.
SMALL = (  # networks of 8 channels on 16 pixels, on one thread
    "data.name=parquet",
    "data.image_size=16",
    "data.augment.flip=true",
    "data.augment.crop_padding=2",
    "model.name=resnet_small",
    "model.width=8",
    "method.attack.steps=3",
    "method.attack.alpha=null",
    "optim.name=adam",
    "optim.lr=0.003",
    "optim.weight_decay=0",
    "optim.schedule=cosine",
    "eval.attack.steps=20",
    "eval.limit=300",
    "eval.batch_size=250",
    "run.batch_size=128",
    "run.accelerator=cpu",
    "run.threads=1",
    "run.precision=32-true",  # faster than bfloat16 in so small networks, and the same on every processor
)
LARGE = (  # ResNet-18 on all images at 32 pixels, PGD-10 to train
    "data.name=parquet",
    "data.validation_fraction=0.02",
    "data.augment.flip=true",
    "data.augment.crop_padding=4",
    "model.name=resnet18",
    "method.attack.eps=8/255",
    "method.attack.steps=10",
    "method.attack.alpha=2/255",
    "optim.lr=0.1",
    "optim.schedule=cosine",
    "eval.attack.eps=8/255",
    "eval.attack.alpha=2/255",
    "eval.limit=1000",
    "eval.batch_size=500",
    "run.batch_size=512",
    "run.accelerator=cuda",
)
# Half of the MLPs, every second one, is V-MoE's "every 2"; in the large network those of the second half, "last n".
# ViT-S learns with Adam; at 16 pixels the micro transformer has 16 tokens and the class token.
SMALL_TRANSFORMERS = _transformers(
    (
        "model.name=vit_micro",
        "model.width=96",
        "model.depth=4",
        "model.heads=3",
        "model.patch_size=4",
        "optim.lr=0.001",
    ),
    (1, 3),
)
LARGE_TRANSFORMERS = _transformers(
    (
        *("model.name=vit_small", "model.width=384", "model.depth=12", "model.heads=6"),
        *("optim.name=adamw", "optim.lr=0.0005", "optim.weight_decay=0.05"),
    ),
    (7, 9, 11),
)
SCALES: dict[str, Scale] = {
    "cpu": Scale(
        settings=(
            *SMALL,
            "data.train_limit=7000",
            "data.validation_fraction=0.02",
            "method.attack.eps=4/255",
            "eval.attack.eps=4/255",
            "eval.attack.alpha=1/255",
            "eval.every=10",
            "run.epochs=10",
        ),
        images=1000,
        sweep_images=500,
        probe_images=300,
        families=SMALL_TRANSFORMERS,
        why=(
            "Sized for an hour on two cores: 7,000 training images at 16 pixels, a ResNet of 8 channels, PGD-3 to "
            "train for 10 epochs in batches of 128, PGD-20 to measure. The radius is 4/255, half the published "
            "one: after 440 steps of AT at 8/255 (batches of 64) a mixture was at 22 % clean and 14 % robust, too "
            "near chance (10 %) to tell methods apart; after 216 steps at 4/255 it was at 30 % and 21 %. The "
            "standard mixture is attacked at the published 8/255. Adam, as in the code of Zhang et al.: SGD was "
            "behind at equal steps."
        ),
    ),
    "cpu-long": Scale(
        settings=(
            *SMALL,
            "data.validation_fraction=0.1",
            "method.attack.eps=8/255",
            "eval.attack.eps=8/255",
            "eval.attack.alpha=2/255",
            "eval.every=5",
            "run.epochs=20",
        ),
        images=1000,
        sweep_images=500,
        probe_images=300,
        families=SMALL_TRANSFORMERS,
        why=(
            "The networks of scale cpu with room to differ: 45,000 training images at 16 pixels for 20 epochs, and the "
            "published radius, 8/255. About thirteen times the training of scale cpu: experiment-c took two hours "
            "of two busy cores for three seeds."
        ),
    ),
    "gpu-10min": Scale(
        settings=(
            *LARGE,
            "eval.attack.steps=20",
            "eval.every=4",
            "run.epochs=12",
            "run.precision=bf16-mixed",
        ),
        images=500,
        sweep_images=500,
        probe_images=500,
        families=LARGE_TRANSFORMERS,
        why=(
            "ResNet-18 at 32 pixels and the published radius in minutes: 12 epochs in bf16 on one GPU, PGD-10 to train "
            "and PGD-20 to measure, on 500 images. The study experiment-f with one seed is estimated at ten minutes "
            "on an H100. No numbers of this scale have been measured."
        ),
    ),
    "gpu": Scale(
        settings=(
            *LARGE,
            "eval.attack.steps=50",
            "eval.every=5",
            "run.epochs=130",
        ),
        images=10_000,
        sweep_images=10_000,
        probe_images=1000,
        families=LARGE_TRANSFORMERS,
        why=(
            "The size of Zhang et al. (ICML 2025) for all parts: ResNet-18 experts, all images at 32 pixels, PGD-10 "
            "training for 130 epochs in batches of 512 and PGD-50 to measure. SGD with a cosine schedule stands in for "
            "the paper's Adam with a cyclic one, as single networks are trained so too. Robust Experts trained its "
            "blocks for 200 epochs with PGD-7 in batches of 640, on CIFAR-100. Written for one GPU; no numbers of this "
            "scale have been measured."
        ),
    ),
    "imagenet": Scale(
        settings=(
            "data.name=image_folder",
            "data.image_size=224",
            "data.validation_fraction=0.01",
            "data.augment.flip=true",
            "data.augment.crop_padding=28",
            "method.attack.eps=4/255",
            "method.attack.steps=3",
            "method.attack.alpha=null",
            "optim.schedule=cosine",
            "optim.warmup_epochs=5",
            "eval.attack.eps=4/255",
            "eval.attack.steps=20",
            "eval.attack.alpha=1/255",
            "eval.limit=1000",
            "eval.batch_size=250",
            "eval.every=10",
            "run.epochs=100",
            "run.batch_size=512",
            "run.precision=bf16-mixed",
            "run.accelerator=cuda",
        ),
        images=5000,
        sweep_images=1000,
        probe_images=1000,
        families={name: found for name, found in LARGE_TRANSFORMERS.items() if name != "network"},
        why=(
            "ImageNet (ILSVRC2012) as folders of classes, ViT-S/16 at 224 pixels, for the runs of transformers alone. "
            "The radius is the 4/255 that RobustBench has for ImageNet; PGD-3 to train. V-MoE's networks were trained "
            "on JFT-300M first, which nobody else has. Written down, and dry-run; no numbers of this scale have been "
            "measured."
        ),
    ),
}
