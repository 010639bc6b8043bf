"""What a model is, in pure Python: its part of a recipe, its parameters by name, what it costs, and
the names that other programs have for it. A file beside `base.py` is a family of models."""
