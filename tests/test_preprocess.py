"""`medseg preprocess` and `medseg clean`: incremental, killed at any moment, mended, swept."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import Config, DataSection, PreprocessingSection
from pipeline.config_loading import dump_config
from pipeline.data.manifest import Case, ImageFile, Manifest, load_manifest, save_manifest
from pipeline.data.phantoms import write_phantom_dataset
from pipeline.data.plan import read_plan, write_plan
from pipeline.data.store import CaseStore
from pipeline.errors import ConfigError, ManifestError, PipelineError, StoreError
from pipeline.records import write_text
from pipeline.stages import manifest as manifest_stage
from pipeline.stages.preprocess import run
from pipeline.volumes.volume import read_image
from pipeline.volumes.writing import write_image

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def phantom_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight phantoms and its manifest, two channels on grids of their own; shared, not to be changed."""
    folder = tmp_path_factory.mktemp("phantoms")
    source = write_phantom_dataset(folder / "set", cases=8, channels=2, layout="folder")
    manifest_stage.run(source, folder / "phantoms.json", folds=3)
    return folder


@pytest.fixture(scope="module")
def undisturbed(phantom_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that a run makes which nothing disturbs."""
    return run(config_of(phantom_set, tmp_path_factory.mktemp("undisturbed"))).folder


@pytest.fixture
def own_set(phantom_set: Path, tmp_path: Path) -> Path:
    """A copy of the data set that a test may change."""
    return Path(shutil.copytree(phantom_set, tmp_path / "data"))


def config_of(data: Path, workspace: Path, **preprocessing: object) -> Config:
    """Of a patch and a batch that are set: choosing them takes a second a plan, and is tested elsewhere."""
    preprocessing = {"patch_size": (16, 16, 16), "batch_size": 2, **preprocessing}
    return Config(
        name="experiment",
        workspace=workspace,
        data=DataSection(manifest=data / "phantoms.json"),
        preprocessing=PreprocessingSection.model_validate(preprocessing),
    )


def cases_in(store: Path) -> dict[str, bytes]:
    """Every file of a store's cases."""
    files = [path for path in (store / "cases").rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in files}


def test_the_store_holds_every_case_as_the_plan_says(phantom_set: Path, undisturbed: Path) -> None:
    manifest, store = load_manifest(phantom_set / "phantoms.json"), CaseStore(undisturbed / "cases")
    plan = read_plan(undisturbed / "plan.yaml")
    assert store.case_ids() == tuple(case.id for case in manifest.cases)
    for case in manifest.cases:
        stored = store.read(case.id)
        assert stored.image.shape[0] == 2
        assert stored.image.shape[1:] == stored.label.shape == stored.geometry.shape
        assert stored.geometry.orientation == "RAS"
        assert stored.geometry.spacing_mm == pytest.approx(plan.spacing_mm, rel=0.05)
        assert stored.reference.shape == stored.native.shape
        assert stored.channels_present == tuple(manifest.channels)
        volumes = [np.bincount(label.ravel(), minlength=3) for label in (stored.label, stored.reference)]
        ratio = stored.geometry.voxel_volume_ml / stored.native.voxel_volume_ml
        # Structures of 500 voxels: whole voxels at the rim are won or lost.
        np.testing.assert_allclose(volumes[0][1:] * ratio, volumes[1][1:], rtol=0.15)


def test_what_is_fresh_is_skipped_and_what_changed_is_redone(own_set: Path, tmp_path: Path) -> None:
    config = config_of(own_set, tmp_path / "work")
    first = run(config)
    assert len(first.written) == 8
    assert not first.fresh
    before = cases_in(first.folder)
    again = run(config)
    assert not again.written
    assert again.fresh == first.written
    assert cases_in(first.folder) == before

    manifest = load_manifest(own_set / "phantoms.json")
    case = manifest.cases[2]
    image = manifest.path_of(next(iter(case.images.values())))
    changed = read_image(image)
    changed.array[:, 3:9] *= 1.5
    write_image(image, changed)
    without_hashes = [
        c.changed(images={n: f.changed(sha256=None) for n, f in c.images.items()}) for c in manifest.cases
    ]
    save_manifest(manifest.changed(cases=tuple(without_hashes)), own_set / "phantoms.json")
    third = run(config)
    assert third.written == (case.id,)
    differing = {name.split("/")[1] for name, content in cases_in(first.folder).items() if before[name] != content}
    assert differing == {case.id}


def test_channels_and_labels_in_another_order_are_made_anew(own_set: Path, tmp_path: Path) -> None:
    config = config_of(own_set, tmp_path / "work")
    run(config)
    manifest = load_manifest(own_set / "phantoms.json")
    background, *structures = manifest.labels.items()
    turned = manifest.changed(
        channels=dict(reversed(manifest.channels.items())), labels=dict([background, *reversed(structures)])
    )
    assert turned.digest() != manifest.digest()
    save_manifest(turned, own_set / "phantoms.json")
    assert len(run(config).written) == 8


def test_another_preprocessing_has_another_store(phantom_set: Path, tmp_path: Path) -> None:
    one = run(config_of(phantom_set, tmp_path, spacing_mm=(2.5, 2.5, 2.5)))
    other = run(config_of(phantom_set, tmp_path, spacing_mm=(3.0, 3.0, 3.0)))
    assert one.folder != other.folder
    assert one.plan.spacing_mm == (2.5, 2.5, 2.5)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.0005)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        lambda cases: any(cases.parents[2].glob("checks/*")),
        lambda cases: any(cases.glob(".tmp-*")),
        lambda cases: any(cases.glob(".tmp-*/image.b2nd")),
        lambda cases: len([*cases.glob("phantom*")]) >= 3,
    ],
    ids=["checking", "first_case_begun", "first_case_half_written", "three_done"],
)
def test_killed_at_any_moment(
    moment: Callable[[Path], bool], phantom_set: Path, undisturbed: Path, tmp_path: Path
) -> None:
    config = config_of(phantom_set, tmp_path / "work")
    cases = tmp_path / "work" / "stores" / undisturbed.name / "cases"
    yaml = tmp_path / "experiment.yaml"
    write_text(yaml, dump_config(config))
    command = [sys.executable, "-m", "pipeline", "preprocess", str(yaml), "--workspace", str(tmp_path / "work")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    wait_for(lambda: moment(cases), process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"

    store = CaseStore(cases)
    for case_id in store.case_ids():
        store.verify(case_id)
    report = run(config)
    assert set(report.written) | set(report.fresh) == {path.name for path in (undisturbed / "cases").glob("phantom*")}
    assert cases_in(report.folder) == cases_in(undisturbed)
    assert read_plan(report.folder / "plan.yaml") == read_plan(undisturbed / "plan.yaml")


def test_a_corrupted_file_is_found_named_and_rebuilt(
    own_set: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(own_set, tmp_path / "work")
    report = run(config)
    before, victim = cases_in(report.folder), report.written[4]
    path = report.folder / "cases" / victim / "label.b2nd"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(StoreError, match=f"{victim}/label.b2nd.*medseg preprocess"):
        CaseStore(report.folder / "cases").read(victim)
    again = run(config)
    assert again.written == (victim,)
    assert f"{victim}/label.b2nd" in caplog.text
    assert cases_in(report.folder) == before


def test_an_edited_plan_is_kept_until_replan(phantom_set: Path, tmp_path: Path) -> None:
    config = config_of(phantom_set, tmp_path / "work")
    report = run(config)
    path = report.folder / "plan.yaml"
    write_text(path, path.read_text().replace(f"batch_size: {report.plan.batch_size}", "batch_size: 3"))
    edited = run(config)
    assert edited.plan.batch_size == 3 != report.plan.batch_size
    assert not edited.written  # no stored voxel depends on the batch
    spacing = list(report.plan.spacing_mm)
    write_text(path, path.read_text().replace(f"spacing_mm: {spacing}", "spacing_mm: [3.0, 3.0, 3.0]"))
    edited = run(config)
    assert edited.plan.spacing_mm == (3.0, 3.0, 3.0)
    assert len(edited.written) == 8
    assert run(config).plan == edited.plan
    assert run(config, replan=True).plan == report.plan
    assert not run(config).written


def test_an_edited_plan_for_other_labels_is_refused(own_set: Path, tmp_path: Path) -> None:
    config = config_of(own_set, tmp_path / "work")
    report = run(config)
    manifest = load_manifest(own_set / "phantoms.json")
    write_plan(report.folder / "plan.yaml", report.plan.changed(batch_size=3))
    first, *rest = manifest.labels.items()
    save_manifest(manifest.changed(labels=dict([first, *reversed(rest)])), own_set / "phantoms.json")
    with pytest.raises(ConfigError, match=r"labels.*--replan"):
        run(config)
    # An unedited plan follows the manifest without a word.
    assert list(run(config, replan=True).plan.labels) == [first[0], *(name for name, _ in reversed(rest))]


def test_a_plan_that_was_not_edited_follows_the_data(own_set: Path, tmp_path: Path) -> None:
    config = config_of(own_set, tmp_path / "work")
    before = run(config).plan
    manifest = load_manifest(own_set / "phantoms.json")
    save_manifest(manifest.changed(cases=manifest.cases[:3]), own_set / "phantoms.json")
    assert run(config).plan.spacing_mm != before.spacing_mm


def test_held_out_cases_neither_plan_nor_enter_the_store(own_set: Path, tmp_path: Path) -> None:
    manifest = load_manifest(own_set / "phantoms.json")
    fewer = manifest.changed(cases=manifest.cases[:6])
    save_manifest(fewer, own_set / "phantoms.json")
    alone = run(config_of(own_set, tmp_path / "alone"))
    held_out = [case.changed(fold=None) for case in manifest.cases[6:]]
    for case in held_out:  # unlike all others, so that a look at them would show
        for file in case.images.values():
            image = read_image(manifest.path_of(file))
            image.array[...] *= 1e3
            write_image(manifest.path_of(file), image)
    unhashed = [c.changed(images={n: f.changed(sha256=None) for n, f in c.images.items()}) for c in held_out]
    save_manifest(fewer.changed(cases=(*fewer.cases, *unhashed)), own_set / "phantoms.json")
    both = run(config_of(own_set, tmp_path / "both"))
    assert both.plan == alone.plan
    for name in ("plan.yaml", "fingerprint.json"):
        assert (both.folder / name).read_bytes() == (alone.folder / name).read_bytes()
    assert cases_in(both.folder) == cases_in(alone.folder)


def test_errors_of_the_data_are_named_before_anything_is_written(own_set: Path, tmp_path: Path) -> None:
    manifest = load_manifest(own_set / "phantoms.json")
    for case in manifest.cases[1:3]:
        manifest.path_of(case.label).write_bytes(b"no volume")
    with pytest.raises(ManifestError) as caught:
        run(config_of(own_set, tmp_path / "work"))
    for case in manifest.cases[1:3]:
        assert case.id in str(caught.value)
    assert not (tmp_path / "work" / "stores").exists()


def test_a_failing_case_is_listed_and_the_rest_is_done(own_set: Path, tmp_path: Path) -> None:
    """Intensities beyond float16 are no error of the data, but cannot be stored as they are."""
    manifest = load_manifest(own_set / "phantoms.json")
    victim = manifest.cases[3]
    image = manifest.path_of(next(iter(victim.images.values())))
    bright = read_image(image)
    bright.array[...] *= 1e6
    write_image(image, bright)
    unhashed = [c.changed(images={n: f.changed(sha256=None) for n, f in c.images.items()}) for c in manifest.cases]
    save_manifest(manifest.changed(cases=tuple(unhashed)), own_set / "phantoms.json")
    config = config_of(own_set, tmp_path / "work", normalisation=dict.fromkeys(manifest.channels, "none"))
    with pytest.raises(PipelineError, match=f"(?s)1 of 8 cases failed.*{victim.id}.*zscore"):
        run(config)
    [cases] = (tmp_path / "work" / "stores").glob("*/cases")
    assert len(CaseStore(cases).case_ids()) == 7


def test_one_thread_and_several_make_the_same_store(phantom_set: Path, undisturbed: Path, tmp_path: Path) -> None:
    assert cases_in(run(config_of(phantom_set, tmp_path), jobs=1).folder) == cases_in(undisturbed)


def test_freshness_needs_neither_torch_nor_a_second_read(phantom_set: Path, tmp_path: Path) -> None:
    config = config_of(phantom_set, tmp_path / "work")
    run(config)
    program = (
        "import sys; from pathlib import Path; from pipeline.config_loading import load_config\n"
        "from pipeline.stages.preprocess import run\n"
        "report = run(load_config(Path(sys.argv[1]), []).changed(workspace=Path(sys.argv[2])))\n"
        "assert len(report.fresh) == 8; print(sorted({'torch', 'monai', 'mlflow', 'SimpleITK'} & set(sys.modules)))"
    )
    yaml = tmp_path / "experiment.yaml"
    write_text(yaml, dump_config(config))
    command = [sys.executable, "-c", program, str(yaml), str(tmp_path / "work")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_channels_on_their_own_grids_some_missing(shared_data: Path, tmp_path: Path) -> None:
    """STS: MR and PET each on its own grid, in one case only PET; the label is drawn on one of them."""
    cases = []
    for number, name in enumerate(["STS_002", "STS_009", "STS_030"]):
        folder = shared_data / "STS" / name
        images = {c: f"{name}/{c}_image.nii.gz" for c in ("MR_T1", "PET") if (folder / f"{c}_image.nii.gz").exists()}
        label = f"{name}/{next(iter(images))}_mask.nii.gz"
        files = {channel: ImageFile(path=path) for channel, path in images.items()}
        cases.append(Case(id=name, patient=name, images=files, label=ImageFile(path=label), fold=number % 2))
    manifest = Manifest(
        name="sts",
        root=shared_data / "STS",
        channels={"MR_T1": "MR", "PET": "PET"},
        labels={"background": 0, "tumour": 1},
        cases=tuple(cases),
    )
    save_manifest(manifest, tmp_path / "phantoms.json")
    report = run(config_of(tmp_path, tmp_path / "work"))
    store = CaseStore(report.folder / "cases")
    assert store.read("STS_009").channels_present == ("PET",)
    assert not store.read("STS_009").image[0].any()
    for case_id in store.case_ids():
        case = store.read(case_id)
        assert np.isfinite(case.image).all()
        drawn_ml = (case.label == 1).sum() * case.geometry.voxel_volume_ml
        assert drawn_ml == pytest.approx((case.reference == 1).sum() * case.native.voxel_volume_ml, rel=0.05)
        # FDG gathers in the tumour, wherever the grids lie.
        pet = case.image[1].astype(np.float32)
        assert pet[case.label == 1].mean() > pet[case.label == 0].mean() + 1
