"""``robust-moe certify``."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from robust_moe.certifiers import CERTIFIERS, Noise, Search
from robust_moe.certify import certify_run
from robust_moe.commands.shared import (
    Imports,
    Overrides,
    ResultFile,
    SettingsCommand,
    Traceback,
    import_modules,
    new_app,
    one_line_errors,
)
from robust_moe.config import ConfigError, parse_fraction
from robust_moe.console import make_console
from robust_moe.engine import Reporter
from robust_moe.engine.experiment import checkpoint_file
from robust_moe.evaluation.certified import certified_table
from robust_moe.evaluation.common import checkpoint_name

__all__ = ["app"]

app = new_app()


@app.command(cls=SettingsCommand)
@one_line_errors
def certify(
    checkpoint: Annotated[Path, typer.Argument(help="A .pt file, or a run folder: its best.pt.", show_default=False)],
    overrides: Overrides = None,
    by: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {what}" for name, what in CERTIFIERS.items()) + ".")
    ] = "crown",
    norm: Annotated[
        str | None, typer.Option(help="Linf, or with smoothing L2 (its default) or Linf.", show_default=False)
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", help="Only so many images, the first of every class.", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option(help="test, val or train.")] = "test",
    seconds_per_image: Annotated[
        float, typer.Option(help="An image that takes longer counts as not certified.")
    ] = 60.0,
    radii: Annotated[
        str | None,
        typer.Option(help="Of the table, e.g. 0,2/255,8/255; those in use for the norm.", show_default=False),
    ] = None,
    max_radius: Annotated[
        float, typer.Option(help="Not smoothing: where the search for a radius ends.")
    ] = Search.max_radius,
    steps: Annotated[int, typer.Option(help="Not smoothing: bisections of that search.")] = Search.steps,
    sigma: Annotated[float, typer.Option(help="Smoothing: deviation of the noise, pixels in [0, 1].")] = Noise.sigma,
    select: Annotated[int, typer.Option(help="Smoothing: noisy copies that choose the class (N0).")] = Noise.select,
    samples: Annotated[int, typer.Option(help="Smoothing: copies that estimate its probability (N).")] = Noise.samples,
    alpha: Annotated[float, typer.Option(help="Smoothing: probability that an image's radius is false.")] = Noise.alpha,
    batch_size: Annotated[int, typer.Option(help="Smoothing: noisy copies in a forward.")] = 256,
    seed: Annotated[int, typer.Option(help="Smoothing: of the noise.")] = Noise.seed,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Go on where it was, or start anew.")] = True,
    out: ResultFile = None,
    imports: Imports = None,
    show_traceback: Traceback = False,
) -> None:
    """Certified accuracy over the radius, by bounds on the network or by randomised smoothing.

    The share of images whose class provably no perturbation of that size changes. Writes JSON with every image's
    radius and a plot; the same command goes on after a kill. Deterministic certificates are for small networks, with
    routed blocks and convolutions or without, mixtures of them and dual models; randomised smoothing is for any.
    """
    reporter = Reporter(console=make_console())
    results, written = certify_run(
        checkpoint,
        out,
        by=by,
        norm=norm,
        search=Search(max_radius, steps),
        noise=Noise(sigma, select, samples, alpha, seed),
        batch_size=batch_size,
        overrides=import_modules(imports, overrides),
        split=split,
        count=n,
        seconds_per_image=seconds_per_image,
        radii=None if radii is None else _radii(radii),
        resume=resume,
        reporter=reporter,
    )
    reporter.console.print(certified_table(results, checkpoint_name(checkpoint_file(checkpoint).resolve())))
    reporter.line(f"guarantee: {results['guarantee']}")
    reporter.line(f"results: {written}")
    reporter.line(f"plot: {written.with_suffix('.png')}")


def _radii(text: str) -> list[Fraction]:
    found = [parse_fraction(radius, "radii") for radius in text.split(",")]
    if min(found) < 0:
        raise ConfigError(f"radii: expected numbers >= 0, got {text!r}")
    return sorted(found)
