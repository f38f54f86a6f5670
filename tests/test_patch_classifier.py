"""The patch classifier slid over every position, slowly, against its dense form and its tiles."""

import pytest
import torch
from network_variants import FLAT_TASK, TASK
from torch import Tensor
from torch.nn import functional

from pipeline.networks import NetworkTask
from pipeline.networks.patch_classifier import PatchClassifier, patch_classifier


def classifier(task: NetworkTask = TASK, **options: object) -> PatchClassifier:
    """Return a classifier in eval mode, its batch norms having seen an image."""
    torch.manual_seed(0)
    network = patch_classifier(task, **{"widths": (4, 6), "hidden": (8,), **options})  # type: ignore[arg-type]
    network(random_image(network, (8, 8, 8 if task.flat_axis is None else 1)))
    return network.eval()


def random_image(network: PatchClassifier, output: tuple[int, int, int]) -> Tensor:
    return torch.randn(1, 2, *network.input_size(output), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def slide(network: PatchClassifier, image: Tensor) -> Tensor:
    """Classify the patch about every voxel, one at a time: (K, *output)."""
    x, y, z = network.field
    positions = [n - f + 1 for n, f in zip(image.shape[2:], network.field, strict=True)]
    logits = torch.empty(3, *positions)
    for i, j, k in torch.cartesian_prod(*map(torch.arange, positions)).tolist():
        logits[:, i, j, k] = network.classify(image[:, :, i : i + x, j : j + y, k : k + z])[0]
    return logits


@pytest.mark.parametrize(
    ("task", "options", "field"),
    [
        (TASK, {"convs": 1}, (21, 21, 21)),
        (TASK, {"pooling": False, "norm": "none"}, (11, 11, 11)),
        (TASK, {"widths": (3, 4, 5), "convs": 1, "seen": 1, "hidden": ()}, (29, 29, 29)),
        (FLAT_TASK, {}, (27, 27, 1)),
    ],
)
def test_dense_equals_the_classifier_slid_over_every_position(
    task: NetworkTask, options: dict[str, object], field: tuple[int, int, int]
) -> None:
    network = classifier(task, **options)
    assert network.field == field
    image = random_image(network, (5, 4, 6))
    with torch.no_grad():
        dense, forward = network.to_dense()(image)[0], network(image)[0]
    expected = slide(network, image)
    assert dense.shape == (3, 5, 4, 6)
    assert expected.std() > 1e-2
    assert (dense - expected).abs().max() < 1e-5
    assert torch.equal(forward, dense)


def test_a_patch_of_another_size_is_not_classified() -> None:
    network = classifier()
    with pytest.raises(RuntimeError):
        network.classify(torch.zeros(1, 2, 31, 27, 27))


def test_the_field_is_what_a_voxels_gradient_reaches() -> None:
    network = classifier(pooling=False, norm="none")
    image = random_image(network, (3, 3, 3)).requires_grad_()
    network(image)[0, :, 1, 1, 1].sum().backward()
    assert image.grad is not None
    touched = image.grad[0].abs().sum(0).nonzero()
    assert (touched.amin(0).tolist(), touched.amax(0).tolist()) == ([1, 1, 1], [11, 11, 11])


def test_dense_gradient_is_the_mean_of_the_patches_gradients() -> None:
    network = classifier(pooling=False, norm="none").double()
    image = random_image(network, (2, 3, 2)).double()
    target = torch.randint(0, 3, (1, 2, 3, 2), generator=torch.Generator().manual_seed(2))
    functional.cross_entropy(network(image), target).backward()
    dense = {name: weights.grad.clone() for name, weights in network.named_parameters()}  # type: ignore[union-attr]
    network.zero_grad()
    for (i, j, k), wanted in zip(torch.cartesian_prod(*map(torch.arange, (2, 3, 2))), target.flatten(), strict=True):
        patch = image[:, :, i : i + 11, j : j + 11, k : k + 11]
        (functional.cross_entropy(network.classify(patch), wanted[None]) / target.numel()).backward()
    for name, weights in network.named_parameters():
        torch.testing.assert_close(dense[name], weights.grad)


def test_the_dense_network_shares_the_weights() -> None:
    network = classifier()
    dense, image = network.to_dense(), random_image(network, (2, 2, 2))
    with torch.no_grad():
        before = dense(image)
        network.connected[-1].bias += 1  # type: ignore[operator]
        torch.testing.assert_close(dense(image), before + 1)
