"""The Predictor: label values on the native grid, in the right place."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import NEAREST_MEAN, NearestMean, make_model, make_plan, nearest_mean

from pipeline.config import InferenceSection
from pipeline.data.plan import NetworkPlan
from pipeline.errors import ModelError, ResourceError, VolumeError
from pipeline.free_memory import resident_bytes
from pipeline.geometry import Geometry
from pipeline.hardware import Precision
from pipeline.inference.memory import MemoryPlan
from pipeline.model import save_model
from pipeline.networks import NETWORKS, Network
from pipeline.predictor import Engine, Predictor
from pipeline.volumes.volume import Volume

CPU = Engine("cpu", "fp32")
VALUES = np.array([0, 1, 7])


@pytest.fixture(autouse=True)
def _hand_made_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "nearest_mean", nearest_mean)


def make_predictor(inference: InferenceSection | None = None, batch: int | None = None, **plan: object) -> Predictor:
    model = make_model(plan=make_plan(**plan), network=NEAREST_MEAN)
    section = inference or InferenceSection()
    return Predictor(model.network, model.plan, section, replace(CPU, batch=batch))


def make_image(geometry: Geometry, classes: NDArray[np.intp]) -> Volume:
    return Volume((100.0 * classes[None]).astype(np.float32), geometry)


def random_classes(*shape: int) -> NDArray[np.intp]:
    return np.random.default_rng(0).integers(0, 3, shape)


def test_each_voxel_gets_its_label_value_on_the_native_grid() -> None:
    grid = Geometry((13, 30, 9), np.diag([-1.0, 1.0, 1.0, 1.0]))
    classes = random_classes(13, 30, 9)
    label = make_predictor().predict(make_image(grid, classes))
    assert label.geometry == grid
    assert label.array.dtype == np.uint8
    assert np.array_equal(label.array, VALUES[classes])


def test_channels_by_name_and_as_one_volume_are_the_same() -> None:
    grid = Geometry((10, 11, 12), np.eye(4))
    image = make_image(grid, random_classes(10, 11, 12))
    predictor = make_predictor()
    assert np.array_equal(predictor.predict(image).array, predictor.predict({"T1": image}).array)


def test_another_native_grid_can_be_asked_for() -> None:
    grid = Geometry((10, 11, 12), np.eye(4))
    classes = np.zeros((10, 11, 12), dtype=int)
    classes[4:7, 5:8, 6:9] = 1
    wanted = grid.reoriented("LPS")
    label = make_predictor().predict({"T1": make_image(grid, classes)}, wanted)
    assert label.geometry == wanted
    assert np.array_equal(label.array, classes[::-1, ::-1])


@pytest.mark.parametrize("flip_axes", [("x",), ("y", "z")])
def test_flips_leave_a_rule_that_has_no_sides_as_it_is(flip_axes: tuple[str, ...]) -> None:
    """Paired classes swap with the left-right flip alone: averaged with their swap, left and right are level."""
    grid = Geometry((12, 12, 12), np.eye(4))
    classes = random_classes(12, 12, 12)
    inference = InferenceSection(flip_axes=flip_axes)  # type: ignore[arg-type]
    label = make_predictor(inference, label_pairs=()).predict(make_image(grid, classes))
    assert np.array_equal(label.array, VALUES[classes])
    swapped = make_predictor(inference).predict(make_image(grid, classes)).array
    assert np.array_equal(swapped, label.array) == ("x" not in flip_axes)


def test_small_components_are_removed() -> None:
    grid = Geometry((12, 12, 12), np.eye(4))
    classes = np.zeros((12, 12, 12), dtype=int)
    classes[1:6, 1:6, 1:6] = 1
    classes[9, 9, 9] = 1
    label = make_predictor(InferenceSection(largest_component=("left",))).predict(make_image(grid, classes))
    assert label.array.sum() == 125


def test_class_values_beyond_a_byte() -> None:
    grid = Geometry((8, 8, 8), np.eye(4))
    classes = random_classes(8, 8, 8)
    label = make_predictor(labels={"background": 0, "left": -1, "right": 300}).predict(make_image(grid, classes))
    assert label.array.dtype == np.int16
    assert np.array_equal(label.array, np.array([0, -1, 300])[classes])


def test_network_in_training_mode_is_handed_back_in_it() -> None:
    predictor = make_predictor()
    predictor._networks[0].train()
    grid = Geometry((8, 8, 8), np.eye(4))
    predictor.predict(make_image(grid, random_classes(8, 8, 8)))
    assert predictor._networks[0].training


def test_stored_half_precision_images_are_taken() -> None:
    grid = Geometry((10, 11, 12), np.eye(4))
    classes = random_classes(10, 11, 12)
    result = make_predictor().predict_prepared(make_image(grid, classes).array.astype(np.float16), grid, grid)
    assert np.array_equal(result, classes)


def test_loaded_model_predicts_as_the_saved_one(tmp_path: Path) -> None:
    model = make_model()
    save_model(tmp_path / "best", model)
    grid = Geometry((20, 18, 16), np.eye(4))
    image = make_image(grid, random_classes(20, 18, 16))
    loaded = Predictor.load(tmp_path / "best", CPU)
    direct = Predictor(model.network, model.plan, model.description.inference, CPU)
    assert np.array_equal(loaded.predict(image).array, direct.predict(image).array)
    assert len(np.unique(loaded.predict(image).array)) > 1


def test_an_ensemble_decides_by_the_mean_of_its_members_logits(tmp_path: Path) -> None:
    """On a volume of one window, where each member's logits are one forward pass."""
    models = [make_model(seed) for seed in (0, 1)]
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, model in zip(folders, models, strict=True):
        save_model(folder, model)
    grid = Geometry((16, 16, 8), np.eye(4))
    image = make_image(grid, random_classes(16, 16, 8))
    with torch.inference_mode():
        own = [model.network.eval()(torch.from_numpy(image.array[None]))[0].double().numpy() for model in models]
    label = Predictor.load(folders, CPU).predict(image).array
    assert np.array_equal(label, VALUES[np.mean(own, 0).argmax(0)])
    for logits in own:
        assert not np.array_equal(label, VALUES[logits.argmax(0)])


