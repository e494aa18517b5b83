r"""Second derivatives of a loss as products with flat vectors: the Hessian and the generalised Gauss-Newton matrix.

A matrix of D × D entries is never formed. The Hessian times v is the gradient of (∇L · v); the Gauss-Newton matrix
G = Jᵀ H_z J, with J the Jacobian of the outputs z and H_z the Hessian of the loss in z, is three products in turn
(J v by differentiating Jᵀu in the dummy u). The graph of one evaluation is kept, so that every product belongs to the
same function: dropout masks and batches are drawn once. Where several losses are given (one per batch), their mean is
meant, and each is evaluated anew for every product, which keeps memory at one batch.

Near a minimum where the residuals vanish H = G. With piecewise linear activations H leaves out what happens at the
kinks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eckart.errors import InputError, NotFiniteError, problems

CPU = torch.device("cpu")
Loss = Callable[[], Tensor]
ModelLoss = Callable[[nn.Module], Tensor]
"""Takes the model to a scalar loss: ``lambda model: cross_entropy(model(x), y)``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Operator:
    """A symmetric matrix that is known by its products with vectors."""

    size: int
    """D: rows and columns."""
    matvec: Callable[[Tensor], Tensor]
    """(D,) → (D,), of the operator's dtype and device."""
    dtype: torch.dtype = torch.float64
    device: torch.device = CPU
    name: str = "operator"
    """What it is, in snake case: ``hessian``."""

    def dense(self) -> Tensor:
        """The matrix itself (size, size), column by column; for small sizes."""
        units = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return torch.stack([self.matvec(unit) for unit in units], dim=1)


