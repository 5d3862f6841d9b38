"""The words of a report, each explained where it is first used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["ACCURACIES", "CHECKS", "EXPERT_MEASURES", "attack_terms"]

ACCURACIES = (
    "Clean accuracy (standard accuracy, SA) is the share of the images that are classified right as they are. Robust "
    "accuracy (RA) is the share still right when an attack has changed each image within the radius ε; the worst case "
    "over several attacks counts an image only if it withstands every one of them, and so can only fall with each "
    "attack more. Models are therefore compared by the attacks that all of them were given."
)
CHECKS = (
    "A model can look robust because the attacks fail, not because it resists: its gradients may be hidden, or its "
    "output drawn at random. Each check looks for one such sign; “value” is the number that it judges by."
)
EXPERT_MEASURES = (
    "A route is the set of experts that the gate selects for an image. IoU: experts selected both before and "
    "after, over all selected at either time. Margin: by how much the gate's last selected expert leads the next "
    "one; near 0 a small push changes the route. Disagreement: spread of the experts' outputs relative to their "
    "mean; at 0 the experts are copies, and no route matters. Collapse: one expert is the first choice of nearly "
    "all images, the others idle. The Lipschitz estimate is the largest change of the output met for a change of "
    "the input; the true one may be larger."
)
_ATTACKS = {
    "pgd": "projected gradient descent: steps up the gradient of the loss, each brought back into the radius",
    "pgd-margin": "the same on the margin, the lead of the label's logit over the next, instead of the cross-entropy",
    "fgsm": "one step along the sign of the gradient",
    "apgd-ce": "PGD that chooses its own step sizes, on the cross-entropy",
    "apgd-dlr": "PGD that chooses its own step sizes, on a ratio of logit differences, whatever their scale",
    "apgd-t": "as apgd-dlr, towards several wrong classes in turn",
    "fab": "looks for the nearest point across the decision boundary",
    "fab-t": "looks for the nearest point across the boundary to several wrong classes in turn",
    "square": "random squares, kept where they help; asks for outputs only, never for gradients",
    "joint": "attacks classification and route together",
    "transfer": "made on the soft mixture, which uses all experts at once and has a gradient everywhere, then tried on "
    "the model",
    "steering": "drives the gate to each expert in turn and attacks the classification through it",
    "ra": "PGD on the whole model",
    "ra_e": "PGD through the experts that the clean image chose, its route held fixed",
    "ra_r": "PGD on the router: pushes the chosen experts out of its selection",
    "ra_r_targeted": "PGD on the router towards every other expert in turn; the worst of them counts",
}


def attack_terms(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name, what it does) of the attacks that come with the package."""
    for name in names:
        if meaning := _ATTACKS.get(name.removesuffix(" alone")):
            yield name, meaning
