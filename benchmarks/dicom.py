"""A DICOM series to a label map, seconds per stage, beside SimpleITK's own reading of the same files alone.

    python benchmarks/dicom.py ../shared/data/CT_CRLM            # 51 slices of 512x512
    python benchmarks/dicom.py FOLDER --copies 100               # and how long headers of 100 times as many files take

Stages are those of `medseg segment`, called one after the other: headers, voxels as float32 in RAS+ order, the plan's
grid, an untrained U-Net that labels by intensity (synthetic.py), the label map as .nii.gz, DICOM SEG and RTSTRUCT.
SimpleITK finds the series (GetGDCMSeriesFileNames) and reads it (ImageSeriesReader); ours and its take turns, and the
median counts. Beside the seconds that pass, what the process computed in them is shown: the rest is waiting, for the
disk or for others.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from synthetic import ct_plan, save_untrained

from pipeline.predictor import Engine, Predictor
from pipeline.volumes.dicom.annotations.rtstruct.writing import write_rtstruct
from pipeline.volumes.dicom.annotations.seg.writing import write_seg
from pipeline.volumes.dicom.annotations.structures import Author, structures_of
from pipeline.volumes.dicom.reading import read_series
from pipeline.volumes.dicom.series import Series, find_series
from pipeline.volumes.volume import Volume
from pipeline.volumes.writing import write_label

AUTHOR = Author(kind="AUTOMATIC", name="untrained", version="0")


class Seconds(NamedTuple):
    """What a stage takes."""

    passed: float
    computed: float

    def __str__(self) -> str:
        return f"{self.passed:7.3f} s ({self.computed:.3f} computed)"


class Stages:
    """The stages of one series, each after the one before; what a stage makes is kept for the next.

    Args:
        folder: that holds one usable series at least; the first is taken.
        model: folder of a model.
        out: folder of what is written.
    """

    def __init__(self, folder: Path, model: Path, out: Path) -> None:
        self.folder, self.out = folder, out
        self.predictor = Predictor.load(model, Engine(device="cpu"))
        self.structures = structures_of(self.predictor.plan.labels)
        self.series: Series = self.scan()
        self.itk_files = [str(file) for file in self.series.files]

    def scan(self) -> Series:
        """Read the headers and put the slices in order."""
        self.series = next(one for one in find_series(self.folder) if not one.refusal())
        return self.series

    def read(self) -> Volume:
        """Read the voxels."""
        self.image = read_series(self.series)
        return self.image

    def prepare(self) -> None:
        """Bring the volume to the plan's grid."""
        self.prepared = self.predictor.prepare({"CT": self.image}, self.image.geometry)

    def predict(self) -> None:
        """Run the network and label the native grid."""
        self.classes = self.predictor.segment(self.prepared, self.image.geometry).classes

    def write(self) -> None:
        """Write the label map."""
        self.label = Volume(self.predictor.values_of(self.classes), self.image.geometry)
        write_label(self.out / "label.nii.gz", self.label, names=self.predictor.plan.labels)

    def write_seg(self) -> None:
        """Write the label map as DICOM SEG."""
        write_seg(self.out / "label.seg.dcm", self.label, self.series, self.structures, AUTHOR)

    def write_rtstruct(self) -> None:
        """Write the label map as RTSTRUCT."""
        write_rtstruct(self.out / "label.rtstruct.dcm", self.label, self.series, self.structures, AUTHOR)

    def itk_scan(self) -> None:
        """Let SimpleITK find the series' files."""
        folder = str(self.series.folder)
        self.itk_files = list(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder, self.series.uid))

    def itk_read(self) -> None:
        """Let SimpleITK read them."""
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(self.itk_files)
        self.itk_image = reader.Execute()


def timed(stages: dict[str, Callable[[], object]], rounds: int) -> dict[str, Seconds]:
    """Return the median seconds of each stage, over rounds of all of them."""
    passed: dict[str, list[float]] = {name: [] for name in stages}
    computed: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(rounds):
        for name, stage in stages.items():
            start, cpu = time.perf_counter(), time.process_time()
            stage()
            passed[name].append(time.perf_counter() - start)
            computed[name].append(time.process_time() - cpu)
    return {name: Seconds(statistics.median(passed[name]), statistics.median(computed[name])) for name in stages}


def headers_of_copies(series: Series, copies: int, folder: Path) -> None:
    """Say how long the headers of many files take, which lie in folders of their own."""
    for number in range(copies):
        target = folder / "copies" / str(number)
        target.mkdir(parents=True)
        for file in series.files:
            shutil.copy(file, target)  # No link: the system's cache is to hold as many files.
    start = time.perf_counter()
    found = find_series(folder / "copies")
    seconds, files = time.perf_counter() - start, copies * len(series.files)
    print(f"headers of {files} files, copies of one series told by their bytes: {seconds:.2f} s; {len(found)} series")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--spacing", type=float, default=1.5, help="of the plan's grid, mm")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--copies", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        plan = ct_plan(13, (options.spacing,) * 3)
        save_untrained(work / "model", plan, {"width": options.width, "levels": options.levels})
        stages = Stages(options.folder, work / "model", work)
        print(f"{stages.series}, {stages.series.geometry}; median of {options.rounds}")
        # What is read is compared; the network's stages are timed once, as they are no matter of DICOM.
        reading = {"scan": stages.scan, "read": stages.read, "ITK scan": stages.itk_scan, "ITK read": stages.itk_read}
        seconds = timed(reading, options.rounds)
        seconds |= timed({"prepare": stages.prepare, "predict": stages.predict}, 1)
        writing = {"write": stages.write, "SEG": stages.write_seg, "RTSTRUCT": stages.write_rtstruct}
        seconds |= timed(writing, options.rounds)
        ours, theirs = (
            Seconds(*map(sum, zip(*(seconds[f"{who}{stage}"] for stage in ("scan", "read")), strict=True)))
            for who in ("", "ITK ")
        )
        same = np.array_equal(stages.image.array[0], sitk.GetArrayViewFromImage(stages.itk_image).transpose())
        for stage, taken in seconds.items():
            print(f"  {stage:8} {taken}")
        print(f"  ITK scan and read {theirs}; the same values: {same}")
        print(f"  scan and read     {ours}: {ours.passed / theirs.passed:.2f} of ITK's seconds")
        if options.copies:
            headers_of_copies(stages.series, options.copies, work)


if __name__ == "__main__":
    main()
