"""Sections of a recipe under SµPar whose multipliers all differ from one, at width 64 with a quarter
of the weights: also learning rates and spreads of linear weights, by 1 / (2 x 0.25)."""

MUP = {"parametrization": "mup",
       "mup_base": {"hidden": 32, "input_multiplier": 3.0, "output_multiplier": 3.0}}
