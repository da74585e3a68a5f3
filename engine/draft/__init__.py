"""Speculative decoding: drafts of a sequence's next tokens, so that one step can yield several."""
