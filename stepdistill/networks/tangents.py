r"""Forward derivatives beside a network's own pass: tensors that carry a tangent.

The derivative of a function along a direction follows each of its operations, of :math:`y = f(x)` as
:math:`\dot y = f'(x) \dot x` (Griewank & Walther 2008, Chapter 3). A :class:`Dual` is a tensor x with such a tangent:
every function of torch that sees one returns another. The value has its graph and the tangent has none. So a loss of a
network's output, to which the tangent is a constant, costs a forward, a tangent and a backward, in one pass. A tangent
is let go as soon as the next ones are known: no more activations are kept than those of the value.

The derivatives of the operations are torch's own (``torch.autograd.forward_ad``), except for kinds for which torch
multiplies by zeros or has no kernel:

- What is **linear** moves the tangent as it moves the value, :math:`\dot y = f(\dot x)`.
- So does a **layer**, without its bias: the weights have no tangent, and :math:`\dot y = W \dot x` is one product.
- A **normalisation** has a symmetric Jacobian before its weights, :math:`(I - \frac1n (1 1^T + \hat x \hat x^T)) /
  \sigma`, and an **activation** a diagonal one. So the forward derivative is the backward one, which is a kernel.
- **Attention** has its value from torch's fused kernel, and its tangent from plain attention: the fused ones have no
  forward derivative (pytorch#128971, #165530).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map, tree_map_only

Function = Callable[..., Any]
Rule = Callable[[Function, Sequence[Any], Mapping[str, Any]], Any]
"""Calls a function of torch with its arguments, one a :class:`Dual`, and returns duals."""


class Dual(Tensor):
    """A tensor, with its graph if it has one, and a tangent of the same shape, without any; see :func:`dual`."""

    tangent: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        others = *args[1:], *kwargs.values()
        if args and isinstance(args[0], Dual) and not any(isinstance(other, Dual) for other in others):
            rule = OF_ONE.get(func.__name__, by_torch)
        else:
            rule = OF_SEVERAL.get(func.__name__, by_torch)
        return rule(func, args, kwargs)


def dual(value: Tensor, tangent: Tensor) -> Dual:
    """Return a tensor with a tangent of the same shape and type."""
    with torch._C.DisableTorchFunctionSubclass():
        found = value.as_subclass(Dual)
        found.tangent = tangent.detach()
        return found


def value_of(tensor: Tensor) -> Tensor:
    """Return a tensor without its tangent."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def tangent_of(tensor: Tensor) -> Tensor:
    """Return the tangent of a tensor, zeros if it has none."""
    return tensor.tangent if isinstance(tensor, Dual) else torch.zeros_like(tensor)


# ------------------------------------------------------------------------------------------------------- rules


