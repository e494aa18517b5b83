"""Everything that touches transformers, peft or datasets."""
