"""Text: examples, files, conversations, prompt groups and tokens."""
