from small_runs import warm_ranks  # noqa: F401
