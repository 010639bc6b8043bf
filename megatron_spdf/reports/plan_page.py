def render_plan_page(facts, recipe): return ""