def test_an_ensemble_of_many_windows_is_the_mean_of_its_members_streams() -> None:
    models = [make_model(seed) for seed in (0, 1)]
    grid = Geometry((20, 30, 18), np.eye(4))
    image = make_image(grid, random_classes(20, 30, 18)).array

    def logits(*networks: Network) -> torch.Tensor:
        predictor = Predictor(networks, models[0].plan, InferenceSection(flip_axes=("x",)), CPU)
        with predictor.stream(image, predictor.memory_plan(grid, grid)) as stream:
            return torch.cat([planes.logits for planes in stream], 1)

    first, second = (model.network for model in models)
    torch.testing.assert_close(logits(first, second), (logits(first) + logits(second)) / 2)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"labels": {"background": 0, "right": 7, "left": 1}}, r"plan\.labels"),
        ({"labels": {"background": 0, "left": 7, "right": 1}}, r"plan\.labels"),
        ({"spacing_mm": (1.0, 1.0, 2.0)}, r"plan\.spacing_mm \(\(1\.0, 1\.0, 1\.0\) and \(1\.0, 1\.0, 2\.0\)\)$"),
        ({"patch_size": (16, 16, 16)}, r"plan\.patch_size.*the network's windows"),
    ],
)
def test_models_of_different_plans_make_no_ensemble(tmp_path: Path, change: dict[str, object], differs: str) -> None:
    save_model(tmp_path / "one", make_model())
    save_model(tmp_path / "other", make_model(plan=make_plan(**change)))
    with pytest.raises(ModelError, match=f"one and .*other make no ensemble: they differ in {differs}"):
        Predictor.load([tmp_path / "one", tmp_path / "other"], CPU)


