"""General ability: tasks of lm-evaluation-harness, item by item, on a model before and after it is edited."""
