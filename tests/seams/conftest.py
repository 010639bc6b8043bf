from small_runs import corpus, make_deep_recipe, make_recipe, warm_ranks  # noqa: F401
