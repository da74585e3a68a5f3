"""The HTTP front: OpenAI's API over `serve.service`. Only this package imports fastapi."""
