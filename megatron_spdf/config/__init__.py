"""What a run is: typed, validated, documented field by field; loaded from configs/*.yaml plus key=value."""

from megatron_spdf.config.compare import changes_of_run
from megatron_spdf.config.load import load_recipe, make_recipe, parse_recipe, render_recipe, save_recipe
from megatron_spdf.config.recipe import Recipe

__all__ = ["Recipe", "changes_of_run", "load_recipe", "make_recipe", "parse_recipe", "render_recipe",
           "save_recipe"]
