"""Convolution layers, one by one: fprop, dgrad, wgrad against cuDNN, and the block with bias, ReLU and max-pool.

Ours are calls of a plan, run by the executor that trains; both sides replay CUDA graphs of many calls, on several sets of
random tensors that take turns, and their repeats take turns too (`parcnn.bench.repeated`, `parcnn.bench.conv_peers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from operator import itemgetter
from statistics import geometric_mean
from typing import Any

from parcnn import models, nn
from parcnn.bench.conv_peers import CUDNN_CHOICES, Peer, TorchLayer, version
from parcnn.bench.layer import CONV, FUSED, OPS, Layer, Plans, kept_bytes, layer_of, least_bytes
from parcnn.bench.machine import Machine
from parcnn.bench.peers import has_torch_on_gpu
from parcnn.bench.repeated import RepeatedCalls, time_in_turn
from parcnn.bench.roofline import Roofline
from parcnn.bench.rows import Row
from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.tuning import problem_key
from parcnn.errors import UnsupportedError
from parcnn.ops.base import Op
from parcnn.ops.pool import PoolWindow
from parcnn.ops.program import Call
from parcnn.optim import SGD
from parcnn.plan.describe import outline

REPEATS = 21  # under load, where the chip's clock moves single ones by up to 10 %
# The second measurement: so many single graphs, before each of which the chip rests.
RESTED_REPEATS, PAUSE_SECONDS = 5, 0.02
_GEOMETRY = ("stride", "pad", "dilation", "groups", "image", "filter")  # what a Layer tells of an op


@dataclass(frozen=True)
class Subject:
    """What is measured: calls of a plan; the layer that they are in full or in part (None: no peer has it)."""

    direction: str
    problem: dict[str, Any]
    calls: tuple[Call, ...]
    layer: Layer | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def of_layers(
    executor: CudaExecutor,
    layers: Iterable[Layer],
    precision: str,
    say: Callable[[str], None],
    directions: Sequence[str] = (*CONV, *FUSED),
) -> list[Subject]:
    """Each layer in each direction; what no kernel runs is said and left out."""
    plans, subjects = Plans(executor, precision), []
    for layer in layers:
        for direction in layer.directions(fused=True):
            if direction not in directions:
                continue
            problem = {
                "direction": direction,
                "shape": layer.shape,
                **({"groups": layer.groups} if layer.groups > 1 else {}),
            }
            try:
                subjects.append(Subject(direction, problem, tuple(plans.calls(layer, direction)), layer))
            except UnsupportedError as error:
                say(f"{direction} {layer.shape}: {error}")
    return subjects


def of_model(
    executor: CudaExecutor, model: str, sample: tuple[int, ...], batch: int, precision: str, classes: int = 10
) -> list[Subject]:
    """The convolutions of a model's training step, each problem once. Linear layers are convolutions too."""
    plan = outline(
        models.create(model, num_classes=classes, in_channels=sample[0]),
        mode="train",
        batch=batch,
        sample=sample,
        executor=executor,
        loss=nn.CrossEntropyLoss(),
        optimizer=SGD(momentum=0.9),
        precision=precision,
    )
    found: dict[str, Subject] = {}
    for call in plan.program.calls:
        key = problem_key(call.op, call.input_specs)
        if not isinstance(call.op, tuple(OPS.values())) or key in found:
            continue
        direction, layer = layer_of(call)
        problem = {
            "direction": direction,
            "shape": layer.shape if layer else key,
            **({"groups": layer.groups} if layer and layer.groups > 1 else {}),
            "fused": " ".join(_fused(call.op)),
        }
        found[key] = Subject(direction, problem, (call,), layer, {"model": model, "batch": batch, "layer": call.layer})
    return list(found.values())


def _fused(op: Op) -> Iterator[str]:
    """What a convolution does beyond its geometry: 'pool=max', 'bias', 'act=relu', 'pool_window kernel=(3, 3)'."""
    for attribute in fields(op):
        value = getattr(op, attribute.name)
        if attribute.name in _GEOMETRY or value == attribute.default:
            continue
        if isinstance(value, PoolWindow):
            yield problem_key(value, ())
        else:
            yield attribute.name if value is True else f"{attribute.name}={value}"


