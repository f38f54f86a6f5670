"""The store of preprocessed cases: one folder a case, compressed arrays, checksummed, swapped in by a rename.

    cases/CASE/image.b2nd           (C, X, Y, Z) float16, normalised, on the plan's grid
               label.b2nd           (X, Y, Z) class indices on the plan's grid
               reference.b2nd       (X, Y, Z) class indices of the original label on the native grid
               class_voxels.b2nd    (n, 4) class and voxel on the plan's grid: where foreground patches are drawn from
               body.b2nd            blocks of the plan's grid that may hold body; missing where that is not known
               case.json            key, geometries, class counts, and the checksum of each file

An unlabelled case has only image.b2nd, body.b2nd and case.json. Names that begin with a dot are unfinished or replaced
folders of killed writers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from pipeline.errors import StoreError
from pipeline.geometry import Geometry, Grid
from pipeline.records import Record, atomic_folder, digest_of, exclusively
from pipeline.volumes.body import Body

STORE_FORMAT_VERSION = 2

# A patch reads the blocks it touches: 32^3 loses little at its rim. A case this small is read whole, as one block.
CHUNK, BLOCK, WHOLE_VOXELS = 128, 32, 64**3

Index = tuple[int, int, int]
Labels = NDArray[np.uint8] | NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """A case as training reads it.

    Attributes:
        image: (C, X, Y, Z) float16. Normalised intensities are a few units wide, where float16 resolves 1/1000 of a
            standard deviation, far below any scanner's noise, in half the memory and disk.
        label: (X, Y, Z) class indices on the plan's grid; None for an unlabelled case.
        reference: class indices of the original label on the native grid; None for an unlabelled case.
        geometry: the plan's grid.
        native: the native grid.
        class_voxels: class index -> (n, 3) int32 voxels of `label`; classes that do not occur are left out.
        channels_present: channels that the case has; the others are zeros in `image`.
        body: where the body may be on the plan's grid; None where that is not known.
    """

    image: NDArray[np.float16]
    label: Labels | None
    reference: Labels | None
    geometry: Geometry
    native: Geometry
    class_voxels: dict[int, NDArray[np.int32]]
    channels_present: tuple[str, ...]
    body: Body | None = None


class CaseRecord(Record):
    """What case.json holds.

    Attributes:
        format_version: of the store.
        key: digest of all that the case was made from.
        channels_present: channels that the case has.
        geometry, native: the plan's grid and the native grid.
        class_counts: voxels of each class of `label`, by class index, up to the largest that occurs; empty where there
            is no label.
        files: file name -> SHA-256 of its bytes.
    """

    format_version: int = STORE_FORMAT_VERSION
    key: str
    channels_present: tuple[str, ...]
    geometry: Grid
    native: Grid
    class_counts: tuple[int, ...]
    files: dict[str, str]


class StoredCase:
    """A case opened for partial reads: nothing but what a patch needs is decompressed.

    Checksums are not verified here, for that reads every byte: `CaseStore.verify` does it.
    """

    def __init__(self, folder: Path, record: CaseRecord) -> None:
        self.record = record
        self.geometry = record.geometry.geometry
        self.native = record.native.geometry
        self._folder = folder

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (C, X, Y, Z) of the image."""
        channels, x, y, z = self._image.shape
        return int(channels), int(x), int(y), int(z)

    @cached_property
    def class_voxels(self) -> dict[int, NDArray[np.int32]]:
        """Class index -> (n, 3) voxels, as in PreparedCase."""
        if "class_voxels.b2nd" not in self.record.files:
            return {}
        return _split_by_class(self._open("class_voxels")[...])

    def read_image(self, start: Index, stop: Index) -> NDArray[np.float16]:
        """Return (C, *(stop - start)) of the image; the box must lie inside the grid."""
        array: NDArray[np.float16] = self._image[(slice(None), *self._box(start, stop))]
        return array

    def read_label(self, start: Index, stop: Index) -> Labels:
        """Return (stop - start) of the label; the box must lie inside the grid.

        Raises:
            ValueError: the case has no label.
        """
        if "label.b2nd" not in self.record.files:
            raise ValueError(f"{self._folder.name}: the case has no label")
        array: Labels = self._label[self._box(start, stop)]
        return array

    def hold(self) -> None:
        """Map the files now: they are read from then on, though others take their place."""
        _ = self._image, self.class_voxels  # each is kept once it has been asked for
        if "label.b2nd" in self.record.files:
            _ = self._label

    def _box(self, start: Index, stop: Index) -> tuple[slice, ...]:
        """Return the box as slices; a negative start would silently mean the far end."""
        if any(a < 0 or a >= b or b > n for a, b, n in zip(start, stop, self.geometry.shape, strict=True)):
            raise ValueError(f"the box {start} to {stop} leaves the grid, {self.geometry.shape}")
        return tuple(slice(a, b) for a, b in zip(start, stop, strict=True))

    @cached_property
    def _image(self) -> Any:
        """The image's file, mapped."""
        return self._open("image")

    @cached_property
    def _label(self) -> Any:
        """The label's file, mapped."""
        return self._open("label")

    def _open(self, name: str) -> Any:
        """Map a file into memory."""
        path = self._folder / f"{name}.b2nd"
        try:
            return blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
        except (OSError, RuntimeError, ValueError) as error:
            raise _damaged(path, str(error)) from error


