"""Making a plan: trace the model, fuse, differentiate, place in memory, schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from parcnn.errors import ArgumentError, OutOfMemoryError, ShapeError
from parcnn.ops.base import Spec, Value
from parcnn.ops.conv import ConvDgrad, ConvWgrad
from parcnn.ops.feed import STATE, EndStep, GatherBatch, WriteOutput
from parcnn.ops.pointwise import Cast
from parcnn.ops.program import Call, Executor, Program, Slot
from parcnn.ops.shape import View
from parcnn.ops.update import MAX_GROUP, Update
from parcnn.plan import channels, memory
from parcnn.plan.autodiff import differentiate
from parcnn.plan.fuse import drop_unread, fuse_backward, fuse_forward, take_sums
from parcnn.plan.graph import Graph, Node
from parcnn.plan.optimizer import Group, Optimizer, Rule
from parcnn.plan.options import Options
from parcnn.plan.precision import cast_filters, keep_copies
from parcnn.plan.schedule import schedule
from parcnn.plan.trace import Tensor, Trace, input_tensor
from parcnn.plan.unpool import unpool_in_norms, unpool_once
from parcnn.plan.variable import Layout, Variable

MODES = ("train", "eval", "predict")


@dataclass(frozen=True)
class Feed:
    """What flows into a pass over a data set: shapes of what is resident, and how a batch is made of it.

    sample: logical shape of one input, (C,H,W) or (F,); images: physical, (M,H,W,C) u8 or float; targets: (M) i32 or (M,F).
    order: samples in a pass; steps: batches in a pass; scale, shift, flip, shift_px: see `parcnn.ops.feed.GatherBatch`.
    """

    sample: tuple[int, ...]
    images: Spec
    targets: Spec
    order: int
    steps: int
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)
    flip: bool = False
    shift_px: int = 0


class LossResult(Protocol):
    """What a loss function returns (`parcnn.nn.functional.Loss`)."""

    value: Value  # the scalar that training minimises
    correct: Value | None  # count of right answers, where there is one


@dataclass(frozen=True)
class Plan:
    """A program with its account: what it takes, and what takes it."""

    mode: str
    batch: int
    feed: Feed
    program: Program
    layout: Layout
    output_shape: tuple[int, ...]  # logical, of the model's result
    output_physical: tuple[int, ...]
    alive_bytes: tuple[int, ...]  # arena bytes alive during each call
    largest: tuple[str, int]  # the largest tensor alive at the peak: its label, bytes

    @property
    def arena_bytes(self) -> int:
        """Transient memory: activations, error signals, gradients, scratch."""
        return self.program.region_bytes["arena"]

    @property
    def persistent_bytes(self) -> int:
        """Weights and running statistics, filters' copies in another type, and in training the optimizer's state."""
        copies = self.program.region_bytes.get("copies", 0)
        return self.layout.weights_bytes + copies + (self.layout.optimizer_bytes if self.mode == "train" else 0)

    @property
    def peak_bytes(self) -> int:
        """Exact memory of model and step, known before anything runs (the data set and its tables apart)."""
        return self.arena_bytes + self.persistent_bytes


def build(
    model: Any,
    *,
    mode: str,
    batch: int,
    feed: Feed,
    executor: Executor,
    layout: Layout,
    loss: Callable[[Tensor, Tensor], LossResult] | None = None,
    optimizer: Optimizer | None = None,
    options: Options | None = None,
    dtype: str | None = None,
) -> Plan:
    """The plan of one step in `mode`: 'train' (needs loss and optimizer), 'eval' (needs loss) or 'predict'.

    dtype: type of the tensors between layers (None: that of the layout, which has the type that `dtype` is summed in).
    Raises ShapeError, UnsupportedError or ArgumentError, naming the layer, when the model does not fit the input, and
    ArgumentError when there is nothing to train.
    """
    if mode not in MODES:
        raise ArgumentError("unknown mode", expected=MODES, got=mode)
    options = options or Options()
    if not executor.concurrent:
        options = replace(options, parallel=False)  # side branches would cost memory and bring nothing
    dtype = dtype or layout.dtype
    if not layout.is_settled:
        graph = Graph(mode, dtype)
        output, _ = _model(graph, model, batch, feed, layout)
        layout.settle(_padded(graph, output, layout, executor, options) if options.pad_channels else {})
    graph = Graph(mode, dtype)
    output, result = _forward(graph, model, batch, feed, layout, loss, optimizer)
    graph.drop_dead([] if result is None else [result.value])
    cast_filters(graph)
    if options.fuse:
        fuse_forward(graph, executor.can_fuse)
    if mode == "train" and result is not None:
        _backward(graph, layout, result, feed, options)
        if not any(isinstance(node.op, Update) for node in graph.nodes):
            raise ArgumentError(
                "no parameter that leads to the loss is trained",
                where=type(model).__name__,
                expected="at least one with requires_grad",
                remedy="call requires_grad_(True) on what is to learn, or evaluate() the model",
            )
    _end_step(graph, batch, feed, result)
    graph.drop_dead()
    if mode == "train":
        if options.fuse:
            fuse_backward(graph, executor.can_fuse)
            unpool_in_norms(graph, executor.can_fuse)
            unpool_once(graph, executor.unpools)
            take_sums(graph, executor.can_fuse)
        _save_memory_of_large_layers(graph, options)
    drop_unread(graph)
    keep_copies(graph, layout)
    program, alive, largest = _program(graph, layout, executor, options, f"{type(model).__name__} {mode} {batch}")
    return Plan(mode, batch, feed, program, layout, output.shape, output.value.shape, alive, largest)


def _padded(
    graph: Graph, output: Tensor, layout: Layout, executor: Executor, options: Options
) -> dict[Variable, tuple[int, ...]]:
    """Which weights get channels of zeros, of a model that `graph` holds: as training wants it, whatever the mode is."""
    graph.mode = "train"
    graph.drop_dead([output.value])
    cast_filters(graph)
    if options.fuse:
        fuse_forward(graph, executor.can_fuse)
    return channels.stored_shapes(graph, output.value, _weights(graph, layout), layout.rules, executor.pads_to)


def _model(graph: Graph, model: Any, batch: int, feed: Feed, layout: Layout) -> tuple[Tensor, Tensor]:
    """Trace a batch and the model; the model's output, and the targets."""
    trace = Trace(graph, layout, {module: name for name, module in model.named_modules()})
    graph.phase = "feed"
    images = graph.place(feed.images, "images", 0, "images")
    targets = graph.place(feed.targets, "targets", 0, "targets")
    order = graph.place(Spec((feed.order,), "i32"), "order", 0, "order")
    trace.state = graph.place(STATE, "state", 0, "state")
    gather = GatherBatch(batch, graph.dtype, feed.scale, feed.shift, feed.flip, feed.shift_px)
    if graph.mode != "train":
        gather = replace(gather, flip=False, shift_px=0)
    x, target = graph.emit(gather, images, targets, order, trace.state)
    graph.phase = "forward"
    output = model(input_tensor(trace, x, feed.sample))
    if not isinstance(output, Tensor):
        raise ShapeError(
            "forward() must return one tensor",
            where=type(model).__name__,
            expected="Tensor",
            got=type(output).__name__,
            remedy="return the tensor that the loss is computed from",
        )
    return output, Tensor(trace, target, target.shape)