def run(
    executor: CudaExecutor,
    subjects: Sequence[Subject],
    say: Callable[[str], None],
    *,
    bench: str = "conv",
    precision: str = "bf16",
    peers: bool = True,
    compiled: Sequence[str] = ("default",),
    pauses: bool = True,
    earlier: Sequence[Row] = (),
) -> Iterator[list[Row]]:
    """Rows of each subject as they are measured: one for each peer, or one without. Times are those under load without a
    pause; `rested_us` and `peer_rested_us`, with `pauses`, are single graphs after a pause each.

    peers: PyTorch in the same run, where it is installed and has the GPU; cuDNN's convolution alone, also where ours does
    more in the same kernel. compiled: modes of torch.compile (`conv_peers.COMPILE_MODES`), the best of which the fused
    block's row has. earlier: subjects that these rows measured, of the same commit without changes, GPU and tables, against
    all that is asked for here, are left out. At the end geometric means and the worst are said. Raises UnsupportedError or
    OutOfMemoryError.
    """
    peers = peers and has_torch_on_gpu()
    machine = Machine.of(executor)
    kept: list[Row] = []
    if machine.commit is not None and not machine.commit.endswith("+changes"):
        same = (bench, machine.gpu, machine.commit, executor.tuning_digest)
        comparable = [r for r in earlier if (r.bench, r.gpu, r.commit, r.extra.get("tuning")) == same]
        of_each = [_earlier(comparable, subject, peers, compiled, pauses) for subject in subjects]
        subjects = [subject for subject, rows in zip(subjects, of_each, strict=True) if not rows]
        kept = [row for rows in of_each for row in rows]
    roof = Roofline.of(executor.device.name, precision, executor)
    executor.compile(kernel for subject in subjects for call in subject.calls for kernel in executor.kernels(call))
    for subject in subjects:
        rows = list(_measure(executor, subject, machine, roof, bench, precision, peers, compiled, pauses))
        for row in rows:
            say(_line(subject, row))
        kept += rows
        yield rows
    for line in _summary(kept):
        say(line)


def _earlier(rows: Sequence[Row], subject: Subject, peers: bool, compiled: Sequence[str], pauses: bool) -> list[Row]:
    """Rows that are all that measuring the subject would bring; none where something is missing."""

    def suffices(row: Row) -> bool:
        has_modes = row.peer != "torch_compile" or set(compiled) <= set(row.extra.get("compile_modes") or ())
        return has_modes and (not pauses or row.extra.get("rested_us") is not None)

    of_peer = {row.peer: row for row in rows if row.problem == subject.problem and suffices(row)}
    wanted: tuple[str | None, ...] = _peer_names(subject) if peers else ()
    return [of_peer[name] for name in wanted or (None,)] if {*(wanted or (None,))} <= of_peer.keys() else []


def _summary(rows: Sequence[Row]) -> Iterator[str]:
    """How much faster than each peer in each direction: the mean, and the worst."""
    found: dict[tuple[str, str], list[tuple[float, str, float | None]]] = {}
    for row in rows:
        if row.peer and (ratio := row.faster):
            of_both = found.setdefault((row.problem["direction"], row.peer), [])
            of_both.append((ratio, row.problem["shape"], row.faster_rested))
    for (direction, peer), own in found.items():
        mean, rested = geometric_mean(each[0] for each in own), [each[2] for each in own if each[2]]
        after = f"; {geometric_mean(rested):.2f}x after pauses" if rested else ""
        worst, shape, _ = min(own, key=itemgetter(0))
        yield f"{direction}: {mean:.2f}x {peer} (geometric mean of {len(own)}{after}), worst {worst:.2f}x at {shape}"


