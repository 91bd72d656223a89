"""Measuring every variant of a model's kernels: which one the tables should name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from parcnn.bench.layer import CONV, FUSED, LAYERS
from parcnn.bench.layers import Subject, of_layers, of_model
from parcnn.bench.repeated import RepeatedCalls, time_in_turn
from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.launch import Kernel
from parcnn.cuda.tuning import Choice, Tuning, problem_key
from parcnn.ops.base import Spec
from parcnn.ops.program import Call, Slot

LEAST_GAIN = 1.03  # below it the default stays: the times of one kernel differ by as much
MOST_OF_OTHERS = 3  # variants of a family that does not run by default: the best by its own rule
MOST_OF_MANY = 8  # variants of the family that does, where there are many problems: a table that ships, random ones
NEAR = 1.1  # how many times the best first time a variant may take to be timed again
# Training steps whose problems a table that ships has, beside the layers of `parcnn bench layers`: model, batch, image.
SHIPPED_STEPS = (
    *(("lenet5", batch, (1, 28, 28)) for batch in (64, 512, 4096)),
    ("cifarnet", 512, (3, 32, 32)),
)
_FIRST_SECONDS, _FINAL_REPEATS, _MOST_FINALISTS = 0.003, 7, 3


@dataclass(frozen=True)
class Measured:
    """One problem: the variant that runs by default, the best one (perhaps the same), their times, and how many there are."""

    key: str
    default: Choice
    default_us: float
    best: Choice
    best_us: float
    count: int

    @property
    def gain(self) -> float:
        """How many times as fast the best is."""
        return self.default_us / self.best_us


def problems(subjects: Sequence[Subject]) -> list[Call]:
    """The calls of subjects, each problem once."""
    calls = {problem_key(call.op, call.input_specs): call for subject in subjects for call in subject.calls}
    return list(calls.values())


def of_shipped(executor: CudaExecutor, say: Callable[[str], None]) -> list[Subject]:
    """What a table that ships is measured for, in bf16."""
    steps = (of_model(executor, model, sample, batch, "bf16") for model, batch, sample in SHIPPED_STEPS)
    return [
        *of_layers(executor, LAYERS, "bf16", say, (*CONV, *FUSED)),
        *(subject for step in steps for subject in step),
    ]


def stale(executor: CudaExecutor, choices: Mapping[str, Choice], calls: Sequence[Call]) -> list[str]:
    """What is wrong with a table for these calls: entries of other problems, and of variants that there are no longer."""
    known = {problem_key(call.op, call.input_specs): call for call in calls}
    wrong = []
    for key, choice in choices.items():
        call = known.get(key)
        if call is None:
            wrong.append(f"{key}: not a problem that the table is measured for")
        elif choice not in executor.choices(call.op, call.input_specs, call.output_specs):
            wrong.append(f"{key}: there is no variant '{choice}'")
    return wrong


def run(
    executor: CudaExecutor, calls: Sequence[Call], say: Callable[[str], None], most: int | None = None
) -> Iterator[Measured]:
    """Measure the variants of each call that has several; the default is what runs without a table of the user's.

    The `most` first ones (None: all) of the default's family, the best few of others. Each is timed once and briefly; where
    one is faster, those near the best, and the default, again and in turns under load: so that none is taken for a moment's
    luck. Leaves the executor with its tables.
    """
    usual, base = executor.tuning, Tuning(executor.tuning.shipped)
    executor.tuning = base
    try:
        wanted = [(call, _worth_a_try(executor, call, most)) for call in calls]
        wanted = [(call, choices) for call, choices in wanted if len(choices) > 1]
        executor.compile([k for call, choices in wanted for c in choices for k in _kernels(executor, base, call, c)])
        for i, (call, choices) in enumerate(wanted, 1):
            found = _measure(executor, base, call, choices)
            say(f"  {i}/{len(wanted)} {found.key}: {found.best_us:.1f} us, {found.gain:.2f}x the default")
            yield found
    finally:
        executor.tuning = usual


def table(measured: Sequence[Measured], old: dict[str, Choice]) -> dict[str, Choice]:
    """What a table should say: of measured problems the best where it is no default, of others what it said."""
    kept = {key: choice for key, choice in old.items() if key not in {each.key for each in measured}}
    return kept | {each.key: each.best for each in measured if each.best != each.default}


def _worth_a_try(executor: CudaExecutor, call: Call, most: int | None) -> list[Choice]:
    """The default first, then its family's variants, and a few of each other's."""
    choices = executor.choices(call.op, call.input_specs, call.output_specs)
    own = [choice for choice in choices if choice.family == choices[0].family][:most]
    for family in dict.fromkeys(choice.family for choice in choices if choice.family != choices[0].family):
        own += [choice for choice in choices if choice.family == family][:MOST_OF_OTHERS]
    return own


def _measure(executor: CudaExecutor, base: Tuning, call: Call, choices: Sequence[Choice]) -> Measured:
    key = problem_key(call.op, call.input_specs)
    scratch = 0
    for choice in choices:
        executor.tuning = _naming(base, key, choice)
        scratch = max(scratch, executor.workspace_bytes(call.op, call.input_specs, call.output_specs))
    operands = RepeatedCalls(executor, [call], scratch)

    runs: dict[Choice, Callable[[int], None]] = {}
    first: dict[Choice, float] = {}
    for choice in choices:
        executor.tuning = _naming(base, key, choice)
        runs[choice] = operands.load()
        (took,) = time_in_turn([runs[choice]], executor.synchronize, 1, _FIRST_SECONDS)
        first[choice] = took.p50_us
    default, limit = choices[0], min(first[choices[0]], NEAR * min(first.values()))
    near = [choice for choice in sorted(first, key=first.__getitem__) if first[choice] < limit]
    finalists = [default, *near[:_MOST_FINALISTS]]
    timings = time_in_turn([runs[choice] for choice in finalists], executor.synchronize, _FINAL_REPEATS if near else 1)
    final = {choice: timing.of(operands.count).p50_us for choice, timing in zip(finalists, timings, strict=True)}
    operands.free()
    best = min(final, key=final.__getitem__)
    if final[default] < LEAST_GAIN * final[best]:
        best = default
    return Measured(key, default, final[default], best, final[best], len(choices))


def _kernels(executor: CudaExecutor, base: Tuning, call: Call, choice: Choice) -> list[Kernel]:
    executor.tuning = _naming(base, problem_key(call.op, call.input_specs), choice)
    nbytes = executor.workspace_bytes(call.op, call.input_specs, call.output_specs)
    return executor.kernels(replace(call, workspace=Slot(Spec((nbytes,), "u8"), "arena") if nbytes else None))


def _naming(base: Tuning, key: str, choice: Choice) -> Tuning:
    """The tables with one choice of the user's."""
    return Tuning(base.shipped, {key: choice})
