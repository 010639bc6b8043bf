from small_runs import corpus, make_deep_recipe, make_recipe  # noqa: F401
