"""One verb a file: do a step to a model, then verify what was promised. Nothing algorithmic lives here.

A stage is a module with `run(context) -> report`, which writes into `context.folder`, and
`verify(context)`, which reads back what was written and raises when a promise is broken.
"""
