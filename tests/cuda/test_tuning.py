"""Tables of measured kernels: what they choose, whose word goes first, and what a damaged one is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parcnn.cuda import tuning
from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY
from parcnn.cuda.launch import Device
from parcnn.cuda.tuning import Choice, Tuning, problem_key
from parcnn.errors import TuningError
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.pointwise import Act
from parcnn.ops.program import Call, Slot
from tests.op_runner import run_op

H200 = Device("NVIDIA H200", "sm_90a", 132)
OP = ConvWgrad(pad=(1, 1, 1, 1), filter=(3, 3), bias=True)
INPUTS = (Spec((4, 9, 9, 8)), Spec((4, 9, 9, 16)))
KEY = "conv_wgrad pad=(1, 1, 1, 1) filter=(3, 3) bias=True f32[4,9,9,8] f32[4,9,9,16]"
PROBLEMS: list[tuple[Op, tuple[Spec, ...]]] = [
    (OP, INPUTS),
    (ConvFprop(pad=(1, 1, 1, 1), pool="max", act="relu"), (Spec((64, 28, 28, 1)), Spec((6, 3, 3, 1)))),
    (ConvFprop(), (Spec((64, 14, 14, 128), "bf16"), Spec((256, 3, 3, 128), "bf16"))),
    (ConvDgrad(pad=(1, 1, 1, 1), image=(14, 14)), (Spec((64, 14, 14, 64), "bf16"), Spec((64, 3, 3, 64), "bf16"))),
    (ConvWgrad(filter=(3, 3)), (Spec((64, 14, 14, 64), "bf16"), Spec((64, 12, 12, 64), "bf16"))),
    (ConvFprop(groups=4), (Spec((64, 14, 14, 64), "bf16"), Spec((64, 3, 3, 16), "bf16"))),
    (ConvFprop(groups=32), (Spec((64, 14, 14, 32), "bf16"), Spec((32, 3, 3, 1), "bf16"))),
    (ConvWgrad(filter=(3, 3), groups=32), (Spec((64, 14, 14, 32), "bf16"), Spec((64, 12, 12, 32), "bf16"))),
    (ConvWgrad(filter=(7, 7), stride=(2, 2)), (Spec((8, 31, 31, 3), "bf16"), Spec((8, 13, 13, 64), "bf16"))),
    (ConvDgrad(stride=(2, 2), image=(15, 15)), (Spec((9, 7, 7, 72), "bf16"), Spec((72, 3, 3, 20), "bf16"))),
]


def other_choice(executor: CudaExecutor, op: Op, inputs: tuple[Spec, ...]) -> Choice:
    """One that is not the default."""
    return executor.choices(op, inputs, op.infer(*inputs))[-1]


def test_a_key_has_what_is_not_a_default_and_the_operands() -> None:
    assert problem_key(OP, INPUTS) == KEY
    assert problem_key(ConvFprop(), (Spec((1, 2, 3, 4), "bf16"),)) == "conv_fprop bf16[1,2,3,4]"


@pytest.mark.parametrize(("op", "inputs"), PROBLEMS, ids=lambda v: getattr(v, "name", None))
def test_every_candidate_can_be_chosen_by_its_name(null: CudaExecutor, op: Op, inputs: tuple[Spec, ...]) -> None:
    """Each name is one variant's own; what runs, and its scratch memory, are that variant's."""
    outputs = op.infer(*inputs)
    places = Call(op, tuple(Slot(s, "arena") for s in inputs), tuple(Slot(s, "arena") for s in outputs))
    count = 0
    for family, launcher in null.registry.tunable(op, inputs).items():
        for variant in launcher.candidates(places, null.device):
            null.tuning = Tuning(user={problem_key(op, inputs): Choice(family, str(variant))})
            scratch = launcher.workspace_bytes(op, inputs, outputs, null.device, variant=variant)
            assert null.workspace_bytes(op, inputs, outputs) == scratch
            assert null.choices(op, inputs, outputs)[0] == Choice(family, str(variant))
            call = replace(places, workspace=Slot(Spec((scratch,), "u8"), "arena") if scratch else None)
            wanted = launcher.launches(call, null.device, variant=variant)
            labels = null.kernel_name(op, inputs, outputs)
            assert labels == " + ".join(dict.fromkeys(launch.kernel.label for launch in wanted))
            count += 1
    assert count == len(null.choices(op, inputs, outputs)) > 1


def test_the_chosen_variant_is_what_runs(null: CudaExecutor) -> None:
    """Through load and run, in the scratch memory that the plan asked for."""
    random = np.random.default_rng(0)
    operands = [random.standard_normal(s.shape, np.float32) for s in INPUTS]
    scratch = set()
    for choice in null.choices(OP, INPUTS, OP.infer(*INPUTS)):
        null.tuning = Tuning(user={KEY: choice})
        scratch.add(null.workspace_bytes(OP, INPUTS, OP.infer(*INPUTS)))
        run_op(null, OP, operands)
    assert len(scratch) > 2


def test_the_users_table_goes_before_the_shipped_one_and_that_before_the_rule(null: CudaExecutor) -> None:
    null.tuning = Tuning()
    default, first, *_, last = null.choices(OP, INPUTS, OP.infer(*INPUTS))

    def chosen(**tables: dict[str, Choice]) -> Choice:
        null.tuning = Tuning(**tables)
        return null.choices(OP, INPUTS, OP.infer(*INPUTS))[0]

    assert chosen() == default
    assert chosen(shipped={KEY: first}) == first
    assert chosen(shipped={KEY: first}, user={KEY: last}) == last
    assert chosen(shipped={"another": first}, user={"yet another": last}) == default


def test_a_variant_that_is_gone(null: CudaExecutor) -> None:
    """The user's is an error with its remedy; of the shipped table it leaves the choice to the rule."""
    null.tuning = Tuning()
    names = [null.kernel_name(OP, INPUTS, OP.infer(*INPUTS))]
    for gone in (Choice("conv_wgrad", "no such tile"), Choice("no_such_family", "8x8")):
        null.tuning = Tuning(shipped={KEY: gone})
        names.append(null.kernel_name(OP, INPUTS, OP.infer(*INPUTS)))
        null.tuning = Tuning(user={KEY: gone}, path=Path("tuned/sm_90a-132.json"))
        for ask in (null.workspace_bytes, null.kernel_name):
            with pytest.raises(TuningError, match=r"sm_90a-132\.json.*(?s:.)*parcnn tune"):
                ask(OP, INPUTS, OP.infer(*INPUTS))
    assert len(set(names)) == 1


