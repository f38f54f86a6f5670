"""Whatever a file holds, reading it gives a value or a PipelineError of whole lines, and writes nothing anywhere.

A few hundred examples in the fast suite, the same ones each time; 10,000 new ones with `pytest -m slow`.
"""

import copy
import csv
import gzip
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config_loading import load_config
from pipeline.data.manifest import load_manifest
from pipeline.data.plan import read_plan
from pipeline.errors import ManifestError, PipelineError, VolumeError
from pipeline.stages.segmenting.inputs import find_inputs
from pipeline.volumes.stored import files_of, read_header
from pipeline.volumes.volume import read_image, read_label

# An example that takes this long hangs: it takes milliseconds on the slowest machine.
HANGS_AFTER = timedelta(seconds=60)


def examples(fast: int, slow: int) -> Any:
    """Run a test with so many examples in the fast suite and in the slow one."""
    return pytest.mark.parametrize("count", [fast, pytest.param(slow, marks=pytest.mark.slow)])


def run(count: int, strategy: st.SearchStrategy[Any], holds: Callable[[Any], None]) -> None:
    """Try a property on so many examples; few are always the same ones."""
    decorate = settings(
        max_examples=count,
        derandomize=count < 1000,
        database=None,
        deadline=HANGS_AFTER,
        suppress_health_check=list(HealthCheck),
    )
    decorate(given(strategy)(holds))()


@pytest.fixture(scope="module", autouse=True)
def folder() -> Iterator[Path]:
    """An empty folder that is the current one: what is written to a relative path lands there too."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        yield Path(name).resolve()
        os.chdir(before)


def answer(ask: Callable[[], Any]) -> Any:
    """Return what is answered; a refusal says something in each of its lines."""
    try:
        return ask()
    except PipelineError as error:
        lines = str(error).split("\n")
        assert all(line.strip() for line in lines), str(error)
        return None


def one_line(ask: Callable[[], Any]) -> Any:
    """Return what is answered; a refusal is one line."""
    try:
        return ask()
    except PipelineError as error:
        assert str(error).strip()
        assert "\n" not in str(error)
        return None


@contextmanager
def nothing_else_written(folder: Path, path: Path, content: bytes) -> Iterator[None]:
    """Write a file, and assert that it is all that the folder holds in the end."""
    path.write_bytes(content)
    try:
        yield
        assert list(folder.rglob("*")) == [path]
        assert path.read_bytes() == content
    finally:
        path.unlink()


# Volumes


def nifti(kind: type = nib.Nifti1Image, dtype: str = "<i2", order: str = "<") -> bytes:
    """A small NIfTI file."""
    voxels = np.arange(60).reshape(3, 4, 5).astype(dtype)
    header = kind.header_class(endianness=order)
    header.set_data_dtype(dtype)
    image = kind(voxels, np.diag([1.0, -2.0, 3.0, 1.0]), header)
    return bytes(image.to_bytes())


def itk(suffix: str, compress: bool) -> bytes:
    """A small NRRD or MetaImage file."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"x{suffix}"
        sitk.WriteImage(sitk.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5)), str(path), compress)
        return path.read_bytes()


NIFTIS = [nifti(), nifti(nib.Nifti2Image), nifti(order=">", dtype=">f4"), nifti(dtype="<f8"), nifti(dtype="|u1")]
ITKS = {(suffix, compress): itk(suffix, compress) for suffix in (".nrrd", ".mha") for compress in (False, True)}
NUMBERS = [0, 1, 2, 3, 4, 7, 8, 16, 64, 128, 255, 256, 512, 768, 1280, 2304, 32767, -1, -32768, 65535, 2**31 - 1]
REALS = [0.0, -0.0, 1.0, -1.0, 352.0, 353.5, 1e-30, 1e30, float("nan"), float("inf"), -float("inf"), 2.0**31, 2.0**62]


@st.composite
def edited(draw: st.DrawFn, content: bytes, within: int | None = None) -> bytes:
    """Bytes with some overwritten, and perhaps cut short, lengthened, or a piece left out or doubled."""
    result = bytearray(content)
    end = min(within or len(content), len(content)) - 1
    for place, piece in draw(st.lists(st.tuples(st.integers(0, end), st.binary(min_size=1, max_size=8)), max_size=6)):
        result[place : place + len(piece)] = piece
    match draw(st.sampled_from(["keep", "keep", "keep", "cut", "add", "drop", "double"])):
        case "cut":
            del result[draw(st.integers(0, len(result))) :]
        case "add":
            result += draw(st.binary(max_size=64))
        case "drop":
            start = draw(st.integers(0, end))
            del result[start : start + draw(st.integers(1, 40))]
        case "double":
            start = draw(st.integers(0, end))
            result[start:start] = result[start : start + draw(st.integers(1, 40))]
    return bytes(result)


