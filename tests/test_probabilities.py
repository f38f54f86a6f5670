import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.geometry import Geometry
from pipeline.inference import probabilities as module
from pipeline.inference.labelling import label_from_planes
from pipeline.inference.planes import LogitPlanes
from pipeline.inference.probabilities import ProbabilityRequest
from pipeline.volumes.axes import axis_maps

PREPARED = Geometry((6, 7, 5), np.diag([1.5, 1.3, 2.0, 1.0]))
CODES = ["RAS", "LPS", "SPL", "AIR", "ILA", "PSR"]


def native_grid(code="RAS"):
    """A finer grid than the plan's that sticks out of it."""
    affine = np.diag([1.1, 1.2, 0.9, 1.0])
    affine[:3, 3] = (-1.9, 0.4, -2.7)
    return Geometry((8, 7, 12), affine).reoriented(code)


def collected(logits, axis, native, classes, *, output="softmax", dtype="uint8", temperature=1.0, thick=None):
    """The label map, and the probabilities as a volume of whole numbers; each plane is put once, on one axis."""
    volume = np.zeros((len(classes), *native.shape), dtype)
    put: list[tuple[int, int]] = []

    def take(along: int, index: int, planes: np.ndarray) -> None:
        put.append((along, index))
        assert planes.dtype == dtype
        np.moveaxis(volume, along + 1, 0)[index] = planes

    moved = np.moveaxis(logits, axis + 1, 1)
    planes = (LogitPlanes(i, torch.from_numpy(moved[:, i : i + 1].copy())) for i in range(moved.shape[1]))
    request = ProbabilityRequest(tuple(classes), take, dtype=dtype, temperature=temperature)
    label = label_from_planes(
        planes, axis=axis, prepared=PREPARED, native=native, output=output, thick_axis=thick, probabilities=request
    )
    (along,) = {along for along, _ in put}
    assert sorted(index for _, index in put) == list(range(native.shape[along]))
    return label, volume