class CaseStore:
    """A folder of preprocessed cases.

    Args:
        folder: where they lie.
        keys: case id -> the key that a case must have been written with, of those that are to stay as they are; None:
            any will do.
    """

    def __init__(self, folder: Path, keys: Mapping[str, str | None] | None = None) -> None:
        self.folder = folder
        self.keys = keys

    def case_ids(self) -> tuple[str, ...]:
        """Return the ids of the stored cases, ascending."""
        if not self.folder.is_dir():
            return ()
        return tuple(sorted(p.name for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith(".")))

    def __contains__(self, case_id: str) -> bool:
        return (self.folder / case_id).is_dir()

    def leftovers(self) -> tuple[Path, ...]:
        """Return what killed writers left behind, or live ones are writing: `lock` tells."""
        if not self.folder.is_dir():
            return ()
        return tuple(sorted(p for p in self.folder.iterdir() if p.is_dir() and p.name.startswith(".")))

    @contextmanager
    def lock(self, *, shared: bool = False) -> Iterator[None]:
        """Hold the store against other writers; the lock dies with the process.

        Args:
            shared: others that share it may write other cases meanwhile.

        Raises:
            StoreError: another process holds it.
        """
        busy = StoreError(f"{self.folder}: another medseg is writing here; wait until it is done")
        with exclusively(self.folder / ".lock", busy, shared=shared):
            yield

    def write(self, case_id: str, prepared: PreparedCase, key: str) -> None:
        """Write a case, or replace it in one step when it is complete.

        Args:
            case_id: names the folder.
            prepared: the case.
            key: digest of all that it was made from; `key_of` returns it.
        """
        with atomic_folder(self.folder / case_id) as temporary:
            files = {name: _write_array(temporary / name, array) for name, array in _arrays(prepared).items()}
            record = CaseRecord(
                key=key,
                channels_present=prepared.channels_present,
                geometry=Grid.of(prepared.geometry),
                native=Grid.of(prepared.native),
                class_counts=() if prepared.label is None else tuple(np.bincount(prepared.label.ravel()).tolist()),
                files=files,
            )
            content = record.model_dump(mode="json")
            # The record's own checksum: a flipped bit in an affine would still be valid JSON.
            content["sha256"] = digest_of(content)
            (temporary / "case.json").write_text(json.dumps(content, indent=1), encoding="utf-8")

    def key_of(self, case_id: str) -> str | None:
        """Return the key that the case was written with; None where case.json is missing, damaged or of another age."""
        try:
            return self._record(case_id).key
        except StoreError:
            return None

    def verify(self, case_id: str) -> CaseRecord:
        """Read every byte of a case and compare the checksums; return its record.

        Raises:
            StoreError: a file is missing or damaged; names it.
        """
        record = self._record(case_id)
        for name in record.files:
            self._read_bytes(case_id, name, record)
        return record

    def read(self, case_id: str) -> PreparedCase:
        """Read a whole case, checksums verified.

        Raises:
            StoreError: the case is not in the store, or a file is missing or damaged; names it.
        """
        record = self._record(case_id)
        arrays = {
            name: blosc2.ndarray_from_cframe(self._read_bytes(case_id, name, record))[...] for name in record.files
        }
        return PreparedCase(
            image=arrays["image.b2nd"],
            label=arrays.get("label.b2nd"),
            reference=arrays.get("reference.b2nd"),
            geometry=record.geometry.geometry,
            native=record.native.geometry,
            class_voxels=_split_by_class(arrays["class_voxels.b2nd"]) if "class_voxels.b2nd" in arrays else {},
            channels_present=record.channels_present,
            body=Body(arrays["body.b2nd"]) if "body.b2nd" in arrays else None,
        )

    def open(self, case_id: str) -> StoredCase:
        """Open a case for partial reads.

        Raises:
            StoreError: the case is not in the store, or its case.json is damaged.
        """
        return StoredCase(self.folder / case_id, self._record(case_id))

    def _record(self, case_id: str) -> CaseRecord:
        """Read and verify a case.json."""
        path = self.folder / case_id / "case.json"
        try:
            content = json.loads(path.read_bytes())
            written = content.pop("sha256")
            intact = written == digest_of(content)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise _damaged(path, str(error)) from error
        if not intact:
            raise _damaged(path, "its checksum differs")
        if content["format_version"] != STORE_FORMAT_VERSION:
            raise _damaged(path, f"format version {content['format_version']}, not {STORE_FORMAT_VERSION}")
        try:
            record = CaseRecord.model_validate(content)
        except ValidationError as error:
            raise _damaged(path, str(error)) from None
        if self.keys and record.key != self.keys.get(case_id, record.key):
            raise StoreError(
                f"{path.parent}: was prepared anew while it was in use, by another plan or from other files; go on "
                "when the data are again as they were, or begin anew"
            )
        return record

    def _read_bytes(self, case_id: str, name: str, record: CaseRecord) -> bytes:
        """Read a file and verify its checksum."""
        path = self.folder / case_id / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise _damaged(path, error.strerror or str(error)) from error
        if hashlib.sha256(content).hexdigest() != record.files[name]:
            raise _damaged(path, "its checksum differs")
        return content


