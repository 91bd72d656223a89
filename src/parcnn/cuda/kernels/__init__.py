"""The kernel families, and which of them runs an op: the first that says it can, or the fastest by their estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from parcnn.cuda.kernels import (
    batch_norm,
    batch_norm_pool,
    conv_depthwise,
    conv_depthwise_any,
    conv_depthwise_sm90,
    conv_depthwise_wgrad,
    conv_dgrad,
    conv_fprop,
    conv_grouped,
    conv_mma_dgrad,
    conv_mma_fprop,
    conv_mma_lines,
    conv_mma_wgrad,
    conv_padded,
    conv_sm90,
    conv_sm90_one_window,
    conv_stem,
    conv_stem_sm90,
    conv_stem_sm90_wgrad,
    conv_unpool,
    conv_wgrad,
    conv_wgrad_sm90,
    conv_wgrad_sm90_halves,
    conv_winograd,
    conv_winograd_wgrad,
    feed,
    gemm,
    gemm_mma,
    loss,
    muon,
    pointwise,
    pool,
    shape,
    update,
)
from parcnn.cuda.launch import Device, EstimatingLauncher, Kernel, Launcher, TunableLauncher, WeighingLauncher
from parcnn.errors import UnsupportedError
from parcnn.ops.base import Op, Spec
from parcnn.ops.program import Call, Slot


class Registry:
    """Launchers in the order in which they are asked, and the folder of their kernels' sources.

    `only_on` has those whose kernels use the instructions of one architecture: there they are asked first.
    """

    def __init__(
        self,
        launchers: Sequence[Launcher],
        folder: Path,
        only_on: Mapping[str, Sequence[Launcher]] = MappingProxyType({}),
    ) -> None:
        self._launchers, self.folder, self._only_on = tuple(launchers), folder, only_on

    def on(self, arch: str) -> Registry:
        """The registry of a device of architecture `arch`."""
        return Registry((*self._only_on.get(arch, ()), *self._launchers), self.folder)

    @property
    def portable(self) -> Registry:
        """Only what runs on every architecture."""
        return Registry(self._launchers, self.folder)

    def supports(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
        """Whether some launcher runs the op on these operands, and no slower than the op's parts."""
        able = (launcher for launcher in self._of(op) if launcher.supports(op, inputs) is None)
        return any(not isinstance(launcher, WeighingLauncher) or launcher.gains(op, inputs) for launcher in able)

    def find(self, op: Op, inputs: tuple[Spec, ...], device: Device, where: str = "") -> Launcher:
        """The launcher that runs the op on a device. Raises UnsupportedError with each one's reason.

        The first that can; where that one estimates its time, the fastest by their estimates of all that can and do so.
        """
        reasons, able = [], []
        for launcher in self._of(op):
            reason = launcher.supports(op, inputs)
            if reason is not None:
                reasons.append(f"{family_name(launcher)}: {reason}")
            elif isinstance(launcher, EstimatingLauncher):
                able.append(launcher)
            elif not able:
                return launcher
        if able:
            call = Call(op, tuple(Slot(s, "arena") for s in inputs), tuple(Slot(s, "arena") for s in op.infer(*inputs)))
            if len(able) == 1 or not all(spec.size for spec in (*call.input_specs, *call.output_specs)):
                return able[0]
            return min(able, key=lambda launcher: launcher.cost_us(call, device))
        raise UnsupportedError(
            f"no kernel runs {op.name} on {', '.join(f'{s.dtype}{s.shape}' for s in inputs)}",
            where=where,
            expected="; ".join(reasons) or "an op that has a launcher",
            got=repr(op),
            remedy=("a smaller batch; or " if any("2**31" in reason for reason in reasons) else "")
            + "use the CPU: device='cpu', `--device cpu`",
        )

    def tunable(self, op: Op, inputs: tuple[Spec, ...]) -> dict[str, TunableLauncher]:
        """The launchers that have variants for the op on these operands, by family name."""
        able = (launcher for launcher in self._of(op) if launcher.supports(op, inputs) is None)
        return {family_name(launcher): launcher for launcher in able if isinstance(launcher, TunableLauncher)}

    @property
    def ops(self) -> tuple[type[Op], ...]:
        """Every op that some launcher runs."""
        return tuple(op for launcher in self._launchers for op in launcher.OPS)

    def variants(self) -> tuple[Kernel, ...]:
        """Every kernel of every launcher."""
        return tuple(kernel for launcher in self._launchers for kernel in launcher.variants())

    def _of(self, op: Op) -> list[Launcher]:
        return [launcher for launcher in self._launchers if type(op) in launcher.OPS]


def family_name(launcher: Launcher) -> str:
    """What tables call a family: its module's own name."""
    return str(getattr(launcher, "__name__", type(launcher).__name__)).rpartition(".")[2]


REGISTRY = Registry(
    [
        conv_depthwise,
        conv_depthwise_wgrad,
        conv_depthwise_any,
        conv_grouped,
        conv_fprop,
        conv_dgrad,
        conv_wgrad,
        conv_winograd,
        conv_winograd_wgrad,
        conv_stem,
        conv_mma_fprop,
        conv_mma_dgrad,
        conv_mma_lines,
        conv_mma_wgrad,
        conv_unpool,
        pool,
        pointwise,
        batch_norm,
        batch_norm_pool,
        shape,
        loss,
        update,
        gemm,
        gemm_mma,
        muon,
        feed,
    ],
    Path(__file__).parent,
    only_on={
        "sm_90a": [
            conv_depthwise_sm90,
            conv_stem_sm90,
            conv_stem_sm90_wgrad,
            conv_sm90,
            conv_sm90_one_window,
            conv_wgrad_sm90,
            conv_wgrad_sm90_halves,
            conv_padded,
        ]
    },
)
