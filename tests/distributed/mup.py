"""Sections of a recipe under SµPar whose multipliers all differ from one."""

MUP = {"parametrization": "mup",
       "mup_base": {"hidden": 16, "input_multiplier": 3.0, "output_multiplier": 2.0}}
