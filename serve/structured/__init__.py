"""Answers that must have a form: what clients may ask for, checked, and written as one kind of grammar."""
