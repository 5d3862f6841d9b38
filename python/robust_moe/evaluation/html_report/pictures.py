"""Adversarial examples as pictures: the image, its perturbation magnified, the attacked image; inside the page, and as
one picture for TensorBoard."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from robust_moe.evaluation.html_report.blocks import Example, Examples, Missing, Picture, Section, Text, command

__all__ = ["attack_sheet", "example_section"]

_SMALL = 96  # pixels up to which an image is shown enlarged
_SHEET = (64, 128)  # least and most pixels of an image's longer side in a sheet


def example_section(results: Mapping[str, Any], samples: Mapping[str, np.ndarray]) -> Section | Missing:
    """The ``examples/...`` of ``samples``: K images [K, C, H, W], uint8 or float in [0, 1], before and after."""
    if "examples/clean" not in samples:
        return Missing("Adversarial examples.", command(results, "quick"))
    clean, adversarial = (_unit(np.asarray(samples[f"examples/{kind}"])) for kind in ("clean", "adversarial"))
    if len(clean) == 0:
        return Missing("Adversarial examples: no attack broke an image.", None)
    largest = float(np.abs(adversarial - clean).max())
    factor = _magnification(largest)
    classes = results["data"].get("classes") or ()

    def named(label: int) -> str:  # a model may have more logits than there are classes
        return str(classes[label]) if label < len(classes) else str(label)

    examples = []
    for number in range(len(clean)):
        index, label, before, after = (
            int(samples[f"examples/{name}"][number])
            for name in ("index", "label", "prediction", "adversarial_prediction")
        )
        pictures = (
            (clean[number], f"image {index}, a {named(label)}, clean"),
            (0.5 + factor * (adversarial[number] - clean[number]), f"its perturbation, {factor:g} times magnified"),
            (adversarial[number], f"image {index} attacked, taken for {named(after)}"),
        )
        seen = "" if before == label else f", seen as {named(before)}"
        caption = f"Image {index}: {named(label)}{seen} → {named(after)}"
        examples.append(Example([_picture(image, alt) for image, alt in pictures], caption))
    channels = "" if clean.shape[1] in (1, 3) else f" Pictures show the mean of {clean.shape[1]} channels."
    text = Text(
        "text",
        f"{len(examples)} images that an attack broke: clean, the perturbation × {factor:g} around grey (grey is "
        f"no change; the largest change of a value is {largest:.3g}), and attacked.{channels}",
    )
    return Section("examples", "Adversarial examples", [text, Examples(examples)])


def _unit(images: np.ndarray) -> np.ndarray:
    """Images as float64 in [0, 1]."""
    return images / 255.0 if images.dtype == np.uint8 else images.astype(np.float64)


def _magnification(largest: float) -> float:
    """The roundest factor (1, 2 or 5 times a power of ten) that keeps ``largest`` within half of the grey scale."""
    if largest <= 0:
        return 1.0
    room = 0.501 / largest  # a hair more than half, for radii such as 0.1 in float32; what is over is clipped
    power = 10.0 ** math.floor(math.log10(room))
    return max(step * power for step in (1, 2, 5) if step * power <= room or step == 1)


def _picture(image: np.ndarray, alt: str) -> Picture:
    """A PNG of one image [C, H, W] in [0, 1]."""
    file = io.BytesIO()
    _drawn(image).save(file, format="png", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return Picture(source, alt, max(image.shape[1:]) <= _SMALL)


def _drawn(image: np.ndarray) -> Image.Image:
    """One image [C, H, W] in [0, 1]: in colour, or of other than three channels their mean in grey."""
    pixels = np.rint(255 * image.clip(0, 1)).astype(np.uint8)
    if len(pixels) == 3:
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return Image.fromarray(np.rint(pixels.mean(0)).astype(np.uint8))


def attack_sheet(clean: np.ndarray, adversarial: np.ndarray) -> Image.Image:
    """Images [K, C, H, W] in [0, 1] as one picture of K rows: clean, attacked, and their difference around grey,
    magnified as far as the grey scale allows. Small images are enlarged, of large ones every n-th pixel is shown."""
    clean, adversarial = _unit(clean), _unit(adversarial)
    change = adversarial - clean
    differences = 0.5 + _magnification(float(np.abs(change).max())) * change
    longest = max(clean.shape[2:])
    step, times = -(-longest // _SHEET[1]), max(1, _SHEET[0] // longest)
    parts = [part[..., ::step, ::step] for part in (clean, adversarial, differences)]
    parts = [part.repeat(times, 2).repeat(times, 3) for part in parts]
    parts = [np.pad(part, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=1.0) for part in parts]  # a white edge
    rows = np.concatenate(parts, axis=3)  # [K, C, h, 3 w]
    return _drawn(np.concatenate(list(rows), axis=1))