def test_ops_without_variants_have_no_choices(null: CudaExecutor) -> None:
    specs = (Spec((3, 5)),)
    assert null.choices(Act("relu"), specs, specs) == []


def test_the_digest_names_what_is_said_not_where(null: CudaExecutor) -> None:
    a, b = Choice("conv_wgrad", "a"), Choice("conv_wgrad", "b")
    assert Tuning().digest == ""
    assert Tuning(shipped={"x": a, "y": b}).digest == Tuning(shipped={"y": b}, user={"x": a}).digest
    assert Tuning(shipped={"x": a, "y": b}).digest == Tuning(shipped={"x": b, "y": b}, user={"x": a}).digest
    assert len({Tuning(shipped={"x": a}).digest, Tuning(shipped={"x": b}).digest, Tuning(shipped={"y": a}).digest}) == 3
    null.tuning = Tuning(user={"x": a})
    assert null.tuning_digest == null.tuning.digest


def test_tables_are_kept(tmp_path: Path) -> None:
    choices = {KEY: Choice("conv_wgrad", "64x64x16/8x4/1/4 in 12"), "b": Choice("conv_sm90", "tap 1x1x256 128 8/8")}
    path = tmp_path / "deep" / tuning.file_name(H200)
    tuning.write(path, H200, choices)
    assert tuning.read(path, H200) == choices
    assert Tuning.of(H200, path.parent).user == choices
    assert Tuning.of(H200, path.parent).path == path
    assert Tuning.of(replace(H200, sm_count=114), path.parent).user == {}
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no part of a file is left"


