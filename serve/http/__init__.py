"""The HTTP front: OpenAI's API over `serve.service`. The only fastapi in the tree."""