def test_models_that_are_put_together_otherwise_make_no_ensemble(tmp_path: Path) -> None:
    save_model(tmp_path / "one", make_model())
    save_model(tmp_path / "flipped", make_model(inference=InferenceSection(flip_axes=("y",))))
    save_model(tmp_path / "regions", make_model(output="regions"))
    # Planned for another memory, but of the same patch.
    network = NetworkPlan(width=8, kernels=((3, 3, 3), (3, 3, 3)), strides=((2, 2, 2),), norm="instance")
    save_model(tmp_path / "same", make_model(1, plan=make_plan(batch_size=4, reasons={}, network=network)))
    for other, differs in (("flipped", "inference"), ("regions", r"output \(softmax and regions\)")):
        with pytest.raises(ModelError, match=differs):
            Predictor.load([tmp_path / "one", tmp_path / other], CPU)
    Predictor.load([tmp_path / "one", tmp_path / "same"], CPU)


class Thresholds(Network):
    """Two regions: an intensity above 50, and one above 150."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = torch.nn.Parameter(torch.tensor([50.0, 150.0]).reshape(1, 2, 1, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image - self.limits


def test_a_voxel_has_the_label_of_the_last_region_that_holds_it() -> None:
    grid = Geometry((13, 30, 9), np.eye(4))
    classes = random_classes(13, 30, 9)
    predictor = Predictor(Thresholds(), make_plan(), InferenceSection(), CPU, output="regions")
    assert np.array_equal(predictor.predict(make_image(grid, classes)).array, VALUES[classes])


def test_paired_regions_swap_where_left_and_right_are_flipped() -> None:
    """Averaged with their swap, both regions begin at 100."""
    grid = Geometry((12, 12, 12), np.eye(4))
    classes = random_classes(12, 12, 12)
    flipped = Predictor(Thresholds(), make_plan(), InferenceSection(flip_axes=("x",)), CPU, output="regions")
    image = Volume(make_image(grid, classes).array + 1, grid)
    assert np.array_equal(flipped.predict(image).array, np.where(classes > 0, 7, 0))


def test_a_segmentation_says_how_far_it_can_be_trusted() -> None:
    grid = Geometry((12, 20, 12), np.eye(4))
    classes = random_classes(12, 20, 12)
    predictor, image = make_predictor(), make_image(grid, classes)
    seen = []
    prepared = predictor.prepare({"T1": image}, grid)
    found = predictor.segment(prepared, grid, watch=[lambda planes, axis: seen.append((planes.logits.shape[1], axis))])
    assert np.array_equal(found.classes, classes)
    assert (sum(count for count, _ in seen), {axis for _, axis in seen}) == (20, {1})
    assert [structure.voxels for structure in found.confidence.labels.values()] == [
        (classes == k).sum() for k in (1, 2)
    ]
    assert found.confidence.doubt == pytest.approx(0, abs=1e-3)
    assert not found.confidence.low
    empty = predictor.segment(predictor.prepare({"T1": make_image(grid, 0 * classes)}, grid), grid)
    assert (empty.confidence.low, empty.confidence.doubt) == (True, 1.0)


def test_an_ensemble_says_how_far_its_members_agree() -> None:
    """Three members that draw the borders between the same intensities elsewhere."""
    members = [NearestMean(0, 100, 200), NearestMean(0, 100, 200), NearestMean(0, 100, 320)]
    grid = Geometry((12, 12, 12), np.eye(4))
    classes = random_classes(12, 12, 12)
    predictor = Predictor(members, make_plan(), InferenceSection(), CPU)
    found = predictor.segment(predictor.prepare({"T1": make_image(grid, classes)}, grid), grid).confidence
    left, right = (int((classes == label).sum()) for label in (1, 2))
    # The third says left (100), where the others say right (200): its border lies at 210.
    assert found.labels["left"].fold_dice == pytest.approx((1 + 2 * (2 * left / (left + left + right))) / 3)
    assert found.labels["right"].fold_dice == pytest.approx(1 / 3)
    alone = Predictor(members[0], make_plan(), InferenceSection(), CPU)
    assert alone.segment(predictor.prepare({"T1": make_image(grid, classes)}, grid), grid).confidence.fold_dice is None


def test_windows_of_nothing_but_air_are_left_out_unless_told_otherwise() -> None:
    """Within the body the labels are the same; where no window holds any, they are background."""
    grid = Geometry((80, 20, 12), np.eye(4))
    classes = random_classes(80, 20, 12) + 1
    classes[30:] = 0
    image = make_image(grid, classes)
    model = make_model()
    skipping, running = (
        Predictor(model.network.eval(), model.plan, InferenceSection(), replace(CPU, skip_empty=skip))
        for skip in (True, False)
    )
    some, all_ = (p.segment(p.prepare({"T1": image}, grid), grid) for p in (skipping, running))
    assert (all_.windows_skipped, some.windows_run + some.windows_skipped) == (0, all_.windows_run)
    assert some.windows_skipped >= 0.3 * all_.windows_run
    assert np.array_equal(some.classes[:30], all_.classes[:30])
    assert all_.classes[60:].any()
    assert not some.classes[60:].any()
    assert np.array_equal(skipping.predict(image).array, VALUES[some.classes])


def test_logits_do_not_depend_on_the_memory_there_is(tmp_path: Path) -> None:
    """The batch falls to a window, then the unfinished planes go to disk, then it is an error; windows stay."""
    grid = Geometry((40, 30, 20), np.eye(4))
    model = make_model()
    ample = Predictor(model.network.eval(), model.plan, InferenceSection(), replace(CPU, batch=4, scratch=tmp_path))
    image = make_image(grid, random_classes(40, 30, 20)).array

    def logits(memory: MemoryPlan) -> torch.Tensor:
        with ample.stream(image, memory) as stream:
            return torch.cat([planes.logits for planes in stream], 1)

    def plan(limit_bytes: int | None) -> MemoryPlan:
        engine = replace(ample.engine, limit_bytes=limit_bytes)
        predictor = Predictor(model.network, model.plan, InferenceSection(), engine)
        return predictor.memory_plan(grid, grid, process_bytes=0)

    whole = plan(None)
    fewer = plan(whole.peak_ram_bytes - 1)
    least = plan(replace(fewer, batch=1, activations=whole.activations // 4).peak_ram_bytes - 1)
    assert (whole.batch, whole.ring_on_disk) == (4, False)
    assert (fewer.batch, fewer.ring_on_disk) == (2, False)
    assert (least.batch, least.ring_on_disk) == (1, True)
    assert whole.windows == fewer.windows == least.windows
    for memory in (fewer, least):
        torch.testing.assert_close(logits(memory), logits(whole), atol=1e-5, rtol=0)
    assert torch.equal(logits(least), logits(replace(least, ring_on_disk=False)))
    with pytest.raises(ResourceError, match=r"40x30x20 voxels does not fit in 0\.00 GB.*--max-memory"):
        plan(1)


def test_a_case_that_does_not_fit_is_refused_before_its_first_window() -> None:
    image = make_image(Geometry((20, 18, 16), np.eye(4)), random_classes(20, 18, 16))
    model = make_model()
    predictor = Predictor(model.network, model.plan, InferenceSection(), replace(CPU, limit_bytes=1))
    with pytest.raises(ResourceError, match="20x18x16"):
        predictor.predict(image)
    with pytest.raises(ResourceError, match="20x18x16"):  # as validation in training does it
        predictor.predict_prepared(image.array, image.geometry, image.geometry)


def test_an_image_in_half_precision_is_in_memory_beside_its_copy() -> None:
    grid = Geometry((160, 160, 160), np.eye(4))
    half, single = (np.ones((1, *grid.shape), dtype) for dtype in (np.float16, np.float32))
    predictor = make_predictor()
    predictor.memory_plan(grid, grid)
    beside, counted = (predictor.plan_in_hand(image, grid, grid).process for image in (half, single))
    assert beside - counted == pytest.approx(single.nbytes, abs=single.nbytes // 4)


def test_rules_are_in_the_memory_plan() -> None:
    grid = Geometry((20, 18, 16), np.eye(4))
    for rules in ({"largest_component": ("left",)}, {"smallest_volume_ml": {"right": 1.0}}):
        assert make_predictor(InferenceSection(**rules)).memory_plan(grid, grid).postprocessing == 6 * 20 * 18 * 16
    assert make_predictor().memory_plan(grid, grid).postprocessing == 0


def test_memory_that_earlier_work_has_freed_is_there_for_a_case() -> None:
    """Freed, it stays with the process where the allocator keeps it: below a block that is still in use."""
    grid = Geometry((20, 18, 16), np.eye(4))
    model, image = make_model(), make_image(grid, random_classes(20, 18, 16))
    needed = Predictor(model.network, model.plan, InferenceSection(), CPU).memory_plan(grid, grid).peak_ram_bytes
    before = resident_bytes()
    blocks = [np.ones(2**13) for _ in range(2**12)]
    last = np.ones(2**13)
    blocks.clear()
    if resident_bytes() < before + 2**27:
        pytest.skip("this allocator keeps nothing")
    engine = replace(CPU, limit_bytes=needed + 2**26)
    Predictor(model.network, model.plan, InferenceSection(), engine).predict(image)
    assert last.all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_compiled_networks_predict_as_they_are(tmp_path: Path) -> None:
    save_model(tmp_path / "best", make_model())
    image = make_image(Geometry((20, 18, 16), np.eye(4)), random_classes(20, 18, 16))
    plain = Predictor.load(tmp_path / "best", CPU)
    compiled = Predictor.load(tmp_path / "best", replace(CPU, compile=True))
    assert (plain.predict(image).array != compiled.predict(image).array).mean() < 1e-3


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (lambda image: Volume(np.concatenate([image.array] * 2), image.geometry), r"1 channels \(T1\).*\(2, 8, 8, 8\)"),
        (lambda image: Volume(image.array[0], image.geometry), r"got \(8, 8, 8\)"),
        (lambda image: {"T2": image}, "T1"),
        (lambda image: {}, "no channel of the model is there: expected T1"),
    ],
)
def test_wrong_channels_are_refused(images: Callable[[Volume], Volume], expected: str) -> None:
    image = make_image(Geometry((8, 8, 8), np.eye(4)), random_classes(8, 8, 8))
    with pytest.raises(VolumeError, match=expected):
        make_predictor().predict(images(image))


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a whole model"):
        Predictor.load(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_labels_as_the_cpu_does(tmp_path: Path) -> None:
    save_model(tmp_path / "best", make_model())
    image = make_image(Geometry((40, 30, 20), np.eye(4)), random_classes(40, 30, 20))
    on_cpu, on_gpu = (
        Predictor.load(tmp_path / "best", Engine(device, "fp32")).predict(image) for device in ("cpu", "cuda")
    )
    assert (on_cpu.array != on_gpu.array).mean() < 1e-3


@pytest.mark.parametrize(
    ("precision", "remedy"),
    [("fp32", "its weights or the image are damaged"), ("bf16", r"give --precision fp32 .*training\.precision: fp32")],
)
def test_logits_that_are_no_numbers_are_an_error_and_not_a_background(precision: Precision, remedy: str) -> None:
    model = make_model(plan=make_plan(), network=NEAREST_MEAN)
    for tensor in (*model.network.parameters(), *model.network.buffers()):
        tensor.data.fill_(float("nan"))
    predictor = Predictor(model.network, model.plan, InferenceSection(), Engine("cpu", precision))
    with pytest.raises(ModelError, match=f"logits are infinite or not a number; {remedy}"):
        predictor.predict(make_image(Geometry((10, 11, 12), np.eye(4)), random_classes(10, 11, 12)))


def test_a_model_computes_in_the_precision_it_was_trained_in_unless_told_otherwise(tmp_path: Path) -> None:
    save_model(tmp_path / "model", make_model(plan=make_plan(), network=NEAREST_MEAN))
    assert Predictor.load(tmp_path / "model", Engine("cpu")).dtype == torch.float32
    assert Predictor.load(tmp_path / "model", Engine("cpu", "bf16")).dtype == torch.bfloat16