def matrix_operator(A: Tensor, *, symmetric_to: float = 1e-6) -> Operator:
    """A symmetric matrix (n, n) as an operator. Raises InputError unless it is square, finite and symmetric.

    ``symmetric_to`` is the largest |A − Aᵀ| allowed, as a share of the largest |A|.
    """
    if A.ndim != 2 or A.shape[0] != A.shape[1] or A.shape[0] == 0 or not A.is_floating_point():
        raise InputError(f"matrix_operator: expected a square floating point matrix; got {tuple(A.shape)} {A.dtype}.")
    if not bool(torch.isfinite(A).all()):
        raise NotFiniteError("matrix_operator: the matrix has NaN or Inf.")
    if float((A - A.T).abs().max()) > symmetric_to * float(A.abs().max()):
        raise InputError(
            "matrix_operator: the matrix is not symmetric; use (A + Aᵀ)/2, or AᵀA for its singular values."
        )
    return Operator(size=A.shape[0], matvec=lambda v: A @ v, dtype=A.dtype, device=A.device, name="matrix")


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors laid end to end: (D,)."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(v: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """(D,) cut into the shapes of ``like``, in their order."""
    parts = torch.split(v, [t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]


def hessian_operator(loss: Loss | Sequence[Loss], parameters: Iterable[Tensor], *, name: str = "hessian") -> Operator:
    """∇²L over ``parameters`` laid end to end, as an operator.

    ``loss`` takes nothing and returns a scalar tensor computed from the parameters; of a sequence, the mean is meant.
    A parameter that the loss does not use has zero curvature. A product costs about two gradients. The graph of a
    single loss is kept in memory as long as the operator lives.

    Raises InputError for no parameters, parameters of several dtypes or devices or below float32, a loss that is not a
    scalar, does not depend on them or cannot be differentiated twice, and a loss of a sequence that changes from call
    to call; NotFiniteError for a loss or gradient that is NaN or Inf.
    """
    ps = _check_parameters(parameters, "hessian_operator")
    several = not callable(loss)
    losses: Sequence[Loss] = list(loss) if not callable(loss) else [loss]
    if not losses:
        raise InputError("hessian_operator: expected at least one loss; got an empty sequence.")
    gradients, value = _gradients(losses[0], ps)
    if several:
        again = float(_value(losses[0]).detach())
        if abs(again - value) > 1e-4 * max(abs(value), 1e-12):
            raise InputError(
                f"hessian_operator: the first loss changed from {value:.6g} to {again:.6g} between two calls. "
                "Call model.eval() and let each closure hold its batch."
            )

    def product(gradients: list[Tensor], v: Tensor, keep: bool) -> Tensor:
        used = [(g, part) for g, part in zip(gradients, unflatten(v, ps), strict=True) if g.requires_grad]
        if not used:  # the loss is linear in all of them
            return torch.zeros_like(v)
        try:
            out = torch.autograd.grad(
                [g for g, _ in used], ps, [part for _, part in used], retain_graph=keep, materialize_grads=True
            )
        except RuntimeError as error:
            raise _not_twice(error) from error
        return flatten(out)

    def matvec(v: Tensor) -> Tensor:
        if not several:
            return product(gradients, v, True).detach()
        total = torch.zeros_like(v)
        for one in losses:
            total += product(_gradients(one, ps)[0], v, False).detach()
        return total / len(losses)

    matvec(torch.zeros(sum(p.numel() for p in ps), dtype=ps[0].dtype, device=ps[0].device))  # fails now, not later
    return Operator(size=sum(p.numel() for p in ps), matvec=matvec, dtype=ps[0].dtype, device=ps[0].device, name=name)


def gauss_newton_operator(
    outputs: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor],
    parameters: Iterable[Tensor],
    *,
    name: str = "gauss_newton",
) -> Operator:
    """Jᵀ H_z J over ``parameters`` laid end to end: z = ``outputs()`` of any shape, ``loss(z)`` a scalar.

    Positive semidefinite where the loss is convex in z, as cross-entropy and squared errors are. A product costs about
    three gradients; the graph of one evaluation is kept. Raises what :func:`hessian_operator` raises.
    """
    ps = _check_parameters(parameters, "gauss_newton_operator")
    z = outputs()
    if not isinstance(z, Tensor) or not z.requires_grad:
        raise InputError(
            "gauss_newton_operator: the outputs do not depend on the parameters (a tensor with a gradient)."
        )
    free = z.detach().requires_grad_()
    gradients, _ = _gradients(lambda: loss(free), [free])
    dummy = torch.zeros_like(z, requires_grad=True)
    try:
        backward = torch.autograd.grad(z, ps, dummy, create_graph=True, materialize_grads=True)
    except RuntimeError as error:
        raise _not_twice(error) from error
    if not any(b.requires_grad for b in backward):
        raise InputError("gauss_newton_operator: the outputs do not depend on the parameters.")

    def matvec(v: Tensor) -> Tensor:
        used = [(b, part) for b, part in zip(backward, unflatten(v, ps), strict=True) if b.requires_grad]
        try:
            (forward,) = torch.autograd.grad([b for b, _ in used], dummy, [part for _, part in used], retain_graph=True)
            if not gradients[0].requires_grad:  # the loss is linear in its outputs
                return torch.zeros_like(v)
            (curved,) = torch.autograd.grad(gradients, free, forward, retain_graph=True, materialize_grads=True)
            return flatten(torch.autograd.grad(z, ps, curved, retain_graph=True, materialize_grads=True)).detach()
        except RuntimeError as error:
            raise _not_twice(error) from error

    matvec(torch.zeros(sum(p.numel() for p in ps), dtype=ps[0].dtype, device=ps[0].device))
    return Operator(size=sum(p.numel() for p in ps), matvec=matvec, dtype=ps[0].dtype, device=ps[0].device, name=name)


def prepared(model: nn.Module) -> tuple[nn.Module, list[nn.Parameter], tuple[str, ...]]:
    """(a copy of ``model``, its trainable parameters, what was done to it) for second derivatives.

    The copy keeps batch norm's running figures and gradients of the original untouched. Below float32 it is computed
    in float32: half precision has 3 to 4 digits, and a Hessian is a difference of gradients. Raises InputError for a
    model without trainable parameters.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module; got {type(model).__name__}.")
    notes = []
    twin = copy.deepcopy(model)
    small = {str(p.dtype) for p in twin.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
    if small:
        twin = twin.float()
        notes.append(f"computed on a float32 copy of the {' and '.join(sorted(small))} model")
    if any(m.training and isinstance(m, _RANDOM) for m in twin.modules()):
        notes.append("the model is in training mode: one fixed draw of its dropout, or batch statistics, was measured")
    parameters = [p for p in twin.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("no parameter of the model requires a gradient; set requires_grad on those to be measured.")
    return twin, parameters, tuple(notes)


def model_hessian(model: nn.Module, loss: ModelLoss | Sequence[ModelLoss]) -> tuple[Operator, tuple[str, ...]]:
    """The Hessian of ``loss(model)`` (the mean of several) over the trainable parameters, and notes to show with it.

    ``loss`` is given a copy of the model, so it has to compute from its argument: ``lambda m: mse_loss(m(x), y)``.
    """
    twin, parameters, notes = prepared(model)
    if callable(loss):
        return hessian_operator(lambda: _called(loss, twin), parameters), notes
    closures = [lambda one=one: _called(one, twin) for one in loss]
    return hessian_operator(closures, parameters), notes


_RANDOM = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


def _called(loss: ModelLoss, model: nn.Module) -> Tensor:
    try:
        return loss(model)
    except RuntimeError as error:
        if "dtype" in str(error):
            raise InputError(
                f"the loss failed on the float32 copy of the model: {error}. Give it float32 inputs."
            ) from error
        raise


def _value(loss: Loss) -> Tensor:
    value = loss()
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"expected a scalar loss; got {got}. Reduce it with .mean() or .sum().")
    if not value.requires_grad:
        raise InputError(
            "the loss does not depend on the parameters in a differentiable way: it was detached, computed under "
            "no_grad, went through argmax or rounding, or uses another model than the one it was given."
        )
    return value.reshape(())


def _gradients(loss: Loss, parameters: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    value = _value(loss)
    number = float(value.detach())
    if not torch.isfinite(value.detach()):
        raise NotFiniteError(f"the loss is {number}; a curvature needs a finite one.")
    try:
        found = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise _not_twice(error) from error
    if all(g is None for g in found):
        raise InputError("the loss does not depend on the parameters; it has to use the model or tensors it is given.")
    gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
    if not all(bool(torch.isfinite(g).all()) for g in gradients):
        raise NotFiniteError("the gradient of the loss has NaN or Inf.")
    return gradients, number


def _not_twice(error: RuntimeError) -> InputError:
    return InputError(
        f"the loss cannot be differentiated twice: {error}. Fused attention kernels have no second derivative; use "
        "attn_implementation='eager', or torch.nn.attention.sdpa_kernel(SDPBackend.MATH) around the loss."
    )


def _check_parameters(parameters: Iterable[Tensor], what: str) -> list[Tensor]:
    ps = list(parameters)
    wrong = []
    if not ps:
        wrong.append("no parameters were given")
    if not all(p.requires_grad for p in ps):
        wrong.append("every parameter needs requires_grad")
    if len({(p.dtype, p.device) for p in ps}) > 1:
        wrong.append(f"one dtype and device expected; got {sorted({f'{p.dtype} on {p.device}' for p in ps})}")
    if any(p.dtype not in (torch.float32, torch.float64) for p in ps):
        wrong.append("float32 or float64 expected: half precision is too coarse for second derivatives")
    if wrong:
        raise InputError(problems(what, wrong))
    return ps
