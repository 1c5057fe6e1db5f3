"""Methods side by side: every row with the same teacher, text, budget, seed and evaluation (`bimos compare`).

`rows` reads which there are to be, `run` works through them, `work` is what one does in a process of its own, `table`, `paired`, `pareto`
and `page` show what came out.
"""

TEACHER = "fp16"  # the row of the model itself