def test_a_failed_write_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    tuning.write(path, H200, {KEY: Choice("a", "b")})

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(TuningError, match=r"table\.json: the table cannot be written \(No space"):
        tuning.write(path, H200, {})
    assert tuning.read(path, H200) == {KEY: Choice("a", "b")}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def remove_format(content: dict) -> None:
    del content["format"]


def older_format(content: dict) -> None:
    content["format"] = "parcnn-tuning-0"


def no_variant(content: dict) -> None:
    content["choices"][KEY] = "conv_wgrad"


def no_text(content: dict) -> None:
    content["choices"][KEY] = 3


def other_gpu(content: dict) -> None:
    content["gpu"]["sm_count"] = 108


@pytest.mark.parametrize("spoil", [remove_format, older_format, no_variant, no_text, other_gpu])
def test_a_damaged_table_is_named_with_the_remedy(tmp_path: Path, spoil: Callable[[dict], None]) -> None:
    path = tmp_path / tuning.file_name(H200)
    tuning.write(path, H200, {KEY: Choice("conv_wgrad", "a")})
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(TuningError, match=r"sm_90a-132\.json(?s:.)*remedy:.*remove the file"):
        Tuning.of(H200, tmp_path)


@pytest.mark.parametrize("data", [b"", b'{"format": "parcnn-tun', b"[]", b"\xff\xfe", b"9" * 5000, b"[" * 100_000])
def test_a_truncated_table_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / tuning.file_name(H200)
    path.write_bytes(data)
    with pytest.raises(TuningError, match=r"sm_90a-132\.json"):
        Tuning.of(H200, tmp_path)


def test_a_machine_without_a_gpu_reads_no_table_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tuning.user_folder() == tmp_path / "parcnn" / "tuned"
    tuning.write(tuning.user_folder() / tuning.file_name(H200), H200, {KEY: Choice("conv_wgrad", "a")})
    executor = CudaExecutor.null()
    assert executor.tuning.user == {}
    executor.close()


@pytest.mark.parametrize("path", sorted(tuning.SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_what_ships_names_kernels_that_there_are(path: Path) -> None:
    arch, _, sm_count = path.stem.rpartition("-")
    device = Device("", arch, int(sm_count))
    registry = REGISTRY.on(arch)
    for key, choice in tuning.read(path, device).items():
        op, inputs = parse_key(key)
        launcher = registry.tunable(op, inputs)[choice.family]
        outputs = tuple(Slot(s, "arena") for s in op.infer(*inputs))
        call = Call(op, tuple(Slot(s, "arena") for s in inputs), outputs)
        assert choice.variant in map(str, launcher.candidates(call, device)), f"{key}: {choice} is gone"


def parse_key(key: str) -> tuple[Op, tuple[Spec, ...]]:
    """The way back from `problem_key`, of convolutions."""
    ops = {"conv_fprop": ConvFprop, "conv_dgrad": ConvDgrad, "conv_wgrad": ConvWgrad}
    name, _, rest = key.partition(" ")
    attributes, specs = {}, []
    while rest:
        if "[" in rest.partition(" ")[0] and "=" not in rest.partition(" ")[0]:
            token, _, rest = rest.partition(" ")
            dtype, _, shape = token[:-1].partition("[")
            specs.append(Spec(tuple(map(int, shape.split(","))), dtype))
        else:
            field, _, rest = rest.partition("=")
            end = rest.index(")") + 1 if rest.startswith("(") else rest.index(" ")
            literal = rest[:end]
            attributes[field] = (
                tuple(map(int, literal[1:-1].split(","))) if literal.startswith("(")
                else literal.strip("'") if literal.startswith("'")
                else {"True": True, "False": False}.get(literal, literal if not literal.isdigit() else int(literal))
            )  # fmt: skip
            rest = rest[end:].lstrip()
    return ops[name](**attributes), tuple(specs)


def test_keys_can_be_read_back() -> None:
    for op, inputs in PROBLEMS:
        assert parse_key(problem_key(op, inputs)) == (op, inputs)
