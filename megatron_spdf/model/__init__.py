"""Decoders from Megatron-Core's layers: initial values, attention core, norms, LM head."""
