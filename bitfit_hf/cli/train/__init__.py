"""What `bitfit train` and `bitfit eval` do. Nothing in here is imported before one of them runs.

A table becomes a [`Task`](data.py): examples, labels, a split. A [`Plan`](plan.py) says what is going to happen, and
is all that `--dry-run` needs. A [`Run`](run.py) trains with a stock Trainer and the callback, and the
[report](report.py) says how good the result is beside the majority class and a frozen body, and what to do with it.
"""
