"""GPT from Megatron-Core's layers: its weights by name, its initial values, its attention core and
norms."""
