"""The HTTP API, which is OpenAI's, over `serve.service`. Only this package imports fastapi."""