def _forward(
    graph: Graph,
    model: Any,
    batch: int,
    feed: Feed,
    layout: Layout,
    loss: Callable[[Tensor, Tensor], LossResult] | None,
    optimizer: Optimizer | None,
) -> tuple[Tensor, LossResult | None]:
    """Trace batch, model and loss; the model's output, and the loss where the mode has one."""
    output, target = _model(graph, model, batch, feed, layout)
    graph.layer = "loss" if graph.mode != "predict" else "output"
    if graph.mode == "predict":
        value = output.exact if output.ndim == 4 else output.in_user_order()
        if value.dtype != layout.dtype:
            (value,) = graph.emit(Cast(layout.dtype), value)
        out = graph.place(Spec((feed.order, *value.shape[1:]), value.dtype), "out", 0, "out")
        graph.emit(WriteOutput(), value, _state(graph), out)
        return output.with_value(value), None
    if loss is None or (graph.mode == "train" and optimizer is None):
        raise ArgumentError(
            f"mode {graph.mode!r} needs a loss" + " and an optimizer" * (graph.mode == "train"),
            where=type(model).__name__,
            expected="loss=nn.CrossEntropyLoss()" + ", optimizer=SGD()" * (graph.mode == "train"),
            got=f"loss={loss}, optimizer={optimizer}",
        )
    result = loss(output, target)
    if not any(getattr(result, "value", None) in node.outputs for node in graph.nodes if node.layer == "loss"):
        raise ArgumentError(
            "the loss function returned something else than a loss",
            where=getattr(loss, "__name__", type(loss).__name__),
            expected="the result of parcnn.nn.functional.cross_entropy or mse_loss",
            got=type(result).__name__,
        )
    return output, result


def _state(graph: Graph) -> Value:
    """Step counters and random key (`parcnn.ops.feed`)."""
    return next(v for v, place in graph.places.items() if place[0] == "state")


