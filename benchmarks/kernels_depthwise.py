"""Depthwise 3x3 layers of MobileNets, every candidate of the kernels that run them, beside cuDNN and a copy of as many bytes.

bf16. Calls out of a plan, many in a CUDA graph, on several sets of tensors that take turns; so do cuDNN's (PyTorch,
channels_last, cudnn.benchmark, where it is installed) and the copies (`parcnn.bench.repeated`). `*` marks the variant that runs
by default; the share is that of a large copy's bytes a second.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from parcnn.bench.conv_peers import TorchLayer
from parcnn.bench.layer import CONV, DEPTHWISE, Layer, Plans, least_bytes
from parcnn.bench.machine import Machine
from parcnn.bench.peers import has_torch_on_gpu
from parcnn.bench.repeated import RepeatedCalls, time_in_turn
from parcnn.bench.roofline import Roofline
from parcnn.bench.rows import Row, append
from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import Registry
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.ops.base import Spec
from parcnn.ops.pointwise import Act
from parcnn.ops.program import Call, Slot


def copy_of(nbytes: int) -> Call:
    """Reads half of the bytes and writes as many."""
    spec = Spec((nbytes // 4,), "bf16")
    return Call(Act("relu"), (Slot(spec, "arena"),), (Slot(spec, "arena", spec.nbytes),), layer="copy")


def measure(
    executor: CudaExecutor, layers: tuple[Layer, ...], say: Callable[[str], None], every: bool
) -> Iterator[list[Row]]:
    """Rows of one layer in one direction: a variant each, all of them or the chosen one."""
    machine, plans, usual = Machine.of(executor), Plans(executor, "bf16"), executor.registry
    large = Roofline.of(executor.device.name, "bf16", executor).bytes_per_second
    for layer in layers:
        for direction in CONV:
            (call,) = plans.calls(layer, direction)
            nbytes, families = least_bytes(call), usual.tunable(call.op, call.input_specs).values()
            forced = [Forced(f, variant) for f in families for variant in f.candidates(call, executor.device)]
            forced = forced[: None if every else 1]
            sizes = (call.op, call.input_specs, call.output_specs, executor.device)
            ours = RepeatedCalls(executor, [call], max(family.workspace_bytes(*sizes) for family in forced))
            runs = []
            for family in forced:
                executor.registry = Registry([family], usual.folder)
                runs.append(ours.load())
            executor.registry = usual
            copies = RepeatedCalls(executor, [copy_of(nbytes)])
            with_peer = has_torch_on_gpu()
            peers = [TorchLayer(layer, "bf16", ours.sets, ours.turns).convolution(direction).run] if with_peer else []
            timings = time_in_turn([copies.run, *peers, *runs], executor.synchronize)
            ours.free()
            copies.free()
            copied, *rest = timings
            copy_us = copied.of(copies.count).p50_us
            peer_us = rest.pop(0).of(ours.count).p50_us if peers else None
            took = {family: timing.of(ours.count) for family, timing in zip(forced, rest, strict=True)}
            against = f", cuDNN {peer_us:.1f} us" if peer_us else ""
            at_rate = f"at a large copy's rate {nbytes / large * 1e6:.1f} us"
            say(f"{direction} {layer.shape}: a copy {copy_us:.1f} us, {at_rate}{against}")
            rows = []
            for family in sorted(forced, key=lambda f: took[f].p50_us):
                variant, p50_us, mark = str(family.variant), took[family].p50_us, "*" if family is forced[0] else " "
                ratio = f"{peer_us / p50_us:7.2f}x cuDNN" if peer_us else ""
                share = nbytes / p50_us * 1e6 / large
                say(f"  {mark} {variant:48}{p50_us:9.1f} us{share:7.0%} of a copy{ratio}")
                problem = {"direction": direction, "shape": layer.shape, "groups": layer.groups}
                rows.append(
                    machine.row(
                        "kernels depthwise", problem, variant, took[family], bytes_moved=nbytes, copy_share=share,
                        copy_p50_us=copy_us, chosen=family is forced[0], peer="cudnn" if peers else None, peer_p50_us=peer_us,
                    )
                )  # fmt: skip
            yield rows


def main() -> None:
    """Measure, print, and keep the rows where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="layers whose N,H,W,C,K,R,stride,pad has this in it")
    parser.add_argument("--chosen", action="store_true", help="only the variants that the launchers take")
    parser.add_argument("--rows", type=Path, help="append the rows to this .jsonl file")
    arguments = parser.parse_args()
    layers = tuple(layer for layer in DEPTHWISE if arguments.only in layer.shape)
    for rows in measure(CudaExecutor(), layers, print, not arguments.chosen):
        if arguments.rows:
            append(arguments.rows, rows)


if __name__ == "__main__":
    main()
