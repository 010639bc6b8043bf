"""Exit codes of pretrain.py; launch scripts decide by them whether to start again."""

FINISHED = 0
BAD_INPUT = 2  # the recipe, the data, the layout or the run directory: starting again will not help
# non-finite numbers, sparsity drift, saves that fail: look at the log before starting again
GUARD_STOPPED = 3
LOST_RANK = 4  # a rank is missing, died or hangs: start again, perhaps on other nodes
# SIGTERM or SIGUSR1: a checkpoint was saved, start again to go on (EX_TEMPFAIL)
STOPPED_ON_SIGNAL = 75
