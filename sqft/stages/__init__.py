"""One verb a file: do a step to a model, then prove what was promised. Nothing algorithmic lives here.

A stage is a module with `run(context) -> report`, which writes into `context.folder`, and
`prove(context)`, which reads back what was written and raises when a promise is broken.
"""
