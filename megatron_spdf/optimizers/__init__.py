"""Optimizers, one file each: fields of the recipe, named state, how it is built on any engine."""
