"""A map of a latent space: each image's latents as one point in two dimensions, coloured by its class.

Principal components show what varies most and keep distances; UMAP (McInnes et al. 2018), where it is installed, shows
who is whose neighbour, and its distances mean little.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from latelier.analysis.sample import LatentSample
from latelier.errors import NotMeasurable
from latelier.report.figures import COLOURS, STYLE, make_panels
from latelier.report.page import INK
from latelier.terminal import console

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 3_000  # more hide each other
MOST_NAMED = 12  # classes in a legend
MORE_COLOURS = ("#332288", "#ddcc77", "#882255", "#000000")  # Tol's muted scheme, for the classes 9 to 12
NEIGHBOURS = 15  # UMAP's own default
NO_LABEL = "#b9bcc2"


def draw_latent_map(sample: LatentSample, class_names: Sequence[str] | None = None, seed: int = 0) -> Image.Image:
    """The map of at most 3,000 images: principal components, and UMAP beside them if it is installed.

    Up to 12 classes are named in a legend. An error for fewer than three images, or latents that are not finite.
    """
    sample = sample.first(MOST_POINTS)
    if len(sample) < 3:
        raise NotMeasurable(f"A map needs at least 3 images, not {len(sample)}.")
    x, labels = sample.flat(), sample.labels.numpy()  # (n, d), (n,)
    if not np.isfinite(x).all():
        raise NotMeasurable("The latents of some images are not finite, so that no map of them can be drawn.")
    maps = {"Principal components": principal_map(x, seed)}
    if find_spec("umap"):
        maps["UMAP"] = neighbour_map(x, seed)
    else:
        console.print("The map shows principal components only; for UMAP: pip install 'latelier[umap]'", markup=False)
    return _image(maps, labels, class_names)


def principal_map(x: Float[np.ndarray, "n d"], seed: int) -> Float[np.ndarray, "n 2"]:
    """The two first principal components; 0 where the latents do not have as many."""
    from sklearn.decomposition import PCA

    points = np.zeros((len(x), 2), np.float32)
    if x.std(0).any():  # else there is but one point
        found = PCA(min(2, x.shape[1]), random_state=seed % 2**32).fit_transform(x)  # (n, 1 or 2)
        points[:, : found.shape[1]] = found
    return points


def neighbour_map(x: Float[np.ndarray, "n d"], seed: int) -> Float[np.ndarray, "n 2"]:
    """UMAP's two dimensions, from the principal components (its spectral start cannot do few images), one thread."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a part that needs tensorflow, and of what numba thinks of its code
        from umap import UMAP

        model = UMAP(n_neighbors=min(NEIGHBOURS, len(x) - 1), init="pca", random_state=seed % 2**32, n_jobs=1)
        return np.asarray(model.fit_transform(x), np.float32)


def class_colours(labels: Int[np.ndarray, " n"]) -> dict[int, str]:
    """A colour for each label that occurs, ascending: of the report's up to 12 classes, else around the rainbow."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    known = sorted({int(label) for label in labels if label >= 0})
    if len(known) <= MOST_NAMED:
        return dict(zip(known, cycle(COLOURS + MORE_COLOURS)))
    return {label: to_hex(colormaps["turbo"](i / (len(known) - 1))) for i, label in enumerate(known)}


def _image(maps: Mapping[str, np.ndarray], labels: np.ndarray, class_names: Sequence[str] | None) -> Image.Image:
    """The maps side by side."""
    from matplotlib import rc_context

    colours = class_colours(labels)
    with rc_context(STYLE):
        figure, panels = make_panels(len(maps), 2, height=4.6, above=0.4)
        if len(maps) == 1:
            figure.set_figwidth(5.6)
        for (title, points), axes in zip(maps.items(), panels):
            _scatter(axes, title, points, labels, colours)
        _legend(figure, colours, class_names)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=200)
    return Image.open(stream)


def _scatter(axes: Axes, title: str, points: np.ndarray, labels: np.ndarray, colours: Mapping[int, str]) -> None:
    """One panel. Images are drawn in their own order, so that no class covers all others."""
    shades = [colours.get(int(label), NO_LABEL if colours else COLOURS[0]) for label in labels]
    size = float(np.clip(6_000 / len(points), 4, 30))
    axes.scatter(points[:, 0], points[:, 1], s=size, c=shades, alpha=0.75, linewidths=0)
    axes.set(title=title, xticks=[], yticks=[])
    if title != "UMAP":
        axes.set_aspect("equal", adjustable="datalim")  # distances are as they are in the latents


def _legend(figure: Figure, colours: Mapping[int, str], class_names: Sequence[str] | None) -> None:
    """Names of up to 12 classes above the panels; only their number if there are more."""
    from matplotlib.lines import Line2D

    if len(colours) > MOST_NAMED:
        figure.suptitle(f"{len(colours)} classes, a colour for each", fontsize=8.5, color=INK)
    elif colours:
        known = class_names or ()
        names = [known[label] if label < len(known) else f"class {label}" for label in colours]
        dots = [Line2D([], [], linestyle="", marker="o", markersize=5, color=colour) for colour in colours.values()]
        columns = 3 if len(figure.axes) == 1 else 4
        figure.legend(dots, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=8.5)
