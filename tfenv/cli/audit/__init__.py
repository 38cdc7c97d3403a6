"""The reports of `tfgpu audit`, one module each: `add_arguments` describes it, `run` makes it."""
