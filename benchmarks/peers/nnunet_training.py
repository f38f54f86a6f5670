"""nnU-Net's own training on a fold, its schedule ending with a budget; benchmarks/peer_training.py calls it.

    .peers/nnunet/bin/python benchmarks/peers/nnunet_training.py FOLDER MINUTES SNAPSHOTS OUT

FOLDER/cases.json names the fold's cases. nnU-Net plans and preprocesses them as always, into FOLDER/nnunet, once. Its
trainer is told how many epochs of how many iterations fill the minutes, measured on this machine, so that its poly
schedule ends with them; nothing else is changed, but that its online validation is left out. Prediction is its own,
with mirroring.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(sys.argv[1]).resolve()
HOME, NUMBER, NAME, CONFIGURATION = FOLDER / "nnunet", 4, "Dataset004_Benchmark", "3d_fullres"
for what in ("raw", "preprocessed", "results"):
    (HOME / what).mkdir(parents=True, exist_ok=True)
    os.environ[f"nnUNet_{what}"] = str(HOME / what)

import torch  # noqa: E402

# PyPI's torchvision does not match the CPU torch, and imports only where the operators it looks for are declared.
TORCHVISION = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    TORCHVISION.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from nnunetv2.experiment_planning.plan_and_preprocess_api import (  # noqa: E402
    extract_fingerprints,
    plan_experiments,
    preprocess,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor  # noqa: E402
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # noqa: E402
from snapshots import Snapshots, steps_within  # noqa: E402

# Its learning rate changes once an epoch: a hundred of them are a schedule as smooth as it needs to be.
EPOCHS = 100


class BudgetTrainer(nnUNetTrainer):
    """nnU-Net's trainer, for as many steps as fill a budget."""

    def train(self, minutes: float, count: int, folder: Path) -> Snapshots:
        """Train, and keep weights on the way."""
        self.on_train_start()
        steps = steps_within(minutes, self.network, self.optimizer, self._step)
        self.num_iterations_per_epoch = max(1, round(steps / EPOCHS))
        self.num_epochs = max(1, round(steps / self.num_iterations_per_epoch))
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        snapshots = Snapshots(folder, self.num_epochs * self.num_iterations_per_epoch, count)
        for _ in range(self.num_epochs):
            self.on_train_epoch_start()
            outputs = []
            for _ in range(self.num_iterations_per_epoch):
                outputs.append(self._step())
                snapshots.stepped(self.network)
            self.on_train_epoch_end(outputs)
            self.current_epoch += 1
        self.on_train_end()
        return snapshots

    def _step(self) -> dict[str, Any]:
        """Do one of its own steps on a batch of its own augmentation."""
        return self.train_step(next(self.dataloader_train))


def prepare(cases: dict[str, Any]) -> None:
    """Lay the cases out as nnU-Net wants them, plan and preprocess; only once."""
    splits = HOME / "preprocessed" / NAME / "splits_final.json"
    if splits.exists():
        return
    raw = HOME / "raw" / NAME
    every = [*cases["training"], *cases["validation"]]
    for folder in (raw / "imagesTr", raw / "labelsTr"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for case in every:
        (raw / "labelsTr" / f"{case['id']}.nii.gz").symlink_to(case["label"])
        for number, image in enumerate(case["images"]):
            (raw / "imagesTr" / f"{case['id']}_{number:04d}.nii.gz").symlink_to(image)
    channels = {str(number): modality for number, modality in enumerate(cases["channels"])}
    dataset = {"channel_names": channels, "labels": cases["labels"], "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps({**dataset, "numTraining": len(every)}))
    extract_fingerprints([NUMBER], num_processes=2, check_dataset_integrity=False)
    plan_experiments([NUMBER])
    preprocess([NUMBER], configurations=[CONFIGURATION], num_processes=[2])
    split = {"train": [case["id"] for case in cases["training"]], "val": [case["id"] for case in cases["validation"]]}
    splits.write_text(json.dumps([split]))


def new_trainer() -> BudgetTrainer:
    """Build the trainer of the only split there is."""
    preprocessed = HOME / "preprocessed" / NAME
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    dataset = json.loads((preprocessed / "dataset.json").read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return BudgetTrainer({**plans, "continue_training": False}, CONFIGURATION, 0, dataset, device)


def main() -> None:
    minutes, count, folder = float(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    cases = json.loads((FOLDER / "cases.json").read_text())
    prepare(cases)
    trainer = new_trainer()
    snapshots = trainer.train(minutes, count, folder)
    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(device=trainer.device, perform_everything_on_device=False, allow_tqdm=False)

    def predict(weights: Path, out: Path) -> None:
        state = torch.load(weights, weights_only=True)
        mirrored = trainer.inference_allowed_mirroring_axes
        plans, configuration = trainer.plans_manager, trainer.configuration_manager
        predictor.manual_initialization(
            trainer.network, plans, configuration, [state], trainer.dataset_json, "nnUNetTrainer", mirrored
        )
        images = [case["images"] for case in cases["validation"]]
        names = [str(out / case["id"]) for case in cases["validation"]]
        predictor.predict_from_files_sequential(images, names)

    snapshots.write(predict)


if __name__ == "__main__":
    main()
