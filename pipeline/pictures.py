"""Pictures: three orthogonal slices of a case with the outlines of label maps over them, and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.volumes.label_tables import OKABE_ITO, colour_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = OKABE_ITO
LINES = ("solid", "dashed", "dotted")
# To the patient's left, front and head: a picture's right is the patient's left, as radiologists look at it.
PICTURE_ORIENTATION = "LAS"

# Voxels from which a strip's grey scale is taken.
_SAMPLED = 1 << 18


def draw_overlay(
    image: NDArray[Any],
    spacing_mm: tuple[float, float, float],
    outlines: Mapping[str, NDArray[Any]],
    class_names: Sequence[str],
    title: str = "",
) -> Figure:
    """Draw three orthogonal slices of an image with the outlines of label maps.

    The slices go through the largest section of the first label map that has a foreground, else through the middle.
    Axes grow to the right and upwards: an array in RAS order shows the patient's left on the left.

    Args:
        image: (X, Y, Z), any real type; shown from its 1st to its 99th percentile.
        spacing_mm: of the three axes.
        outlines: name ("reference", "prediction") -> (X, Y, Z) class indices, 0 the background; each has its line.
        class_names: by class index, the background first; each class has its own colour.
        title: above the picture.

    Returns:
        A figure that belongs to no window; `figure.savefig(path)` writes it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=9)
    for axis, (panel, at) in enumerate(zip(figure.subplots(1, 3), slices_of(outlines, image.shape), strict=True)):
        _draw_slice(panel, image, list(outlines.values()), axis, at, spacing_mm)
        panel.set_title(f"{'XYZ'[axis]} = {at}", fontsize=8)
    _legend(figure, outlines, class_names)
    return figure


def draw_images(images: Mapping[str, NDArray[Any]], spacing_mm: tuple[float, float, float], title: str = "") -> Figure:
    """Draw the middle slice across the third axis of several images, all on one grey scale.

    Args:
        images: name -> (X, Y, Z), of one shape; the first one's 1st and 99th percentiles are black and white.
        spacing_mm: of the three axes.
        title: above the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(images), 3.4), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=9)
    low, high = np.percentile(next(iter(images.values())), (1, 99))
    for panel, (name, image) in zip(figure.subplots(1, len(images)), images.items(), strict=True):
        middle = image[:, :, image.shape[2] // 2].T
        aspect = spacing_mm[1] / spacing_mm[0]
        panel.imshow(middle, cmap="gray", vmin=low, vmax=high, origin="lower", aspect=aspect, interpolation="nearest")
        panel.set_title(name, fontsize=8)
        panel.set_axis_off()
    return figure


class Patch(NamedTuple):
    """A patch to be drawn.

    Attributes:
        title: above it.
        image: (X, Y, Z), any real type.
        classes: (X, Y, Z) class indices, 0 the background; None where there is nothing to outline.
    """

    title: str
    image: NDArray[Any]
    classes: NDArray[Any] | None


def draw_patches(
    patches: Sequence[Patch], spacing_mm: tuple[float, float, float], class_names: Sequence[str], columns: int = 4
) -> Figure:
    """Draw a slice of each patch across its thickest voxels, with the outlines of its classes.

    The slice is that with the largest section of foreground, else the middle one.

    Args:
        patches: at least one, each on a grey scale of its own from its 1st to its 99th percentile.
        spacing_mm: of the three axes.
        class_names: by class index, the background first.
        columns: patches side by side.
    """
    from matplotlib.figure import Figure

    axis = max(range(3), key=lambda n: (spacing_mm[n], n))
    rows = -(-len(patches) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.8 * rows + 0.4), dpi=100, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    outlined = [[] if patch.classes is None else [patch.classes] for patch in patches]
    for panel, patch, outlines in zip(panels, patches, outlined, strict=False):
        at = slices_of(dict(enumerate(outlines)), patch.image.shape)[axis]
        _draw_slice(panel, patch.image, outlines, axis, at, spacing_mm)
        panel.set_title(patch.title, fontsize=8)
    for panel in panels[len(patches) :]:
        panel.set_axis_off()
    present = [np.unique(classes) for outlines in outlined for classes in outlines]
    _legend(figure, {"": np.concatenate(present)} if present else {}, class_names)
    return figure


def _draw_slice(
    panel: Axes,
    image: NDArray[Any],
    outlines: Sequence[NDArray[Any]],
    axis: int,
    at: int,
    spacing_mm: tuple[float, float, float],
) -> None:
    """Draw a slice of an image, on the whole image's scale of greys, with the outlines of label maps."""
    across, up = (n for n in range(3) if n != axis)
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, (1, 99)) if finite.size else (0, 1)
    panel.imshow(
        np.take(image, at, axis).T,
        cmap="gray",
        vmin=low,
        vmax=high,
        origin="lower",
        aspect=spacing_mm[up] / spacing_mm[across],
        interpolation="nearest",
    )
    for line, classes in zip(LINES, outlines, strict=False):
        _outline(panel, np.take(classes, at, axis).T, line)
    panel.set_axis_off()


