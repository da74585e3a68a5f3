"""/v1/responses: OpenAI's newer API for chats. Nothing is stored, so each request holds the whole conversation."""
