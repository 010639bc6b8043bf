"""Published figures of SPDF (Thangarasa et al. 2023), as printed, for reports and for tests."""

from __future__ import annotations

from dataclasses import dataclass

# Supplement, table 2. Model -> sparsity -> FLOPs per sequence, total (1e18), ratio to dense.
PRETRAINING = {
    "gpt2_small": {0.0: (1.99e12, 2.43, 1.0), 0.5: (1.47e12, 1.79, 0.737),
                   0.75: (1.20e12, 1.46, 0.601)},
    "gpt3_xl": {0.0: (1.86e13, 236.10, 1.0), 0.5: (1.12e13, 141.87, 0.601),
                0.75: (7.46e12, 94.76, 0.401)},
}
SEQUENCES = {"gpt2_small": 1.22e6, "gpt3_xl": 1.27e7}
# Supplement, table 3. Fine-tuning, the same at any sparsity: FLOPs per sequence, and totals (1e18)
# by task.
FINE_TUNING = {
    "gpt2_small": (1.36e11, {"E2E": 0.052, "WebNLG": 0.022, "DART": 0.051, "Curation": 0.014}),
    "gpt3_xl": (1.39e12, {"E2E": 0.524, "WebNLG": 0.226, "DART": 0.524, "Curation": 0.141}),
}
# Tokens of a sequence. With this length the FLOPs of forward passes alone equal the printed ones.
FINE_TUNING_LENGTH = 512
# Paper, table 2. Pre-training and fine-tuning on E2E together: total (1e18), speed-up over dense.
TOGETHER = {
    "gpt2_small": {0.0: (2.48, 1.0), 0.5: (1.84, 1.34), 0.75: (1.52, 1.64)},
    "gpt3_xl": {0.0: (236.62, 1.0), 0.5: (142.40, 1.66), 0.75: (95.29, 2.48)},
}
# Paper, table 1. BLEU on E2E, WebNLG and DART, perplexity on the Curation Corpus, after dense
# fine-tuning.
SCORED = ("E2E BLEU", "WebNLG BLEU", "DART BLEU", "Curation perplexity")
SCORES = {
    "gpt2_small": {0.0: (67.49, 63.42, 46.30, 13.38), 0.5: (67.39, 63.10, 45.74, 15.09),
                   0.75: (66.50, 62.64, 44.97, 17.14)},
    "gpt3_xl": {0.0: (68.10, 63.62, 47.71, 8.28), 0.5: (67.98, 63.47, 47.10, 9.21),
                0.75: (67.66, 63.06, 46.96, 11.03)},
}
NAMES = {"gpt2_small": "GPT-2 Small", "gpt3_xl": "GPT-3 XL"}


@dataclass(frozen=True)
class Contradiction:
    """Cells of the paper that cannot all be right. No formula is bent to match them."""

    cells: str
    why: str


CONTRADICTIONS = (
    Contradiction("supplement, table 3: fine-tuning totals of E2E, Small 0.052 and XL 0.524",
                  "the printed FLOPs per sequence make them 382k and 377k sequences, and the XL "
                  "cell equals DART's, whose Small cell is 0.051"),
    Contradiction("supplement, table 3: FLOPs per sequence, Small 1.36e11 and XL 1.39e12",
                  "headed forward and backward, they are those of forward passes over 512 tokens "
                  "alone"),
    Contradiction("paper, table 2: dense totals of WebNLG and DART; XL at 50%, DART and Curation",
                  "the two cells of each pair look exchanged"),
    Contradiction("text: attention 13.3% and vocabulary 27% of GPT-2 Small's FLOPs",
                  "23.4% and 23.9% by the totals of supplement, table 2"),
)
