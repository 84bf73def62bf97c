"""What `reproduce.py` is made of: plan, run what is missing, choose and average, render.

`studies` reads which runs a table consists of · `plan` gives each an id and a turn · `store` keeps one JSON per run ·
`runner` does the missing ones · `aggregate` chooses the learning rate and averages · `cost` estimates what is left ·
`paper` holds the paper's figures · `render`, `figures` and `claims` show ours beside them, on `markdown`.
"""
