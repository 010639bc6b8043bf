from small_runs import corpus, make_deep_recipe, make_recipe, ranks  # noqa: F401
