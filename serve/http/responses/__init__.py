"""/v1/responses: OpenAI's newer API for the same answers as a chat's. Nothing is stored, a conversation is sent whole."""
