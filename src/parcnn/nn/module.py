"""Module, Parameter and Buffer: torch.nn's way to write a network. They describe; the plan and the executors compute."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from parcnn.errors import ArgumentError, CheckpointError, UnsupportedError
from parcnn.plan.trace import Tensor
from parcnn.plan.variable import Variable


class Parameter(Variable):
    """A trained tensor in torch's layout, e.g. KCRS for a filter."""

    def __init__(self, data: np.ndarray, requires_grad: bool = True) -> None:
        super().__init__(data, requires_grad)


class Buffer(Variable):
    """A tensor that is saved but not trained: a running mean."""

    def __init__(self, data: np.ndarray) -> None:
        super().__init__(data, requires_grad=False)


class Module:
    """Base of all layers and networks. Subclasses assign layers and parameters in __init__ and compute in forward().

    forward() runs once for each kind of plan, and once more before the first, on symbolic tensors
    (`parcnn.plan.trace.Tensor`).
    """

    training: bool
    _modules: dict[str, Module]
    _variables: dict[str, Variable | None]

    def __init__(self) -> None:
        self.__dict__.update(training=True, _modules={}, _variables={})

    def __setattr__(self, name: str, value: Any) -> None:
        if "_modules" not in self.__dict__:
            if isinstance(value, Module | Variable):
                raise AttributeError(
                    f"{type(self).__name__}.__init__ must call super().__init__() before assigning {name}"
                )
        elif isinstance(value, Module):
            self._variables.pop(name, None)
            self._modules[name] = value
        elif isinstance(value, Variable):
            self._modules.pop(name, None)
            self._variables[name] = value
        elif name in self._variables or name in self._modules:
            self._replace(name, value)
        object.__setattr__(self, name, value)

    def _replace(self, name: str, value: Any) -> None:
        """Take what `name` was out of the model: None may stand for a parameter or a module, other values may not."""
        if value is not None:
            kind = "module" if name in self._modules else "tensor"
            raise ArgumentError(
                f"a {kind} of the model would be lost",
                where=f"{type(self).__name__}.{name}",
                expected="a Module or None" if kind == "module" else "a Parameter, a Buffer or None",
                got=type(value).__name__,
                remedy=f"delete {name} first" if kind == "module" else f"change its values by {name}.assign(array)",
            )
        self._modules.pop(name, None)
        if name in self._variables:
            self._variables[name] = None

    def __delattr__(self, name: str) -> None:
        self._modules.pop(name, None)
        self._variables.pop(name, None)
        object.__delattr__(self, name)

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Add a parameter under `name`; None marks it as absent."""
        self._variables[name] = param
        object.__setattr__(self, name, param)

    def register_buffer(self, name: str, tensor: np.ndarray | None) -> None:
        """Add a buffer under `name`."""
        buffer = None if tensor is None else Buffer(np.asarray(tensor))
        self._variables[name] = buffer
        object.__setattr__(self, name, buffer)

    def add_module(self, name: str, module: Module) -> None:
        """Add a child module under `name`."""
        setattr(self, name, module)

    def forward(self, *args: Any, **keywords: Any) -> Any:
        """Compute the output; every subclass writes its own."""
        raise NotImplementedError(f"{type(self).__name__} has no forward()")

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        given = (*args, *keywords.values())
        tensor = next((a for a in _flat(given) if isinstance(a, Tensor)), None)
        if tensor is None:
            raise UnsupportedError(
                "a module was called on something that is not a tensor of a plan",
                where=type(self).__name__,
                expected="a tensor of forward()",
                got=", ".join(type(a).__name__ for a in given) or "nothing",
                remedy="parcnn.predict(model, array) runs a model on a NumPy array",
            )
        with tensor.trace.inside(self):
            return self.forward(*args, **keywords)

    # -- walking ------------------------------------------------------------------------------------------------

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Direct children and their names."""
        yield from self._modules.items()

    def children(self) -> Iterator[Module]:
        """Direct children."""
        yield from self._modules.values()

    def named_modules(self, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Module]]:
        """This module and all below it, with their dotted paths; each module once."""
        seen = set() if seen is None else seen
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        for name, child in self._modules.items():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name, seen)

    def modules(self) -> Iterator[Module]:
        """This module and all below it."""
        for _, module in self.named_modules():
            yield module

    def named_variables(self, prefix: str = "") -> Iterator[tuple[str, Variable]]:
        """Parameters and buffers under torch's state_dict keys, each key once (what is shared has several keys)."""
        for name, variable in self._variables.items():
            if variable is not None:
                yield prefix + name, variable
        for name, child in self._modules.items():
            yield from child.named_variables(f"{prefix}{name}.")

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Parameters and their keys, a shared one once."""
        seen: set[int] = set()
        for name, variable in self.named_variables():
            if isinstance(variable, Parameter) and id(variable) not in seen:
                seen.add(id(variable))
                yield name, variable

    def parameters(self) -> Iterator[Parameter]:
        """Parameters, a shared one once."""
        for _, parameter in self.named_parameters():
            yield parameter

    # -- state --------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Module:
        """Training behaviour (dropout, batch statistics) for this module and all below it."""
        for module in self.modules():
            module.__dict__["training"] = mode
        return self

    def eval(self) -> Module:
        """Inference behaviour."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Module:
        """Train (or freeze) all parameters."""
        for parameter in self.parameters():
            parameter.requires_grad = requires_grad
        return self

    def state_dict(self) -> OrderedDict[str, np.ndarray]:
        """Copies of parameters and buffers under torch's keys and in torch's layout."""
        return OrderedDict((name, variable.data.copy()) for name, variable in self.named_variables())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Take values from a state_dict of this model or of torch's equivalent (tensors are converted).

        Raises CheckpointError, changing nothing, when a key is missing or unknown (`strict`) or a shape differs.
        """
        own = dict(self.named_variables())
        if strict and (differing := differing_keys(own, state_dict)):
            raise CheckpointError(
                "the state does not belong to this model",
                where=type(self).__name__,
                expected=f"its {len(own)} keys",
                got=differing,
                remedy="build the model with the arguments it was saved with, or pass strict=False",
            )
        arrays = {name: _as_array(state_dict[name]) for name in own if name in state_dict}
        for name, array in arrays.items():
            if array.shape != own[name].shape or array.dtype.kind not in "fiub":
                raise CheckpointError(
                    "a tensor of another shape or type",
                    where=name,
                    expected=f"{own[name].shape} numbers",
                    got=f"{array.shape} {array.dtype}",
                    remedy="build the model with the arguments it was saved with",
                )
        for name, array in arrays.items():
            own[name].assign(array)

    def extra_repr(self) -> str:
        """Arguments shown by repr()."""
        return ""

    def __repr__(self) -> str:
        lines = [f"  ({name}): " + repr(child).replace("\n", "\n  ") for name, child in self._modules.items()]
        if not lines:
            return f"{type(self).__name__}({self.extra_repr()})"
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])


def _flat(args: tuple[Any, ...]) -> Iterator[Any]:
    for a in args:
        if isinstance(a, list | tuple):
            yield from _flat(tuple(a))
        else:
            yield a


def differing_keys(own: Collection[str], given: Collection[str]) -> str:
    """Which keys of a model are missing, and which are unknown to it, the first of many; '' where they agree."""
    parts = []
    for what, keys in (("missing", set(own) - set(given)), ("unknown", set(given) - set(own))):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            parts.append(f"{what} {sorted(keys)[:3]}{more}")
    return "; ".join(parts)


def _as_array(value: Any) -> np.ndarray:
    """A NumPy array of an array, or of a torch tensor on any device."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value)


class Sequential(Module):
    """Layers one after the other; takes modules, or one OrderedDict of them."""

    def __init__(self, *args: Any) -> None:
        super().__init__()
        items = args[0].items() if len(args) == 1 and isinstance(args[0], Mapping) else enumerate(args)
        for name, module in items:
            self.add_module(str(name), module)

    def forward(self, x: Any) -> Any:
        for module in self._modules.values():
            x = module(x)
        return x

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self._modules.values())

    def __getitem__(self, index: int | slice) -> Module:
        if isinstance(index, slice):  # names are kept, so that a slice has the keys of the whole
            return Sequential(OrderedDict(list(self._modules.items())[index]))
        return list(self._modules.values())[index]


class ModuleList(Module):
    """A list of modules that forward() goes through itself."""

    def __init__(self, modules: Any = ()) -> None:
        super().__init__()
        for module in modules:
            self.append(module)

    def append(self, module: Module) -> ModuleList:
        """Add a module at the end."""
        self.add_module(str(len(self._modules)), module)
        return self

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self._modules.values())

    def __getitem__(self, index: int | slice) -> Module:
        layers = list(self._modules.values())
        return ModuleList(layers[index]) if isinstance(index, slice) else layers[index]
