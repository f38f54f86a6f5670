"""Memory plans: parts worked out by hand, what gives way to a limit, and the plan beside a real stream's peak."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import ResourceError
from pipeline.inference.memory import RUNTIME_BYTES, SLACK, MemoryPlan, plan_memory
from pipeline.inference.windows.tiling import Windowing
from pipeline.networks import Network
from pipeline.networks.footprint import footprint

MB = 2**20


class OneConvolution(Network):
    """Its activations are easily counted: the image, and the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, 5, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(image)


def plan(
    limit_bytes: int = 2**50,
    batch: int = 4,
    dtype: torch.dtype = torch.float32,
    networks: int = 1,
    postprocessing_bytes: int = 0,
) -> MemoryPlan:
    return plan_memory(
        [OneConvolution().eval() for _ in range(networks)],
        Windowing((16, 16, 16)),
        image_shape=(1, 100, 20, 30),
        native_shape=(50, 60, 70),
        input_bytes=1000,
        postprocessing_bytes=postprocessing_bytes,
        batch=batch,
        dtype=dtype,
        limit_bytes=limit_bytes,
        process_bytes=5 * MB,
    )


def test_footprint_by_hand_leaves_the_network_alone() -> None:
    network = OneConvolution().eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = footprint(network, 1, (16, 16, 16))
    # Image and logits, and both once more in the layout of the convolution's kernel.
    assert (found.num_logits, found.activation_bytes) == (5, 2 * (1 + 5) * 16**3 * 4)
    assert found.weight_bytes == 4 * (5 * 27 + 5)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert footprint(network, 1, (16, 16, 16)) is found


def test_parts_by_hand() -> None:
    found = plan()
    assert (found.process, found.input, found.output) == (5 * MB + RUNTIME_BYTES, 1000, 50 * 60 * 70)
    assert found.image == 4 * 100 * 20 * 30
    assert found.ring == 4 * (5 + 1) * 16 * 20 * 30
    assert found.planes == 3 * 16 * 4 * 5 * 20 * 30
    assert found.activations == 4 * int(SLACK * 2 * 6 * 16**3 * 4)
    assert (found.windows, found.slabs, found.batch) == (12 * 2 * 3, 12, 4)
    assert found.peak_vram_bytes == 0
    parts = (found.process, found.input, found.image, found.output, found.ring, found.planes, found.activations)
    assert found.peak_ram_bytes == sum(parts)
    assert "72 windows in 12 slabs" in found.as_text()


def test_bf16_halves_the_activations_and_copies_the_weights() -> None:
    found = plan(dtype=torch.bfloat16)
    assert found.activations == 4 * int(SLACK * 2 * 6 * 16**3 * 2)
    assert found.weight_copies == 2 * (5 * 27 + 5)


def test_a_limit_first_shrinks_the_batch_then_puts_the_ring_on_disk() -> None:
    free = plan()
    halved = plan(free.peak_ram_bytes - 1)
    assert (halved.batch, halved.ring_on_disk) == (2, False)
    single = plan(halved.peak_ram_bytes - 1)
    assert (single.batch, single.ring_on_disk) == (1, False)
    on_disk = plan(single.peak_ram_bytes - 1)
    assert (on_disk.batch, on_disk.ring_on_disk) == (1, True)
    # In memory: one window's logits, and the weight that windows left out would have had.
    assert on_disk.peak_ram_bytes == single.peak_ram_bytes - single.ring + 4 * 5 * 16**3 + 4 * 16 * 20 * 30
    assert (on_disk.windows, on_disk.slabs) == (free.windows, free.slabs)
    with pytest.raises(ResourceError, match="50x60x70 voxels does not fit"):
        plan(on_disk.peak_ram_bytes - 1)


def test_an_ensembles_agreement_is_counted() -> None:
    found = plan(networks=3)
    # Windows lie 8, 4 and 7 apart: 12, 10 and 12 voxels are nearest to the same one at most.
    assert found.agreement == 3 * (12 * 20 * 30) + 12 * 10 * 12 * (5 * 13 + 30)
    assert found.peak_ram_bytes == plan().peak_ram_bytes + found.agreement
    assert "the networks' agreement" in found.as_text()


def test_postprocessing_takes_the_place_of_the_windows() -> None:
    free = plan()
    windows = free.ring + free.planes + free.activations
    assert plan(postprocessing_bytes=windows).peak_ram_bytes == free.peak_ram_bytes
    assert plan(postprocessing_bytes=windows + 1).peak_ram_bytes == free.peak_ram_bytes + 1
    with pytest.raises(ResourceError, match="postprocessing, after the windows"):
        plan(free.peak_ram_bytes, postprocessing_bytes=windows + 1)


def test_without_a_limit_it_is_what_the_machine_has() -> None:
    with pytest.raises(ResourceError, match="does not fit"):
        plan_memory(
            [OneConvolution().eval()],
            Windowing((16, 16, 16)),
            image_shape=(1, 10_000, 10_000, 10_000),
            native_shape=(10, 10, 10),
            input_bytes=0,
            postprocessing_bytes=0,
            batch=1,
            dtype=torch.float32,
        )


STREAM = """
import torch
from pipeline.hardware import keep_freed_memory, peak_memory_bytes, reset_peak_memory
from pipeline.inference.memory import plan_memory
from pipeline.inference.windows.tiling import Windowing
from pipeline.inference.windows.streaming import stream_logits
from pipeline.networks import NetworkTask, build_network

keep_freed_memory()
shape, windowing = (160, 140, 120), Windowing((64, 64, 64), overlap=0.25)
task = NetworkTask(in_channels=1, num_classes=25, patch_size=windowing.window, spacing_mm=(1.0, 1.0, 1.0))
network = build_network("unet", {"width": 16, "max_width": 128, "levels": 5}, task).eval()
plan = plan_memory(
    [network], windowing, image_shape=(1, *shape), native_shape=shape, input_bytes=0, postprocessing_bytes=0, batch=2,
    dtype=torch.float32
)
image, label = torch.randn(1, *shape), torch.ones(shape, dtype=torch.uint8)
reset_peak_memory(torch.device("cpu"))
for planes in stream_logits([network], image, windowing, batch=2, dtype=torch.float32):
    planes.logits.argmax(0)
print(plan.peak_ram_bytes, peak_memory_bytes(torch.device("cpu")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux tells the peak")
def test_plan_is_near_the_peak_of_a_real_stream() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", STREAM], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    planned, peak = (int(number) for number in finished.stdout.split())
    assert 0.9 < planned / peak < 1.25
