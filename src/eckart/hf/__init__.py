"""Everything that touches transformers, peft or datasets."""

# Before anything of this room: eckart.hooks imports eckart.hf.registry as soon as this module is loaded, and
# must not do so half-way through the import of the registry itself.
import transformers.modeling_utils  # noqa: F401
