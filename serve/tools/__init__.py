"""Tool calls: how a model is told of tools, how it is held to calling them well, and how its calls are read."""
