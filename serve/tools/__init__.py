"""Tool calls: how tools are described to a model, how a grammar constrains its calls, and how the calls are parsed."""