def _backward(graph: Graph, layout: Layout, result: LossResult, feed: Feed, options: Options) -> None:
    """Differentiate, and update weights in groups, those of one rule together, as their gradients come."""
    weights = {v: var for v, var in _weights(graph, layout).items() if var.requires_grad}
    thawed = [layout.names[v] for v in weights.values() if v not in layout.state_offsets]
    if thawed:
        raise ArgumentError(
            "a parameter that was frozen is to be trained now, and the optimizer has no state for it",
            where=thawed[0],
            expected="requires_grad as it was when the optimizer's memory was laid out",
            got=f"{len(thawed)} more to train",
            remedy="make a new Trainer after requires_grad_()",
        )
    loss = next(node for node in graph.nodes if result.value in node.outputs)
    state = _state(graph)
    hyper = graph.place(Spec((feed.steps, 4), layout.dtype), "hyper", 0, "hyper")
    waiting: dict[Rule, list[tuple[Value, Value]]] = {}

    def flush(rule: Rule) -> None:
        pairs = waiting.pop(rule)
        ws, gs = [w for w, _ in pairs], [g for _, g in pairs]
        buffers = [
            graph.place(w.spec, "optimizer", layout.state_offsets[weights[w]][i], f"{w.label}.state{i}")
            for i in range(rule.slots)
            for w in ws
        ]
        phase, layer = graph.phase, graph.layer
        graph.phase, graph.layer = "update", "optimizer"
        rule.emit(graph.emit, Group(hyper, state, ws, gs, buffers, graph.dtype))
        graph.phase, graph.layer = phase, layer

    def ready(weight: Value, gradient: Value) -> None:
        rule = layout.rules[weights[weight]]
        pairs = waiting.setdefault(rule, [])
        pairs.append((weight, gradient))
        large = sum(g.spec.nbytes for _, g in pairs) > options.update_bytes
        if len(pairs) == MAX_GROUP or (large and not rule.waits):
            flush(rule)

    differentiate(graph, loss, set(weights), ready)
    for rule in list(waiting):
        flush(rule)


def _weights(graph: Graph, layout: Layout) -> dict[Value, Variable]:
    """The graph's values that are variables of the model."""
    by_offset = {offset: variable for variable, offset in layout.offsets.items()}
    return {v: by_offset[offset] for v, (region, offset) in graph.places.items() if region == "weights"}


def _save_memory_of_large_layers(graph: Graph, options: Options) -> None:
    """Where activations are large, the weight gradient goes before the error signal, which may then lie in their place.

    Small layers keep the chain first: there waiting costs more than memory.
    """
    nodes = graph.nodes
    for i in range(len(nodes) - 1):
        chain, side = nodes[i], nodes[i + 1]
        if isinstance(chain.op, ConvDgrad) and isinstance(side.op, ConvWgrad) and chain.inputs[0] is side.inputs[1]:
            if side.inputs[0].spec.nbytes >= options.slack_bytes or not options.parallel:
                nodes[i], nodes[i + 1] = side, chain


def _end_step(graph: Graph, batch: int, feed: Feed, result: LossResult | None) -> None:
    """Append what closes a step: logs and counters."""
    graph.phase, graph.layer = "feed", "step"
    state = _state(graph)
    operands: list[Value] = [state]
    correct = result.correct if result else None
    if result is not None:
        losses = graph.place(Spec((feed.steps,), result.value.dtype), "losses", 0, "losses")
        operands += [losses, result.value]
    if correct is not None:
        operands += [graph.place(Spec((feed.steps,), "i32"), "corrects", 0, "corrects"), correct]
    graph.emit(EndStep(batch, graph.mode == "train", result is not None, correct is not None), *operands)


def _program(
    graph: Graph, layout: Layout, executor: Executor, options: Options, name: str
) -> tuple[Program, tuple[int, ...], tuple[str, int]]:
    """Place every value and turn nodes into calls; also the bytes alive during each, and the largest tensor at the peak."""
    root = _roots(graph)
    nodes = [node for node in graph.nodes if not isinstance(node.op, View)]
    scratch = [
        executor.workspace_bytes(n.op, tuple(v.spec for v in n.inputs), tuple(v.spec for v in n.outputs)) for n in nodes
    ]
    blocks, home, own_scratch = _blocks(graph, nodes, root, scratch, options)
    arena = memory.place(blocks, options.reuse)

    def slot(value: Value) -> Slot:
        origin = root[value]
        if origin in graph.places:
            region, offset = graph.places[origin]
            return Slot(value.spec, region, offset, value.label)
        return Slot(value.spec, "arena", home[origin].offset, value.label)

    calls = []
    for node, block in zip(nodes, own_scratch, strict=True):
        workspace = Slot(Spec((block.nbytes,), "u8"), "arena", block.offset, f"{node.layer}.scratch") if block else None
        inputs, outputs = tuple(map(slot, node.inputs)), tuple(map(slot, node.outputs))
        calls.append(Call(node.op, inputs, outputs, workspace, node.layer, node.phase))
    scheduled = schedule(calls, options.side_streams if options.parallel else 0)
    sizes = {"arena": arena}
    for call in scheduled:
        for s in (*call.inputs, *call.outputs):
            sizes[s.region] = max(sizes.get(s.region, 0), s.end)
    if "copies" in sizes:  # the same for all plans
        sizes["copies"] = layout.copies_bytes(graph.dtype)
    streams = 1 + max((c.stream for c in scheduled), default=0)
    alive = memory.live_bytes(blocks, len(calls))
    peak = max(range(len(calls)), key=alive.__getitem__)
    at_peak = [b for b in blocks if b.first <= peak <= b.last]
    largest = max(((b.label, b.nbytes) for b in at_peak), key=lambda b: b[1], default=("", 0))
    return Program(name, scheduled, sizes, streams, options.graph), tuple(alive), largest


