"""The whole training step's gradients against numeric differentiation, and every switch of the plan against the others."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, event, given, settings

from parcnn.cpu import CpuExecutor
from parcnn.plan.options import Options
from tests.plan.networks import Problem, networks
from tests.plan.step import Step, check_gradients, step_of

# The same networks in every run: once in thousands a difference quotient lies across the kink of a ReLU or a maximum.
CALM = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
PLAIN = Options(fuse=False, reuse=False, inplace=False, parallel=False, graph=False)
# The default, each switch on its own turned round, and each threshold at its ends.
SWITCHES = {
    "default": Options(),
    "plain": PLAIN,
    "no fuse": Options(fuse=False),
    "no reuse": Options(reuse=False),
    "no inplace": Options(inplace=False),
    "one stream": Options(parallel=False),
    "no graph": Options(graph=False),
    "update at once": Options(update_bytes=0),
    "many streams": Options(side_streams=5),
    "all layers large": Options(slack_bytes=0),
    "large and at once": Options(slack_bytes=0, update_bytes=0),
}


def _step(cpu: CpuExecutor, problem: Problem, options: Options) -> Step:
    return step_of(cpu, problem.model, problem.images, problem.targets, loss=problem.loss, options=options)


@CALM
@given(problem=networks())
def test_gradients_are_the_loss_derivatives(cpu: CpuExecutor, problem: Problem) -> None:
    step = _step(cpu, problem, Options())
    for call in step.plan.program.calls:
        event(call.op.name)
    check_gradients(step, problem.model)


@settings(CALM, max_examples=50)
@given(problem=networks())
def test_switches_change_no_result(cpu: CpuExecutor, problem: Problem) -> None:
    """All that only moves memory and order gives the same bits; fusion may round otherwise."""
    results = {name: _step(cpu, problem, options).gradients() for name, options in SWITCHES.items()}
    for name, options in SWITCHES.items():
        twin = "default" if options.fuse else "no fuse"
        loss, moved = results[name]
        assert loss == results[twin][0], name
        for weight, array in moved.items():
            np.testing.assert_array_equal(array, results[twin][1][weight], err_msg=f"{name}: {weight}")
    loss, moved = results["default"]
    np.testing.assert_allclose(loss, results["plain"][0], rtol=1e-12)
    for weight, array in moved.items():
        scale = np.abs(array).max(initial=1e-3)
        np.testing.assert_allclose(array, results["plain"][1][weight], rtol=1e-9, atol=1e-12 * scale, err_msg=weight)
