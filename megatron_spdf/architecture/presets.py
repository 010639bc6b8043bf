"""Model shapes by name: layers, hidden size, attention heads.

GPT-2: Radford et al. 2019, Table 2 (small is the 124M model). GPT-3: Brown et al. 2020, Table 2.1,
with the head counts that divide the width. `gpt2_small` and `gpt3_xl` are the two models of SPDF
(Table 1).
"""

PRESETS: dict[str, dict[str, int]] = {
    "gpt2_small": {"layers": 12, "hidden": 768, "heads": 12},
    "gpt2_medium": {"layers": 24, "hidden": 1024, "heads": 16},
    "gpt2_large": {"layers": 36, "hidden": 1280, "heads": 20},
    "gpt2_xl": {"layers": 48, "hidden": 1600, "heads": 25},
    "gpt3_125m": {"layers": 12, "hidden": 768, "heads": 12},
    "gpt3_350m": {"layers": 24, "hidden": 1024, "heads": 16},
    "gpt3_760m": {"layers": 24, "hidden": 1536, "heads": 16},
    "gpt3_xl": {"layers": 24, "hidden": 2048, "heads": 16},
    "gpt3_2b7": {"layers": 32, "hidden": 2560, "heads": 32},
    "gpt3_6b7": {"layers": 32, "hidden": 4096, "heads": 32},
    "gpt3_13b": {"layers": 40, "hidden": 5120, "heads": 40},
    "gpt3_175b": {"layers": 96, "hidden": 12288, "heads": 96},
}
