"""Structured output: a client's JSON schema, regular expression, choices or grammar is checked and compiled to one kind of grammar."""
