"""Names of the files of an adapter that PEFT reads.

They have a module of their own because importing peft imports what registers Eckart's adapters, which needs them too.
"""

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