def slices_of(outlines: Mapping[Any, NDArray[Any]], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return for each axis the slice with the largest section of the first label map that is not empty."""
    drawn = next((classes for classes in outlines.values() if classes.any()), None)
    if drawn is None:
        return tuple(n // 2 for n in shape)
    foreground = drawn != 0
    return tuple(int(foreground.sum(tuple(a for a in range(3) if a != axis)).argmax()) for axis in range(3))


def _outline(panel: Axes, classes: NDArray[Any], line: str) -> None:
    """Draw the outline of each class of a slice (rows, columns)."""
    padded = np.pad(classes, 1)  # A structure that touches the border is closed there.
    rows, columns = (np.arange(-1, n + 1) for n in classes.shape)
    for value in np.unique(classes[classes != 0]):
        colour = colour_of(int(value))
        panel.contour(columns, rows, padded == value, levels=[0.5], colors=colour, linestyles=line, linewidths=1.2)


def _legend(figure: Figure, outlines: Mapping[str, NDArray[Any]], class_names: Sequence[str]) -> None:
    """Name the classes that occur by colour, and the label maps by line style where there are several."""
    from matplotlib.lines import Line2D

    present = sorted({int(value) for classes in outlines.values() for value in np.unique(classes)} - {0})
    handles = [Line2D([], [], color=colour_of(k), label=class_names[k]) for k in present]
    if len(outlines) > 1:
        handles += [Line2D([], [], color="gray", ls=ls, label=n) for ls, n in zip(LINES, outlines, strict=False)]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)


def draw_strip(
    image: NDArray[Any], spacing_mm: tuple[float, float, float], classes: NDArray[Any], height: int = 240
) -> NDArray[np.uint8]:
    """Draw the slices of `draw_overlay` side by side, in plain numpy: some milliseconds a case, for pages of thousands.

    Args:
        image: (X, Y, Z), any real type; shown from its 1st to its 99th percentile.
        spacing_mm: of the three axes.
        classes: (X, Y, Z) class indices, 0 the background; outlined in the colours of `draw_overlay`.
        height: of the strip, in pixels; slices that are long for their height are drawn lower.

    Returns:
        (height, width, 3) red, green and blue.
    """
    sample = image.reshape(-1)[:: 1 + image.size // _SAMPLED]
    finite = sample[np.isfinite(sample)]
    low, high = np.percentile(finite, (1, 99)) if finite.size else (0.0, 1.0)
    panels = []
    for axis, at in enumerate(slices_of({"": classes}, image.shape)):
        across, up = (n for n in range(3) if n != axis)
        width_mm, height_mm = image.shape[across] * spacing_mm[across], image.shape[up] * spacing_mm[up]
        scale = min(height / height_mm, 2 * height / width_mm)
        size = (max(1, round(height_mm * scale)), max(1, round(width_mm * scale)))
        grey = _stretched(np.nan_to_num(np.take(image, at, axis).T[::-1].astype(np.float32)), size)
        panel = _coloured((grey - low) / max(high - low, 1e-6), _nearest(np.take(classes, at, axis).T[::-1], size))
        panels.append(np.pad(panel, ((0, height - size[0]), (0, 4), (0, 0))))
    return np.concatenate(panels, axis=1)


def _stretched(plane: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Stretch a slice (rows, columns) linearly to a size."""
    for axis, wanted in enumerate(size):
        length = plane.shape[axis]
        places = np.clip((np.arange(wanted) + 0.5) * length / wanted - 0.5, 0, length - 1)
        lower = places.astype(np.intp)
        weight = np.expand_dims((places - lower).astype(np.float32), 1 - axis)
        upper = np.minimum(lower + 1, length - 1)
        plane = np.take(plane, lower, axis) * (1 - weight) + np.take(plane, upper, axis) * weight
    return plane


def _nearest(plane: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Stretch a slice of class indices (rows, columns) to a size."""
    for axis, wanted in enumerate(size):
        places = (np.arange(wanted) + 0.5) * plane.shape[axis] / wanted
        plane = np.take(plane, places.astype(np.intp), axis)
    return plane


def _coloured(grey: NDArray[np.floating[Any]], classes: NDArray[Any]) -> NDArray[np.uint8]:
    """Return (rows, columns, 3) of a slice from 0, black, to 1, white, with the outlines of its classes."""
    around = np.pad(classes, 1)
    rows, columns = classes.shape
    shifts = ((0, 1), (2, 1), (1, 0), (1, 2))
    # Where two structures meet, one line is drawn.
    edge = np.any([around[r : r + rows, c : c + columns] < classes for r, c in shifts], axis=0)
    picture = np.repeat((255 * grey.clip(0, 1)).astype(np.uint8)[..., None], 3, axis=-1)
    found, which = np.unique(classes[edge], return_inverse=True)
    colours = np.array([list(bytes.fromhex(colour_of(int(k))[1:])) for k in found], np.uint8).reshape(-1, 3)
    picture[edge] = colours[which]
    return picture


def draw_learning_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Draw a run's losses, gradient norms and validation scores over its steps, one panel each.

    Args:
        curves: metric -> (step, value); names begin with "train/" or "val/".
    """
    from matplotlib.figure import Figure

    shown = {"Training loss": "train/loss", "Gradient norm": "train/gradient_norm", "Validation": "val/"}
    figure = Figure(figsize=(14, 4), layout="constrained")
    panels = figure.subplots(1, len(shown))
    for panel, (title, prefix) in zip(panels, shown.items(), strict=True):
        for name, points in sorted(curves.items()):
            if name.startswith(prefix):
                panel.plot(*zip(*points, strict=True), marker=".", label=name.removeprefix("val/"))
        panel.set(title=title, xlabel="step")
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend()
    return figure