def _roots(graph: Graph) -> dict[Value, Value]:
    """The value whose bytes each value's are: itself, or what a view looks at."""
    root: dict[Value, Value] = {v: v for v in graph.places}
    for node in graph.nodes:
        for v in node.outputs:
            root[v] = root[node.inputs[0]] if isinstance(node.op, View) else v
    return root


def _blocks(
    graph: Graph, nodes: Sequence[Node], root: dict[Value, Value], scratch: Sequence[int], options: Options
) -> tuple[list[memory.Block], dict[Value, memory.Block], list[memory.Block | None]]:
    """The arena's blocks: one for each transient value (shared where it is computed in place) and each scratch."""
    last_read = {root[v]: i for i, node in enumerate(nodes) for v in node.inputs}
    blocks: list[memory.Block] = []
    home: dict[Value, memory.Block] = {}
    own_scratch: list[memory.Block | None] = []
    for i, node in enumerate(nodes):
        for o, value in enumerate(node.outputs):
            if value in graph.places:
                continue
            last = max(i, last_read.get(value, i))
            victim = _victim(graph, node, o, i, root, home) if options.inplace else None
            if victim is not None:
                home[value] = victim
                victim.last = max(victim.last, last)
                continue
            home[value] = memory.Block(value.spec.nbytes, i, last, value.label)
            blocks.append(home[value])
        own_scratch.append(memory.Block(scratch[i], i, i, f"{node.layer}.scratch") if scratch[i] else None)
        if own_scratch[-1]:
            blocks.append(own_scratch[-1])
    if options.parallel:
        _keep_side_branches_apart(nodes, blocks, options)
    return blocks, home, own_scratch


def _victim(
    graph: Graph,
    node: Node,
    output: int,
    position: int,
    root: dict[Value, Value],
    home: dict[Value, memory.Block],
) -> memory.Block | None:
    """The block of an operand that this output may overwrite: one that nobody reads later, or elsewhere in this call."""
    taken = {home[v] for v in node.outputs[:output] if v in home}
    origins = [root[v] for v in node.inputs]
    allowed = {i for o, i in node.op.inplace() if o == output}
    for i in sorted(allowed):
        origin = origins[i]
        if origin in graph.places:
            continue
        if any(other is origin and j not in allowed for j, other in enumerate(origins)):
            continue
        block = home[origin]
        if block not in taken and block.last == position and block.nbytes == node.outputs[output].spec.nbytes:
            return block
    return None


def _keep_side_branches_apart(nodes: Sequence[Node], blocks: Sequence[memory.Block], options: Options) -> None:
    """Small blocks that end with a side call live one chain call longer, so that the chain need not wait for it."""
    following = len(nodes) - 1
    next_chain = [following] * len(nodes)
    for i in range(len(nodes) - 1, -1, -1):
        next_chain[i] = following
        if not nodes[i].op.side_branch:
            following = i
    for block in blocks:
        if block.nbytes < options.slack_bytes and nodes[block.last].op.side_branch:
            block.last = next_chain[block.last]


def check_memory(plan: Plan, available: int | None, smaller: Callable[[int], Plan]) -> None:
    """Raise OutOfMemoryError when the plan needs more than `available` bytes, with the largest batch that fits.

    `smaller(batch)` builds the same plan for another batch.
    """
    if available is None or plan.peak_bytes <= available:
        return

    def fits(batch: int) -> bool:
        try:
            return smaller(batch).peak_bytes <= available
        except ShapeError:  # batch norm cannot train on a single value
            return False

    low, high = 0, plan.batch
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    label, nbytes = plan.largest
    raise OutOfMemoryError(
        f"a {plan.mode} step with batch {plan.batch} does not fit into memory",
        where=label.rpartition(".")[0] or plan.program.name,
        expected=f"at most {available / 2**20:.1f} MiB",
        got=f"{plan.peak_bytes / 2**20:.1f} MiB; the largest tensor, {label}, takes {nbytes / 2**20:.1f} MiB",
        remedy=f"use batch {low} or less" if low else "use smaller images or a smaller network: not even batch 1 fits",
    )