def reference(logits, native, classes, *, output="softmax", temperature=1.0, thick=None):
    """All K volumes interpolated in float64, then softmax or sigmoid: slow and obvious."""
    maps = axis_maps(PREPARED, native)
    values = logits.astype(np.float64)
    for m in maps:
        m = m.rounded() if m.axis == thick else m
        weight = m.weight.reshape([-1 if own == m.axis + 1 else 1 for own in range(4)])
        values = (1 - weight) * values.take(m.lower, m.axis + 1) + weight * values.take(m.upper, m.axis + 1)
    values = np.exp(values / temperature)
    values = values / (values.sum(axis=0) if output == "softmax" else 1 + values)
    values = values.transpose([0, *(m.axis + 1 for m in maps)])
    chosen = values[[index - (output == "regions") for index in classes]]
    for own, m in enumerate(maps):
        outside = np.moveaxis(chosen, own + 1, 1)[:, ~m.inside]
        outside[...] = 0
        outside[[i for i, index in enumerate(classes) if index == 0]] = 1
        np.moveaxis(chosen, own + 1, 1)[:, ~m.inside] = outside
    return chosen


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("output", "classes"), [("softmax", (3, 0)), ("regions", (1, 4))])
def test_equals_interpolating_all_logits_in_any_axis_order(code, output, classes):
    native = native_grid(code)
    logits = np.random.default_rng(1).normal(0, 3, (4, *PREPARED.shape)).astype(np.float32)
    expected = reference(logits, native, classes, output=output)
    for axis in range(3):
        _, got = collected(logits, axis, native, classes, output=output, dtype="uint16")
        assert np.abs(got / 65535 - expected).max() < 2e-5


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2), st.sampled_from(CODES), st.sampled_from([0.5, 1.0, 2.5]), st.none() | st.integers(0, 2),
    st.sampled_from(["softmax", "regions"]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_equals_interpolating_all_logits_at_any_temperature(axis, code, temperature, thick, output, seed):
    logits = np.random.default_rng(seed).normal(0, 3, (3, *PREPARED.shape)).astype(np.float32)
    native, wanted = native_grid(code), {"output": output, "temperature": temperature, "thick": thick}
    classes = (2, 1)
    _, got = collected(logits, axis, native, classes, **wanted)
    assert np.abs(got / 255 - reference(logits, native, classes, **wanted)).max() < 0.5 / 255 + 1e-5


@pytest.mark.parametrize("output", ["softmax", "regions"])
def test_the_label_map_is_the_decision_on_the_probabilities(output):
    logits = np.random.default_rng(2).normal(0, 2, (3, *PREPARED.shape)).astype(np.float32)
    classes = (0, 1, 2) if output == "softmax" else (1, 2, 3)
    label, got = collected(logits, 1, native_grid("SPL"), classes, output=output, dtype="uint16")
    if output == "softmax":
        second, best = np.sort(got.astype(int), axis=0)[-2:]
        clear = best - second > 2
        decided = got.argmax(axis=0)
    else:
        clear = (np.abs(got - 65535 / 2) > 2).all(axis=0)
        decided = ((got > 65535 / 2) * np.arange(1, 4).reshape(3, 1, 1, 1)).max(axis=0)
    np.testing.assert_array_equal(label[clear], decided[clear])
    assert clear.mean() > 0.99
    plain, _ = collected(logits, 1, native_grid("SPL"), (1,), output=output, temperature=3.0)
    np.testing.assert_array_equal(plain, label)  # neither the request nor its temperature touches the label map


def test_two_voxels_by_hand():
    """Equal logits are one half each; at temperature 2, ln 9 is three to one."""
    logits = np.array([[0.0, 0.0], [0.0, np.log(9.0)]], np.float32).reshape(2, 2, 1, 1)
    grid = Geometry((2, 1, 1), np.eye(4))
    got = np.zeros((1, 2), np.uint8)

    def take(along: int, index: int, planes: np.ndarray) -> None:
        got[:, index] = planes[:, 0, 0]

    request = ProbabilityRequest((1,), take, temperature=2.0)
    planes = [LogitPlanes(0, torch.from_numpy(logits))]
    label_from_planes(planes, axis=0, prepared=grid, native=grid, probabilities=request)
    np.testing.assert_array_equal(got, [[128, 191]])  # 127.5 to the even one, 191.25


def test_strips_of_rows_give_the_same(monkeypatch):
    logits = np.random.default_rng(3).normal(0, 2, (5, *PREPARED.shape)).astype(np.float32)
    for code, axis in itertools.product(CODES[:3], range(3)):
        whole = collected(logits, axis, native_grid(code), (4, 2))[1]
        with monkeypatch.context() as patch:
            patch.setattr(module, "_LOGITS_AT_ONCE", 1)
            np.testing.assert_array_equal(collected(logits, axis, native_grid(code), (4, 2))[1], whole)


def test_a_grid_beside_the_plans_is_certain_background():
    native = Geometry((3, 3, 3), np.diag([1.0, 1.0, 1.0, 1.0])).cropped((40, 0, 0), (43, 3, 3))
    logits = np.random.default_rng(4).normal(size=(3, *PREPARED.shape)).astype(np.float32)
    for axis in range(3):
        _, got = collected(logits, axis, native, (0, 2))
        assert (got[0] == 255).all()
        assert not got[1].any()


@pytest.mark.parametrize(
    ("output", "classes"), [("softmax", (3,)), ("softmax", (-1,)), ("regions", (0,)), ("regions", (4,))]
)
def test_a_class_that_is_not_there_is_refused(output, classes):
    logits = np.zeros((3, *PREPARED.shape), np.float32)
    with pytest.raises(ValueError, match=r"classes \("):
        collected(logits, 0, native_grid(), classes, output=output)
