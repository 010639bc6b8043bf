from small_runs import ranks  # noqa: F401
