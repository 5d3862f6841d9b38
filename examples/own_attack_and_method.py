"""An attack and a training method of your own, with settings that the configuration knows, beside the built-in ones.

Runs on a CPU in under a minute, without a download: python examples/own_attack_and_method.py
"""

from dataclasses import dataclass

import torch

import robust_moe
from robust_moe.attacks import ATTACKS, PGD, Attack
from robust_moe.data import Digits
from robust_moe.methods import METHODS, AdversarialMethod, Objective
from robust_moe.settings import setting


@ATTACKS.register("corners")
class Corners(Attack):
    """Random corners of an L-infinity ball, each pixel up or down by eps: the image of largest loss, the clean one's
    included."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Attack.Config):
        tries: int = setting(20, "corners that are tried", at_least=1, at_most=10_000)

    def __init__(self, eps, tries=20, norm="Linf", **settings):
        if norm != "Linf":
            raise ValueError(f"norm: expected 'Linf', whose ball has corners, got {norm!r}")
        super().__init__(steps=tries, **settings)
        self.eps, self.norm = eps, norm

    @property
    def passes(self):  # (forwards, backwards), which results count
        return self.steps + 1, 0

    def run(self, passes, x0, sample_index, seed):
        generator = torch.Generator().manual_seed(seed)
        best, (_, worst) = x0, passes.score(x0)
        for _ in range(self.steps):
            sign = torch.randint(2, x0.shape[1:], generator=generator).to(x0) * 2 - 1
            tried = (x0 + self.eps * sign).clamp(0, 1)
            loss = passes.score(tried)[1]
            best = torch.where((loss > worst).view(-1, 1, 1, 1), tried, best)
            worst = torch.maximum(loss, worst)
        return best


@METHODS.register("half_clean")
class HalfClean(AdversarialMethod):
    """Cross-entropy on the attacked images and on a share of the clean ones."""

    @dataclass(frozen=True, kw_only=True)
    class Config(AdversarialMethod.Config):
        share: float = setting(0.5, "of the clean images that are trained on too", at_least=0, at_most=1)

    def objectives(self, model, batch, step_seed, forward):
        attacked, nonfinite = self.craft(model, batch, step_seed)
        few = round(self.config.share * len(attacked))
        images, labels = torch.cat([attacked, batch.images[:few]]), torch.cat([batch.labels, batch.labels[:few]])
        yield Objective(lambda: self.classify(model, forward, images, labels), nonfinite)


test = Digits.Config(image_size=8).build().load()[1]
small = ["data.image_size=8", "model.width=8", "run.epochs=4", "eval.every=4"]
for name, settings in (
    ("pgd_at, corners", ["method.attack={name: corners, eps: 0.1, tries: 4}"]),
    ("pgd_at, pgd", ["method.attack.steps=4"]),
    ("half_clean, pgd", ["method={name: half_clean, share: 0.5, attack: {name: pgd, eps: 0.1, steps: 4}}"]),
):
    run = robust_moe.train("digits-dense", [*small, *settings, f"run.out=runs/own/{name.replace(', ', '-')}"])
    model = robust_moe.load_model(run.folder)
    for attack in (Corners.Config(tries=50), PGD.Config(steps=20)):
        numbers = robust_moe.evaluate(model, test.images, test.labels, eps="0.1", attack=attack)
        print(f"trained by {name:16} clean {numbers['clean']:.1%}, left by {attack.label}: {numbers['robust']:.1%}")