@st.composite
def nifti_fields(draw: st.DrawFn) -> bytes:
    """A NIfTI file of which some fields hold numbers that mean something, or nothing, elsewhere."""
    content = bytearray(draw(st.sampled_from(NIFTIS)))
    header = nib.Nifti2Header if content[0] == 540 % 256 and content[1] == 540 // 256 else nib.Nifti1Header
    order = ">" if content[0] == 0 else "<"
    fields = header(endianness=order).template_dtype.newbyteorder(order).fields
    names = [name for name in fields if name not in ("sizeof_hdr", "magic") and fields[name][0].base.kind in "iuf"]
    for name in draw(st.lists(st.sampled_from([*names, "dim", "pixdim", "datatype"]), min_size=1, max_size=4)):
        dtype, offset = fields[name][:2]
        item = draw(st.integers(0, max(1, dtype.itemsize // dtype.base.itemsize) - 1)) * dtype.base.itemsize
        number = draw(st.sampled_from(REALS if dtype.base.kind == "f" else NUMBERS))
        with np.errstate(all="ignore"):
            piece = np.array([number]).astype(dtype.base).tobytes()
        content[offset + item : offset + item + len(piece)] = piece
    return bytes(content)


@st.composite
def nifti_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """Name and content of something like a NIfTI file, packed or not, whatever its name says."""
    base = draw(st.sampled_from(NIFTIS))
    content = draw(st.one_of(nifti_fields(), edited(base, 352), edited(base), st.binary(max_size=700)))
    match draw(st.sampled_from(["plain", "packed", "packed and damaged", "twice", "packed nonsense"])):
        case "packed":
            content = gzip.compress(content, 1)
        case "packed and damaged":
            content = draw(edited(gzip.compress(content, 1)))
        case "twice":
            content = gzip.compress(content, 1) + gzip.compress(content[: draw(st.integers(0, 99))], 1)
        case "packed nonsense":
            content = b"\x1f\x8b\x08" + draw(st.binary(max_size=200))
    return draw(st.sampled_from(["x.nii", "x.nii.gz", "x.hdr", "x.img.gz"])), content


def read_every_way(path: Path) -> None:
    """Ask a volume's file for all that the pipeline asks of one; where it can be read, it is whole."""
    one_line(lambda: files_of(path))
    header = one_line(lambda: read_header(path))
    geometry = one_line(lambda: header.geometry) if header else None
    for index in (None, 0, 3):
        image = one_line(lambda index=index: read_image(path, index))
        assert image is None or (image.geometry == geometry and image.array.dtype == np.float32)
        label = one_line(lambda index=index: read_label(path, index))
        assert label is None or (label.geometry == geometry and label.array.dtype.kind in "iu")


@examples(150, 4000)
def test_anything_like_nifti(folder: Path, count: int) -> None:
    def holds(file: tuple[str, bytes]) -> None:
        path = folder / file[0]
        with nothing_else_written(folder, path, file[1]):
            read_every_way(path)

    run(count, nifti_files(), holds)


@st.composite
def itk_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """Name and content of something like a NRRD or MetaImage file."""
    suffix, compress = draw(st.sampled_from(list(ITKS)))
    lines = ITKS[suffix, compress].split(b"\n")
    header = next(n for n, line in enumerate(lines) if not line or line.startswith(b"ElementDataFile"))
    for place in draw(st.lists(st.integers(0, header), max_size=2)):
        name, mark, _ = lines[place].partition(b"=" if suffix == ".mha" else b":")
        values = [
            "0",
            "-1",
            "11",
            "2147483648",
            "9" * 5000,
            "3",
            "3 4",
            "3 4 5 6",
            "99999 99999 99999",
            "nan nan nan",
            "gzip",
            "LOCAL",
            "/etc/passwd",
        ]
        values += [
            "LIST",
            "../x",
            "x%03d.raw 1 3 1",
            "(1,0,0) (0,1,0) (1,0,0)",
            "MET_FLOAT",
            "float",
            "true",
            "",
            "x y",
        ]
        lines[place] = name + mark + b" " + draw(st.sampled_from(values)).encode()
    return f"x{suffix}", draw(edited(b"\n".join(lines)))


@examples(60, 2000)
def test_anything_like_nrrd_and_metaimage(folder: Path, count: int) -> None:
    def holds(file: tuple[str, bytes]) -> None:
        path = folder / file[0]
        with nothing_else_written(folder, path, file[1]):
            read_every_way(path)

    run(count, itk_files(), holds)


def with_shape(content: bytes, *shape: int) -> bytes:
    """A NIfTI-1 file whose header gives another shape."""
    dim = np.array([len(shape), *shape], "<i2").tobytes()
    return content[:40] + dim + content[40 + len(dim) :]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_promise_of_more_voxels_than_any_memory_holds_is_refused_at_once(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    content = with_shape(NIFTIS[0], 32767, 32767, 32767)
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    for read in (read_image, read_label):
        with pytest.raises(VolumeError, match=r"cut short: .* its header promises 70362301923326"):
            read(path)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("suffix", "said", "instead"),
    [
        (".mha", b"DimSize = 5 4 3", b"DimSize = 99999 99999 99999"),
        (".nrrd", b"sizes: 5 4 3", b"sizes: 99999 99999 99999"),
        (".mha", b"NDims = 3", b"NDims = -1"),
        (".mha", b"NDims = 3", b"NDims = 11"),
        (".nrrd", b"dimension: 3", b"dimension: 2"),
    ],
)
def test_counts_that_itk_would_take_on_trust(
    tmp_path: Path, suffix: str, said: bytes, instead: bytes, compress: bool
) -> None:
    content = ITKS[suffix, compress]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    assert read_image(path).array.shape == (1, 5, 4, 3)
    assert said in content
    path.write_bytes(content.replace(said, instead))
    with pytest.raises(VolumeError, match=r"its header (promises|gives)"):
        read_image(path)


def test_what_unpacks_to_more_than_its_header_promises_is_not_unpacked_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x.nii.gz"
    path.write_bytes(gzip.compress(NIFTIS[0]))
    assert read_image(path).array.shape == (1, 3, 4, 5)
    zeros = gzip.compress(bytes(2**20))
    # Who reads as far as the end meets damage first.
    path.write_bytes(gzip.compress(NIFTIS[0]) + zeros * 40 + zeros[:-8] + b"damaged!")
    with pytest.raises(VolumeError, match="holds more than the 472 bytes that its header promises"):
        read_image(path)


# Manifests, configurations and plans

HOSTILE = ["../../x", "/etc/passwd", "a\0b", "~nobody_of_that_name/x", "", ".", "..", "x/../../y", "\ud800", "x" * 300]
MANIFEST: dict[str, Any] = {
    "format_version": 1,
    "name": "hearts",
    "root": ".",
    "channels": {"T1": "MR", "T2": "MR"},
    "labels": {"background": 0, "left": 1, "right": 2},
    "label_pairs": [["left", "right"]],
    "cases": [
        {
            "id": "a",
            "patient": "p",
            "images": {"T1": {"path": "a.nii"}, "T2": {"path": "b.nii", "index": 1}},
            "fold": 0,
        },
        {"id": "b", "patient": "q", "images": {"T1": {"path": "c/d.nii"}}, "label": {"path": "e.nii"}, "fold": None},
    ],
}
JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.sampled_from([*HOSTILE, 1e400])
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to each value within a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*way, key)
        yield from places(child, (*way, key))


@st.composite
def restructured(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value of which some parts are others, gone, or named otherwise."""
    result = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(list(places(result))))
        parent = result
        for key in way:
            parent = parent[key]
        match draw(st.sampled_from(["other", "hostile", "gone", "renamed"])):
            case "other":
                parent[last] = draw(JSON)
            case "hostile":
                parent[last] = draw(st.sampled_from(HOSTILE))
            case "gone":
                del parent[last]
            case "renamed":
                moved = parent.pop(last)
                if isinstance(parent, dict):
                    parent[draw(st.sampled_from(HOSTILE) | st.text(max_size=5))] = moved
        if not list(places(result)):
            break
    return result


@examples(80, 2000)
def test_anything_like_a_manifest(folder: Path, count: int) -> None:
    written = json.dumps(MANIFEST, indent=1).encode()

    def holds(content: bytes) -> None:
        path = folder / "m.json"
        with nothing_else_written(folder, path, content):
            manifest = answer(lambda: load_manifest(path))
            for case in manifest.cases if manifest else ():
                assert Path(case.id).name == case.id
                for file in case.images.values():
                    place = one_line(lambda file=file: manifest.path_of(file))
                    assert place is None or place.resolve().is_relative_to(manifest.root)
            for case in answer(lambda: find_inputs([path], ["T1"], folder / "out")) or ():
                assert (folder / "out" / f"{case.name}.nii.gz").resolve().parent == folder / "out"

    other = restructured(MANIFEST).map(lambda value: json.dumps(value).encode())
    run(count, st.one_of(other, other, edited(written)), holds)


@pytest.mark.parametrize("name", [*HOSTILE[:8], "a/b", ".hidden", "a\nb", "-"])
def test_a_case_cannot_be_named_out_of_the_folder(tmp_path: Path, name: str) -> None:
    manifest = copy.deepcopy(MANIFEST)
    manifest["cases"][0]["id"] = name
    path = tmp_path / "m.json"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=r"cases\.0\.id"):
        load_manifest(path)
    table = tmp_path / "t.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["case", "T1"], [name, "a.nii"]])
    cases = answer(lambda: find_inputs([table], ["T1"], tmp_path / "out")) or []
    assert all(Path(case.name).name == case.name for case in cases)
    assert bool(cases) == (name == "-")


@pytest.mark.parametrize("path", [*HOSTILE[:3], "..", "", "x/../../y", "\\\\host\\x"])
def test_a_files_path_cannot_leave_the_root(tmp_path: Path, path: str) -> None:
    manifest = copy.deepcopy(MANIFEST)
    manifest["cases"][0]["images"]["T1"]["path"] = path
    (tmp_path / "m.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=r"cases.0.images.T1.path: .*may not leave it"):
        load_manifest(tmp_path / "m.json")


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside.nii", "round.nii"])
def test_a_link_out_of_the_root_or_in_a_circle_is_no_file(tmp_path: Path, target: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside.nii").write_bytes(NIFTIS[0])
    (root / "a.nii").symlink_to(target)
    (root / "round.nii").symlink_to("a.nii")
    (root / "m.json").write_text(json.dumps(MANIFEST))
    file = load_manifest(root / "m.json").cases[0].images["T1"]
    with pytest.raises(PipelineError, match=r"leads out of the manifest's root|cannot be read"):
        read_image(load_manifest(root / "m.json").path_of(file))


@pytest.mark.parametrize("deep", ["[" * 1500, '{"a":' * 1500], ids=["lists", "mappings"])
def test_brackets_within_brackets(tmp_path: Path, deep: str) -> None:
    (tmp_path / "x.json").write_text(deep)
    (tmp_path / "x.yaml").write_text(deep)
    with pytest.raises(PipelineError, match="is not JSON"):
        load_manifest(tmp_path / "x.json")
    with pytest.raises(PipelineError, match="broken YAML"):
        load_config(tmp_path / "x.yaml")
    with pytest.raises(PipelineError, match="is not YAML"):
        read_plan(tmp_path / "x.yaml")


CONFIG = """\
experiment: hearts
data: {manifest: m.json, root: null}
network:
  name: unet
  options: {width: 16}
training:
  budget: {epochs: 3}
  learning_rate: 1e-3
  init_from: null
inference: {overlap: 0.5}
"""
PIECES = [
    "&a ",
    "*a",
    "!!python/object:os.system ",
    "- ",
    ": ",
    "{",
    "}",
    "[",
    "]",
    '"\\ud800"',
    '"\\0"',
    "~x/y",
    "1e999",
]
PIECES += [
    "extends: c.yaml\n",
    "extends: [~nobody_of_that_name/x]\n",
    'extends: "\\0"\n',
    ".nan",
    "-.inf",
    "? ",
    "|\n",
    "%",
]
PIECES += [
    "9" * 5000,
    "\t",
    "\x07",
    "\ufeff",
    "<<: ",
    "../../x",
    "---\n",
    "...",
    "0x1F",
    "1:30",
    "2020-01-01",
    "no",
    "'",
]


@st.composite
def rewritten(draw: st.DrawFn, text: str) -> bytes:
    """A text with pieces put in, lines left out and bytes changed."""
    lines = text.splitlines(keepends=True)
    for place in draw(st.lists(st.integers(0, len(lines) - 1), max_size=2)):
        lines[place] = draw(st.sampled_from(["", lines[place] * 2, "  " + lines[place], lines[place].lstrip()]))
    result = "".join(lines)
    for place, piece in draw(st.lists(st.tuples(st.integers(0, len(result)), st.sampled_from(PIECES)), max_size=3)):
        result = result[:place] + piece + result[place:]
    content = result.encode()
    return draw(edited(content)) if content and draw(st.booleans()) else content


@examples(80, 1500)
def test_anything_like_a_configuration(folder: Path, count: int) -> None:
    def holds(content: bytes) -> None:
        path = folder / "c.yaml"
        with nothing_else_written(folder, path, content):
            answer(lambda: load_config(path))

    run(count, rewritten(CONFIG), holds)


PLAN = """\
format_version: 1
channels: {T1: MR}
labels: {background: 0, left: 1}
orientation: RAS
spacing_mm: [1.0, 1.0, 3.0]
thick_axis: 2
crop: nonzero
patch_size: [32, 32, 16]
batch_size: 2
normalisation: {T1: {scheme: zscore}}
reasons: {}
"""


@examples(40, 500)
def test_anything_like_a_plan(folder: Path, count: int) -> None:
    def holds(content: bytes) -> None:
        path = folder / "plan.yaml"
        with nothing_else_written(folder, path, content):
            answer(lambda: read_plan(path))

    run(count, rewritten(PLAN), holds)