def _split_by_class(rows: NDArray[np.int32]) -> dict[int, NDArray[np.int32]]:
    """Turn (n, 4) rows of class and voxel into class -> (n, 3) voxels."""
    return {int(index): rows[rows[:, 0] == index, 1:] for index in np.unique(rows[:, 0])}


def _arrays(prepared: PreparedCase) -> dict[str, NDArray[Any]]:
    """Return what is written of a case: file name -> array."""
    rows = [np.insert(voxels, 0, index, axis=1) for index, voxels in prepared.class_voxels.items()]
    arrays = {
        "image.b2nd": prepared.image,
        "label.b2nd": prepared.label,
        "reference.b2nd": prepared.reference,
        "class_voxels.b2nd": np.concatenate(rows) if rows else None,
        "body.b2nd": None if prepared.body is None else prepared.body.occupied,
    }
    return {name: array for name, array in arrays.items() if array is not None}


def _write_array(path: Path, array: NDArray[Any]) -> str:
    """Compress an array into a file and return the checksum of its bytes."""
    chunks, blocks = _partition(array.shape)
    compressed = blosc2.asarray(
        np.ascontiguousarray(array),
        chunks=chunks,
        blocks=blocks,
        # One thread: workers, not blosc2, share the cores out.
        cparams={"codec": blosc2.Codec.ZSTD, "clevel": 5, "nthreads": 1},
    )
    content: bytes = compressed.to_cframe()
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _partition(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of chunks and blocks: even parts, so that little is padded; one channel a chunk."""
    if math.prod(shape) <= WHOLE_VOXELS or len(shape) < 3:
        return shape, shape
    space = shape[-3:]
    chunks = tuple(_even_part(n, CHUNK) for n in space)
    blocks = tuple(_even_part(n, BLOCK) for n in chunks)
    channel = (1,) * (len(shape) - 3)
    return channel + chunks, channel + blocks


def _even_part(length: int, largest: int) -> int:
    """Return the length of each part when an axis is cut into as few even parts as `largest` allows."""
    return math.ceil(length / math.ceil(length / largest))


def _damaged(path: Path, why: str) -> StoreError:
    """Return the error for a file that cannot be used."""
    return StoreError(f"{path}: cannot be used ({why}); `medseg preprocess` makes the case anew")
