"""Activation checkpointing: the same gradients and statistics from less memory, for every network of the table."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from network_contract import with_statistics
from network_variants import ALL, TASK, VARIANTS
from torch import Tensor, nn

from pipeline.hardware import autocast
from pipeline.networks import Network, build_network
from pipeline.networks.footprint import LiveBytes
from pipeline.networks.recomputing import Context, recompute_activations

# One of each kind of block: batch norms, dropout within, skips by name, blocks in lists, transformers; and blocks that
# are made anew for each image.
KINDS = [
    ("unet", 1),
    ("residual_encoder_unet", 1),
    ("multiscale_unet", 1),
    ("dynunet", 1),
    ("attention_unet", 0),
    ("basic_unet_plus_plus", 1),
    ("mednext", 0),
    ("unetr", 0),
    ("patch_classifier", 0),
]


def built(name: str, options: dict[str, Any]) -> Network:
    torch.manual_seed(0)
    return with_statistics(build_network(name, options, TASK)).train()


def image_for(network: Network) -> Tensor:
    size = network.input_size(TASK.patch_size)
    return torch.randn(2, TASK.in_channels, *size, generator=torch.Generator().manual_seed(1))


def step(network: Network, image: Tensor, context: Context = nullcontext) -> dict[str, Tensor]:
    """Return the loss, gradients and buffers of a step, dropout drawn from one seed."""
    torch.manual_seed(1)
    with context():
        outputs = network.deep_supervision(image)
        loss = torch.stack([logits.float().square().mean() for logits in outputs]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {f"gradient of {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients, **dict(network.named_buffers())}


def kernels_wrapped(network: nn.Module) -> float:
    """Return the share of the layers with kernels that a block recomputes."""
    layers = {m for m in network.modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)}
    within = {m for block in blocks_of(network) for m in block.modules()}
    return len(layers & within) / len(layers)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return what is to be computed again."""
    return [module for module in network.modules() if "forward" in vars(module)]


@pytest.mark.parametrize(("name", "variant"), KINDS)
def test_a_step_is_the_same(name: str, variant: int) -> None:
    options = VARIANTS[name][variant]
    plain, recomputed = built(name, options), built(name, options)
    recompute_activations(recomputed, nullcontext)
    assert list(recomputed.state_dict()) == list(plain.state_dict())
    expected, found = (step(network, image_for(network)) for network in (plain, recomputed))
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_blocks_are_found_in_every_kind_of_network() -> None:
    for name, options in ALL:
        network = built(name, options)
        recompute_activations(network, nullcontext)
        # A layer that stands alone, such as a head, has nothing to forget.
        assert kernels_wrapped(network) > (0.0 if name == "simple_fcn" else 0.4), (name, options)


@pytest.mark.slow
def test_every_block_that_is_found_is_computed_again() -> None:
    for name, (options, *_) in VARIANTS.items():
        network, again = built(name, options), list[str]()

        def context(again: list[str] = again, name: str = name) -> AbstractContextManager[None]:
            again.append(name)
            return nullcontext()

        recompute_activations(network, context)
        step(network, image_for(network)[:1])
        assert len(again) >= len(blocks_of(network)) > 0, name


def test_the_step_of_a_network_in_half_precision_is_the_same() -> None:
    # Flat enough for the convolutions that are computed in float32, the second time too.
    context = partial(autocast, torch.device("cpu"), torch.bfloat16)
    plain, recomputed = (built("unet", {"width": 4, "levels": 2, "norm": "batch"}) for _ in range(2))
    recompute_activations(recomputed, context)
    image = torch.randn(2, 2, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    expected, found = (step(network, image, context) for network in (plain, recomputed))
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_it_takes_less_memory_and_prediction_keeps_its_road() -> None:
    def peak(network: Network) -> int:
        image = image_for(network)
        with LiveBytes(image, network.parameters()) as mode:
            step(network, image)
        return mode.peak_bytes

    plain, recomputed = (built("unet", {"width": 8, "levels": 2, "convs": 4}) for _ in range(2))
    recompute_activations(recomputed, nullcontext)
    assert peak(recomputed) < 0.75 * peak(plain)
    with torch.no_grad():
        image = image_for(plain)
        assert torch.equal(plain.eval()(image), recomputed.eval()(image))
