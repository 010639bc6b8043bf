from small_runs import ranks, warm_ranks  # noqa: F401
