"""A second device for machines without a GPU: ``pretend``, whose tensors a CPU holds. Mixing devices is an error there,
as on a GPU: torch's own dispatch leads to :func:`_run`, which computes on the CPU's tensors behind.

Views have strides of their own only behind, so what is written into them is lost to autograd. Complex numbers have no
kernels there.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
BEHIND: dict[int, Tensor] = {}  # the CPU's tensor behind each, by storage: aliases share it


def there(here: Tensor) -> Tensor:
    """The tensor of the pretended device before one of a CPU."""
    tensor = torch._C._acc.create_empty_tensor(here.shape, here.dtype)
    storage = tensor.untyped_storage()
    BEHIND[storage._cdata] = here
    weakref.finalize(storage, BEHIND.pop, storage._cdata, None)
    return tensor


def behind(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, Tensor) and value.device.type == NAME:
        return BEHIND[value.untyped_storage()._cdata]
    return value


def _check(op: Any, tensors: list[Tensor]) -> None:
    """As CUDA's kernels do: others may be numbers, or indices."""
    free = tensors[1:] if op._schema.name in INDEXED else []
    for tensor in tensors:
        if tensor.device.type != NAME and tensor.ndim > 0 and not any(tensor is t for t in free):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {op} found cpu and {NAME}.")


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
    return torch.ops.aten.convolution_backward(grad, x, weight, [grad.shape[1]], *rest)


STAND_INS: dict[str, Any] = {
    "aten::view": torch.ops.aten.reshape,  # our strides are those of new tensors
    "aten::convolution_overrideable": torch.ops.aten.convolution,
    "aten::convolution_backward_overrideable": _convolution_backward,
}
# These have kernels for every device, which look at strides or raise.
OWN = (
    "expand", "permute", "transpose.int", "select.int", "slice.Tensor", "unsqueeze", "squeeze", "squeeze.dim",
    "squeeze.dims", "t", "split.Tensor", "split_with_sizes", "unbind.int", "diagonal", "unfold", "view.dtype",
    "squeeze_", "squeeze_.dim", "unsqueeze_", "transpose_", "t_",
    "view_as_real", "view_as_complex",
    "convolution_overrideable", "convolution_backward_overrideable",
)  # fmt: skip


def _wrapped(op: Any, values: tuple[Any, ...]) -> list[Any]:
    """Numbers that stand for tensors, as tensors."""
    kinds = [str(argument.type) for argument in op._schema.arguments]
    return [
        torch.tensor(v) if k == "Tensor" and not isinstance(v, Tensor) else v
        for v, k in zip(values, kinds, strict=False)
    ]


def _run(op: Any, *args: Any, **options: Any) -> Any:
    flat, form = tree_flatten((args, options))
    tensors = [v for v in flat if isinstance(v, Tensor)]
    here, given = tree_unflatten([behind(v) for v in flat], form)
    if op._schema.name == "aten::_copy_from":
        here[1].copy_(here[0])
        return args[1]
    _check(op, tensors)
    found = STAND_INS.get(op._schema.name, op)(*_wrapped(op, here), **given)
    written = {id(behind(v)): v for v in tensors}  # in place, or into out=

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in written:
            return there(value)
        same = written[id(value)]
        if same.shape != value.shape:  # out= was empty
            same.data = there(value)
        return same

    return tree_map(back, found)


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
_library, _aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_library.fallback(_run, "PrivateUse1")
for _name in OWN:
    _packet, _, _overload = _name.partition(".")
    _op = getattr(getattr(torch.ops.aten, _packet), _overload or "default")
    _aten.impl(_name, partial(_run, _op), "PrivateUse1")
