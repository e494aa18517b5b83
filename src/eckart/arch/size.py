"""What the weights of a model cost."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from eckart.arch.kinds import is_experts, is_transformers_conv1d
from eckart.records import Site, Size


def model_size(model: nn.Module) -> Size:
    """Distinct parameters, bytes of parameters and persistent buffers, multiply-adds per token.

    A shared parameter counts once in parameters and bytes. Multiply-adds are those of the weights, not
    of attention scores or norms: every Linear, ``Conv1D``, router and ``in_proj_weight`` counts its
    entries, a convolution those of one output position, an embedding table nothing, since it is looked
    up. A mixture of experts counts all of its experts, an upper bound of what a token meets. A module
    that is called more than once per token counts once; so does each module of a shared weight.
    The layers that Eckart puts in count by the same rules; one that multiplies by weights of
    another module says so in ``own_macs``, one that keeps weights as integers in buffers counts them as
    parameters in ``own_parameters``. Weights of a tensor subclass (torchao) count the bytes that they hold.
    """
    distinct = list(model.parameters())
    persistent = set(model.state_dict(keep_vars=True))
    buffers = [buffer for name, buffer in model.named_buffers() if name in persistent]
    return Size(
        parameters=sum(parameter.numel() for parameter in distinct)
        + sum(getattr(module, "own_parameters", 0) for module in model.modules()),
        bytes=sum(_bytes(tensor) for tensor in (*distinct, *buffers)),
        macs=sum(_macs(module) for module in model.modules()),
    )


def site_size(site: Site, element_size: int, *, heads: int | None = None) -> Size:
    """What a dense site costs, biases left out; ``element_size`` is bytes per number.

    An embedding table is multiplied once per output head that is tied to it; ``heads`` says how many
    there are, and without it a tied table has one. Another site that several modules share is multiplied
    once by each of them.
    """
    numbers = site.weight_parameters
    uses = (int(bool(site.tied)) if heads is None else heads) if site.kind == "embedding" else 1 + len(site.tied)
    return Size(parameters=numbers, bytes=numbers * element_size, macs=numbers * uses)


def _bytes(tensor: Tensor) -> int:
    """Of the tensors inside where it is a wrapper around some."""
    if is_traceable_wrapper_subclass(tensor):
        inner, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in inner)
    return tensor.nbytes


def _macs(module: nn.Module) -> int:
    stated = getattr(module, "own_macs", None)
    if isinstance(stated, int):
        return stated
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return 0
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if isinstance(module, (nn.Linear, nn.Bilinear)) or is_transformers_conv1d(module):
        return own["weight"].numel() if "weight" in own else 0
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.weight.numel()
    if is_experts(module):
        return sum(p.numel() for p in own.values() if p.ndim == 3)
    return sum(p.numel() for name, p in own.items() if p.ndim == 2 and name.endswith("weight"))
