"""The contract over every entry of the NETWORKS table, and the topology worked out by hand."""

import copy

import pytest
import torch
from network_variants import ALL, TASK, VARIANTS
from torch import Tensor

from pipeline.networks import NETWORKS, Network, build_network, check_options
from pipeline.networks.topology import topology


def build(name: str, options: dict[str, object]) -> Network:
    torch.manual_seed(0)
    return build_network(name, options, TASK)


def image(network: Network, output: tuple[int, int, int] = (16, 24, 16), batch: int = 2) -> Tensor:
    return torch.randn(batch, 2, *network.input_size(output), generator=torch.Generator().manual_seed(1))


def test_every_network_stands_in_the_contract_test() -> None:
    assert set(VARIANTS) == set(NETWORKS)


@pytest.mark.parametrize(("name", "options"), ALL)
class TestContract:
    @pytest.mark.parametrize("wanted", [(16, 24, 16), (17, 9, 30)])
    def test_output_is_the_input_less_the_margins_alike_in_train_and_eval(
        self, name: str, options: dict[str, object], wanted: tuple[int, int, int]
    ) -> None:
        network = build(name, options)
        size = network.input_size(wanted)
        # Legal sizes lie a multiple of the stride apart; a network that loses nothing reads such a multiple itself.
        smallest = network.input_size((1, 1, 1)) if any(network.margin) else (0, 0, 0)
        assert all((n - least) % s == 0 for n, least, s in zip(size, smallest, network.stride, strict=True))
        expected = tuple(n - 2 * m for n, m in zip(size, network.margin, strict=True))
        assert all(got >= want for got, want in zip(expected, wanted, strict=True))
        for mode in (True, False):
            assert network.train(mode)(image(network, wanted)).shape == (2, 3, *expected)

    def test_gradient_reaches_every_parameter(self, name: str, options: dict[str, object]) -> None:
        network = build(name, options)
        sum(logits.square().mean() for logits in network.deep_supervision(image(network))).backward()  # type: ignore[union-attr]
        still = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert still == []

    def test_other_samples_of_the_batch_do_not_matter_in_eval(self, name: str, options: dict[str, object]) -> None:
        network = build(name, options).eval()
        batch = image(network, batch=3)
        with torch.no_grad():
            together, alone = network(batch)[1:2], network(batch[1:2])
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)

    def test_weights_come_back_from_a_state_dict(self, name: str, options: dict[str, object]) -> None:
        network = build(name, options).eval()
        other = build_network(name, options, TASK).eval()
        batch = image(network)
        with torch.no_grad():
            assert not torch.equal(network(batch), other(batch))
            other.load_state_dict(copy.deepcopy(network.state_dict()))
            assert torch.equal(network(batch), other(batch))

    def test_finite_in_bf16(self, name: str, options: dict[str, object]) -> None:
        network = build(name, options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert network(image(network)).isfinite().all()

    def test_deep_supervision_begins_with_the_logits(self, name: str, options: dict[str, object]) -> None:
        network = build(name, options).eval()
        batch = image(network)
        with torch.no_grad():
            first, *coarser = network.deep_supervision(batch)
            assert torch.equal(first, network(batch))
        sizes = [logits.shape[2] for logits in (first, *coarser)]
        assert sizes == sorted(sizes, reverse=True)
        assert all(logits.shape[1] == 3 for logits in coarser)


def test_topology_of_the_hippocampus_is_nnunets() -> None:
    # nnU-Net 2.8.1 plans patch 40x56x40 at 1 mm with four levels, each halved.
    kernels, strides = topology((40, 56, 40), (1.0, 1.0, 1.0), None)
    assert kernels == ((3, 3, 3),) * 4
    assert strides == ((2, 2, 2),) * 3


def test_a_thick_axis_waits_until_the_others_are_as_coarse() -> None:
    # 1 x 1 x 4 mm: two halvings in plane bring the voxels to 4 mm; until then kernels are flat.
    kernels, strides = topology((64, 64, 16), (1.0, 1.0, 4.0), None)
    assert kernels[:3] == ((3, 3, 1), (3, 3, 3), (3, 3, 3))
    assert strides == ((2, 2, 1), (2, 2, 2), (2, 2, 2), (2, 2, 1))


def test_more_levels_than_the_patch_holds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"holds 3 levels, got levels: 5"):
        topology((16, 16, 16), (1.0, 1.0, 1.0), 5)


def test_options_are_checked_against_the_builders_signature() -> None:
    assert check_options("unet", {"width": 8}) == []
    assert check_options("unett", {})[0][1].endswith("did you mean 'unet'?")
    (key, message), (other, second) = sorted(check_options("unet", {"widht": 8, "dropout": 2}))
    assert (key, other) == ("options.dropout", "options.widht")
    assert "less than 1" in message
    assert "got 2" in message
    assert "did you mean 'width'?" in second
    with pytest.raises(ValueError, match="did you mean 'width'"):
        build_network("unet", {"widht": 8}, TASK)
