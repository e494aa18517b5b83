"""PEFT's LoRA on Eckart's own linear layers.

Note [A dispatcher for PEFT]. PEFT chooses the LoRA of a layer by a row of functions in ``peft.tuners.lora.model`` and
refuses what none of them takes. It has a register for further layers, but as a part of one config object, which no
file keeps, so ``PeftModel.from_pretrained`` cannot know it. So the last function of the row, ``dispatch_default``, is
replaced by one that takes Eckart's linear layers and hands everything else to the function that was there. It happens
when both PEFT and Eckart have been imported, in either order (:mod:`eckart.hooks`). Other layers, and processes that
do not import Eckart, see PEFT as it is.
"""

from __future__ import annotations

import sys
from typing import Any

from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from eckart.errors import EckartError
from eckart.layers.linear import ReplacedLinear

PEFT_MODEL = "peft.tuners.lora.model"


class LoraOnFactors(Linear):  # type: ignore[misc]
    """y = layer(x) + scaling · B A x beside a factored or quantised layer; training and several adapters work.

    It cannot be merged: W + B A is no longer of the layer's rank or on its grid. Raises EckartError for that.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """PEFT would read them too, with a warning that it does not know the layer."""
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        kind = type(self.get_base_layer()).__name__
        raise EckartError(
            f"an adapter cannot be merged into a {kind}: the sum is not {kind} any more. Keep it beside the layer, or "
            "make the model dense first: eckart export DIR --to dense."
        )


def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """The LoRA of one of Eckart's linear layers; None for any other module."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, ReplacedLinear):
        return None
    lora: nn.Module = LoraOnFactors(target, adapter_name, config=config, **kwargs)
    return lora


def register() -> None:
    """See Note [A dispatcher for PEFT]. Once is enough; a PEFT without that function stays as it is."""
    row = vars(sys.modules[PEFT_MODEL])
    usual = row.get("dispatch_default")
    if usual is None or getattr(usual, "takes_eckart", False):
        return

    def dispatch_default(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
        found = dispatch(target, adapter_name, config, **kwargs)
        return usual(target, adapter_name, config=config, **kwargs) if found is None else found

    dispatch_default.takes_eckart = True  # type: ignore[attr-defined]
    row["dispatch_default"] = dispatch_default


# The import of PEFT above may be the first, and then the hook on it finds this module half-way: so here, not there.
register()