def by_torch(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Take the derivative from torch, whose own dual numbers live as long as this call."""
    if func.__name__.endswith("_") and not func.__name__.endswith("__"):
        return refuse(func, args, kwargs)
    with forward_ad.dual_level():
        return tree_map_only(Tensor, _ours, _with_torchs_duals(func, args, kwargs))


def linear(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Take the function of the tangent; the other arguments have none."""
    output = func(value_of(args[0]), *args[1:], **kwargs)
    with torch.no_grad():
        moved = func(args[0].tangent, *args[1:], **kwargs)
    return tree_map(_both, output, moved)


def additive(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Take the function of the tangents, if both operands or all parts of a list have one."""
    parts = args[0] if args and isinstance(args[0], (list, tuple)) else args[:2]
    if len(parts) < 2 or not all(isinstance(part, Dual) for part in parts):
        return by_torch(func, args, kwargs)
    output = func(*tree_map_only(Dual, value_of, args), **kwargs)
    with torch.no_grad():
        moved = func(*tree_map_only(Dual, tangent_of, args), **kwargs)
    return dual(output, moved)


def layer(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Dual:
    """Take the layer of the tangent without its bias."""

    def call(input: Dual, weight: Tensor, bias: Tensor | None = None, *others: Any, **options: Any) -> Dual:
        output = func(value_of(input), weight, bias, *others, **options)
        with torch.no_grad():
            moved = func(input.tangent, weight, None, *others, **options)
        return dual(output, moved)

    return call(*args, **kwargs)


def symmetric(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Dual:
    """Take the backward derivative, but where the input is written over."""
    if kwargs.get("inplace"):
        return by_torch(func, args, kwargs)
    value = value_of(args[0])
    return dual(func(value, *args[1:], **kwargs), _pulled(func, value, args[0].tangent, *args[1:], **kwargs))


def norm(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Dual:
    """Take the backward derivative of a group or layer norm without its weights, and then these."""

    def call(
        input: Dual, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, *others: Any, **eps: float
    ) -> Dual:
        value = value_of(input)
        output = func(value, shape, weight, bias, *others, **eps)
        moved = _pulled(func, value, input.tangent, shape, None, None, *others, **eps)
        if weight is not None:
            after = value.ndim - 2 if func.__name__ == "group_norm" else 0
            moved.mul_(weight.detach()[(...,) + after * (None,)])
        return dual(output, moved)

    return call(*args, **kwargs)


def attention(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Dual:
    """Take the tangent from plain attention, and both where it has dropout."""
    if any(args[4:5]) or kwargs.get("dropout_p"):
        return whole_attention(func, args, kwargs)
    with torch.no_grad():
        moved = tangent_of(whole_attention(func, args, kwargs))
    return dual(func(*tree_map_only(Dual, value_of, args), **tree_map_only(Dual, value_of, kwargs)), moved)


def whole_attention(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Take the derivative from torch, of a function with attention in it."""
    with sdpa_kernel(SDPBackend.MATH):
        return by_torch(func, args, kwargs)


def attribute(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return an attribute, such as the shape; a view, such as the transpose, with its tangent."""
    found = func(value_of(args[0]))
    return by_torch(func, args, kwargs) if isinstance(found, Tensor) else found


def write(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Dual:
    """Write a tangent where the last argument is written, zeros if it has none; what is written into becomes a dual."""
    target, *place, written = args
    if not isinstance(target, Dual):
        if target._base is not None:
            return refuse(func, args, kwargs)
        target.__class__, target.tangent = Dual, torch.zeros_like(target)
    is_tensor = isinstance(written, Tensor)
    func(value_of(target), *place, value_of(written) if is_tensor else written, **kwargs)
    with torch.no_grad():
        func(target.tangent, *place, tangent_of(written) if is_tensor else 0.0, **kwargs)
    return target


def refuse(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Raise ``NotImplementedError``: other views of a tensor that is written into would know no tangent."""
    del args, kwargs
    raise NotImplementedError(f"no forward derivative of {func.__name__}, which writes into a tensor.")


ATTENTION: dict[str, Rule] = {
    "scaled_dot_product_attention": attention,
    "multi_head_attention_forward": whole_attention,
}
WRITERS: dict[str, Rule] = {"__imul__": refuse, "__itruediv__": refuse}
WRITERS |= dict.fromkeys(("__setitem__", "__iadd__", "__isub__", "add_", "copy_", "sub_"), write)

OF_ONE: dict[str, Rule] = {
    **dict.fromkeys(("chunk", "clone", "contiguous", "div", "double", "expand", "flatten", "float"), linear),
    **dict.fromkeys(("__getitem__", "interpolate", "matmul", "mul", "permute", "repeat", "reshape", "split"), linear),
    **dict.fromkeys(("squeeze", "to", "transpose", "unflatten", "unsqueeze", "view"), linear),
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), layer),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), layer),
    **dict.fromkeys(("group_norm", "layer_norm"), norm),
    **dict.fromkeys(("gelu", "sigmoid", "silu", "tanh"), symmetric),
    "__get__": attribute,
    **ATTENTION,
    **WRITERS,
}
"""Rules where the first argument alone has a tangent, by the name of the function, which is the same in ``torch``,
``torch.nn.functional`` and as a method."""

OF_SEVERAL: dict[str, Rule] = {**dict.fromkeys(("add", "cat", "stack", "sub"), additive), **ATTENTION, **WRITERS}
"""Rules where any have one."""


# ----------------------------------------------------------------------------------------------- torch's duals


def _with_torchs_duals(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return func(*tree_map_only(Dual, _torchs, args), **tree_map_only(Dual, _torchs, kwargs))


def _torchs(tensor: Dual) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return forward_ad.make_dual(tensor, tensor.tangent)


def _ours(tensor: Tensor) -> Tensor:
    value, tangent = forward_ad.unpack_dual(tensor)
    return tensor if tangent is None else dual(value, tangent)


def _pulled(func: Function, value: Tensor, tangent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    with torch.enable_grad():
        point = value.detach().requires_grad_()
        return torch.autograd.grad(func(point, *args, **kwargs), point, tangent)[0]


def _both(value: Tensor, tangent: Tensor) -> Tensor:
    return dual(value, tangent) if value.is_floating_point() or value.is_complex() else value