def _measure(
    executor: CudaExecutor,
    subject: Subject,
    machine: Machine,
    roof: Roofline,
    bench: str,
    precision: str,
    peers: bool,
    compiled: Sequence[str],
    pauses: bool,
) -> Iterator[Row]:
    calls = subject.calls
    flops = sum(call.op.flops(call.input_specs, call.output_specs) for call in calls)
    nbytes = sum(map(least_bytes, calls))
    bound = roof.bound_us(flops, nbytes)
    ours = RepeatedCalls(executor, calls)
    theirs = _peers(subject, precision, ours, compiled) if peers and subject.layer else {}
    runs = [ours.run, *(peer.run for peer in theirs.values())]
    took, *others = [timing.of(ours.count) for timing in time_in_turn(runs, executor.synchronize, REPEATS)]
    rested: list[float | None] = [None] * len(runs)
    if pauses:
        after_pauses = time_in_turn(runs, executor.synchronize, RESTED_REPEATS, 0.0, PAUSE_SECONDS)
        rested = [timing.of(ours.count).p50_us for timing in after_pauses]
    ours.free()
    kernels = dict.fromkeys(kernel.label for call in calls for kernel in executor.kernels(call))
    choices = [executor.choices(call.op, call.input_specs, call.output_specs)[:1] for call in calls]
    best: dict[str | None, tuple[float | None, str | None, int | None]] = {}
    best_rested: dict[str | None, float] = {}
    for ((key, mode), peer), timing, after_pause in zip(theirs.items(), others, rested[1:], strict=True):
        if after_pause is not None:
            best_rested[key] = min(after_pause, best_rested.get(key, after_pause))
        if key not in best or timing.p50_us < (best[key][0] or 0):
            best[key] = (timing.p50_us, mode, peer.kept_bytes)
    for name, (peer_us, peer_mode, peer_kept) in (best or {None: (None, None, None)}).items():
        yield machine.row(
            bench,
            subject.problem,
            " + ".join(kernels),
            took,
            peer=name,
            peer_p50_us=peer_us,
            precision=precision,
            flops=flops,
            bytes_moved=nbytes,
            tflops=flops / took.p50_us / 1e6,
            bound_us=bound,
            copy_share=nbytes / took.p50_us * 1e6 / roof.bytes_per_second,
            copy_bytes_per_second=roof.bytes_per_second,
            choice=" + ".join(str(choice) for found in choices for choice in found),
            tuning=executor.tuning_digest,
            rested_us=rested[0],
            peer_rested_us=best_rested.get(name),
            peer_mode=peer_mode,
            compile_modes=list(compiled) if name == "torch_compile" else None,
            kept_bytes=kept_bytes(calls) if subject.direction == "fused_pool_train" else None,
            peer_kept_bytes=peer_kept,
            peer_version=version() if name else None,
            **subject.extra,
        )


def _peer_names(subject: Subject) -> tuple[str, ...]:
    if subject.layer is None:
        return ()
    return ("cudnn",) if subject.direction in CONV else ("torch_eager", "torch_compile")


def _peers(
    subject: Subject, precision: str, ours: RepeatedCalls, compiled: Sequence[str]
) -> dict[tuple[str, str], Peer]:
    """Peers by name and mode, on as many sets of tensors as ours."""
    if subject.layer is None:
        return {}
    torch_layer = TorchLayer(subject.layer, precision, ours.sets, ours.turns)
    if subject.direction in CONV:
        return {("cudnn", choice): torch_layer.convolution(subject.direction, choice) for choice in CUDNN_CHOICES}
    modes = {("torch_eager", "eager"): "eager", **{("torch_compile", mode): mode for mode in compiled}}
    return {key: torch_layer.block(subject.direction, mode) for key, mode in modes.items()}


def _line(subject: Subject, row: Row) -> str:
    bound = row.extra["bound_us"]
    share = f"{bound / row.p50_us:5.0%} of the roofline" if bound and row.p50_us else ""
    against = ""
    if row.peer and (ratio := row.faster):
        against = f", {row.peer} {row.peer_p50_us:9.1f} us, {ratio:5.2f}x"
        against += f" ({rested:.2f}x rested)" if (rested := row.faster_rested) else ""
    name = f"{subject.direction} {subject.problem['shape']}"
    return (
        f"  {name:<42}{row.p50_us:9.1f} us {row.extra['tflops']:6.1f} TFLOP/s {share}{against}  {row.extra['choice']}"
    )
