"""From a table of labelled texts to what a Trainer takes: reading, checking, labels, the split, tokens, metrics.

`bitfit train` and `bitfit eval` are made of these parts. Their messages name the options of those two commands, since
that is where a user can do something about a table.
"""
