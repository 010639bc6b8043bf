"""Sections of a recipe under SµPar whose multipliers all differ from one, at width 64 with a
quarter of the weights: those of learning rates and variances of linear weights are 1 / (2 x 0.25).
"""

MUP = {"parametrization": "mup",
       "mup_base": {"hidden": 32, "head_width": 4, "input_multiplier": 3.0,
                    "output_multiplier": 3.0}}
