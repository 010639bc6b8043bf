from small_runs import (  # noqa: F401
    corpus,
    make_deep_recipe,
    make_recipe,
    ranks,
    warm_ranks,
)
