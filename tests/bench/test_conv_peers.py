"""The peers of layers run, on the device where PyTorch is."""

from __future__ import annotations

from itertools import product

import pytest

from parcnn.bench.conv_peers import COMPILE_MODES, CUDNN_CHOICES, TorchLayer
from parcnn.bench.layer import CONV, FUSED, Layer
from parcnn.bench.repeated import time_in_turn

ODD = Layer(3, 9, 9, 8, 16, 3, 1, 1)
GROUPED = Layer(3, 8, 8, 16, 16, 3, 2, 1, 16)

pytestmark = [pytest.mark.gpu, pytest.mark.torch]


@pytest.fixture(autouse=True)
def torch_on_gpu() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("layer", [ODD, GROUPED], ids=lambda layer: layer.shape)
def test_convolutions(layer: Layer, precision: str) -> None:
    import torch

    own = TorchLayer(layer, precision, sets=2, turns=3)
    for direction, choice in product(CONV, CUDNN_CHOICES):
        peer = own.convolution(direction, choice)
        (took,) = time_in_turn([peer.run], torch.cuda.synchronize, repeats=2)
        assert took.p50_us > 0
        assert peer.kept_bytes is None


def test_graphs_keep_what_they_read() -> None:
    import torch

    large = Layer(32, 56, 56, 64, 64, 3, 1, 1)
    peers = [TorchLayer(large, "bf16", sets=2, turns=1).convolution("dgrad", choice) for choice in CUDNN_CHOICES]
    torch.cuda.empty_cache()
    for peer in peers:
        peer.run(2)
    torch.cuda.synchronize()


@pytest.mark.parametrize("direction", FUSED)
def test_the_block_eager(direction: str) -> None:
    import torch

    peer = TorchLayer(ODD, "bf16", sets=2, turns=1).block(direction, "eager")
    peer.run(2)
    torch.cuda.synchronize()
    if direction == "fused_pool_train":
        assert peer.kept_bytes is not None
        # At least the two tensors before the pool: the convolution's output, which ReLU overwrites at the best.
        assert peer.kept_bytes >= 2 * 3 * 9 * 9 * 16


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_the_block_compiled() -> None:
    import torch

    peer = TorchLayer(ODD, "bf16", sets=2, turns=1).block("fused_pool_fwd", next(iter(COMPILE_MODES)))
    peer.run(2)
    torch.cuda.synchronize()
